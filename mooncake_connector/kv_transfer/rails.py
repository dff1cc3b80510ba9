"""What is known of each rail of a link, and which of them takes the next slice. Pure: time is an argument.

A rail is judged by when it would be done: (bytes in flight + slice) / bandwidth * penalty. Its bandwidth is
learned from the bytes that land per second in which the rail had something to carry, so that slices which
share the rail don't make each other look slow.

    up -> suspect -> down -> cooling -> restoring -> probation -> up
"""

from collections.abc import Collection, Iterator
from enum import StrEnum, auto
from math import inf

import msgspec

from mooncake_connector.kv_transfer.slicing import SlicePolicy, even

_DEFAULT_SPEED = {"cuda_ipc": 100e9, "rdma": 10e9, "process_vm": 5e9}
_SLOWEST = 1e3
_UNKNOWN_RANK = 1 << 30


class RailSpec(msgspec.Struct, frozen=True):
    """A rail as its transport describes it.

    Attributes:
        name: unique in its link, the same after it was restored.
        path: the transport.
        rank: order of preference of the transport, 0 first; higher ones are the last resort.
        speed: bytes/s that the hardware claims; 0 takes a default by path.
        penalty: at least 1; a rail of penalty 2 beside one of penalty 1 gets half of what its speed would
            earn it (NUMA tier).
        steady: its speed is as claimed and it can't hang; its writes may wait for the GPU, so their times
            tell nothing. It takes large slices.
    """

    name: str
    path: str
    rank: int
    speed: float = 0.0
    penalty: float = 1.0
    steady: bool = False


class RailPolicy(msgspec.Struct, frozen=True):
    """How rails are filled, judged and forgiven.

    Attributes:
        window_s: bytes in flight on a rail are what it carries in this time [s], but at least two slices; no
            more than that while nobody has measured its speed.
        max_slices: in flight on one rail.
        memory_s: time constant of the bandwidth average, in seconds of busy time.
        stall_s: a rail that has slices in flight and completes nothing for so long [s] ...
        stall_factor: ... and for so many times what its bandwidth predicts, is abandoned.
        suspect_s: how long after a write failed the rail's own end is waited for, then it is abandoned [s].
        cooldown_s: rest after the first failure [s]; doubled by each further one.
        cooldown_cap_s: the longest rest [s].
        settle_s: a rail that was up for so long has its earlier failures forgiven [s].
    """

    window_s: float = 12e-3
    max_slices: int = 64
    memory_s: float = 20e-3
    stall_s: float = 3.0
    stall_factor: float = 16.0
    suspect_s: float = 0.5
    cooldown_s: float = 0.5
    cooldown_cap_s: float = 300.0
    settle_s: float = 10.0


class Health(StrEnum):
    UP = auto()
    SUSPECT = auto()  # a write failed or hangs: takes nothing more, its end is to be reported
    DOWN = auto()  # writes that were lost may still land: not fenced
    COOLING = auto()
    RESTORING = auto()
    PROBATION = auto()  # back; carries one slice at a time until one has landed


