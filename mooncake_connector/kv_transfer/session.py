"""The push protocol: one state machine per reservation and end. Sans-IO: events in, actions out.

Two tables say everything. A pair (state, event) that a table does not list is a late, doubled or meaningless
event: nothing happens. What the tables guarantee, and the stateful property tests check against a network
that loses, doubles, delays and a peer that dies:

- decode reports a reservation exactly once, and only when no write can land in its blocks any more:
  prefill said so (DONE, FAILED, CANCEL_ACKED: it has no write in flight), or a fence made late writes
  impossible (FENCED);
- prefill lets go of a request's blocks exactly once, whatever becomes of decode: when every reservation of
  them has, and none is still to come.
"""

from enum import StrEnum, auto
from typing import ClassVar


class ReceiveState(StrEnum):
    """Decode's end of one reservation."""

    CONNECTING = auto()  # no link to prefill yet; nothing was granted
    WAITING = auto()  # blocks granted, reservation sent: bytes may land
    FENCING = auto()  # given up; the blocks are quarantined until late writes are impossible
    CLOSED = auto()


class ReceiveEvent(StrEnum):
    LINK_UP = auto()
    DONE = auto()  # prefill: every byte has landed
    FAILED = auto()  # prefill: no byte will land any more, the load is incomplete
    CANCEL_ACKED = auto()  # prefill: cancelled, no write in flight
    FENCED = auto()  # our transport: no write can land any more
    ABORT = auto()  # our scheduler: the request is gone
    GIVEN_UP = auto()  # the deadline is over, or another part of the same load has failed
    PEER_LOST = auto()


class ReceiveAction(StrEnum):
    GRANT = auto()  # let prefill write into the reserved blocks
    SEND_RESERVE = auto()
    SEND_RELEASE = auto()  # tell prefill, if it can be reached, that nobody will come for this KV
    SEND_CANCEL = auto()
    FENCE = auto()  # make late writes impossible, then feed FENCED
    UNGRANT = auto()  # take the permission back; no write is in flight
    REPORT = auto()  # tell the scheduler: loaded, or failed with `reason`


class Outcome(StrEnum):
    LOADED = auto()
    FAILED = auto()
    ABORTED = auto()


_R, _RE, _RA = ReceiveState, ReceiveEvent, ReceiveAction

RECEIVE_TABLE: dict[tuple[ReceiveState, ReceiveEvent], tuple[ReceiveState, tuple[ReceiveAction, ...]]] = {
    (_R.CONNECTING, _RE.LINK_UP): (_R.WAITING, (_RA.GRANT, _RA.SEND_RESERVE)),
    (_R.CONNECTING, _RE.PEER_LOST): (_R.CLOSED, (_RA.REPORT,)),
    (_R.CONNECTING, _RE.GIVEN_UP): (_R.CLOSED, (_RA.SEND_RELEASE, _RA.REPORT)),
    (_R.CONNECTING, _RE.ABORT): (_R.CLOSED, (_RA.SEND_RELEASE, _RA.REPORT)),
    (_R.WAITING, _RE.DONE): (_R.CLOSED, (_RA.UNGRANT, _RA.REPORT)),
    (_R.WAITING, _RE.FAILED): (_R.CLOSED, (_RA.UNGRANT, _RA.REPORT)),
    (_R.WAITING, _RE.PEER_LOST): (_R.FENCING, (_RA.FENCE,)),
    (_R.WAITING, _RE.GIVEN_UP): (_R.FENCING, (_RA.SEND_CANCEL, _RA.FENCE)),
    (_R.WAITING, _RE.ABORT): (_R.FENCING, (_RA.SEND_CANCEL, _RA.FENCE)),
    (_R.FENCING, _RE.ABORT): (_R.FENCING, ()),
    (_R.FENCING, _RE.FENCED): (_R.CLOSED, (_RA.UNGRANT, _RA.REPORT)),
    (_R.FENCING, _RE.CANCEL_ACKED): (_R.CLOSED, (_RA.UNGRANT, _RA.REPORT)),
    (_R.FENCING, _RE.DONE): (_R.CLOSED, (_RA.UNGRANT, _RA.REPORT)),
    (_R.FENCING, _RE.FAILED): (_R.CLOSED, (_RA.UNGRANT, _RA.REPORT)),
}


class ReceiveSession:
    """Decode's end.

    Attributes:
        outcome: what REPORT is to say; LOADED only after prefill's DONE in state WAITING.
        reason: why the load failed, for logs and errors.
    """

    table: ClassVar = RECEIVE_TABLE

    def __init__(self) -> None:
        self.state = ReceiveState.CONNECTING
        self.outcome = Outcome.FAILED
        self.reason = ""

    def handle(self, event: ReceiveEvent, reason: str = "") -> tuple[ReceiveAction, ...]:
        row = self.table.get((self.state, event))
        if row is None:
            return ()
        if event is ReceiveEvent.ABORT:
            self.outcome, self.reason = Outcome.ABORTED, "the request was aborted"
        elif event is ReceiveEvent.DONE and self.state is ReceiveState.WAITING:
            self.outcome = Outcome.LOADED
        elif self.state is not ReceiveState.FENCING and reason:
            self.reason = reason
        self.state, actions = row
        return actions


