"""Token ids that the proxy tells are those that real vLLM computes."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mooncake_connector.demo.models import make
from mooncake_connector.scheduler.prompts.tokens import Tokens
from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, MESSAGES, RESPONSES, ClientRequest
from tests.engine.harness import Cluster
from tests.unit import tiny_tokenizers
from tests.unit.chat_templates import TEMPLATES

TOOL = {
    "type": "function",
    "function": {
        "parameters": {"type": "object", "properties": {"z": {"type": "string"}}},
        "name": "find",
        "x": 1,
    },
}
CALL = {
    "type": "function",
    "function": {"name": "find", "arguments": '{"b": 1, "a": [1.0, "é"]}'},
    "id": "call-1",
    "index": 0,
}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


PROMPTS = [
    "hello world",
    " hello  world \n",
    "</s>the <s> token</s>s <pad>",
    "Ωμέγα 你好 🙂 naïve",
    "the quick brown fox " * 200,
]
CHATS: list[dict[str, Any]] = [
    {"messages": [user("hello </s> world <|im_end|> 🙂 Ωμέγα")]},
    {"messages": [system("be nice"), user("a"), assistant("b "), user("  c\n")]},
    {"messages": [user("long " * 300), assistant("answer " * 300), user("Straße")]},
    {"messages": [user("a"), assistant("b ")], "add_generation_prompt": False},
    {"messages": [user("a")], "add_special_tokens": True},
    {
        "messages": [user("a"), assistant("b ")],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    {"messages": [user([{"type": "text", "text": " a "}, {"type": "text", "text": "b"}])]},
    {"messages": [system("s"), user("a"), {"role": "developer", "content": "d"}, user("z")]},
    {"messages": [user("a"), assistant("b", reasoning_content="because")]},
    {"messages": [system("x-anthropic-billing-header: cch=1\nrest"), user("q")]},
    {"messages": [user("a")], "tools": [TOOL], "tool_choice": "none"},
    {
        "messages": [
            system("s"),
            user("a"),
            assistant(None, tool_calls=[CALL]),
            {
                "role": "tool",
                "content": [{"type": "text", "text": "r"}],
                "tool_call_id": "call-1",
                "name": "find",
            },
        ],
        "tools": [TOOL],
        "tool_choice": "none",
    },
    {
        "messages": [
            user("a"),
            assistant("", tool_calls=[{**CALL, "function": {"name": "f", "arguments": "no"}}]),
        ]
    },
    {"messages": [user("a")], "chat_template_kwargs": {"enable_thinking": False, "other": 1}},
]
FLAT = {
    "type": "function",
    "name": "find",
    "description": None,
    "parameters": {"type": "object", "properties": {"z": {"type": "string"}}},
    "strict": True,
}
CALLED = {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"b": 1, "a": [1.0, "é"]}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "found\n it"}
THOUGHT = {
    "type": "reasoning",
    "id": "r1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "because"}],
}


def said(text: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
        **fields,
    }


RESPONSES_BODIES: list[dict[str, Any]] = [
    {"input": "hello </s> world <|im_end|> 🙂 Ωμέγα"},
    {"input": "a", "instructions": "be nice "},
    {"input": "a", "instructions": "x-anthropic-billing-header: cch=1\nrest"},
    {"input": [user("a "), assistant("b "), user("  c\n")], "instructions": ""},
    {"input": [system("s"), user("long " * 300)], "instructions": "i", "reasoning": {"effort": "low"}},
    {"input": [user("a"), {"type": "message", "role": "developer", "content": "d"}, user("z")]},
    {"input": [user([{"type": "input_text", "text": " a "}, {"type": "input_text", "text": "b"}])]},
    {"input": [user("a"), said("b ", id="m1", status="completed"), user("c")], "truncation": "disabled"},
    {"input": [user("a"), said("b")], "reasoning": {"effort": "none"}},
    {"input": [user("a"), said("b ", status="in_progress")]},
    {"input": [user("a"), {**assistant("b "), "type": "message"}, said("c"), user("d")]},
    {"input": "a", "tools": [FLAT]},
    {"input": "a", "tools": [FLAT], "tool_choice": "none"},
    {"input": [user("a"), CALLED, {**CALLED, "call_id": "c2", "id": "f", "status": "completed"}, RESULT]},
    {"input": [user("a"), THOUGHT, said("well"), CALLED, RESULT, said("so"), user("b")], "tools": [FLAT]},
    {"input": [user("a"), THOUGHT, CALLED, RESULT, THOUGHT, said("x"), THOUGHT, user("b")]},
    {"input": [CALLED, said("then"), RESULT]},
    {"input": "a", "chat_template_kwargs": {"enable_thinking": False, "other": 1}},
    {"input": "a", "max_output_tokens": 5, "store": False, "temperature": 0, "text": {"verbosity": "low"}},
]
RESPONSES_UNTOLD: list[dict[str, Any]] = [
    {"input": "a", "previous_response_id": "resp_1"},
    {"input": "a", "truncation": "auto"},
    {"input": [user([{"type": "input_image", "image_url": "data:,"}])]},
    {"input": "a", "tools": [{"type": "custom", "name": "free"}]},
    {"input": [{**RESULT, "output": [{"type": "input_text", "text": "a"}]}]},
    {"input": [{**CALLED, "namespace": "n"}]},
    {"input": []},
    {"input": [5]},
    {"input": [said("b", status="odd")]},
    {},
]
THINKING = {"type": "thinking", "thinking": "because", "signature": "s"}
USE = {"type": "tool_use", "id": "t1", "name": "find", "input": {"b": 1, "a": [1.0, "é"]}}
GIVES = {"type": "tool_result", "tool_use_id": "t1", "content": "found\n it"}
TEXT = {"type": "text", "text": " two ", "cache_control": {"type": "ephemeral"}}
SCHEMA = {
    "name": "find",
    "description": "finds",
    "input_schema": {"properties": {"z": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
BILLED = {"type": "text", "text": "x-anthropic-billing-header: cch=1"}
MESSAGES_BODIES: list[dict[str, Any]] = [
    {"messages": [user("hello </s> world <|im_end|> 🙂 Ωμέγα")]},
    {"messages": [user("a "), assistant("b "), user("  c\n")], "system": "be nice "},
    {"messages": [user("long " * 300)], "system": [BILLED, TEXT, {"type": "text", "text": "more"}]},
    {"messages": [user("a")], "system": "x-anthropic-billing-header: cch=1\nrest"},
    {"messages": [user([TEXT])]},
    {"messages": [user([TEXT, {"type": "text", "text": "b"}, {"type": "text", "text": ""}])]},
    {"messages": [user("a"), assistant([{"type": "text", "text": "b "}])]},
    {"messages": [user("a"), assistant([THINKING, THINKING, TEXT]), user("c")]},
    {"messages": [user("a"), assistant([{"type": "redacted_thinking", "data": "x"}, TEXT]), user("c")]},
    {"messages": [user("a")], "tools": [SCHEMA], "tool_choice": {"type": "none"}},
    {"messages": [user("a")], "tools": [{**SCHEMA, "strict": True, "defer_loading": True}]},
    {"messages": [user("a")], "tools": []},
    {"messages": [user("a"), assistant([TEXT, USE]), user([GIVES])], "tools": [SCHEMA]},
    {"messages": [user("a"), assistant([THINKING, USE, {**USE, "id": "t2"}]), user([TEXT, GIVES, TEXT])]},
    {"messages": [user("a"), assistant([USE]), user([{**GIVES, "content": [TEXT, TEXT]}, GIVES])]},
    {"messages": [user("a"), assistant([{**USE, "input": {}}]), user([{**GIVES, "content": None}])]},
    {"messages": [user("a")], "output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}},
    {"messages": [user("a")], "thinking": {"type": "enabled", "budget_tokens": 2000}},
    {"messages": [user("a")], "chat_template_kwargs": {"enable_thinking": False, "other": 1}},
]
MESSAGES_UNTOLD: list[dict[str, Any]] = [
    {"messages": [user("a"), system("s")]},
    {"messages": [user("a")], "thinking": {"type": "disabled"}},
    {"messages": [user([{"type": "image", "source": {"type": "url", "url": "http://a"}}])]},
    {"messages": [user([{**GIVES, "content": [{"type": "tool_reference", "tool_name": "find"}]}])]},
    {"messages": [user("a"), assistant([{**USE, "id": None}])]},
    {"messages": "a"},
    {},
]
ONLY_ASKED = [
    {"messages": [user("a")], "reasoning_effort": "low"},
    {"messages": [user("a")], "reasoning_effort": "none"},
    {"messages": [user("a")], "documents": [{"title": "t", "text": "x"}]},
]


def request(path: str, body: dict[str, Any]) -> ClientRequest:
    return ClientRequest.parse(path, json.dumps(body).encode())


async def told(tokens: Tokens, path: str, body: dict[str, Any]) -> list[int]:
    found = await tokens.ids(request(path, body))
    assert found is not None, body
    assert found.exact
    return found.ids.tolist()


@pytest.fixture
async def tokens() -> AsyncIterator[Tokens]:
    found = Tokens()
    found.offer(str(make("tiny-llama")))
    assert await found.loaded()
    yield found
    found.close()


async def test_as_vllm_tokenizes(cluster: Cluster, http: aiohttp.ClientSession, tokens: Tokens):
    async def ask(body: dict[str, Any]) -> list[int]:
        async with http.post(f"{cluster.single.url}/tokenize", json={"model": "m", **body}) as answer:
            assert answer.status == 200, await answer.text()
            return list((await answer.json())["tokens"])

    for prompt in PROMPTS:
        for body in ({"prompt": prompt}, {"prompt": prompt, "add_special_tokens": False}):
            assert await told(tokens, COMPLETIONS, body) == await ask(body)
    for body in CHATS:
        asked = {name: value for name, value in body.items() if name != "tool_choice"}
        assert await told(tokens, CHAT, body) == await ask(asked)


async def test_as_vllm_computes(cluster: Cluster, http: aiohttp.ClientSession, tokens: Tokens):
    async def ask(path: str, body: dict[str, Any]) -> list[int]:
        fields = {"model": "m", "max_tokens": 1, "return_token_ids": True, **body}
        async with http.post(f"{cluster.url}{path}", json=fields) as answer:
            assert answer.status == 200, await answer.text()
            found = await answer.json()
            return list(found.get("prompt_token_ids") or found["choices"][0]["prompt_token_ids"])

    bodies = [(COMPLETIONS, {"prompt": prompt}) for prompt in (PROMPTS[2], [5, 6, 7], [[8, 9]])]
    bodies += [(CHAT, body) for body in (CHATS[1], CHATS[4], *ONLY_ASKED)]
    computed = await asyncio.gather(*(ask(path, body) for path, body in bodies))
    for (path, body), expected in zip(bodies, computed, strict=True):
        assert await told(tokens, path, body) == expected


async def test_as_vllm_counts(cluster: Cluster, http: aiohttp.ClientSession, tokens: Tokens):
    async def ask(path: str, body: dict[str, Any]) -> int:
        fields = {"model": "m", "max_tokens": 1, "max_output_tokens": 1, **body}
        async with http.post(f"{cluster.url}{path}", json=fields) as answer:
            assert answer.status == 200, await answer.text()
            return int((await answer.json())["usage"]["input_tokens"])

    bodies = [(RESPONSES, body) for body in RESPONSES_BODIES[:4]]
    bodies += [(MESSAGES, body) for body in MESSAGES_BODIES[:4]]
    counted = await asyncio.gather(*(ask(path, body) for path, body in bodies))
    for (path, body), expected in zip(bodies, counted, strict=True):
        assert len(await told(tokens, path, body)) == expected


def renderer(template: str, folder: Path) -> Any:
    """vLLM's own code without an engine: the tiny models' template knows neither tools nor parts."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers import renderer_from_config
    from vllm.renderers.online_renderer import OnlineRenderer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizers.make("metaspace_first"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=8192,
    ).save_pretrained(folder)
    model = ModelConfig(model=str(folder), dtype="float32", max_model_len=8192)
    return OnlineRenderer(
        model,
        renderer_from_config(VllmConfig(model_config=model)),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=True,
        tool_parser="hermes",
    )


