"""Small writes to one target gathered into fewer, larger ones. Pure: time is an argument.

A write costs its target and its sender a fixed amount, whatever its size. With nothing in flight a small
write leaves at once; while something is in flight it waits for that to land, as it would in some queue
anyway, and for the writes that come meanwhile. Size, count and time bound the wait.

How load sets the time: waiting is worth it if another write is likely to come before the wait ends. The wait
ends when all that is in flight has landed, or after `max_delay_s`. So the delay is the shorter of the two, by
a moving average of the time that took, and a write waits only if the average gap between writes is shorter.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.slicing import whole_bytes

_GAIN = 0.125
"""Weight of the newest sample in a moving average."""


class BatchPolicy(msgspec.Struct, frozen=True):
    """When gathered writes leave.

    Attributes:
        small_bytes: larger writes are not gathered, nor are tiled ones.
        max_bytes: of gathered writes.
        max_count: gathered writes.
        max_delay_s: of the oldest gathered write [s].
    """

    small_bytes: int = 64 << 10
    max_bytes: int = 2 << 20
    max_count: int = 256
    max_delay_s: float = 1e-3


class Flush(msgspec.Struct, frozen=True, eq=False):
    """Writes that leave as one, in the order in which they were added."""

    items: tuple[int, ...]
    plan: CopyPlan


class Load:
    """How busy a target is: what the aggregators of one link learn together. Not thread-safe."""

    def __init__(self, policy: BatchPolicy | None = None) -> None:
        self.policy = policy or BatchPolicy()
        self._added: float | None = None
        self._flushed: float | None = None
        self._gap = 0.0
        self._landing = self.policy.max_delay_s

    def added(self, now: float) -> None:
        """A write has come."""
        if self._added is not None:
            # A pause tells no more than that the load has changed; a burst after it shall soon be seen.
            gap = min(now - self._added, 4 * self.policy.max_delay_s)
            self._gap += _GAIN * (gap - self._gap)
        self._added = now

    def flushed(self, now: float) -> None:
        """Something has left."""
        self._flushed = now

    def idle(self, now: float) -> None:
        """Nothing is in flight any more."""
        if self._flushed is not None:
            self._landing += _GAIN * (now - self._flushed - self._landing)
            self._flushed = None

    @property
    def delay(self) -> float:
        """How long a write waits for others while something is in flight [s]; 0 if none is likely to come."""
        delay = min(self.policy.max_delay_s, self._landing)
        return delay if self._gap < delay else 0.0


class Aggregator:
    """Gathers the writes to one target under one key with one priority. Not thread-safe.

    Writes to the same target bytes are never in one flush, and leave in the order in which they were added.
    """

    def __init__(self, load: Load | None = None) -> None:
        self.load = load or Load()
        self._items: list[int] = []
        self._plans: list[CopyPlan] = []
        self._nbytes = 0
        self._low = self._high = 0  # all gathered target bytes lie in [low, high)
        self._oldest = 0.0

    def add(self, item: int, plan: CopyPlan, urgent: bool, now: float) -> list[Flush]:
        """Take a write; returns what has to leave now, in its order. After the last that is there: `tick`."""
        policy = self.load.policy
        self.load.added(now)
        nbytes = whole_bytes(plan)
        if urgent or nbytes > policy.small_bytes or plan.tile is not None:
            leaves = self._leave(now) if self._touches(plan) else []
            self.load.flushed(now)
            return [*leaves, Flush((item,), plan)]
        low, high = _bounds(plan)
        if not self._items:
            self._oldest, self._low, self._high = now, low, high
        self._items.append(item)
        self._plans.append(plan)
        self._nbytes += nbytes
        self._low, self._high = min(self._low, low), max(self._high, high)
        if self._nbytes >= policy.max_bytes or len(self._items) >= policy.max_count:
            return self._leave(now)
        return []

    def tick(self, now: float, busy: bool) -> list[Flush]:
        """What leaves because nothing is in flight to this target (not `busy`) or it waited long enough."""
        at = self.next_tick()
        return [] if at is None or (busy and now < at) else self._leave(now)

    def next_tick(self) -> float | None:
        """When `tick` has something to do although the target is busy."""
        return self._oldest + self.load.delay if self._items else None

    def _leave(self, now: float) -> list[Flush]:
        if not self._items:
            return []
        items, plans = self._items, self._plans
        self._items, self._plans, self._nbytes = [], [], 0
        self.load.flushed(now)
        if len(items) == 1:
            return [Flush((items[0],), plans[0])]
        plan = _joined(plans)
        if _overlap(plan):  # the order inside a plan is nobody's promise: none of them shares one
            return [Flush((item,), alone) for item, alone in zip(items, plans, strict=True)]
        return [Flush(tuple(items), plan)]

    def _touches(self, plan: CopyPlan) -> bool:
        """Whether a write has target bytes in common with gathered ones."""
        if not self._items:
            return False
        low, high = _bounds(plan)
        return low < self._high and self._low < high and _overlap(_joined([*self._plans, plan.flat()]))


def _bounds(plan: CopyPlan) -> tuple[int, int]:
    at, length = plan.writes()
    if at.size == 1:
        low = int(at[0])
        return low, low + int(length[0])
    return int(at.min(initial=1 << 63)), int((at + length).max(initial=0))


def _joined(plans: Sequence[CopyPlan]) -> CopyPlan:
    """One plan for all, without tiles."""
    return CopyPlan.of(
        np.concatenate([p.src for p in plans]),
        np.concatenate([p.dst for p in plans]),
        np.concatenate([p.length for p in plans]),
        [event for p in plans for event in p.after],
    )


def _overlap(plan: CopyPlan) -> bool:
    """Whether some target byte is written twice."""
    order = np.argsort(plan.dst)
    start = plan.dst[order]
    end = start + plan.length[order]
    return bool((start[1:] < end[:-1]).any())
