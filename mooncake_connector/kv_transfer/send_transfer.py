"""What prefill knows of one transfer."""

from mooncake_connector.kv_transfer.messages import Done
from mooncake_connector.kv_transfer.push import PushProgress
from mooncake_connector.kv_transfer.session import SendSession, SendState
from mooncake_connector.kv_transfer.transport.base import Mark

TransferKey = tuple[str, bytes]  # transfer id, prompt hash


class SendTransfer:
    """One transfer on prefill's side: its session, its progress, and for whom.

    Attributes:
        request_id: of the prefill request, once it is known.
        ended: the scheduler ended the request.
        held: ... and its blocks wait for us.
        freed: they need not.
        reservation: decode's key; 0 until it has reserved.
        wants_token: DONE must bring the first token.
        first_token: what the prompt's last position sampled; -1 until the scheduler has told.
        first_write, landed: when the first write began and the last one landed.
        deadline: of the lease, the match or the drain, by the session's state.
    """

    def __init__(self, id: TransferKey, state: SendState, progress: PushProgress, now: float) -> None:
        self.id = id
        self.session = SendSession(state)
        self.progress = progress
        self.request_id: str | None = None
        self.ended = False
        self.held = False
        self.freed = False
        self.peer: bytes | None = None
        self.reservation = 0
        self.deadline = now
        self.op_bytes: dict[int, int] = {}
        self.nbytes = self.early_bytes = 0
        self.wants_token = False
        self.first_token = -1
        self.first_write = self.landed = now

    def done(self, marks: tuple[Mark, ...]) -> Done:
        """What decode is told when everything is there."""
        return Done(
            self.reservation,
            self.nbytes,
            self.early_bytes,
            self.landed - self.first_write,
            marks,
            self.first_write,
            self.landed,
            self.first_token if self.wants_token else -1,
        )

    @property
    def complete(self) -> bool:
        """Whether DONE may be said."""
        return self.progress.complete and not (self.wants_token and self.first_token < 0)
