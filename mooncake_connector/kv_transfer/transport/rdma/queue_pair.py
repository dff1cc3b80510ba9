"""One end of an RC queue pair, with a completion queue and an event channel of its own."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from numpy.typing import NDArray

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.rdma import verbs
from mooncake_connector.kv_transfer.transport.rdma.cards import PairCard
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic
from mooncake_connector.kv_transfer.transport.rdma.poster import poster

RECEIVE_BATCH = 128
RECEIVE_BATCHES = 4
"""Writes that may arrive, 512, while the target's thread is away; then the NIC makes the initiator wait."""

ACK_TIMEOUT, RETRIES = 14, 6
"""A packet is sent 7 times, 67 ms apart (up to four times that on real NICs): a dead peer is noticed within
2 s. 7 retries would be for ever on soft-RoCE."""

_RNR_TIMER, _RNR_FOR_EVER = 12, 7
_DRAIN_S = 0.2

log = logging.getLogger(__name__)


class QueuePair:
    """Thread-safe, but for `post`, which its owner serialises.

    Args:
        nic: of this end, held as long as this lives.
        depth: send requests that fit; 0 for the end that is written to.
        on_ready: called from the poller's thread when `take` may have something.

    Attributes:
        card: what the other end needs to connect.

    Raises:
        TransportError: The NIC refused.
    """

    def __init__(self, nic: RdmaNic, depth: int, on_ready: Callable[[], None]) -> None:
        self.nic = nic
        self.receives = not depth
        self._lock = threading.Lock()
        self._on_ready = on_ready
        self._received = 0
        self._poster = poster() if depth else None
        self._open: list[Any] = []
        receives = RECEIVE_BATCH * RECEIVE_BATCHES if self.receives else 1
        e = verbs.e
        nic.hold()
        try:
            self._channel, self._fd = verbs.event_fd(lambda: self._kept(verbs.CompChannel(nic.context)))
            self._cq = self._kept(verbs.CQ(nic.context, depth + receives + 1, None, self._channel, 0))
            if self._fd is not None:
                self._cq.req_notify()
            cap = verbs.QPCap(
                max_send_wr=depth or 1,
                max_recv_wr=receives,
                max_send_sge=nic.max_sge if depth else 1,
                max_recv_sge=1,
            )
            init = verbs.QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=cap, sq_sig_all=0)
            self._qp = self._kept(verbs.QP(nic.pd, init))
            attr = verbs.QPAttr(port_num=nic.port)
            # The initiator's memory is nobody's to write.
            attr.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE if self.receives else 0
            self._qp.to_init(attr)
            for _ in range(RECEIVE_BATCHES if self.receives else 0):
                self._qp.post_recv(_receives()[0])
        except verbs.PyverbsError as failed:
            self._release()
            raise TransportError(f"rdma: {nic.label} makes no queue pair: {failed}") from failed
        self.card = PairCard(nic.gid, nic.lid, self._qp.qp_num, secrets.randbits(24), nic.mtu)
        nic.poller.add(self._fd, on_ready)

    def connect(self, there: PairCard) -> None:
        """Connect to the other end.

        Raises:
            TransportError: It was closed, or the NIC refused, as for an address that it has no route to.
        """
        nic = self.nic
        attr = verbs.QPAttr(port_num=nic.port)
        attr.qp_access_flags = verbs.e.IBV_ACCESS_REMOTE_WRITE if self.receives else 0
        if nic.roce:
            route = verbs.GlobalRoute(dgid=verbs.GID(there.gid), sgid_index=nic.gid_index, hop_limit=64)
            attr.ah_attr = verbs.AHAttr(is_global=1, port_num=nic.port, gr=route)
        else:
            attr.ah_attr = verbs.AHAttr(dlid=there.lid, is_global=0, port_num=nic.port)
        attr.dest_qp_num, attr.rq_psn, attr.sq_psn = there.qpn, there.psn, self.card.psn
        attr.path_mtu = min(nic.mtu, there.mtu)
        attr.max_rd_atomic = attr.max_dest_rd_atomic = 1
        attr.timeout, attr.retry_cnt = ACK_TIMEOUT, RETRIES
        attr.min_rnr_timer, attr.rnr_retry = _RNR_TIMER, _RNR_FOR_EVER
        try:
            with self._lock:
                if not self._open:
                    raise TransportError("the rail was closed before it was connected")
                self._qp.to_rts(attr)
        except verbs.PyverbsError as failed:
            raise TransportError(
                f"rdma: {nic.label} (GID {nic.gid_index}, {nic.gid}) can't connect to {there.gid}: {failed} "
                "(mend: a route between the two, or another rdma_gid_index)"
            ) from failed

    def post(self, wrs: NDArray[Any]) -> None:
        """Post a chain; see `Poster.post`."""
        assert self._poster is not None
        self._poster.post(self._qp, wrs)

    def take(self) -> Sequence[Any]:
        """Work completions that have come; arms the next event first, so that none is missed."""
        with self._lock:
            if not self._open:
                return ()
            if self._fd is not None:
                try:
                    self._channel.get_cq_event(self._cq)
                    self._cq.ack_events(1)
                except verbs.PyverbsError:
                    pass  # woken in vain
                self._cq.req_notify()
            return self._poll()

    def failed(self) -> bool:
        """Whether the NIC has put it into the error state."""
        with self._lock:
            if not self._open:
                return True
            attr, _ = self._qp.query(verbs.e.IBV_QP_STATE)
            return bool(attr.qp_state == verbs.e.IBV_QPS_ERR)

    def close(self) -> Sequence[Any]:
        """Destroy it: from then on nothing goes out or lands over it.

        Returns:
            The completions that had not been taken, so that everything that landed has been counted.
        """
        with self._lock:
            if not self._open:
                return ()
            self.nic.poller.remove(self._fd, self._on_ready)
            rest = self._drain() if self.receives else ()
            self._release()
            return rest

    def _drain(self) -> list[Any]:
        """Stop the queue pair; take completions until those of the unused receives show there are no more."""
        taken: list[Any] = []
        try:
            stop = verbs.QPAttr(port_num=self.nic.port)
            stop.qp_state = verbs.e.IBV_QPS_ERR
            self._qp.modify(stop, verbs.e.IBV_QP_STATE)
            end = time.monotonic() + _DRAIN_S
            while time.monotonic() < end:
                taken += self._poll(replenish=False)
                if any(wc.status != verbs.e.IBV_WC_SUCCESS for wc in taken):
                    break
                time.sleep(0.0002)
        except verbs.PyverbsError as failed:
            log.info("rdma: %s: a queue pair could not be drained: %s", self.nic.label, failed)
        return taken

    def _poll(self, replenish: bool = True) -> list[Any]:
        got: list[Any] = []
        while True:
            n, wcs = self._cq.poll(64)
            got += wcs
            if n < 64:
                break
        if self.receives and replenish:
            self._received += len(got)
            while self._received >= RECEIVE_BATCH:
                self._received -= RECEIVE_BATCH
                try:
                    self._qp.post_recv(_receives()[0])
                except verbs.PyverbsError as failed:  # in the error state some NICs refuse
                    log.debug("rdma: %s: %s", self.nic.label, failed)
        return got

    def _kept(self, made: Any) -> Any:
        self._open.append(made)
        return made

    def _release(self) -> None:
        while self._open:
            made = self._open.pop()
            try:
                made.close()
            except verbs.PyverbsError as failed:
                log.warning("rdma: %s: closing %s: %s", self.nic.label, type(made).__name__, failed)
        self.nic.release()


@cache
def _receives() -> list[Any]:
    """A chain of receives that name no memory: a WRITE WITH IMM uses up one, and writes where it says."""
    chain: list[Any] = []
    sge = verbs.SGE(0, 0, 0)
    for _ in range(RECEIVE_BATCH):
        # pyverbs 44 makes no request without an element, but lets one count as absent.
        wr = verbs.RecvWR(num_sge=1, sg=[sge], next_wr=chain[-1] if chain else None)
        wr.num_sge = 0
        chain.append(wr)
    sge.close()
    return chain[::-1]
