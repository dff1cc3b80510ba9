"""A subject's processes in gpu.py, as it starts, asks and ends them; nothing here waits for ever."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Failed(Exception):
    """No figures; the message says why.

    Attributes:
        fatal: nothing more is to be had from these processes.
    """

    def __init__(self, why: str, fatal: bool) -> None:
        super().__init__(why)
        self.fatal = fatal


class Measuring:
    """The processes of one subject.

    Args:
        subject: for messages.
        command: as `gpu_pair.main` takes it.
        variables: its environment.
        logs: the folder for what it prints besides answers.
    """

    def __init__(
        self, subject: str, command: Sequence[str], variables: Mapping[str, str], logs: Path
    ) -> None:
        self._subject = subject
        self._log = logs / f"{subject}.log"
        self._answers: queue.Queue[str] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command,
                    env=dict(variables),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        except OSError as failed:
            self._log.write_text(f"{failed}\n")
            self._answers.put("")
            return
        threading.Thread(target=self._read, daemon=True).start()

    def measure(self, task: Mapping[str, Any], limit_s: float) -> dict[str, list[float]]:
        """Raises Failed."""
        if limit_s <= 0:
            raise Failed("no time is left", fatal=True)
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its answer will be that it ended
            print(json.dumps(task), file=self._process.stdin, flush=True)
        figures: dict[str, list[float]] = self.answer(limit_s)["figures"]
        return figures

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            Failed: It says so, or ended, or says nothing for too long.
        """
        try:
            line = self._answers.get(timeout=max(0.0, limit_s))
        except queue.Empty:
            why = f"{self._subject} said nothing for {limit_s:.0f} s; its log ends: {self._tail()}"
            raise Failed(why, fatal=True) from None
        if not line:
            raise Failed(f"{self._subject} ended; its log ends: {self._tail()}", fatal=True)
        said: dict[str, Any] = json.loads(line)
        if "failed" in said:
            tail = self._tail()
            raise Failed(f"{said['failed']}" + (f"; its log ends: {tail}" if tail else ""), fatal=False)
        return said

    def close(self) -> None:
        """End them all, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-6:])[-900:]
