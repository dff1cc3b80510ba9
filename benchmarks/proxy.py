"""What a proxy costs: CPU, time to the first token, time of each chunk, memory; ours and its peers.

    make routers                                          # once: the peers, in an environment of their own
    python benchmarks/proxy.py [--json FILE] [--phases cpu latency streams saturation soak]

Every subject gets the same load in P/D mode, in turns, from the same simulated engines (`sim_engine.py`): two
prefill and two decode engines, a prompt takes 5 ms, its hand-over 3 ms, a decode step 20 ms, in which each
stream gets a token. `no proxy` is a client that sends to prefill and decode itself, at once. `aiohttp-relay`
is an aiohttp server and client with nothing in between: what a proxy in Python usually is at best.

The proxy has one core, clients and engines the other, all with real-time priority: other work on the machine
does not count. The phases:

- `cpu`: CPU time of the proxy's process at a moderate load, per request; its inverse is requests/s per core.
  Chats with prompts of 1 kB or 200 kB; answers of 32 or 128 tokens, streamed, or 32 tokens in one piece.
- `latency`: the time to the first token and of each chunk, less what the engines took by their own clock, at
  25, 50 and 75% of our requests/s per core (measured anew), the same for all subjects; `added` is what it is
  more than with no proxy.
- `streams`: memory with 2,000 streams under way, without the priority, as it measures no times. A token comes
  each half second, so ours lets everybody in (`--admission none`).
- `saturation`: answers per second when more comes than the proxy can do.
- `soak`: ours alone at 75% for --soak-seconds, in pieces; trends are regressions over the time.

Phases that are not asked for keep their rows in FILE.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import report
from load_client import Plan
from proxy_subjects import (
    FIRST,
    NONE,
    OTHER_CORE,
    PROXY_CORE,
    SECOND,
    SLOW_STREAMS,
    SUBJECTS,
    Engines,
    Process,
    free_ports,
    versions,
    wait_ready,
)

BENCHMARK = "proxy"
PAIRS = 2
PROMPT, STEP, HANDOFF = 0.005, 0.02, 0.003
STREAMS = 2000
LOADS = (25, 50, 75)
ROUNDS = 2
PHASES = ("cpu", "latency", "streams", "saturation", "soak")
PACKAGES = ("mooncake-connector", "aiohttp", "uvloop", "msgspec")
Found = dict[str, npt.NDArray[Any]]

# Case, requests per second, and how many of the answers' tokens come how.
CPU_CASES: dict[str, tuple[dict[str, object], float, Plan]] = {
    "1 kB, 32 tokens": ({"prompt": "1 kB", "tokens": 32}, 100, Plan("", prompt_bytes=1000, tokens=32)),
    "1 kB, 128 tokens": ({"prompt": "1 kB", "tokens": 128}, 40, Plan("", prompt_bytes=1000, tokens=128)),
    "1 kB, whole": (
        {"prompt": "1 kB", "tokens": 32, "stream": "no"},
        150,
        Plan("", prompt_bytes=1000, tokens=32, stream=False),
    ),
    "200 kB, 32 tokens": ({"prompt": "200 kB", "tokens": 32}, 50, Plan("", prompt_bytes=200_000, tokens=32)),
}
MAIN = "1 kB, 32 tokens"


class Bench:
    """One run.

    Args:
        quick: measurements of half the length.
    """

    def __init__(self, subjects: list[str], file: Path | None, quick: bool) -> None:
        self.subjects = subjects
        self.rows: list[report.Row] = []
        self.urgent = True
        self._file = file
        self._scale = 0.5 if quick else 1.0
        self._folder = Path(tempfile.mkdtemp(prefix="proxy-bench-"))
        self._busy: list[float] = []
        self._seed = 0
        if file and file.exists():
            self.rows = json.loads(file.read_text())["rows"]

    @contextmanager
    def running(self, subject: str, step: float = STEP) -> Iterator[tuple[Process | None, Engines, int]]:
        """Engines and a proxy in front of them; its process (None without) and port (0 without)."""
        urgency = SECOND if self.urgent else 0
        engines = Engines(PAIRS)
        log = self._folder / "log.txt"
        with ExitStack() as stack:
            command = engines.command(PROMPT, step, HANDOFF)
            stack.enter_context(Process(command, OTHER_CORE, urgency, log))
            for port in engines.prefill + engines.decode:
                wait_ready(port)
            if subject == NONE:
                yield None, engines, 0
                return
            port = free_ports(1)[0]
            commands = SUBJECTS if step == STEP else SLOW_STREAMS
            proxy = stack.enter_context(Process(commands[subject](port, engines), PROXY_CORE, urgency, log))
            wait_ready(port)
            yield proxy, engines, port

    def load(
        self, engines: Engines, port: int, watch: Callable[[], None] | None = None, **plan: Any
    ) -> Found:
        """Have a client do what `plan` says, and give back what it measured.

        Args:
            watch: called now and then meanwhile.
        """
        self._seed += 1
        out = self._folder / "figures.npz"
        ports = {"prefill": engines.prefill, "decode": engines.decode}
        whole = {"out": str(out), "proxy": port, "seed": self._seed} | ports | plan
        client = [sys.executable, str(Path(__file__).parent / "load_client.py"), json.dumps(whole)]
        with Process(client, OTHER_CORE, FIRST if self.urgent else 0, self._folder / "log.txt") as running:
            while running.popen.poll() is None:
                if watch:
                    watch()
                time.sleep(0.2)
            if running.popen.returncode:
                raise subprocess.CalledProcessError(running.popen.returncode, client[1])
        with np.load(out) as found:
            return dict(found)

    def warm(self, engines: Engines, port: int) -> None:
        self.load(engines, port, rate=50, seconds=2)

    def keep(self, metrics: set[str], rows: list[report.Row], subjects: list[str]) -> None:
        """These rows in place of former ones of these metrics and subjects."""
        self.rows = [
            row for row in self.rows if row["metric"] not in metrics or row["subject"] not in subjects
        ] + rows
        if self._file:
            facts = {
                "pinned": f"proxy on core {PROXY_CORE}, client and engines on core {OTHER_CORE}, SCHED_FIFO",
                "engines": f"{PAIRS} prefill, {PAIRS} decode, simulated: prompt {PROMPT} s, "
                f"hand-over {HANDOFF} s, step {STEP} s",
                "python_optimized": "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")),
            }
            report.write(self.rows, self._file, PACKAGES, versions(), self._busy, facts)

    def settle(self) -> None:
        self._busy.append(report.settle(0))

    def spent(
        self, proxy: Process, engines: Engines, port: int, rate: float, plan: Plan
    ) -> tuple[float, str]:
        """CPU seconds per request, and what failed."""
        asked = {name: getattr(plan, name) for name in ("prompt_bytes", "tokens", "stream")}
        before = proxy.cpu()
        found = self.load(engines, port, rate=rate, seconds=2.5 * self._scale, **asked)
        return (proxy.cpu() - before) / int(found["done"]), "; ".join(found["failures"])

    def cpu(self) -> None:
        """CPU time per request."""
        rows = []
        for subject in self.subjects:
            if subject == NONE:
                continue
            self.settle()
            costs: dict[str, list[float]] = {case: [] for case in CPU_CASES}
            notes: dict[str, str] = {}
            with self.running(subject) as (proxy, engines, port):
                assert proxy
                self.warm(engines, port)
                for _ in range(ROUNDS):
                    for case, (_, rate, plan) in CPU_CASES.items():
                        cost, failed = self.spent(proxy, engines, port, rate, plan)
                        costs[case].append(cost)
                        notes[case] = failed or notes.get(case, "")
            for case, (what, _, _) in CPU_CASES.items():
                each = [1e3 * cost for cost in costs[case]]
                rates = [1 / cost for cost in costs[case]]
                rows.append(report.row(BENCHMARK, subject, what, "cpu_per_request", each, "ms"))
                rows.append(report.row(BENCHMARK, subject, what, "requests_per_core", rates, "1/s"))
                if notes[case]:
                    rows[-2]["note"] = notes[case]
                print(f"{subject}, {case}: {each} ms {notes[case]}", flush=True)
        self.keep({"cpu_per_request", "requests_per_core"}, rows, self.subjects)

    def capacity(self) -> float:
        """Our requests/s per core, for the loads of a phase."""
        _, rate, plan = CPU_CASES[MAIN]
        with self.running("ours") as (proxy, engines, port):
            assert proxy
            self.warm(engines, port)
            costs = [self.spent(proxy, engines, port, rate, plan)[0] for _ in range(ROUNDS)]
        return 1 / float(np.median(costs))

    def latency(self) -> None:
        """Added time to the first token, and of each chunk."""
        capacity = self.capacity()
        rows = []
        base: dict[tuple[int, str, str], float] = {}
        for subject in [NONE, *(each for each in self.subjects if each != NONE)]:
            self.settle()
            with self.running(subject) as (_, engines, port):
                self.warm(engines, port)
                for load in LOADS:
                    rate = capacity * load / 100
                    found = self.load(engines, port, rate=rate, seconds=9 * self._scale)
                    case = {"load_percent": load, "requests_per_s": round(rate)}
                    measured = [("ttft", 1e3 * found["added"]), ("chunk", 1e3 * found["chunk"])]
                    for (what, samples), (name, at) in _each(measured):
                        value = float(np.percentile(samples, at))
                        if subject == NONE:
                            base[load, what, name] = value
                            metric, shown = f"{what}_beyond_engines_{name}", value
                        else:
                            metric, shown = f"added_{what}_{name}", value - base[load, what, name]
                        found_row = report.row(BENCHMARK, subject, case, metric, [shown], "ms")
                        found_row["samples"] = len(samples)
                        rows.append(found_row)
                    failed = int(found["failed"])
                    rows.append(report.row(BENCHMARK, subject, case, "failed_at_load", [failed], "requests"))
                    said = {row["metric"]: row["value"] for row in rows[-5:]}
                    print(f"{subject} at {load}%: {said}", flush=True)
        metrics = {row["metric"] for row in rows}
        self.keep(metrics, rows, [NONE, *self.subjects])

    def streams(self) -> None:
        """Memory while many streams are under way."""
        self.urgent = False  # no times are measured
        rows = []
        for subject in self.subjects:
            if subject == NONE:
                continue
            for size in (1000, 200_000):
                self.settle()
                with self.running(subject, step=0.5) as (proxy, engines, port):
                    assert proxy
                    self.load(engines, port, streams=20, tokens=2, prompt_bytes=size)
                    before, peak, last = proxy.resident(), [0], [0.0]

                    def watch(process: Process = proxy, peak: list[int] = peak) -> None:
                        peak[0] = max(peak[0], process.resident())

                    # No faster than they can begin, and nobody ends before all have begun.
                    ramp = 10.0 if size == 1000 else 16.0
                    tokens = int(ramp / 0.5) + 8
                    found = self.load(
                        engines, port, watch, streams=STREAMS, ramp=ramp, tokens=tokens, prompt_bytes=size
                    )
                    last[0] = proxy.resident()
                case = {"streams": STREAMS, "prompt": "1 kB" if size == 1000 else "200 kB"}
                of = {"memory_before": before, "memory_peak": peak[0], "memory_after": last[0]}
                rows += [
                    report.row(BENCHMARK, subject, case, name, [value / 1e6], "MB")
                    for name, value in of.items()
                ]
                failed = int(found["failed"])
                rows.append(report.row(BENCHMARK, subject, case, "failed_streams", [failed], "requests"))
                if failed:
                    rows[-1]["note"] = "; ".join(found["failures"])
                print(f"{subject}, {case}: {of}, failed {failed} {found['failures']}", flush=True)
        self.keep({row["metric"] for row in rows}, rows, self.subjects)

    def saturation(self) -> None:
        """Answers per second when more comes than it can do."""
        rows = []
        for subject in self.subjects:
            self.settle()
            with self.running(subject) as (proxy, engines, port):
                self.warm(engines, port)
                before, began = proxy.cpu() if proxy else 0.0, time.monotonic()
                found = self.load(engines, port, streams=600, again=True, seconds=5 * self._scale, ramp=1.0)
                passed = time.monotonic() - began
                share = (proxy.cpu() - before) / passed if proxy else 0.0
            done = int(found["done"]) - int(found["failed"])
            case = {"under_way": 600, "tokens": 32}
            rows.append(
                report.row(BENCHMARK, subject, case, "saturated", [done / float(found["seconds"])], "1/s")
            )
            rows.append(report.row(BENCHMARK, subject, case, "busy_when_saturated", [100 * share], "%"))
            print(f"{subject}: {rows[-2]['value']}/s, core {100 * share:.0f}% busy", flush=True)
        self.keep({"saturated", "busy_when_saturated"}, rows, self.subjects)

    def soak(self, seconds: float) -> None:
        """Ours for a long time: what grows."""
        capacity = self.capacity()
        memory: list[tuple[float, float]] = []
        self.settle()
        with self.running("ours") as (proxy, engines, port):
            assert proxy
            self.warm(engines, port)
            began = time.monotonic()

            def watch() -> None:
                memory.append((time.monotonic() - began, proxy.resident() / 1e6))

            found = self.load(engines, port, watch, rate=0.75 * capacity, seconds=seconds)
        case = {
            "load_percent": 75,
            "requests_per_s": round(0.75 * capacity),
            "minutes": round(seconds / 60, 1),
        }
        rows = [report.row(BENCHMARK, "ours", case, "soak_requests", [int(found["done"])], "requests")]
        rows.append(report.row(BENCHMARK, "ours", case, "soak_failed", [int(found["failed"])], "requests"))
        # Its caches and the allocator's arenas fill in the first fifth.
        at, resident = np.array(memory).T
        late = at > seconds / 5
        trends = [("soak_memory", at[late], resident[late], "MB")]
        for name, times, values in (("ttft", "at", "added"), ("chunk", "chunk_at", "chunk")):
            pieces = [
                (start, np.percentile(1e3 * found[values][inside], (50, 99)))
                for start in np.arange(seconds / 5, seconds, 5.0)
                if (inside := (found[times] >= start) & (found[times] < start + 5.0)).any()
            ]
            starts = np.array([start for start, _ in pieces])
            for column, which in enumerate(("p50", "p99")):
                series = np.array([both[column] for _, both in pieces])
                trends.append((f"soak_{name}_beyond_engines_{which}", starts, series, "ms"))
        for metric, times_, values_, unit in trends:
            slope = float(np.polyfit(times_, values_, 1)[0]) * 600
            spread = report.row(BENCHMARK, "ours", case, metric, values_.tolist(), unit)
            growth = report.row(BENCHMARK, "ours", case, f"{metric}_growth", [slope], f"{unit} in 10 min")
            rows += [spread, growth]
            print(f"{metric}: {spread['value']} {unit}, grows by {slope:.3f} in 10 min", flush=True)
        self.keep({row["metric"] for row in rows}, rows, ["ours"])


def _each(
    measured: list[tuple[str, npt.NDArray[Any]]],
) -> Iterator[tuple[tuple[str, npt.NDArray[Any]], tuple[str, float]]]:
    for one in measured:
        for percentile in (("p50", 50.0), ("p99", 99.0)):
            yield one, percentile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    report.add_arguments(parser)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES[:4])
    parser.add_argument("--subjects", nargs="+", default=[*SUBJECTS, NONE], choices=[*SUBJECTS, NONE])
    parser.add_argument("--soak-seconds", type=float, default=1800)
    parser.add_argument("--quick", action="store_true", help="half of the time")
    options = parser.parse_args()
    bench = Bench(options.subjects, options.json, options.quick)
    for phase in options.phases:
        bench.urgent = True
        if phase == "soak":
            bench.soak(options.soak_seconds)
        else:
            getattr(bench, phase)()
    print(report.table(bench.rows))


if __name__ == "__main__":
    main()
