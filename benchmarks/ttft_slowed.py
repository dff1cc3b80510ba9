"""What benchmarks/ttft.py measures of the cost to others: how much KV that moves slows prefill and decode."""

import asyncio
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.gpu_switch import label
from benchmarks.report import Row, not_run, row
from benchmarks.ttft_client import body, stream, whole
from benchmarks.ttft_measures import FAILURES, OURS, QUIET, SINGLE, Bench, Rows, percentile, said
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.vllm import VllmEngine
from mooncake_connector.scheduler.proxy.openai import COMPLETIONS, ClientRequest

PLAIN = "nobody takes the KV"
STREAMING = "streaming"
ROUNDS = (8.0, 4.0, 1.5)
"""Times the bench's, by prompt length: the shorter a prefill the more of it is chance."""

PUSHES = 40.0
"""Prompts of the middle length per second, more than one prefill engine computes."""

Switch = Callable[[Mapping[str, Any]], Awaitable[object]]


@dataclass
class _Prefills:
    """What was measured of one subject at one length.

    Attributes:
        took: seconds of each prefill.
        tail: from prefill's answer to decode's.
        differ: answers in which the two sides' tokens differ (rounding may do that).
        failed: why it was given up.
    """

    took: list[float] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    differ: int = 0
    failed: str = ""


async def prefill_slowed(
    bench: Bench,
    prefill: str,
    decode: str,
    variants: Sequence[Mapping[str, Any]] = (),
    switch: Switch | None = None,
) -> Rows:
    """How long the prefill engine itself takes: when nobody takes the KV, and when decode does, in turns.

    Beside it an engine without connector. All take turns in an order that is drawn anew for each round.

    Args:
        variants: settings of the connector to try, by `switch`; none: as it comes.
        switch: has the prefill engine use other settings.
    """
    driver = VllmEngine()
    info = await driver.probe(EngineClient(connect_timeout=5.0), prefill)
    streaming = {label(settings): settings for settings in variants} if switch else {STREAMING: {}}
    failed: dict[str, str] = {}
    for length, times in zip(bench.scale.lengths, ROUNDS, strict=True):
        found: dict[str, _Prefills] = defaultdict(_Prefills)
        for _ in range(max(2, round(times * bench.rounds))):
            order = [SINGLE, PLAIN, *(name for name in streaming if name not in failed)]
            bench.rng.shuffle(order)
            for subject in order:
                request = ClientRequest.parse(COMPLETIONS, body(bench.prompt(length), 1, stream=False))
                one = found[subject]
                if subject in (SINGLE, PLAIN):
                    await asyncio.sleep(QUIET)
                    url = prefill if subject == PLAIN else bench.urls[SINGLE]
                    one.took.append((await _timed(bench.session, url, request.raw))[0])
                    continue
                try:
                    if switch is not None:
                        await switch(streaming[subject])
                    await asyncio.sleep(QUIET)
                    await _streamed(bench.session, driver, info, request, (prefill, decode), one)
                except FAILURES as error:
                    failed[subject] = said(error)
                    yield [not_run("ttft", subject, "prefill", "ms", failed[subject])]
        yield _prefill_rows(bench.case(prompt_tokens=length), found)


async def _streamed(
    session: aiohttp.ClientSession,
    driver: VllmEngine,
    info: Any,
    request: ClientRequest,
    urls: tuple[str, str],
    into: _Prefills,
) -> None:
    """One prefill whose KV decode takes.

    Raises:
        RuntimeError: none arrived.
    """
    transfer = uuid.uuid4().hex
    bodies = (
        driver.prefill_body(request, transfer),
        driver.decode_body(request, driver.decode_params(info, transfer)),
    )
    asked = (_timed(session, url, sent) for url, sent in zip(urls, bodies, strict=True))
    (first, mine), (second, theirs) = await asyncio.gather(*asked)
    told = (theirs.get("kv_transfer_params") or {}).get("transfer") or {}
    if not told.get("bytes"):
        raise RuntimeError(f"no KV arrived: {told}")
    into.took.append(first)
    into.tail.append(second - first)
    into.differ += mine["choices"][0]["text"] != theirs["choices"][0]["text"]


def _prefill_rows(case: dict[str, object], found: Mapping[str, _Prefills]) -> list[Row]:
    rows = []
    plain = found[PLAIN].took
    for subject, one in found.items():
        if len(one.took) < len(plain):
            continue  # it failed on the way
        rows.append(row("ttft", subject, case, "prefill", [1e3 * s for s in one.took], "ms"))
        if subject != PLAIN:
            added = [1e3 * (s - p) for s, p in zip(one.took, plain, strict=True)]
            rows.append(row("ttft", subject, case, "prefill_added", added, "ms"))
            slower = 100 * (statistics.median(one.took) / statistics.median(plain) - 1)
            rows.append(row("ttft", subject, case, "prefill_slowdown", [slower], "%"))
        if one.tail:
            rows.append(row("ttft", subject, case, "decode_after_prefill", [1e3 * s for s in one.tail], "ms"))
            of = case | {"of": len(one.tail)}
            rows.append(row("ttft", subject, of, "first_tokens_differ", [one.differ], "answers"))
    return rows


async def _timed(session: aiohttp.ClientSession, url: str, request: bytes) -> tuple[float, dict[str, Any]]:
    started = time.monotonic()
    answer = await whole(session, url, request)
    return time.monotonic() - started, answer


