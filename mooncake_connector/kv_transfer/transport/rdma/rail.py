"""The initiator's end of one rail: plans become chains of WRITEs, completions end writes."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import Failure
from mooncake_connector.kv_transfer.transport.rdma import verbs
from mooncake_connector.kv_transfer.transport.rdma.cards import PairCard
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic
from mooncake_connector.kv_transfer.transport.rdma.queue_pair import QueuePair
from mooncake_connector.kv_transfer.transport.rdma.wr import (
    SIGNALED,
    WRITE_WITH_IMM,
    Keys,
    OutsideError,
    WorkRequests,
    work_requests,
)
from mooncake_connector.kv_transfer.transport.waiter import Waiter, happened

DEPTH = 1024
"""Requests in a send queue; what does not fit waits."""

CHAIN = 256
"""Requests posted in one go: posting holds the GIL."""

_STATUS = {v: k for k, v in vars(verbs.e).items() if k.startswith("IBV_WC_") and k.endswith("_ERR")}

_WAITER = Waiter()

log = logging.getLogger(__name__)

OnDone = Callable[[Failure | None], None]
Refresh = Callable[[Callable[[Failure | None], None]], None]


class _Write:
    __slots__ = ("number", "on_done", "requests")

    def __init__(self, number: int, requests: WorkRequests, on_done: OnDone) -> None:
        self.number, self.requests, self.on_done = number, requests, on_done


class _Chain(NamedTuple):
    """Requests that are posted together; only the last one completes. `ends`: it is the write's last, too."""

    write: _Write
    wrs: NDArray[Any]
    last_id: int
    ends: bool


