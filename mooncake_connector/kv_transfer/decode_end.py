"""Decode's end of all transfers of one worker.

Sans-IO: calls come in with the time, effects go out through `DecodePorts`.
"""

import logging
from collections.abc import Sequence

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.decode_peers import DecodePeers, Engine, Peer, PeerId, PeerState
from mooncake_connector.kv_transfer.layout import WorkerInfo
from mooncake_connector.kv_transfer.messages import (
    Cancel,
    CancelAck,
    Done,
    Failed,
    Found,
    Heartbeat,
    HeartbeatAck,
    LocalRelease,
    LocalReserve,
    Message,
    Refused,
    Release,
    Reserve,
    Welcome,
    unpack_blocks,
)
from mooncake_connector.kv_transfer.ports import DecodePorts
from mooncake_connector.kv_transfer.receive_load import Load, Part
from mooncake_connector.kv_transfer.routes import WorkerAt
from mooncake_connector.kv_transfer.session import Outcome, ReceiveAction, ReceiveEvent
from mooncake_connector.kv_transfer.transport.base import Mark

logger = logging.getLogger(__name__)


class DecodeEnd:
    """All transfers that this worker receives.

    Args:
        info: what this worker tells prefill workers.
        pid: of this process, which prefill workers of this host must let read their memory.
        first_key: reservations are numbered from here; a random start keeps incarnations apart.
    """

    def __init__(
        self, info: WorkerInfo, config: ConnectorConfig, ports: DecodePorts, *, pid: int, first_key: int
    ) -> None:
        self._info, self._config, self._ports = info, config, ports
        self._next_key = first_key
        self._peers = DecodePeers(info, config, ports, pid)
        self._loads: dict[Load, None] = {}  # in the order of their coming, whoever hashes them
        self._by_request: dict[str, Load] = {}
        self._parts: dict[int, Part] = {}

    # ------------------------------------------------------------------ the engine's side

    def directory(self, workers: Sequence[WorkerAt]) -> None:
        """All workers of this engine."""
        self._peers.directory(workers)

    def reserve(self, want: LocalReserve, now: float) -> None:
        """Have a request's blocks filled. Reported exactly once."""
        blocks = tuple(unpack_blocks(w.block) for w in want.want)
        engine = self._peers.engine(want.address, want.engine_id, now)
        load = Load(want, engine, blocks, now, now + self._config.load_timeout_s)
        self._loads[load] = None
        self._by_request[want.request_id] = load
        if engine.sources is None:
            engine.loads.append(load)
        else:
            self._split(load, now)

    def abort(self, request_id: str, now: float) -> None:
        """The request is gone; its blocks are reported once they are safe."""
        if (load := self._by_request.get(request_id)) is None:
            return
        if load.parts:
            for part in list(load.parts):
                self._handle(part, ReceiveEvent.ABORT, now)
        else:
            self._drop(load, Outcome.ABORTED, "the request was aborted", now)

    def release(self, message: LocalRelease, now: float) -> None:
        """Nobody here will ask for this KV: let prefill free it."""
        engine = self._peers.engine(message.address, message.engine_id, now)
        self._release(engine, Release(message.transfer_id, message.prompt_hash), now)

    # ------------------------------------------------------------------ prefill's side

    def message(self, peer_id: PeerId, message: Message, now: float) -> None:
        if (engine := self._peers.finding(peer_id)) is not None:
            self._found(engine, message, now)
            return
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        peer.last_heard = now
        match message:
            case Welcome():
                try:
                    self._peers.welcome(peer, message)
                except IncompatibleError as e:
                    self._lose(peer, str(e), now)
            case Refused():
                self._lose(peer, message.reason, now)
            case Done():
                if (part := self._part(peer, message.key)) is not None:
                    part.done, part.done_at = message, now
                    self._stopped(part, ReceiveEvent.DONE, "", message.marks, now)
            case Failed():
                if (part := self._part(peer, message.key)) is not None:
                    self._stopped(part, ReceiveEvent.FAILED, message.reason, message.marks, now)
            case CancelAck():
                if (part := self._part(peer, message.key)) is not None:
                    self._stopped(part, ReceiveEvent.CANCEL_ACKED, "", message.marks, now)
            case HeartbeatAck():
                for key in message.unknown:
                    if (part := self._part(peer, key)) is not None:
                        self._handle(part, ReceiveEvent.FAILED, now, "prefill no longer knows this transfer")
            case _:
                logger.warning("ignored a %s from prefill %s", type(message).__name__, peer.worker.info.name)

    def link_up(self, name: str, now: float) -> None:
        """The data link of that name is complete."""
        peer = self._peers.named(name)
        if peer is None or peer.state is not PeerState.LINKING:
            return
        peer.state = PeerState.UP
        peer.last_heard = peer.last_heartbeat = now
        for release in peer.releases:
            self._ports.send(peer.id, release)
        peer.releases.clear()
        for part in list(peer.parts.values()):
            self._handle(part, ReceiveEvent.LINK_UP, now)

    def link_down(self, name: str, reason: str, now: float) -> None:
        if (peer := self._peers.named(name)) is not None:
            self._lose(peer, reason, now)

    def peer_lost(self, peer_id: PeerId, reason: str, now: float) -> None:
        """The prefill worker can't be reached any more; the next request dials anew."""
        if (engine := self._peers.finding(peer_id)) is not None:
            self._lose_engine(engine, reason, now)
        elif (peer := self._peers.get(peer_id)) is not None:
            self._lose(peer, reason, now)

    def fenced(self, key: int, now: float) -> None:
        """No write can land under `key` any more."""
        if (part := self._parts.get(key)) is not None:
            self._handle(part, ReceiveEvent.FENCED, now)

    def tick(self, now: float) -> None:
        """Let deadlines pass and renew leases; call a few times a second."""
        for load in [load for load in self._loads if now >= load.deadline]:
            self._give_up(load, f"KV did not arrive within load_timeout_s={self._config.load_timeout_s}", now)
        engines, peers = self._peers.overdue(now)
        for engine in engines:
            timeout = self._config.handshake_timeout_s
            self._lose_engine(engine, f"no answer within handshake_timeout_s={timeout}", now)
        for peer, reason in peers:
            self._lose(peer, reason, now)
        for peer in self._peers.beating(now):
            self._ports.send(peer.id, Heartbeat(tuple(peer.parts)))

    @property
    def num_loads(self) -> int:
        return len(self._loads)

    # ------------------------------------------------------------------ inside

    def _found(self, engine: Engine, message: Message, now: float) -> None:
        match message:
            case Found():
                try:
                    self._peers.found(engine, message)
                except IncompatibleError as e:
                    self._lose_engine(engine, str(e), now)
            case Refused():
                self._lose_engine(engine, message.reason, now)
            case _:
                logger.warning("ignored a %s from %s", type(message).__name__, engine.address)
                return
        loads, engine.loads = engine.loads, []
        for load in loads:
            self._split(load, now)
        releases, engine.releases = engine.releases, []
        for release in releases:
            self._release(engine, release, now)

    def _split(self, load: Load, now: float) -> None:
        """Reserve at every worker that has something for us."""
        for source in load.engine.sources or ():
            peer = self._peers.connect(source.worker, now)
            part = Part(load, self._next_key, peer, source)
            self._next_key += 1
            self._parts[part.key] = part
            load.parts.append(part)
            if not peer.parts:
                peer.last_heard = peer.last_heartbeat = now
            peer.parts[part.key] = part
        for part in list(load.parts):
            if part.peer.state is PeerState.UP:
                self._handle(part, ReceiveEvent.LINK_UP, now)

    def _release(self, engine: Engine, release: Release, now: float) -> None:
        if engine.sources is None:
            engine.releases.append(release)
        for source in engine.sources or ():
            self._peers.release(self._peers.connect(source.worker, now), release)

    def _lose_engine(self, engine: Engine, reason: str, now: float) -> None:
        logger.warning("prefill %s at %s: %s", engine.engine_id, engine.address, reason)
        self._peers.lose_engine(engine)
        loads, engine.loads = engine.loads, []
        engine.releases.clear()
        for load in loads:
            self._over(load, Outcome.FAILED, reason, now)

    def _lose(self, peer: Peer, reason: str, now: float) -> None:
        self._peers.lose(peer, reason)
        for part in list(peer.parts.values()):
            self._handle(part, ReceiveEvent.PEER_LOST, now, reason)

    def _give_up(self, load: Load, reason: str, now: float) -> None:
        """It can't be loaded any more: see to it that nothing of it lands."""
        if not load.parts:
            self._drop(load, Outcome.FAILED, reason, now)
        elif not load.given_up:
            load.given_up = True
            for part in list(load.parts):
                self._handle(part, ReceiveEvent.GIVEN_UP, now, reason)

    def _drop(self, load: Load, outcome: Outcome, reason: str, now: float) -> None:
        """It ends before anybody was asked for anything."""
        load.engine.loads.remove(load)
        load.engine.releases.append(Release(load.want.transfer_id, load.want.prompt_hash))
        self._over(load, outcome, reason, now)

    def _part(self, peer: Peer, key: int) -> Part | None:
        part = self._parts.get(key)
        return part if part is not None and part.peer is peer else None

    def _stopped(
        self, part: Part, event: ReceiveEvent, reason: str, marks: tuple[Mark, ...], now: float
    ) -> None:
        """Prefill says that it writes no more: so it is once our hardware has seen all that it wrote."""
        if marks:
            self._ports.await_marks(
                part.peer.name, marks, lambda then: self._handle(part, event, then, reason)
            )
        else:
            self._handle(part, event, now, reason)

    def _handle(self, part: Part, event: ReceiveEvent, now: float, reason: str = "") -> None:
        load, peer = part.load, part.peer
        want = load.want
        for action in part.session.handle(event, reason):
            match action:
                case ReceiveAction.GRANT:
                    ranges = self._info.layout.ranges(load.blocks, part.source.layers)
                    self._ports.grant(part.key, peer.name, ranges)
                case ReceiveAction.SEND_RESERVE:
                    part.reserve_sent = now
                    self._ports.send(
                        peer.id,
                        Reserve(
                            part.key,
                            want.transfer_id,
                            want.prompt_hash,
                            want.num_tokens,
                            want.want,
                            want.first_token,
                            part.source.shares,
                        ),
                    )
                case ReceiveAction.SEND_RELEASE:
                    self._peers.release(peer, Release(want.transfer_id, want.prompt_hash))
                case ReceiveAction.SEND_CANCEL:
                    self._ports.send(peer.id, Cancel(part.key))
                case ReceiveAction.UNGRANT:
                    self._ports.ungrant(part.key)
                case ReceiveAction.FENCE:
                    self._ports.fence(part.key)
                case ReceiveAction.REPORT:
                    del self._parts[part.key], peer.parts[part.key]
        if part.given_up:
            self._give_up(load, part.session.reason, now)
        if load in self._loads and load.ended:
            load.sum_up()
            self._over(load, load.outcome, load.reason, now)

    def _over(self, load: Load, outcome: Outcome, reason: str, now: float) -> None:
        load.outcome, load.reason = outcome, reason
        self._loads.pop(load, None)
        if self._by_request.get(load.want.request_id) is load:
            del self._by_request[load.want.request_id]
        if outcome is Outcome.FAILED:
            logger.warning("load of request %s failed: %s", load.want.request_id, reason)
        self._ports.report(load.report(now))