class Steady:
    """Streams on one engine that go on while something else happens, and the gaps between their tokens."""

    def __init__(self, bench: Bench, url: str, streams: int) -> None:
        self._gaps: list[tuple[float, float]] = []
        self._last: dict[int, float] = {}
        length = bench.scale.lengths[0]
        room = min(bench.scale.max_model_len - length - 1, 20000)
        self._tasks = [
            asyncio.create_task(
                stream(
                    bench.session,
                    url,
                    body(bench.prompt(length), room),
                    on_chunk=lambda at, of=of: self._chunk(of, at),
                )
            )
            for of in range(streams)
        ]

    def _chunk(self, of: int, at: float) -> None:
        if of in self._last:
            self._gaps.append((at, at - self._last[of]))
        self._last[of] = at

    async def begun(self, seconds: float) -> None:
        """Wait until all of them have tokens.

        Raises:
            RuntimeError: they do not in time.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while len(self._last) < len(self._tasks):
            if loop.time() > end or any(task.done() for task in self._tasks):
                raise RuntimeError(f"only {len(self._last)} of {len(self._tasks)} streams began")
            await asyncio.sleep(0.05)

    async def during(self, work: Awaitable[object]) -> list[float]:
        """The gaps, seconds, that lie wholly within the time that `work` takes.

        Raises:
            RuntimeError: a stream has ended.
        """
        began = asyncio.get_running_loop().time()
        self._gaps.clear()
        await work
        if any(task.done() for task in self._tasks):
            raise RuntimeError("a steady stream has ended")
        return [gap for at, gap in self._gaps if at - gap >= began]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def decode_slowed(
    bench: Bench, decode: str, *, window: float, joining: bool, streams: int = 8, windows: int = 3
) -> Rows:
    """TBT of steady streams on the decode engine, in windows of three kinds, in turns.

    ``quiet``: nothing else happens. ``pushing``: prompts come through prefill, each ends with its first
    token. ``joining``: as many requests of that length, at the same moments, which find all but one token in
    the engine's prefix cache: they join the batch as those did, but no byte moves. What `pushing` costs more
    than that is for the bytes, and for the connector's work on the decode engine.

    Args:
        joining: the engine has a prefix cache.
    """
    kinds = ["quiet", "pushing", *(["joining"] if joining else [])]
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    # All but the last token are whole blocks, if the middle length is a multiple of the block's.
    hits = [body(bench.prompt(bench.scale.middle + 1), 1) for _ in range(8)]
    steady = Steady(bench, decode, streams)
    pushed: list[float] = []
    joined = 0
    try:
        await steady.begun(60)
        for _ in range(windows):
            moments: list[float] = []
            # New ones: what decode has in a prefix cache is not pushed. And before the clock runs.
            fresh = [body(bench.prompt(bench.scale.middle), 1) for _ in range(2 + int(window * PUSHES))]
            for kind in kinds:
                if kind == "joining":  # what was computed before may have made room for what was pushed
                    for request in hits:
                        await stream(bench.session, decode, request)
                await asyncio.sleep(0.5)
                if kind == "quiet":
                    gaps = await steady.during(asyncio.sleep(window))
                elif kind == "pushing":
                    gaps = await steady.during(_push(bench, fresh, window, moments))
                else:
                    gaps = await steady.during(_join(bench, decode, hits, moments))
                    joined += len(moments)
                found[kind].append(gaps)
            pushed += moments
    finally:
        await steady.end()
    case = bench.case(streams=streams, prompt_tokens=bench.scale.middle, pushed=len(pushed), joined=joined)
    for rows in _tbt_rows(case, found):
        yield rows


def _tbt_rows(case: dict[str, object], found: Mapping[str, list[list[float]]]) -> list[list[Row]]:
    figures: dict[str, Callable[[Sequence[float]], float]] = {
        "mean": statistics.fmean,
        "p50": lambda gaps: percentile(gaps, 50),
        "p99": lambda gaps: percentile(gaps, 99),
    }
    rows = []
    for name, figure in figures.items():
        value = {kind: figure([gap for one in gaps for gap in one]) for kind, gaps in found.items()}
        for kind, gaps in found.items():
            samples = [1e3 * figure(one) for one in gaps]
            rows.append([row("ttft", OURS, case | {"others": kind}, f"steady_tbt_{name}", samples, "ms")])
        for kind, than in (("pushing", "quiet"), ("joining", "quiet"), ("pushing", "joining")):
            if kind in value and than in value:
                slower = 100 * (value[kind] / value[than] - 1)
                compared = case | {"others": kind, "than": than}
                rows.append([row("ttft", OURS, compared, f"decode_slowdown_{name}", [slower], "%")])
    return rows


async def _push(bench: Bench, fresh: list[bytes], seconds: float, moments: list[float]) -> None:
    """Requests through prefill, from two clients without pause; when each was answered goes to `moments`."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def client() -> None:
        while fresh and loop.time() < began + seconds:
            await stream(bench.session, bench.urls[OURS], fresh.pop())
            moments.append(loop.time() - began)

    await asyncio.gather(client(), client())


async def _join(bench: Bench, decode: str, requests: Sequence[bytes], moments: Sequence[float]) -> None:
    """Ask the decode engine itself at these moments, seconds from now."""

    async def ask(request: bytes, after: float) -> None:
        await asyncio.sleep(after)
        await stream(bench.session, decode, request)

    await asyncio.gather(*(ask(requests[i % len(requests)], at) for i, at in enumerate(moments)))
