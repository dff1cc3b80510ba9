"""How quickly pages get from one GPU's memory into another's: cuda_ipc, the peers, and the limits.

    python benchmarks/gpu.py [--json FILE] [--quick] [--only SUBJECT ...]
    python benchmarks/gpu.py --only tcp tcp-host socket pinned_copy --sweep     # tcp with other settings
    python benchmarks/gpu.py --host        # the same code with host memory, where there is no GPU

Each subject has a pair of processes of its own (initiator on the first GPU, target on the second) and 60 s
for all that it measures, the sweep apart. All start at once, then one at a time measures; ``peer_copy`` again
and again. One that can't run, or fails, is reported with the reason and stops nobody else. `gpu_pair.py` says
what is measured and how.

Subjects: cuda_ipc as it chooses by itself, cuda_ipc/kernel and cuda_ipc/copy_engine forced to one way, nixl
(UCX's own choice), mooncake-nvlink; tcp with GPU memory at both ends, tcp-host with the host's. Limits:
peer_copy (one copy of it all by the driver, one process), pinned_copy (both ways at once), socket (two TCP
connections from host memory, as tcp has). Peers move 256 MiB at a time, not 1 GiB, in pages of 4 KiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import report
from gpu_pair import BLOCK, Task
from gpu_processes import Failed, Measuring
from gpu_tuning import SWEEP

BENCHMARK = "gpu"
ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
PACKAGES = (
    "mooncake-connector",
    "torch",
    "numpy",
    "cuda-bindings",
    "nixl",
    "nixl-cu13",
    "mooncake-transfer-engine-cuda13",
)
UNITS = {
    "bandwidth": "GB/s",
    "bandwidth_by_sms": "GB/s",
    "layouts": "GB/s",
    "staged": "GB/s",
    "staged_by_setting": "GB/s",
    "latency": "us",
    "cpu": "cores",
}

KIB, MIB = 1 << 10, 1 << 20
PAGES = (32 * KIB, 16 * KIB, 4 * MIB, 4 * KIB, 64 * KIB, 256 * KIB, MIB, 64 * MIB)
"""What the targets are about comes first: time may run out."""
SMS = (1, 2, 4, 8, 12, 16, 32)
SM_PAGES = (32 * KIB, 16 * KIB)
LATENCIES = (64 * KIB, 2 * MIB, 64 * MIB)
WAYS = ("kernel", "copy_engine")
PAGE = 32 * KIB
"""Of one layer of one token block of Llama-3-8B in bf16, keys or values."""
SUBJECT_S = 60.0
PREPARE_S = 75.0

GPU_SUBJECTS = (
    "peer_copy",
    "cuda_ipc",
    "nixl",
    "mooncake-nvlink",
    "tcp",
    "pinned_copy",
    "socket",
    "tcp-host",
)
ON_HOST = ("socket", "tcp-host")
"""Have host memory also where there are GPUs."""
HOST_SUBJECTS = ("memcpy", "process_vm", "nixl-host", "mooncake-tcp", "tcp", "socket")
SWEEP_BYTES, SWEEP_S = 256 * MIB, 3.0
"""Moved at a time, and what one of them may take. One that hangs costs a transfer's limit, once."""
PEERS = ("nixl", "mooncake-nvlink", "nixl-host", "mooncake-tcp")


