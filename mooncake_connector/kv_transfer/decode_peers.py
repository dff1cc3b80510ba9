"""The prefill engines that a decode worker loads from: where their workers are, handshakes, links. Sans-IO.

An engine is found through the address that a request names: any of its workers tells where all are. From
that, and from what this engine's own workers are, follows which of them send to this one (`routes`).
"""

import logging
from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.layout import WorkerInfo, check_compatible
from mooncake_connector.kv_transfer.messages import Find, Found, Hello, OpenLink, Release, Welcome
from mooncake_connector.kv_transfer.ports import DecodePorts
from mooncake_connector.kv_transfer.routes import WorkerAt, routes

if TYPE_CHECKING:
    from mooncake_connector.kv_transfer.receive_load import Load, Part

logger = logging.getLogger(__name__)

PeerId = int


class PeerState(Enum):
    DIALING = auto()
    LINKING = auto()
    UP = auto()


class Source(msgspec.Struct, frozen=True):
    """A prefill worker that sends to this decode worker.

    Attributes:
        layers: of ours, those that it sends something of.
        shares: how many of our engine's workers it sends to.
    """

    worker: WorkerAt
    layers: frozenset[int]
    shares: int


class Peer:
    """A prefill worker, on its way to being linked.

    Attributes:
        name: of the link.
        deadline: for the link.
        parts: what is being loaded from it, by key.
        releases: to be sent once it is linked.
    """

    def __init__(self, id: PeerId, worker: WorkerAt, name: str, deadline: float) -> None:
        self.id, self.worker, self.name, self.deadline = id, worker, name, deadline
        self.state = PeerState.DIALING
        self.last_heard = 0.0
        self.last_heartbeat = 0.0
        self.path = ""
        self.parts: dict[int, Part] = {}
        self.releases: list[Release] = []


class Engine:
    """A prefill engine.

    Attributes:
        finder: the channel on which its workers are asked for.
        sources: those of its workers that send to us, once they are known.
        loads, releases: what waits for that.
    """

    def __init__(self, address: str, engine_id: str, finder: PeerId, deadline: float) -> None:
        self.address, self.engine_id = address, engine_id
        self.finder, self.deadline = finder, deadline
        self.sources: tuple[Source, ...] | None = None
        self.loads: list[Load] = []
        self.releases: list[Release] = []


