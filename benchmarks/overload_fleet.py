"""The engines and proxies of `overload.py`: each side has its part of the CPUs, as it would have machines."""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from mooncake_connector.demo.models import make, server_args
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    LocalProcess,
    LocalProxy,
    PreloadedVllm,
    push_config,
    start_all,
)

NICE = 14


def make_way(process: LocalProcess) -> None:
    """Lower the priority of an engine and all that it started, also where nice counts in a session only."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PGRP, process.pid, own + NICE)
    group = Path(f"/proc/{process.pid}/autogroup")
    if group.exists():
        nice = int(Path("/proc/self/autogroup").read_text().split()[-1])
        group.write_text(str(min(19, nice + NICE)))
        time.sleep(0.2)  # the kernel takes it now and then only


def confine(process: LocalProcess, cores: Sequence[int]) -> None:
    """Let an engine and all that it started run on these CPUs only."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The process group is the third field after the name, which is in brackets.
            if int(stat.read_text().rpartition(")")[2].split()[2]) == process.pid:
                for task in (stat.parent / "task").iterdir():
                    os.sched_setaffinity(int(task.name), cores)


class Fleet:
    """Engines that run, and the proxies before them."""

    def __init__(self, logs: Path, preload: PreloadedVllm) -> None:
        model = make("tiny-llama")

        def engine(name: str, role: str) -> LocalEngine:
            return LocalEngine(
                model,
                kv_config=push_config("producer" if role == "prefill" else "consumer"),
                args=server_args("tiny-llama"),
                name=name,
                logs=logs,
                preload=preload,
            )

        self.prefill = [engine(f"prefill-{i}", "prefill") for i in range(2)]
        self.decode = [engine(f"decode-{i}", "decode") for i in range(2)]
        self.logs = logs

    def start(self) -> None:
        """Start the engines, lower their priority, and divide the CPUs between the two sides."""
        start_all([*self.prefill, *self.decode], timeout=240)
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        for engines, own in ((self.prefill, cores[:half]), (self.decode, cores[-half:])):
            for engine in engines:
                make_way(engine)
                confine(engine, own)

    def proxy(self, name: str, *args: str) -> LocalProxy:
        """A further proxy, running."""
        urls = [engine.url for engine in self.prefill], [engine.url for engine in self.decode]
        proxy = LocalProxy(*urls, args=args, name=name, logs=self.logs)
        start_all([proxy], timeout=60)
        return proxy
