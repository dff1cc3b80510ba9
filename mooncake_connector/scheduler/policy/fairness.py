"""Turns: who waits before whom, and who has had more than a fair share."""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from mooncake_connector.scheduler.policy.base import Arrival
from mooncake_connector.scheduler.policy.decode_table import Answer

# What was used is forgotten with this half-life, seconds.
HALF_LIFE = 60.0
# A tenant may have so much more than its share before it counts as over it.
TOLERANCE = 1.1
# Below this part of all that was used, a tenant or a class is not there.
NOTHING = 0.001
# So many requests say what is much, and so many are remembered.
FEW, MANY = 32, 512
# What came counts for 1/e after so many seconds.
LATELY = 30.0
K = TypeVar("K")


class Usage:
    """How much of the engines' time everyone was given lately, by tenant and by priority."""

    def __init__(self) -> None:
        self._tenants: dict[str, float] = {}
        self._priorities: dict[int, float] = {}
        self._moment = 0.0

    def add(self, arrival: Arrival, cost: float, now: float) -> None:
        """A request was let in that takes `cost` seconds of an engine."""
        # All is kept in the units of one moment: what comes later weighs more, and nothing has to be aged.
        weight = cost * self._weight(now)
        self._tenants[arrival.tenant] = self._tenants.get(arrival.tenant, 0.0) + weight
        self._priorities[arrival.priority] = self._priorities.get(arrival.priority, 0.0) + weight

    def over(self, tenant: str) -> bool:
        """Whether a tenant had more than an even share of what all tenants had."""
        total = sum(self._tenants.values())
        own = self._tenants.get(tenant, 0.0)
        return own * len(self._tenants) > TOLERANCE * total

    def above(self, priority: int) -> bool:
        """Whether there were more urgent requests lately."""
        return any(other > priority for other in self._priorities)

    def _weight(self, now: float) -> float:
        if now - self._moment > HALF_LIFE:
            scale = 0.5 ** ((now - self._moment) / HALF_LIFE)
            self._moment = now
            self._tenants = _faded(self._tenants, scale)
            self._priorities = _faded(self._priorities, scale)
        return math.exp2((now - self._moment) / HALF_LIFE)


def _faded(table: dict[K, float], scale: float) -> dict[K, float]:
    least = NOTHING * sum(table.values())
    return {name: used * scale for name, used in table.items() if used >= least}


class Demand:
    """What those that came lately take, against what engines can give.

    Attributes:
        bound: without the requests that take at least this, engines could serve the others; infinite if they
            can serve all.
    """

    def __init__(self) -> None:
        self._costs = Ranks()
        self._seconds = 0.0
        self._began: float | None = None
        self._moment = 0.0
        self.bound = math.inf

    def add(self, cost: float, engines: int, now: float) -> None:
        """One came that takes `cost` seconds of one of so many engines, let in or not."""
        if self._began is None:
            self._began = self._moment = now
        self._seconds = self._seconds * math.exp((self._moment - now) / LATELY) + cost
        self._moment = now
        self._costs.add(cost)
        given = engines * (LATELY * -math.expm1((self._began - now) / LATELY) + 1.0)
        self.bound = self._costs.dearest(1.0 - given / self._seconds) if self._seconds > given else math.inf


class Ranks:
    """How much a request takes, among those that came lately."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def rank(self, cost: float) -> float:
        """The share of requests that take less, 0 to 1; 0 as long as too few came to tell."""
        if len(self._sorted) < FEW:
            return 0.0
        return bisect_left(self._sorted, cost) / len(self._sorted)

    def dearest(self, share: float) -> float:
        """The least cost of the dearest requests that take this share of all together, 0 to 1."""
        if len(self._sorted) < FEW:
            return math.inf
        left = share * sum(self._sorted)
        for cost in reversed(self._sorted):
            left -= cost
            if left <= 0:
                return cost
        return 0.0

    def add(self, cost: float) -> None:
        """One came that takes `cost`, let in or not."""
        if len(self._recent) == MANY:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(cost)
        insort(self._sorted, cost)


class Waiter(msgspec.Struct):
    """One request that waits.

    Attributes:
        answer: how long it is predicted to be.
        cost: seconds of an engine that it takes.
        seconds: of these, of computing its prompt.
        since: when it came.
        until: when it is rejected at the latest.
        tag: its virtual start: the line is in this order, within a priority.
    """

    arrival: Arrival
    answer: Answer
    cost: float
    seconds: float
    since: float
    until: float
    tag: float = 0.0

    def aged(self, now: float) -> bool:
        """Whether half of its patience is over: from then on nobody passes it any more."""
        return now >= (self.since + self.until) / 2


class Line:
    """Requests that wait: the most urgent first, start-time fair queueing between tenants of one priority.

    Goyal, Vin and Cheng: Start-time Fair Queueing (SIGCOMM'96). A tenant's next request starts, in virtual
    time, where its last one ends, but not before the virtual time of what was let in last.
    """

    def __init__(self) -> None:
        self._waiters: dict[str, Waiter] = {}
        self._finish: dict[str, float] = {}
        self._virtual = 0.0

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        """In the order of their turns."""
        if not self._waiters:
            return iter(())
        return iter(sorted(self._waiters.values(), key=lambda waiter: (-waiter.arrival.priority, waiter.tag)))

    def add(self, waiter: Waiter) -> None:
        """It waits from now on."""
        tenant = waiter.arrival.tenant
        waiter.tag = max(self._virtual, self._finish.get(tenant, 0.0))
        self._finish[tenant] = waiter.tag + waiter.cost
        self._waiters[waiter.arrival.id] = waiter

    def take(self, id: str, *, served: bool = False) -> Waiter | None:
        """It waits no longer; `served`: it was let in. None if it did not wait."""
        waiter = self._waiters.pop(id, None)
        if waiter is None:
            return None
        if served:
            self._virtual = max(self._virtual, waiter.tag)
        if not self._waiters:
            self._finish.clear()
            self._virtual = 0.0
        return waiter

    def deadline(self) -> float | None:
        """When the first of them has to be answered; None if nobody waits."""
        if not self._waiters:
            return None
        return min(waiter.until for waiter in self._waiters.values())
