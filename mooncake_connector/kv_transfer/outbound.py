"""An initiator's way to one target: its link, and the dispatcher that spreads transfers over its rails."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

from mooncake_connector.errors import TransferError
from mooncake_connector.kv_transfer.batching import Aggregator, Flush, Load
from mooncake_connector.kv_transfer.dispatcher import (
    Abandon,
    Action,
    Dispatcher,
    Finished,
    Post,
    Priority,
    Restore,
)
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.rails import RailSpec
from mooncake_connector.kv_transfer.slicing import whole_bytes
from mooncake_connector.kv_transfer.transfer import Transfer
from mooncake_connector.kv_transfer.transport.base import Failure, Link, Mark, Rail, SyncRail

FARTHEST = 1e3
"""The largest penalty: of a rail that has been made although nothing speaks for its NIC."""

logger = logging.getLogger(__name__)


class Outbound:
    """One target as an initiator reaches it. Thread-safe; nothing here blocks.

    Implements `LinkEvents`. Made by `TransferEngine.open`.

    Whatever happens becomes an event in one queue; the thread that finds nobody at work handles all that
    wait. So the dispatcher's actions are carried out before it hears of the next event, as it demands, and
    callbacks may submit.

    Args:
        name: of the peer, for logs.
        paths: in order of preference; a rail of another path is not used.
        wake: called with the time when `next_tick` changes.
        on_up: called once, when the first rail can be used.
        on_down: called once with the reason when no rail is left for good; every transfer has ended then.
        on_end: called with this object when it has ended, whoever ended it.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        *,
        wake: Callable[[float], None],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_end: Callable[["Outbound"], None],
    ) -> None:
        self.name = name
        self._ranks = {path: rank for rank, path in enumerate(paths)}
        self._wake, self._on_up, self._on_down, self._on_end = wake, on_up, on_down, on_end
        self._link: Link | None = None
        self._events: deque[Callable[[float], None]] = deque()
        self._turn = threading.Lock()
        self._due: float | None = None
        self._tick_waits = False
        self._stirred = True  # the dispatcher's next tick may have changed
        self._dispatcher_due: float | None = None
        self._gather_due = 0.0
        self._numbers = itertools.count(1)
        # Everything below belongs to the thread that has the turn.
        self._dispatcher = Dispatcher()
        self._rails: dict[str, Rail] = {}
        self._sync_rails: dict[str, SyncRail] = {}
        # A dispatched transfer stands for one submitted, or for a batch of small ones.
        self._running: dict[int, tuple[Transfer, ...]] = {}
        self._number_of: dict[Transfer, int] = {}
        self._load = Load()
        self._aggregators: dict[tuple[int, Priority], Aggregator] = {}  # those that hold something
        self._gathered: dict[int, Transfer] = {}
        self._questions: list[Callable[[float], None]] = []
        self._up = False
        # cuda_ipc needs a moment more than streams, over which the first gigabytes would crawl meanwhile.
        self._awaited = "cuda_ipc" if "cuda_ipc" in paths else ""
        self._held: list[Callable[[float], None]] = []
        self._down: str | None = None
        self._sent: dict[str, int] = {}

    def attach(self, link: Link) -> None:
        """Give it the link whose events it gets."""
        self._link = link

    # ------------------------------------------------------------------ the submitter's side

    def submit(
        self,
        key: int,
        plan: CopyPlan,
        *,
        priority: Priority = Priority.FOREGROUND,
        deadline: float | None = None,
        urgent: bool = False,
    ) -> Transfer:
        """Enqueue a copy; see `TransferEngine.submit`. `deadline` in seconds from now."""
        transfer = Transfer(whole_bytes(plan), self._progress, self._cancel)
        at = None if deadline is None else time.monotonic() + deadline

        def event(now: float) -> None:
            if self._down is not None:
                transfer.end(self._down)
            elif at is not None:
                # A batch has one deadline at most, so a write that has one travels by itself.
                self._dispatch(key, plan, priority, at, (transfer,), now)
            else:
                self._gather(key, plan, priority, urgent, transfer, now)

        self._feed(event)
        return transfer

    def write_now(self, key: int, plan: CopyPlan, timeout: float) -> None:
        """Copy, and return when all has landed; see `TransferEngine.write_now`."""
        rail = self._idle_rail()
        if rail is not None:
            failure = rail.write_sync(key, plan, timeout)
            if failure is None:
                return
            if not failure.retry:
                raise TransferError(failure.reason)
        self.submit(key, plan, deadline=timeout).wait()

    def _idle_rail(self) -> SyncRail | None:
        """The rail that a write would take now, if it can be waited on and nothing else is under way."""
        if not self._turn.acquire(blocking=False):
            return None
        try:
            name = None if self._running or self._events else self._dispatcher.idle_rail()
            return self._sync_rails.get(name) if name is not None else None
        finally:
            self._turn.release()
            self._drain()

    def marks(self) -> tuple[Mark, ...]:
        """What the target has to see before it may use what has landed until now."""
        return self._link.marks() if self._link is not None else ()

    def ask(self, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None:
        """Put a question to the target, once the link is up; see `Link.ask`."""

        def event(now: float) -> None:
            if self._down is not None:
                on_answer(Failure(self._down, False))
            elif self._up:
                assert self._link is not None
                self._link.ask(topic, body, on_answer)
            else:
                self._questions.append(event)

        self._feed(event)

    def close(self) -> None:
        """Hang up; transfers that run end with an error. `on_down` is not called."""
        if self._link is not None:
            self._link.close()
        self._feed(lambda now: self._fall("the link was closed here", False, now))

    @property
    def sent(self) -> Mapping[str, int]:
        """Bytes handed to each rail so far, those of failed slices included."""
        return dict(self._sent)

    @property
    def rails(self) -> tuple[str, ...]:
        """Names of the rails that are up."""
        return tuple(self._rails)

    # ------------------------------------------------------------------ the clock

    def next_tick(self) -> float | None:
        """When `tick` is due next (monotonic clock), if ever."""
        return self._due

    def tick(self) -> None:
        """Let deadlines pass, rails cool down, batches leave."""
        if not self._tick_waits:
            self._tick_waits = True
            self._feed(self._ticked)

    # ------------------------------------------------------------------ LinkEvents

    def rail_up(self, rail: Rail) -> None:
        if rail.path not in self._ranks:
            return
        penalty = min(max(rail.penalty, 1.0), FARTHEST)
        spec = RailSpec(rail.name, rail.path, self._ranks[rail.path], rail.speed, penalty, rail.steady)

        def event(now: float) -> None:
            if self._awaited and rail.path != self._awaited:
                self._held.append(event)
                return
            self._release_held()
            logger.info("%s: rail %s is up", self.name, rail.name)
            self._rails[rail.name] = rail
            if isinstance(rail, SyncRail):
                self._sync_rails[rail.name] = rail
            if not self._up:
                self._up = True
                self._on_up()
                self._events.extend(self._questions)
                self._questions.clear()
            self._perform(self._dispatcher.rail_up(spec, now))

        self._feed(event)

    def rail_down(self, name: str, reason: str) -> None:
        def event(now: float) -> None:
            if self._awaited and name.startswith(self._awaited):
                self._release_held()
            logger.warning("%s: rail %s is down: %s", self.name, name, reason)
            self._rails.pop(name, None)
            self._sync_rails.pop(name, None)
            self._perform(self._dispatcher.rail_down(name, reason, now))

        self._feed(event)

    def rail_fenced(self, name: str) -> None:
        self._feed(lambda now: self._perform(self._dispatcher.rail_fenced(name, now)))

    def link_down(self, reason: str) -> None:
        self._feed(lambda now: self._fall(reason, True, now))

    # ------------------------------------------------------------------ inside

    def _feed(self, event: Callable[[float], None]) -> None:
        self._events.append(event)
        self._drain()

    def _drain(self) -> None:
        while self._events and self._turn.acquire(blocking=False):
            try:
                while self._events or self._aggregators:
                    if self._events:
                        self._handle(self._events.popleft())
                    elif not self._handle(self._let_go):
                        break
                before, due = self._due, self._next_due()
                self._due = due
            finally:
                self._turn.release()
            if due is not None and due != before:
                self._wake(due)

    def _release_held(self) -> None:
        """The awaited rail is up, or won't be: the others may be used."""
        self._awaited = ""
        self._events.extend(self._held)
        self._held.clear()

    def _ticked(self, now: float) -> None:
        self._tick_waits = False
        self._perform(self._dispatcher.tick(now))

    def _handle(self, event: Callable[[float], object]) -> object:
        try:
            return event(time.monotonic())
        except Exception:  # one transfer's trouble must not stop all others
            logger.exception("%s: transfers go on after an unexpected error", self.name)
            return None

    def _next_due(self) -> float | None:
        if self._stirred:
            self._stirred, self._dispatcher_due = False, self._dispatcher.next_tick()
        due = self._dispatcher_due
        if self._aggregators and (due is None or self._gather_due < due):
            return self._gather_due
        return due

    def _dispatch(
        self,
        key: int,
        plan: CopyPlan,
        priority: Priority,
        deadline: float | None,
        transfers: tuple[Transfer, ...],
        now: float,
    ) -> None:
        number = next(self._numbers)
        self._running[number] = transfers
        for transfer in transfers:
            self._number_of[transfer] = number
        self._perform(self._dispatcher.submit(number, key, plan, priority, deadline, now))

    def _gather(
        self, key: int, plan: CopyPlan, priority: Priority, urgent: bool, transfer: Transfer, now: float
    ) -> None:
        aggregator = self._aggregators.get((key, priority))
        if aggregator is None:
            if not self._running and not self._events:
                self._dispatch(key, plan, priority, None, (transfer,), now)
                return
            aggregator = self._aggregators[key, priority] = Aggregator(self._load)
            self._gather_due = 0.0
        item = next(self._numbers)
        self._gathered[item] = transfer
        self._flush(key, priority, aggregator.add(item, plan, urgent, now), now)

    def _let_go(self, now: float) -> bool:
        """All that came together was gathered: let go what is to leave now. Whether anything did."""
        busy, left = bool(self._running), False
        if busy and self._gather_due > now:
            return False
        self._gather_due = inf
        for (key, priority), aggregator in list(self._aggregators.items()):
            flushes = aggregator.tick(now, busy)
            self._flush(key, priority, flushes, now)
            left = left or bool(flushes)
            at = aggregator.next_tick()
            if at is None:
                del self._aggregators[key, priority]
            else:
                self._gather_due = min(self._gather_due, at)
        return left

    def _flush(self, key: int, priority: Priority, flushes: Iterable[Flush], now: float) -> None:
        for flush in flushes:
            transfers = tuple(self._gathered.pop(item) for item in flush.items)
            self._dispatch(key, flush.plan, priority, None, transfers, now)

    def _perform(self, actions: Sequence[Action]) -> None:
        self._stirred = True
        for action in actions:
            match action:
                case Post():
                    self._post(action)
                case Finished():
                    self._finished(action)
                case Restore():
                    assert self._link is not None
                    self._link.restore(action.rail)
                case Abandon():
                    assert self._link is not None
                    self._link.abandon(action.rail, action.reason)

    def _post(self, post: Post) -> None:
        number = post.slice
        self._sent[post.rail] = self._sent.get(post.rail, 0) + whole_bytes(post.plan)

        def ended(failure: Failure | None) -> None:
            self._feed(lambda now: self._perform(self._dispatcher.slice_ended(number, failure, now)))

        self._rails[post.rail].write(post.key, post.plan, ended)

    def _finished(self, finished: Finished) -> None:
        transfers = self._running.pop(finished.transfer)
        for transfer in transfers:
            del self._number_of[transfer]
        for transfer in transfers:
            transfer.end(finished.error)
        if not self._running:
            self._load.idle(time.monotonic())

    def _progress(self, transfer: Transfer) -> int:
        number = self._number_of.get(transfer)
        members = self._running.get(number, ()) if number is not None else ()
        # Of a batch nobody can tell whose bytes have landed.
        return self._dispatcher.progress(number) if number is not None and len(members) == 1 else 0

    def _cancel(self, transfer: Transfer, reason: str) -> None:
        def event(now: float) -> None:
            number = self._number_of.get(transfer)
            if number is not None and len(self._running[number]) == 1:  # a batch goes on: others are in it
                self._perform(self._dispatcher.cancel(number, reason, now))

        self._feed(event)

    def _fall(self, reason: str, tell: bool, now: float) -> None:
        if self._down is not None:
            return
        self._down = reason
        self._rails.clear()
        self._sync_rails.clear()
        self._events.extend(self._questions)
        self._questions.clear()
        waiting = list(self._gathered.values())
        self._gathered.clear()
        self._aggregators.clear()
        self._perform(self._dispatcher.link_down(reason, now))
        for transfer in waiting:
            transfer.end(reason)
        self._on_end(self)
        if tell:
            logger.info("%s: the link is down: %s", self.name, reason)
            self._on_down(reason)
