"""Small writes whose caller waits for them: the shortest way there and back."""

import os
import threading
import time
from typing import TYPE_CHECKING

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.base import Failure
from mooncake_connector.kv_transfer.transport.mailbox import IN_ORDER, LOOK_S, SPIN_S, Mailbox
from mooncake_connector.kv_transfer.transport.outgoing import Result

if TYPE_CHECKING:
    from mooncake_connector.kv_transfer.transport.stream import Stream
    from mooncake_connector.kv_transfer.transport.stream_rail import StreamRail

SMALL_BYTES = 32 << 10
"""Frames up to this size are sent by the thread that writes, if that takes no waiting."""


class SyncWriter:
    """One stream's writes that are waited for.

    A thread that sleeps takes longer to wake up than 4 KiB to copy. So the caller looks for the reply itself,
    for a short while, and a target that was busy a moment ago looks for the next frame in the same way: on
    its socket, and by process_vm in the initiator's mailbox, which spares both sides the socket.
    """

    def __init__(self, stream: "Stream") -> None:
        self._stream = stream
        self._mailbox = Mailbox() if "process_vm" in stream.rails and IN_ORDER else None
        self.mailbox_address = self._mailbox.address if self._mailbox is not None else 0
        self._turn = threading.Lock()
        self._awake_until = 0.0

    def write(self, rail: "StreamRail", key: int, plan: CopyPlan, timeout: float) -> Failure | None:
        """See `StreamRail.write_sync`."""
        result = Result()
        small = plan.length.size == 1 and int(plan.length[0]) <= SMALL_BYTES
        if small and not self._stream.stages(rail, plan):
            if rail.path == "process_vm" and self._by_mailbox(rail, key, plan, timeout):
                return None
            frame = self._stream.piece(rail, key, plan, result)
            begun = time.perf_counter()
            if self._stream.send_by_hand(rail, frame, result, timeout):
                self._heard(time.perf_counter() - begun < LOOK_S)
                return self._settled(rail, result, timeout)
        self._stream.write(rail, key, plan, result)
        return self._settled(rail, result, timeout)

    def _by_mailbox(self, rail: "StreamRail", key: int, plan: CopyPlan, timeout: float) -> bool:
        """Have the target find a write in the mailbox: whether that landed it.

        If not, nothing of it is under way.
        """
        box = self._mailbox
        if box is None or time.perf_counter() > self._awake_until or not self._turn.acquire(blocking=False):
            return False
        try:
            if not self._stream.idle(rail):
                return False
            box.post(self._stream.piece(rail, key, plan, Result()).head())
            end = time.perf_counter() + SPIN_S
            while (status := box.answer()) is None and time.perf_counter() < end:
                os.sched_yield()  # the target may be on this CPU
            self._heard(status is not None)
            if status is None:
                looked = Result()
                self._stream.ask(wire.ECHO, b"", looked)  # the target looks before it answers
                self._settled(rail, looked, timeout)
                if (status := box.answer()) is None:
                    self._mailbox = None  # it can't look
            return status == wire.LANDED
        finally:
            self._turn.release()

    def _heard(self, just_now: bool) -> None:
        """The target has answered: if just now, it is looking for more."""
        self._awake_until = time.perf_counter() + SPIN_S / 2 if just_now else 0.0

    def _settled(self, rail: "StreamRail", result: Result, timeout: float) -> Failure | None:
        """Wait until a write has landed, or until nothing of it can land any more."""
        if not result.wait(timeout):
            self._stream.owner.stuck(self._stream, f"no reply within {timeout} s")
            result.wait(-1)
        failure = result.outcome if isinstance(result.outcome, Failure) else None
        if failure is not None and failure.retry:
            rail.fenced.wait()
        return failure
