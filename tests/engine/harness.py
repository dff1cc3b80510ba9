"""What the engine tests share: clusters of real vLLM, greedy requests, and readings of vLLM's own metrics."""

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from mooncake_connector.demo.models import make, server_args
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    LocalProcess,
    LocalProxy,
    PreloadedVllm,
    push_config,
    start_all,
    stop_all,
)

Prompt = str | list[int]
Side = Literal["prefill", "decode"]
TEXT_TOKENS = range(3, 390)  # what every tiny model's vocabulary has beside its special tokens


@dataclass(frozen=True)
class Shape:
    """Which engines a cluster consists of; equal shapes share one cluster.

    Attributes:
        model: a tiny model's name.
        prefill, decode: how many engines of each.
        single: whether one engine without a connector stands beside them, for reference.
        args: further vLLM arguments of every engine.
        prefill_args, decode_args: those of one side.
        extra: the connector's settings, as (name, value) pairs.
        prefill_extra, decode_extra: those of one side.
        failure_policy: vLLM's kv_load_failure_policy on both sides.
        proxy_args: further arguments of the proxy.
        proxy: whether to start it (it waits for a pair that fits).
    """

    model: str = "tiny-llama"
    prefill: int = 1
    decode: int = 1
    single: bool = True
    args: tuple[str, ...] = ()
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()
    prefill_extra: tuple[tuple[str, Any], ...] = ()
    decode_extra: tuple[tuple[str, Any], ...] = ()
    failure_policy: str = "recompute"
    proxy_args: tuple[str, ...] = ()
    proxy: bool = True


@dataclass
class Cluster:
    """Running engines and the proxy before them.

    Attributes:
        spare: makes another engine of that side; the caller starts and stops it.
    """

    shape: Shape
    logs: Path
    prefills: list[LocalEngine]
    decodes: list[LocalEngine]
    reference: LocalEngine | None
    proxy: LocalProxy
    spare: Callable[[Side], LocalEngine]
    _proxies: dict[tuple[str, ...], LocalProxy] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The proxy's."""
        return self.proxy.url

    @property
    def prefill(self) -> LocalEngine:
        return self.prefills[0]

    @property
    def decode(self) -> LocalEngine:
        return self.decodes[0]

    @property
    def single(self) -> LocalEngine:
        assert self.reference is not None, "this shape has single=False"
        return self.reference

    def another_proxy(self, *args: str) -> LocalProxy:
        """A proxy with other arguments, such as ``"--order", "serial"``, before the same engines."""
        if args not in self._proxies:
            proxy = self._make_proxy(args, f"proxy-{len(self._proxies) + 1}")
            start_all([proxy], timeout=60)
            self._proxies[args] = proxy
        return self._proxies[args]

    def _make_proxy(self, args: Sequence[str], name: str) -> LocalProxy:
        return LocalProxy(
            [e.url for e in self.prefills],
            [e.url for e in self.decodes],
            args=args,
            name=name,
            logs=self.logs,
        )

    @property
    def processes(self) -> list[LocalProcess]:
        single = [self.reference] if self.reference else []
        proxies = [self.proxy] if self.shape.proxy else []
        return [*self.prefills, *self.decodes, *single, *proxies, *self._proxies.values()]


