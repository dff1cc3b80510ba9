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
from mooncake_connector.kv_transfer.topology.model import Nic
from mooncake_connector.kv_transfer.transport.base import Ask, LinkEvents, Serve
from mooncake_connector.kv_transfer.transport.rdma import RdmaDevices, RdmaRails, RdmaTarget, unavailable
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic

logger = logging.getLogger(__name__)


class Fabric:
    """RDMA devices, their distance from this process's memory, and both as they change. Thread-safe.

    Raises:
        ConfigError: A NIC that the settings name is not there, or a GID or the topology file is not usable.
        TransportError: There is no RDMA here, or none is up and the settings want nothing else; the message
            has the mend.
    """

    def __init__(self, config: TransferConfig, serve: Serve) -> None:
        if (reason := unavailable()) is not None:
            raise TransportError(reason)
        self._config = config
        topology = discover()
        self._rules = _rules(config, topology)
        self._matrix = _distances(topology, self._rules)
        self._location = "cpu:0"
        nics = self._admitted(topology)
        gid = config.rdma_gid_index
        self._devices = RdmaDevices(nics, gid_index=None if gid < 0 else gid)
        if not self._devices.nics:
            idle = f"no port is active of {', '.join(nic.name for nic in nics) or 'the RDMA devices'}"
            if config.paths == ("rdma",):
                self._devices.close()
                raise TransportError(f"rdma: {idle} (mend: `ip link set up` its interface)")
            logger.info("no rdma yet: %s", idle)
        self._lock = threading.Lock()
        self._rails: weakref.WeakSet[RdmaRails] = weakref.WeakSet()
        self.target = RdmaTarget(self._nics, serve, penalty=self.penalty)
        self._watcher = Watcher(topology, self._changed)

    def register(self, region: Region) -> None:
        """Let all NICs read and write a region.

        Raises:
            TransportError: A NIC can't.
        """
        self._devices.register(region)
        self._settle()

    def deregister(self, region: Region) -> None:
        """Undo one `register`."""
        self._devices.deregister(region)
        self._settle()

    def penalty(self, nic: str) -> float:
        """From most of this process's memory to a NIC: 1 is near, infinite that it is not to be used."""
        return self._matrix.penalty(self._location, nic)

    def rails(self, name: str, token: bytes, ask: Ask, events: LinkEvents) -> RdmaRails:
        """The rails of one link; `open` them once its streams are being made."""
        rails = RdmaRails(
            name, token, ask, events, self._nics, qps=self._config.rdma_qps, penalty=self.penalty
        )
        with self._lock:
            self._rails.add(rails)
        return rails

    def close(self) -> None:
        """Give the devices back; links and their target have to be closed before."""
        self._watcher.close()
        self._devices.close()

    def _nics(self) -> Sequence[RdmaNic]:
        return self._devices.nics

    def _admitted(self, topology: Topology) -> list[Nic]:
        return [nic for nic in topology.nics if nic.kind == "rdma" and self._rules.admits(nic)]

    def _settle(self) -> None:
        """Where most of the memory is decides which NICs are near."""
        size: dict[str, int] = {}
        for region in self._devices.regions:
            size[region.location] = size.get(region.location, 0) + region.length
        location = max(size, key=size.__getitem__, default=self._location)
        if location != self._location:
            self._location = location
            self._refresh()

    def _changed(self, changes: Sequence[Change], topology: Topology) -> None:
        """Told by the watcher. What is to do follows from what there is now, however that came about."""
        if any(change.nic.kind == "rdma" for change in changes):
            self._matrix = _distances(topology, self._rules)
            self._devices.refresh(self._admitted(topology))
            self._refresh()

    def _refresh(self) -> None:
        self.target.refresh()
        with self._lock:
            links = list(self._rails)
        for rails in links:
            rails.refresh()


def _rules(config: TransferConfig, topology: Topology) -> NicRules:
    allow = tuple(name.strip() for name in config.rdma_devices.split(",") if name.strip())
    rules = NicRules.of(allow=allow, override=config.topology or None)
    try:
        rules.check(topology)
    except ConfigError as wrong:
        raise ConfigError(
            f"rdma_devices={config.rdma_devices!r}, topology={config.topology!r}: {wrong}"
        ) from wrong
    return rules


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
