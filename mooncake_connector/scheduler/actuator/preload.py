"""Engines that start in a third of the time: vLLM is imported once and forked, for tests and benchmarks.

A vLLM server imports torch and vLLM three times over (interface, engine core, worker); on two cores that is
most of a minute for each engine. `PreloadedVllm` holds one process that has imported it all and forks it for
every server, and has the servers fork their own parts. What runs after the imports is vLLM's own server, but
for two constants: see `SPIN_SECONDS` and `RECHECK_MS`.
"""

import ctypes
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from mooncake_connector.errors import EngineStartError

_PR_SET_CHILD_SUBREAPER = 36
SPIN_SECONDS = 0.001
"""How long a worker polls for its next step before it sleeps. vLLM's own 1 s assumes a core for each worker;
with more engines than cores every worker that spins takes its time from an engine that has work."""
RECHECK_MS = 50
"""How long it sleeps before it looks by itself. vLLM's message that wakes it can get lost, and then it looks
after 5 s; who spins for a second hardly meets that."""
_READY = b"ready\n"
_GONE = "the process that preloads vLLM is gone; its messages are above"


class PreloadedVllm:
    """A process that has imported vLLM, ready to be forked into servers; a context manager.

    The servers become children of the process that made this object (it becomes their subreaper).
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        """Begin importing; returns at once. `env` holds for the imports; each server has its own later on."""
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise EngineStartError("this kernel has no child subreapers; start engines without preloading")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._ready = False

    def ready(self, wait: float = 0.0) -> bool:
        """Whether the imports are done; waits for that for at most `wait` seconds.

        Raises:
            EngineStartError: the preloading process is gone.
        """
        assert self._process.stdout is not None
        if not self._ready and select.select([self._process.stdout], [], [], wait)[0]:
            if self._process.stdout.readline() != _READY:
                raise EngineStartError(_GONE)
            self._ready = True
        return self._ready

    def spawn(self, module: str, args: Sequence[str], env: Mapping[str, str], log: Path) -> int:
        """Run ``python -m module args`` in a fresh fork, a session of its own; returns its process id.

        Waits for the imports if they are still going on.

        Raises:
            EngineStartError: the preloading process is gone.
        """
        while not self.ready(wait=60.0):
            pass
        request = {"module": module, "args": list(args), "env": dict(env), "log": str(log)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise EngineStartError(_GONE) from error

    def close(self) -> None:
        """End the preloading process; servers forked from it go on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Import vLLM, then fork one server for each line on stdin; process ids go to stdout."""
    replies = os.dup(1)
    os.set_inheritable(replies, False)
    os.dup2(2, 1)
    _import_vllm()
    os.write(replies, _READY)
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    while line := requests.readline():
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        middle = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == middle:  # until then the asker can't wait for this process
            time.sleep(0.001)
        requests.close()
        _become(json.loads(line), replies)


def _import_vllm() -> None:
    import gc
    import importlib
    import multiprocessing

    from vllm.utils import system_utils

    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SpinCondition.__init__.__defaults__ = (SPIN_SECONDS,)
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = RECHECK_MS
    for name in (
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.attention.backends.cpu_attn",
        "vllm.v1.attention.backends.mla.cpu_mla",
        "vllm.model_executor.models.llama",
        "torch.distributed.distributed_c10d",
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _become(request: dict[str, object], replies: int) -> None:
    """Turn this fork into the requested server; does not return."""
    import runpy

    os.setsid()
    os.write(replies, f"{os.getpid()}\n".encode())
    os.close(replies)
    log = os.open(str(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    env, args, module = request["env"], request["args"], str(request["module"])
    assert isinstance(env, dict)
    assert isinstance(args, list)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [
        path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path
    ]
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
