"""The kernel that copies scattered pages with few multiprocessors; compiled when it is first needed."""

import ctypes
import functools
import importlib.resources
import threading
from typing import Any

import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import U64Array
from mooncake_connector.kv_transfer.plan import Tile
from mooncake_connector.kv_transfer.transport.cuda.driver import Context, bindings, call

THREADS = 1024
"""Of a block; it fills a multiprocessor, so blocks and multiprocessors are one number."""

MAX_BLOCKS = 64

SHARE = 16384
"""Bytes that a warp takes at a time, at most."""

_u64, _u32, _i64 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int64


class GatePass(ctypes.Structure):
    """What a launch shows at the gate of its target; all zero where there is none. See scatter.cu."""

    _fields_ = [(name, _u64) for name in ("closed", "grant", "key", "entered", "ticket", "refused")]


class _Tiles(ctypes.Structure):
    _fields_ = [(name, _u32) for name in ("n2", "run")] + [
        (name, _i64) for name in ("src1", "src2", "dst1", "dst2")
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, _u64) for name in ("src", "dst", "end", "next", "n", "total", "share")),
        ("gate", GatePass),
        ("tiles", _Tiles),
    ]


class Scatter:
    """Launches the kernel on one device.

    Args:
        context: of the device that reads.

    Raises:
        TransportError: It can't be compiled or loaded here.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        with context:
            self._module = call("cuModuleLoadData", _compiled(_architecture(context)))
            names = [f"{kind}{width}" for kind in ("ranges", "tiles") for width in (16, 4, 1)]
            self._functions = {
                name: call("cuModuleGetFunction", self._module, name.encode()) for name in names
            }

    @staticmethod
    @functools.cache
    def of(device: int) -> "Scatter":
        """The one for this device; made at the first call."""
        with _LOADING:
            return Scatter(Context.of(device))

    def launch(
        self,
        table: int,
        n: int,
        total: int,
        width: int,
        stream: int,
        *,
        blocks: int,
        tile: Tile | None = None,
        gate: GatePass | None = None,
    ) -> None:
        """Enqueue the copy of `n` ranges of `total` bytes. Needs the context current.

        Args:
            table: address of the words that `fill_table` made, best on the device; spoilt by it.
            width: from `width_of`.
            blocks: multiprocessors to use at most.
        """
        # A warp with less to carry than one burst is not worth a block.
        blocks = max(1, min(blocks, MAX_BLOCKS, -(-total // (THREADS * 16))))
        share = min(max(total // (blocks * THREADS // 32 * 4) & -512, 512), SHARE)
        end, counter = table + 16 * n, table + 24 * n
        job = _Job(table, table + 8 * n, end, counter, n, total, share, gate or GatePass(), _Tiles())
        if tile is not None:
            job.tiles = _Tiles(tile.n2, tile.run, tile.src1, tile.src2, tile.dst1, tile.dst2)
        function = self._functions[f"{'ranges' if tile is None else 'tiles'}{width}"]
        parameters = ctypes.c_void_p(ctypes.addressof(job))
        at = ctypes.addressof(parameters)
        call("cuLaunchKernel", function, blocks, 1, 1, THREADS, 1, 1, 0, stream, at, 0)


def fill_table(words: U64Array, src: U64Array, dst: U64Array, length: U64Array) -> int:
    """Write source, target and running end of n ranges, and a zero, into `words` (uint64 [3 n + 1]).

    Returns:
        The bytes in all.
    """
    table = words[:-1].reshape(3, src.size)
    table[0], table[1] = src, dst
    np.cumsum(length, out=table[2])
    words[-1] = 0
    return int(table[2, -1])


def width_of(src: U64Array, dst: U64Array, length: U64Array, tile: Tile | None) -> int:
    """Bytes that one thread can move at once, by what all addresses and lengths are multiples of."""
    bits = int(np.bitwise_or.reduce(src | dst | length))
    if tile is not None:
        bits |= tile.run | tile.src1 | tile.src2 | tile.dst1 | tile.dst2
    return 16 if not bits & 15 else 4 if not bits & 3 else 1


_LOADING = threading.Lock()


def _architecture(context: Context) -> str:
    attribute = bindings().CUdevice_attribute
    major = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    minor = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    return "sm_" + "".join(str(call("cuDeviceGetAttribute", a, context.device)) for a in (major, minor))


@functools.cache
def _compiled(architecture: str) -> bytes:
    """The kernel's machine code.

    Raises:
        TransportError: No compiler, or it refuses.
    """
    try:
        from cuda.bindings import nvrtc
    except (ImportError, RuntimeError) as missing:
        raise TransportError(
            f"no run-time compiler of CUDA: {missing}; pip install nvidia-cuda-nvrtc"
        ) from missing

    def done(result: Any) -> Any:
        if int(result[0]):
            raise TransportError(f"scatter.cu does not compile for {architecture}: {result[0].name}{log()}")
        return result[1] if len(result) > 1 else None

    def log() -> str:
        text: bytes = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
        nvrtc.nvrtcGetProgramLog(program, text)
        return "\n" + text.rstrip(b"\0").decode()

    source = importlib.resources.files(__package__).joinpath("scatter.cu").read_bytes()
    program = nvrtc.nvrtcCreateProgram(source, b"scatter.cu", 0, [], [])[1]
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    try:
        done(nvrtc.nvrtcCompileProgram(program, len(options), options))
        code: bytes = b" " * done(nvrtc.nvrtcGetCUBINSize(program))
        done(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code
