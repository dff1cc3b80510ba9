"""This process's RDMA: its NICs, each with all registered memory."""

import logging
from collections.abc import Sequence

from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.topology.model import Nic
from mooncake_connector.kv_transfer.transport.rdma import verbs
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic, matching
from mooncake_connector.kv_transfer.transport.rdma.poller import Poller

log = logging.getLogger(__name__)


class RdmaDevices:
    """The NICs that links may use, with one thread for what they have to tell. Thread-safe.

    Args:
        nics: `Topology.nics`; only RDMA ports are taken.
        wanted: the setting ``rdma_devices``: names or patterns with commas, empty for all.
        gid_index: the setting ``rdma_gid_index``; None chooses.

    Attributes:
        nics: those that could be opened, also if their port is down now.

    Raises:
        ConfigError: A name matches no NIC, or the GID index is not usable on one of them.
        TransportError: There is no RDMA here; the message has the mend.
    """

    def __init__(self, nics: Sequence[Nic], *, wanted: str = "", gid_index: int | None = None) -> None:
        if (reason := verbs.unavailable()) is not None:
            raise TransportError(reason)
        self.nics: tuple[RdmaNic, ...] = ()
        self._poller = Poller()
        refused = []
        try:
            for nic in matching(nics, wanted):
                try:
                    self.nics += (RdmaNic(nic, self._poller, gid_index),)
                except (ConfigError, TransportError) as failed:
                    if gid_index is not None and isinstance(failed, ConfigError):
                        raise
                    log.warning("rdma: %s is not used: %s", nic.name, failed)
                    refused.append(str(failed))
            if not self.nics:
                raise TransportError("; ".join(refused) or "rdma: the topology has no RDMA port")
        except BaseException:
            self.close()
            raise

    def register(self, region: Region) -> None:
        """Register a region on every NIC; regions that are registered already are counted.

        Raises:
            TransportError: A NIC can't; then it is registered on none.
        """
        done: list[RdmaNic] = []
        try:
            for nic in self.nics:
                nic.register(region)
                done.append(nic)
        except TransportError:
            for nic in done:
                nic.deregister(region)
            raise

    def deregister(self, region: Region) -> None:
        """Undo one `register`; no transfer may be using the region any more."""
        for nic in self.nics:
            nic.deregister(region)

    def close(self) -> None:
        """Give everything back; links and targets that use these NICs have to be closed."""
        self._poller.close()
        for nic in self.nics:
            nic.close()
