"""Which bytes go when and over which rail: one dispatcher per link. Pure: events in, actions out.

A transfer is a queue of pieces. Slices are cut from its front only when a rail has room for one; what a rail
lost becomes a piece again, to be cut anew for the rail that takes it over. Priorities are strict; transfers
of one priority take turns, slice by slice, so that a small one is not stuck behind a huge one.

No write after free: bytes that were lost with a rail may land until that rail is fenced, so a transfer that
had a slice on it does not end before, however it ends.
"""

from collections import deque
from enum import IntEnum
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

import msgspec

from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.rails import Health, RailPolicy, Rails, RailSpec, RailState
from mooncake_connector.kv_transfer.slicing import Piece, SlicePolicy, whole_bytes
from mooncake_connector.kv_transfer.transport.base import Failure

__all__ = [
    "Abandon",
    "Action",
    "Dispatcher",
    "Finished",
    "Post",
    "Priority",
    "RailPolicy",
    "RailSpec",
    "Restore",
    "SlicePolicy",
]


class Priority(IntEnum):
    """Foreground is behind at most one slice of the others per rail, and they start none while it waits."""

    FOREGROUND = 0
    PREFETCH = 1
    MIGRATION = 2


class Post(msgspec.Struct, frozen=True, eq=False):
    """Write `plan` under `key` over `rail`; its end is `slice_ended(slice)`."""

    slice: int
    rail: str
    key: int
    plan: CopyPlan


class Restore(msgspec.Struct, frozen=True):
    """Make the rail anew: `rail_up` or `rail_down` answers."""

    rail: str


class Abandon(msgspec.Struct, frozen=True):
    """Break the rail; `rail_down` and `rail_fenced` follow. Of no effect on one that is down."""

    rail: str
    reason: str


class Finished(msgspec.Struct, frozen=True):
    """The end of a transfer: no byte of it lands any more. `nbytes` have landed, all if `error` is None."""

    transfer: int
    error: str | None
    nbytes: int


Action = Post | Restore | Abandon | Finished


class _Transfer:
    __slots__ = ("done", "error", "fences", "flying", "id", "key", "nbytes", "pieces", "priority", "since")

    def __init__(self, number: int, key: int, nbytes: int, priority: Priority, now: float) -> None:
        self.id = number
        self.key = key
        self.nbytes = nbytes
        self.priority = priority
        self.since = now
        self.pieces: deque[Piece] = deque()
        self.done = 0
        self.flying = 0  # slices
        self.fences = 0  # rails that lost slices of this transfer and are not fenced
        self.error: str | None = None


class _Slice:
    __slots__ = ("nbytes", "plan", "rail", "transfer", "tried")

    def __init__(
        self, transfer: _Transfer, rail: RailState, plan: CopyPlan, nbytes: int, tried: tuple[str, ...]
    ) -> None:
        self.transfer = transfer
        self.rail = rail
        self.plan = plan
        self.nbytes = nbytes
        self.tried = tried


