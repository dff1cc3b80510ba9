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
from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, ClientRequest
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


@pytest.mark.parametrize("template", TEMPLATES)
async def test_as_vllm_renders_other_templates(template: str, tmp_path: Path):
    # vLLM's own code without an engine: the tiny models' template knows neither tools nor parts.
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    from vllm.config import ModelConfig, VllmConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import renderer_from_config
    from vllm.renderers.online_renderer import OnlineRenderer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizers.make("metaspace_first"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    model = ModelConfig(model=str(tmp_path), dtype="float32", max_model_len=8192)
    vllm = OnlineRenderer(
        model,
        renderer_from_config(VllmConfig(model_config=model)),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    tokens = Tokens(str(tmp_path))
    tokens.offer("")
    assert await tokens.loaded()
    refused = 0
    for body in [*CHATS, *ONLY_ASKED]:
        asked = ChatCompletionRequest.model_validate(json.loads(json.dumps({"model": "m", **body})))
        try:
            _, ((rendered),) = await vllm.render_chat(asked)
        except VLLMValidationError:
            assert await tokens.ids(request(CHAT, body)) is None
            refused += 1
            continue
        assert await told(tokens, CHAT, body) == rendered["prompt_token_ids"], body
    assert refused <= 1
    tokens.close()
