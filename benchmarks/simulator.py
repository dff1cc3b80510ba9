"""How many requests a minute the simulator plays, on one core.

    python benchmarks/simulator.py [--json FILE] [--repeats 5]

The pools, the trace and the admission of `scheduler.py`, at several loads, and the example that the
documentation begins with. The time is that of `World.run`: the conductor's and the engines', without reading
the trace. Where other programs run beside it CPU time tells what it takes.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.scheduler import COSTS, TRACE
from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.simulator import trace
from mooncake_connector.scheduler.simulator.costs import Costs
from mooncake_connector.scheduler.simulator.presets import preset
from mooncake_connector.scheduler.simulator.setup import Setup, parse_pools
from mooncake_connector.scheduler.simulator.world import World

NAME = "simulator"
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "conversation_120s.jsonl"
# By name: trace, its speed, engines, pools, and what is promised.
CASES: dict[str, tuple[Path, float, Costs, str, Slo]] = {
    "example": (EXAMPLE, 1.2, preset("h200-8b"), "3P1D", Slo(ttft=2.0, tbt=0.03)),
    "8P8D": (TRACE, 1.0, COSTS, "8P8D", Slo()),
    "8P8D, 2x": (TRACE, 2.0, COSTS, "8P8D", Slo()),
    "12P2D, 3x, TBT 30 ms": (TRACE, 3.0, COSTS, "12P2D", Slo(tbt=0.03)),
}


def play(name: str) -> tuple[float, float]:
    """Simulated requests per minute: of wall time, and of CPU time."""
    file, speed, costs, pools, slo = CASES[name]
    jobs = trace.jobs(trace.read(file), speed=speed)
    found: dict[str, Any] = parse_pools(pools)
    world = World(Setup(costs=costs, scheduling=Scheduling(slo=slo), **found), jobs)
    before = time.process_time()
    world.run()
    return 60 * len(jobs) / world.wall, 60 * len(jobs) / (time.process_time() - before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="simulations of each case (5)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    busy = [report.settle(20)]
    rows = []
    for name in CASES:
        found = [play(name) for _ in range(options.repeats)]
        rows += [
            report.row(NAME, name, {}, metric, [one[at] for one in found], "req/min")
            for at, metric in enumerate(("speed", "speed_cpu"))
        ]
    report.publish(rows, options.json, ("numpy", "msgspec"), busy=busy, facts={"cores_used": 1})


if __name__ == "__main__":
    main()
