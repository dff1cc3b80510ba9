"""A real second process for the transport tests: an initiator or a target that does what it is told."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import (
    Endpoint,
    Failure,
    Landed,
    Rail,
    Receiver,
    SourceIdentity,
    StreamLink,
    identity,
    wire,
)
from mooncake_connector.kv_transfer.transport.stream_rail import StreamRail

SLICE_BYTES = 1 << 20


class Done:
    """An `on_done` or `on_answer` that remembers how often it was called and with what."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self._called = threading.Event()

    def __call__(self, result: object) -> None:
        self.results.append(result)
        self._called.set()

    def wait(self, seconds: float = 10) -> Any:
        assert self._called.wait(seconds), f"not called within {seconds} s"
        return self.results[0]


class Watched:
    """A link and what it told: the `LinkEvents` of a `StreamLink` over one path.

    Attributes:
        rails: those that are up, by name.
        seen: events in order: ("up", rail), ("down", rail, reason), ("fenced", rail), ("link", reason).
    """

    def __init__(
        self, path: str | tuple[str, ...], endpoint: Endpoint, connections: int = 2, **options: Any
    ) -> None:
        self.rails: dict[str, Rail] = {}
        self.seen: list[tuple[str, ...]] = []
        paths = (path,) if isinstance(path, str) else path
        self.link = StreamLink(
            endpoint, name="test", connections=connections, paths=paths, events=self, **options
        )
        self._whole = len(paths) * connections

    def rail_up(self, rail: Rail) -> None:
        self.rails[rail.name] = rail
        self.seen.append(("up", rail.name))

    def rail_down(self, name: str, reason: str) -> None:
        self.rails.pop(name, None)
        self.seen.append(("down", name, reason))

    def rail_fenced(self, name: str) -> None:
        self.seen.append(("fenced", name))

    def link_down(self, reason: str) -> None:
        self.seen.append(("link", reason))

    def kinds(self) -> list[tuple[str, ...]]:
        """Events without their reasons."""
        return [(kind, *(rest[:1] if kind != "link" else ())) for kind, *rest in self.seen]

    def downs(self) -> list[str]:
        """Why the link went down."""
        return [event[1] for event in self.seen if event[0] == "link"]

    def up(self) -> "Watched":
        until(lambda: len(self.rails) == self._whole or bool(self.downs()), 5, "all rails up")
        assert len(self.rails) == self._whole, self.seen
        return self

    def spread(self, key: int, plan: CopyPlan) -> list[Done]:
        """Write slices of a plan over all rails in turn."""
        rails = list(self.rails.values())
        dones = []
        for number, piece in enumerate(plan.split(SLICE_BYTES, 4096)):
            dones.append(Done())
            rails[number % len(rails)].write(key, piece, dones[-1])
        return dones

    def write(self, key: int, plan: CopyPlan) -> Failure | None:
        """Write over the first rail, and wait."""
        done = Done()
        self.rails[min(self.rails)].write(key, plan, done)
        result: Failure | None = done.wait()
        return result

    def close(self) -> None:
        self.link.close()


class Raw:
    """A connection to a target, made by hand."""

    def __init__(self, endpoint: Endpoint, **fields: Any) -> None:
        self.sock = socket.create_connection((endpoint.host, endpoint.port), 5)
        hello = wire.Hello(wire.VERSION, endpoint.token, b"link", 0, 1)
        wire.put(self.sock, msgspec.structs.replace(hello, **fields))
        self.welcome = wire.get(self.sock, wire.Welcome)

    def send(self, key: int, number: int, plan: CopyPlan, payload: bytes, *head: int) -> None:
        self.sock.sendall(wire.frame_head(wire.PAYLOAD, key, number, plan, *head) + payload)

    def reply(self) -> tuple[int, int, bytes]:
        """Number, status and what the target said."""
        number, status, size = wire.REPLY.unpack(wire.exactly(self.sock, wire.REPLY.size))
        return number, status, bytes(wire.exactly(self.sock, size))


def copy(src: int, dst: int, nbytes: int) -> CopyPlan:
    return CopyPlan.of(np.array([src]), np.array([dst]), np.array([nbytes]))


