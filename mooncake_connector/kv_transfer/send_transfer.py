"""What prefill knows of one transfer, and of each reservation of it."""

from mooncake_connector.kv_transfer.messages import Done
from mooncake_connector.kv_transfer.push import Computed, PushProgress
from mooncake_connector.kv_transfer.session import SendSession, SendState
from mooncake_connector.kv_transfer.transport.base import Mark

TransferKey = tuple[str, bytes]  # transfer id, prompt hash


class SendTransfer:
    """A request's KV on this worker, and who gets it.

    Attributes:
        request_id: of the prefill request, once it is known.
        computed: what exists of its KV.
        ended: the scheduler ended the request.
        held: ... and its blocks wait for us.
        first_token: what the prompt's last position sampled; -1 until the scheduler has told.
        expected: how many decode workers reserve it here, as far as is known.
        owner: engine id of the decode engine that has reserved it.
        shares: every reservation, and the place for the next one while one is to come.
    """

    def __init__(self, id: TransferKey, num_groups: int) -> None:
        self.id = id
        self.request_id: str | None = None
        self.computed = Computed(num_groups)
        self.ended = False
        self.held = False
        self.first_token = -1
        self.expected = 1
        self.owner = ""
        self.shares: list[SendShare] = []

    @property
    def open(self) -> "SendShare | None":
        """The place for the next reservation."""
        return next((s for s in self.shares if not s.key and s.session.state is not SendState.CLOSED), None)

    @property
    def freed(self) -> bool:
        """Whether nobody needs its blocks any more."""
        return all(share.freed for share in self.shares)

    @property
    def over(self) -> bool:
        """Whether every reservation has ended and none is to come."""
        return all(share.session.state is SendState.CLOSED for share in self.shares)

    @property
    def reason(self) -> str:
        """Why it failed."""
        return next((s.session.reason for s in self.shares if s.session.reason), "it was delivered")


class SendShare:
    """One reservation, or the place for one.

    Attributes:
        key: decode's; 0 until it has reserved.
        freed: the blocks need not be held for it.
        wants_token: DONE must bring the first token.
        deadline: of the lease, the match or the drain, by the session's state.
        first_write, landed: when the first write began and the last one landed.
    """

    def __init__(self, transfer: SendTransfer, state: SendState, deadline: float) -> None:
        self.transfer = transfer
        self.session = SendSession(state)
        self.deadline = deadline
        self.freed = False
        self.peer: bytes | None = None
        self.key = 0
        self.wants_token = False
        self.progress: PushProgress | None = None
        self.op_bytes: dict[int, int] = {}
        self.nbytes = self.early_bytes = 0
        self.first_write = self.landed = deadline

    @property
    def idle(self) -> bool:
        """Whether no write of it is in flight."""
        return self.progress is None or not self.progress.in_flight

    @property
    def complete(self) -> bool:
        """Whether DONE may be said."""
        token = not self.wants_token or self.transfer.first_token >= 0
        return token and self.progress is not None and self.progress.complete

    def done(self, marks: tuple[Mark, ...]) -> Done:
        """What decode is told when everything is there."""
        return Done(
            self.key,
            self.nbytes,
            self.early_bytes,
            self.landed - self.first_write,
            marks,
            self.first_write,
            self.landed,
            self.transfer.first_token if self.wants_token else -1,
        )
