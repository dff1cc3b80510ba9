"""How quickly bytes get from one process's memory into another's: our paths, the peers and the limits.

    python benchmarks/transfer.py [--json FILE] [--quick] [--only SUBJECT ...]

Every subject runs in a pair of new processes of its own, and all subjects take turns for several rounds, so
that whatever else the machine does meets all of them alike; each turn waits a while for the CPUs to be idle.
Peers come from the environment that `make peers` makes; one that isn't there is reported as not run.
`transfer_pair.py` says what is measured and how.

Subjects: process_vm and tcp (this project, as `TransferEngine` gives them), with /1 to /4 tcp connections
(else 2), with /checksum and, for messages, /urgent (not aggregated); nixl (UCX's own choice) and nixl-tcp
(UCX_TLS=tcp), mooncake-tcp. Limits: memcpy (one thread copies the same pages within a process),
process_vm_readv (two threads call it on the same pages, nothing else) and socket (one connection, one sendall
of it all).
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import report
from transfer_pair import MESSAGE_BYTES, UNITS, WRITE_BYTES

BENCHMARK = "transfer"
ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
PAGES = [16 << 10, 64 << 10, 256 << 10, 1 << 20]
PAGE = 64 << 10
"""What the targets are about."""

OURS = ("process_vm", "tcp")
VARIANTS = ("tcp/1", "tcp/3", "tcp/4", "process_vm/checksum", "tcp/checksum")
LIMITS = ("memcpy", "process_vm_readv", "socket")
PEERS = {
    "nixl": ("nixl._api", {}),
    "nixl-tcp": ("nixl._api", {"UCX_TLS": "tcp"}),
    "mooncake-tcp": ("mooncake.engine", {}),
}
ALL = (*OURS, *VARIANTS, *PEERS, *LIMITS)
RDMA = (
    "not run here: a NIC in software tells nothing of speed. Correctness, in a guest with two of them: "
    "make test LAYERS=rdma"
)
TURN_S = 180

Figure = tuple[str, str, str]
"""Subject, metric, case as JSON."""


def missing(module: str) -> str | None:
    """None if the peers' environment can import a module, else why not."""
    mend = "install it by: make peers"
    if not PEERS_PYTHON.exists():
        return f"not run: not installed; {mend}"
    asked = subprocess.run(
        [PEERS_PYTHON, "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    return f"not run: {asked.stderr.strip().splitlines()[-1]}; {mend}" if asked.returncode else None


def turn(subject: str, quick: bool) -> list[dict[str, Any]]:
    """One round of one subject: records of `transfer_pair.py`.

    Raises:
        RuntimeError: It failed; the message has the end of what it said.
    """
    module, environment = PEERS.get(subject, ("", {}))
    python = PEERS_PYTHON if module else sys.executable
    command = [python, Path(__file__).with_name("transfer_pair.py"), subject]
    command += ["--nbytes", str((64 if quick else 256) << 20), "--iterations", "2" if quick else "4"]
    command += ["--pages", *map(str, [PAGE] if subject in VARIANTS else PAGES)]
    command += ["--latency", "200" if quick else "1000"]
    if subject in OURS:
        command += ["--messages", "2" if quick else "8"]
    try:
        ran = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=TURN_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"not done within {TURN_S} s") from late
    if ran.returncode:
        raise RuntimeError(" | ".join((ran.stdout + ran.stderr).strip().splitlines()[-3:]))
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"subject"')]


def rows_of(samples: dict[Figure, list[float]], absent: dict[str, str]) -> list[report.Row]:
    """All samples as rows."""
    rows = [
        report.row(BENCHMARK, subject, json.loads(case), metric, values, UNITS[metric])
        for (subject, metric, case), values in samples.items()
        if subject.removesuffix("/urgent") not in absent
    ]
    rows.sort(key=lambda row: list(UNITS).index(row["metric"]))
    absent = {**absent, "rdma": RDMA}
    return rows + [report.not_run(BENCHMARK, name, "bandwidth", "GB/s", why) for name, why in absent.items()]


def verdicts(rows: list[report.Row]) -> list[str]:
    """The targets beside what was measured."""

    def of(subject: str, metric: str = "bandwidth", **case: object) -> float | None:
        wanted = (subject, metric, case or {"page_bytes": PAGE})
        found = [row["value"] for row in rows if (row["subject"], row["metric"], row["case"]) == wanted]
        return found[0] if found else None

    lines = []

    def at_least(what: str, value: float | None, than: float | None, times: float) -> None:
        if value and than:
            met = "met" if value >= times * than else "MISSED"
            lines.append(f"{met}: {what}: {value / than:.2f} (target: at least {times:g})")

    def at_most(what: str, value: float | None, limit: float | None) -> None:
        if value and limit:
            met = "met" if value <= limit else "MISSED"
            lines.append(f"{met}: {what}: {value:.1f} us (target: at most {limit:.1f})")

    over_tcp = max((of(peer) or 0.0 for peer in ("nixl-tcp", "mooncake-tcp")), default=0.0)
    at_least("process_vm / NIXL's default write, 64 KiB", of("process_vm"), of("nixl"), 2.0)
    at_least("process_vm / memcpy, 64 KiB", of("process_vm"), of("memcpy"), 0.6)
    at_least("tcp / the best peer over TCP, 64 KiB", of("tcp"), over_tcp, 2.0)
    at_least("tcp / a bare socket, 64 KiB", of("tcp"), of("socket"), 0.9)
    at_most("4 KiB by process_vm", of("process_vm", "latency", page_bytes=WRITE_BYTES), 20.0)
    mooncake = of("mooncake-tcp", "latency", page_bytes=WRITE_BYTES)
    at_most("4 KiB by tcp, limit: Mooncake's", of("tcp", "latency", page_bytes=WRITE_BYTES), mooncake)
    for subject in OURS:
        for nbytes in MESSAGE_BYTES:
            on, off = (of(name, "messages", message_bytes=nbytes) for name in (subject, f"{subject}/urgent"))
            at_least(f"{subject}, messages of {nbytes >> 10} KiB, aggregation on / off", on, off, 3.0)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="64 MiB and one round: does it run at all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for idle CPUs, per turn"
    )
    parser.add_argument("--only", nargs="+", metavar="SUBJECT", choices=ALL, help="these subjects only")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds

    subjects = [name for name in ALL if not options.only or name in options.only]
    absent = {
        name: why
        for name, (module, _) in PEERS.items()
        if name in subjects and (why := missing(module)) is not None
    }
    samples: dict[Figure, list[float]] = defaultdict(list)
    busy: list[float] = []
    for round in range(rounds):
        # Another one goes first each time.
        for subject in subjects[round % len(subjects) :] + subjects[: round % len(subjects)]:
            if subject in absent:
                continue
            print(f"round {round + 1} of {rounds}: {subject}    ", end="\r", file=sys.stderr, flush=True)
            busy.append(report.settle(options.patience))
            try:
                records = turn(subject, options.quick)
            except RuntimeError as failed:
                absent[subject] = f"failed: {failed}"
                continue
            for record in records:
                figure = record["subject"], record["metric"], json.dumps(record["case"])
                samples[figure] += record["samples"]
    rows = rows_of(samples, absent)
    report.publish(rows, options.json, ["mooncake-connector", "numpy"], peer_versions(), busy)
    print("\n".join(verdicts(rows)))
    if any(subject in absent for subject in (*OURS, *VARIANTS)):
        raise SystemExit(1)


def peer_versions() -> dict[str, str]:
    """What is installed in the peers' environment."""
    places = [str(place) for place in PEERS_PYTHON.parent.parent.glob("lib/python*/site-packages")]
    return {found.metadata["Name"]: found.version for found in metadata.distributions(path=places)}


if __name__ == "__main__":
    main()
