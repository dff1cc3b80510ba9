"""A real second process for the transport tests: an initiator or a target that does what it is told."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import Endpoint, Link, Receiver, open_link


class Done:
    """An `on_done` that remembers how often it was called and with what."""

    def __init__(self) -> None:
        self.reasons: list[str | None] = []
        self._called = threading.Event()

    def __call__(self, reason: str | None) -> None:
        self.reasons.append(reason)
        self._called.set()

    def wait(self, seconds: float = 10) -> str | None:
        assert self._called.wait(seconds), f"on_done was not called within {seconds} s"
        return self.reasons[0]


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
        self._downs: list[str] = []
        self._link: Link

    def open(self, path: str, endpoint: Endpoint, connections: int) -> None:
        self._link = open_link(
            path, endpoint, name="test", connections=connections, on_down=self._downs.append
        )

    def write(self, key: int, src: list[int], dst: list[int], length: list[int]) -> str | None:
        """Write with sources relative to this memory; how it ended."""
        plan = CopyPlan.of(
            np.array(src, np.uint64) + np.uint64(self._memory.ctypes.data),
            np.array(dst, np.uint64),
            np.array(length, np.uint64),
        )
        done = Done()
        self._link.write(key, plan, done)
        return done.wait()

    def downs(self) -> list[str]:
        return self._downs

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
