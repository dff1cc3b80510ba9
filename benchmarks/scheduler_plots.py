"""Draws what benchmarks/scheduler.py found.

python benchmarks/scheduler_plots.py RESULT.json docs/images      needs matplotlib
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import Row
from mooncake_connector.scheduler.simulator.plot import COLOURS, pyplot, save


def draw(rows: Sequence[Row], loads: Path, folder: Path) -> None:
    """Write one picture for each comparison that there are rows of.

    Args:
        loads: the loads over time, as `benchmarks/scheduler.py` saves them.
    """
    of = {name: [row for row in rows if row["case"].get("part") == name] for name in PARTS}
    for name, drawing in PARTS.items():
        if of[name]:
            save(drawing(pyplot(), of[name]), folder / f"scheduler-{name}.svg")
    if of["admission"] and loads.exists():
        save(oscillation(pyplot(), json.loads(loads.read_text())), folder / "scheduler-loads.svg")


def over_load(plt: Any, rows: Sequence[Row]) -> Any:
    """Requests within their SLO over the rate of arrivals."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    titles = {
        "within_slo": "within 30 s and, on average over the answer, 0.1 s a token [%]",
        "within_slo_p99": "within 30 s and, 99% of its gaps, 0.1 s a token [%]",
    }
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for name, points, colour in _lines(rows, metric, "rate"):
            style = "--" if "coupled" in name else "-"
            axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=3, label=name)
        axis.axhline(90, color="#999999", lw=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("requests per second")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def lengths(plt: Any, rows: Sequence[Row]) -> Any:
    """Requests per second within the SLO by length of prompts, over the coupled rival."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = list(_lines(rows, "capacity", "prompt"))
    base = dict(next(points for name, points, _ in lines if name == "4 coupled"))
    for at, (name, points, colour) in enumerate(lines):
        places = [number + (at - len(lines) / 2 + 0.5) * 0.8 / len(lines) for number in range(len(points))]
        values = [value / base[length] for length, value in points]
        axis.bar(places, values, 0.8 / len(lines), color=colour, label=name)
    axis.set_xticks(range(len(base)), [f"{length // 1024}k" for length in base])
    axis.axhline(1, color="#999999", lw=0.8)
    axis.set_title("requests/s within SLO, 4 coupled = 1, by length of prompts", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    return figure


def rejections(plt: Any, rows: Sequence[Row]) -> Any:
    """Rejected requests and goodput by admission."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (metric, title) in zip(
        axes, (("rejected_share", "rejected [%]"), ("goodput", "goodput [requests/s]")), strict=True
    ):
        of = [row for row in rows if row["metric"] == metric]
        cases = list(dict.fromkeys(_case(row) for row in of))
        modes = list(dict.fromkeys(row["subject"] for row in of))
        for at, (mode, colour) in enumerate(zip(modes, COLOURS, strict=False)):
            found = {_case(row): row["value"] for row in of if row["subject"] == mode}
            places = [number + (at - len(modes) / 2 + 0.5) * 0.8 / len(modes) for number in range(len(cases))]
            axis.bar(
                places, [found.get(case, 0) for case in cases], 0.8 / len(modes), color=colour, label=mode
            )
        axis.set_xticks(range(len(cases)), cases, fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def routings(plt: Any, rows: Sequence[Row]) -> Any:
    """Mean TTFT by routing over the rate of arrivals."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points, colour in _lines(rows, "mean_ttft", "speed"):
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, label=name)
    axis.set_yscale("log")
    axis.set_xlabel("replay speed")
    axis.set_title("mean TTFT [s], 8P8D", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return figure


def oscillation(plt: Any, loads: dict[str, list[list[float]]]) -> Any:
    """Loads over time of the last overload, by admission."""
    last = list(loads)[-1].rpartition(" ")[0]
    shown = {key.rpartition(" ")[2]: value for key, value in loads.items() if key.startswith(last)}
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(10, 2 * len(shown)), layout="constrained", sharex=True
    )
    for axis, (mode, points) in zip(axes, shown.items(), strict=True):
        at, prefill, decode = zip(*points, strict=True)
        axis.plot(at, _smooth(prefill), color=COLOURS[0], lw=1, label="prefill: queue / TTFT promised")
        axis.plot(at, _smooth(decode), color=COLOURS[1], lw=1, label="decode: step / TBT promised")
        axis.set_ylim(0, 1.6)
        axis.set_title(mode, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False, ncols=2)
    axes[-1].set_xlabel("time [s]")
    return figure


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Medians of a few neighbours: one step with a prompt in it is no trend."""
    half = width // 2
    return [statistics.median(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def _lines(rows: Sequence[Row], metric: str, x: str) -> Any:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["metric"] == metric and x in row["case"]:
            found.setdefault(row["subject"], []).append((row["case"][x], row["value"]))
    palette = (*COLOURS, "#d4579b")
    for (name, points), colour in zip(found.items(), palette, strict=False):
        yield name, sorted(points), colour


def _case(row: Row) -> str:
    case = row["case"]
    return f"{case['pools']}, {case['speed']:g}x, {case['tbt']:g} s"


PARTS = {"coupled": over_load, "long": lengths, "admission": rejections, "routing": routings}


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    file = Path(sys.argv[1])
    draw(json.loads(file.read_text())["rows"], file.with_suffix(".requests.json"), Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
