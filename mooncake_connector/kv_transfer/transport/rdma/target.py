"""The target's end of all RDMA rails: makes them on request, counts what lands, destroys them at once."""

import hmac
import logging
import math
import threading
from collections.abc import Callable, Sequence

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.base import Mark, Serve
from mooncake_connector.kv_transfer.transport.rdma import cards, verbs
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic
from mooncake_connector.kv_transfer.transport.rdma.queue_pair import QueuePair

MAX_RAILS = 1024
"""Per peer."""

log = logging.getLogger(__name__)


class _Waiter:
    """Somebody who waits for marks; `left` of them have not been seen."""

    def __init__(self, left: int, on_seen: Callable[[], None]) -> None:
        self.left, self.on_seen = left, on_seen


class _Inrail:
    """Attributes: seen: writes that have landed as a whole; waiting: (how many must have, who waits)."""

    def __init__(self) -> None:
        self.seen = 0
        self.waiting: list[tuple[int, _Waiter]] = []
        self.pair: QueuePair


class _Peer:
    def __init__(self, token: bytes) -> None:
        self.token = token
        self.rails: dict[int, _Inrail] = {}
        self.fenced: set[int] = set()


class RdmaTarget:
    """Implements the questions of `cards`, and what an `Inbound` wants of one-sided transports. Thread-safe.

    A peer may write any registered region for as long as it has rails: hardware knows no grants. `fence_peer`
    and the fence of a single rail destroy queue pairs, which no late write survives.

    Args:
        nics: those of this process as they are now; `refresh` after they changed.
        serve: registers a handler of questions that peers ask over their streams.
        penalty: from this process's memory to a NIC, by label; infinite for one that is not to be used.
    """

    path = "rdma"

    def __init__(
        self,
        nics: Callable[[], Sequence[RdmaNic]],
        serve: Serve,
        *,
        penalty: Callable[[str], float] = lambda nic: 1.0,
    ) -> None:
        self._nics = nics
        self._penalty = penalty
        self._lock = threading.RLock()
        self._peers: dict[str, _Peer] = {}
        serve(cards.NICS, self._tell_nics)
        serve(cards.OPEN, self._open)
        serve(cards.REGIONS, self._tell_regions)
        serve(cards.FENCE, self._fence)

    def refresh(self) -> None:
        """The NICs have changed: rails of those that are gone are destroyed."""
        seen: list[Callable[[], None]] = []
        with self._lock:
            nics = self._nics()
            for peer in self._peers.values():
                lost = [number for number, rail in peer.rails.items() if rail.pair.nic not in nics]
                for number in lost:
                    seen += self._destroy(peer, number)
        for on_seen in seen:
            on_seen()

    def admit(self, peer: str, token: bytes) -> None:
        """Serve this peer's link that has `token`, and no earlier one any more."""
        self.fence_peer(peer)
        with self._lock:
            self._peers[peer] = _Peer(token)

    def grant(self, key: int, peer: str) -> None:
        """Nothing: hardware knows no grants."""

    def revoke(self, key: int, peer: str) -> None:
        """Nothing, like `grant`."""

    def fence(self, key: int, peer: str, on_fenced: Callable[[], None]) -> bool:
        """False: only a whole link can be fenced."""
        return False

    def fence_peer(self, peer: str, on_fenced: Callable[[], None] = lambda: None) -> None:
        """Destroy all rails of a peer: when this returns nothing lands, until it is admitted again."""
        with self._lock:
            gone = self._peers.pop(peer, None)
            seen = (
                [on_seen for number in list(gone.rails) for on_seen in self._destroy(gone, number)]
                if gone
                else []
            )
        for on_seen in seen:
            on_seen()
        on_fenced()

    def await_marks(self, peer: str, marks: Sequence[Mark], on_seen: Callable[[], None]) -> None:
        """Call back, from any thread, once so many of each rail's writes have been seen to land.

        What landed over a rail that is gone has been seen.
        """
        with self._lock:
            known = self._peers.get(peer)
            rails = known.rails if known is not None else {}
            open_ = [(mark.count, rails[mark.rail]) for mark in marks if mark.rail in rails]
            unseen = [(count, rail) for count, rail in open_ if rail.seen < count]
            waiter = _Waiter(len(unseen), on_seen)
            for count, rail in unseen:
                rail.waiting.append((count, waiter))
        if not unseen:
            on_seen()

    def close(self) -> None:
        """Destroy all rails of all peers; what another thread is destroying is gone then, too."""
        with self._lock:
            for peer in list(self._peers):
                self.fence_peer(peer)

    # ------------------------------------------------------------------ questions

    def _tell_nics(self, peer: str, body: bytes) -> bytes:
        self._known(peer, cards.decode(body, cards.Hello).token)
        nics = self._nics()
        usable = [nic for nic in nics if nic.problem() is None] or nics
        told = [cards.NicCard(nic.label, nic.gid, nic.speed, self._penalty(nic.label)) for nic in usable]
        near = [card for card in told if card.penalty < math.inf]
        return cards.encode(cards.Nics(sorted(near, key=lambda card: card.penalty)))

    def _tell_regions(self, peer: str, body: bytes) -> bytes:
        which = cards.decode(body, cards.Which)
        self._known(peer, which.token)
        return cards.encode(cards.Regions(self._nic(which.nic).rows()))

    def _open(self, peer: str, body: bytes) -> bytes:
        asked = cards.decode(body, cards.Open)
        self._known(peer, asked.token)
        nic = self._nic(asked.nic)
        if (problem := nic.problem()) is not None:
            raise TransportError(problem)
        rail = _Inrail()
        rail.pair = QueuePair(nic, 0, lambda: self._landed(rail))
        try:
            # Connected under the lock: whoever fences either finds this rail, or keeps it from coming up.
            with self._lock:
                known = self._known(peer, asked.token)
                if asked.number in known.rails or asked.number in known.fenced:
                    raise TransportError(f"rdma: rail {asked.number} was there before: take another number")
                if len(known.rails) >= MAX_RAILS:
                    raise TransportError(f"rdma: {MAX_RAILS} rails are the most that a peer can have")
                if nic not in self._nics():
                    raise TransportError(f"{nic.label} is gone")
                rail.pair.connect(asked.card)
                known.rails[asked.number] = rail
        except TransportError:
            rail.pair.close()
            raise
        log.debug("rdma: rail %d of %s: %s", asked.number, peer, asked.card)
        return cards.encode(cards.Opened(rail.pair.card, nic.rows()))

    def _fence(self, peer: str, body: bytes) -> bytes:
        asked = cards.decode(body, cards.Fence)
        with self._lock:
            known = self._known(peer, asked.token)
            known.fenced.add(asked.number)
            seen = self._destroy(known, asked.number)
        for on_seen in seen:
            on_seen()
        return b""

    def _known(self, peer: str, token: bytes) -> _Peer:
        """The peer, if this is the link that was admitted last."""
        known = self._peers.get(peer)
        if known is None or not hmac.compare_digest(known.token, token):
            raise TransportError("rdma: this link is not admitted any more: connect anew")
        return known

    def _nic(self, label: str) -> RdmaNic:
        nics = {nic.label: nic for nic in self._nics()}
        if label not in nics:
            raise TransportError(f"rdma: the target has no NIC {label}; it has {', '.join(nics) or 'none'}")
        return nics[label]

    # ------------------------------------------------------------------ landing

    def _landed(self, rail: _Inrail) -> None:
        """Completions of a rail's receives have come."""
        wcs = rail.pair.take()
        with self._lock:
            seen = self._count(rail, wcs)
        for on_seen in seen:
            on_seen()

    def _destroy(self, peer: _Peer, number: int) -> list[Callable[[], None]]:
        rail = peer.rails.pop(number, None)
        if rail is None:
            return []
        seen = self._count(rail, rail.pair.close())
        # What the initiator saw complete has landed, and nothing more can come.
        return [*seen, *self._notice(rail, None)]

    def _count(self, rail: _Inrail, wcs: Sequence[object]) -> list[Callable[[], None]]:
        rail.seen += sum(
            wc.status == verbs.e.IBV_WC_SUCCESS and wc.opcode == verbs.e.IBV_WC_RECV_RDMA_WITH_IMM  # type: ignore[attr-defined]
            for wc in wcs
        )
        return self._notice(rail, rail.seen)

    def _notice(self, rail: _Inrail, seen: int | None) -> list[Callable[[], None]]:
        """Whose marks have now all been seen; `seen` None: of this rail, all."""
        done = []
        still = []
        for count, waiter in rail.waiting:
            if seen is not None and seen < count:
                still.append((count, waiter))
                continue
            waiter.left -= 1
            if not waiter.left:
                done.append(waiter.on_seen)
        rail.waiting = still
        return done
