"""Who moves the bytes in transfer.py: this project, the peers, and the limits.

A subject's environment need not be the project's own: whatever it needs is imported where it is used.
"""

import mmap
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]

MOONCAKE_BATCH = 64


class Subject(Protocol):
    """One end of a link between two processes. Pages are given by address: source and target, each [n].

    Attributes:
        bulk: it moves the memory as a whole, pages are not scattered.
    """

    bulk: bool

    def target(self, memory: Array) -> object:
        """Offer this process's memory: what the initiator needs to reach it."""

    def initiator(self, memory: Array, offer: Any) -> None:
        """Connect, and make this process's memory ready to be sent."""

    def copy(self, src: Array, dst: Array, page: int) -> None:
        """Copy pages, and return when they have landed."""

    def prepared(self, src: Array, dst: Array, page: int) -> Callable[[], None]:
        """`copy` of always the same pages, with all that can be done beforehand done."""


class Ours:
    """A link of this project.

    Args:
        settings: of `TransferConfig`.
    """

    bulk = False

    def __init__(self, **settings: Any) -> None:
        from mooncake_connector.config import TransferConfig
        from mooncake_connector.kv_transfer.engine import TransferEngine

        self._engine = TransferEngine(TransferConfig(**settings))

    def target(self, memory: Array) -> object:
        return self._engine.offer([self._engine.register(memory)])

    def initiator(self, memory: Array, offer: Any) -> None:
        self._engine.register(memory)
        self._peer = self._engine.connect(offer)

    def copy(self, src: Array, dst: Array, page: int) -> None:
        self._engine.submit(_plan(src, dst, page), to=self._peer).wait()

    def prepared(self, src: Array, dst: Array, page: int) -> Callable[[], None]:
        plan = _plan(src, dst, page)
        if hasattr(self._engine, "write_now"):
            return partial(self._engine.write_now, plan, to=self._peer)
        return lambda: self._engine.submit(plan, to=self._peer).wait()

    def storm(self, src: Array, dst: Array, nbytes: int, outstanding: int, urgent: bool) -> float:
        """Each page as a message of its own, from one thread; the seconds until the last has landed.

        Args:
            outstanding: messages that are under way at most, and half as many at least until the end.
            urgent: without aggregation.
        """
        plans = [_plan(src[at : at + 1], dst[at : at + 1], nbytes) for at in range(src.size)]
        under_way: deque[Any] = deque()
        start = time.perf_counter()
        for plan in plans:
            if len(under_way) == outstanding:
                # Waiting for the oldest alone would be a switch of threads for each message.
                under_way[outstanding // 2].wait()
                for _ in range(outstanding // 2):
                    under_way.popleft().wait()
            under_way.append(self._engine.submit(plan, to=self._peer, urgent=urgent))
        for transfer in under_way:
            transfer.wait()
        return time.perf_counter() - start


def _plan(src: Array, dst: Array, page: int) -> Any:
    from mooncake_connector.kv_transfer.plan import CopyPlan

    return CopyPlan.of(src, dst, np.full(src.size, page))


class Nixl:
    """NIXL's write through UCX, which chooses its transport by UCX_TLS; descriptors are made beforehand."""

    bulk = False

    def target(self, memory: Array) -> object:
        self._agent = agent = self._made("target", memory)

        def progress() -> None:
            while True:
                agent.get_new_notifs()
                time.sleep(0.0005)

        threading.Thread(target=progress, daemon=True).start()
        return agent.get_agent_metadata()

    def initiator(self, memory: Array, offer: Any) -> None:
        self._agent = self._made("initiator", memory)
        peer = self._agent.add_remote_agent(offer)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer
        self._ready: dict[object, Callable[[], None]] = {}

    def copy(self, src: Array, dst: Array, page: int) -> None:
        key = (src.tobytes(), page)
        if key not in self._ready:
            self._ready[key] = self.prepared(src, dst, page)
        self._ready[key]()

    def prepared(self, src: Array, dst: Array, page: int) -> Callable[[], None]:
        agent = self._agent
        sides = (agent.get_xfer_descs([(int(at), page, 0) for at in side], "DRAM") for side in (src, dst))
        handle = agent.initialize_xfer("WRITE", *sides, self._peer, b"")

        def write() -> None:
            state = agent.transfer(handle)
            while state not in ("DONE", "ERR"):
                state = agent.check_xfer_state(handle)
            assert state == "DONE", state

        return write

    def _made(self, name: str, memory: Array) -> Any:
        from nixl._api import nixl_agent, nixl_agent_config

        agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        agent.register_memory([(memory.ctypes.data, memory.size, 0, "")], "DRAM")
        return agent


class MooncakeTcp:
    """Mooncake's transfer engine over TCP."""

    bulk = False

    def target(self, memory: Array) -> object:
        self._engine = self._made(memory)
        return f"127.0.0.1:{self._engine.get_rpc_port()}"

    def initiator(self, memory: Array, offer: Any) -> None:
        self._engine = self._made(memory)
        self._offer = offer

    def copy(self, src: Array, dst: Array, page: int) -> None:
        rows = src.tolist(), dst.tolist(), [page] * src.size
        # Its TCP path refuses batches of some hundred pages.
        for at in range(0, src.size, MOONCAKE_BATCH):
            self._write(*(row[at : at + MOONCAKE_BATCH] for row in rows))

    def prepared(self, src: Array, dst: Array, page: int) -> Callable[[], None]:
        return partial(self._write, src.tolist(), dst.tolist(), [page] * src.size)

    def _write(self, src: list[int], dst: list[int], length: list[int]) -> None:
        ended = self._engine.batch_transfer_sync_write(self._offer, src, dst, length)
        assert ended == 0, ended

    def _made(self, memory: Array) -> Any:
        from mooncake.engine import TransferEngine

        engine = TransferEngine()
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        assert engine.register_memory(memory.ctypes.data, memory.size) == 0
        return engine


class Socket:
    """A limit: one TCP connection, the whole memory by one sendall into one recv_into, no pages."""

    bulk = True

    def target(self, memory: Array) -> object:
        def serve(sock: socket.socket) -> None:
            while head := sock.recv(8, socket.MSG_WAITALL):
                view = memoryview(memory)[: int.from_bytes(head, "little")]
                while view:
                    view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]
                sock.sendall(b"!")

        return _listen(serve)

    def initiator(self, memory: Array, offer: Any) -> None:
        self._memory = memoryview(memory)
        self._sock = _connect(offer)

    def copy(self, src: Array, dst: Array, page: int) -> None:
        nbytes = src.size * page
        self._sock.sendall(nbytes.to_bytes(8, "little"))
        self._sock.sendall(self._memory[:nbytes])
        self._sock.recv(1)

    def prepared(self, src: Array, dst: Array, page: int) -> Callable[[], None]:
        return partial(self.copy, src, dst, page)


class BareRead:
    """A limit: two threads of the target call process_vm_readv on the list of pages, and nothing else."""

    bulk = False

    def target(self, memory: Array) -> object:
        return _listen(self._read_all)

    def _read_all(self, sock: socket.socket) -> None:
        from mooncake_connector.kv_transfer.transport.syscalls import Scatter, read_process

        def read(rows: Array) -> None:
            place, source = (Scatter(rows[side], rows[2]) for side in (1, 0))
            while place.left:
                got = read_process(pid, place, source)
                place.advance(got)
                source.advance(got)

        while head := sock.recv(16, socket.MSG_WAITALL):
            pid, count = np.frombuffer(head, np.uint64).tolist()
            rows = np.empty((3, count), np.uint64)
            sock.recv_into(rows, rows.nbytes, socket.MSG_WAITALL)
            first, *others = np.array_split(rows, min(2, count), axis=1)
            readers = [threading.Thread(target=read, args=(half,)) for half in others]
            for reader in readers:
                reader.start()
            read(first)
            for reader in readers:
                reader.join()
            sock.sendall(b"!")

    def initiator(self, memory: Array, offer: Any) -> None:
        self._sock = _connect(offer)

    def copy(self, src: Array, dst: Array, page: int) -> None:
        self.prepared(src, dst, page)()

    def prepared(self, src: Array, dst: Array, page: int) -> Callable[[], None]:
        rows = np.stack((src, dst, np.full(src.size, page))).astype(np.uint64)
        asked = np.array([os.getpid(), src.size], np.uint64).tobytes() + rows.tobytes()

        def write() -> None:
            self._sock.sendall(asked)
            self._sock.recv(1)

        return write


def _listen(serve: Callable[[socket.socket], None]) -> int:
    """Serve one connection in a thread: the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        sock = listener.accept()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        serve(sock)

    threading.Thread(target=accept, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "process_vm": partial(Ours, path="process_vm"),
    "tcp": partial(Ours, path="tcp"),
    "tcp/1": partial(Ours, path="tcp", connections=1),
    "tcp/3": partial(Ours, path="tcp", connections=3),
    "tcp/4": partial(Ours, path="tcp", connections=4),
    "process_vm/checksum": partial(Ours, path="process_vm", checksum=True),
    "tcp/checksum": partial(Ours, path="tcp", checksum=True),
    "nixl": Nixl,
    "nixl-tcp": Nixl,
    "mooncake-tcp": MooncakeTcp,
    "process_vm_readv": BareRead,
    "socket": Socket,
}
"""``memcpy``, a limit as well, needs no second process: see `transfer_pair.measure_memcpy`."""


def memory_of(nbytes: int) -> Array:
    """Touched anonymous memory in ordinary pages, as an engine's allocator gives for its KV cache."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = np.frombuffer(mmap.mmap(-1, nbytes, flags), np.uint8)
    pages[:] = 0
    return pages
