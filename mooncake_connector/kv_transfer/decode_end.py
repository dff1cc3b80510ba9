"""Decode's end of all transfers of one worker.

Sans-IO: calls come in with the time, effects go out through `DecodePorts`.
"""

import logging
from enum import Enum, auto

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.layout import BlockIds, WorkerInfo, check_compatible
from mooncake_connector.kv_transfer.messages import (
    Cancel,
    CancelAck,
    Done,
    Failed,
    Heartbeat,
    HeartbeatAck,
    Hello,
    LoadReport,
    LocalRelease,
    LocalReserve,
    Message,
    OpenLink,
    Redirect,
    Refused,
    Release,
    Reserve,
    Welcome,
    unpack_blocks,
)
from mooncake_connector.kv_transfer.ports import DecodePorts
from mooncake_connector.kv_transfer.session import (
    Outcome,
    ReceiveAction,
    ReceiveEvent,
    ReceiveSession,
    ReceiveState,
)
from mooncake_connector.kv_transfer.transport.base import Mark

logger = logging.getLogger(__name__)

PeerId = int


class _PeerState(Enum):
    DIALING = auto()
    LINKING = auto()
    UP = auto()


class _Peer:
    def __init__(self, id: PeerId, address: str, engine_id: str, name: str, deadline: float) -> None:
        self.id, self.address, self.engine_id, self.name = id, address, engine_id, name
        self.state = _PeerState.DIALING
        self.deadline = deadline
        self.last_heard = 0.0
        self.last_heartbeat = 0.0
        self.path = ""
        self.loads: dict[int, _Load] = {}
        self.releases: list[Release] = []


