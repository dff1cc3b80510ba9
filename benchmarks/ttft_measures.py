"""What benchmarks/ttft.py measures on running engines: generators of rows, as soon as there are some."""

import asyncio
import math
import random
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks.gpu_engines import Scale
from benchmarks.report import Row, not_run, row
from benchmarks.ttft_client import (
    TIMELINE,
    Answered,
    body,
    closed_loop,
    gap_of_logits,
    prompt,
    stream,
    whole,
)
from mooncake_connector.scheduler.engines.vllm import VllmEngine
from mooncake_connector.scheduler.openai import COMPLETIONS, ClientRequest

SINGLE = "single"
PROXIED = "single_proxied"
OURS = "mooncake_push"
FIRST = "mooncake_push_first"  # the proxy hands out prefill's first token
NIXL = "nixl"
GENERATED = 16
TIE = 0.03
"""Nats. Two tokens closer than this are a tie that another batch shape may break the other way."""
QUIET = 0.05  # seconds between two requests: what a connector does after an answer is not the next one's


FAILURES = (RuntimeError, OSError, TimeoutError, aiohttp.ClientError)
Rows = AsyncIterator[list[Row]]


@dataclass(frozen=True)
class Bench:
    """What every measure needs.

    Attributes:
        urls: where each subject is asked.
        mode: of the engines, for the rows' case: ``eager`` or ``graphs``.
        rounds: measurements of each figure.
    """

    session: aiohttp.ClientSession
    scale: Scale
    urls: Mapping[str, str]
    mode: str
    rounds: int
    rng: random.Random

    def prompt(self, length: int) -> list[int]:
        return prompt(self.rng, self.scale.vocabulary, length)

    def case(self, **more: object) -> dict[str, object]:
        return {"mode": self.mode} | more


async def warm_up(bench: Bench) -> Rows:
    """What engines, proxies and connections set up with their first requests is not measured."""
    for length in (*bench.scale.lengths, *bench.scale.lengths[:-1]):
        request = body(bench.prompt(length), 4)
        for url in bench.urls.values():
            await stream(bench.session, url, request)
    yield []


async def kv_matters(bench: Bench) -> Rows:
    """Whether answers depend on more than the prompt's end: else comparing them would prove nothing.

    Raises:
        RuntimeError: they do not.
    """
    tail = bench.prompt(32)
    answers = set()
    for _ in range(8):
        request = body([*bench.prompt(bench.scale.middle - 32), *tail], GENERATED)
        answers.add((await stream(bench.session, bench.urls[SINGLE], request)).tokens)
    if len(answers) < 8:
        raise RuntimeError(f"8 prompts of equal ends got {len(answers)} different answers: weights are bad")
    yield [row("ttft", SINGLE, bench.case(), "answers_of_8_equal_ends", [len(answers)], "different")]


async def kv_moved(bench: Bench) -> Rows:
    """How much KV a request through prefill and decode moved, by which path, and how much of it early.

    Raises:
        RuntimeError: none was moved: decode computed the prompt itself, and no figure would mean anything.
    """
    for length in bench.scale.lengths:
        told = []
        for _ in range(3):
            answer = await whole(bench.session, bench.urls[OURS], body(bench.prompt(length), 2, stream=False))
            told.append((answer.get("kv_transfer_params") or {}).get("transfer") or {})
            if not told[-1].get("bytes"):
                raise RuntimeError(f"{length} tokens moved no KV: {told[-1]}")
        case = bench.case(prompt_tokens=length, path=told[-1]["path"])
        early = [100 * t["early_bytes"] / t["bytes"] for t in told]
        yield [
            row("ttft", OURS, case, "kv_moved", [t["bytes"] / 2**20 for t in told], "MiB"),
            row("ttft", OURS, case, "kv_moved_early", early, "%"),
        ]


async def added_ttft(bench: Bench) -> Rows:
    """TTFT of every subject on the same fresh prompts, one request at a time in shuffled turns.

    Every answer is compared with the single engine's: equal, a tie (see `TIE`), or wrong. A subject that
    fails is left out from then on.
    """
    order = list(bench.urls)
    for length in bench.scale.lengths:
        answers: dict[str, list[Answered]] = defaultdict(list)
        verdicts: dict[str, list[str]] = defaultdict(list)
        case = bench.case(prompt_tokens=length)
        for _ in range(bench.rounds):
            tokens = bench.prompt(length)
            request = body(tokens, GENERATED)
            bench.rng.shuffle(order)
            for subject in tuple(order):
                await asyncio.sleep(QUIET)
                try:
                    answers[subject].append(await stream(bench.session, bench.urls[subject], request))
                except FAILURES as error:
                    if subject == SINGLE:
                        raise
                    order.remove(subject)
                    yield [not_run("ttft", subject, "added_ttft", "ms", _said(error), case)]
            alone = answers[SINGLE][-1].tokens
            for subject in order:
                mine = answers[subject][-1].tokens
                verdicts[subject].append(await _verdict(bench, tokens, mine, alone))
        alone_s = [a.ttft for a in answers[SINGLE]]
        for subject in (each for each in bench.urls if each in order):
            rows = _ttft_rows(subject, case, [a.ttft for a in answers[subject]], alone_s)
            for verdict in ("equal", "tie", "wrong"):
                found = verdicts[subject].count(verdict)
                of = case | {"of": len(verdicts[subject])}
                rows.append(row("ttft", subject, of, f"answers_{verdict}", [found], "answers"))
            yield rows


