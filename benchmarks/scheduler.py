"""Requests within their SLO, rejections and TTFT of the conductor and its rivals, in the simulator.

    python benchmarks/scheduler.py --json FILE [--plots DIR] [--trace FILE] [--only PART ...]

First how far the simulator is off (`scheduler_validation.py`), then four comparisons, after Mooncake's
(FAST'25; arXiv 2407.00079v3), with engines of the preset a800x8-llama2-70b. Coupled rivals have chunked
prefill and prefix cache and are routed by the same conductor (in its coupled mode); ``steps of 512`` are
tuned for the TBT that is promised. ``whole prompts``, labelled so, are the papers' kind, routed by least
load: decode stands still while a prompt is computed. ``admission`` is this project's (per_request), for both
sides; without it a pool that is overloaded serves nobody in time. All engines are models.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import scheduler_validation
from benchmarks.report import Row, add_arguments, row
from benchmarks.saved import Saved
from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.simulator import trace
from mooncake_connector.scheduler.simulator.presets import preset
from mooncake_connector.scheduler.simulator.report import summary
from mooncake_connector.scheduler.simulator.setup import Setup, parse_pools
from mooncake_connector.scheduler.simulator.trace import Job, Line
from mooncake_connector.scheduler.simulator.world import World

TRACE = Path(__file__).resolve().parent / "traces" / "conversation_30min.jsonl.gz"
COSTS = preset("a800x8-llama2-70b")
PARTS = ("validation", "coupled", "long", "admission", "routing")
WHOLE: dict[str, Any] = {"whole": True}
# Steps short enough for 0.1 s between tokens: what a good operator of coupled engines sets.
SHORT: dict[str, Any] = {"costs": msgspec.structs.replace(COSTS, step_tokens=512)}
# By name: pools, routing, and what else is set.
OURS: dict[str, Any] = {"admission": "per_request"}
SYSTEMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "10P10D": ("10P10D", "conductor", {}),
    "10P10D, admission": ("10P10D", "conductor", OURS),
    "16P4D, admission": ("16P4D", "conductor", OURS),
    "20 coupled": ("20C", "conductor", {}),
    "20 coupled, steps of 512": ("20C", "conductor", SHORT),
    "20 coupled, steps of 512, admission": ("20C", "conductor", SHORT | OURS),
    "20 coupled, whole prompts": ("20C", "least_loaded", WHOLE),
}
SPEEDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
LENGTHS = (16384, 32768, 65536, 131072)
LONG_SYSTEMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "3P1D": ("3P1D", "conductor", {}),
    "2P2D": ("2P2D", "conductor", {}),
    "4 coupled": ("4C", "conductor", {}),
    "4 coupled, steps of 512": ("4C", "conductor", SHORT),
    "4 coupled, whole prompts": ("4C", "least_loaded", WHOLE),
}
ADMISSIONS = ("baseline", "early", "predicted", "per_request")
# Pools, replay speed and TBT promised: the paper's pools, and pools of which both sides are at their limit.
OVERLOADS = (("8P8D", 2.0, 0.1), ("8P8D", 3.0, 0.1), ("12P2D", 3.0, 0.03))
ROUTINGS = ("random", "least_loaded", "local_cache", "conductor")
ROUTING_SPEEDS = (0.75, 1.0, 1.1, 1.25, 1.5)
KEPT = 0.9  # the part of requests that has to be within the SLO


def play(pools: str, routing: str, jobs: Sequence[Job], *, admission: str = "none", **more: Any) -> World:
    """One simulation, run."""
    slo = Slo(ttft=more.pop("ttft", 30.0), tbt=more.pop("tbt", 0.1))
    setup = Setup(
        costs=more.pop("costs", COSTS),
        **parse_pools(pools),
        scheduling=Scheduling(routing=routing, admission=admission, slo=slo),
        **more,
    )
    world = World(setup, jobs)
    world.run()
    return world


def rows_of(
    part: str, system: str, case: dict[str, object], world: World
) -> tuple[list[Row], dict[str, Any]]:
    """The figures of one simulation as rows, and as `summary` has them."""
    found = summary(world)
    count = found["requests"]
    rejected = found["rejected"] + found["dropped"]
    figures = [
        ("goodput", found["goodput"], "req/s"),
        ("within_slo", 100 * found["within_slo"], "%"),
        ("within_slo_p99", 100 * found["within_slo_p99"], "%"),
        ("within_tbt", 100 * found["within_tbt"], "%"),
        ("rejected", rejected, "requests"),
        ("rejected_share", 100 * rejected / count, "%"),
        ("mean_ttft", found["ttft"]["mean"], "s"),
        ("ttft_p90", found["ttft"]["p90"], "s"),
        ("tbt_p90", 1e3 * found["tbt"]["p90"], "ms"),
        ("gap_p99", 1e3 * found["gap"]["p99"], "ms"),
        ("cache_hit", 100 * found["cache_hit"], "%"),
        ("decode_load_deviation", found["load"]["decode"]["deviation"], ""),
        ("prefill_load_deviation", found["load"]["prefill"]["deviation"], ""),
        ("speed", found["requests_per_minute"], "req/min"),
    ]
    case = {"part": part, **case}
    print(
        f"  {case} {system}: " + ", ".join(f"{name} {value:.4g}" for name, value, _ in figures[:9]),
        flush=True,
    )
    return [row("scheduler", system, case, name, [value], unit) for name, value, unit in figures], found


def coupled(lines: Sequence[Line], speeds: Sequence[float]) -> Iterator[list[Row]]:
    """10P + 10D against 20 coupled engines over load; the SLO is the paper's: 30 s and 0.1 s."""
    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in SYSTEMS}
    even: dict[str, list[tuple[float, float]]] = {name: [] for name in SYSTEMS}
    for speed in speeds:
        jobs = trace.jobs(lines, speed=speed)
        for name, (pools, routing, more) in SYSTEMS.items():
            world = play(pools, routing, jobs, **more)
            rows, found = rows_of("coupled", name, {"speed": speed, "rate": found_rate(jobs)}, world)
            shares[name].append((found["rate"], found["within_slo"]))
            even[name].append((found["rate"], found["within_slo_p99"]))
            yield rows
    for metric, points in (("capacity", shares), ("capacity_p99", even)):
        most = {name: capacity(of) for name, of in points.items()}
        yield [
            row("scheduler", name, {"part": "coupled"}, metric, [value], "req/s")
            for name, value in most.items()
            if value
        ]
        yield list(
            gains("coupled", {"slo": metric.removeprefix("capacity_") if "_" in metric else "mean"}, most)
        )


