"""The decode workers that a prefill worker serves: handshakes and links. Sans-IO."""

import logging
from collections.abc import Sequence

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.errors import IncompatibleError
from mooncake_connector.kv_transfer.layout import WorkerInfo, check_compatible
from mooncake_connector.kv_transfer.messages import Found, Hello, OpenLink, Refused, Welcome
from mooncake_connector.kv_transfer.ports import PrefillPorts
from mooncake_connector.kv_transfer.routes import Route, WorkerAt
from mooncake_connector.kv_transfer.transport.base import SourceIdentity

logger = logging.getLogger(__name__)

PeerId = bytes

NVLINK_GATHERS = 16
"""Times ``push_bytes``. Copies over NVLink every few milliseconds made all kernels of a prefill slower by 2%,
not only those beside a copy, whoever copied; one copy a step costs less than 1% (measured on an H200)."""


class Peer:
    """A decode worker.

    Attributes:
        route: what it gets of ours.
        linked: whether writes can go.
        gather: see `PushProgress.next`.
        deadline: for the link.
    """

    def __init__(self, info: WorkerInfo, route: Route, deadline: float) -> None:
        self.info, self.route, self.deadline = info, route, deadline
        self.linked = False
        self.gather = 0


class PrefillPeers:
    """All decode workers that said hello.

    Args:
        info: what this worker tells them.
        paths: ways that it can push by.
    """

    def __init__(
        self,
        info: WorkerInfo,
        identity: SourceIdentity,
        config: ConnectorConfig,
        ports: PrefillPorts,
        paths: Sequence[str],
    ) -> None:
        self._info, self._identity, self._config = info, identity, config
        self._ports, self._paths = ports, tuple(paths)
        self._workers: tuple[WorkerAt, ...] = ()
        self._peers: dict[PeerId, Peer] = {}

    def directory(self, workers: Sequence[WorkerAt]) -> None:
        """All workers of this engine."""
        self._workers = tuple(workers)

    def get(self, peer: PeerId) -> Peer | None:
        return self._peers.get(peer)

    def find(self, peer: PeerId) -> None:
        """Tell where all workers are."""
        self._ports.send(peer, Found(self._workers) if self._workers else self._starting)

    def hello(self, peer: PeerId, hello: Hello, now: float) -> None:
        """Welcome a decode worker, or say why not."""
        if not self._workers:
            self._ports.send(peer, self._starting)
            return
        try:
            check_compatible(self._info, hello.info)
            route = Route.of([w.info for w in self._workers], self._info.index, hello.info)
        except IncompatibleError as e:
            logger.error("refused decode worker %s: %s", hello.info.name, e)
            self._ports.send(peer, Refused(str(e)))
            return
        self._peers[peer] = Peer(hello.info, route, now + 2 * self._config.handshake_timeout_s)
        self._ports.allow_reader(hello.pid)
        self._ports.send(peer, Welcome(self._info, self._identity, self._paths))

    def open_link(self, peer: PeerId, offer: OpenLink) -> None:
        if (known := self._peers.get(peer)) is not None:
            if offer.paths[:1] == ("cuda_ipc",):
                known.gather = NVLINK_GATHERS * self._config.push_bytes
            self._ports.open_link(peer, known.info.name, offer)

    def lost(self, peer: PeerId, reason: str) -> bool:
        """Forget a peer; returns whether there was one."""
        if (known := self._peers.pop(peer, None)) is not None:
            logger.warning("decode worker %s is gone: %s", known.info.name, reason)
        return known is not None

    def overdue(self, now: float) -> list[PeerId]:
        """Those who should have opened their link by now."""
        return [id for id, peer in self._peers.items() if not peer.linked and now >= peer.deadline]

    @property
    def _starting(self) -> Refused:
        return Refused(f"prefill engine {self._info.engine_id} is still starting")