@contextmanager
def running(shape: Shape, logs: Path, preload: PreloadedVllm | None = None) -> Iterator[Cluster]:
    """Start a cluster of `shape`, its engines side by side; stop everything of it in the end."""
    folder = make(shape.model)

    def engine(name: str, kv_config: dict[str, Any] | None, *more: tuple[str, ...]) -> LocalEngine:
        args = [*server_args(shape.model), *shape.args, *(arg for part in more for arg in part)]
        # For /reset_prefix_cache, and for responses that go on from others.
        env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
        return LocalEngine(
            folder, kv_config=kv_config, args=args, name=name, env=env, logs=logs, preload=preload
        )

    def config(role: Any, extra: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        settings = {**dict(shape.extra), **dict(extra)}
        return push_config(role, settings, kv_load_failure_policy=shape.failure_policy)

    def one(side: Side, name: str) -> LocalEngine:
        if side == "prefill":
            return engine(name, config("producer", shape.prefill_extra), shape.prefill_args)
        return engine(name, config("consumer", shape.decode_extra), shape.decode_args)

    prefills = [one("prefill", f"prefill-{i}") for i in range(shape.prefill)]
    decodes = [one("decode", f"decode-{i}") for i in range(shape.decode)]
    single = engine("single", None) if shape.single else None
    proxy = LocalProxy(
        [e.url for e in prefills], [e.url for e in decodes], args=shape.proxy_args, name="proxy", logs=logs
    )
    cluster = Cluster(shape, logs, prefills, decodes, single, proxy, lambda side: one(side, f"spare-{side}"))
    try:
        start_all([p for p in cluster.processes if p is not proxy], timeout=400)
        if shape.proxy:
            start_all([proxy], timeout=60)
        yield cluster
    finally:
        stop_all(cluster.processes)


class Clusters:
    """At most one cluster beside the session's own: asking for another shape stops the one before."""

    def __init__(self, logs: Callable[[str], Path], preload: PreloadedVllm | None = None) -> None:
        self._logs = logs
        self._preload = preload
        self._shape: Shape | None = None
        self._cluster: Cluster | None = None
        self._stack = ExitStack()

    def __call__(self, shape: Shape) -> Cluster:
        if (
            self._cluster is None
            or shape != self._shape
            or not all(p.alive() for p in self._cluster.processes)
        ):
            self.close()
            self._cluster = self._stack.enter_context(running(shape, self._logs(shape.model), self._preload))
            self._shape = shape
        return self._cluster

    def close(self) -> None:
        self._cluster = None
        self._stack.close()


def random_prompt(rng: random.Random, tokens: int) -> list[int]:
    """`tokens` random token ids that every tiny model knows."""
    return rng.choices(TEXT_TOKENS, k=tokens)


async def complete(
    session: aiohttp.ClientSession, url: str, prompt: Prompt, n: int = 16, **fields: Any
) -> dict[str, Any]:
    """The JSON answer of one greedy, unstreamed completion of exactly `n` tokens; `fields` join the request.

    Raises:
        aiohttp.ClientResponseError: a status other than 2xx.
    """
    async with session.post(f"{url}/v1/completions", json=_greedy_body(prompt, n, fields)) as answer:
        if answer.status >= 400:
            raise aiohttp.ClientResponseError(
                answer.request_info, (), status=answer.status, message=await answer.text()
            )
        return dict(await answer.json())


async def greedy(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Prompt,
    n: int = 16,
    *,
    stream: bool = False,
    **fields: Any,
) -> list[int]:
    """The token ids of one greedy completion of exactly `n` tokens (first choice)."""
    if not stream:
        answer = await complete(session, url, prompt, n, **fields)
        return list(answer["choices"][0]["token_ids"])
    return [
        token async for chunk in chunks(session, url, prompt, n, **fields) for token in chunk_tokens(chunk)
    ]


async def chunks(
    session: aiohttp.ClientSession, url: str, prompt: Prompt, n: int = 16, **fields: Any
) -> AsyncIterator[dict[str, Any]]:
    """The JSON chunks of one greedy, streamed completion, as they come.

    Raises:
        aiohttp.ClientResponseError: a status other than 2xx.
        RuntimeError: the stream carried an error, or ended without its end mark.
    """
    body = {**_greedy_body(prompt, n, fields), "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status >= 400:
            raise aiohttp.ClientResponseError(
                answer.request_info, (), status=answer.status, message=await answer.text()
            )
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                return
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"the stream broke off: {chunk['error']}")
            yield chunk
    raise RuntimeError("the stream ended without [DONE]")


def chunk_tokens(chunk: dict[str, Any]) -> list[int]:
    """The token ids in one streamed chunk, all choices together."""
    return [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]


async def abandon(
    session: aiohttp.ClientSession,
    url: str,
    prompt: Prompt,
    after: float,
    n: int = 200,
    *,
    stream: bool = True,
) -> bool:
    """Start a completion and hang up after `after` seconds. Returns whether it was still going on then."""

    async def whole() -> None:
        await greedy(session, url, prompt, n, stream=stream)

    try:
        await asyncio.wait_for(whole(), after)
    except TimeoutError:
        return True
    return False


def _greedy_body(prompt: Prompt, n: int, fields: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    return {**body, "return_token_ids": True, **fields}


async def metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    """The sum over all label sets of Prometheus metric `name` at `url`; 0 when it is not there (yet)."""
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    return sum(
        float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    )


async def kv_usage(session: aiohttp.ClientSession, url: str) -> float:
    """The share (0 to 1) of an engine's KV blocks in use, by its own metrics; cached ones count as free."""
    return await metric(session, url, "vllm:kv_cache_usage_perc")


async def requests_inside(session: aiohttp.ClientSession, url: str) -> float:
    """How many requests run or wait in an engine."""
    running_now = await metric(session, url, "vllm:num_requests_running")
    return running_now + await metric(session, url, "vllm:num_requests_waiting")


async def reset_prefix_cache(session: aiohttp.ClientSession, url: str) -> None:
    """Empty an engine's prefix cache."""
    async with session.post(f"{url}/reset_prefix_cache") as answer:
        answer.raise_for_status()


async def eventually(
    check: Callable[[], Awaitable[bool]], within: float, what: str, every: float = 0.05
) -> float:
    """Wait until `check` holds; returns the seconds that took, fails with `what` after `within` seconds."""
    started = time.monotonic()
    while not await check():
        took = time.monotonic() - started
        assert took < within, f"{what}: not within {within:g} s"
        await asyncio.sleep(every)
    return time.monotonic() - started
