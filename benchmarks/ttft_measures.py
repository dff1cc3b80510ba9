"""What benchmarks/ttft.py measures on running engines: generators of rows, as soon as there are some."""

import asyncio
import math
import random
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
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
                    yield [not_run("ttft", subject, "added_ttft", "ms", said(error), case)]
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
                yield [not_run("ttft", subject, "ttft", "ms", said(error), case)]
                continue
            mine = [a.ttft for a in answers]
            rows = [row("ttft", subject, case, "ttft", [1e3 * s for s in mine], "ms")]
            if subject == SINGLE:
                alone = mine
            elif alone:
                added = 1e3 * (statistics.median(mine) - statistics.median(alone))
                rows.append(row("ttft", subject, case, "added_ttft", [added], "ms"))
            yield rows


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def percentile(values: Sequence[float], p: float) -> float:
    """The smallest of `values` that at least p percent of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * p / 100) - 1)]
