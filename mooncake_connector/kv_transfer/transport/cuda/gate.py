"""The gate of one link: whether an initiator's GPU may write into the target's memory, decided by the target.

A page of host memory that both processes map. The target writes grants into it and takes them back; every
block of the initiator's kernels says in it that it is inside, looks whether its grant is there, and says that
it has left. So the target can fence by itself, within the milliseconds that a running kernel takes: also
against an initiator that is stopped, and without a word from it. What copy engines move can't look; there
the initiator's CPU looks before it hands copies over, and its stream says when they are done.
"""

import mmap
import os

import numpy as np
from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.cuda.driver import Context, HostRegistration, full_barrier
from mooncake_connector.kv_transfer.transport.cuda.kernel import MAX_BLOCKS, GatePass

GRANTS = 8192
"""Live at a time on one link."""

# Words of 8 bytes, those of different writers in different cache lines.
_CLOSED, _BEGUN, _DONE, _ENTERED, _GRANTS = 0, 8, 16, 32, 512
_NBYTES = 8 * (_GRANTS + GRANTS)

Words = NDArray[np.uint64]


class Gate:
    """The target's side; open for nothing at first.

    Attributes:
        fd: of the shared page, which the initiator opens through this process's entry in /proc.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("mooncake-gate", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _NBYTES)
        self._words = _map(self.fd)
        self._slots: dict[int, int] = {}
        self._free = list(range(GRANTS))

    def open(self, key: int) -> None:
        """Let writes under `key` in.

        Raises:
            TransportError: Too many keys are let in.
        """
        if key in self._slots:
            return
        if not self._free:
            raise TransportError(f"more than {GRANTS} grants at a time on one link of cuda_ipc")
        slot = self._slots[key] = self._free.pop()
        self._words[_GRANTS + slot] = key

    def shut(self, key: int) -> None:
        """Let no more writes under `key` in; those that are inside go on, see `inside`."""
        if (slot := self._slots.pop(key, None)) is not None:
            self._words[_GRANTS + slot] = 0
            self._free.append(slot)

    def shut_all(self) -> None:
        """Let nothing in any more, for ever."""
        self._words[_CLOSED] = 1

    def inside(self) -> "Inside":
        """Who may be writing under what was shut before this call."""
        return Inside(self._words)

    def close(self) -> None:
        """Give up the page; the initiator's mapping of it stays."""
        os.close(self.fd)


class Inside:
    """Those who were inside when the gate was shut; new ones that are let in don't matter."""

    def __init__(self, words: Words) -> None:
        full_barrier()
        self._words = words
        self._tickets = words[_ENTERED : _ENTERED + MAX_BLOCKS].copy()
        self._begun = int(words[_BEGUN])

    def left(self) -> bool:
        """Whether all of them have left."""
        now = self._words[_ENTERED : _ENTERED + MAX_BLOCKS]
        self._tickets[now != self._tickets] = 0
        # Who looked and was refused has taken its number back, and nothing will say that it is done.
        begun = min(self._begun, int(self._words[_BEGUN]))
        return not self._tickets.any() and int(self._words[_DONE]) >= begun


class Visitor:
    """The initiator's side.

    Args:
        pid: of the target.
        fd: of its gate.
        context: of the device whose kernels will pass.

    Raises:
        TransportError: The page can't be opened or mapped for the device.
    """

    def __init__(self, pid: int, fd: int, context: Context) -> None:
        try:
            page = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as refused:
            raise TransportError(
                f"can't open the gate of process {pid}: {refused}; run both engines as one user in one "
                "pid namespace"
            ) from refused
        try:
            self._words = _map(page)
        finally:
            os.close(page)
        self._registration = HostRegistration(self._words.ctypes.data, _NBYTES, context)
        self._device = self._registration.device_address
        self._tickets = 0
        self._begun = int(self._words[_BEGUN])

    def kernel(self, key: int, refused: int) -> GatePass | None:
        """What a launch under `key` shows; None if the key is not let in now.

        Args:
            refused: device address of the word that is set if the gate turns out to be shut.
        """
        at = np.flatnonzero(self._words[_GRANTS:] == np.uint64(key))
        if not at.size or not key:
            return None
        self._tickets += 1
        device = self._device
        return GatePass(
            device + 8 * _CLOSED,
            device + 8 * (_GRANTS + int(at[0])),
            key,
            device + 8 * _ENTERED,
            self._tickets,
            refused,
        )

    def begin_copy(self, key: int) -> bool:
        """Enter with copies that can't look themselves; False if the key is not let in.

        After True the stream has to write `copy_number` to `copy_done` behind the copies.
        """
        self._begun += 1
        self._words[_BEGUN] = self._begun
        full_barrier()
        if not self._words[_CLOSED] and bool((self._words[_GRANTS:] == np.uint64(key)).any()):
            return True
        self._begun -= 1
        self._words[_BEGUN] = self._begun
        return False

    @property
    def copy_number(self) -> int:
        return self._begun

    @property
    def copy_done(self) -> int:
        """Device address."""
        return self._device + 8 * _DONE

    def close(self) -> None:
        """Leave for good; nothing of this initiator may be under way."""
        self._words[_DONE] = self._begun
        self._registration.close()


def _map(fd: int) -> Words:
    return np.frombuffer(mmap.mmap(fd, _NBYTES), np.uint64)