def schedule(host: bool, quick: bool, nbytes: int) -> list[Task]:
    """Everything that is to be measured, in order."""
    pages = [page for page in (PAGES[:3] if quick else PAGES) if page <= nbytes]
    latencies = [size for size in LATENCIES[: 2 if quick else None] if size <= nbytes]
    ours, limit = ("process_vm", "memcpy") if host else ("cuda_ipc", "peer_copy")

    def bandwidth(subject: str, page: int, way: str = "") -> Task:
        few = subject in PEERS and page < 16 * KIB
        label, settings = (f"{subject}/{way}", {"cuda_copy": way}) if way else (subject, {})
        size = min(nbytes, 256 * MIB) if few else nbytes
        return Task(subject, label, "bandwidth", {"page_bytes": page}, page, size, settings)

    def latency(subject: str, size: int) -> Task:
        bulk = subject == limit
        return Task(subject, subject, "latency", {"total_bytes": size}, PAGE, size, bulk=bulk)

    def whole(subject: str, metric: str, page: int) -> Task:
        return Task(subject, subject, metric, {"page_bytes": page}, page, nbytes, bulk=True)

    turn = [whole(limit, "bandwidth", nbytes)]
    tasks = [*turn, *(bandwidth(ours, page) for page in pages), *turn]
    tasks += [latency(subject, size) for subject in (ours, limit) for size in latencies]
    block = PAGE * 2
    tasks.append(Task(ours, ours, "layouts", {"blocks": "alike"}, block, nbytes))
    for name, swap in (("NHD to HND", BLOCK), ("HND to NHD", BLOCK[::-1])):
        tasks.append(Task(ours, ours, "layouts", {"blocks": name}, block, nbytes, swap=swap))
    if not host:
        for sms in SMS[2::3] if quick else SMS:
            for page in SM_PAGES:
                case = {"page_bytes": page, "sms": sms}
                tasks.append(Task(ours, ours, "bandwidth_by_sms", case, page, nbytes, {"cuda_sms": sms}))
        tasks += [bandwidth(ours, page, way) for way in WAYS for page in pages]
        tasks += turn
    for peer in PEERS[2:] if host else PEERS[:2]:
        tasks += [bandwidth(peer, page) for page in pages]
        tasks += [latency(peer, size) for size in latencies]
        tasks += turn
    limits = ["socket"] if host else ["socket", "pinned_copy"]
    tasks += [whole(subject, "staged", PAGE) for subject in limits]
    for subject in ("tcp",) if host else ("tcp", "tcp-host"):
        for page in (PAGE, MIB):
            tasks.append(Task(subject, subject, "staged", {"page_bytes": page}, page, nbytes))
    return tasks


def sweep(nbytes: int) -> list[Task]:
    """tcp with other settings, in pages of 32 KiB."""
    nbytes, case = min(nbytes, SWEEP_BYTES), {"page_bytes": PAGE}
    return [
        Task(
            "tcp",
            _label(settings),
            "staged_by_setting",
            case,
            PAGE,
            nbytes,
            dict(settings),
            patience_s=SWEEP_S,
        )
        for settings in SWEEP
    ]


def _label(settings: Mapping[str, float]) -> str:
    return "tcp" + "".join(f" {name}={value}" for name, value in settings.items())


def environment(subject: str, libraries: Path) -> dict[str, str]:
    """Of a subject's processes."""
    variables = dict(os.environ)
    packages = [str(ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, packages))
    if subject == "mooncake-nvlink":
        # Its mere presence decides; and the engine wants libraries that not every system has.
        variables["MC_INTRANODE_NVLINK"] = "1"
        paths = [str(libraries) if libraries.is_dir() else "", variables.get("LD_LIBRARY_PATH", "")]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return variables


def rows_of(
    samples: dict[tuple[str, str, str], list[float]], failed: Mapping[tuple[str, str, str], str]
) -> list[report.Row]:
    """Samples by label, metric and case (JSON) as rows, and failures likewise."""
    rows = [
        report.row(BENCHMARK, label, json.loads(case), metric, values, UNITS[metric])
        for (label, metric, case), values in samples.items()
    ]
    rows += [
        report.not_run(BENCHMARK, label, metric, UNITS[metric], why, json.loads(case))
        for (label, metric, case), why in failed.items()
        if (label, metric, case) not in samples
    ]

    def place(row: report.Row) -> tuple[int, list[int]]:
        sizes = [value for value in row["case"].values() if isinstance(value, int)]
        return list(UNITS).index(row["metric"]), sizes

    return sorted(rows, key=place)


