"""The client of the serving benchmarks: streamed completions whose every chunk is timed."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

TIMELINE = "x-mooncake-timeline"
_COMMENT = b": timeline "
REQUEST_SECONDS = 90.0


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Answered(msgspec.Struct, frozen=True):
    """One streamed answer.

    Attributes:
        sent: when the request was sent, monotonic seconds.
        ttft: seconds until the first chunk.
        gaps: seconds between each two chunks, a chunk being a token or, when the client lags, several.
        tokens: what was answered; token i reads " i" (see gpu_engines).
        count: number of tokens by the server's own account.
        timeline: what the proxy reported of the request's way, empty unless asked for.
    """

    sent: float
    ttft: float
    gaps: tuple[float, ...]
    tokens: tuple[int, ...]
    count: int
    timeline: dict[str, Any] = {}


def body(prompt: Sequence[int], tokens: int, **fields: Any) -> bytes:
    """A greedy completion of exactly `tokens` tokens, streamed unless `fields` say otherwise."""
    request = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request |= {"stream": True, "stream_options": {"include_usage": True}} | fields
    if not request["stream"]:
        del request["stream_options"]
    return msgspec.json.encode(request)


def prompt(rng: random.Random, vocabulary: range, length: int) -> list[int]:
    """Random token ids."""
    return rng.choices(vocabulary, k=length)


@asynccontextmanager
async def open_session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session for any number of requests at once, each of at most `REQUEST_SECONDS`."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0)
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    request: bytes,
    headers: Mapping[str, str] | None = None,
    on_chunk: Any = None,
) -> Answered:
    """Send `request` and read its answer to the end.

    Args:
        on_chunk: called with the moment of each chunk (monotonic seconds) as it comes.

    Raises:
        RuntimeError: the engine or the proxy refused, or the stream broke off.
    """
    sent = time.monotonic()
    moments: list[float] = []
    text: list[str] = []
    count = 0
    timeline: dict[str, Any] = {}
    headers = {"Content-Type": "application/json"} | dict(headers or {})
    async with session.post(f"{url}/v1/completions", data=request, headers=headers) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            if line.startswith(_COMMENT):
                timeline = json.loads(line[len(_COMMENT) :])
            if not line.startswith(b"data: {"):
                continue
            now = time.monotonic()
            chunk = _decode_chunk(line[6:])
            if chunk.error:
                raise RuntimeError(f"{url} broke off: {chunk.error}")
            if chunk.usage:
                count = chunk.usage.completion_tokens
            if chunk.choices:
                moments.append(now)
                text.append(chunk.choices[0].text)
                if on_chunk:
                    on_chunk(now)
    if not moments or not count:
        raise RuntimeError(f"{url}: the stream ended early ({len(moments)} chunks, no final usage)")
    gaps = tuple(b - a for a, b in itertools.pairwise(moments))
    tokens = tuple(int(word) for word in "".join(text).split())
    return Answered(sent, moments[0] - sent, gaps, tokens, count, timeline)


async def closed_loop(
    session: aiohttp.ClientSession, url: str, requests: Sequence[bytes], concurrency: int
) -> list[Answered]:
    """Answers to all `requests`, in their order, never more than `concurrency` at once."""
    gate = asyncio.Semaphore(concurrency)

    async def one(request: bytes) -> Answered:
        async with gate:
            return await stream(session, url, request)

    tasks = [asyncio.create_task(one(request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:  # after a failure the others must not go on under the next measurement
        for task in tasks:
            task.cancel()


async def whole(session: aiohttp.ClientSession, url: str, request: bytes) -> dict[str, Any]:
    """The answer to a request that is not streamed.

    Raises:
        RuntimeError: refused.
    """
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/v1/completions", data=request, headers=headers) as answer:
        said = await answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{url} answered {answer.status}: {said[:300]!r}")
    return dict(json.loads(said))


async def gap_of_logits(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], mine: Sequence[int], other: Sequence[int]
) -> float:
    """How much less likely (nats) the engine at `url` finds `mine` than `other` where they first differ.

    Infinite if `mine` is not even among the five likeliest. A few hundredths are a tie that rounding broke.
    """
    at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
    if at is None:
        return float("inf")
    answer = await whole(session, url, body([*prompt, *other[:at]], 1, stream=False, logprobs=5))
    likely = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    told = {int(text): value for text, value in likely.items() if text.strip().isdigit()}
    return max(told.values()) - told[mine[at]] if mine[at] in told else float("inf")