def gains(part: str, case: dict[str, object], most: dict[str, float]) -> Iterator[Row]:
    """By how many percent each pair of pools serves more than each coupled rival."""
    for name, value in most.items():
        if "coupled" in name:
            continue
        for rival, theirs in most.items():
            if "coupled" in rival and theirs:
                of = {"part": part, "over": rival, **case}
                yield row("scheduler", name, of, "goodput_gain", [100 * (value / theirs - 1)], "%")


def capacity(points: Sequence[tuple[float, float]]) -> float:
    """The highest rate at which `KEPT` of all requests are within the SLO; linear between two points."""
    best = 0.0
    for (rate, share), (next_rate, next_share) in itertools.pairwise(points):
        if share >= KEPT > next_share:
            return rate + (next_rate - rate) * (share - KEPT) / (share - next_share)
        if share >= KEPT:
            best = next_rate
    return best


def found_rate(jobs: Sequence[Job]) -> float:
    """Requests per second."""
    return round(len(jobs) / (jobs[-1].at - jobs[0].at), 3)


def long(lengths: Sequence[int], count: int) -> Iterator[list[Row]]:
    """Long prompts, half of each cached, 512 tokens to answer: the most requests per second of which 90% keep
    10 times the TTFT and 5 times the TBT of an idle system."""
    for length in lengths:
        most = {}
        # Asked for the second time: half of the prompt is cached.
        alone = trace.made_up(prompt=length, rate=0.001, count=2, groups=1)
        idle = play("1P1D", "conductor", alone).tasks[-1]
        slo = {"ttft": 10 * idle.ttft, "tbt": 5 * idle.tbt}
        for name, system in LONG_SYSTEMS.items():
            most[name] = bisect(partial(share, system, length, count, slo))
            case: dict[str, object] = {"part": "long", "prompt": length}
            print(f"  {length} {name}: {most[name]:.3f}/s (TTFT {slo['ttft']:.1f} s, TBT {slo['tbt']:.3f} s)")
            yield [row("scheduler", name, case, "capacity", [most[name]], "req/s")]
        yield list(gains("long", {"prompt": length}, most))