async def _verdict(bench: Bench, tokens: Sequence[int], mine: tuple[int, ...], alone: tuple[int, ...]) -> str:
    if mine == alone:
        return "equal"
    gap = await gap_of_logits(bench.session, bench.urls[SINGLE], tokens, mine, alone)
    return "tie" if gap <= TIE else "wrong"


def _ttft_rows(
    subject: str, case: dict[str, object], mine: Sequence[float], alone: Sequence[float]
) -> list[Row]:
    rows = [row("ttft", subject, case, "ttft", [1e3 * s for s in mine], "ms")]
    if subject != SINGLE:
        added = [1e3 * (s - a) for s, a in zip(mine, alone, strict=True)]
        rows.append(row("ttft", subject, case, "added_ttft", added, "ms"))
    return rows


async def breakdown(bench: Bench) -> Rows:
    """Where the time between a client's request and its first chunk goes: rows `moment`, in order.

    `moment` is the time since the client sent, `step` that since the moment before (in the order of medians).
    """
    for length in bench.scale.lengths:
        rows = []
        offsets: dict[str, list[float]] = defaultdict(list)
        for _ in range(bench.rounds):
            await asyncio.sleep(QUIET)
            answer = await stream(
                bench.session, bench.urls[OURS], body(bench.prompt(length), GENERATED), {TIMELINE: "1"}
            )
            if not answer.timeline:
                raise RuntimeError("the proxy sent no timeline")
            offsets["client.first_chunk"].append(1e3 * answer.ttft)
            for side, moments in answer.timeline.items():
                for name, at in moments.items() if isinstance(moments, dict) else ():
                    if isinstance(at, float):
                        offsets[f"{side}.{name}"].append(1e3 * (at - answer.sent))
        before = 0.0
        for name, found in sorted(offsets.items(), key=lambda item: statistics.median(item[1])):
            now = statistics.median(found)
            case = bench.case(prompt_tokens=length, moment=name)
            rows.append(row("ttft", OURS, case, "moment", found, "ms"))
            rows.append(row("ttft", OURS, case, "step", [now - before], "ms"))
            before = now
        yield rows


def steps(rows: Sequence[Row]) -> str:
    """The rows of `breakdown` as a table: for each prompt length the moment and, after +, its step."""
    cells: dict[tuple[object, object], dict[str, float | None]] = defaultdict(dict)
    for r in rows:
        if r["metric"] in ("moment", "step"):
            cells[r["case"]["moment"], r["case"]["prompt_tokens"]][r["metric"]] = r["value"]
    lengths = list(dict.fromkeys(length for _, length in cells))
    lines = [f"{'ms after the client sent':28}" + "".join(f"{length!s:>22}" for length in lengths)]
    for name in dict.fromkeys(name for name, _ in cells):
        found = (cells.get((name, length), {}) for length in lengths)
        texts = (f"{c['moment']:.2f}  +{c['step']:.2f}" if c else "-" for c in found)
        lines.append(f"{name!s:28}" + "".join(f"{text:>22}" for text in texts))
    return "\n".join(lines)


async def under_load(bench: Bench, concurrencies: Sequence[int] = (1, 4, 16)) -> Rows:
    """TTFT at the middle length with so many clients, each asking again as soon as it is answered."""
    length = bench.scale.middle
    for clients in concurrencies:
        requests = [body(bench.prompt(length), GENERATED) for _ in range(max(bench.rounds, 3 * clients))]
        case = bench.case(prompt_tokens=length, concurrency=clients)
        alone: list[float] = []
        for subject in sorted(bench.urls, key=lambda subject: subject != SINGLE):
            try:
                answers = await closed_loop(bench.session, bench.urls[subject], requests, clients)
            except FAILURES as error:
                yield [not_run("ttft", subject, "ttft", "ms", _said(error), case)]
                continue
            mine = [a.ttft for a in answers]
            rows = [row("ttft", subject, case, "ttft", [1e3 * s for s in mine], "ms")]
            if subject == SINGLE:
                alone = mine
            elif alone:
                added = 1e3 * (statistics.median(mine) - statistics.median(alone))
                rows.append(row("ttft", subject, case, "added_ttft", [added], "ms"))
            yield rows


