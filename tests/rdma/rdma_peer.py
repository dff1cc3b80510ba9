"""A target in a process of its own, and an initiator's link to it whose streams are two pipes."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.topology import discover
from mooncake_connector.kv_transfer.transport.base import Failure, Mark, Rail
from mooncake_connector.kv_transfer.transport.rdma import RdmaDevices, RdmaRails, RdmaTarget
from mooncake_connector.kv_transfer.transport.rdma.nic import RdmaNic

TOKEN = b"a token of thirty-two bytes ....."


def region(memory: np.ndarray[Any, Any]) -> Region:
    return Region(memory.ctypes.data, memory.nbytes)


class _Target:
    """What runs in the other process."""

    def __init__(self, nbytes: int) -> None:
        self.handlers: dict[str, Callable[[str, bytes], bytes]] = {}
        self.memory = np.zeros(nbytes, np.uint8)
        self.late = np.zeros(1 << 16, np.uint8)
        self.devices = RdmaDevices(discover().nics)
        self.devices.register(region(self.memory))
        self.target = RdmaTarget(lambda: self.devices.nics, self.handlers.__setitem__)

    def admit(self, peer: str) -> tuple[int, int]:
        self.target.admit(peer, TOKEN)
        return self.memory.ctypes.data, self.memory.nbytes

    def register_late(self) -> int:
        self.devices.register(region(self.late))
        return self.late.ctypes.data

    def deregister(self) -> None:
        self.devices.deregister(region(self.memory))

    def register(self) -> None:
        self.devices.register(region(self.memory))

    def wait(self, peer: str, marks: Sequence[Mark], seconds: float) -> bool:
        seen = threading.Event()
        self.target.await_marks(peer, marks, seen.set)
        return seen.wait(seconds)

    def fence_peer(self, peer: str) -> None:
        self.target.fence_peer(peer)

    def read(self) -> bytes:
        return self.memory.tobytes()

    def read_late(self) -> bytes:
        return self.late.tobytes()

    def wipe(self) -> None:
        self.memory[:] = 0


def _run(calls: Connection, questions: Connection, nbytes: int) -> None:
    target = _Target(nbytes)

    def answer() -> None:
        while True:
            peer, topic, body = questions.recv()
            try:
                questions.send(target.handlers[topic](peer, body))
            except TransportError as refused:
                questions.send(Failure(str(refused), retry=False))

    threading.Thread(target=answer, daemon=True).start()
    while True:
        method, arguments = calls.recv()
        calls.send(getattr(target, method)(*arguments))


class Peer:
    """The other process: `call` runs a method of its target, `ask` puts a question as a link would."""

    def __init__(self, nbytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._calls, calls = context.Pipe()
        self._questions, questions = context.Pipe()
        self._process = context.Process(target=_run, args=(calls, questions, nbytes), daemon=True)
        self._process.start()
        calls.close()
        questions.close()
        self._lock = threading.Lock()
        self._asked: deque[Callable[[bytes | Failure], None]] = deque()
        self._gone = False
        threading.Thread(target=self._answers, daemon=True).start()

    def call(self, method: str, *arguments: object, seconds: float = 60) -> Any:
        self._calls.send((method, arguments))
        assert self._calls.poll(seconds), f"{method}: no answer in {seconds} s"
        return self._calls.recv()

    def ask(self, peer: str, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None:
        with self._lock:
            gone = self._gone
            if not gone:
                self._asked.append(on_answer)
                self._questions.send((peer, topic, body))
        if gone:
            on_answer(Failure("the link is down", retry=False))

    def kill(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        self._process.kill()
        self._process.join(10)

    def _answers(self) -> None:
        while True:
            try:
                answer = self._questions.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                on_answer = self._asked.popleft()
            on_answer(answer)
        with self._lock:
            self._gone = True
            asked, self._asked = list(self._asked), deque()
        for on_answer in asked:
            on_answer(Failure("the link broke", retry=True))


class Link:
    """The initiator's end: rails and what their events said. Implements `LinkEvents`."""

    def __init__(self, peer: Peer, name: str, nics: Sequence[RdmaNic], qps: int) -> None:
        self.peer, self.name = peer, name
        self.up: dict[str, Rail] = {}
        self.log: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self.address, self.nbytes = peer.call("admit", name)
        self.rails = RdmaRails(
            name,
            TOKEN,
            lambda topic, body, then: peer.ask(name, topic, body, then),
            self,
            lambda: nics,
            qps=qps,
        )
        self.rails.open()
        self.until(lambda: bool(self.up), "a rail")

    def rail_up(self, rail: Rail) -> None:
        with self._changed:
            self.up[rail.name] = rail
            self.log.append(("up", rail.name))
            self._changed.notify_all()

    def rail_down(self, name: str, reason: str) -> None:
        with self._changed:
            self.up.pop(name, None)
            self.log.append(("down", name))
            self.log.append(("reason", reason))
            self._changed.notify_all()

    def rail_fenced(self, name: str) -> None:
        with self._changed:
            self.log.append(("fenced", name))
            self._changed.notify_all()

    def link_down(self, reason: str) -> None:
        raise AssertionError("rails never end a link")

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 20) -> None:
        with self._changed:
            assert self._changed.wait_for(holds, seconds), f"not in {seconds} s: {what}; {self.log}"

    def saw(self, kind: str, name: str) -> bool:
        return (kind, name) in self.log

    def landed(self, seconds: float = 30) -> bool:
        """Whether the target has seen everything that completed until now."""
        return bool(self.peer.call("wait", self.name, self.rails.marks(), seconds))

    def close(self) -> None:
        self.rails.close()


class Writes:
    """Writes under way; `end` gives what became of each, in order."""

    def __init__(self) -> None:
        self._ends: list[Failure | str | None] = []
        self._starter: threading.Thread | None = None
        self._changed = threading.Condition()

    def start(self, rail: Rail, plan: CopyPlan) -> None:
        index = len(self._ends)
        self._ends.append("running")

        def done(failure: Failure | None) -> None:
            with self._changed:
                assert self._ends[index] == "running", "a write ended twice"
                self._ends[index] = failure
                self._changed.notify_all()

        rail.write(0, plan, done)

    def keep_starting(self, rail: Rail, plan: CopyPlan, n: int) -> None:
        """Start `n` in a thread: soft-RoCE sends while it posts."""
        self._starter = threading.Thread(target=lambda: [self.start(rail, plan) for _ in range(n)])
        self._starter.start()
        deadline = time.monotonic() + 10
        while not any(end is None for end in self._ends):
            assert time.monotonic() < deadline, "nothing landed"
            time.sleep(0.005)

    @property
    def running(self) -> int:
        return self._ends.count("running")

    def end(self, seconds: float = 30) -> list[Any]:
        start = time.monotonic()
        if self._starter is not None:
            self._starter.join(seconds)
        with self._changed:
            assert self._changed.wait_for(lambda: not self.running, seconds), self._ends
        self.seconds = time.monotonic() - start
        return list(self._ends)