class _Load:
    def __init__(
        self, key: int, want: LocalReserve, blocks: tuple[BlockIds, ...], now: float, deadline: float
    ) -> None:
        self.key, self.want, self.blocks = key, want, blocks
        self.session = ReceiveSession()
        self.peer: _Peer | None = None
        self.began, self.deadline = now, deadline
        self.done: Done | None = None
        self.reserve_sent = self.done_at = 0.0


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
        self._info, self._config, self._ports, self._pid = info, config, ports, pid
        self._next_key = first_key
        self._next_link = 0
        self._peers: dict[PeerId, _Peer] = {}
        self._by_address: dict[tuple[str, str], _Peer] = {}
        self._loads: dict[int, _Load] = {}
        self._by_request: dict[str, _Load] = {}

    # ------------------------------------------------------------------ the engine's side

    def reserve(self, want: LocalReserve, now: float) -> None:
        """Have a request's blocks filled. Reported exactly once."""
        blocks = tuple(unpack_blocks(w.block) for w in want.want)
        load = _Load(self._next_key, want, blocks, now, now + self._config.load_timeout_s)
        self._next_key += 1
        self._loads[load.key] = self._by_request[want.request_id] = load
        load.peer = peer = self._peer(want.address, want.engine_id, now)
        if not peer.loads:
            peer.last_heard = peer.last_heartbeat = now
        peer.loads[load.key] = load
        if peer.state is _PeerState.UP:
            self._handle(load, ReceiveEvent.LINK_UP, now)

    def abort(self, request_id: str, now: float) -> None:
        """The request is gone; its blocks are reported once they are safe."""
        if (load := self._by_request.get(request_id)) is not None:
            self._handle(load, ReceiveEvent.ABORT, now)

    def release(self, message: LocalRelease, now: float) -> None:
        """Nobody here will ask for this KV: let prefill free it."""
        release = Release(message.transfer_id, message.prompt_hash)
        peer = self._peer(message.address, message.engine_id, now)
        if peer.state is _PeerState.UP:
            self._ports.send(peer.id, release)
        else:
            peer.releases.append(release)

    # ------------------------------------------------------------------ prefill's side

    def message(self, peer_id: PeerId, message: Message, now: float) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        peer.last_heard = now
        match message:
            case Welcome():
                self._welcome(peer, message, now)
            case Redirect():
                self._redirect(peer, message, now)
            case Refused():
                self.peer_lost(peer.id, message.reason, now)
            case Done():
                if (load := self._load(peer, message.key)) is not None:
                    load.done, load.done_at = message, now
                    self._stopped(load, ReceiveEvent.DONE, "", message.marks, now)
            case Failed():
                if (load := self._load(peer, message.key)) is not None:
                    self._stopped(load, ReceiveEvent.FAILED, message.reason, message.marks, now)
            case CancelAck():
                if (load := self._load(peer, message.key)) is not None:
                    self._stopped(load, ReceiveEvent.CANCEL_ACKED, "", message.marks, now)
            case HeartbeatAck():
                for key in message.unknown:
                    if (load := self._load(peer, key)) is not None:
                        self._handle(load, ReceiveEvent.FAILED, now, "prefill no longer knows this transfer")
            case _:
                logger.warning("ignored a %s from prefill %s", type(message).__name__, peer.engine_id)

    def link_up(self, name: str, now: float) -> None:
        """The data link of that name is complete."""
        for peer in self._peers.values():
            if peer.name == name and peer.state is _PeerState.LINKING:
                peer.state = _PeerState.UP
                for release in peer.releases:
                    self._ports.send(peer.id, release)
                peer.releases.clear()
                for load in list(peer.loads.values()):
                    self._handle(load, ReceiveEvent.LINK_UP, now)
                return

    def link_down(self, name: str, reason: str, now: float) -> None:
        for peer in list(self._peers.values()):
            if peer.name == name:
                self.peer_lost(peer.id, reason, now)

    def peer_lost(self, peer_id: PeerId, reason: str, now: float) -> None:
        """The prefill worker can't be reached any more; the next request dials anew."""
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        if self._by_address.get((peer.address, peer.engine_id)) is peer:
            del self._by_address[peer.address, peer.engine_id]
        logger.warning("prefill %s at %s: %s", peer.engine_id, peer.address, reason)
        self._ports.hang_up(peer.id, peer.name)
        for load in list(peer.loads.values()):
            self._handle(load, ReceiveEvent.PEER_LOST, now, reason)

    def fenced(self, key: int, now: float) -> None:
        """No write can land under `key` any more."""
        if (load := self._loads.get(key)) is not None:
            self._handle(load, ReceiveEvent.FENCED, now)

    def tick(self, now: float) -> None:
        """Let deadlines pass and renew leases; call a few times a second."""
        for load in list(self._loads.values()):
            if now >= load.deadline:
                timeout = self._config.load_timeout_s
                self._handle(
                    load, ReceiveEvent.DEADLINE, now, f"KV did not arrive within load_timeout_s={timeout}"
                )
        for peer in list(self._peers.values()):
            if peer.state is not _PeerState.UP:
                if now >= peer.deadline:
                    self.peer_lost(
                        peer.id, f"no link within handshake_timeout_s={self._config.handshake_timeout_s}", now
                    )
            elif peer.loads:
                if now - peer.last_heard > self._config.peer_timeout_s:
                    self.peer_lost(peer.id, f"silent for peer_timeout_s={self._config.peer_timeout_s}", now)
                elif now - peer.last_heartbeat >= self._config.heartbeat_s:
                    peer.last_heartbeat = now
                    self._ports.send(peer.id, Heartbeat(tuple(peer.loads)))

    @property
    def num_loads(self) -> int:
        return len(self._loads)

    # ------------------------------------------------------------------ inside

    def _peer(self, address: str, engine_id: str, now: float) -> _Peer:
        peer = self._by_address.get((address, engine_id))
        if peer is None:
            peer = self._dial(address, engine_id, now + self._config.handshake_timeout_s)
            peer.address = address
            self._by_address[address, engine_id] = peer
        return peer

    def _dial(self, address: str, engine_id: str, deadline: float) -> _Peer:
        name = f"{self._info.name}@{self._next_link}"
        self._next_link += 1
        peer = _Peer(self._ports.dial(address), address, engine_id, name, deadline)
        self._peers[peer.id] = peer
        self._ports.send(peer.id, Hello(self._info, self._pid))
        return peer

    def _redirect(self, peer: _Peer, message: Redirect, now: float) -> None:
        """Continue with the rank that matches ours; our scheduler goes on naming the engine's address."""
        del self._peers[peer.id]
        self._ports.hang_up(peer.id, peer.name)
        peer.id = self._ports.dial(message.address)
        self._peers[peer.id] = peer
        self._ports.send(peer.id, Hello(self._info, self._pid))

    def _welcome(self, peer: _Peer, message: Welcome, now: float) -> None:
        if peer.state is not _PeerState.DIALING:
            return
        try:
            if message.info.engine_id != peer.engine_id:
                raise IncompatibleError(
                    f"the engine there is {message.info.engine_id} now, the request names {peer.engine_id}: "
                    "it restarted; probe it again"
                )
            check_compatible(message.info, self._info)
        except IncompatibleError as e:
            self.peer_lost(peer.id, str(e), now)
            return
        paths, why = self._ports.choose_paths(message.identity, message.paths)
        peer.path = paths[0]
        logger.info("KV from prefill %s comes by %s: %s", message.info.name, ", then ".join(paths), why)
        peer.state = _PeerState.LINKING
        endpoint = self._ports.admit(peer.name, paths)
        self._ports.send(peer.id, OpenLink(paths, endpoint, self._config.connections))

    def _load(self, peer: _Peer, key: int) -> _Load | None:
        load = self._loads.get(key)
        return load if load is not None and load.peer is peer else None

    def _stopped(
        self, load: _Load, event: ReceiveEvent, reason: str, marks: tuple[Mark, ...], now: float
    ) -> None:
        """Prefill says that it writes no more: so it is once our hardware has seen all that it wrote."""
        peer = load.peer
        if marks and peer is not None:
            self._ports.await_marks(peer.name, marks, lambda then: self._handle(load, event, then, reason))
        else:
            self._handle(load, event, now, reason)

    def _handle(self, load: _Load, event: ReceiveEvent, now: float, reason: str = "") -> None:
        session, peer = load.session, load.peer
        assert peer is not None
        for action in session.handle(event, reason):
            match action:
                case ReceiveAction.GRANT:
                    self._ports.grant(load.key, peer.name, self._info.layout.ranges(load.blocks))
                case ReceiveAction.SEND_RESERVE:
                    want, load.reserve_sent = load.want, now
                    self._ports.send(
                        peer.id,
                        Reserve(
                            load.key,
                            want.transfer_id,
                            want.prompt_hash,
                            want.num_tokens,
                            want.want,
                            want.first_token,
                        ),
                    )
                case ReceiveAction.SEND_RELEASE:
                    peer.releases.append(Release(load.want.transfer_id, load.want.prompt_hash))
                case ReceiveAction.SEND_CANCEL:
                    self._ports.send(peer.id, Cancel(load.key))
                case ReceiveAction.UNGRANT:
                    self._ports.ungrant(load.key)
                case ReceiveAction.FENCE:
                    self._ports.fence(load.key)
                case ReceiveAction.REPORT:
                    self._report(load, now)
        if session.state is ReceiveState.CLOSED and self._loads.pop(load.key, None) is not None:
            peer.loads.pop(load.key, None)
            if self._by_request.get(load.want.request_id) is load:
                del self._by_request[load.want.request_id]

    def _report(self, load: _Load, now: float) -> None:
        session, done, peer = load.session, load.done, load.peer
        assert peer is not None
        if session.outcome is Outcome.FAILED:
            logger.warning("load of request %s failed: %s", load.want.request_id, session.reason)
        self._ports.report(
            LoadReport(
                load.want.request_id,
                session.outcome,
                session.reason,
                peer.path,
                done.nbytes if done else 0,
                done.early_bytes if done else 0,
                now - load.began,
                done.push_s if done else 0.0,
                () if session.outcome is Outcome.LOADED else tuple(load.blocks[0].tolist()),
                first_token=done.first_token if done else -1,
                token_only=not any(ids.size for ids in load.blocks),
                reserve_sent=load.reserve_sent,
                first_write=done.first_write if done else 0.0,
                landed=done.landed if done else 0.0,
                done=load.done_at,
            )
        )
