"""Whose first token a client gets, and that decode's stream goes on exactly where prefill's stops."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.proxy.first_token import Early, EarlyReader, Mismatch, Splice, eligible
from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, ClientRequest
from mooncake_connector.scheduler.proxy.sse import Events

DONE = b"data: [DONE]\n\n"


def text_event(text: str, finish: str | None = None, created: int = 7, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return event({"id": "cmpl-1", "created": created, "model": "m", "choices": [choice], **more})


def chat_event(delta: dict[str, Any], finish: str | None = None, created: int = 7) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event({"id": "chatcmpl-1", "created": created, "model": "m", "choices": [choice]})


def event(found: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(found, separators=(",", ":")).encode() + b"\n\n"


def read(*events: bytes) -> Early | None:
    reader = EarlyReader()
    return next((found for one in events if (found := reader.feed(one))), None)


def parsed(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(e[6:]) for e in Events().feed(stream) if e.startswith(b"data: {")]


def text_of(stream: bytes) -> str:
    return "".join(c["text"] for e in parsed(stream) for c in e["choices"])


def request(path: str = COMPLETIONS, **fields: Any) -> ClientRequest:
    prompt = {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
    return ClientRequest.parse(path, json.dumps({"stream": True, **prompt, **fields}).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1, 2]},
        {"prompt": " a"},
        {"n": 1, "stop": [], "max_tokens": 1, "temperature": 1, "seed": 3, "min_tokens": 4},
        {"stop_token_ids": [3], "ignore_eos": True, "stream_options": {"include_usage": True}},
    ],
)
def test_eligible(fields: dict[str, Any]) -> None:
    assert eligible(request(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False},
        {"prompt": ["a", "b"]},
        {"prompt": [[1], [2]]},
        {"n": 2},
        {"best_of": 2},
        {"logprobs": 0, "top_logprobs": 1},
        {"logprobs": 0},
        {"stop": "x"},
        {"stop": ["x"]},
        {"echo": True},
        {"return_token_ids": True},
        {"max_tokens": 0},
        {"tools": [{"type": "function"}]},
    ],
)
def test_not_eligible(fields: dict[str, Any]) -> None:
    assert not eligible(request(**fields))


def test_early_text() -> None:
    early = read(text_event("Hi", "length", system_fingerprint="x"), DONE)
    assert early is not None
    (shown,) = parsed(early.events)
    assert shown["choices"][0]["text"] == early.text == "Hi"
    assert shown["choices"][0]["finish_reason"] is None
    assert "system_fingerprint" not in shown


def test_early_chat_has_the_role_first() -> None:
    role = chat_event({"role": "assistant", "content": ""})
    early = read(role, chat_event({"reasoning": "Hm"}, "length"), DONE)
    assert early is not None
    assert early.field == "reasoning"
    first, second = parsed(early.events)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0] == {
        "index": 0,
        "delta": {"reasoning": "Hm"},
        "logprobs": None,
        "finish_reason": None,
    }


@pytest.mark.parametrize(
    "events",
    [
        [text_event("Hi", "stop")],
        [text_event("", "length")],
        [text_event(" \n", "length")],
        [text_event("", "stop")],
        [chat_event({"role": "assistant", "content": ""}), chat_event({}, "length")],
        [chat_event({"tool_calls": [{"index": 0}], "content": "x"}, "length")],
        [event({"id": "x", "choices": [], "usage": {"total_tokens": 3}})],
        [DONE],
    ],
)
def test_no_early_token(events: list[bytes]) -> None:
    assert read(*events) is None


@given(
    st.lists(st.text(min_size=0, max_size=4), min_size=1, max_size=6),
    st.integers(1, 6),
    st.lists(st.integers(1, 30), max_size=40),
    st.sampled_from([7, 8]),
)
def test_splice_is_decodes_own_stream(pieces: list[str], length: int, cuts: list[int], created: int) -> None:
    whole = "".join(pieces)
    first = whole[:length]
    if not first.strip():
        return
    early = read(text_event(first, "length"))
    assert early is not None
    events = [text_event(piece, created=created) for piece in pieces[:-1]]
    stream = b"".join([*events, text_event(pieces[-1], "stop", created=created), DONE])
    splice, out, at = Splice(early), early.events, 0
    for cut in [*cuts, len(stream)]:
        out += splice.feed(stream[at : at + cut])
        at += cut
    out += splice.end()
    assert text_of(out) == whole
    assert out.endswith(DONE)
    assert {e["created"] for e in parsed(out)} == {7}
    assert [e["choices"][0]["finish_reason"] for e in parsed(out)][-1] == "stop"


def test_after_the_first_token_bytes_pass_untouched() -> None:
    early = read(text_event("Hi", "length"))
    assert early is not None
    splice = Splice(early)
    assert splice.feed(text_event("Hi")) == b""
    odd = b'data: {"choices" : [ ],"x":1}'
    assert splice.feed(odd) == odd


def test_the_role_is_said_once() -> None:
    role = chat_event({"role": "assistant", "content": ""})
    early = read(role, chat_event({"content": "Hi"}, "length"))
    assert early is not None
    splice = Splice(early)
    assert splice.feed(role + chat_event({"content": "Hi"})) == b""
    assert parsed(splice.feed(chat_event({"content": " you"})))[0]["choices"][0]["delta"] == {
        "content": " you"
    }


def test_a_finish_reason_is_kept_without_its_text() -> None:
    early = read(text_event("Hi", "length"))
    assert early is not None
    (last,) = parsed(Splice(early).feed(text_event("Hi", "length") + DONE))
    assert last["choices"][0]["text"] == ""
    assert last["choices"][0]["finish_reason"] == "length"


def test_an_error_in_place_of_the_first_token() -> None:
    early = read(text_event("Hi", "length"))
    assert early is not None
    splice = Splice(early)
    with pytest.raises(Mismatch, match="load failed"):
        splice.feed(event({"error": {"message": "load failed"}}))
    assert not splice.begun


def test_an_error_later_is_passed_on() -> None:
    early = read(text_event("Hi", "length"))
    assert early is not None
    splice = Splice(early)
    assert splice.feed(text_event("Hi")) == b""
    assert splice.begun
    failed = event({"error": {"message": "load failed"}})
    assert splice.feed(failed) == failed
    assert splice.end() == b""


@pytest.mark.parametrize(
    "stream",
    [
        [text_event("Ho")],
        [text_event("H"), text_event("o")],
        [text_event("H", "stop")],
        [text_event("H"), DONE],
        [text_event("H")],
        [],
    ],
)
def test_another_token_is_an_error(stream: list[bytes]) -> None:
    early = read(text_event("Hi", "length"))
    assert early is not None
    splice = Splice(early)

    def run() -> None:
        for one in stream:
            splice.feed(one)
        splice.end()

    with pytest.raises(Mismatch, match="first token"):
        run()


def test_reasoning_is_not_content() -> None:
    early = read(chat_event({"content": "Hi"}, "length"))
    assert early is not None
    with pytest.raises(Mismatch, match="reasoning"):
        Splice(early).feed(chat_event({"reasoning": "Hi"}))
