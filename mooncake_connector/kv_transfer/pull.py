"""Reading: the owner of the memory is asked to push, so that it is always the source's owner who sends.

The reader grants the place the bytes shall land in and names an endpoint of its own; the owner connects back
once per reader, writes, and says when all has landed.
"""

import itertools
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.inbound import Inbound
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.outbound import Outbound
from mooncake_connector.kv_transfer.peer import Peer
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transfer import Transfer
from mooncake_connector.kv_transfer.transport.base import Endpoint, Failure, Mark

logger = logging.getLogger(__name__)

MAX_RANGES = 8192
"""Of one question to the owner."""


class _Pull(msgspec.Struct, frozen=True):
    key: int
    reader: str
    endpoint: Endpoint | None
    paths: tuple[str, ...]
    deadline: float | None
    src: bytes
    dst: bytes
    length: bytes


class _Pulled(msgspec.Struct, frozen=True):
    key: int
    error: str | None
    marks: tuple[Mark, ...]


_pull = msgspec.msgpack.Decoder(_Pull)
_pulled = msgspec.msgpack.Decoder(_Pulled)


class _Reading(NamedTuple):
    transfer: Transfer
    reader: str
    nbytes: int


class Host(Protocol):
    """What reads need of the engine that they are part of."""

    inbound: Inbound

    @property
    def paths(self) -> tuple[str, ...]: ...

    def serve(self, topic: str, handler: Callable[[str, bytes], bytes]) -> None: ...

    def readable(self, peer: str, plan: CopyPlan) -> bool: ...

    def open(
        self, name: str, endpoint: Endpoint, paths: Sequence[str], *, on_down: Callable[[str], None]
    ) -> Outbound: ...


class Pulls:
    """Both ends of all reads of one engine. Thread-safe."""

    def __init__(self, engine: Host) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._readings: dict[int, _Reading] = {}
        self._left: dict[Transfer, int] = {}
        self._errors: dict[Transfer, str] = {}
        self._backs: dict[tuple[str, str], Outbound] = {}
        self._linked: dict[str, str] = {}
        self._names = itertools.count()
        engine.serve("read", self._push)
        engine.serve("read.done", self._pulled)

    # ------------------------------------------------------------------ the reader

    def read(self, peer: Peer, plan: CopyPlan, deadline: float | None) -> Transfer:
        """Have `plan` pushed by its owner: `src` there, `dst` here."""
        engine, inbound = self._engine, self._engine.inbound
        transfer = Transfer(plan.nbytes, self._progress, self._cancel)
        pieces = list(plan.split(max(plan.nbytes, 1), MAX_RANGES))
        with self._lock:
            self._left[transfer] = len(pieces)
            reader, endpoint = self._linked.get(peer.name), None
            if reader is None:
                reader = f"{peer.name}/read-{next(self._names)}-{secrets.token_hex(4)}"
                self._linked[peer.name] = reader
                endpoint = inbound.admit(reader, paths=engine.paths)
        for piece in pieces:
            key = secrets.randbits(62)
            inbound.grant(key, reader, Ranges.of(piece.dst, piece.length))
            with self._lock:
                self._readings[key] = _Reading(transfer, reader, piece.nbytes)
            body = msgspec.msgpack.encode(
                _Pull(
                    key,
                    reader,
                    endpoint,
                    engine.paths,
                    deadline,
                    piece.src.tobytes(),
                    piece.dst.tobytes(),
                    piece.length.tobytes(),
                )
            )
            endpoint = None

            def answered(answer: bytes | Failure, key: int = key) -> None:
                if isinstance(answer, Failure):
                    self._ended(key, answer.reason)

            peer.outbound.ask("read", body, answered)
        return transfer

    def link_down(self, reader: str, reason: str) -> None:
        """The owner's link to us ended: nothing of it lands any more."""
        with self._lock:
            keys = [key for key, reading in self._readings.items() if reading.reader == reader]
            for name in [name for name, linked in self._linked.items() if linked == reader]:
                del self._linked[name]
        for key in keys:
            self._ended(key, reason)

    def _pulled(self, reader: str, body: bytes) -> bytes:
        done = _pulled.decode(body)
        with self._lock:
            reading = self._readings.get(done.key)
        if reading is None or reading.reader != reader:
            raise TransportError("no such read is under way")
        self._engine.inbound.await_marks(reader, done.marks, lambda: self._ended(done.key, done.error))
        return b""

    def _ended(self, key: int, error: str | None) -> None:
        with self._lock:
            reading = self._readings.pop(key, None)
            if reading is None:
                return
            transfer = reading.transfer
            if error is not None:
                self._errors.setdefault(transfer, error)
            self._left[transfer] -= 1
            last = not self._left[transfer]
            if last:
                del self._left[transfer]
                error = self._errors.pop(transfer, None)
        self._engine.inbound.revoke(key)
        if last:
            transfer.end(error)

    def _progress(self, transfer: Transfer) -> int:
        with self._lock:
            return transfer.nbytes - sum(r.nbytes for r in self._readings.values() if r.transfer is transfer)

    def _cancel(self, transfer: Transfer, reason: str) -> None:
        with self._lock:
            keys = [key for key, reading in self._readings.items() if reading.transfer is transfer]
        for key in keys:
            self._engine.inbound.fence(key, lambda key=key: self._ended(key, reason))  # type: ignore[misc]

    # ------------------------------------------------------------------ the owner

    def _push(self, peer: str, body: bytes) -> bytes:
        """A reader asks: push, and tell it when all has landed."""
        pull = _pull.decode(body)
        src, dst, length = (np.frombuffer(raw, np.uint64) for raw in (pull.src, pull.dst, pull.length))
        plan = CopyPlan.of(src, dst, length)
        if not self._engine.readable(peer, plan):
            raise TransportError("the read goes outside what was offered to you")
        name = peer, pull.reader
        with self._lock:
            back = self._backs.get(name)
        if back is None:
            if pull.endpoint is None:
                raise TransportError("the link that reads came by has ended: connect again")
            back = self._engine.open(
                pull.reader,
                pull.endpoint,
                tuple(path for path in pull.paths if path in self._engine.paths),
                on_down=lambda reason: self._forget(name),
            )
            with self._lock:
                self._backs[name] = back
        link = back

        def pushed(transfer: Transfer) -> None:
            done = msgspec.msgpack.encode(_Pulled(pull.key, transfer.error, link.marks()))
            link.ask("read.done", done, lambda answer: None)

        link.submit(pull.key, plan, deadline=pull.deadline).add_done_callback(pushed)
        return b""

    def _forget(self, name: tuple[str, str]) -> None:
        with self._lock:
            self._backs.pop(name, None)
