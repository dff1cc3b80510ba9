"""Engines and proxies as child processes of this one, on this machine."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from mooncake_connector.errors import EngineStartError
from mooncake_connector.scheduler.actuator.base import Progress, Role

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TAIL_LINES = 30

# Ends the process group argv[1] when this process's parent goes away without a word, as after kill -9.
_GUARD = "import os,sys\nif not os.read(0, 1):\n os.killpg(int(sys.argv[1]), 9)"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def push_config(role: Role = "both", extra: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The value of vLLM's ``--kv-transfer-config`` that loads this project's connector.

    Args:
        role: producer prefills, consumer decodes, both does either.
        extra: the connector's own settings (``kv_connector_extra_config``).
        fields: further fields of vLLM's KVTransferConfig, such as ``kv_load_failure_policy="fail"``.
    """
    return {
        "kv_connector": "MooncakePushConnector",
        "kv_connector_module_path": "mooncake_connector.kv_transfer.vllm",
        "kv_role": f"kv_{role}",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(extra or {}),
        **fields,
    }


class LocalProcess:
    """A server in a process group of its own, with a log file; a context manager that starts and stops it.

    The group also ends when this process dies, however it dies.

    Attributes:
        name: for messages and for the log's file name.
        url: where it answers, without a trailing slash.
        log: the file that has its output.
    """

    health_path = "/health"

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        port: int,
        env: Mapping[str, str],
        logs: Path | None = None,
    ) -> None:
        self.command = list(command)
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.env = dict(env)
        folder = logs or Path(tempfile.mkdtemp(prefix="mooncake-"))
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    @property
    def pid(self) -> int:
        """Process id of the server, and id of its process group."""
        if self._process is None:
            raise EngineStartError(f"{self.name} is not running; call start() first")
        return self._process.pid

    def start(self) -> None:
        """Begin starting; returns at once. A second start after `stop` or `kill` reuses the port and the log."""
        if self._process is not None:
            self.stop()
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self._process.pid)],
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
        """Whether the server's process is there (a stopped one is)."""
        if self._process is None:
            return False
        # WNOWAIT leaves a dead leader unreaped: its id then stays ours, and with it the right to signal the group.
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is None

    def signal(self, signum: int) -> None:
        """Send `signum` to the server and to everything it started, such as SIGSTOP and SIGCONT."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def kill(self) -> None:
        """End it at once as a crash would (SIGKILL to the whole group); `start` brings it back."""
        self._end(grace=0.0)

    def stop(self, grace: float = 10.0) -> None:
        """End it and everything it started: SIGTERM, and SIGKILL after `grace` seconds. Safe to call twice."""
        self._end(grace)

    def _end(self, grace: float) -> None:
        process, guard = self._process, self._guard
        if process is None:
            return
        if grace > 0 and self.alive():
            self.signal(signal.SIGCONT)
            os.kill(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.02)
        self.signal(signal.SIGKILL)
        process.wait()
        self._process = self._guard = None
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


class LocalEngine(LocalProcess):
    """A real vLLM server with the OpenAI interface.

    Args:
        model: a folder, or a name that vLLM can resolve.
        role: loads this project's connector in that role; None loads no connector.
        extra: the connector's own settings (``kv_connector_extra_config``).
        kv_config: a whole ``--kv-transfer-config`` instead, for another connector; excludes `role` and `extra`.
        args: further arguments of vLLM's server, such as ``("--dtype", "float32")``.
        served_name: the model's name in requests.
        port: 0 takes a free one.
        env: additions to the environment; they win over everything else.
        logs: folder of the log file, by default a fresh temporary one.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        role: Role | None = None,
        extra: Mapping[str, Any] | None = None,
        kv_config: Mapping[str, Any] | None = None,
        args: Sequence[str] = (),
        served_name: str = "m",
        name: str = "engine",
        port: int = 0,
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
    ) -> None:
        port = port or free_port()
        if kv_config is None and role is not None:
            kv_config = push_config(role, extra)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", served_name]
        if kv_config is not None:
            command += ["--kv-transfer-config", json.dumps(kv_config)]
        self.model = served_name
        super().__init__(
            [*command, *args], name=name, port=port, env=engine_environment(model, env), logs=logs
        )


class LocalProxy(LocalProcess):
    """``mooncake-connector proxy`` before the given engines' URLs; ready once it can serve through both pools."""

    def __init__(
        self,
        prefill: Iterable[str],
        decode: Iterable[str],
        *,
        args: Sequence[str] = (),
        name: str = "proxy",
        port: int = 0,
        env: Mapping[str, str] | None = None,
        logs: Path | None = None,
    ) -> None:
        port = port or free_port()
        command = [
            sys.executable,
            "-m",
            "mooncake_connector",
            "proxy",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        for option, urls in (("--prefill", prefill), ("--decode", decode)):
            for url in urls:
                command += [option, url]
        super().__init__(
            [*command, *args], name=name, port=port, env={**os.environ, **(env or {})}, logs=logs
        )


def engine_environment(model: str | Path, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with what several CPU engines on one machine need; what is set already stays."""
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    return {**defaults, **os.environ, **(env or {})}


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


def stop_all(processes: Iterable[LocalProcess], grace: float = 10.0) -> None:
    """Stop `processes`, last started first, asking all of them before waiting for any."""
    ordered = list(processes)[::-1]
    for process in ordered:
        if process.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
    for process in ordered:
        process.stop(grace)