def by_reason(failures: Mapping[tuple[str, str, str], str]) -> dict[str, list[str]]:
    """Which figures failed of each reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for (label, metric, case), why in failures.items():
        found[why].append(f"{label} {metric} {case}")
    return dict(found)


def verdicts(rows: list[report.Row]) -> list[str]:
    """The targets beside what was measured; nothing of those without figures."""

    def of(subject: str, metric: str = "bandwidth", **case: object) -> float | None:
        found = [
            row["value"]
            for row in rows
            if (row["subject"], row["metric"]) == (subject, metric) and (not case or row["case"] == case)
        ]
        return found[0] if found else None

    lines = []

    def at_least(what: str, value: float | None, limit: float | None, unit: str) -> None:
        if value is not None and limit is not None:
            met = "met" if value >= limit else "MISSED"
            lines.append(f"{met}: {what}: {value:.3g}{unit} (target: at least {limit:.3g}{unit})")

    small, tiny = of("cuda_ipc", page_bytes=PAGE), of("cuda_ipc", page_bytes=16 * KIB)
    copy = of("peer_copy")
    at_least("cuda_ipc, 32 KiB pages", small, 350.0, " GB/s")
    if small is not None and copy:
        at_least("cuda_ipc, 32 KiB pages / one bulk copy", small / copy, 0.88, "")
    at_least("cuda_ipc, 16 KiB pages", tiny, 330.0, " GB/s")
    at_least("copy engine, 4 MiB", of("cuda_ipc/copy_engine", page_bytes=4 * MIB), 370.0, " GB/s")
    limits = [value for value in (of("pinned_copy", "staged"), of("socket", "staged")) if value is not None]
    if len(limits) == 2:
        at_least("tcp with GPU memory", of("tcp", "staged", page_bytes=PAGE), 0.8 * min(limits), " GB/s")
    return lines


def facts(devices: tuple[int, int]) -> tuple[dict[str, object], dict[str, str]]:
    """The GPUs and how they are linked; the driver's version."""
    fields = ("index", "name", "driver_version", "memory.total", "clocks.max.sm")
    lines = _asked("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    gpus = [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in lines]
    links = _asked("nvidia-smi", "nvlink", "--status", "-i", str(devices[0]))
    known: dict[str, object] = {
        "gpus": gpus,
        "from_gpu_to_gpu": list(devices),
        "nvlinks": sum("GB/s" in line for line in links),
        "topology": _asked("nvidia-smi", "topo", "-m"),
    }
    return known, {"driver": str(gpus[0].get("driver_version", "?")) if gpus else "?"}


def _asked(*command: str) -> list[str]:
    """What a program prints, its complaint if it fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError) as failed:
        print(f"{' '.join(command)}: {failed}", file=sys.stderr)
        return []
    return ran.stdout.strip().splitlines()


def commit() -> str:
    """Of this project, if there is a repository around it."""
    return (_asked("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or ["unknown"])[0]


Outcome = dict[str, list[float]] | str
"""Samples by metric, or why there are none."""


def run(
    tasks: list[Task],
    start: Callable[[str], Measuring],
    limit_s: float,
    record: Callable[[Task, Outcome], None],
) -> None:
    """Do all tasks, one at a time; `record` is told how each one went.

    Args:
        start: makes the `Measuring` of a subject, which gets ready in the background.
        limit_s: seconds for everything.
    """
    deadline = time.monotonic() + limit_s
    left = Counter(task.subject for task in tasks)
    processes = {subject: start(subject) for subject in left}
    spent: dict[str, float] = defaultdict(float)
    broken: dict[str, str] = {}
    try:
        # What gets ready would disturb what is measured.
        prepared = min(deadline, time.monotonic() + PREPARE_S)
        for name, process in processes.items():
            try:
                process.answer(prepared - time.monotonic())
            except Failed as failed:
                broken[name] = str(failed)
                process.close()
        for task in tasks:
            name = task.subject
            began = time.monotonic()
            outcome: Outcome = broken.get(name, "")
            if not outcome:
                limit = deadline - began
                if not task.patience_s:
                    limit = min(limit, SUBJECT_S - spent[name])
                try:
                    outcome = processes[name].measure(asdict(task), limit)
                except Failed as failed:
                    outcome = str(failed)
                    if failed.fatal:
                        broken[name] = outcome
                        processes[name].close()
            record(task, outcome)
            spent[name] += time.monotonic() - began
            left[name] -= 1
            if not left[name]:
                processes[name].close()
    finally:
        for process in processes.values():
            process.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="256 MiB and a few cases: does it run at all")
    parser.add_argument(
        "--sweep", action="store_true", help="also tcp with other settings, one after another"
    )
    parser.add_argument("--host", action="store_true", help="with host memory, without a GPU")
    parser.add_argument("--gpus", type=int, nargs=2, default=(0, 1), metavar=("FROM", "TO"))
    parser.add_argument("--mib", type=int, help="memory on each side; 1024, with --quick or --host 256")
    parser.add_argument("--only", nargs="+", metavar="SUBJECT", choices=[*GPU_SUBJECTS, *HOST_SUBJECTS])
    parser.add_argument("--limit", type=float, default=120.0, metavar="S", help="seconds for everything")
    parser.add_argument("--logs", type=Path, metavar="FILE", help="keep what all processes printed")
    parser.add_argument("--commit", help="of this project, where there is no repository")
    parser.add_argument(
        "--peer-libraries", type=Path, default=ROOT / ".gpu/libs", help="what Mooncake wants of the system"
    )
    options = parser.parse_args()
    nbytes = (options.mib or (256 if options.quick or options.host else 1024)) * MIB
    tasks = [
        task
        for task in schedule(options.host, options.quick, nbytes) + (sweep(nbytes) if options.sweep else [])
        if not options.only or task.subject in options.only
    ]
    known, others = ({}, {}) if options.host else facts(tuple(options.gpus))
    others["commit"] = options.commit or commit()
    samples: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    failures: dict[tuple[str, str, str], str] = {}
    began = time.monotonic()

    def start(subject: str) -> Measuring:
        python = PEERS_PYTHON if options.host and subject in PEERS else Path(sys.executable)
        kind = "host" if options.host or subject in ON_HOST else "cuda"
        arguments = ["--kind", kind, "--nbytes", str(nbytes)]
        arguments += ["--devices", *map(str, options.gpus)]
        command = [str(python), str(Path(__file__).with_name("gpu_pair.py")), subject, *arguments]
        return Measuring(subject, command, environment(subject, options.peer_libraries), logs)

    def record(task: Task, outcome: Outcome) -> None:
        case = json.dumps(task.case)
        if isinstance(outcome, str):
            failures[task.label, task.metric, case] = outcome
            shown = f"FAILED: {outcome}"
        else:
            for metric, values in outcome.items():
                samples[task.label, metric, case] += values
            shown = report.table(
                [
                    report.row(BENCHMARK, task.label, task.case, metric, values, UNITS[metric])
                    for metric, values in outcome.items()
                ]
            ).splitlines()[1]
        print(
            f"{time.monotonic() - began:6.1f} s  {task.metric} {case}  {shown}", file=sys.stderr, flush=True
        )
        if options.json is not None:
            report.write(rows_of(samples, failures), options.json, PACKAGES, others, facts=known)

    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        run(tasks, start, options.limit, record)
        if options.logs is not None:
            parts = [f"---- {log.stem}\n{log.read_text(errors='replace')}" for log in sorted(logs.iterdir())]
            options.logs.write_text("\n".join(parts))
    rows = rows_of(samples, failures)
    report.publish(rows, options.json, PACKAGES, others, facts=known)
    for why, figures in by_reason(failures).items():
        print(f"not run: {', '.join(figures)}: {why}")
    print("\n".join(verdicts(rows)))
    if any(label.partition("/")[0] in ("cuda_ipc", "process_vm", "tcp") for label, _, _ in failures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
