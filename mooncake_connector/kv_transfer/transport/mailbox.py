"""A place in the initiator's memory where it leaves a frame for a target that is looking: nobody is woken.

    number u64 | frame, its fixed part | answer u64 | answer u64, once more

The initiator stores the frame, then its number. A target that was busy a moment ago looks here, by
process_vm_readv, before it goes to sleep on its socket. It lands the frame and stores the answer, which is
``number << 8 | status``: twice, so that the initiator, which waits on its own memory, never takes half of it
for all.
"""

import platform

import numpy as np

from mooncake_connector.kv_transfer.transport.syscalls import Few, read_process, write_process
from mooncake_connector.kv_transfer.transport.wire import HEAD_BYTES

SPIN_S = 50e-6
"""How long either side looks for what will come any moment, before it waits for it."""

LOOK_S = 100e-6
"""How long a caller that waits looks for its reply before it sleeps, letting go of the GIL at each look.

A target that sleeps wakes up in that time: if both slept, both would sleep again at the next write.
"""

IN_ORDER = platform.machine() in ("x86_64", "AMD64")
"""Whether stores are seen in the order they were made; elsewhere mailboxes are not used."""

_ANSWER = 8 + HEAD_BYTES


class Mailbox:
    """The initiator's end. One thread at a time.

    Attributes:
        address: where it is.
    """

    def __init__(self) -> None:
        memory = np.zeros(_ANSWER + 16, np.uint8)
        self.address: int = memory.ctypes.data
        self._frame = memory.data[8:_ANSWER]
        self._words = memory.view(np.uint64).data
        self._number = 0

    def post(self, frame: bytes) -> None:
        """Leave a frame; the one before must have been answered."""
        self._frame[:] = frame
        self._number += 1
        self._words[0] = self._number

    def answer(self) -> int | None:
        """The status of what was posted, once there is one."""
        first = self._words[-2]
        if first >> 8 != self._number or self._words[-1] != first:
            return None
        return first & 0xFF


class Visitor:
    """The target's end.

    Args:
        pid: the initiator, as proven.
        address: of its mailbox.
    """

    def __init__(self, pid: int, address: int) -> None:
        self._pid = pid
        self._number = 0
        memory = np.zeros(_ANSWER + 16, np.uint8)
        here: int = memory.ctypes.data
        self._words, self._frame = memory.view(np.uint64).data, memory.data[8:_ANSWER]
        self._mine, self._question = Few(here, _ANSWER), Few(address, 8, address + 8, HEAD_BYTES)
        self._reply, self._theirs = Few(here + _ANSWER, 16), Few(address + _ANSWER, 16)

    def look(self) -> bytes | None:
        """A frame that was not there before.

        Raises:
            OSError: The initiator's memory can't be read.
        """
        # Two ranges, which are read one after the other: a frame is there before its number is.
        read_process(self._pid, self._mine, self._question)
        if self._words[0] == self._number:
            return None
        self._number = self._words[0]
        return bytes(self._frame)

    def answer(self, status: int) -> None:
        """Say what became of the last frame.

        Raises:
            OSError: The initiator's memory can't be written.
        """
        self._words[-1] = self._words[-2] = self._number << 8 | status
        write_process(self._pid, self._reply, self._theirs)
