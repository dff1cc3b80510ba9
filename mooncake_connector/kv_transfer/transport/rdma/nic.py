"""One RDMA port of this host, open: its limits, its memory registrations, its events."""

import logging
import threading
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.topology.gid import choose_gid
from mooncake_connector.kv_transfer.topology.model import Nic
from mooncake_connector.kv_transfer.transport.rdma import registration, verbs
from mooncake_connector.kv_transfer.transport.rdma.poller import Poller
from mooncake_connector.kv_transfer.transport.rdma.wr import Keys

MAX_SGE = 16
"""More would make every slot of a send queue larger, also those that need one."""

log = logging.getLogger(__name__)


class _Entry:
    """A registration and who asked for it."""

    def __init__(self, region: Region, made: registration.Registered) -> None:
        self.region, self.made, self.users = region, made, 1


class RdmaNic:
    """A port with its context, protection domain and memory. Thread-safe.

    Args:
        nic: as the topology describes it.
        poller: whose thread watches the device's events.
        gid_index: of the port's GID table; None chooses.

    Attributes:
        label: unique on the host.
        mtu: active one of the port, as verbs number it.
        speed: bytes/s of link or PCIe, 0 if unknown.
        local: keys by which this NIC reads our memory; `remote`: by which peers write it.

    Raises:
        ConfigError: `gid_index` does not fit this port, or the port has no usable GID.
        TransportError: The device can't be opened.
    """

    def __init__(self, nic: Nic, poller: Poller, gid_index: int | None = None) -> None:
        gid = choose_gid(nic, gid_index)
        self.label, self.port, self.speed = nic.name, nic.port, nic.bandwidth
        self.roce = nic.link_layer == "Ethernet"
        self.gid, self.gid_index = gid.gid, gid.index
        self.poller = poller
        self.local = self.remote = Keys.of([])
        self.listeners: list[Callable[[str], None]] = []
        self._lock = threading.Lock()
        self._entries: dict[tuple[int, int], _Entry] = {}
        self._closing: list[Callable[[], None]] = []
        self._fatal: str | None = None
        try:
            self.context, self._events = verbs.event_fd(lambda: verbs.Context(name=nic.device))
            self._closing.append(self.context.close)
            self.pd = verbs.PD(self.context)
            self._closing.append(self.pd.close)
            device, port = self.context.query_device(), self._port()
        except verbs.PyverbsError as failed:
            self.close()
            raise TransportError(
                f"rdma: {self.label} can't be opened: {failed} (mend: access to /dev/infiniband/uverbs*)"
            ) from failed
        self.mtu, self.lid, self.max_bytes = port.active_mtu, port.lid, port.max_msg_sz
        self.max_sge, self.max_depth = min(device.max_sge, MAX_SGE), device.max_qp_wr
        if self._events is None:
            log.warning("rdma: %s: its events can't be watched: failures show by writes", self.label)
        else:
            poller.add(self._events, self._on_event)
        log.info(
            "rdma: %s port %d: GID %d (%s %s), MTU %d, %.0f Gbit/s",
            self.label, self.port, gid.index, gid.type, gid.ip, 128 << self.mtu, self.speed * 8e-9,
        )  # fmt: skip

    # ------------------------------------------------------------------ memory

    def register(self, region: Region) -> None:
        """Make a region readable and writable; once registered, it is only counted.

        Raises:
            TransportError: The NIC can't, or the region overlaps another one without being part of it.
        """
        with self._lock:
            low, high = region.address, region.address + region.length
            for entry in self._entries.values():
                start, end = entry.region.address, entry.region.address + entry.region.length
                if start <= low and high <= end:
                    entry.users += 1
                    return
                if low < end and start < high:
                    raise TransportError(
                        f"region {low:#x}..{high:#x} overlaps {start:#x}..{end:#x}, which is registered: "
                        "register their union instead, first"
                    )
            made = registration.register(region, self.label, registration.makers(self.pd, region))
            self._entries[region.address, region.length] = _Entry(region, made)
            self._rebuild()

    def deregister(self, region: Region) -> None:
        """Undo one `register`; no transfer may be using the region."""
        with self._lock:
            low, high = region.address, region.address + region.length
            for place, entry in self._entries.items():
                if entry.region.address <= low and high <= entry.region.address + entry.region.length:
                    entry.users -= 1
                    if not entry.users:
                        del self._entries[place]
                        self._rebuild()
                        entry.made.mr.close()
                    return

    def rows(self) -> list[tuple[int, int, int, int]]:
        """(first byte, length, what the NIC calls the first byte, rkey) of each registered region."""
        with self._lock:
            return [
                (entry.region.address, entry.region.length, entry.made.base, entry.made.mr.rkey)
                for entry in self._entries.values()
            ]

    def _rebuild(self) -> None:
        self.local = Keys.of(
            [
                (entry.region.address, entry.region.length, entry.made.base, entry.made.mr.lkey)
                for entry in self._entries.values()
            ]
        )

    # ------------------------------------------------------------------ state

    def problem(self) -> str | None:
        """Why nothing can go over this NIC now, if so."""
        if self._fatal is not None:
            return self._fatal
        try:
            active = self._port().state == verbs.e.IBV_PORT_ACTIVE
        except verbs.PyverbsError as failed:
            return f"{self.label} does not answer: {failed}"
        return None if active else f"the port of {self.label} is down"

    def _port(self) -> Any:
        return self.context.query_port(self.port)

    def _on_event(self) -> None:
        try:
            event = self.context.get_async_event()
        except verbs.PyverbsError:
            return  # woken in vain
        kind = event.event_type
        event.ack()
        e = verbs.e
        if kind == e.IBV_EVENT_DEVICE_FATAL:
            self._fatal = f"{self.label} failed for good: restart this process, or take it off rdma_devices"
        if kind in (e.IBV_EVENT_PORT_ERR, e.IBV_EVENT_DEVICE_FATAL):
            reason = self._fatal or f"the port of {self.label} went down"
        elif kind in (e.IBV_EVENT_QP_FATAL, e.IBV_EVENT_QP_REQ_ERR, e.IBV_EVENT_QP_ACCESS_ERR):
            reason = ""  # some queue pair's; which one isn't told
        else:
            log.info("rdma: %s: event %d", self.label, kind)
            return
        log.warning("rdma: %s: %s", self.label, reason or "a queue pair failed")
        for listener in list(self.listeners):
            listener(reason)

    def close(self) -> None:
        """Give everything back, in order; queue pairs have to be gone."""
        with self._lock:
            entries, self._entries = list(self._entries.values()), {}
            self._rebuild()
        if getattr(self, "_events", None) is not None:
            self.poller.remove(self._events, self._on_event)
        for close in (*(entry.made.mr.close for entry in entries), *reversed(self._closing)):
            try:
                close()
            except verbs.PyverbsError as failed:
                log.warning("rdma: %s: closing: %s", self.label, failed)
        self._closing.clear()


def matching(nics: Sequence[Nic], wanted: str) -> list[Nic]:
    """Those RDMA ports that the setting ``rdma_devices`` names, of any state.

    Raises:
        ConfigError: A name or pattern matches none.
    """
    ports = [nic for nic in nics if nic.kind == "rdma"]
    patterns = [pattern.strip() for pattern in wanted.split(",") if pattern.strip()]
    if not patterns:
        return ports
    for pattern in patterns:
        if not any(fnmatchcase(nic.name, pattern) for nic in ports):
            known = ", ".join(nic.name for nic in ports) or "none"
            raise ConfigError(f"rdma_devices: {pattern!r} matches no NIC; this host has {known}")
    return [nic for nic in ports if any(fnmatchcase(nic.name, pattern) for pattern in patterns)]
