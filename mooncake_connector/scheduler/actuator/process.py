"""A server as a child process of this one: its start, its health, its log, and its end without leftovers."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from mooncake_connector.errors import EngineStartError
from mooncake_connector.scheduler.actuator.base import Progress
from mooncake_connector.scheduler.actuator.preload import PreloadedVllm

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TAIL_LINES = 30

# Ends the process group argv[1] when this process goes away without a word, as after kill -9.
_GUARD = "import os,sys\nif not os.read(0, 1):\n os.killpg(int(sys.argv[1]), 9)"


class LocalProcess:
    """``python -m module args`` as a server, in a session of its own, with a log file; a context manager.

    The server and everything it started also end when this process dies, however it dies.

    Attributes:
        name: for messages and for the log's file name.
        url: where it answers, without a trailing slash.
        log: the file that has its output.
    """

    health_path = "/health"

    def __init__(
        self,
        module: str,
        args: Sequence[str],
        *,
        name: str,
        port: int,
        env: Mapping[str, str],
        logs: Path | None = None,
        preload: PreloadedVllm | None = None,
    ) -> None:
        self.module = module
        self.args = list(args)
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.env = dict(env)
        folder = logs or Path(tempfile.mkdtemp(prefix="mooncake-"))
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self._preload = preload
        self._pid: int | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    @property
    def pid(self) -> int:
        """Process id of the server, and id of its process group."""
        if self._pid is None:
            raise EngineStartError(f"{self.name} is not running; call start() first")
        return self._pid

    @property
    def command(self) -> list[str]:
        """What one would type to start the same."""
        return [sys.executable, "-m", self.module, *self.args]

    def start(self) -> None:
        """Begin starting; returns at once. A start after `stop` or `kill` reuses the port and the log."""
        self.stop()
        if self._preload is not None:
            self._pid = self._preload.spawn(self.module, self.args, self.env, self.log)
        else:
            self._pid = os.posix_spawn(
                sys.executable,
                self.command,
                self.env,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
            )
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self._pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._started = time.monotonic()

    def wait_ready(self, timeout: float = 180.0, on_progress: Progress | None = None) -> None:
        """Block until the server answers its health check, for at most `timeout` seconds since its start.

        Raises:
            EngineStartError: it ended, or `timeout` passed; the message has the end of its log.
        """
        while True:
            took = time.monotonic() - self._started
            if not self.alive():
                raise EngineStartError(f"{self.name} ended while starting. {self._log_end()}")
            if self.healthy():
                return
            if took > timeout:
                raise EngineStartError(f"{self.name} was not ready after {timeout:.0f} s. {self._log_end()}")
            if on_progress is not None:
                on_progress(took, self.last_line())
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Whether it answers its health check with 200 within two seconds."""
        try:
            with urllib.request.urlopen(self.url + self.health_path, timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def alive(self) -> bool:
        """Whether the server's process is there (a stopped one is); its health is another question."""
        if self._pid is None:
            return False
        # WNOWAIT leaves a dead leader unreaped: its id stays ours, so a later signal can't hit a stranger.
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def signal(self, signum: int) -> None:
        """Send `signum` to the server and to everything it started, such as SIGSTOP and SIGCONT."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def kill(self) -> None:
        """End it at once as a crash would (SIGKILL to the whole group); `start` brings it back."""
        self.stop(grace=0.0)

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the server, if it is there, and return at once."""
        if self.alive():
            self.signal(signal.SIGCONT)
            os.kill(self.pid, signal.SIGTERM)

    def stop(self, grace: float = 10.0) -> None:
        """End it and all it started: SIGTERM, and SIGKILL after `grace` seconds. Safe to call twice."""
        if self._pid is None:
            return
        if grace > 0:
            self.ask_to_stop()
            deadline = time.monotonic() + grace
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.02)
        self.signal(signal.SIGKILL)
        # With the leader, whatever of its group became our child (see PreloadedVllm).
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self._pid, 0)
        self._pid = None
        guard, self._guard = self._guard, None
        if guard is not None and guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                guard.stdin.write(b".")
                guard.stdin.close()
            guard.wait()

    def log_text(self) -> str:
        """Everything it wrote so far, without colours."""
        try:
            return _ANSI.sub("", self.log.read_text(errors="replace"))
        except FileNotFoundError:
            return ""

    def last_line(self) -> str:
        """The latest line of its log, without colours; empty before the first."""
        lines = self.log_text().rstrip().splitlines()
        return lines[-1].strip() if lines else ""

    def _log_end(self) -> str:
        tail = "\n".join(self.log_text().splitlines()[-_TAIL_LINES:])
        return f"Its log, {self.log}, ends:\n{tail}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_all(
    processes: Sequence[LocalProcess], timeout: float = 240.0, on_progress: Progress | None = None
) -> None:
    """Start `processes` side by side and wait for all of them; if one fails all of them are stopped.

    Raises:
        EngineStartError: the first failure.
    """
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.wait_ready(timeout, on_progress)
    except BaseException:
        stop_all(processes)
        raise


def stop_all(processes: Sequence[LocalProcess], grace: float = 10.0) -> None:
    """Stop `processes`, asking all of them before waiting for any."""
    for process in processes:
        process.ask_to_stop()
    for process in processes:
        process.stop(grace)
