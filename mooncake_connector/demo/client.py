"""A small client of OpenAI's interface that keeps what the demo shows: text, token ids, timing, transfer."""

import json
import random
import time
from typing import Any

import aiohttp
import msgspec

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "prefill", "decode", "cache", "block"),
    *("transfer", "hello", "world", "model", "test", "key", "value"),
)


class Ask(msgspec.Struct, frozen=True):
    """One request, whatever engine it goes to.

    Attributes:
        title: for the reader.
        prompt: text; for a chat, what the user says.
        tokens: how many to generate.
        chat: whether it goes to /v1/chat/completions.
        stream: whether the answer is streamed.
    """

    title: str
    prompt: str
    tokens: int = 16
    chat: bool = False
    stream: bool = False


class Answer(msgspec.Struct, frozen=True):
    """What came back.

    Attributes:
        text: the generated text.
        token_ids: the generated tokens.
        prompt_tokens: how many tokens the prompt had; 0 where a stream does not say.
        first: seconds until the first token (of an unstreamed answer: until all of it).
        transfer: what the decode engine says of the KV transfer; empty for a single engine and for streams.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    first: float
    transfer: dict[str, Any]


class Refused(Exception):
    """The server answered with an error; the message has its status and text."""


def words(rng: random.Random, count: int) -> str:
    """`count` random words: about as many tokens."""
    return " ".join(rng.choices(WORDS, k=count))


async def ask(session: aiohttp.ClientSession, url: str, request: Ask) -> Answer:
    """Send `request` to `url`, greedily.

    Raises:
        Refused: the answer is an error, or a stream broke off.
        aiohttp.ClientError: no answer.
    """
    body: dict[str, Any] = {"model": "m", "max_tokens": request.tokens, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": request.stream}
    if request.chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        path = "/v1/completions"
        body["prompt"] = request.prompt
    started = time.perf_counter()
    async with session.post(url + path, json=body) as response:
        if response.status != 200:
            raise Refused(f"{url}{path} answered {response.status}: {await response.text()}")
        if request.stream:
            return await _read_stream(response, started)
        answer = await response.json()
    choice = answer["choices"][0]
    text = choice["message"]["content"] if request.chat else choice["text"]
    transfer = (answer.get("kv_transfer_params") or {}).get("transfer") or {}
    return Answer(
        text=text or "",
        token_ids=tuple(choice["token_ids"]),
        prompt_tokens=answer["usage"]["prompt_tokens"],
        first=time.perf_counter() - started,
        transfer=transfer,
    )


async def _read_stream(response: aiohttp.ClientResponse, started: float) -> Answer:
    first: float | None = None
    text: list[str] = []
    token_ids: list[int] = []
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            return Answer("".join(text), tuple(token_ids), 0, first or 0.0, {})
        chunk = json.loads(data)
        if "error" in chunk:
            raise Refused(f"the stream broke off: {chunk['error']}")
        for choice in chunk["choices"]:
            tokens = choice.get("token_ids") or []
            if tokens and first is None:
                first = time.perf_counter() - started
            token_ids += tokens
            text.append(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])
    raise Refused("the stream ended without its end mark")
