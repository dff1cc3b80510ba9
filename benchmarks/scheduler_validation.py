"""The simulator against real engines: the requests of a recorded replay, and how far its figures are off.

    python benchmarks/scheduler_validation.py [--results FILE] [--preset NAME]

The replay is `benchmarks/serving.py`'s, as recorded in benchmarks/results/ttft-gpu.json. The simulated
engines' costs come from other measurements of the same run (one request at a time, steady streams), never
from the replay.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import serving
from benchmarks.gpu_engines import LLAMA_8B
from benchmarks.report import Row, row, table
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.simulator.presets import preset
from mooncake_connector.scheduler.simulator.report import summary
from mooncake_connector.scheduler.simulator.setup import Setup
from mooncake_connector.scheduler.simulator.trace import Job
from mooncake_connector.scheduler.simulator.world import World

RECORDED = Path(__file__).resolve().parent / "results" / "ttft-gpu.json"
SECONDS = 15.0
KV_TOKENS = 30 * 2**30 // 131_072  # --kv-gib's default
METRICS = ("ttft_p50", "ttft_p90", "tbt_p50", "tbt_p99", "tbt_mean")
TARGET = 15.0  # percent


def recorded(file: Path) -> dict[tuple[str, float], dict[str, float]]:
    """What the replay measured, ms, by system and rate."""
    found: dict[tuple[str, float], dict[str, float]] = {}
    for each in json.loads(file.read_text())["rows"]:
        if each["benchmark"] == "serving" and each["value"] is not None:
            found.setdefault((each["subject"], each["case"]["rate"]), {})[each["metric"]] = each["value"]
    return found


def simulated(system: str, rate: float, name: str) -> dict[str, float]:
    """The same figures of the simulator."""
    arrivals = serving.at_rate(serving.load_trace(scale=LLAMA_8B), rate, SECONDS)
    coupled = system.endswith("coupled")
    setup = Setup(
        costs=msgspec.structs.replace(preset(name), kv_tokens=KV_TOKENS),
        prefill=0 if coupled else 1,
        decode=0 if coupled else 1,
        coupled=2 if coupled else 0,
        # Coupled engines were asked in turns.
        scheduling=Scheduling(routing="round_robin", admission="none"),
        prefix_caching=False,
    )
    world = World(setup, [Job(a.at, a.prompt, a.output) for a in arrivals])
    world.run()
    found = summary(world)
    steps = sum(task.output - 1 for task in world.tasks)
    return {
        "ttft_p50": 1e3 * found["ttft"]["p50"],
        "ttft_p90": 1e3 * found["ttft"]["p90"],
        "tbt_p50": 1e3 * world.gaps.quantile(0.5),
        "tbt_p99": 1e3 * world.gaps.quantile(0.99),
        "tbt_mean": 1e3 * sum(task.last - task.first for task in world.tasks) / steps,
    }


def compare(file: Path = RECORDED, name: str = "h200-8b") -> Iterator[Row]:
    """Each figure's error in percent of the measured one; the note has both."""
    for (system, rate), measured in recorded(file).items():
        found = simulated(system, rate, name)
        case: dict[str, object] = {"part": "validation", "rate": rate}
        for metric in METRICS:
            error = 100 * (found[metric] / measured[metric] - 1)
            one = row("scheduler", system, case, f"error_{metric}", [error], "%")
            yield one | {"note": f"{found[metric]:.1f} simulated, {measured[metric]:.1f} ms measured"}


def within(rows: Sequence[Row]) -> Mapping[str, str]:
    """How many errors are within the target, by metric."""
    found = {}
    for metric in METRICS:
        errors = [abs(one["value"]) for one in rows if one["metric"] == f"error_{metric}"]
        met = sum(error <= TARGET for error in errors)
        found[metric] = f"{met} of {len(errors)} within {TARGET:g}%, median {statistics.median(errors):.0f}%"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RECORDED, help="a recorded replay")
    parser.add_argument("--preset", default="h200-8b", help="the simulated engines (h200-8b)")
    options = parser.parse_args()
    rows = list(compare(options.results, options.preset))
    print(table(rows))
    for metric, said in within(rows).items():
        print(f"{metric}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