def share(
    system: tuple[str, str, dict[str, Any]], length: int, count: int, slo: dict[str, float], rate: float
) -> float:
    """The part of made-up prompts that is within the SLO at some rate."""
    pools, routing, more = system
    jobs = trace.made_up(prompt=length, rate=rate, count=count, groups=4)
    return float(summary(play(pools, routing, jobs, **more, **slo))["within_slo"])


def bisect(share: Callable[[float], float]) -> float:
    """The highest rate whose share is at least `KEPT`, within 2%."""
    low, high = 0.0, 0.02
    while share(high) >= KEPT:
        low, high = high, 2 * high
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= KEPT else (low, middle)
    return low


def admission(
    lines: Sequence[Line], overloads: Sequence[tuple[str, float, float]], save: Saved
) -> Iterator[list[Row]]:
    """Rejected requests and goodput by admission; `save` gets the loads over time."""
    for pools, speed, tbt in overloads:
        jobs = trace.jobs(lines, speed=speed)
        rejected: dict[str, float] = {}
        for mode in ADMISSIONS:
            world = play(pools, "conductor", jobs, admission=mode, tbt=tbt)
            case: dict[str, object] = {"pools": pools, "speed": speed, "tbt": tbt}
            rows, found = rows_of("admission", mode, case, world)
            rejected[mode] = found["rejected"] + found["dropped"]
            loads = [[round(one.at, 2), round(one.prefill, 4), round(one.decode, 4)] for one in world.samples]
            save.single(f"{pools} {speed:g} {tbt:g} {mode}", loads)
            if rejected["baseline"]:
                ratio = rejected[mode] / rejected["baseline"]
                rows.append(
                    row("scheduler", mode, {"part": "admission", **case}, "rejected_ratio", [ratio], "")
                )
            yield rows


def routing(lines: Sequence[Line], speeds: Sequence[float]) -> Iterator[list[Row]]:
    """Mean TTFT by routing, 8P + 8D."""
    for speed in speeds:
        jobs = trace.jobs(lines, speed=speed)
        for mode in ROUTINGS:
            yield rows_of("routing", mode, {"speed": speed}, play("8P8D", mode, jobs))[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--trace", type=Path, default=TRACE, help="in Mooncake's format, with hash_ids")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the comparisons")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw them (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="fewer loads: tries the code only")
    options = parser.parse_args()
    if options.plots and not options.json:
        parser.error("--plots needs --json, too")
    lines = trace.read(options.trace, limit=300 if options.quick else None)
    facts = {"engines": msgspec.to_builtins(COSTS), "requests": len(lines), "arrivals": "spread over 3 s"}
    save = Saved(options.json, ("numpy", "msgspec"), facts=facts)
    few = 2 if options.quick else None
    parts: dict[str, Callable[[], Iterator[list[Row]]]] = {
        "validation": lambda: iter([list(scheduler_validation.compare())]),
        "coupled": lambda: coupled(lines, SPEEDS[:few]),
        "long": lambda: long(LENGTHS[: few and 1], 40 if options.quick else 300),
        "admission": lambda: admission(lines, OVERLOADS[:few], save),
        "routing": lambda: routing(lines, ROUTING_SPEEDS[:few]),
    }
    for part in options.only:
        began = time.monotonic()
        print(f"{part}:", flush=True)
        for rows in parts[part]():
            save.add(rows)
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    save.publish()
    if options.plots:
        from benchmarks import scheduler_plots

        scheduler_plots.draw(save.rows, options.json.with_suffix(".requests.json"), options.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