class SendState(StrEnum):
    """Prefill's end of one reservation, or of one that is yet to come."""

    QUEUED = auto()  # the prefill request is known, nobody has reserved
    UNMATCHED = auto()  # reserved, but the prefill request has not come (yet)
    PUSHING = auto()  # both are known: KV goes as it is computed
    HELD = auto()  # prefill finished, nobody has reserved: the lease runs
    DRAINING = auto()  # given up; an answer is owed once no write is in flight
    CLOSED = auto()


class SendEvent(StrEnum):
    PREFILL = auto()  # our scheduler: the request has arrived
    RESERVE = auto()
    PREFILL_FINISHED = auto()  # our scheduler: the request ended and its blocks wait for us
    PREFILL_ABORTED = auto()  # our scheduler: the request ended and its blocks are gone
    COMPLETE = auto()  # every byte has landed
    WRITE_FAILED = auto()
    CANCEL = auto()
    RELEASE = auto()  # decode needs nothing from this request
    PEER_LOST = auto()  # the link is closed: no write is in flight
    LEASE_EXPIRED = auto()
    MATCH_EXPIRED = auto()
    DRAINED = auto()  # no write is in flight


class SendAction(StrEnum):
    SEND_DONE = auto()
    SEND_FAILED = auto()
    SEND_CANCEL_ACK = auto()
    REPLY = auto()  # what DRAINING owes: cancel-ack if decode cancelled, failed otherwise
    FREE = auto()  # the request's blocks need not be held any more


_S, _SE, _SA = SendState, SendEvent, SendAction

SEND_TABLE: dict[tuple[SendState, SendEvent], tuple[SendState, tuple[SendAction, ...]]] = {
    (_S.QUEUED, _SE.RESERVE): (_S.PUSHING, ()),
    (_S.QUEUED, _SE.PREFILL_FINISHED): (_S.HELD, ()),
    (_S.QUEUED, _SE.PREFILL_ABORTED): (_S.CLOSED, (_SA.FREE,)),
    (_S.QUEUED, _SE.RELEASE): (_S.CLOSED, (_SA.FREE,)),
    (_S.UNMATCHED, _SE.PREFILL): (_S.PUSHING, ()),
    (_S.UNMATCHED, _SE.CANCEL): (_S.CLOSED, (_SA.SEND_CANCEL_ACK, _SA.FREE)),
    (_S.UNMATCHED, _SE.MATCH_EXPIRED): (_S.CLOSED, (_SA.SEND_FAILED, _SA.FREE)),
    (_S.UNMATCHED, _SE.PEER_LOST): (_S.CLOSED, (_SA.FREE,)),
    (_S.HELD, _SE.RESERVE): (_S.PUSHING, ()),
    (_S.HELD, _SE.RELEASE): (_S.CLOSED, (_SA.FREE,)),
    (_S.HELD, _SE.LEASE_EXPIRED): (_S.CLOSED, (_SA.FREE,)),
    (_S.PUSHING, _SE.COMPLETE): (_S.CLOSED, (_SA.SEND_DONE, _SA.FREE)),
    (_S.PUSHING, _SE.PREFILL_ABORTED): (_S.DRAINING, (_SA.FREE,)),
    (_S.PUSHING, _SE.WRITE_FAILED): (_S.DRAINING, (_SA.FREE,)),
    (_S.PUSHING, _SE.CANCEL): (_S.DRAINING, (_SA.FREE,)),
    (_S.PUSHING, _SE.LEASE_EXPIRED): (_S.DRAINING, (_SA.FREE,)),
    (_S.PUSHING, _SE.PEER_LOST): (_S.CLOSED, (_SA.FREE,)),
    (_S.DRAINING, _SE.CANCEL): (_S.DRAINING, ()),
    (_S.DRAINING, _SE.DRAINED): (_S.CLOSED, (_SA.REPLY,)),
    (_S.DRAINING, _SE.PEER_LOST): (_S.CLOSED, ()),
    (_S.CLOSED, _SE.CANCEL): (_S.CLOSED, (_SA.SEND_CANCEL_ACK,)),
    (_S.CLOSED, _SE.RESERVE): (_S.CLOSED, (_SA.SEND_FAILED,)),
}


class SendSession:
    """Prefill's end.

    Attributes:
        cancelled: decode cancelled, so DRAINING owes it a cancel-ack.
        reason: why the transfer failed, for decode's log.
    """

    table: ClassVar = SEND_TABLE

    def __init__(self, state: SendState) -> None:
        self.state = state
        self.cancelled = False
        self.reason = ""

    def handle(self, event: SendEvent, reason: str = "") -> tuple[SendAction, ...]:
        row = self.table.get((self.state, event))
        if row is None:
            return ()
        if event is SendEvent.CANCEL:
            self.cancelled = True
        elif self.state not in (SendState.DRAINING, SendState.CLOSED) and reason:
            self.reason = reason
        self.state, actions = row
        return actions
