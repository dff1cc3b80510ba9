"""The initiator's cuda_ipc rail of one link: opened over the link's streams, made anew after it broke."""

import logging
import os
import threading

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.base import Ask, Failure, LinkEvents, Mark
from mooncake_connector.kv_transfer.transport.cuda import cards
from mooncake_connector.kv_transfer.transport.cuda.gate import Visitor
from mooncake_connector.kv_transfer.transport.cuda.rail import CopyPolicy, CudaRail
from mooncake_connector.kv_transfer.transport.cuda.share import Exports, Imports
from mooncake_connector.kv_transfer.transport.insist import insist
from mooncake_connector.kv_transfer.transport.process_vm import identity

RAIL = "cuda_ipc"

SPEED = 300e9
"""Bytes/s; of NVLink between two Hoppers. What it carries is not measured: writes also wait for the model."""

log = logging.getLogger(__name__)


class CudaRails:
    """For a `Link` to offer beside its streams; see `transport.connect.OneSided`. Thread-safe.

    Args:
        name: of the link, for logs.
        token: of the target's endpoint: the target serves only the link that it admitted.
        ask: puts questions to the target over the link's streams.
        events: told of the rail, as `LinkEvents` says; `link_down` never.
        exports: this process's GPU memory.
    """

    def __init__(
        self,
        name: str,
        token: bytes,
        ask: Ask,
        events: LinkEvents,
        exports: Exports,
        policy: CopyPolicy,
    ) -> None:
        self._name, self._token, self._ask, self._events = name, token, ask, events
        self._exports, self._policy = exports, policy
        self._lock = threading.Lock()
        self._rail: CudaRail | None = None
        self._closed = False

    def open(self) -> None:
        """Open the rail, as soon as a stream of the link carries the question."""
        question = cards.Open(self._token, os.getpid(), identity().host_id)
        insist(self._ask, cards.OPEN, cards.encode(question), self._answered, lambda: self._closed)

    def owns(self, rail: str) -> bool:
        """Whether it is ours."""
        return rail == RAIL

    def restore(self, rail: str) -> None:
        """Make the rail anew; answered by `rail_up` or `rail_down`."""
        self.open()

    def abandon(self, rail: str, reason: str) -> None:
        """Break the rail; `rail_down` and `rail_fenced` follow."""
        with self._lock:
            live = self._rail
        if live is not None:
            live.fail(reason)
            return
        self._events.rail_down(rail, reason)
        self._events.rail_fenced(rail)

    def marks(self) -> tuple[Mark, ...]:
        """None: what a stream's event has seen complete is in the target's memory for everybody."""
        return ()

    def close(self) -> None:
        """Launch nothing more; what the target shares is closed once nothing is under way."""
        with self._lock:
            self._closed = True
            live = self._rail
        if live is not None:
            live.close()

    def _answered(self, answer: bytes | Failure) -> None:
        # Opening allocations and compiling the kernel take longer than a link's thread may be kept.
        threading.Thread(target=self._opened, args=(answer,), name="mooncake-cuda-open", daemon=True).start()

    def _opened(self, answer: bytes | Failure) -> None:
        try:
            if isinstance(answer, Failure):
                raise TransportError(answer.reason)
            rail = self._made(cards.decode_opened(answer))
        except Exception as failed:  # whatever it is, the link's other rails wait to hear of it
            unexpected = not isinstance(failed, TransportError)
            log.warning(
                "%s: no cuda_ipc, other paths carry the KV: %s", self._name, failed, exc_info=unexpected
            )
            if not self._closed:
                self._events.rail_down(RAIL, str(failed))
        else:
            with self._lock:
                self._rail, closed = rail, self._closed
            if closed:
                rail.close()
            else:
                self._events.rail_up(rail)

    def _made(self, target: cards.Opened) -> CudaRail:
        context = self._exports.context
        if context is None:
            raise TransportError("no GPU memory is registered here")
        imports = Imports(target.pid, target.allocations, context)
        try:
            visitor = Visitor(target.pid, target.gate, context)
            return CudaRail(
                RAIL,
                context,
                lambda: self._exports.ranges,
                imports,
                visitor,
                self._policy,
                speed=SPEED,
                on_broken=lambda reason: self._events.rail_down(RAIL, reason),
                on_fenced=self._fenced,
            )
        except TransportError:
            imports.close()
            raise

    def _fenced(self) -> None:
        with self._lock:
            self._rail = None
        if not self._closed:
            self._events.rail_fenced(RAIL)
