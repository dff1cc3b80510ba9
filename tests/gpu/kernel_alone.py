"""The copy kernel by itself, in one process and without torch: for compute-sanitizer, and quick to run.

    compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m tests.gpu.kernel_alone [fault]

Buffers are exactly as long as what is read and written, so one byte too much is an error to memcheck. Every
byte is compared as well. `fault`: ``read`` or ``write`` goes past the end on purpose, so that the sanitizer
itself is tested.
"""

import random
import sys

import numpy as np
from numpy.typing import NDArray

from mooncake_connector.kv_transfer.plan import Tile
from mooncake_connector.kv_transfer.transport.cuda.driver import (
    Context,
    DeviceBuffer,
    Pinned,
    Stream,
    copy_async,
)
from mooncake_connector.kv_transfer.transport.cuda.kernel import GatePass, Scatter, fill_table, width_of
from tests.gpu.ranges import Copies, Shape, scattered, tiles

NBYTES = 300_007  # of either memory; no multiple of anything
BLOCKS = 4


class Bench:
    """Source and target on one GPU, of exactly `nbytes`."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.context = Context.of(0)
        self.kernel = Scatter.of(0)
        self.stream = Stream(self.context)
        self.source, self.target = DeviceBuffer(nbytes, self.context), DeviceBuffer(nbytes, self.context)
        self.host = Pinned(nbytes, self.context)
        self.bytes = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
        self._upload(self.source.address, self.bytes)

    def _upload(self, to: int, what: NDArray[np.uint8]) -> None:
        self.host.array[:] = what
        copy_async(to, self.host.address, self.nbytes, self.stream.handle)
        self.stream.synchronize()

    def run(self, copies: Copies, gate: GatePass | None = None, past: tuple[int, int] = (0, 0)) -> int:
        """Make the copies into a target of zeros; bytes that are not as they should be.

        Args:
            past: added to the addresses in source and target.
        """
        self._upload(self.target.address, np.zeros(self.nbytes, np.uint8))
        src = (copies.src + self.source.address + past[0]).astype(np.uint64)
        dst = (copies.dst + self.target.address + past[1]).astype(np.uint64)
        length = copies.length.astype(np.uint64)
        tile = None
        if (s := copies.shape) is not None:
            tile = Tile(s.n1, s.n2, s.run, s.src1, s.src2, s.dst1, s.dst2)
        table = Pinned(24 * src.size + 8, self.context)
        total = fill_table(table.array.view(np.uint64), src, dst, length)
        words = DeviceBuffer(24 * src.size + 8, self.context)
        copy_async(words.address, table.address, 24 * src.size + 8, self.stream.handle)
        self.kernel.launch(
            words.address,
            src.size,
            total,
            width_of(src, dst, length, tile),
            self.stream.handle,
            blocks=BLOCKS,
            tile=tile,
            gate=gate,
        )
        copy_async(self.host.address, self.target.address, self.nbytes, self.stream.handle)
        self.stream.synchronize()
        table.close()
        words.close()
        expected = np.zeros(self.nbytes, np.uint8)
        if gate is None or gate.key == self.granted:
            for a, b, n in zip(*copies.runs(), strict=True):
                expected[b : b + n] = self.bytes[a : a + n]
        return int((self.host.array != expected).sum())

    def gate(self, key: int) -> tuple[GatePass, Pinned]:
        """A gate that lets key 5 pass, as a launch with `key` shows it, and the gate's words."""
        self.granted = 5
        words = Pinned(8 * (3 + BLOCKS), self.context)
        words.array.view(np.uint64)[1] = self.granted
        at = words.address
        return GatePass(at, at + 8, key, at + 24, 7, at + 16), words


def plans(rng: random.Random) -> dict[str, Copies]:
    def some(sizes: list[int], align: int) -> Copies:
        return scattered(rng, sizes, align, NBYTES, NBYTES)

    def edge(align: int) -> Copies:
        """From the first byte to the last, on either side."""
        whole = NBYTES // align * align
        cut = whole // 3 // align * align
        at = np.array([0, cut, 2 * cut], np.int64)
        return Copies(at, at[::-1].copy(), np.array([cut, cut, cut], np.int64))

    made = {
        f"{n} byte aligned": some([n * rng.randint(1, 2000 // n) for _ in range(80)], n) for n in (1, 4, 16)
    }
    made |= {f"to the edges, {n}": edge(n) for n in (1, 4, 16)}
    made["all, odd"] = Copies(np.array([0]), np.array([0]), np.array([NBYTES]))
    made["one byte"] = Copies(np.array([NBYTES - 1]), np.array([NBYTES - 1]), np.array([1]))
    shapes = {
        "NHD to HND": (Shape(4, 8, 256, 256, 1024, 2048, 256), 16),
        "runs of 8": (Shape(3, 5, 8, 200, 24, 320, 40), 8),
        "runs of 3": (Shape(3, 7, 3, 101, 11, 67, 5), 1),
    }
    made |= {
        name: tiles(rng, shape, NBYTES // 4 // shape.dst_span, NBYTES, NBYTES, align)
        for name, (shape, align) in shapes.items()
    }
    return made


def main(fault: str) -> int:
    with Context.of(0):
        return run(fault)


def run(fault: str) -> int:
    bench = Bench(NBYTES)
    wrong = 0
    if fault:
        past = (256, 0) if fault == "read" else (0, 256)
        bench.run(Copies(np.array([0]), np.array([0]), np.array([NBYTES])), past=past)
        return 0
    made = plans(random.Random(2))
    for name, copies in made.items():
        for key in (None, 5, 6):
            gate, words = bench.gate(key) if key else (None, None)
            if bad := bench.run(copies, gate):
                print(f"{name}, gate {key}: {bad} bytes are wrong")
                wrong += 1
            if words is not None:
                state = words.array.view(np.uint64)
                refused, inside = int(state[2]), state[3:]
                if inside.any() or bool(refused) != (key == 6):
                    print(f"{name}, gate {key}: refused {refused}, blocks left inside {inside.tolist()}")
                    wrong += 1
                words.close()
    print(f"{len(made)} plans with and without a gate: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
