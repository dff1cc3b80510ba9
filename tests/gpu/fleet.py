"""vLLM engines for the GPU tests: many small ones, several on each GPU, all started at once and shared."""

import contextlib
import importlib.util
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

from mooncake_connector.errors import EngineStartError
from mooncake_connector.scheduler.actuator.base import Role
from mooncake_connector.scheduler.actuator.local import LocalEngine, LocalProxy
from tests.gpu.models import MAX_TOKENS, deepseek, llama

START_S = 300.0
"""Of a dozen engines at once on a machine that has just been started."""

FIRST_PORT, PORTS = 4000, 50
"""Each engine has so many ports of its own: below `free_port`'s range, and what the system hands out."""

LOG_LINES = 15
_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
_ERROR = re.compile(r"\w+(Error|Exception): .{1,300}")
MODELS = {"llama": llama, "mla": deepseek}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # NVLink multicast can put a shared host's GPUs out of service.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
# Graphs without torch.compile: the quickest start that has them.
GRAPHS: tuple[str, ...] = ("--compilation-config", '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}')
GRAPHS += ("--cudagraph-capture-sizes", "1", "2", "4", "8")
CHUNKS = ("--max-num-batched-tokens", "512")  # prompts of 3,000 tokens take six steps
FP8 = ("--kv-cache-dtype", "fp8")


@dataclass(frozen=True)
class Shape:
    """One engine.

    Attributes:
        role: None is one without a connector, to compare with.
        gpus: tensor-parallel over these.
        eager: no CUDA graphs.
        block: tokens of a block.
        dtype: of the model. FlashAttention reads KV in fp8 for bfloat16 only.
    """

    role: Role | None
    gpus: tuple[int, ...]
    model: str = "llama"
    args: tuple[str, ...] = ()
    eager: bool = True
    block: int = 16
    dtype: str = "float16"


SHAPES = {
    "one": Shape(None, (0,)),
    "p": Shape("producer", (0,), args=CHUNKS),
    "d": Shape("consumer", (1,)),
    "d graphs": Shape("consumer", (1,), args=GRAPHS, eager=False),
    "d beside p": Shape("consumer", (0,)),
    "d block 32": Shape("consumer", (1,), block=32),
    "p block 32": Shape("producer", (0,), block=32, args=CHUNKS),
    "p tp2": Shape("producer", (0, 1), args=CHUNKS),
    "d tp2": Shape("consumer", (0, 1)),
    "p tp4": Shape("producer", (0, 1, 2, 3), args=CHUNKS),
    "d tp4": Shape("consumer", (0, 1, 2, 3)),
    "one mla": Shape(None, (0,), "mla"),
    "p mla": Shape("producer", (0,), "mla", args=CHUNKS),
    "d mla": Shape("consumer", (1,), "mla"),
    "one fp8": Shape(None, (1,), args=FP8, dtype="bfloat16"),
    "p fp8": Shape("producer", (0,), args=(*FP8, *CHUNKS), dtype="bfloat16"),
    "d fp8": Shape("consumer", (1,), args=FP8, dtype="bfloat16"),
}


def own_ports(count: int) -> list[int]:
    """The first port of each of `count` blocks of `PORTS`; nobody listens on the first two of a block.

    vLLM finds a free port, lets it go, and has another process bind it much later. Engines that start side
    by side find the same one. With VLLM_PORT each looks from its own port upwards.
    """
    found: list[int] = []
    for first in range(FIRST_PORT, 10_000, PORTS):
        if len(found) == count:
            return found
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in (first, first + 1):
                stack.enter_context(socket.socket()).bind(("", port))
            found.append(first)
    raise RuntimeError(f"no {count} blocks of ports are free between {FIRST_PORT} and 10000")