class RailState:
    """One rail: health, load and speed.

    Attributes:
        reason: of the last failure.
        bandwidth: bytes/s, learned; before that what the hardware claims.
        in_flight: bytes posted and not ended; `slices` and `background` count slices, the latter those of
            the lower priorities.
        late: slices in flight that may be waiting for their source (`CopyPlan.after`). While there are any,
            times say nothing about the rail.
        weight: its penalty relative to the best rail that can be chosen instead.
        slice_bytes: the right size of a slice here.
        max_ranges: of one slice.
    """

    __slots__ = (
        "_abandoned", "_busy_until", "_count", "_landed", "_measured", "_policy", "_progress", "_since",
        "_slicing", "_up_since", "_wake", "background", "bandwidth", "failures", "health", "in_flight",
        "late", "max_ranges", "reason", "slice_bytes", "slices", "spec", "weight",
    )  # fmt: skip

    def __init__(self, spec: RailSpec, policy: RailPolicy, slicing: SlicePolicy) -> None:
        self.spec = spec
        self.health = Health.UP
        self.reason = ""
        self.failures = 0
        self.bandwidth = _claimed(spec)
        self.in_flight = self.slices = self.background = self.late = 0
        self.weight = 1.0
        self._policy = policy
        self._slicing = slicing
        self._measured = False
        self._busy_until = self._since = self._progress = self._up_since = self._wake = 0.0
        self._landed = self._count = 0
        self._abandoned = False
        self._size(spec)

    # load and speed

    def posted(self, nbytes: int, background: bool, now: float, late: bool = False) -> None:
        if not self.slices:
            self._since = self._progress = now
            self._landed = self._count = 0
        self.in_flight += nbytes
        self.slices += 1
        self.background += background
        self.late += late
        if self.weight > 1:
            self._busy_until = max(self._busy_until, now) + nbytes * self.weight / self.bandwidth

    def ended(self, nbytes: int, background: bool, landed: bool, now: float, late: bool = False) -> None:
        doubtful = self.late > 0
        self.in_flight -= nbytes
        self.slices -= 1
        self.background -= background
        self.late -= late
        if not landed or self.spec.steady:
            return
        self._progress = now
        if doubtful:
            self._since = now
            self._landed = self._count = 0
            return
        self._landed += nbytes
        self._count += 1
        busy = now - self._since
        if busy <= 0:
            return
        # Small writes tell latency, not bandwidth.
        if self._landed >= self._count * self._slicing.min_bytes:
            gain = busy / (busy + self._policy.memory_s)
            self._learn(self._landed / busy, gain if self._measured else 1.0)
        self._since = now
        self._landed = self._count = 0

    def _learn(self, sample: float, gain: float) -> None:
        self._measured = True
        self.bandwidth = max(self.bandwidth + gain * (sample - self.bandwidth), _SLOWEST)
        self.slice_bytes = self._slicing.slice_bytes(self.bandwidth, True)

    def ahead(self, now: float) -> float:
        """Seconds until a slice posted now would be begun.

        A rail with a penalty rests after each slice as if that had taken longer: in flight or not, it is
        ready again only then.
        """
        ahead = self.in_flight * self.weight / self.bandwidth
        return max(ahead, self._busy_until - now) if self.weight > 1 else ahead

    def has_room(self, now: float) -> bool:
        policy = self._policy
        if self.weight > 1:
            return now >= self.rested() and self.slices < policy.max_slices
        # What the hardware claims is no reason to hand a rail more than it may carry in seconds.
        known = self._measured or self.spec.steady
        window = self.bandwidth * policy.window_s if known else self.slice_bytes
        return self.slices < 2 or (self.in_flight < window and self.slices < policy.max_slices)

    # health

    @property
    def usable(self) -> bool:
        return self.health in (Health.UP, Health.PROBATION)

    def suspect(self, reason: str, now: float) -> None:
        """A write failed: the rail's end will be reported soon, or it is abandoned."""
        if self.usable:
            self.health, self.reason = Health.SUSPECT, reason
            self._wake, self._abandoned = now + self._policy.suspect_s, False

    def stall(self, now: float) -> None:
        """Give up on a rail that hangs."""
        stuck = now - self._progress
        self.suspect(f"nothing of {self.slices} slices ({self.in_flight} bytes) landed in {stuck:.1f} s", now)
        self._abandoned = True
        self._measured = False  # how quick it was says nothing about how quick it will be

    def abandon(self) -> None:
        """Give up on a rail whose end was not reported although a write failed."""
        self._abandoned = True

    def down(self, reason: str, now: float) -> None:
        """The rail is gone, or could not be restored."""
        if self.health in (Health.DOWN, Health.COOLING):
            return
        restoring = self.health is Health.RESTORING
        if not restoring and now - self._up_since >= self._policy.settle_s:
            self.failures = 0
        rest = min(self._policy.cooldown_s * 2.0 ** min(self.failures, 60), self._policy.cooldown_cap_s)
        self._wake = now + rest
        self.failures += 1
        # One that could not be restored was fenced before the attempt.
        self.health = Health.COOLING if restoring else Health.DOWN
        self.reason = reason
        self.in_flight = self.slices = self.background = self.late = 0

    def fenced(self) -> bool:
        """Nothing that was lost can land any more. False, of no effect, if that was not awaited."""
        awaited = self.health is Health.DOWN
        if awaited:
            self.health = Health.COOLING
        return awaited

    def restore(self) -> None:
        """Its rest is over, it is being made anew."""
        self.health = Health.RESTORING

    def up(self, spec: RailSpec, now: float) -> None:
        """The rail can be used; after a failure on probation. Not before its fence."""
        if self.health is not Health.DOWN:
            if not self.usable:
                self.health = Health.PROBATION
                self._up_since = now
            self.spec = spec
            if not self._measured:
                self.bandwidth = _claimed(spec)
                self._size(spec)

    def _size(self, spec: RailSpec) -> None:
        """Slices before anything was measured."""
        slicing = self._slicing
        self.max_ranges = slicing.steady_ranges if spec.steady else slicing.max_ranges
        self.slice_bytes = slicing.steady_bytes if spec.steady else slicing.slice_bytes(self.bandwidth, False)

    def due(self) -> float:
        """When this rail has to be looked at if nothing happens to it before; `inf` for never."""
        if self.health is Health.COOLING or (self.health is Health.SUSPECT and not self._abandoned):
            return self._wake
        if self.usable and self.slices and not (self.spec.steady or self.late):
            predicted = self._policy.stall_factor * self.in_flight / self.bandwidth
            return self._progress + max(self._policy.stall_s, predicted)
        return inf

    def rested(self) -> float:
        """When a rail with a penalty has room again."""
        return self._busy_until - self._policy.window_s if self.weight > 1 else inf


