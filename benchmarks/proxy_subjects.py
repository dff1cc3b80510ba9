"""The proxies that proxy.py compares, as processes on a core of their own; and the engines behind them."""

import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".venv-routers"
HOST = "127.0.0.1"
# The proxy has one core, clients and engines the other. Clients note when things come: they go first.
PROXY_CORE, OTHER_CORE = 1, 0
FIRST, SECOND = 3, 2


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, nor any client is given for a connection meanwhile."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 12_000):
        with suppress(OSError):
            socket.create_server((HOST, port)).close()
            ports.append(port)
        if len(ports) == count:
            break
    return ports


class Process:
    """A process on one core, ended with the context.

    Args:
        urgency: real-time priority, so that other work on the machine does not count; 0: none.
    """

    def __init__(self, command: Sequence[str | Path], core: int, urgency: int, log: Path) -> None:
        self._log = log.open("ab")
        self.popen = subprocess.Popen(
            [str(word) for word in command],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
            env=os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"},
            preexec_fn=lambda: _placed(core, urgency),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = self._all()
        self.popen.terminate()
        _, alive = psutil.wait_procs(found, 5)
        for process in alive:
            process.kill()
        self._log.close()

    def cpu(self) -> float:
        """CPU seconds so far, of all its threads and children."""
        times = [process.cpu_times() for process in self._all()]
        return sum(each.user + each.system for each in times)

    def resident(self) -> int:
        """Bytes of memory."""
        return sum(process.memory_info().rss for process in self._all())

    def _all(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.popen.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _placed(core: int, urgency: int) -> None:
    os.sched_setaffinity(0, {core})
    if urgency:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(urgency))


class Engines:
    """The ports of the engines.

    Args:
        pairs: how many prefill engines, and as many decode engines.
    """

    def __init__(self, pairs: int) -> None:
        ports = free_ports(2 * pairs)
        self.prefill, self.decode = ports[:pairs], ports[pairs:]

    def command(self, prompt: float, step: float, handoff: float) -> list[str]:
        """Runs all of them in one process; seconds."""
        words = [sys.executable, str(HERE / "sim_engine.py"), "--prefill", *map(str, self.prefill)]
        words += ["--decode", *map(str, self.decode), "--prefill-seconds", str(prompt)]
        return [*words, "--step-seconds", str(step), "--handoff-seconds", str(handoff)]


Command = Callable[[int, Engines], list[str]]


def _urls(ports: Sequence[int]) -> list[str]:
    return [f"http://{HOST}:{port}" for port in ports]


def _ours(port: int, engines: Engines, *more: str) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "mooncake_connector",
        "proxy",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    return [*words, "--prefill", *_urls(engines.prefill), "--decode", *_urls(engines.decode), *more]


def _relay(port: int, engines: Engines) -> list[str]:
    words = [sys.executable, str(HERE / "aiohttp_relay.py"), "--port", str(port)]
    return [*words, "--prefill", *_urls(engines.prefill), "--decode", *_urls(engines.decode)]


def _router(port: int, engines: Engines, bootstrap: bool) -> list[str]:
    words = ["--host", HOST, "--port", str(port), "--prometheus-port", str(free_ports(1)[0])]
    for url, at in zip(_urls(engines.prefill), engines.prefill, strict=True):
        words += ["--prefill", url, *([str(at)] if bootstrap else [])]
    for url in _urls(engines.decode):
        words += ["--decode", url]
    return words


def _vllm_router(port: int, engines: Engines, connector: str) -> list[str]:
    words = [str(ENVIRONMENT / "bin/vllm-router"), "--vllm-pd-disaggregation", "--kv-connector", connector]
    return [*words, "--log-level", "warning", *_router(port, engines, connector == "mooncake")]


def _sglang_router(port: int, engines: Engines) -> list[str]:
    words = [str(ENVIRONMENT / "bin/python"), "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    return [*words, "--log-level", "warn", *_router(port, engines, True)]


# Each with its default settings, but for what it logs.
SUBJECTS: dict[str, Command] = {
    "ours": _ours,
    "aiohttp-relay": _relay,
    "vllm-router (nixl)": lambda port, engines: _vllm_router(port, engines, "nixl"),
    "vllm-router (mooncake)": lambda port, engines: _vllm_router(port, engines, "mooncake"),
    "sglang-router": _sglang_router,
}
# Streams that give a token in half a second break what the conductor promises: it would reject most of them.
SLOW_STREAMS = SUBJECTS | {"ours": lambda port, engines: _ours(port, engines, "--admission", "none")}
NONE = "no proxy"


def wait_ready(port: int, within: float = 60.0) -> None:
    """Until it answers a completion with both kinds of engines up.

    Raises:
        TimeoutError: it does not.
    """
    deadline = time.monotonic() + within
    body = b'{"model":"sim","prompt":"hello","max_tokens":1}'
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    said = ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError as error:
            said = str(error)
        time.sleep(0.2)
    raise TimeoutError(f"port {port} does not answer: {said}")


def versions() -> dict[str, str]:
    """Of the peers."""
    paths = [str(path) for path in ENVIRONMENT.glob("lib/python*/site-packages")]
    names = ("vllm-router", "sglang-router")
    return {found.name: found.version for found in metadata.distributions(path=paths) if found.name in names}
