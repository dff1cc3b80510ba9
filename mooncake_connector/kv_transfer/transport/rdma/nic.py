"""One RDMA port of this host, open: its limits, its memory registrations, its events."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mooncake_connector.errors import TransportError
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

    The kernel takes a device away only when nobody has it open, and verbs must not be called on one that is
    closed. So whoever uses it holds it, and the last one who lets go of a NIC that was closed gives it back.

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
        self._address = gid
        self.poller = poller
        self.local = self.remote = Keys.of([])
        self.listeners: list[Callable[[str], None]] = []
        self._lock = threading.Lock()
        self._entries: dict[tuple[int, int], _Entry] = {}
        self._closing: list[Callable[[], None]] = []
        self._fatal: str | None = None
        self._life = threading.Lock()
        self._holders = 0
        self._closed = False
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

    # ------------------------------------------------------------------ life

    def hold(self) -> None:
        """Keep it open until `release`, whoever closes it.

        Raises:
            TransportError: It was closed.
        """
        with self._life:
            if self._closed:
                raise TransportError(f"{self.label} is gone")
            self._holders += 1

    def release(self) -> None:
        """Undo one `hold`."""
        with self._life:
            self._holders -= 1
            last = self._closed and not self._holders
        if last:
            self._give_back()

    def close(self) -> None:
        """Take nothing new; give everything back, in order, as soon as the last queue pair is gone."""
        with self._life:
            last = not self._closed and not self._holders
            self._closed = True
        if last:
            self._give_back()

    def still(self, nic: Nic) -> bool:
        """Whether a port, as it is now, can go on as it was opened: it has not failed, nor lost its GID."""
        return self._fatal is None and (not nic.active or self._address in nic.gids)

    @contextmanager
    def _held(self) -> Iterator[None]:
        self.hold()
        try:
            yield
        finally:
            self.release()

    def _give_back(self) -> None:
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

    # ------------------------------------------------------------------ memory

    def register(self, region: Region) -> None:
        """Make a region readable and writable; once registered, it is only counted.

        Raises:
            TransportError: The NIC can't, or the region overlaps another one without being part of it.
        """
        with self._held(), self._lock:
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
            with self._held():
                active = self._port().state == verbs.e.IBV_PORT_ACTIVE
        except TransportError as gone:
            return str(gone)
        except verbs.PyverbsError as failed:
            return f"{self.label} does not answer: {failed}"
        return None if active else f"the port of {self.label} is down"

    def _port(self) -> Any:
        return self.context.query_port(self.port)

    def _on_event(self) -> None:
        try:
            with self._held():
                event = self.context.get_async_event()
                kind = event.event_type
                event.ack()
        except (verbs.PyverbsError, TransportError):
            return  # woken in vain
        e = verbs.e
        if kind == e.IBV_EVENT_DEVICE_FATAL:
            self._fatal = f"{self.label} failed: it is used again once its driver has brought it back"
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
