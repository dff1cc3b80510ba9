"""Who moves the bytes in gpu.py: this project, the peers, and the limits.

A subject's environment need not be the project's own: whatever it needs is imported where it is used.
"""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
from gpu_memory import Array, CudaMemory, HostMemory, Move
from gpu_tuning import tuned

Memory = HostMemory | CudaMemory
Start = Callable[[int], Callable[[], None]]
"""Begin a transfer in slot 0 or 1, each of which has one under way at most; what it returns waits for it."""

LIMIT_S = 10.0
"""Seconds that a transfer may take."""
SOCKETS = 2
"""As many as tcp uses by default."""
PINNED_BYTES = 256 << 20


class Subject(Protocol):
    """One end of a link between two processes."""

    def offer(self, memory: Memory) -> object:
        """In the target: what the initiator needs to write into its memory, another one each time."""

    def connect(self, memory: Memory, offer: Any, settings: dict[str, Any]) -> None:
        """In the initiator: be ready to write from its memory; what was connected before is given up.

        Settings in capitals are constants of the project's transports, and set by `gpu_tuning.tune` before.
        """

    def prepare(self, move: Move) -> Start:
        """In the initiator: do all that can be done before the first such transfer."""


class Ours:
    """This project, by its public interface.

    Args:
        path: of `TransferConfig`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._engine: Any = None

    def offer(self, memory: Memory) -> object:
        self._engine = self._engine or self._made({})
        return self._engine.offer([self._engine.register(memory.words)])

    def connect(self, memory: Memory, offer: Any, settings: dict[str, Any]) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._made(settings)
        self._engine.register(memory.words)
        self._peer = self._engine.connect(offer)
        self._base = memory.address

    def prepare(self, move: Move) -> Start:
        plan = plan_of(move, self._base, self._peer.regions[0].address)

        def start(slot: int) -> Callable[[], None]:
            transfer = self._engine.submit(plan, to=self._peer, deadline=LIMIT_S)
            return partial(transfer.wait, LIMIT_S + 1)

        return start

    def _made(self, settings: dict[str, Any]) -> Any:
        from mooncake_connector.config import TransferConfig
        from mooncake_connector.kv_transfer.engine import TransferEngine

        own = {name: value for name, value in settings.items() if not tuned(name)}
        return TransferEngine(TransferConfig(path=self._path, **own))


def plan_of(move: Move, src_base: int, dst_base: int) -> Any:
    """The move as the project's `CopyPlan`."""
    from mooncake_connector.kv_transfer.plan import CopyPlan, Tile

    src, dst = addresses(move, src_base, dst_base)
    if move.swap is None:
        return CopyPlan.of(src, dst, np.full(src.size, move.page))
    outer, inner = move.swap
    run = move.page // (outer * inner)
    return CopyPlan.tiled(src, dst, Tile.of(run, [(outer, inner * run, run), (inner, run, outer * run)]))


def addresses(move: Move, src_base: int, dst_base: int) -> tuple[Array, Array]:
    """Of each page in source and target: uint64 [n]."""
    bases = (move.src, src_base), (move.dst, dst_base)
    src, dst = (np.uint64(base) + pages.astype(np.uint64) * np.uint64(move.page) for pages, base in bases)
    return src, dst