def vllm_here() -> str:
    """Why no vLLM engine can be started in this environment; empty if one can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not importable here: put it on PYTHONPATH"
    return ""


@dataclass
class Fleet:
    """The engines of one test run.

    Args:
        names: of `SHAPES`.
        folder: for models and logs; MOONCAKE_TEST_LOGS names another one for the logs.
    """

    names: list[str]
    folder: Path
    _engines: dict[str, LocalEngine] = field(default_factory=dict)
    _proxies: dict[tuple[str, str], LocalProxy] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)
    _again: set[str] = field(default_factory=set)
    _starter: threading.Thread = field(default_factory=threading.Thread)

    @property
    def _logs(self) -> Path:
        return Path(os.environ.get("MOONCAKE_TEST_LOGS") or self.folder / "logs").absolute()

    def start(self) -> None:
        """Begin to start all of them; returns at once."""
        models = {SHAPES[name].model for name in self.names}
        for name, port in zip(self.names, own_ports(len(self.names)), strict=True):
            self._engines[name] = self._made(name, self.folder / SHAPES[name].model, port)

        def begin() -> None:
            try:
                for model in models:
                    MODELS[model](self.folder / model)
                for engine in self._engines.values():
                    engine.start()
            except Exception as error:
                self._failed = {name: f"{type(error).__name__}: {error}" for name in self.names}

        self._starter = threading.Thread(target=begin, daemon=True)
        self._starter.start()

    def _made(self, name: str, model: Path, port: int) -> LocalEngine:
        shape = SHAPES[name]
        args = ["--dtype", shape.dtype, "--max-model-len", str(MAX_TOKENS), "--block-size", str(shape.block)]
        args += ["--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.04"]
        args += ["--max-num-seqs", "32", "--tensor-parallel-size", str(len(shape.gpus))]
        args += ["--disable-custom-all-reduce", *(["--enforce-eager"] if shape.eager else []), *shape.args]
        return LocalEngine(
            model,
            role=shape.role,
            extra={"path": "cuda_ipc"},
            args=args,
            name=name.replace(" ", "-"),
            port=port,
            env={
                **ENVIRONMENT,
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, shape.gpus)),
                "VLLM_PORT": str(port + 1),
            },
            logs=self._logs,
        )

    def __getitem__(self, name: str) -> LocalEngine:
        """An engine that is ready.

        Raises:
            AssertionError: It did not start; the message has the end of its log. The others go on.
        """
        self._starter.join(120)
        if name in self._failed:
            raise AssertionError(f"engine {name!r} did not start: {self._failed[name]}")
        engine = self._engines[name]
        try:
            self._wait_ready(name, engine)
        except EngineStartError as failed:
            lines = engine.log_text().splitlines()
            self._failed[name] = f"{str(failed).splitlines()[0]} (the first test that needed it says more)"
            errors = list(dict.fromkeys(found[0] for line in lines if (found := _ERROR.search(line))))[:8]
            told = "\n".join([self._failed[name], "errors:", *errors, "the end:", *lines[-LOG_LINES:]])
            raise AssertionError(f"engine {name!r} did not start: {told}") from None
        return engine

    def _wait_ready(self, name: str, engine: LocalEngine) -> None:
        """Once more from the beginning if a stranger took one of its ports."""
        try:
            engine.wait_ready(START_S)
        except EngineStartError:
            if name in self._again or engine.alive() or not _TAKEN.search(engine.log_text()):
                raise
            self._again.add(name)
            print(f"engine {name!r} found a port taken and is started once more")
            engine.start()
            engine.wait_ready(START_S)

    def proxy(self, prefill: str, decode: str) -> LocalProxy:
        """A proxy before two engines, ready."""
        if (prefill, decode) not in self._proxies:
            made = LocalProxy(
                [self[prefill].url],
                [self[decode].url],
                args=("--admission", "none"),
                name=f"proxy-{prefill}-{decode}".replace(" ", "-"),
                logs=self._logs,
            )
            self._proxies[prefill, decode] = made
            made.start()
            made.wait_ready(60)
        return self._proxies[prefill, decode]

    def close(self) -> None:
        if self._starter.ident is not None:
            self._starter.join(120)
        for process in [*self._proxies.values(), *self._engines.values()]:
            process.kill()  # nothing of theirs is worth the seconds of a GPU that a goodbye takes
