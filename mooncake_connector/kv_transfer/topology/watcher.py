"""Notices NICs that come, go or change while the process runs."""

import contextlib
import logging
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from mooncake_connector.kv_transfer.topology.discovery import SYS, discover_nics, glance
from mooncake_connector.kv_transfer.topology.model import Change, Topology, differences

logger = logging.getLogger(__name__)

Listener = Callable[[tuple[Change, ...], Topology], None]

# linux/rtnetlink.h, linux/netlink.h: `socket` has no names for them.
_LINK_AND_ADDRESSES = 0x1 | 0x10 | 0x100
_KOBJECT_UEVENT = 15
_KERNEL_UEVENTS = 1

_SOON_S, _SETTLED_S = 0.1, 0.6
"""When to look after an event, twice: the port of an RDMA device follows its interface a little later."""


class Watcher:
    """Calls a listener with each difference between what sysfs says now and what it said before.

    The kernel's netlink events say when to look; a slow poll finds what raises no event (the state of an
    InfiniBand port) and is all there is where netlink is not allowed.
    """

    def __init__(
        self, topology: Topology, listener: Listener, *, sysfs: Path = SYS, poll_s: float = 5.0
    ) -> None:
        """Start watching.

        Args:
            topology: what the listener knows already, from `discover`.
            listener: called as ``listener(changes, topology)`` from the watcher's thread, with the host as
                it is now. Not called while nothing changed.
            sysfs: where `topology` came from.
            poll_s: pause between looks without an event [s].
        """
        self._topology = topology
        self._listener = listener
        self._sysfs = sysfs
        self._poll_s = poll_s
        self._wake, self._waker = socket.socketpair()
        self._events = _event_sockets()
        self._seen: tuple[str, ...] = ()
        self._thread = threading.Thread(target=self._run, name="mooncake-topology", daemon=True)
        self._thread.start()

    @property
    def topology(self) -> Topology:
        """The host as last seen."""
        return self._topology

    def close(self) -> None:
        """Stop; the listener is not called any more when this returns (unless it is the one calling)."""
        self._waker.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        poller = select.poll()
        with contextlib.ExitStack() as stack:
            for sock in (self._wake, *self._events):
                poller.register(stack.enter_context(sock), select.POLLIN)
            # The first look, at once, finds what changed since `topology` was read.
            due, settled, read_all = time.monotonic(), 0.0, -math.inf
            while True:
                ready = [fd for fd, _ in poller.poll(max(0.0, due - time.monotonic()) * 1e3)]
                if self._wake.fileno() in ready:
                    return
                now = time.monotonic()
                for fd in ready:
                    _drain(fd)
                    # Where events never cease, addresses are read `poll_s` after the first of them.
                    read_all = read_all if settled else now
                    due, settled = min(due, now + _SOON_S), now + _SETTLED_S
                if now < due:
                    continue
                if settled > now and now < read_all + self._poll_s:
                    self._look("states")
                elif settled or not self._events:
                    self._look("all")
                    read_all = now
                else:
                    self._look("glance")
                settled = settled if settled > now else 0.0
                due = settled or now + self._poll_s

    def _look(self, extent: Literal["glance", "states", "all"]) -> None:
        """States are read at once after an event, addresses (slow) when it has settled; polls see states."""
        try:
            seen = glance(self._sysfs)
            if extent == "glance" and seen == self._seen:
                return
            self._seen = ()
            known = self._topology.nics if extent == "states" else ()
            nics = discover_nics(self._sysfs, known)
            if not (changes := differences(self._topology.nics, nics)):
                # What changed between the two readings must not count as seen: the next look is a whole one.
                self._seen = seen if glance(self._sysfs) == seen else ()
                return
            self._topology = msgspec.structs.replace(self._topology, nics=nics)
            for change in changes:
                logger.info("NIC %s: %s (%s)", change.nic.name, change.kind, change.nic.state)
            self._listener(changes, self._topology)
        except Exception:
            logger.exception("a change of NICs was not handled")


def _event_sockets() -> list[socket.socket]:
    """Netlink sockets that become readable when a link, an address or a device changes."""
    found: list[socket.socket] = []
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    try:
        for protocol, groups in (
            (socket.NETLINK_ROUTE, _LINK_AND_ADDRESSES),
            (_KOBJECT_UEVENT, _KERNEL_UEVENTS),
        ):
            found.append(socket.socket(socket.AF_NETLINK, kind, protocol))
            found[-1].bind((0, groups))
    except OSError as error:
        logger.info("no netlink events here (%s): NICs are only polled", error)
        for sock in found:
            sock.close()
        return []
    return found


def _drain(fd: int) -> None:
    """Only that something happened matters; what it was, sysfs says."""
    with contextlib.suppress(OSError):
        while os.read(fd, 1 << 16):
            pass
