"""This process's RDMA: its NICs, each with all registered memory."""

import logging
import threading
from collections.abc import Mapping, Sequence

from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.topology.model import Nic
from mooncake_connector.kv_transfer.transport.rdma import verbs
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic
from mooncake_connector.kv_transfer.transport.rdma.poller import Poller

log = logging.getLogger(__name__)


class RdmaDevices:
    """The NICs that links may use, with one thread for what they have to tell. Thread-safe.

    Args:
        nics: those that the settings admit; only RDMA ports are taken.
        gid_index: the setting ``rdma_gid_index``; None chooses.

    Attributes:
        nics: those that are open: they were active once, and are still there.
        regions: how many times each is registered.

    Raises:
        ConfigError: The GID index is not usable on an active port.
        TransportError: There is no RDMA here, or no active port could be opened; the message has the mend.
    """

    def __init__(self, nics: Sequence[Nic], *, gid_index: int | None = None) -> None:
        if (reason := verbs.unavailable()) is not None:
            raise TransportError(reason)
        self.nics: tuple[RdmaNic, ...] = ()
        self.regions: Mapping[Region, int] = {}
        self._gid_index = gid_index
        self._lock = threading.Lock()
        self._poller = Poller()
        failed = self._open(nics)
        wrong = [why for why in failed if gid_index is not None and isinstance(why, ConfigError)]
        if wrong or (failed and not self.nics):
            self.close()
            raise wrong[0] if wrong else TransportError("; ".join(map(str, failed)))

    def refresh(self, nics: Sequence[Nic]) -> None:
        """Open ports that have come up, with all memory; close those that are gone or lost their address.

        A NIC that is closed stays with its queue pairs until they are gone. One that can't be opened is
        logged, and tried again at the next call.

        Args:
            nics: as they are now, also those that did not change.
        """
        self._open(nics)

    def register(self, region: Region) -> None:
        """Register a region on every NIC; regions that are registered already are counted.

        Raises:
            TransportError: A NIC can't; then it is registered on none.
        """
        with self._lock:
            done: list[RdmaNic] = []
            try:
                for nic in self.nics:
                    nic.register(region)
                    done.append(nic)
            except TransportError:
                for nic in done:
                    nic.deregister(region)
                raise
            self.regions = {**self.regions, region: self.regions.get(region, 0) + 1}

    def deregister(self, region: Region) -> None:
        """Undo one `register`; no transfer may be using the region any more."""
        with self._lock:
            left = self.regions[region] - 1
            others = {other: users for other, users in self.regions.items() if other != region}
            self.regions = {**others, region: left} if left else others
            for nic in self.nics:
                nic.deregister(region)

    def close(self) -> None:
        """Give everything back; links and targets that use these NICs have to be closed."""
        self._poller.close()
        for nic in self.nics:
            nic.close()

    def _open(self, nics: Sequence[Nic]) -> list[ConfigError | TransportError]:
        """See `refresh`; why ports could not be opened."""
        failures: list[ConfigError | TransportError] = []
        with self._lock:
            before = {nic.label: nic for nic in self.nics}
            after: list[RdmaNic] = []
            for nic in (nic for nic in nics if nic.kind == "rdma"):
                opened = before.get(nic.name)
                if opened is not None and opened.still(nic):
                    after.append(before.pop(nic.name))
                elif nic.active:
                    try:
                        after.append(self._made(nic))
                    except (ConfigError, TransportError) as failed:
                        log.warning("rdma: %s is not used: %s", nic.name, failed)
                        failures.append(failed)
            self.nics = tuple(after)
            for gone in before.values():
                log.info("rdma: %s (GID %s) is given back", gone.label, gone.gid)
                gone.close()
        return failures

    def _made(self, nic: Nic) -> RdmaNic:
        made = RdmaNic(nic, self._poller, self._gid_index)
        try:
            # The largest first: others may be parts of it.
            for region in sorted(self.regions, key=lambda region: -region.length):
                for _ in range(self.regions[region]):
                    made.register(region)
        except TransportError:
            made.close()
            raise
        return made
