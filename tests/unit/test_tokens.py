"""Prompts' token ids in the proxy: what is told and what is not, conversations, and salts."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from mooncake_connector.scheduler.prompts.conversation import conversation_key, salt
from mooncake_connector.scheduler.prompts.tokenizer_files import TokenizerFiles, _templates
from mooncake_connector.scheduler.prompts.tokens import Prompt, Tokenizer, Tokens
from mooncake_connector.scheduler.proxy.openai import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    BadRequest,
    ClientRequest,
)
from tests.unit.chat_templates import TEMPLATES
from tests.unit.tiny_tokenizers import make

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def completion(prompt: Any, **fields: Any) -> ClientRequest:
    return ClientRequest.parse(COMPLETIONS, json.dumps({"prompt": prompt, **fields}).encode())


def chat(*messages: dict[str, Any] | str, **fields: Any) -> ClientRequest:
    listed = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    return ClientRequest.parse(CHAT, json.dumps({"messages": listed, **fields}).encode())


def with_template(name: str) -> Tokens:
    tokens = Tokens()
    files = TokenizerFiles(make("byte_level").to_str(), {"bos_token": "<s>"}, {"default": TEMPLATES[name]})
    tokens._tokenizer = Tokenizer(files)
    return tokens


@pytest.fixture
def tokens() -> Iterator[Tokens]:
    found = with_template("parts")
    yield found
    found.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without the model."""
    (tmp_path / "tokenizer.json").write_text(make("byte_level").to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["parts"])
    return tmp_path


def whole(text: str, special: bool = True) -> list[int]:
    return list(make("byte_level").encode(text, add_special_tokens=special).ids)


def listed(prompt: Prompt | None) -> tuple[list[int], bool]:
    assert prompt is not None
    return prompt.ids.tolist(), prompt.exact


async def test_completions(tokens: Tokens):
    long = "the quick <|im_end|> fox 🙂 " * 200
    for text in ("", " hello", long):
        assert listed(await tokens.ids(completion(text))) == (whole(text), True)
    assert listed(await tokens.ids(completion(long, add_special_tokens=False))) == (whole(long, False), True)
    assert listed(await tokens.ids(completion(["one", "two"]))) == (whole("one"), False)
    assert listed(await tokens.ids(completion(["one"]))) == (whole("one"), True)


async def test_token_ids_need_no_tokenizer():
    tokens = Tokens()
    many = list(range(200_000))
    assert listed(await tokens.ids(completion([5, 6, 7]))) == ([5, 6, 7], True)
    assert listed(await tokens.ids(completion([[5, 6], [7]]))) == ([5, 6], False)
    assert listed(await tokens.ids(completion(many))) == (many, True)
    assert await tokens.ids(completion("text")) is None
    assert await tokens.ids(chat("text")) is None
    tokens.close()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 50])
