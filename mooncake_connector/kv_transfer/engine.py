"""TransferEngine: moves bytes between the memories of processes, over whatever connects them.

The layer above says what moves; the engine decides how, uses every rail, and survives the loss of any. It
needs no inference engine: two processes, an address handed from one to the other, and memory will do.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import ConfigError, TransportError
from mooncake_connector.kv_transfer.dispatcher import Priority
from mooncake_connector.kv_transfer.fabric import open_fabric
from mooncake_connector.kv_transfer.inbound import Inbound
from mooncake_connector.kv_transfer.memory import Ranges, Region, region_of
from mooncake_connector.kv_transfer.outbound import Outbound
from mooncake_connector.kv_transfer.peer import Address, Peer
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.pull import Pulls
from mooncake_connector.kv_transfer.transfer import Transfer
from mooncake_connector.kv_transfer.transport import Endpoint, Receiver, allow_reader, open_link
from mooncake_connector.kv_transfer.transport.cuda.gpu import Gpu
from mooncake_connector.kv_transfer.transport.staging import Staging

__all__ = ["Peer", "Priority", "Transfer", "TransferEngine"]

CLOCK_S = 0.5e-3
"""The least pause between two looks at what is due."""

logger = logging.getLogger(__name__)


class TransferEngine:
    """One process's end of all its transfers. Thread-safe; every call but `Transfer.wait` returns at once.

        target                                         initiator
        engine = TransferEngine()                      engine = TransferEngine()
        address = engine.offer([engine.register(a)])   engine.register(b)
        print(address)                     ->          peer = engine.connect(address)
                                                       engine.write(peer, b).wait()

    Args:
        config: which ways to take, and how.
        host: address that data connections come to.
        port: 0 for any free one.
        advertise: the host that peers connect to, if it isn't `host`.
        on_link_up: called with a peer's name once it can write to us.
        on_link_down: called with a peer's name and a reason when it can't any more; nothing more lands then.

    Raises:
        ConfigError: A setting can't be honoured here.
        TransportError: The address can't be listened on.
    """

    def __init__(
        self,
        config: TransferConfig | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        on_link_up: Callable[[str], None] = lambda peer: None,
        on_link_down: Callable[[str, str], None] = lambda peer, reason: None,
    ) -> None:
        self.config = config or TransferConfig()
        self._on_link_down = on_link_down
        self._regions: dict[Region, Any] = {}
        self._without_nics: set[Region] = set()
        self._offered: dict[str, Ranges] = {}
        self._outbounds: set[Outbound] = set()
        self._names = iter(range(1 << 62))
        self._ticking = threading.Condition()
        self._wake_at: float | None = None
        self._closed = False
        self._staging = Staging()
        self._receiver = Receiver(
            host,
            port,
            advertise=advertise,
            on_link_up=on_link_up,
            on_link_down=self._link_down,
            staging=self._staging,
        )
        self._fabric = open_fabric(self.config, self._receiver.serve)
        self._gpu = Gpu(self.config, self._receiver.serve)
        self.inbound = Inbound(
            self._receiver,
            [self._gpu.target, *([self._fabric.target] if self._fabric is not None else [])],
            wake=self._wake,
            on_link_broken=self._link_down,
        )
        self._pulls = Pulls(self)
        threading.Thread(target=self._tick, name="mooncake-transfer-clock", daemon=True).start()

    # ------------------------------------------------------------------ memory

    def register(self, memory: Any) -> Region:
        """Let transfers read and write this memory: needed for rdma, and for `offer`.

        Takes a `Region`, or a C-contiguous array: a numpy array, a torch tensor (of a GPU too), a writable
        buffer. The engine keeps it alive until `deregister`.

        Raises:
            ConfigError: It is no contiguous memory.
            TransportError: A NIC can't register it, and it is no GPU's memory, which tcp can stage.
        """
        region = region_of(memory)
        if region not in self._regions:
            self._register_on_nics(region)
            if region.on_gpu and "cuda_ipc" in self.config.paths:
                self._gpu.register(region)
            self._staging.add(region)
        self._regions[region] = memory
        return region

    def deregister(self, region: Region) -> None:
        """Forget a region; grants and transfers on it must have ended."""
        if self._regions.pop(region, None) is not None:
            self._staging.remove(region)
            if region.on_gpu:
                self._gpu.deregister(region)
            if region in self._without_nics:
                self._without_nics.discard(region)
            elif self._fabric is not None:
                self._fabric.deregister(region)

    # ------------------------------------------------------------------ target

    def offer(self, regions: Sequence[Region], *, peer: str | None = None) -> str:
        """An address by which one initiator can write and read these regions, until `fence`.

        Args:
            peer: a name for that initiator; a second offer under a name fences the first. Offer memory anew
                under the same name when a link failed: the target may notice that later than the initiator.
        """
        peer = peer or f"peer-{next(self._names)}"
        missing = [region for region in regions if region not in self._regions]
        if missing:
            raise ConfigError(f"{missing[0]} is not registered: register it, then offer it")
        ranges = Ranges.of(
            np.array([r.address for r in regions], np.uint64),
            np.array([r.length for r in regions], np.uint64),
        )
        self.fence(peer)
        key = secrets.randbits(62)
        paths = self._paths(regions)
        endpoint = self.inbound.admit(peer, paths=paths)
        self.inbound.grant(key, peer, ranges)
        self._offered[peer] = ranges
        return str(Address(endpoint, key, tuple(regions), paths, os.getpid()))

    def fence(self, peer: str) -> None:
        """End a peer's link: when this returns no write of it can land any more."""
        self._offered.pop(peer, None)
        fenced = threading.Event()
        self.inbound.drop(peer, fenced.set)
        fenced.wait()
        self.inbound.revoke_all(peer)

    @property
    def paths(self) -> tuple[str, ...]:
        """The ways from and to all memory that is registered, the preferred first."""
        return self._paths(list(self._regions))

    # ------------------------------------------------------------------ initiator

    def connect(self, address: str) -> Peer:
        """Open a link to the target that made this address; writes may be submitted right away.

        Raises:
            ConfigError: `address` is none, or the two sides have no way in common.
        """
        there = Address.parse(address)
        ways = tuple(path for path in self.paths if path in there.paths)
        if not ways:
            raise ConfigError(
                f"no way in common: path={self.config.path!r} here, {', '.join(there.paths)} there; "
                "set path to auto on one side"
            )
        if {"process_vm", "cuda_ipc"} & set(ways):
            allow_reader(there.pid)
        name = f"{there.endpoint.host}:{there.endpoint.port}/{next(self._names)}"
        return Peer(name, there.key, there.regions, self.open(name, there.endpoint, ways))

    def open(
        self,
        name: str,
        endpoint: Endpoint,
        paths: Sequence[str],
        *,
        connections: int | None = None,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[str], None] = lambda reason: None,
    ) -> Outbound:
        """`connect` for callers that have a handshake and grants of their own."""

        outbound = Outbound(
            name, paths, wake=self._wake, on_up=on_up, on_down=on_down, on_end=self._outbounds.discard
        )
        self._outbounds.add(outbound)
        outbound.attach(
            open_link(
                endpoint,
                name=name,
                paths=paths,
                connections=connections or self.config.connections,
                checksum=self.config.checksum,
                events=outbound,
                one_sided=[
                    *([self._gpu.rails] if "cuda_ipc" in paths else []),
                    *([self._fabric.rails] if self._fabric is not None and "rdma" in paths else []),
                ],
                staging=self._staging,
            )
        )
        return outbound

    def submit(
        self,
        plan: CopyPlan,
        *,
        to: Peer,
        key: int | None = None,
        priority: Priority = Priority.FOREGROUND,
        deadline: float | None = None,
        urgent: bool = False,
    ) -> Transfer:
        """Copy `plan`'s ranges from this process's memory into the peer's.

        Args:
            key: of the grant; the peer's own if None.
            priority: foreground KV, prefetch or migration: a lower one never delays a higher one by more than
                a slice per rail.
            deadline: seconds from now, after which it fails.
            urgent: never wait for others to be sent along, however busy the link is.
        """
        key = to.key if key is None else key
        return to.outbound.submit(key, plan, priority=priority, deadline=deadline, urgent=urgent)

    def write_now(self, plan: CopyPlan, *, to: Peer, key: int | None = None, timeout: float = 30.0) -> None:
        """Copy, and return when all has landed: the shortest way for a small write on an idle link.

        Args:
            timeout: seconds after which it fails.

        Raises:
            TransferError: It failed; nothing of it is under way.
        """
        to.outbound.write_now(to.key if key is None else key, plan, timeout)

    def write(self, peer: Peer, source: Any, *, offset: int = 0, **options: Any) -> Transfer:
        """Copy a whole array to `offset` in the memory that the peer offered; `options` as for `submit`."""
        src, dst, length = peer.place(region_of(source), offset)
        return self.submit(CopyPlan.of(src, dst, length), to=peer, **options).keep(source)

    def read(self, peer: Peer, into: Any, *, offset: int = 0, deadline: float | None = None) -> Transfer:
        """Fill a whole array from `offset` in the memory that the peer offered: the peer is asked to push."""
        dst, src, length = peer.place(region_of(into), offset)
        return self._pulls.read(peer, CopyPlan.of(src, dst, length), deadline).keep(into)

    def cancel(self, transfer: Transfer) -> None:
        """Give up what has not been sent of a transfer."""
        transfer.cancel()

    def close(self) -> None:
        """Hang up on all peers, stop listening, end all threads; transfers that run end with an error."""
        with self._ticking:
            self._closed = True
            self._ticking.notify()
        for outbound in list(self._outbounds):
            outbound.close()
        self.inbound.close()
        if self._fabric is not None:
            self._fabric.close()
        self._gpu.close()
        self._regions.clear()

    @property
    def outbounds(self) -> tuple[Outbound, ...]:
        """The links to all targets, for metrics."""
        return tuple(self._outbounds)

    # ------------------------------------------------------------------ inside

    def _register_on_nics(self, region: Region) -> None:
        if self._fabric is None:
            return
        try:
            self._fabric.register(region)
        except TransportError as refused:
            if not region.on_gpu or self.config.paths == ("rdma",):
                raise
            logger.warning("no rdma for memory of %s: %s", region.location, refused)
            self._without_nics.add(region)

    def _paths(self, regions: Sequence[Region]) -> tuple[str, ...]:
        on_gpu = [region.on_gpu for region in regions]
        possible = {
            "cuda_ipc": bool(on_gpu) and all(on_gpu) and self._gpu.usable,
            "process_vm": not any(on_gpu),
            "rdma": self._fabric is not None and not self._without_nics,
        }
        return tuple(path for path in self.config.paths if possible.get(path, True))

    def readable(self, peer: str, plan: CopyPlan) -> bool:
        """Whether all that `plan` reads was offered to this peer."""
        offered = self._offered.get(peer)
        return offered is not None and offered.cover(plan.src, plan.length)

    def serve(self, topic: str, handler: Callable[[str, bytes], bytes]) -> None:
        """Answer questions of initiators; see `Target.serve`."""
        self._receiver.serve(topic, handler)

    def _link_down(self, peer: str, reason: str) -> None:
        self.inbound.link_down(peer)
        self._pulls.link_down(peer, reason)
        self._on_link_down(peer, reason)

    def _wake(self, due: float) -> None:
        """Something is due, maybe earlier than the clock's thread will look."""
        if self._wake_at is None or due < self._wake_at:
            with self._ticking:
                self._ticking.notify()

    def _next_tick(self) -> float | None:
        times = [outbound.next_tick() for outbound in list(self._outbounds)]
        times.append(self.inbound.next_tick())
        return min((t for t in times if t is not None), default=None)

    def _tick(self) -> None:
        while not self._closed:
            with self._ticking:
                self._wake_at = None  # until it is known, everybody has to say so
                self._wake_at = self._next_tick()
                now = time.monotonic()
                if not self._closed:
                    # Whoever has a link's turn may be late: asking again and again would make it later.
                    pause = None if self._wake_at is None else max(self._wake_at - now, CLOCK_S)
                    self._ticking.wait(pause)
                self._wake_at = 0.0  # awake, and about to look again
            now = time.monotonic()
            try:
                for outbound in list(self._outbounds):
                    if (due := outbound.next_tick()) is not None and due <= now:
                        outbound.tick()
                self.inbound.tick(now)
            except Exception:
                logger.exception("the clock goes on after an unexpected error")
