"""A world for the dispatcher: rails that break with writes under way, which land whenever it hurts most.

What a broken rail lost (a *ghost*) may land, whole or in part, at any time until the rail is fenced.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from mooncake_connector.kv_transfer.dispatcher import (
    Abandon,
    Action,
    Dispatcher,
    Finished,
    Post,
    Priority,
    RailPolicy,
    RailSpec,
    Restore,
    SlicePolicy,
)
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport.base import Failure

SLICING = SlicePolicy(min_bytes=4, max_bytes=16, stripe_bytes=8, max_ranges=3)
"""Small, so that every byte can be followed."""

SPECS = (
    RailSpec("near", "rdma", 0, speed=8e3),
    RailSpec("far", "rdma", 0, speed=12e3, penalty=2.0),
    RailSpec("last-0", "tcp", 1, speed=6e3),
    RailSpec("last-1", "tcp", 1, speed=6e3),
)


class WriteAfterFree(AssertionError):
    """A byte landed in memory of a transfer that had ended."""


@dataclass(eq=False)
class Copy:
    """A transfer: which source byte each target byte shall get, and what became of it."""

    priority: Priority
    wanted: dict[int, int]
    landed: dict[int, int] = field(default_factory=dict)
    posts: dict[int, int] = field(default_factory=dict)  # by target byte
    finished: Finished | None = None


@dataclass(eq=False)
class Flight:
    slice: int
    copy: Copy
    pairs: list[tuple[int, int]]  # (source byte, target byte)
    pending: bool = True  # neither its end nor the end of its rail has been told


@dataclass(eq=False)
class WorldRail:
    spec: RailSpec
    state: str = "new"  # up, broken (not told yet), unfenced, fenced, restoring
    flying: list[Flight] = field(default_factory=list)
    ghosts: list[Flight] = field(default_factory=list)
    news: deque[Flight | None] = field(default_factory=deque)  # failed writes, and None: the rail is down


class World:
    def __init__(self, dispatcher: type[Dispatcher] = Dispatcher) -> None:
        self.now = 100.0
        self.dispatcher = dispatcher(SLICING, RailPolicy())
        self.rails = {spec.name: WorldRail(spec) for spec in SPECS}
        self.copies: dict[int, Copy] = {}
        self.link_is_down = False

    # the engine

    def submit(self, lengths: list[int], priority: Priority, patience: float | None) -> None:
        """A copy of ranges with gaps between them, some of one byte."""
        number = len(self.copies)
        length = np.array(lengths, np.uint64)
        dst = np.uint64(number * 1000) + np.cumsum(length + np.uint64(1)) - length
        src = dst + np.uint64(1 << 40)
        plan = CopyPlan(src, dst, length)
        self.copies[number] = Copy(priority, {d: s for s, d in pairs_of(plan)})
        deadline = None if patience is None else self.now + patience
        self.do(self.dispatcher.submit(number, number, plan, priority, deadline, self.now))

    def cancel(self, number: int) -> None:
        self.do(self.dispatcher.cancel(number, "cancelled", self.now))

    @property
    def live(self) -> list[int]:
        return [n for n, copy in self.copies.items() if copy.finished is None]

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        for _ in range(1000):
            at = self.dispatcher.next_tick()
            if at is None or at > end:
                break
            self.now = max(self.now, at)
            self.do(self.dispatcher.tick(self.now))
            again = self.dispatcher.next_tick()
            assert again is None or again > self.now, "a tick left something due: its caller would spin"
        else:
            raise AssertionError("ticks without end")
        self.now = end

    # the link

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Post():
                    self.post(action)
                case Finished():
                    self.finish(action)
                case Restore(rail):
                    assert self.rails[rail].state in ("fenced", "new")
                    self.rails[rail].state = "restoring"
                case Abandon(rail):
                    if self.rails[rail].state == "up":
                        self.break_rail(rail, 0)

    def post(self, post: Post) -> None:
        rail, copy = self.rails[post.rail], self.copies[post.key]
        assert rail.state in ("up", "broken"), f"posted to a rail that is {rail.state}"
        pairs = pairs_of(post.plan)
        assert 0 < len(pairs) <= SLICING.max_bytes
        assert post.plan.length.size <= SLICING.max_ranges
        pending = [f for r in self.rails.values() for f in r.flying + r.ghosts if f.pending]
        under_way = {pair for f in pending for pair in f.pairs}
        for s, d in pairs:
            assert copy.wanted.get(d) == s, "not asked for"
            assert (s, d) not in under_way, "two slices overlap"
            copy.posts[d] = copy.posts.get(d, 0) + 1
            assert copy.posts[d] <= 1 + SLICING.max_failovers, "fails over for ever"
        if copy.priority:
            others = [f for f in rail.flying + rail.ghosts if f.pending and f.copy.priority]
            assert not others, "foreground would be behind two slices"
            for number in self.live:
                other = self.copies[number]
                if other.priority < copy.priority and not self.failing(number):
                    flying = sum(len(f.pairs) for f in pending if f.copy is other)
                    assert flying + self.dispatcher.progress(number) == len(other.wanted), "overtaken"
        flight = Flight(post.slice, copy, pairs)
        if rail.state == "up":
            rail.flying.append(flight)
        else:
            rail.ghosts.append(flight)
            rail.news.append(flight)

    def failing(self, number: int) -> bool:
        """Whether a transfer posts nothing more and only waits for its end."""
        return self.dispatcher._transfers[number].error is not None

    def finish(self, finished: Finished) -> None:
        copy = self.copies[finished.transfer]
        assert copy.finished is None, "ended twice"
        copy.finished = finished
        if finished.error is None:
            assert copy.landed == copy.wanted, "reported as landed"
            assert finished.nbytes == len(copy.wanted)

    def write(self, flight: Flight, nbytes: int) -> None:
        for s, d in flight.pairs[:nbytes]:
            if flight.copy.finished is not None:
                raise WriteAfterFree(f"its transfer had ended: {flight.copy.finished}")
            flight.copy.landed[d] = s

    def land(self, rail: WorldRail, flight: Flight, failure: Failure | None = None) -> None:
        """A write ends in an orderly way; one that failed with retry leaves a ghost."""
        rail.flying.remove(flight)
        flight.pending = False
        if failure is None:
            self.write(flight, len(flight.pairs))
        elif failure.retry:
            rail.ghosts.append(flight)
        self.do(self.dispatcher.slice_ended(flight.slice, failure, self.now))

    def break_rail(self, name: str, told_before: int) -> None:
        """The rail is gone; `told_before` of its writes are told to have failed before that is told."""
        rail = self.rails[name]
        rail.state = "broken"
        rail.ghosts += rail.flying
        rail.news.extend(rail.flying)
        rail.flying = []
        rail.news.insert(min(told_before, len(rail.news)), None)

    def tell(self, rail: WorldRail) -> None:
        news = rail.news.popleft()
        if news is not None:
            news.pending = False
            failure = Failure("broken", retry=True)
            self.do(self.dispatcher.slice_ended(news.slice, failure, self.now))
            return
        rail.state = "unfenced"
        for flight in rail.ghosts:
            flight.pending = False
        self.do(self.dispatcher.rail_down(rail.spec.name, "broken", self.now))

    def fence(self, rail: WorldRail) -> None:
        rail.ghosts.clear()
        rail.state = "fenced"
        self.do(self.dispatcher.rail_fenced(rail.spec.name, self.now))

    def answer(self, rail: WorldRail, up: bool) -> None:
        """A rail comes up, or can't be made."""
        if up:
            rail.state = "up"
            self.do(self.dispatcher.rail_up(rail.spec, self.now))
        else:
            rail.state = "fenced"
            self.do(self.dispatcher.rail_down(rail.spec.name, "no luck", self.now))

    def break_link(self) -> None:
        self.link_is_down = True
        for rail in self.rails.values():
            rail.flying.clear()
            rail.ghosts.clear()
            rail.news.clear()
            rail.state = "gone"
        self.do(self.dispatcher.link_down("the peer died", self.now))

    def calm(self) -> None:
        """Everything that can happen does, in the order that is worst for memory."""
        for rail in self.rails.values():
            for flight in rail.ghosts:
                self.write(flight, len(flight.pairs))
            while rail.news:
                self.tell(rail)
            if rail.state == "unfenced":
                self.fence(rail)
            elif rail.state in ("new", "restoring"):
                self.answer(rail, up=True)
        for _ in range(30):
            for rail in self.rails.values():
                if rail.flying:
                    self.land(rail, rail.flying[0])


def pairs_of(plan: CopyPlan) -> list[tuple[int, int]]:
    rows = zip(plan.src.tolist(), plan.dst.tolist(), plan.length.tolist(), strict=True)
    return [(s + i, d + i) for s, d, n in rows for i in range(n)]