class DecodePeers:
    """All prefill engines and workers that are known.

    Args:
        info: what this worker tells them.
        pid: of this process, which prefill workers of this host must let read their memory.
    """

    def __init__(self, info: WorkerInfo, config: ConnectorConfig, ports: DecodePorts, pid: int) -> None:
        self._info, self._config, self._ports, self._pid = info, config, ports, pid
        self._ours: Sequence[WorkerInfo] = (info,)
        self._next_link = 0
        self._engines: dict[tuple[str, str], Engine] = {}
        self._finders: dict[PeerId, Engine] = {}
        self._peers: dict[PeerId, Peer] = {}
        self._by_worker: dict[tuple[str, str], Peer] = {}

    def directory(self, workers: Sequence[WorkerAt]) -> None:
        """All workers of this engine."""
        self._ours = [worker.info for worker in workers]

    def engine(self, address: str, engine_id: str, now: float) -> Engine:
        """The engine that answers there; asks it who it is if it isn't known."""
        engine = self._engines.get((address, engine_id))
        if engine is None:
            finder = self._ports.dial(address)
            engine = Engine(address, engine_id, finder, now + self._config.handshake_timeout_s)
            self._engines[address, engine_id] = self._finders[finder] = engine
            self._ports.send(finder, Find())
        return engine

    def finding(self, id: PeerId) -> Engine | None:
        """The engine that is being found over this channel."""
        return self._finders.get(id)

    def found(self, engine: Engine, message: Found) -> None:
        """Learn who sends to us.

        Raises:
            IncompatibleError: It is another engine by now, or its KV doesn't fit ours.
        """
        theirs = [worker.info for worker in message.workers]
        if any(info.engine_id != engine.engine_id for info in theirs):
            raise IncompatibleError(
                f"the engine there is {theirs[0].engine_id} now, the request names {engine.engine_id}: "
                "it restarted; probe it again"
            )
        for info in theirs:
            check_compatible(info, self._info)
        pairs = routes(theirs, self._ours)
        me = next(j for j, info in enumerate(self._ours) if info.index == self._info.index)
        engine.sources = tuple(
            Source(message.workers[i], frozenset(layers), sum(at == i for at, _ in pairs))
            for (i, j), layers in sorted(pairs.items())
            if j == me
        )
        self._stop_finding(engine)

    def lose_engine(self, engine: Engine) -> None:
        """Forget it: the next request asks anew."""
        if self._engines.get((engine.address, engine.engine_id)) is engine:
            del self._engines[engine.address, engine.engine_id]
        self._stop_finding(engine)

    def connect(self, worker: WorkerAt, now: float) -> Peer:
        """The peer for a worker; dials it if there is none."""
        peer = self._by_worker.get((worker.address, worker.info.name))
        if peer is None:
            name = f"{self._info.name}@{self._next_link}"
            self._next_link += 1
            deadline = now + self._config.handshake_timeout_s
            peer = Peer(self._ports.dial(worker.address), worker, name, deadline)
            self._peers[peer.id] = self._by_worker[worker.address, worker.info.name] = peer
            self._ports.send(peer.id, Hello(self._info, self._pid))
        return peer

    def get(self, id: PeerId) -> Peer | None:
        return self._peers.get(id)

    def named(self, name: str) -> Peer | None:
        """The peer whose link is called that."""
        return next((peer for peer in self._peers.values() if peer.name == name), None)

    def welcome(self, peer: Peer, message: Welcome) -> None:
        """Offer a link to a worker that agrees to serve us.

        Raises:
            IncompatibleError: It is another worker than the engine had told of.
        """
        if peer.state is not PeerState.DIALING:
            return
        if message.info.name != peer.worker.info.name:
            raise IncompatibleError(
                f"the worker there is {message.info.name} now, not {peer.worker.info.name}: it restarted"
            )
        paths, why = self._ports.choose_paths(message.identity, message.paths)
        peer.path = paths[0]
        logger.info("KV from prefill %s comes by %s: %s", message.info.name, ", then ".join(paths), why)
        peer.state = PeerState.LINKING
        endpoint = self._ports.admit(peer.name, paths)
        self._ports.send(peer.id, OpenLink(paths, endpoint, self._config.connections))

    def release(self, peer: Peer, message: Release) -> None:
        """Send it now, or once the peer is linked."""
        if peer.state is PeerState.UP:
            self._ports.send(peer.id, message)
        else:
            peer.releases.append(message)

    def lose(self, peer: Peer, reason: str) -> None:
        """Forget a worker, and what its engine said of all of them."""
        logger.warning("prefill %s at %s: %s", peer.worker.info.name, peer.worker.address, reason)
        del self._peers[peer.id]
        del self._by_worker[peer.worker.address, peer.worker.info.name]
        for engine in list(self._engines.values()):
            if any(source.worker == peer.worker for source in engine.sources or ()):
                self.lose_engine(engine)
        self._ports.hang_up(peer.id, peer.name)

    def overdue(self, now: float) -> tuple[list[Engine], list[tuple[Peer, str]]]:
        """Engines that can't be found, and workers that are silent or have no link, with the reason."""
        config = self._config
        lost = []
        for peer in self._peers.values():
            if peer.state is not PeerState.UP:
                if now >= peer.deadline:
                    lost.append((peer, f"no link within handshake_timeout_s={config.handshake_timeout_s}"))
            elif peer.parts and now - peer.last_heard > config.peer_timeout_s:
                lost.append((peer, f"silent for peer_timeout_s={config.peer_timeout_s}"))
        return [e for e in self._finders.values() if now >= e.deadline], lost

    def beating(self, now: float) -> list[Peer]:
        """Workers that are due a heartbeat."""
        due = [
            peer
            for peer in self._peers.values()
            if peer.state is PeerState.UP
            and peer.parts
            and now - peer.last_heartbeat >= self._config.heartbeat_s
        ]
        for peer in due:
            peer.last_heartbeat = now
        return due

    def _stop_finding(self, engine: Engine) -> None:
        if self._finders.pop(engine.finder, None) is not None:
            self._ports.hang_up(engine.finder, "")
