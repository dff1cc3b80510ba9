"""WorkerAgent: the I/O thread of one worker. Owns the sockets and feeds `PrefillEnd` and `DecodeEnd`.

The engine's thread only enqueues calls and takes finished lists; nothing here ever waits for it, or makes it
wait.
"""

import contextlib
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import zmq

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.errors import MooncakeError
from mooncake_connector.kv_transfer.clock import LayerClock
from mooncake_connector.kv_transfer.decode_end import DecodeEnd
from mooncake_connector.kv_transfer.engine import TransferEngine
from mooncake_connector.kv_transfer.layout import WorkerInfo
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.messages import (
    AnyMessage,
    LoadOver,
    LoadReport,
    LocalAbort,
    LocalDirectory,
    LocalDrop,
    LocalExpect,
    LocalFirstToken,
    LocalRelease,
    LocalReserve,
    Message,
    OpenLink,
)
from mooncake_connector.kv_transfer.outbound import Outbound
from mooncake_connector.kv_transfer.paths import choose_paths
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.prefill_end import PrefillEnd
from mooncake_connector.kv_transfer.push import Chunk
from mooncake_connector.kv_transfer.routes import WorkerAt
from mooncake_connector.kv_transfer.side_channel import Client, Server
from mooncake_connector.kv_transfer.transfer import Transfer
from mooncake_connector.kv_transfer.transport import (
    Endpoint,
    Mark,
    SourceIdentity,
    allow_reader,
    identity,
    readable,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.1


class _Prefill:
    """`PrefillPorts` on real sockets and the transfer engine."""

    def __init__(self, agent: "WorkerAgent") -> None:
        self._agent = agent
        self._links: dict[bytes, Outbound] = {}
        self._writes: dict[int, set[Transfer]] = {}

    def send(self, peer: bytes, message: Message) -> None:
        self._agent.server.send(peer, message)

    def open_link(self, peer: bytes, name: str, offer: OpenLink) -> None:
        agent = self._agent
        try:
            self._links[peer] = agent.engine.open(
                name,
                offer.endpoint,
                offer.paths,
                connections=offer.connections,
                on_up=lambda: agent.post(lambda now: agent.prefill.link_up(peer, now)),
                on_down=lambda reason: agent.post(partial(self._down, peer, reason)),
            )
        except MooncakeError as e:
            agent.post(partial(self._down, peer, str(e)))

    def _down(self, peer: bytes, reason: str, now: float) -> None:
        self._links.pop(peer, None)
        self._agent.prefill.link_down(peer, reason, now)

    def write(self, peer: bytes, key: int, op: int, plan: CopyPlan) -> None:
        agent = self._agent
        transfer = self._links[peer].submit(key, plan)
        self._writes.setdefault(key, set()).add(transfer)

        def ended(now: float) -> None:
            writes = self._writes[key]
            writes.discard(transfer)
            if not writes:
                del self._writes[key]
            agent.prefill.write_ended(key, op, transfer.error, now)

        transfer.add_done_callback(lambda _: agent.post(ended))

    def cancel(self, key: int) -> None:
        for transfer in self._writes.get(key, ()):
            transfer.cancel()

    def marks(self, peer: bytes) -> tuple[Mark, ...]:
        link = self._links.get(peer)
        return link.marks() if link is not None else ()

    def close_link(self, peer: bytes) -> None:
        if (link := self._links.pop(peer, None)) is not None:
            link.close()

    def allow_reader(self, pid: int) -> None:
        allow_reader(pid)

    def sent(self, request_id: str) -> None:
        self._agent.sent.put(request_id)


class _Decode:
    """`DecodePorts` on real sockets and the transfer engine."""

    def __init__(self, agent: "WorkerAgent") -> None:
        self._agent = agent
        self._next = 0

    def dial(self, address: str) -> int:
        self._next += 1
        self._agent.add_client(self._next, Client(self._agent.context, address))
        return self._next

    def send(self, peer: int, message: Message) -> None:
        agent = self._agent
        client = agent.clients.get(peer)
        if client is None or not client.send(message):
            agent.post(lambda now: agent.decode.peer_lost(peer, "it takes no messages", now))

    def hang_up(self, peer: int, name: str) -> None:
        self._agent.remove_client(peer)
        self._agent.engine.inbound.drop(name)

    def choose_paths(self, source: SourceIdentity, theirs: Sequence[str]) -> tuple[tuple[str, ...], str]:
        engine = self._agent.engine
        return choose_paths(
            engine.config,
            engine.paths,
            theirs,
            readable(source),
            elsewhere=source.host_id != identity().host_id,
        )

    def admit(self, name: str, paths: Sequence[str]) -> Endpoint:
        return self._agent.engine.inbound.admit(name, paths=paths)

    def grant(self, key: int, name: str, ranges: Ranges) -> None:
        self._agent.engine.inbound.grant(key, name, ranges)

    def fence(self, key: int) -> None:
        agent = self._agent
        agent.engine.inbound.fence(key, lambda: agent.post(lambda now: agent.decode.fenced(key, now)))

    def ungrant(self, key: int) -> None:
        self._agent.engine.inbound.revoke(key)

    def await_marks(self, name: str, marks: Sequence[Mark], then: Callable[[float], None]) -> None:
        agent = self._agent
        agent.engine.inbound.await_marks(name, marks, lambda: agent.post(then))

    def report(self, report: LoadReport) -> None:
        # The scheduler, once told, relies on our next step's output to say the same.
        if not report.token_only:
            self._agent.reports.put(report)
        self._agent.server.send(self._agent.scheduler, LoadOver(report))


class WorkerAgent:
    """One worker's end of everything: start it once the KV caches exist.

    Args:
        info: this worker, as told to peers.
        clock: of the engine's forward passes; by default for KV in host memory.

    Attributes:
        address: control address, for peers and for the engine's own scheduler.
        token: proves local messages; hand it to the scheduler only.
        clock: to be told how far the forward passes are.
        busy: whether anybody waits for pushes (read without a lock by the engine's thread).

    Raises:
        ConfigError: the side channel's address can't be bound.
    """

    def __init__(self, info: WorkerInfo, config: ConnectorConfig, clock: LayerClock | None = None) -> None:
        self.config, self.info = config, info
        self.token = secrets.token_bytes(16)
        self.clock = clock or LayerClock(info.layout.num_layers)
        self.busy = False
        self.scheduler = b""  # the side channel's name of it
        self.sent: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[LoadReport] = queue.SimpleQueue()
        host, port = config.side_channel_host, config.side_channel_port
        if port:
            port += 2 * info.index
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.server = Server(self.context, host, port)
        self.address = self.server.address
        self.engine = TransferEngine(
            config,
            host=host,
            port=port + 1 if port else 0,
            on_link_up=lambda name: self.post(lambda now: self.decode.link_up(name, now)),
            on_link_down=lambda name, why: self.post(lambda now: self.decode.link_down(name, why, now)),
        )
        for region in info.layout.regions():
            self.engine.register(region)
        self.clients: dict[int, Client] = {}
        self._prefill_ports, self._decode_ports = _Prefill(self), _Decode(self)
        self.prefill = PrefillEnd(
            info, identity(), config, self._prefill_ports, self.clock, self.engine.paths
        )
        self.decode = DecodeEnd(
            info, config, self._decode_ports, pid=os.getpid(), first_key=secrets.randbits(62)
        )
        if info.tp_size == info.pp_size == 1:
            self.directory((WorkerAt(self.address, info),))
        self._inbox: queue.SimpleQueue[Callable[[float], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._awake = False
        self._stop = False
        self._poller = zmq.Poller()
        self._poller.register(self.server.socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="mooncake-io", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ any thread

    def post(self, call: Callable[[float], None]) -> None:
        """Run `call(now)` on the I/O thread, after all that was posted before."""
        self._inbox.put(call)
        self.wake()

    def wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # closed
                os.eventfd_write(self._wake, 1)

    def step(
        self, step: int, chunks: Sequence[Chunk], preempted: Sequence[str], ended: Sequence[tuple[str, bool]]
    ) -> None:
        """A forward pass is about to run; what the scheduler decided for it."""

        def apply(now: float) -> None:
            self.prefill.preempted(preempted)
            for request_id, held in ended:
                self.prefill.ended(request_id, held, now)
            self.prefill.step(step, chunks, now)

        self.post(apply)

    def directory(self, workers: Sequence[WorkerAt]) -> None:
        """All workers of this engine. To be called on the I/O thread, or before it runs."""
        self.prefill.directory(workers)
        self.decode.directory(workers)

    def take_sent(self) -> set[str]:
        """Finished requests whose blocks may be freed, since the last call."""
        return set(_drain(self.sent))

    def take_reports(self) -> list[LoadReport]:
        """Loads that ended since the last call."""
        return _drain(self.reports)

    def close(self) -> None:
        """Hang up on all peers and stop the thread."""
        self._stop = True
        self.post(lambda now: None)
        self._thread.join(2)

    # ------------------------------------------------------------------ I/O thread

    def add_client(self, peer: int, client: Client) -> None:
        self.clients[peer] = client
        self._poller.register(client.socket, zmq.POLLIN)
        self._poller.register(client.monitor, zmq.POLLIN)

    def remove_client(self, peer: int) -> None:
        if (client := self.clients.pop(peer, None)) is not None:
            self._poller.unregister(client.socket)
            self._poller.unregister(client.monitor)
            client.close()

    def _run(self) -> None:
        last_tick = 0.0
        while not self._stop:
            active = self.prefill.num_transfers or self.decode.num_loads or self.clients
            self._poller.poll(round(1000 * TICK_S) if active else 1000)
            self._guard(self._drain_inbox)
            self._guard(self._drain_sockets)
            if time.monotonic() - last_tick >= TICK_S:
                last_tick = time.monotonic()
                self._guard(self.prefill.tick, last_tick)
                self._guard(self.decode.tick, last_tick)
            self._guard(self.prefill.pump, time.monotonic())
            self.busy = self.prefill.num_transfers > 0
        self.engine.close()
        for peer in list(self.clients):
            self.remove_client(peer)
        self.server.close()
        self.context.term()
        os.close(self._wake)

    def _guard(self, call: Callable[..., None], *args: float) -> None:
        try:
            call(*args)
        except Exception:  # one request's trouble must not stop all others; its deadline ends it
            logger.exception("the transfer thread goes on after an unexpected error")

    def _drain_inbox(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._awake = False
        while True:
            try:
                call = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._guard(call, time.monotonic())

    def _drain_sockets(self) -> None:
        while (received := self.server.receive()) is not None:
            self._guard(partial(self._serve, *received), time.monotonic())
        for peer, client in list(self.clients.items()):
            while self.clients.get(peer) is client and (message := client.receive()) is not None:
                self._guard(partial(self.decode.message, peer, message), time.monotonic())
            if self.clients.get(peer) is client and (reason := client.lost()) is not None:
                self._guard(partial(self.decode.peer_lost, peer, reason), time.monotonic())

    def _serve(self, peer: bytes, message: AnyMessage, now: float) -> None:
        token = getattr(message, "token", None)
        if token is None:
            self.prefill.message(peer, message, now)
            return
        if not secrets.compare_digest(token, self.token):
            logger.warning("ignored a %s with a wrong token", type(message).__name__)
            return
        match message:
            case LocalDirectory():
                self.scheduler = peer
                self.directory(message.workers)
            case LocalExpect():
                self.prefill.expect(message.request_id, message.transfer_id, message.prompt_hash, now)
            case LocalFirstToken():
                self.prefill.first_token(message.request_id, message.first_token, now)
            case LocalDrop():
                self.prefill.drop(message.transfer_id, now)
            case LocalReserve():
                self.decode.reserve(message, now)
            case LocalAbort():
                self.decode.abort(message.request_id, now)
            case LocalRelease():
                self.decode.release(message, now)


def _drain(items: "queue.SimpleQueue[T]") -> list[T]:
    taken = []
    while True:
        try:
            taken.append(items.get_nowait())
        except queue.Empty:
            return taken