class Nixl:
    """NIXL's write through UCX, which chooses its own way; descriptors are made beforehand.

    Args:
        kind: of memory, as NIXL calls it.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._agent: Any = None

    def offer(self, memory: Memory) -> object:
        if self._agent is None:
            self._agent = agent = self._made("target", memory)

            def progress() -> None:
                while True:
                    agent.get_new_notifs()
                    time.sleep(0.0005)

            threading.Thread(target=progress, daemon=True).start()
        return self._agent.get_agent_metadata(), memory.address, memory.device

    def connect(self, memory: Memory, offer: Any, settings: dict[str, Any]) -> None:
        metadata, self._far, self._far_device = offer
        self._agent = self._made("initiator", memory)
        peer = self._agent.add_remote_agent(metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer
        self._near, self._near_device = memory.address, memory.device

    def prepare(self, move: Move) -> Start:
        devices = self._near_device, self._far_device
        local, remote = (
            self._agent.get_xfer_descs(descriptors(side, move.page, device), self._kind)
            for side, device in zip(addresses(move, self._near, self._far), devices, strict=True)
        )
        handles = [self._agent.initialize_xfer("WRITE", local, remote, self._peer, b"") for _ in range(2)]

        def start(slot: int) -> Callable[[], None]:
            state = self._agent.transfer(handles[slot])
            return partial(self._await, handles[slot], state)

        return start

    def _await(self, handle: Any, state: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while state == "PROC" and time.monotonic() < deadline:
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL's transfer is {state} after {LIMIT_S} s at most")

    def _made(self, name: str, memory: Memory) -> Any:
        from nixl._api import nixl_agent, nixl_agent_config

        agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        agent.register_memory([(memory.address, memory.nbytes, memory.device, "")], self._kind)
        return agent


def descriptors(address: Array, page: int, device: int) -> Array:
    """NIXL's: uint64 [n, 3] of address, bytes and device."""
    rows = np.empty((address.size, 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = address, page, device
    return rows


class Mooncake:
    """Mooncake's transfer engine.

    Args:
        protocol: its name for a way; ``nvlink_intra`` needs MC_INTRANODE_NVLINK in the environment, too.
        batch: pages that it takes at once; 0: all.
    """

    def __init__(self, protocol: str, batch: int = 0) -> None:
        self._protocol, self._batch = protocol, batch
        self._engine: Any = None

    def offer(self, memory: Memory) -> object:
        self._engine = self._engine or self._made(memory)
        return f"127.0.0.1:{self._engine.get_rpc_port()}", memory.address

    def connect(self, memory: Memory, offer: Any, settings: dict[str, Any]) -> None:
        self._engine = self._made(memory)
        self._peer, self._far = offer
        self._near = memory.address

    def prepare(self, move: Move) -> Start:
        src, dst = addresses(move, self._near, self._far)
        length = np.full(src.size, move.page, np.uint64)
        if self._batch:
            step = self._batch
            rows = [
                tuple(row[at : at + step].tolist() for row in (src, dst, length))
                for at in range(0, src.size, step)
            ]
            return lambda slot: partial(self._write, rows)
        if hasattr(self._engine, "batch_transfer_async_write_arrays"):
            return lambda slot: self._started(
                self._engine.batch_transfer_async_write_arrays(self._peer, src, dst, length)
            )
        lists = src.tolist(), dst.tolist(), length.tolist()
        return lambda slot: self._started(self._engine.batch_transfer_async_write(self._peer, *lists))

    def _started(self, batch: int) -> Callable[[], None]:
        if not batch:
            raise RuntimeError("Mooncake's engine refused the batch; its log above says why")

        def wait() -> None:
            if self._engine.get_batch_transfer_status([batch]) != 0:
                raise RuntimeError("Mooncake's transfer failed; its log above says why")

        return wait

    def _write(self, batches: list[Any]) -> None:
        for batch in batches:
            if self._engine.batch_transfer_sync_write(self._peer, *batch) != 0:
                raise RuntimeError("Mooncake's transfer failed; its log above says why")

    def _made(self, memory: Memory) -> Any:
        from mooncake.engine import TransferEngine

        engine = TransferEngine()
        if engine.initialize("127.0.0.1", "P2PHANDSHAKE", self._protocol, "") != 0:
            raise RuntimeError(
                f"Mooncake's engine can't be had with {self._protocol}; its log above says why"
            )
        if engine.register_memory(memory.address, memory.nbytes) != 0:
            raise RuntimeError("Mooncake's engine can't register the memory; its log above says why")
        return engine


class Socket:
    """A limit: all of it, in order, from host memory over a few TCP connections, one thread each."""

    def offer(self, memory: Memory) -> object:
        listener = socket.create_server(("127.0.0.1", 0))
        parts = np.array_split(memory.words, SOCKETS)

        def serve(part: Array) -> None:
            sock = listener.accept()[0]
            number = sock.recv(1)[0]
            while sock.recv(1):
                view = memoryview(parts[number]).cast("B")
                while view:
                    view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]
                sock.sendall(b"!")

        for part in parts:
            threading.Thread(target=serve, args=(part,), daemon=True).start()
        return listener.getsockname()[1]

    def connect(self, memory: Memory, offer: Any, settings: dict[str, Any]) -> None:
        self._parts = [memoryview(part).cast("B") for part in np.array_split(memory.words, SOCKETS)]
        self._socks = [socket.create_connection(("127.0.0.1", offer)) for _ in self._parts]
        for number, sock in enumerate(self._socks):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(bytes([number]))
        self._threads = [ThreadPoolExecutor(1) for _ in self._parts]  # each sends in order

    def prepare(self, move: Move) -> Start:
        def send(sock: socket.socket, part: memoryview) -> None:
            sock.sendall(b"?")
            sock.sendall(part)
            sock.recv(1)

        def start(slot: int) -> Callable[[], None]:
            links = zip(self._threads, self._socks, self._parts, strict=True)
            sent = [thread.submit(send, sock, part) for thread, sock, part in links]

            def wait() -> None:
                for part in sent:
                    part.result(LIMIT_S)

            return wait

        return start


class PeerCopy:
    """A limit: one copy of it all from one GPU to the other, in one process."""

    def __init__(self, source: CudaMemory, target: CudaMemory) -> None:
        self._source, self._target = source, target

    def prepare(self, move: Move) -> Start:
        import torch

        near, far = (memory.words[: move.nbytes // 8] for memory in (self._source, self._target))

        def start(slot: int) -> Callable[[], None]:
            far.copy_(near, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._source.device))
            return done.synchronize

        return start


class PinnedCopy:
    """A limit of staging: from one GPU into page-locked memory, and from such memory into the other GPU."""

    def __init__(self, source: CudaMemory, target: CudaMemory) -> None:
        self._source, self._target = source, target

    def prepare(self, move: Move) -> Start:
        import torch

        words = min(PINNED_BYTES, self._source.nbytes) // 8
        out, into = (torch.empty(words, dtype=torch.int64, pin_memory=True) for _ in range(2))
        into.copy_(self._source.words[:words])
        near, far = (torch.cuda.Stream(memory.device) for memory in (self._source, self._target))

        def start(slot: int) -> Callable[[], None]:
            for at in range(0, move.nbytes // 8, words):
                part = slice(at, at + words)
                with torch.cuda.stream(near):
                    out.copy_(self._source.words[part], non_blocking=True)
                with torch.cuda.stream(far):
                    self._target.words[part].copy_(into, non_blocking=True)

            def wait() -> None:
                near.synchronize()
                far.synchronize()

            return wait

        return start


class HostCopy:
    """`PeerCopy` of host memory, for --host."""

    def __init__(self, source: HostMemory, target: HostMemory) -> None:
        self._source, self._target = source, target

    def prepare(self, move: Move) -> Start:
        words = move.nbytes // 8

        def start(slot: int) -> Callable[[], None]:
            np.copyto(self._target.words[:words], self._source.words[:words])
            return lambda: None

        return start


PAIRS: dict[str, Callable[[], Subject]] = {
    "cuda_ipc": partial(Ours, "cuda_ipc"),
    "tcp": partial(Ours, "tcp"),
    "tcp-host": partial(Ours, "tcp"),
    "process_vm": partial(Ours, "process_vm"),
    "nixl": partial(Nixl, "VRAM"),
    "nixl-host": partial(Nixl, "DRAM"),
    "mooncake-nvlink": partial(Mooncake, "nvlink_intra"),
    "mooncake-tcp": partial(Mooncake, "tcp", 64),
    "socket": Socket,
}
"""Between two processes."""

ALONE: dict[str, Callable[[Any, Any], Any]] = {
    "peer_copy": PeerCopy,
    "pinned_copy": PinnedCopy,
    "memcpy": HostCopy,
}
"""Within one process, which has both memories."""