class Dispatcher:
    """Transfers to one peer, over all rails to it. Not thread-safe.

    A `Post` is meant for the rail as it was when the event was handed in: posted to one that was restored
    meanwhile, it would land after its transfer ended. So look the rail up together with handing in the event,
    and let a rail that went down stay down, whatever its successor is called.

    Times are seconds on one monotonic clock.
    """

    def __init__(self, slicing: SlicePolicy | None = None, rails: RailPolicy | None = None) -> None:
        self._policy = slicing or SlicePolicy()
        self.rails = Rails(rails or RailPolicy(), self._policy)
        self._transfers: dict[int, _Transfer] = {}
        self._waiting: tuple[deque[_Transfer], ...] = tuple(deque() for _ in Priority)
        self._backlog = [0 for _ in Priority]
        self._flying: dict[int, _Slice] = {}
        self._owed: dict[str, set[_Transfer]] = {}  # by rail: whom its fence sets free
        self._deadlines: list[tuple[float, int, _Transfer]] = []
        self._numbers = count(1)
        self._now = -inf
        self._down: str | None = None

    # transfers

    def submit(
        self, transfer: int, key: int, plan: CopyPlan, priority: Priority, deadline: float | None, now: float
    ) -> list[Action]:
        """Move `plan`'s bytes under grant `key`; exactly one `Finished(transfer)` will follow.

        Raises:
            ValueError: A transfer of that number is under way.
        """
        if transfer in self._transfers:
            raise ValueError(f"transfer {transfer} is under way already: number transfers uniquely")
        if self._down is not None:
            return [Finished(transfer, self._down, 0)]
        if deadline is not None and deadline <= now:
            return [Finished(transfer, "the deadline was over before it began", 0)]
        nbytes = whole_bytes(plan) if plan.length.size else 0
        if not nbytes:
            return [Finished(transfer, None, 0)]
        t = self._transfers[transfer] = _Transfer(transfer, key, nbytes, priority, now)
        if deadline is not None:
            heappush(self._deadlines, (deadline, next(self._numbers), t))
            self._forget_deadlines()
        t.pieces.append(Piece(plan, nbytes))
        self._backlog[priority] += nbytes
        self._waiting[priority].append(t)
        actions: list[Action] = []
        self._pump(now, actions)
        return actions

    def cancel(self, transfer: int, reason: str, now: float) -> list[Action]:
        """Send nothing more of a transfer; it ends once nothing of it can land. Unknown ones: nothing."""
        t = self._transfers.get(transfer)
        actions: list[Action] = []
        if t is not None:
            self._fail(t, reason)
            self._settle(t, actions)
            self._pump(now, actions)
        return actions

    def idle_rail(self) -> str | None:
        """The rail that a small transfer would take, if none is under way."""
        choice = None if self._transfers else self.rails.choose(1, 1, (), False, self._now)
        return None if choice is None or choice[0].health is not Health.UP else choice[0].spec.name

    def progress(self, transfer: int) -> int:
        """Bytes that have landed of a transfer that is under way; 0 for others."""
        t = self._transfers.get(transfer)
        return 0 if t is None else t.done

    # what the link tells

    def rail_up(self, spec: RailSpec, now: float) -> list[Action]:
        """A rail can be used, for the first time or again."""
        actions: list[Action] = []
        self.rails.up(spec, now)
        self._pump(now, actions)
        return actions

    def rail_down(self, name: str, reason: str, now: float) -> list[Action]:
        """A rail is gone or could not be restored; its slices move to others."""
        lost = [(i, s) for i, s in self._flying.items() if s.rail.spec.name == name]
        self.rails.down(name, reason, now)
        actions: list[Action] = []
        for number, s in lost:
            del self._flying[number]
            s.transfer.flying -= 1
            self._lost(s, reason)
            self._settle(s.transfer, actions)
        self._pump(now, actions)
        return actions

    def rail_fenced(self, name: str, now: float) -> list[Action]:
        """Nothing more lands that was posted to a rail before it went down."""
        rail = self.rails.get(name)
        actions: list[Action] = []
        if rail is not None and rail.fenced():
            for t in self._owed.pop(name, ()):
                t.fences -= 1
                self._settle(t, actions)
        return actions

    def link_down(self, reason: str, now: float) -> list[Action]:
        """The link is gone for good, and fenced at the target: all transfers end."""
        self._down = reason
        ended: list[Action] = [Finished(t.id, t.error or reason, t.done) for t in self._transfers.values()]
        self._transfers.clear()
        self._flying.clear()
        self._owed.clear()
        self._deadlines.clear()
        for waiting in self._waiting:
            waiting.clear()
        self._backlog = [0 for _ in Priority]
        return ended

    def slice_ended(self, slice: int, failure: Failure | None, now: float) -> list[Action]:
        """A posted slice has landed or failed. Nothing happens if its rail was reported down before."""
        s = self._flying.pop(slice, None)
        if s is None:
            return []
        actions: list[Action] = []
        t, rail = s.transfer, s.rail
        broken = failure.reason if failure is not None and failure.retry else None
        self.rails.ended(rail, s.nbytes, t.priority > 0, broken, now, bool(s.plan.after))
        t.flying -= 1
        if failure is None:
            t.done += s.nbytes
        elif failure.retry:
            self._lost(s, failure.reason)
        else:
            self._fail(t, failure.reason)
        self._settle(t, actions)
        self._pump(now, actions)
        return actions

    # time

    def tick(self, now: float) -> list[Action]:
        """Do what is due. After it `next_tick` is in the future."""
        if self._down is not None:
            return []
        actions: list[Action] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            t = heappop(self._deadlines)[2]
            if self._transfers.get(t.id) is t:
                self._fail(t, f"its deadline is over: {t.done} of {t.nbytes} bytes had landed")
                self._settle(t, actions)
        for rail in self.rails:
            if rail.due() > now:
                continue
            if rail.health is Health.COOLING:
                rail.restore()
                actions.append(Restore(rail.spec.name))
            else:
                if rail.health is Health.SUSPECT:
                    rail.abandon()
                else:
                    self.rails.stall(rail, now)
                actions.append(Abandon(rail.spec.name, rail.reason))
        if self.rails.none_since is not None:
            for t in [t for t in self._transfers.values() if t.pieces and self._patience(t) <= now]:
                self._fail(t, self._why_no_rail())
                self._settle(t, actions)
        self._pump(now, actions)
        return actions

    def next_tick(self) -> float | None:
        """When `tick` has something to do if nothing happens before."""
        if self._down is not None:
            return None
        at = self._deadlines[0][0] if self._deadlines else inf
        waiting = any(self._waiting)
        for rail in self.rails:
            at = min(at, rail.due())
            if waiting and rail.usable and rail.rested() > self._now:
                at = min(at, rail.rested())
        if waiting and self.rails.none_since is not None:
            at = min(at, min(self._patience(t) for t in self._transfers.values() if t.pieces))
        return None if at == inf else at

    # the inside

    def _pump(self, now: float, actions: list[Action]) -> None:
        """Cut and post slices while there are rails that take them."""
        self._now = now
        for waiting in self._waiting:
            skipped = 0
            while skipped < len(waiting):
                t = waiting[0]
                piece = t.pieces[0]
                choice = self.rails.choose(
                    piece.left, self._backlog[t.priority], piece.tried, t.priority > 0, now
                )
                if choice is None:
                    if not piece.tried:
                        break
                    skipped += 1  # it waits for rails that have not lost it; others may have other choices
                    waiting.rotate(-1)
                    continue
                skipped = 0
                self._post(t, piece, *choice, now, actions)
            if waiting:
                return

    def _post(
        self, t: _Transfer, piece: Piece, rail: RailState, nbytes: int, now: float, actions: list[Action]
    ) -> None:
        """Post a slice of the first waiting transfer, which then goes to the end of its queue."""
        plan, nbytes = piece.take(nbytes, rail.max_ranges)
        waiting = self._waiting[t.priority]
        waiting.popleft()
        if not piece.left:
            t.pieces.popleft()
        if t.pieces:
            waiting.append(t)
        self._backlog[t.priority] -= nbytes
        rail.posted(nbytes, t.priority > 0, now, bool(plan.after))
        t.flying += 1
        number = next(self._numbers)
        self._flying[number] = _Slice(t, rail, plan, nbytes, piece.tried)
        actions.append(Post(number, rail.spec.name, t.key, plan))

    def _lost(self, s: _Slice, reason: str) -> None:
        """A rail broke with this slice on it: another one shall carry it; it may land until the fence."""
        t, name = s.transfer, s.rail.spec.name
        self._owe_fence(t, name)
        if t.error is not None:
            return
        if len(s.tried) >= self._policy.max_failovers:
            self._fail(t, f"{', '.join((*s.tried, name))} failed one after the other, the last one: {reason}")
            return
        if not t.pieces:
            self._waiting[t.priority].appendleft(t)
        t.pieces.appendleft(Piece(s.plan, s.nbytes, (*s.tried, name)))
        self._backlog[t.priority] += s.nbytes

    def _owe_fence(self, t: _Transfer, rail: str) -> None:
        owed = self._owed.setdefault(rail, set())
        if t not in owed:
            owed.add(t)
            t.fences += 1

    def _fail(self, t: _Transfer, reason: str) -> None:
        """Nothing more of this transfer is posted; the first reason counts."""
        if t.error is not None:
            return
        t.error = reason
        if t.pieces:
            self._waiting[t.priority].remove(t)
            self._backlog[t.priority] -= sum(piece.left for piece in t.pieces)
            t.pieces.clear()

    def _settle(self, t: _Transfer, actions: list[Action]) -> None:
        """End a transfer of which nothing waits, is in flight, or may still land."""
        if not (t.pieces or t.flying or t.fences) and self._transfers.pop(t.id, None) is not None:
            actions.append(Finished(t.id, t.error, t.done))

    def _patience(self, t: _Transfer) -> float:
        since = self.rails.none_since
        return inf if since is None else max(since, t.since) + self._policy.no_rail_s

    def _why_no_rail(self) -> str:
        rails = [f"{r.spec.name} is {r.health} ({r.reason})" for r in self.rails]
        return f"no rail for {self._policy.no_rail_s:g} s: {'; '.join(rails) or 'none ever came up'}"

    def _forget_deadlines(self) -> None:
        """Of transfers that ended, before they outnumber the others."""
        if len(self._deadlines) > 2 * len(self._transfers) + 64:
            self._deadlines = [d for d in self._deadlines if self._transfers.get(d[2].id) is d[2]]
            heapify(self._deadlines)
