"""What a simulation found: figures, a table of several, JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mooncake_connector.scheduler.simulator.task import Task
from mooncake_connector.scheduler.simulator.world import World

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def summary(world: World) -> dict[str, Any]:
    """All figures of a simulation that has run. Times are seconds.

    Keys that need a word:
        ttft, tbt: of the requests that were served; a request's TBT is the mean over its answer.
        gap: single times between two tokens, of all answers.
        within_slo: part of all requests that was served with TTFT and TBT as promised; `within_slo_p99` the
            same with the 99th percentile of each request's gaps in place of its TBT.
        goodput: requests within their SLO for each second in which requests arrived.
        cache_hit: part of the prompt tokens that needed no computing.
        load: see `Sample`; `deviation` is the standard deviation over time.
        predicted: observed over predicted: 10%, 50% and 90% quantiles.
    """
    setup, tasks = world.setup, world.tasks
    slo = setup.scheduling.slo
    done = [task for task in tasks if task.outcome == "done"]
    first = [task.ttft <= slo.ttft_of(task.prompt) for task in done]
    later = [task.tbt <= slo.tbt for task in done]
    even = [task.slow_gaps <= 0.01 * (task.output - 1) for task in done]
    lasted = max(tasks[-1].at - tasks[0].at, 1e-9)
    good = sum(a and b for a, b in zip(first, later, strict=True))
    count = len(tasks)
    prompts = sum(task.prompt for task in done)
    return {
        "system": setup.name,
        "routing": setup.scheduling.routing,
        "admission": setup.scheduling.admission,
        "prior": setup.prior,
        "requests": count,
        "seconds": round(lasted, 3),
        "rate": _round(count / lasted),
        **{
            outcome: sum(task.outcome == outcome for task in tasks)
            for outcome in ("done", "rejected", "dropped", "failed")
        },
        "ttft": _spread([task.ttft for task in done]),
        "tbt": _spread([task.tbt for task in done if task.output > 1]),
        "gap": {name: _round(world.gaps.quantile(q)) for name, q in QUANTILES.items()},
        "within_ttft": _round(sum(first) / count),
        "within_tbt": _round(sum(later) / count),
        "within_slo": _round(good / count),
        "within_slo_p99": _round(sum(a and b for a, b in zip(first, even, strict=True)) / count),
        "goodput": _round(good / lasted),
        "cache_hit": _round(sum(task.hit for task in done) / prompts if prompts else 0.0),
        "copies": world.copies,
        "preempted": sum(task.preempted for task in done),
        "load": {
            "prefill": _load([sample.prefill for sample in world.samples]),
            "decode": _load([sample.decode for sample in world.samples]),
            "kv": _load([sample.kv for sample in world.samples]),
        },
        "predicted": _predicted(world),
        "wall": round(world.wall, 3),
        "requests_per_minute": round(60 * count / world.wall),
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "system": lambda found: found["system"],
    "routing": lambda found: found["routing"],
    "admission": lambda found: found["admission"],
    "served": lambda found: str(found["done"]),
    "rejected": lambda found: str(found["rejected"] + found["dropped"]),
    "TTFT mean": lambda found: _seconds(found["ttft"]["mean"]),
    "p50": lambda found: _seconds(found["ttft"]["p50"]),
    "p90": lambda found: _seconds(found["ttft"]["p90"]),
    "p99": lambda found: _seconds(found["ttft"]["p99"]),
    "TBT p50": lambda found: _seconds(found["tbt"]["p50"]),
    "p90 ": lambda found: _seconds(found["tbt"]["p90"]),
    "p99 ": lambda found: _seconds(found["tbt"]["p99"]),
    "gap p99": lambda found: _seconds(found["gap"]["p99"]),
    "in SLO": lambda found: f"{100 * found['within_slo']:.1f}%",
    "goodput/s": lambda found: f"{found['goodput']:.2f}",
    "cached": lambda found: f"{100 * found['cache_hit']:.0f}%",
}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Simulations as rows of a table."""
    rows = [list(COLUMNS), *([text(one) for text in COLUMNS.values()] for one in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["  ".join(_cell(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in aligned)


def requests(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Every request with what became of it, for JSON."""
    names = ("at", "prompt", "output", "outcome", "prefill", "decode", "hit", "preempted")
    return [
        {name: getattr(task, name) for name in names}
        | ({"ttft": _round(task.ttft), "tbt": _round(task.tbt)} if task.outcome == "done" else {})
        for task in tasks
    ]


def _cell(text: str, width: int) -> str:
    return text.rjust(width) if text[:1].isdigit() or text == "-" else text.ljust(width)


def _spread(values: Sequence[float]) -> Mapping[str, float | None]:
    if not values:
        return dict.fromkeys(("mean", *QUANTILES))
    found = np.quantile(values, list(QUANTILES.values())).tolist()
    return {"mean": _round(float(np.mean(values)))} | {
        name: _round(value) for name, value in zip(QUANTILES, found, strict=True)
    }


def _load(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": _round(float(np.mean(values))),
        "max": _round(max(values)),
        "deviation": _round(float(np.std(values))),
    }


def _predicted(world: World) -> dict[str, list[float]]:
    calibration = world.estimators.calibration
    found = {}
    for quantity in calibration.quantities():
        if (known := calibration.summary(quantity)) is not None:
            found[quantity] = [_round(ratio) for ratio in known.ratio]
    return found


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _round(value: float) -> float:
    return float(f"{value:.5g}")
