"""How quickly KV pages get from one process's memory into another's: our paths, the peers and the limits.

    python benchmarks/transfer.py [--json FILE] [--quick]

Every subject runs in a pair of new processes of its own, and all subjects take turns for several rounds, so
that whatever else the machine does meets all of them alike; each turn waits a while for the CPUs to be idle.
Peers come from the environment that `make peers` makes; one that isn't there is reported as not run.

Subjects: process_vm and tcp (this project), nixl (UCX's own choice) and nixl-tcp (UCX_TLS=tcp), mooncake-tcp.
Limits: memcpy (one thread copies the same pages within a process), process_vm_readv (two threads call it on
the same pages, nothing else) and socket (one connection, one sendall of it all). For NIXL descriptors are
prepared outside the measured time; for this project everything is inside.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import report

BENCHMARK = "transfer"
ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
PAGES = [16 << 10, 64 << 10, 256 << 10, 1 << 20]
OURS = ("process_vm", "tcp")
LIMITS = ("memcpy", "process_vm_readv", "socket")
PEERS = {
    "nixl": ("nixl._api", {}),
    "nixl-tcp": ("nixl._api", {"UCX_TLS": "tcp"}),
    "mooncake-tcp": ("mooncake.engine", {}),
}
TURN_S = 120

Samples = dict[tuple[str, int], list[float]]


def missing(module: str) -> str | None:
    """None if the peers' environment can import a module, else why not."""
    mend = "install it by: make peers"
    if not PEERS_PYTHON.exists():
        return f"not run: not installed; {mend}"
    asked = subprocess.run(
        [PEERS_PYTHON, "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    return f"not run: {asked.stderr.strip().splitlines()[-1]}; {mend}" if asked.returncode else None


def turn(subject: str, nbytes: int, iterations: int) -> list[dict[str, object]]:
    """One round of one subject: a record for each page size.

    Raises:
        RuntimeError: It failed; the message has the end of what it said.
    """
    module, environment = PEERS.get(subject, ("", {}))
    command = [
        PEERS_PYTHON if module else sys.executable,
        Path(__file__).with_name("transfer_pair.py"),
        subject,
    ]
    command += ["--nbytes", str(nbytes), "--iterations", str(iterations), "--pages", *map(str, PAGES)]
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
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"page_bytes"')]
    if len(lines) != len(PAGES):
        raise RuntimeError(" | ".join((ran.stdout + ran.stderr).strip().splitlines()[-3:]))
    return lines


def rows_of(
    subjects: list[str],
    seconds: Samples,
    latency: dict[str, list[float]],
    nbytes: int,
    absent: dict[str, str],
) -> list[report.Row]:
    """All samples as rows."""
    rows = []
    for subject in subjects:
        if subject in absent:
            rows.append(report.not_run(BENCHMARK, subject, "bandwidth", "GB/s", absent[subject]))
            continue
        for page in PAGES:
            rates = [nbytes / taken / 1e9 for taken in seconds[subject, page]]
            rows.append(report.row(BENCHMARK, subject, {"page_bytes": page}, "bandwidth", rates, "GB/s"))
    for subject, samples in latency.items():
        if samples:
            micro = [1e6 * sample for sample in samples]
            rows.append(report.row(BENCHMARK, subject, {"page_bytes": 4096}, "latency", micro, "us"))
    return rows


def verdicts(rows: list[report.Row]) -> list[str]:
    """The targets at 64 KiB beside what was measured."""
    rate = {
        row["subject"]: row["value"]
        for row in rows
        if row["metric"] == "bandwidth" and row["case"] == {"page_bytes": 64 << 10} and row["value"]
    }
    over_tcp = max((rate[peer] or 0 for peer in ("nixl-tcp", "mooncake-tcp") if peer in rate), default=None)
    pairs = [
        ("process_vm", "NIXL's default write", rate.get("nixl"), 2.0),
        ("process_vm", "memcpy", rate.get("memcpy"), 0.6),
        ("tcp", "the best peer over TCP", over_tcp, 2.0),
    ]
    return [
        f"{subject} is {(rate[subject] or 0) / than:.2f} x {name} at 64 KiB (target: at least {least})"
        for subject, name, than, least in pairs
        if than and subject in rate
    ]


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
    parser.add_argument("--only", nargs="+", metavar="SUBJECT", help="these subjects only")
    options = parser.parse_args()
    nbytes, rounds, iterations = (64 << 20, 1, 2) if options.quick else (256 << 20, options.rounds, 4)

    subjects = [name for name in (*OURS, *PEERS, *LIMITS) if not options.only or name in options.only]
    absent = {name: why for name, (module, _) in PEERS.items() if (why := missing(module))}
    seconds: Samples = defaultdict(list)
    latency: dict[str, list[float]] = defaultdict(list)
    busy: list[float] = []
    for round in range(rounds):
        # Another one goes first each time.
        for subject in subjects[round % len(subjects) :] + subjects[: round % len(subjects)]:
            if subject in absent:
                continue
            print(f"round {round + 1} of {rounds}: {subject}    ", end="\r", file=sys.stderr, flush=True)
            busy.append(report.settle(options.patience))
            try:
                records = turn(subject, nbytes, iterations)
            except RuntimeError as failed:
                absent[subject] = f"failed: {failed}"
                continue
            for record in records:
                seconds[subject, record["page_bytes"]] += record["seconds"]
            latency[subject] += records[0]["latency"]
    rows = rows_of(subjects, seconds, latency, nbytes, absent)
    report.publish(rows, options.json, ["mooncake-connector", "numpy"], peer_versions(), busy)
    print("\n".join(verdicts(rows)))
    if any(subject in absent for subject in OURS):
        raise SystemExit(1)


def peer_versions() -> dict[str, str]:
    """What is installed in the peers' environment."""
    places = [str(place) for place in PEERS_PYTHON.parent.parent.glob("lib/python*/site-packages")]
    return {found.metadata["Name"]: found.version for found in metadata.distributions(path=places)}


if __name__ == "__main__":
    main()
