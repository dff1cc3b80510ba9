"""One connection of a link, seen from the target: it lands writes where a grant allows, and answers."""

import os
import socket
import threading
import time
from collections.abc import Callable

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport import wire
from mooncake_connector.kv_transfer.transport.checksum import xxh3
from mooncake_connector.kv_transfer.transport.grants import Grant, GrantTable
from mooncake_connector.kv_transfer.transport.mailbox import SPIN_S, Visitor
from mooncake_connector.kv_transfer.transport.process_vm import Source
from mooncake_connector.kv_transfer.transport.staging import StagedInbox, Staging
from mooncake_connector.kv_transfer.transport.tcp import Inbox

_LOOKS = 4


class Inlet:
    """One connection.

    Args:
        answer: ``answer(inlet, topic, body)`` for a question.
        on_mismatch: called when bytes landed that are not those sent.
        staging: knows the memory of GPUs, if there may be any.

    Attributes:
        source: the initiator's memory, if that can be read by process_vm.
        visitor: the initiator's mailbox, if it has one.
    """

    def __init__(
        self,
        sock: socket.socket,
        hello: wire.Hello,
        peer: str,
        grants: GrantTable,
        answer: Callable[["Inlet", str, bytes], bytes],
        on_mismatch: Callable[[], None],
        staging: Staging | None = None,
    ) -> None:
        self.index, self.incarnation = hello.index, hello.incarnation
        self.source: Source | None = None
        self.visitor: Visitor | None = None
        self._sock, self._peer, self._grants = sock, peer, grants
        self._answer, self._on_mismatch = answer, on_mismatch
        self._inbox = Inbox(sock) if staging is None else StagedInbox(sock, staging)
        self._landing = threading.Lock()
        self._closed = False
        self._awake = False
        self._write = -1
        self._whole = True

    def fence(self) -> None:
        """Hang up; when this returns, in milliseconds, nothing lands over this connection any more."""
        self._closed = True
        self._inbox.close()
        wire.hang_up(self._sock)
        with self._landing:
            pass

    def release(self) -> None:
        """Give back what it holds; for the thread that served it."""
        self._inbox.release()

    def serve(self) -> None:
        """Serve the connection until it ends.

        Raises:
            EOFError, OSError: It ended.
            TransportError: The peer broke a rule.
        """
        while True:
            if self._awake:
                self._watch()
            frame = wire.get_frame(self._sock)
            self._awake = bool(frame.flags & wire.AWAITED)
            breach = None
            if frame.kind == wire.QUESTION:
                topic = wire.exactly(self._sock, frame.ranges).decode(errors="replace")
                body = bytes(wire.exactly(self._sock, frame.nbytes))
                self._visit()  # the answer means that what was left there before the question is done
                status, said = self._answered(topic, body)
            else:
                status, reason, breach = self._land(frame)
                said = reason.encode()
            wire.put_reply(self._sock, frame.number, status, said)
            if breach is not None:
                raise TransportError(breach)

    def _watch(self) -> None:
        """Somebody waits for each of its small writes, and may write the next any moment: look for it."""
        end = time.perf_counter() + SPIN_S
        while time.perf_counter() < end:
            if self._inbox.readable():
                return
            for _ in range(_LOOKS):
                if self._visit():
                    end = time.perf_counter() + SPIN_S
            os.sched_yield()  # the initiator may be on this CPU

    def _visit(self) -> bool:
        """Land what the initiator has left in its mailbox: whether there was something."""
        if self.visitor is None:
            return False
        try:
            head = self.visitor.look()
            if head is None:
                return False
            status = wire.FAILED
            frame = wire.parse_head(head)
            if frame.kind == wire.REFERENCE and frame.ranges == 1:
                status = self._land(frame)[0]
            self.visitor.answer(status)
        except OSError:  # not the connection's end: frames that come by it are refused with the reason
            self.visitor = None
        return True

    def _answered(self, topic: str, body: bytes) -> tuple[int, bytes]:
        try:
            answer = self._answer(self, topic, body)
            if len(answer) > wire.MAX_BODY_BYTES:
                raise TransportError(f"the answer on {topic!r} has {len(answer)} bytes: too many")
        except TransportError as refused:
            return wire.REFUSED, str(refused).encode()
        return wire.LANDED, answer

    def _compared(self, frame: wire.Frame, grant: Grant) -> tuple[int, str]:
        """Whether what has landed is what was sent."""
        found = self._inbox.digest if frame.kind == wire.PAYLOAD else None
        if found is None:
            if not grant.enter():  # others may write there by now
                return wire.REFUSED, f"key {frame.key} was revoked"
            try:
                dst, length, _ = frame.columns()
                found = xxh3(dst, length)
            finally:
                grant.leave(0)
        if found == frame.checksum:
            return wire.LANDED, ""
        self._on_mismatch()
        return wire.FAILED, (
            f"checksum mismatch: {frame.nbytes} bytes of {self._peer} landed as {found:016x}, "
            f"sent as {frame.checksum:016x}"
        )

    def _land(self, frame: wire.Frame) -> tuple[int, str, str | None]:
        """Land a frame: status, reason, and what makes the peer one that has to be cut off."""
        if frame.number != self._write:
            self._write, self._whole = frame.number, True
        with self._landing:
            if self._closed:
                raise EOFError("the connection was closed here")
            grant, known = self._grants.find(frame.key, self._peer)
            if grant is not None and grant.covers(frame):
                if frame.kind == wire.PAYLOAD:
                    status, reason = self._inbox.land(frame, grant)
                elif self.source is not None:
                    status, reason = self.source.land(frame, grant)
                else:
                    status, reason = wire.UNREADABLE, "process_vm: the peer named no process of this host"
                if status == wire.LANDED and frame.flags & wire.CHECKED:
                    status, reason = self._compared(frame, grant)
                self._whole &= status == wire.LANDED
                if self._whole and frame.flags & wire.LAST:
                    grant.write_landed()
                return status, reason, None
        self._whole = False
        if frame.kind == wire.PAYLOAD:
            self._inbox.drain(frame.nbytes)
        if grant is not None:
            reason = f"the write goes outside what grant {frame.key} covers"
        elif known:
            return wire.REFUSED, f"no grant {frame.key}: it was revoked", None
        else:
            reason = f"no grant {frame.key} was ever this peer's"
        return wire.REFUSED, reason, reason
