"""Simulated rails of given speed for the dispatcher: events in time order, no real clock."""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from mooncake_connector.kv_transfer.dispatcher import (
    Abandon,
    Action,
    Dispatcher,
    Finished,
    Post,
    Priority,
    RailSpec,
    Restore,
)
from mooncake_connector.kv_transfer.plan import CopyPlan

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 1e9
FENCE_S = 5e-3


@dataclass
class SimRail:
    """Carries one slice after the other."""

    spec: RailSpec
    rate: float
    free_at: float = 0.0
    life: int = 0
    alive: bool = True
    stuck: bool = False


@dataclass
class Simulation:
    """Each rail moves `rate` bytes/s, and its acknowledgements take `latency` seconds.

    Attributes:
        cost: seconds of the one processor that all rails share, for each slice before it is carried.
    """

    latency: float = 10e-6
    cost: float = 0.0
    now: float = 0.0
    dispatcher: Dispatcher = field(default_factory=Dispatcher)
    rails: dict[str, SimRail] = field(default_factory=dict)
    carried: Counter[str] = field(default_factory=Counter)  # bytes that landed, by rail
    posts: int = 0
    begun: dict[int, float] = field(default_factory=dict)
    ended: dict[int, Finished] = field(default_factory=dict)
    took: dict[int, float] = field(default_factory=dict)
    abandoned: list[str] = field(default_factory=list)
    _processor_free_at: float = 0.0
    _coming: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: "count[int]" = field(default_factory=count)

    def rail(
        self, name: str, rate: float, *, rank: int = 0, speed: float = 0.0, penalty: float = 1.0
    ) -> None:
        spec = RailSpec(name, "rdma" if rank == 0 else "tcp", rank, speed, penalty)
        self.rails[name] = SimRail(spec, rate)
        self.do(self.dispatcher.rail_up(spec, self.now))

    def submit(
        self,
        nbytes: int,
        priority: Priority = Priority.FOREGROUND,
        deadline: float | None = None,
        ranges: int = 1,
    ) -> int:
        number = next(self._numbers)
        length = np.full(ranges, nbytes // ranges, np.uint64)
        at = np.arange(ranges, dtype=np.uint64) * np.uint64(2 * nbytes // ranges)
        self.begun[number] = self.now
        self.do(self.dispatcher.submit(number, 1, CopyPlan(at, at, length), priority, deadline, self.now))
        return number

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._coming, (when, next(self._numbers), event))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Post():
                    self.post(action)
                case Finished(transfer):
                    self.ended[transfer] = action
                    self.took[transfer] = self.now - self.begun[transfer]
                case Restore(rail):
                    self.at(self.now + 1e-3, lambda name=rail: self.restore(name))  # type: ignore[misc]
                case Abandon(rail):
                    self.abandoned.append(rail)
                    self.kill(rail)

    def post(self, post: Post) -> None:
        self.posts += 1
        rail, nbytes = self.rails[post.rail], post.plan.nbytes
        if rail.stuck:
            return
        self._processor_free_at = max(self._processor_free_at, self.now) + self.cost
        rail.free_at = max(rail.free_at, self._processor_free_at) + nbytes / rail.rate
        life = rail.life

        def landed() -> None:
            if rail.life == life:
                self.carried[post.rail] += nbytes
                self.do(self.dispatcher.slice_ended(post.slice, None, self.now))

        self.at(rail.free_at + self.latency, landed)

    def kill(self, name: str, alive: bool = False) -> None:
        """A rail breaks; it can be restored once it is `alive`."""
        rail = self.rails[name]
        rail.life, rail.alive, rail.stuck, rail.free_at = rail.life + 1, alive, False, 0.0
        self.do(self.dispatcher.rail_down(name, "cable pulled", self.now))
        self.at(self.now + FENCE_S, lambda: self.do(self.dispatcher.rail_fenced(name, self.now)))

    def restore(self, name: str) -> None:
        rail = self.rails[name]
        if rail.alive:
            self.do(self.dispatcher.rail_up(rail.spec, self.now))
        else:
            self.do(self.dispatcher.rail_down(name, "cable still pulled", self.now))

    def run(self, until: float = 1e9) -> None:
        """Until nothing happens any more, or a time."""
        while True:
            tick = self.dispatcher.next_tick()
            coming = self._coming[0][0] if self._coming else 1e18
            at = min(coming, 1e18 if tick is None else max(tick, self.now))
            if at > until or at == 1e18:
                self.now = min(until, self.now) if until == 1e9 else until
                return
            self.now = at
            if coming <= at:
                heapq.heappop(self._coming)[2]()
            else:
                self.do(self.dispatcher.tick(self.now))

    def ok(self, transfer: int) -> bool:
        return self.ended[transfer].error is None
