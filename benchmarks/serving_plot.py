"""Draws what benchmarks/serving.py (or ttft.py --gpu) measured: TTFT, TBT and goodput over the load.

python benchmarks/serving_plot.py RESULT.json docs/images/serving.svg      needs matplotlib
"""

import json
import sys
from pathlib import Path

PANELS = (
    ("TTFT [ms]", ("ttft_p50", "ttft_p90")),
    ("time between tokens [ms]", ("tbt_p50", "tbt_p99")),
    ("goodput [requests/s]", ("goodput",)),
)
STYLES = ("-", "--")
COLOURS = ("#0b6e99", "#c65d21", "#5b8c3a")


def series(rows: list[dict], metric: str) -> dict[str, tuple[list[float], list[float]]]:
    """Rates and values of one metric for each system, by rate."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["benchmark"] == "serving" and row["metric"] == metric and row["value"] is not None:
            found.setdefault(row["subject"], {})[row["case"]["rate"]] = row["value"]
    return {name: (sorted(of), [of[rate] for rate in sorted(of)]) for name, of in found.items()}


def draw(document: dict, file: Path) -> None:
    """Write the plot as SVG.

    Raises:
        ValueError: the document has no rows of serving.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "serving"  # equal figures give equal files
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.8), layout="constrained")
    for axis, (title, metrics) in zip(axes, PANELS, strict=True):
        for metric, style in zip(metrics, STYLES, strict=False):
            systems = series(document["rows"], metric)
            if not systems:
                raise ValueError(f"no rows of serving with {metric}")
            for (name, (rates, values)), colour in zip(sorted(systems.items()), COLOURS, strict=False):
                label = f"{name} {metric.partition('_')[2]}".strip()
                axis.plot(rates, values, style, color=colour, marker="o", markersize=4, label=label)
        axis.set_xlabel("load [requests/s]")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    print(f"written: {sys.argv[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