async def test_ids_are_the_same_however_they_are_cut(count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mooncake_connector.scheduler.prompts.tokens._PIECE_BYTES", 8)
    tokens = Tokens()
    for text in (json.dumps([*range(count)]), json.dumps([*range(1, count + 1)], indent=3)):
        request = ClientRequest.parse(COMPLETIONS, b'{"prompt": %b}' % text.encode())
        assert listed(await tokens.ids(request)) == (json.loads(text), True)
    tokens.close()


async def test_a_chat(tokens: Tokens):
    said = await tokens.ids(chat({"role": "system", "content": " be nice"}, " hello ", "again" * 500))
    expected = "<s><|im_start|>system\nbe nice<|im_end|><|im_start|>user\nhello<|im_end|>"
    expected += "<|im_start|>user\n" + "again" * 500 + "<|im_end|><|im_start|>assistant\n"
    assert listed(said) == (whole(expected, False), True)


async def test_responses_and_messages_are_chats(tokens: Tokens):
    text = "<s><|im_start|>system\nbe nice<|im_end|><|im_start|>user\nhello<|im_end|><|im_start|>assistant\n"
    said = [{"role": "user", "content": "hello"}]
    for path, fields, special in (
        (RESPONSES, {"instructions": "be nice", "input": "hello"}, True),
        (RESPONSES, {"instructions": "be nice", "input": said}, True),
        (MESSAGES, {"system": "be nice", "messages": said}, False),
    ):
        request = ClientRequest.parse(path, json.dumps(fields).encode())
        assert listed(await tokens.ids(request)) == (whole(text, special), True)


async def test_pictures_end_what_is_known(tokens: Tokens):
    parts = [{"type": "text", "text": "look"}, PICTURE]
    said = await tokens.ids(chat("first", {"role": "user", "content": parts}, "and more"))
    assert listed(said) == (whole("<s><|im_start|>user\nfirst<|im_end|>", False), False)


@pytest.mark.parametrize(
    "request_",
    [
        completion("a" * 9, truncate_prompt_tokens=3),
        completion("a", prompt_embeds="AAAA"),
        completion({"no": "prompt"}),
        completion([1, -1]),
        completion([2**40]),
        completion([]),
        ClientRequest.parse(COMPLETIONS, b"{}"),
        ClientRequest.parse(CHAT, b'{"messages": 5}'),
        ClientRequest.parse(CHAT, b'{"messages": [5]}'),
        chat("a", chat_template="{{ messages }}"),
        chat("a", chat_template_kwargs={"tokenize": True}),
        chat("a", tools=[{"no": "function"}]),
        chat({"role": "user", "content": [{"type": "no such"}]}),
        chat({"content": "of nobody"}),
        chat(continue_final_message=True),
    ],
)
async def test_what_is_not_told(tokens: Tokens, request_: ClientRequest):
    found = await tokens.ids(request_)
    assert found is None or (request_.path, found.ids.size) == (COMPLETIONS, 0)


async def test_the_template_may_refuse():
    tokens = with_template("plain")
    assert await tokens.ids(chat("a")) is not None
    assert await tokens.ids(chat({"role": "tool", "content": "a"})) is None
    assert await tokens.ids(chat({"role": "user", "content": [PICTURE]})) is None  # nothing to cut it at
    tokens.close()


async def test_the_first_readable_offer_is_taken(folder: Path, caplog: pytest.LogCaptureFixture):
    tokens = Tokens()
    tokens.offer("an-organisation/a-model")
    assert not await tokens.loaded()
    tokens.offer(str(folder))
    tokens.offer("/")
    assert await tokens.loaded()
    expected = "<s><|im_start|>user\nhello<|im_end|><|im_start|>assistant\n"
    assert listed(await tokens.ids(chat("hello"))) == (whole(expected, False), True)
    assert not [r for r in caplog.records if "scheduler" in r.name]
    tokens.close()


async def test_a_folder_without_a_tokenizer_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "tekken.json").touch()
    tokens = Tokens(str(tmp_path))
    for _ in range(3):
        tokens.offer("anything")
        assert not await tokens.loaded()
    (record,) = [record for record in caplog.records if record.name == Tokens.__module__]
    assert str(tmp_path) in record.getMessage()
    assert "Mistral" in record.getMessage()
    tokens.close()


async def test_a_reader_does_not_outlive_the_proxy(folder: Path):
    tokens = Tokens(str(folder))
    tokens.offer("")
    await until(children)
    mine = children()
    tokens.close()
    assert not await tokens.loaded()
    await until(lambda: not children() & mine)


async def until(check: Callable[[], Any]) -> None:
    for _ in range(1000):
        if check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 10 s")


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


def test_models_that_vllm_renders_by_code_have_no_template():
    assert _templates("t", ["LlamaForCausalLM"]) == {"default": "t"}
    assert _templates({"default": "t", "tool_use": "u"}, None) == {"default": "t", "tool_use": "u"}
    assert _templates("t", ["GptOssForCausalLM"]) == _templates(None, None) == {}


async def test_without_a_template_only_completions_are_told():
    tokens = Tokens()
    tokens._tokenizer = Tokenizer(TokenizerFiles(make("byte_level").to_str()))
    assert await tokens.ids(chat("a")) is None
    assert await tokens.ids(completion("a")) is not None
    tokens.close()