def _claimed(spec: RailSpec) -> float:
    return spec.speed or _DEFAULT_SPEED.get(spec.path, 1e9)


class Rails:
    """All rails of a link by name, and the choice among them.

    Chosen from are the proven rails of the best rank that has any, and those on probation of that rank or a
    better one.

    Attributes:
        none_since: when the last usable rail went; None while there is one.
    """

    def __init__(self, policy: RailPolicy, slicing: SlicePolicy) -> None:
        self.none_since: float | None = -inf
        self._policy = policy
        self._slicing = slicing
        self._all: dict[str, RailState] = {}
        self._eligible: list[RailState] = []

    def __iter__(self) -> Iterator[RailState]:
        return iter(self._all.values())

    def get(self, name: str) -> RailState | None:
        return self._all.get(name)

    def up(self, spec: RailSpec, now: float) -> None:
        """A rail is new, was restored, or is described anew."""
        rail = self._all.get(spec.name)
        if rail is None:
            rail = self._all[spec.name] = RailState(spec, self._policy, self._slicing)
        rail.up(spec, now)
        self._refresh(now)

    def down(self, name: str, reason: str, now: float) -> None:
        """A rail is gone, or could not be restored."""
        rail = self._all.get(name)
        if rail is None:  # it never came up: nothing of it needs a fence, and it may come yet
            unknown = RailSpec(name, "", _UNKNOWN_RANK)
            rail = self._all[name] = RailState(unknown, self._policy, self._slicing)
            rail.health = Health.RESTORING
        rail.down(reason, now)
        self._refresh(now)

    def ended(
        self,
        rail: RailState,
        nbytes: int,
        background: bool,
        failed: str | None,
        now: float,
        late: bool = False,
    ) -> None:
        """A slice landed, or failed because the rail broke."""
        rail.ended(nbytes, background, failed is None, now, late)
        if failed is not None:
            rail.suspect(failed, now)
            self._refresh(now)
        elif rail.health is Health.PROBATION:
            rail.health = Health.UP
            self._refresh(now)

    def stall(self, rail: RailState, now: float) -> None:
        """A rail hangs; `rail.reason` says how."""
        rail.stall(now)
        self._refresh(now)

    def _refresh(self, now: float) -> None:
        best = min((r.spec.rank for r in self if r.health is Health.UP), default=_UNKNOWN_RANK)
        self._eligible = [
            r
            for r in self
            if (r.health is Health.UP and r.spec.rank == best)
            or (r.health is Health.PROBATION and r.spec.rank <= best)
        ]
        least = min((r.spec.penalty for r in self._eligible), default=1.0)
        for r in self._eligible:
            r.weight = r.spec.penalty / least
        if self._eligible:
            self.none_since = None
        elif self.none_since is None:
            self.none_since = now

    def choose(
        self, left: int, backlog: int, tried: Collection[str], background: bool, now: float
    ) -> tuple[RailState, int] | None:
        """The rail for the next slice of a piece of `left` bytes, and the slice's bytes.

        None if it is better to wait: every rail is full, or the full ones will have carried the whole
        `backlog` bytes that wait before the one with room has carried this slice. Rails in `tried` come
        only where there is no other.
        """
        eligible = self._eligible
        if tried:
            eligible = [r for r in eligible if r.spec.name not in tried] or eligible
        stripe = self._slicing.stripe_bytes
        total = sum(r.bandwidth / r.weight for r in eligible) if left > stripe else 0.0
        best: RailState | None = None
        best_size, best_end, wait = 0, inf, inf
        for r in eligible:
            if r.health is Health.PROBATION:
                if not r.slices:
                    return r, even(min(left, self._slicing.min_bytes), left)
                continue
            speed = r.bandwidth / r.weight
            if r.has_room(now) and not (background and r.background):
                size = min(left, r.slice_bytes)
                if left > stripe:
                    size = min(size, max(stripe, int(left * speed / total)))
                end = r.ahead(now) + size / speed
                if end < best_end:
                    best, best_size, best_end = r, size, end
            else:
                wait = min(wait, r.ahead(now) + backlog / speed)
        return None if best is None or best_end > wait else (best, even(best_size, left))