class RdmaRail:
    """A `Rail` over one queue pair. Made by `RdmaRails`.

    Args:
        name: what it is called in its link.
        nic: ours.
        penalty: of both NICs together.
        refresh: asks the target for its regions, sets `there`, then calls back, with the failure if any.
        on_broken: called once, with a reason, when the rail has gone down and all its writes have ended: it
            will send nothing more. Not for `close`.

    Attributes:
        there: the target's regions, as far as known.
        completed: writes that have landed; the target has seen as many, or will.

    Raises:
        TransportError: The NIC refused.
    """

    path = "rdma"
    steady = False

    def __init__(
        self,
        name: str,
        nic: RdmaNic,
        *,
        speed: float,
        penalty: float,
        refresh: Refresh,
        on_broken: Callable[[str], None],
    ) -> None:
        self.name, self.speed, self.penalty = name, speed, penalty
        self.there = Keys.of([], remote=True)
        self.completed = 0
        self._nic = nic
        self._refresh, self._on_broken = refresh, on_broken
        self._lock = threading.Lock()
        self._waiting: deque[_Chain] = deque()
        self._posted: deque[_Chain] = deque()
        self._writes = 0
        self._room = min(DEPTH, nic.max_depth)
        self._chain = min(CHAIN, self._room)
        self._down: str | None = None
        self._pair = QueuePair(nic, self._room, self._on_ready)

    @property
    def card(self) -> PairCard:
        """What the target needs to connect to it."""
        return self._pair.card

    def connect(self, there: PairCard) -> None:
        """Connect to the target's end, which can be written from now on.

        Raises:
            TransportError: The NIC refused.
        """
        self._pair.connect(there)

    def write(self, key: int, plan: CopyPlan, on_done: OnDone) -> None:
        """Enqueue; see `Rail.write`. The key is the streams' affair: here the registrations decide.

        A plan whose source the GPU has yet to write is enqueued when that has happened.
        """
        plan = plan.flat()
        if happened(plan.after):
            self._write(plan, on_done)
            return

        def there(failed: str | None) -> None:
            if failed is None:
                self._write(plan, on_done)
            else:
                on_done(Failure(f"rdma: the source will not be written: {failed}", retry=True))

        _WAITER.call(plan.after, there)

    def _write(self, plan: CopyPlan, on_done: OnDone) -> None:
        try:
            self._enqueue(plan, on_done)
        except OutsideError as outside:
            if not outside.keys.remote:
                on_done(_unregistered(outside))
            else:
                self._refresh(lambda failure: self._try_again(plan, on_done, failure))

    def fail(self, reason: str) -> None:
        """Break the rail: it sends nothing more when this returns, and its writes have failed."""
        self._end(reason, tell=True)

    def close(self) -> None:
        """`fail`, but nobody is told except those whose writes had not landed."""
        self._end("the link was closed here", tell=False)

    def check(self) -> None:
        """Some queue pair of the NIC failed: is it ours?"""
        if self._down is None and self._pair.failed():
            self.fail(f"rdma: {self._nic.label} put the queue pair into the error state")

    # ------------------------------------------------------------------ inside

    def _chains(self, requests: WorkRequests, on_done: OnDone) -> list[_Chain]:
        """Cut a write's requests into chains, each of which completes once."""
        self._writes = (self._writes + 1) & 0xFFFFFFFF
        write = _Write(self._writes, requests, on_done)
        wrs = requests.wrs
        n = wrs.size
        first_id = write.number << 32
        wrs["wr_id"] += np.uint64(first_id)
        next_, flags = wrs["next"], wrs["flags"]
        wrs["opcode"][-1] = WRITE_WITH_IMM
        wrs["imm"][-1] = write.number
        chains = []
        for start in range(0, n, self._chain):
            end = min(start + self._chain, n)
            next_[end - 1] = 0
            flags[end - 1] = SIGNALED
            chains.append(_Chain(write, wrs[start:end], first_id + end - 1, end == n))
        return chains

    def _post(self) -> str | None:
        """Post what fits; why the queue pair failed, if it did."""
        while self._waiting and self._waiting[0].wrs.size <= self._room:
            chain = self._waiting.popleft()
            self._room -= chain.wrs.size
            self._posted.append(chain)
            try:
                self._pair.post(chain.wrs)
            except verbs.PyverbsError as refused:
                return f"rdma: {self._nic.label} took no more requests: {refused}"
        return None

    def _on_ready(self) -> None:
        done: list[_Write] = []
        broken = None
        culprit = None
        for wc in self._pair.take():
            with self._lock:
                if self._down is not None:
                    break
                chain = self._posted[0]
                if wc.status != verbs.e.IBV_WC_SUCCESS or wc.wr_id != chain.last_id:
                    broken, culprit = self._explain(wc)
                    break
                self._posted.popleft()
                self._room += chain.wrs.size
                if chain.ends:
                    self.completed += 1
                    done.append(chain.write)
        if broken is None:
            with self._lock:
                broken = self._post() if self._down is None else None
        for write in done:
            _call(write.on_done, None)
        if broken is not None:
            self._end(broken, tell=True, culprit=culprit)

    def _enqueue(self, plan: CopyPlan, on_done: OnDone) -> None:
        nic = self._nic
        requests = work_requests(plan, nic.local, self.there, max_sge=nic.max_sge, max_bytes=nic.max_bytes)
        with self._lock:
            down = self._down
            broken = None
            if down is None:
                self._waiting.extend(self._chains(requests, on_done))
                broken = self._post()
        if down is not None:
            on_done(Failure(down, retry=True))
        elif broken is not None:
            self.fail(broken)

    def _try_again(self, plan: CopyPlan, on_done: OnDone, failure: Failure | None) -> None:
        """The target was asked for its regions anew."""
        if failure is not None:
            on_done(Failure(failure.reason, retry=True))
            return
        try:
            self._enqueue(plan, on_done)
        except OutsideError as outside:
            on_done(_unregistered(outside))

    def _explain(self, wc: Any) -> tuple[str, tuple[int, Failure] | None]:
        """What a failed completion means for the rail, and for the write that it names if it is to blame."""
        e = verbs.e
        if wc.status == e.IBV_WC_RETRY_EXC_ERR:
            return f"rdma {self.name}: the peer's NIC acknowledges nothing: it is gone or unreachable", None
        reason = f"rdma {self.name}: {_STATUS.get(wc.status, wc.status)}, vendor code {wc.vendor_err:#x}"
        number, index = wc.wr_id >> 32, wc.wr_id & 0xFFFFFFFF
        write = next((chain.write for chain in self._posted if chain.write.number == number), None)
        if write is None or wc.status not in (e.IBV_WC_REM_ACCESS_ERR, e.IBV_WC_LOC_PROT_ERR):
            return reason, None
        remote = wc.status == e.IBV_WC_REM_ACCESS_ERR
        address = int(write.requests.wrs["remote_addr"][index])
        blame = (
            f"the target's NIC refused a write to {self.there.region_at(address)}: not registered any more"
            if remote
            else f"this NIC can't read the source of the write to {address:#x}: not registered any more"
        )
        return reason, (number, Failure(f"rdma {self.name}: {blame}; register it and connect anew", False))

    def _end(self, reason: str, *, tell: bool, culprit: tuple[int, Failure] | None = None) -> None:
        with self._lock:
            if self._down is not None:
                return
            self._down = reason
            unfinished = {chain.write.number: chain.write for chain in (*self._posted, *self._waiting)}
            self._posted.clear()
            self._waiting.clear()
        self._pair.close()
        blamed = dict([culprit] if culprit else [])
        for number, write in unfinished.items():
            _call(write.on_done, blamed.get(number) or Failure(reason, retry=True))
        if tell:
            log.info("%s", reason)
            self._on_broken(reason)


def _unregistered(outside: OutsideError) -> Failure:
    return Failure(f"rdma: {outside}", retry=False)


def _call(on_done: OnDone, failure: Failure | None) -> None:
    try:
        on_done(failure)
    except Exception:
        log.exception("a listener failed; the rail goes on")
