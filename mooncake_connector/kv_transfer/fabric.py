"""This process's NICs as transfers see them: which there are, which are near, what is registered on them."""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence

import msgspec

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.topology import Change, Matrix, NicRules, Topology, Watcher, discover
from mooncake_connector.kv_transfer.transport.base import LinkEvents
from mooncake_connector.kv_transfer.transport.rdma import RdmaDevices, RdmaRails, RdmaTarget, unavailable
from mooncake_connector.kv_transfer.transport.rdma.initiator import Ask
from mooncake_connector.kv_transfer.transport.rdma.target import Serve

logger = logging.getLogger(__name__)


class Fabric:
    """RDMA devices, their distance from this process's memory, and both as they change. Thread-safe.

    Raises:
        ConfigError: A NIC that the settings name is not there, or a GID or the topology file is not usable.
        TransportError: There is no RDMA here; the message has the mend.
    """

    def __init__(self, config: TransferConfig, serve: Serve) -> None:
        if (reason := unavailable()) is not None:
            raise TransportError(reason)
        self._config = config
        allow = tuple(name.strip() for name in config.rdma_devices.split(",") if name.strip())
        self._rules = NicRules.of(allow=allow, override=config.topology or None)
        self._topology = discover()
        self._rules.check(self._topology)
        self._matrix = _distances(self._topology, self._rules)
        gid = config.rdma_gid_index
        self._devices = RdmaDevices(
            self._topology.nics, wanted=config.rdma_devices, gid_index=None if gid < 0 else gid
        )
        self._lock = threading.Lock()
        self._regions: dict[Region, int] = {}
        self._rails: weakref.WeakSet[RdmaRails] = weakref.WeakSet()
        self.target = RdmaTarget(self._devices.nics, serve, penalty=self.penalty)
        self._watcher = Watcher(self._topology, self._changed)

    def register(self, region: Region) -> None:
        """Let all NICs read and write a region.

        Raises:
            TransportError: A NIC can't.
        """
        self._devices.register(region)
        with self._lock:
            self._regions[region] = self._regions.get(region, 0) + 1

    def deregister(self, region: Region) -> None:
        """Undo one `register`."""
        with self._lock:
            self._regions[region] -= 1
            if not self._regions[region]:
                del self._regions[region]
        self._devices.deregister(region)

    def penalty(self, nic: str) -> float:
        """From most of this process's memory to a NIC: 1 is near."""
        with self._lock:
            size: dict[str, int] = {}
            for region in self._regions:
                size[region.location] = size.get(region.location, 0) + region.length
        return self._matrix.penalty(max(size, key=size.__getitem__, default="cpu:0"), nic)

    def rails(self, name: str, token: bytes, ask: Ask, events: LinkEvents) -> RdmaRails:
        """The rails of one link; `open` them once its streams are being made."""
        rails = RdmaRails(
            name, token, ask, events, self._devices.nics, qps=self._config.rdma_qps, penalty=self.penalty
        )
        self._rails.add(rails)
        return rails

    def close(self) -> None:
        """Give the devices back; links and their target have to be closed before."""
        self._watcher.close()
        self._devices.close()

    def _changed(self, changes: Sequence[Change], topology: Topology) -> None:
        """Ports that went down broke their rails by themselves; what is new is put to use."""
        for change in changes:
            logger.info("NIC %s: %s", change.nic.name, change.kind)
        self._topology = topology
        self._matrix = _distances(topology, self._rules)


def _distances(topology: Topology, rules: NicRules) -> Matrix:
    """The matrix as if every port were up: how far a NIC is does not change when its cable is pulled."""
    nics = tuple(msgspec.structs.replace(nic, state="ACTIVE") for nic in topology.nics)
    return Matrix.of(msgspec.structs.replace(topology, nics=nics), rules, kind="rdma")


def open_fabric(config: TransferConfig, serve: Serve) -> Fabric | None:
    """The NICs, if the settings want them and they are there; the log says why not.

    Raises:
        ConfigError: As `Fabric`.
    """
    if "rdma" not in config.paths:
        return None
    try:
        return Fabric(config, serve)
    except TransportError as none:
        say: Callable[..., None] = logger.info if config.path == "auto" else logger.warning
        say("no rdma: %s", none)
        if config.path == "rdma":
            raise ConfigError(f"path=rdma: {none}") from none
        return None
