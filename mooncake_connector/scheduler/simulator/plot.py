"""Loads over time, and how long requests waited, as a picture."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.simulator.world import World

COLOURS = ("#0b6e99", "#c65d21", "#5b8c3a", "#7a4fa0", "#a08a2c", "#555555")


def pyplot() -> Any:
    """matplotlib, set to draw the same file from the same figures.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        mpl: Any = importlib.import_module("matplotlib")
        mpl.use("svg")
        mpl.rcParams["svg.hashsalt"] = "mooncake"
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error


def loads(worlds: Sequence[World], names: Sequence[str], file: Path) -> None:
    """Prefill's and decode's load over time beside the distributions of TTFT and TBT, as SVG.

    Raises:
        ConfigError: matplotlib is not installed, or the file can't be written.
    """
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
    for world, name, colour in zip(worlds, names, COLOURS, strict=False):
        at = [sample.at for sample in world.samples]
        slo = world.setup.scheduling.slo
        axes[0][0].plot(at, [sample.prefill for sample in world.samples], color=colour, label=name, lw=1)
        axes[0][1].plot(at, [sample.decode for sample in world.samples], color=colour, label=name, lw=1)
        done = [task for task in world.tasks if task.outcome == "done"]
        share = len(done) / len(world.tasks)
        _distribution(axes[1][0], [task.ttft for task in done], share, slo.ttft, colour, name)
        _distribution(
            axes[1][1], [task.tbt for task in done if task.output > 1], share, slo.tbt, colour, name
        )
    axes[0][0].set_title("load of prefill: queued seconds / TTFT promised", fontsize=10)
    axes[0][1].set_title("load of decode: step / TBT promised", fontsize=10)
    axes[1][0].set_title("requests with at most this TTFT [s]", fontsize=10)
    axes[1][1].set_title("requests with at most this TBT [s]", fontsize=10)
    for axis in axes[0]:
        axis.set_xlabel("time [s]")
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a picture as SVG, without the date.

    Raises:
        ConfigError: The file can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})
    except OSError as error:
        raise ConfigError(f"--plot {file}: {error.strerror or error}") from error


def _distribution(
    axis: Any, values: Sequence[float], share: float, limit: float, colour: str, name: str
) -> None:
    if not values:
        return
    ordered = sorted(max(value, 1e-4) for value in values)
    stride = max(1, len(ordered) // 400)
    points = ordered[::stride]
    axis.plot(
        points, [share * at * stride / len(ordered) for at in range(len(points))], color=colour, label=name
    )
    axis.axvline(limit, color="#999999", lw=0.8, ls="--")
    axis.set_xscale("log")
    axis.set_ylim(0, 1.02)