async def prefill_slowed(bench: Bench, prefill: str, decode: str) -> Rows:
    """How long the prefill engine itself takes, when nobody takes the KV and when decode does, in turns."""
    driver = VllmEngine()
    info = await driver.probe(bench.session, prefill)
    for length in bench.scale.lengths:
        rows = []
        took: dict[str, list[float]] = {"plain": [], "streaming": []}
        turns = bench.rounds if length == bench.scale.lengths[-1] else 2 * bench.rounds
        for turn in range(2 * turns):
            request = ClientRequest.parse(COMPLETIONS, body(bench.prompt(length), 1, stream=False))
            kind = ("plain", "streaming")[turn % 2]
            await asyncio.sleep(QUIET)
            if kind == "plain":
                took[kind].append(await _timed(bench.session, prefill, request.raw))
                continue
            transfer = uuid.uuid4().hex
            first = asyncio.create_task(
                _timed(bench.session, prefill, driver.prefill_body(request, transfer))
            )
            then = driver.decode_body(request, driver.decode_params(info, transfer))
            second = asyncio.create_task(_timed(bench.session, decode, then))
            took[kind].append(await first)
            await second
        for kind, seconds in took.items():
            case = bench.case(prompt_tokens=length, kv=kind)
            rows.append(row("ttft", OURS, case, "prefill", [1e3 * s for s in seconds], "ms"))
        slower = 100 * (statistics.median(took["streaming"]) / statistics.median(took["plain"]) - 1)
        case = bench.case(prompt_tokens=length)
        rows.append(row("ttft", OURS, case, "prefill_slowdown", [slower], "%"))
        yield rows


async def _timed(session: aiohttp.ClientSession, url: str, request: bytes) -> float:
    started = time.monotonic()
    await whole(session, url, request)
    return time.monotonic() - started


async def decode_slowed(bench: Bench, decode: str, *, window: float, streams: int = 8) -> Rows:
    """TBT of steady streams on the decode engine, in windows with and without KV being pushed into it.

    The pushed prompts end with their first token, so that they add one step of one token each.
    """
    gaps: dict[str, list[float]] = {"quiet": [], "pushing": []}
    per_window: dict[str, list[list[float]]] = {"quiet": [], "pushing": []}
    now: list[tuple[float, float]] = []
    last: dict[int, float] = {}

    def on_chunk(of: int, at: float) -> None:
        if of in last:
            now.append((at, at - last[of]))
        last[of] = at

    room = bench.scale.max_model_len - bench.scale.lengths[0] - 1
    steady = [
        asyncio.create_task(
            stream(
                bench.session,
                decode,
                body(bench.prompt(bench.scale.lengths[0]), min(room, 20000)),
                on_chunk=lambda at, of=of: on_chunk(of, at),
            )
        )
        for of in range(streams)
    ]
    pushed = 0
    try:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + 60
        while len(last) < streams:
            if loop.time() > give_up or any(task.done() for task in steady):
                raise RuntimeError(f"only {len(last)} of {streams} streams began")
            await asyncio.sleep(0.05)
        for turn in range(6):
            kind = ("quiet", "pushing")[turn % 2]
            await asyncio.sleep(0.5)
            began = loop.time()
            now.clear()
            if kind == "pushing":
                pushed += await _push_for(bench, window)
            else:
                await asyncio.sleep(window)
            inside = [gap for at, gap in now if at - gap >= began]
            gaps[kind] += inside
            per_window[kind].append(inside)
    finally:
        for task in steady:
            task.cancel()
        await asyncio.gather(*steady, return_exceptions=True)
    case = bench.case(streams=streams, pushed_prompts=pushed, prompt_tokens=bench.scale.middle)
    figures: dict[str, Callable[[Sequence[float]], float]] = {
        "mean": statistics.fmean,
        "p50": lambda found: percentile(found, 50),
        "p99": lambda found: percentile(found, 99),
    }
    for name, figure in figures.items():
        value = {kind: figure(found) for kind, found in gaps.items()}
        for kind, found in per_window.items():
            samples = [1e3 * figure(one) for one in found]
            yield [row("ttft", OURS, case | {"pushes": kind}, f"steady_tbt_{name}", samples, "ms")]
        slower = 100 * (value["pushing"] / value["quiet"] - 1)
        yield [row("ttft", OURS, case, f"decode_slowdown_{name}", [slower], "%")]


async def _push_for(bench: Bench, seconds: float) -> int:
    """Prompts through prefill, from two clients without pause; returns how many."""
    requests = [body(bench.prompt(bench.scale.middle), 1) for _ in range(8)]
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    count = 0

    async def client() -> None:
        nonlocal count
        while loop.time() < end:
            count += 1
            await stream(bench.session, bench.urls[OURS], requests[count % len(requests)])

    await asyncio.gather(client(), client())
    return count


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def percentile(values: Sequence[float], p: float) -> float:
    """The smallest of `values` that at least p percent of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * p / 100) - 1)]