async def test_the_engines_template_goes_before_all_and_the_processors_where_there_are_no_tools():
    files = TokenizerFiles(
        make("byte_level").to_str(), {}, {"default": "default", "tool_use": "tools"}, "processor"
    )
    plain = chat("a")
    tooled = chat("a", tools=[{"type": "function", "function": {"name": "f"}}])
    for mine, expected in ((None, ["processor", "tools"]), ("engine", ["engine", "engine"])):
        tokens = Tokens()
        tokens._tokenizer = Tokenizer(files, mine)
        found = [await tokens.ids(request) for request in (plain, tooled)]
        assert [listed(prompt)[0] for prompt in found] == [whole(text, False) for text in expected]
        tokens.close()


async def test_too_many_at_once_are_not_told(tokens: Tokens, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    prompt = tokens._prompt
    monkeypatch.setattr(tokens, "_prompt", lambda request: gate.wait(30) and prompt(request))
    monkeypatch.setattr(tokens, "_waiting", 3)
    request = completion("a" * 5000)
    waiting = [asyncio.ensure_future(tokens.ids(request)) for _ in range(3)]
    await asyncio.sleep(0)
    assert await tokens.ids(request) is None
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    assert await tokens.ids(request) is None  # its thread has not ended
    gate.set()
    assert [listed(await task) for task in waiting[1:]] == [(whole("a" * 5000), True)] * 2
    assert await tokens.ids(request) is not None


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = "{'transformers', 'tokenizers', 'jinja2', 'torch'}"
    code = f"import sys, mooncake_connector.scheduler.prompts.tokens; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_turns_of_a_conversation_share_its_key():
    system, first = {"role": "system", "content": "s"}, {"role": "user", "content": [PICTURE]}
    answer = {"role": "assistant", "content": "a"}
    key = conversation_key(chat(system, first))
    assert key == conversation_key(chat(system, first, answer, "more", temperature=1)) != ""
    others = [
        chat(first),
        chat(system, "other"),
        chat(system, answer),
        chat({**system, "content": "t"}, first),
    ]
    assert len({key, *map(conversation_key, others)}) == 5
    assert conversation_key(completion("text")) == ""
    assert conversation_key(ClientRequest.parse(CHAT, b'{"messages": 5}')) == ""
    assert (
        conversation_key(chat("a", session_id="x")) == conversation_key(completion("b", session_id="x")) != ""
    )


def test_only_what_vllm_keeps_apart_is_salted():
    plain = completion("a", model="base")
    salted = completion("a", model="base", cache_salt="mine")
    assert salt(plain) == salt(plain, {"adapter"}) == 0
    assert salt(salted) == salt(completion("b", model="other", cache_salt="mine"))
    adapted = completion("a", model="adapter")
    both = completion("a", model="adapter", cache_salt="mine")
    assert len({0, salt(salted), salt(adapted, {"adapter"}), salt(both, {"adapter"})}) == 4
    assert salt(adapted) == 0


HOSTILE = {
    "one character": completion("a" * 1_000_000),
    "four tokens each": completion("🙂" * 250_000),
    "nearly marks": completion("<|im_start|" * 100_000),
    "marks": completion("<|im_start|>" * 90_000),
    "ids": completion([*range(1_000_000)]),
    "messages": chat(*["x"] * 100_000),
    "parts": chat({"role": "user", "content": [{"type": "text", "text": "x"}] * 100_000}),
    "tools": chat("x", tools=[{"type": "function", "function": {"name": "f"}}] * 30_000),
    "arguments": chat(
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"arguments": "[" * 10**6}}]}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_prompts_do_not_stop_the_event_loop(name: str, tokens: Tokens):
    worst = []
    for _ in range(5):
        worst.append(await longest_stop(tokens.ids(HOSTILE[name])))
        start = time.perf_counter()
        conversation_key(HOSTILE[name])
        worst[-1] = max(worst[-1], time.perf_counter() - start)
        # Whoever else is on the machine stops it, too, but not every time.
        if worst[-1] < 0.02:
            return
    raise AssertionError(worst)


async def longest_stop(work: Coroutine[Any, Any, Any]) -> float:
    task = asyncio.ensure_future(work)
    longest, last = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.sleep(0)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    return longest


def test_lone_surrogates_are_refused():
    for text in (b"\\ud800", b"x\\udc00y", b"\xed\xa0\x80"):
        with pytest.raises(BadRequest):
            ClientRequest.parse(COMPLETIONS, b'{"prompt": "%b"}' % text)
