"""What prefill knows of one transfer."""

from mooncake_connector.kv_transfer.push import PushProgress
from mooncake_connector.kv_transfer.session import SendSession, SendState

TransferKey = tuple[str, bytes]  # transfer id, prompt hash


class SendTransfer:
    """One transfer on prefill's side: its session, its progress, and for whom.

    Attributes:
        request_id: of the prefill request, once it is known.
        ended: the scheduler ended the request.
        held: ... and its blocks wait for us.
        freed: they need not.
        reservation: decode's key; 0 until it has reserved.
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
        self.first_write = now
