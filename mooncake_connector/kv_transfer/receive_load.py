"""What decode knows of one load, and of each part of it: what one prefill worker sends."""

from collections.abc import Iterator

from mooncake_connector.kv_transfer.decode_peers import Engine, Peer, Source
from mooncake_connector.kv_transfer.layout import BlockIds
from mooncake_connector.kv_transfer.messages import Done, LoadReport, LocalReserve
from mooncake_connector.kv_transfer.session import Outcome, ReceiveSession, ReceiveState


class Part:
    """One reservation.

    Attributes:
        reserve_sent, done_at: when; 0 if it never came to that.
    """

    def __init__(self, load: "Load", key: int, peer: Peer, source: Source) -> None:
        self.load, self.key, self.peer, self.source = load, key, peer, source
        self.session = ReceiveSession()
        self.done: Done | None = None
        self.reserve_sent = self.done_at = 0.0

    @property
    def closed(self) -> bool:
        return self.session.state is ReceiveState.CLOSED

    @property
    def given_up(self) -> bool:
        """Whether what it brings, or brought, is of no use."""
        lost = self.session.state in (ReceiveState.FENCING, ReceiveState.CLOSED)
        return lost and self.session.outcome is not Outcome.LOADED


class Load:
    """A request's blocks, filled by every prefill worker that has something of them.

    Attributes:
        parts: none until it is known who that is.
        reason: why it failed before it had any.
    """

    def __init__(
        self, want: LocalReserve, engine: Engine, blocks: tuple[BlockIds, ...], now: float, deadline: float
    ) -> None:
        self.want, self.engine, self.blocks = want, engine, blocks
        self.began, self.deadline = now, deadline
        self.parts: list[Part] = []
        self.outcome = Outcome.FAILED
        self.reason = ""
        self.given_up = False

    @property
    def ended(self) -> bool:
        """Whether no byte of it can land any more."""
        return all(part.closed for part in self.parts)

    def sum_up(self) -> None:
        """All parts have ended: as what, and why."""
        outcomes = {part.session.outcome for part in self.parts}
        self.outcome = next(o for o in (Outcome.ABORTED, Outcome.FAILED, Outcome.LOADED) if o in outcomes)
        self.reason = next((part.session.reason for part in self.parts if part.session.reason), "")

    def report(self, now: float) -> LoadReport:
        """How it went, to be told once all parts have ended."""
        dones = [part.done for part in self.parts if part.done is not None]
        tokens = {done.first_token for done in dones}
        paths = dict.fromkeys(part.peer.path for part in self.parts)
        return LoadReport(
            self.want.request_id,
            self.outcome,
            self.reason,
            "+".join(path for path in paths if path),
            sum(done.nbytes for done in dones),
            sum(done.early_bytes for done in dones),
            now - self.began,
            max((done.push_s for done in dones), default=0.0),
            () if self.outcome is Outcome.LOADED else tuple(self.blocks[0].tolist()),
            first_token=tokens.pop() if len(tokens) == 1 else -1,
            token_only=not any(ids.size for ids in self.blocks),
            reserve_sent=max((part.reserve_sent for part in self.parts), default=0.0),
            first_write=min(_told(done.first_write for done in dones), default=0.0),
            landed=max((done.landed for done in dones), default=0.0),
            done=max((part.done_at for part in self.parts), default=0.0),
        )


def _told(moments: Iterator[float]) -> list[float]:
    return [moment for moment in moments if moment]