async def rendered(vllm: Any, path: str, fields: dict[str, Any]) -> list[int]:
    """Token ids that vLLM makes of a request."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    fields = json.loads(json.dumps({"model": "m", "max_tokens": 4000, **fields}))
    if path == RESPONSES:
        found = await vllm.render_responses(ResponsesRequest.model_validate(fields))
        return list(found.engine_input["prompt_token_ids"])
    if path == CHAT:
        chat = ChatCompletionRequest.model_validate(fields)
    else:
        asked = AnthropicMessagesRequest.model_validate(fields)
        merged = AnthropicServingMessages._should_merge_inline_system(vllm)
        chat = AnthropicServingMessages.to_chat_completion_request(asked, merge_inline_system=merged)
    _, ((found),) = await vllm.render_chat(chat)
    return list(found["prompt_token_ids"])


@pytest.mark.parametrize("template", TEMPLATES)
async def test_as_vllm_renders_other_templates(template: str, tmp_path: Path):
    from vllm.exceptions import VLLMValidationError

    vllm = renderer(template, tmp_path)
    tokens = Tokens(str(tmp_path))
    tokens.offer("")
    assert await tokens.loaded()
    # One template refuses whom it does not know: the results of tools.
    picky = template == "plain"
    for path, bodies, refused in (
        (CHAT, [*CHATS, *ONLY_ASKED], 1 * picky),
        (RESPONSES, RESPONSES_BODIES, 4 * picky),
        (MESSAGES, MESSAGES_BODIES, 4 * picky),
    ):
        for body in bodies:
            try:
                expected = await rendered(vllm, path, body)
            except VLLMValidationError:
                assert await tokens.ids(request(path, body)) is None
                refused -= 1
                continue
            assert await told(tokens, path, body) == expected, body
        assert refused == 0
    for path, bodies in ((RESPONSES, RESPONSES_UNTOLD), (MESSAGES, MESSAGES_UNTOLD)):
        for body in bodies:
            assert await tokens.ids(request(path, body)) is None, body
    tokens.close()
