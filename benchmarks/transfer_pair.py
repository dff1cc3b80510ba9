"""One subject's part of transfer.py: bytes from one process's memory into another's, page by page.

Runs in the subject's own environment (numpy is all that the peers' one has) and prints a line of JSON for
each page size: {"page_bytes", "seconds": [...], "latency": [...]}, the last in seconds for one page of 4 KiB.
The target's pages are scattered at random. Each page size starts with one untimed transfer into zeroed
memory, all of which the target then compares with what it should hold.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Transfer = Callable[[Array, Array, int], None]
"""Copy pages: source addresses [n], target addresses [n], bytes of a page."""

SEED = 11
MOONCAKE_BATCH = 64
LATENCY_BYTES = 4096
LATENCY_SAMPLES = 200


class Ours:
    """A link of this project; `path` as `open_link` takes it."""

    bulk = False

    def __init__(self, path: str) -> None:
        self._path = path

    def target(self, memory: Array) -> object:
        from mooncake_connector.kv_transfer.memory import Ranges
        from mooncake_connector.kv_transfer.transport import Receiver

        self._receiver = Receiver()
        self._receiver.grant(1, "bench", Ranges.of(np.array([memory.ctypes.data]), np.array([memory.size])))
        return self._receiver.admit("bench")

    def initiator(self, memory: Array, offer: Any) -> Transfer:
        from mooncake_connector.kv_transfer.plan import CopyPlan
        from mooncake_connector.kv_transfer.transport import open_link

        link = open_link(self._path, offer, name="bench", on_down=print)

        def transfer(src: Array, dst: Array, page: int) -> None:
            ended: list[str | None] = []
            landed = threading.Event()

            def done(reason: str | None) -> None:
                ended.append(reason)
                landed.set()

            link.write(1, CopyPlan.of(src, dst, np.full(src.size, page)), done)
            landed.wait()
            assert ended == [None], ended

        return transfer


class Nixl:
    """NIXL's write through UCX, which chooses its transport by UCX_TLS."""

    bulk = False

    def target(self, memory: Array) -> object:
        self._agent = agent = self._made("target", memory)

        def progress() -> None:
            while True:
                agent.get_new_notifs()
                time.sleep(0.0005)

        threading.Thread(target=progress, daemon=True).start()
        return agent.get_agent_metadata()

    def initiator(self, memory: Array, offer: Any) -> Transfer:
        agent = self._made("initiator", memory)
        peer = agent.add_remote_agent(offer)
        peer = peer.decode() if isinstance(peer, bytes) else peer
        prepared: dict[object, Any] = {}

        def transfer(src: Array, dst: Array, page: int) -> None:
            key = (src.tobytes(), page)
            if key not in prepared:
                sides = (
                    agent.get_xfer_descs([(int(at), page, 0) for at in side], "DRAM") for side in (src, dst)
                )
                prepared[key] = agent.initialize_xfer("WRITE", *sides, peer, b"")
            state = agent.transfer(prepared[key])
            while state not in ("DONE", "ERR"):
                state = agent.check_xfer_state(prepared[key])
            assert state == "DONE", state

        return transfer

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

    def initiator(self, memory: Array, offer: Any) -> Transfer:
        engine = self._made(memory)

        def transfer(src: Array, dst: Array, page: int) -> None:
            rows = src.tolist(), dst.tolist(), [page] * src.size
            # Its TCP path refuses batches of some hundred pages.
            for at in range(0, src.size, MOONCAKE_BATCH):
                ended = engine.batch_transfer_sync_write(
                    offer, *(row[at : at + MOONCAKE_BATCH] for row in rows)
                )
                assert ended == 0, ended

        return transfer

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

        return listen(serve)

    def initiator(self, memory: Array, offer: Any) -> Transfer:
        sock = connect(offer)

        def transfer(src: Array, dst: Array, page: int) -> None:
            nbytes = src.size * page
            sock.sendall(nbytes.to_bytes(8, "little"))
            sock.sendall(memoryview(memory)[:nbytes])
            sock.recv(1)

        return transfer


class BareRead:
    """A limit: two threads of the target call process_vm_readv on the list of pages, and nothing else."""

    bulk = False

    def target(self, memory: Array) -> object:
        return listen(self._read_all)

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
            readers = [
                threading.Thread(target=read, args=(half,)) for half in np.array_split(rows, 2, axis=1)
            ]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            sock.sendall(b"!")

    def initiator(self, memory: Array, offer: Any) -> Transfer:
        sock = connect(offer)

        def transfer(src: Array, dst: Array, page: int) -> None:
            rows = np.stack((src, dst, np.full(src.size, page))).astype(np.uint64)
            sock.sendall(np.array([os.getpid(), src.size], np.uint64).tobytes() + rows.tobytes())
            sock.recv(1)

        return transfer