def until(holds: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until something holds; seconds waited."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.002)
    return time.monotonic() - start


def random_bytes(nbytes: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(1, 256, nbytes, np.uint8)


def span(address: int, nbytes: int) -> Ranges:
    return Ranges.of(np.array([address], np.uint64), np.array([nbytes], np.uint64))


class Process:
    """A child process serving the methods of `served`, one call after another."""

    def __init__(self, served: type, *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, served, args), daemon=True)
        self._process.start()
        far.close()
        self.pid = self._process.pid or 0

    def call(self, method: str, *args: object) -> Any:
        self.begin(method, *args)
        return self.result()

    def begin(self, method: str, *args: object) -> None:
        self._pipe.send((method, args))

    def result(self, seconds: float = 20) -> Any:
        assert self._pipe.poll(seconds), "the child does not answer"
        return self._pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        if self._process.is_alive():
            self.signal(signal.SIGKILL)
        self._process.join(10)


def _serve(pipe: Connection, served: type, args: tuple[object, ...]) -> None:
    thing = served(*args)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(thing, method)(*arguments))


class Initiator:
    """Random bytes in this process's memory, and links to write them."""

    def __init__(self, nbytes: int, seed: int) -> None:
        self._memory = random_bytes(nbytes, seed)
        self._link: Watched

    def open(self, path: str, endpoint: Endpoint, connections: int) -> None:
        self._link = Watched(path, endpoint, connections).up()

    def write(self, key: int, src: list[int], dst: list[int], length: list[int]) -> list[str]:
        """Write in slices, sources relative to this memory: why those failed that did."""
        plan = CopyPlan.of(
            np.array(src, np.uint64) + np.uint64(self._memory.ctypes.data),
            np.array(dst, np.uint64),
            np.array(length, np.uint64),
        )
        results = [done.wait() for done in self._link.spread(key, plan)]
        return [failure.reason for failure in results if failure is not None]

    def break_busy(self, key: int, dst: int, rail: str, wait_ms: float) -> list[str]:
        """Fill a rail, break it, and return once it is fenced: why writes failed."""
        link = self._link
        dones = [Done() for _ in range(64)]
        for done in dones:
            link.rails[rail].write(key, copy(self._memory.ctypes.data, dst, self._memory.size), done)
        time.sleep(wait_ms / 1000)
        fences = link.kinds().count(("fenced", rail))
        link.link.abandon(rail, "stuck")
        until(lambda: link.kinds().count(("fenced", rail)) > fences, 5, "fenced")
        return [failure.reason for done in dones if (failure := done.wait()) is not None]

    def break_sync(self, key: int, dst: int, rail: str, wait_ms: float) -> None:
        """Break a rail on which one thread writes small writes all the time, and return once it is fenced."""
        link = self._link
        writer = link.rails[rail]
        assert isinstance(writer, StreamRail)

        def run() -> None:
            while writer.write_sync(key, copy(self._memory.ctypes.data, dst, 4096)) is None:
                pass

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(wait_ms / 1000)
        fences = link.kinds().count(("fenced", rail))
        link.link.abandon(rail, "stuck")
        until(lambda: link.kinds().count(("fenced", rail)) > fences, 5, "fenced")
        thread.join()

    def restore(self, rail: str) -> None:
        self._link.link.restore(rail)
        self._link.up()

    def identity(self) -> SourceIdentity:
        return identity()

    def close(self) -> None:
        self._link.close()


class HeldTarget:
    """A target in this process."""

    def __init__(self, nbytes: int) -> None:
        self._memory = np.zeros(nbytes, np.uint8)
        self._receiver = Receiver()

    def admit(self, peer: str, key: int) -> tuple[Endpoint, int]:
        address = self._memory.ctypes.data
        self._receiver.grant(key, peer, span(address, self._memory.size))
        return self._receiver.admit(peer), address

    def read(self, at: int, nbytes: int) -> bytes:
        return self._memory[at : at + nbytes].tobytes()

    def revoke(self, key: int) -> Landed:
        return self._receiver.revoke(key)
