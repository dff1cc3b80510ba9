"""Memory for gpu.py, of a GPU or of the host, and what is moved from one into the other.

All is in words of 8 bytes: numpy and torch index whole pages of words alike, so that what should have arrived
is computed, and compared with every byte that did, by the same lines for both.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from subjects import memory_of

Array = np.ndarray[Any, Any]

WORD = 8
POISON = -0x5A5A5A5A5A5A5A5B
"""What a target holds before anything arrives; no source has a negative word."""

SEED = 11


@dataclass(frozen=True)
class Move:
    """Which pages go where.

    Attributes:
        page: bytes of each.
        src, dst: int64 [n], numbers of pages in the source and in the target.
        swap: the source's page is [outer, inner, run bytes], the target's [inner, outer, run bytes]; if None
            the pages are alike.
    """

    page: int
    src: Array
    dst: Array
    swap: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return self.page * self.src.size


def scattered(
    memory_bytes: int, page: int, nbytes: int | None = None, swap: tuple[int, int] | None = None
) -> Move:
    """`nbytes` (all if None) in pages that lie at random in both memories, always the same ones.

    Raises:
        ValueError: Not a whole number of pages, or more of them than the memory has.
    """
    nbytes = memory_bytes if nbytes is None else nbytes
    if nbytes % page or nbytes > memory_bytes or page % WORD:
        raise ValueError(f"{nbytes} bytes in pages of {page} do not fit a memory of {memory_bytes}")
    random = np.random.default_rng(page)
    src, dst = (random.permutation(memory_bytes // page)[: nbytes // page] for _ in range(2))
    return Move(page, src, dst, swap)


class HostMemory:
    """Memory of this process in ordinary pages.

    Attributes:
        words: int64 [nbytes / 8], a numpy array; what is given to engines that register arrays.
        address: of its first byte.
        device: of the GPU, for those who want one.
    """

    device = 0

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.words: Any = memory_of(nbytes).view(np.int64)
        self.address: int = self.words.ctypes.data

    def fill(self) -> None:
        """Put the source's content here, the same in every process."""
        self.words[:] = content(self.nbytes)

    def poison(self) -> None:
        """Forget all that has arrived."""
        self.words[:] = POISON

    def has(self, move: Move) -> bool:
        """Whether each page that the move wrote is as it should be, and all else as it was."""
        return bool(np.array_equal(self.words, _arranged(self._source(), self._poisoned(), move, move)))

    def _source(self) -> Array:
        return content(self.nbytes)

    def _poisoned(self) -> Array:
        return np.full(self.nbytes // WORD, POISON)


class CudaMemory:
    """Memory of a GPU, from torch; otherwise as `HostMemory`.

    Args:
        device: number of the GPU, which becomes this thread's.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU here; --host does the same with host memory")
        self._torch = torch
        torch.cuda.set_device(device)
        self.nbytes, self.device = nbytes, device
        self.words: Any = torch.zeros(nbytes // WORD, dtype=torch.int64, device=f"cuda:{device}")
        self.address: int = self.words.data_ptr()
        self._reference: Any = None
        self._settle()

    def fill(self) -> None:
        self.words.copy_(self._source())
        self._settle()

    def poison(self) -> None:
        self.words.fill_(POISON)
        self._settle()

    def has(self, move: Move) -> bool:
        src, dst = (self._torch.from_numpy(side).to(self.words.device) for side in (move.src, move.dst))
        indices = Move(move.page, src, dst, move.swap)
        poisoned = self._torch.full_like(self.words, POISON)
        return bool(self._torch.equal(self.words, _arranged(self._source(), poisoned, move, indices)))

    def _source(self) -> Any:
        if self._reference is None:
            self._reference = self._torch.from_numpy(content(self.nbytes)).to(self.words.device)
        return self._reference

    def _settle(self) -> None:
        self._torch.cuda.synchronize(self.device)


def content(nbytes: int) -> Array:
    """What sources hold: int64 [nbytes / 8], random, none negative."""
    return np.random.default_rng(SEED).integers(0, 2**63, nbytes // WORD, np.int64)


def _arranged(source: Any, into: Any, move: Move, indices: Move) -> Any:
    """`into` with the source's pages moved into it; `indices` is the move in a form that indexes these."""
    pages = source.reshape(-1, move.page // WORD)[indices.src]
    if move.swap is not None:
        pages = pages.reshape(move.src.size, *move.swap, -1).swapaxes(1, 2).reshape(move.src.size, -1)
    into.reshape(-1, move.page // WORD)[indices.dst] = pages
    return into