def listen(serve: Callable[[socket.socket], None]) -> int:
    """Serve one connection in a thread: the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: serve(listener.accept()[0]), daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


SUBJECTS: dict[str, Callable[[], Any]] = {
    "process_vm": lambda: Ours("process_vm"),
    "tcp": lambda: Ours("tcp"),
    "nixl": Nixl,
    "nixl-tcp": Nixl,
    "mooncake-tcp": MooncakeTcp,
    "process_vm_readv": BareRead,
    "socket": Socket,
}


def memory_of(nbytes: int) -> Array:
    """Touched anonymous memory in ordinary pages, as an engine's allocator gives for its KV cache."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = np.frombuffer(mmap.mmap(-1, nbytes, flags), np.uint8)
    pages[:] = 0
    return pages


def content(nbytes: int) -> Array:
    """What the source holds: uint8 [nbytes]."""
    return np.random.default_rng(SEED).integers(1, 2**63, nbytes // 8, np.uint64).view(np.uint8)


def scatter(nbytes: int, page: int, bulk: bool) -> Array:
    """Which page of the target each page of the source goes to."""
    count = nbytes // page
    return np.arange(count) if bulk else np.random.default_rng(page).permutation(count)


def far_end(subject: str, nbytes: int, pipe: Connection) -> None:
    """The target's process."""
    side = SUBJECTS[subject]()
    memory = memory_of(nbytes)
    pipe.send((side.target(memory), memory.ctypes.data))
    source = content(nbytes)
    while (page := pipe.recv()) is not None:
        memory[:] = 0
        pipe.send("zeroed")
        pipe.recv()
        expected = np.empty((nbytes // page, page), np.uint8)
        expected[scatter(nbytes, page, side.bulk)] = source.reshape(-1, page)
        pipe.send(bool(np.array_equal(memory, expected.reshape(-1))))
    # Peers' libraries have threads that do not always end by themselves.
    os._exit(0)


def measure(subject: str, nbytes: int, pages: list[int], iterations: int) -> None:
    """Measure between this process and a new one, and print the lines."""
    pipe, far = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=far_end, args=(subject, nbytes, far), daemon=True).start()
    memory = memory_of(nbytes)
    memory[:] = content(nbytes)
    offer, base = pipe.recv()
    side = SUBJECTS[subject]()
    transfer = side.initiator(memory, offer)
    latency = [
        timed(transfer, np.array([memory.ctypes.data]), np.array([base]), LATENCY_BYTES)
        for _ in range(LATENCY_SAMPLES)
    ]
    for page in pages:
        pipe.send(page)
        pipe.recv()
        src = memory.ctypes.data + np.arange(nbytes // page) * page
        dst = base + scatter(nbytes, page, side.bulk) * page
        transfer(src, dst, page)
        pipe.send("verify")
        if not pipe.recv():
            raise SystemExit(f"{subject}: what arrived differs from what was sent")
        seconds = [timed(transfer, src, dst, page) for _ in range(iterations)]
        print(json.dumps({"page_bytes": page, "seconds": seconds, "latency": latency}), flush=True)
    pipe.send(None)
    os._exit(0)


def measure_memcpy(nbytes: int, pages: list[int], iterations: int) -> None:
    """A limit: one thread of one process copies the same pages to the same places."""
    source, memory = memory_of(nbytes), memory_of(nbytes)
    source[:] = content(nbytes)
    for page in pages:
        # take() copies whole pages by memcpy; gathering instead of scattering moves the same bytes.
        rows, place, order = source.reshape(-1, page), memory.reshape(-1, page), scatter(nbytes, page, False)

        def transfer(src: Array, dst: Array, page: int) -> None:
            np.take(rows, order, axis=0, out=place, mode="clip")  # noqa: B023

        transfer(order, order, page)
        if not np.array_equal(place, rows[order]):
            raise SystemExit("memcpy: what arrived differs from what was sent")
        seconds = [timed(transfer, order, order, page) for _ in range(iterations)]
        print(json.dumps({"page_bytes": page, "seconds": seconds, "latency": []}), flush=True)


def timed(transfer: Transfer, src: Array, dst: Array, page: int) -> float:
    """Seconds that one transfer takes."""
    start = time.perf_counter()
    transfer(src, dst, page)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=[*SUBJECTS, "memcpy"])
    parser.add_argument("--nbytes", type=int, default=256 << 20)
    parser.add_argument("--pages", type=int, nargs="+", default=[16 << 10, 64 << 10, 256 << 10, 1 << 20])
    parser.add_argument("--iterations", type=int, default=3)
    options = parser.parse_args()
    if options.subject == "memcpy":
        measure_memcpy(options.nbytes, options.pages, options.iterations)
    else:
        measure(options.subject, options.nbytes, options.pages, options.iterations)
