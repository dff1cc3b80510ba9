"""The conductor: who serves a request, now, later or not at all. Every call says when it is."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from mooncake_connector.scheduler.policy.admission import Ahead, Gate, Refusal
from mooncake_connector.scheduler.policy.base import (
    Arrival,
    DecodeView,
    Instance,
    Placement,
    PrefillView,
    Rejected,
    Unserved,
    Verdict,
    Waiting,
)
from mooncake_connector.scheduler.policy.decode_table import Answer
from mooncake_connector.scheduler.policy.estimators import Estimators
from mooncake_connector.scheduler.policy.fairness import Line, Usage, Waiter
from mooncake_connector.scheduler.policy.flight import Flight
from mooncake_connector.scheduler.policy.ledger import Account, Booking, Ledger
from mooncake_connector.scheduler.policy.margin import Margins
from mooncake_connector.scheduler.policy.routing import Route, Router
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.policy.underway import Underway

# Those that wait are looked at when something ended, not more often than this, and now and then. Seconds.
# As long as nobody's wait ends, looks become rarer, up to once in a `NAP`.
PAUSE, NAP = 0.25, 1.0
# So many of them at a time that go on waiting.
LOOKS = 2
# So many wait at most: beyond, it can't be told any more when there will be room.
MOST = 64


class Prefixes(Protocol):
    """Who holds which prefix; `PrefixIndex` is one, a KVCache store can be another.

    Attributes:
        block_size: tokens of one block.
    """

    block_size: int

    def match(self, keys: Sequence[int]) -> Mapping[str, int]:
        """Blocks of the prefix that each instance holds, of those that hold any."""


class Conductor:
    """Places requests and keeps the books of those in flight.

    Args:
        settings: how to choose, and whom to let in.
        index: who holds which prefix; others feed it.
        estimators: what things cost; learns from what engines say.
        seed: for what is random; the same calls with the same seed have the same results.
    """

    def __init__(self, settings: Scheduling, index: Prefixes, estimators: Estimators, seed: int = 0) -> None:
        self._index = index
        self._estimators = estimators
        self._ledger = Ledger(estimators.step.seconds)
        self._seed = seed
        self._router = self._routing(settings)
        self._underway = Underway()
        self._usage = Usage()
        self._gate = Gate(settings, self._ledger, self._router, estimators, self._usage)
        self._line = Line()
        self._look = 0.0
        self._looked, self._pause = float("-inf"), PAUSE
        self._flights: dict[str, Flight] = {}

    def configure(self, settings: Scheduling) -> None:
        """Choose and admit by these settings from now on; what is in flight, waits or was learned stays."""
        self._router = self._routing(settings)
        self._gate.configure(settings, self._router)

    def join(self, instance: Instance, now: float) -> None:
        """An engine came up, or came anew: nothing is in flight there."""
        self._ledger.join(instance, now)
        self._look = now

    def leave(self, name: str, now: float) -> None:
        """An engine went. Its requests stay open until `ended` is said of each."""
        self._ledger.leave(name, now)
        self._underway.leave(name)
        self._look = now

    def pause(self, name: str, now: float) -> None:
        """An engine is to get nothing more; what it has stays in the books, be it for `resume`."""
        self._ledger.pause(name)
        self._look = now

    def resume(self, name: str, now: float) -> None:
        """It may get requests again, beside those that it has."""
        self._ledger.resume(name)
        self._look = now

    def arrive(self, arrival: Arrival, now: float) -> Verdict:
        """Decide about a request. One that is placed is in flight until `ended`, whatever becomes of it.

        One that is in flight already, as it failed somewhere and comes again, gives up its first place.
        """
        self.ended(arrival.id, now)
        answer = Answer.of(self._estimators.lengths.predict(arrival))
        route = self._route(arrival, answer, now)
        if route is None:
            return Unserved()
        before = [waiter for waiter in self._line if waiter.arrival.priority >= arrival.priority]
        judged = self._judge(arrival, route, answer, now, 0.0, before)
        self._gate.came(arrival, route, answer, now)
        if isinstance(judged, Route):
            return self._place(arrival, judged, answer, now, now)
        if judged.wait is None or judged.wait > judged.patience or len(self._line) >= MOST:
            return judged.rejected
        cost, until = self._cost(arrival.tokens, route, answer), now + judged.patience
        waiter = Waiter(arrival, answer, cost, route.seconds, now, until)
        self._line.add(waiter)
        return Waiting(until=waiter.until)

    def due(self) -> float | None:
        """When `wake` has something to do: ask anew after every other call. None: nobody waits."""
        deadline = self._line.deadline()
        return None if deadline is None else min(deadline, max(self._look, self._looked + self._pause))

    def wake(self, now: float) -> list[tuple[str, Verdict]]:
        """Decide about those that wait: by request, what became of it. The others go on waiting.

        Before it is `due` there is nothing to do.
        """
        found: list[tuple[str, Verdict]] = []
        due = self.due()
        if due is None or now < due:
            return found
        before: list[Waiter] = []
        for waiter in self._line:
            # A look costs time, and those far behind have no chance: they are looked at when they must be.
            if len(before) >= LOOKS and now < waiter.until:
                continue
            verdict = self._again(waiter, before, now)
            if verdict is None:
                before.append(waiter)
                continue
            self._line.take(waiter.arrival.id, served=isinstance(verdict, Placement))
            found.append((waiter.arrival.id, verdict))
        self._pause = PAUSE if found else min(2 * self._pause, NAP)
        self._looked, self._look = now, now + NAP
        return found

    def prefilled(
        self,
        id: str,
        now: float,
        *,
        queued: float | None = None,
        computed: float | None = None,
        cached: int | None = None,
    ) -> Rejected | None:
        """Its prompt was computed.

        Args:
            queued: seconds that it waited in the engine, if the engine says so.
            computed: seconds from then to its end.
            cached: tokens of the prompt that the engine held.

        Returns:
            A rejection if decode turns out to have no room for it: it is not in flight any more.
        """
        flight = self._flights.get(id)
        if flight is None:
            return None
        route = flight.route
        if queued is not None:
            self._estimators.calibration.observe("queue", route.queue, queued)
        if self._ledger.prefilled(id, now):
            held = route.cached if cached is None else cached
            self._measure(route.computes, flight.arrival.tokens, held, computed, now)
        flight.prefilled = now
        self._computed(flight)
        if not flight.first:
            self._note(flight, now)
        rejected = self._gate.rejudge(flight.arrival, route, now)
        if rejected:
            self.ended(id, now)
        return rejected

    def first_token(self, id: str, now: float) -> None:
        """Its answer began."""
        flight = self._flights.get(id)
        if flight is None or flight.first:
            return
        flight.first = now
        self._computed(flight)
        self._ledger.progressed(id, 1, now)
        self._estimators.calibration.observe("ttft", flight.route.ttft, now - flight.began)
        waited = flight.began - flight.came
        self._gate.began(flight.arrival, waited + flight.route.ttft, now - flight.came, flight.margins, now)
        route = flight.route
        if flight.prefilled and route.computes != route.decode:
            tokens, seconds = flight.arrival.tokens, now - flight.prefilled
            self._estimators.handover.observe(route.computes, route.decode, tokens, seconds)
        self._note(flight, now)

    def progressed(self, id: str, tokens: int, now: float) -> None:
        """Its answer has so many tokens."""
        if id in self._flights:
            self._ledger.progressed(id, tokens, now)

    def copied(self, source: str, target: str, tokens: int, seconds: float) -> None:
        """A prefix was copied; `tokens` are what the target did not hold."""
        predicted = self._estimators.transfer.seconds(source, target, tokens)
        self._estimators.calibration.observe("transfer", predicted, seconds)
        self._estimators.transfer.observe(source, target, tokens, seconds)

    def ended(
        self, id: str, now: float, output_tokens: int | None = None, *, decoding: float | None = None
    ) -> None:
        """It is over: after so many tokens, or None if it failed or nobody wanted it any more.

        Args:
            decoding: seconds from its first token to its last, if the engine says so.
        """
        self._line.take(id)
        flight = self._flights.pop(id, None)
        if flight is None:
            return
        self._computed(flight)
        if output_tokens:
            self._learn(flight, now, output_tokens, decoding)
        self._ledger.close(id, now)
        self._look = now

    def waiting(self) -> int:
        """How many wait."""
        return len(self._line)

    def margins(self, now: float) -> Margins:
        """By how much predictions are taken to fall short."""
        return self._gate.margins(now)

    def accounts(self, now: float) -> Sequence[Account]:
        """Load of every engine."""
        return list(self._ledger.accounts(now))

    def _routing(self, settings: Scheduling) -> Router:
        return Router(
            settings.routing,
            settings.replication_threshold,
            settings.min_prefill_tokens,
            self._estimators,
            self._seed,
        )

    def _computed(self, flight: Flight) -> None:
        """Its blocks are the index's to tell now, or nobody's."""
        if flight.underway:
            flight.underway = False
            self._underway.end(flight.route.computes, flight.arrival.id, flight.arrival.keys)

    def _note(self, flight: Flight, now: float) -> None:
        """How much its decode engine has done up to now."""
        if flight.route.decode in self._ledger.instances:
            flight.since, flight.areas = now, self._ledger.decode(flight.route.decode).areas(now)

    def _measure(self, name: str, tokens: int, held: int, computed: float | None, now: float) -> None:
        queue, estimator = self._ledger.prompts(name), self._estimators.prefill
        predicted = estimator.seconds(name, tokens, held)
        for one in queue.meter.add(tokens, held, predicted, now, left=len(queue), own=computed):
            self._estimators.calibration.observe("prefill", one.predicted, one.seconds)
            estimator.observe(name, one.tokens, one.cached, one.seconds)

    def _learn(self, flight: Flight, now: float, output: int, decoding: float | None) -> None:
        estimators, decode = self._estimators, flight.route.decode
        (median,) = flight.answer.lengths.quantiles((0.5,))
        estimators.calibration.observe("output", median, output)
        estimators.lengths.observe(flight.arrival, output)
        lasted = decoding or (now - flight.first if flight.first else 0.0)
        passed = now - flight.since
        if output < 2 or min(lasted, passed, flight.since) <= 0 or decode not in self._ledger.instances:
            return
        tbt = lasted / (output - 1)
        self._gate.lasted(flight.arrival, flight.route.tbt, tbt, lasted, flight.margins, now)
        batch, context = (
            (after - before) / passed
            for before, after in zip(flight.areas, self._ledger.decode(decode).areas(now), strict=True)
        )
        estimators.calibration.observe("tbt", flight.route.tbt, tbt)
        estimators.step.observe(decode, max(1, round(batch)), round(context), tbt)

    def _again(self, waiter: Waiter, before: Sequence[Waiter], now: float) -> Verdict | None:
        """What becomes of one that waits, if it is not to wait on."""
        arrival, answer = waiter.arrival, waiter.answer
        route = self._route(arrival, answer, now)
        if route is None:
            return Unserved()
        judged = self._judge(arrival, route, answer, now, now - waiter.since, before)
        if isinstance(judged, Route):
            return self._place(arrival, judged, answer, now, waiter.since)
        if now < waiter.until and judged.wait is not None:
            return None
        return msgspec.structs.replace(judged.rejected, waited=now - waiter.since)

    def _judge(
        self,
        arrival: Arrival,
        route: Route,
        answer: Answer,
        now: float,
        waited: float,
        before: Sequence[Waiter],
    ) -> Route | Refusal:
        aged, ahead = Ahead.of([waiter for waiter in before if waiter.aged(now)]), Ahead.of(before)
        return self._gate.judge(arrival, route, answer, now, waited=waited, aged=aged, ahead=ahead)

    def _cost(self, tokens: int, route: Route, answer: Answer) -> float:
        """Seconds of an engine that a request takes, those of decode by its part of the KV."""
        instance = self._ledger.instances[route.decode]
        writing = answer.mean * route.tbt
        held = (tokens + answer.mean) / instance.kv_tokens if instance.kv_tokens else 0.0
        return route.seconds + writing * held

    def _route(self, arrival: Arrival, answer: Answer, now: float) -> Route | None:
        ledger, size, keys = self._ledger, self._index.block_size, arrival.keys
        matched = self._index.match(keys)
        # An engine computes one token at least: the answer is sampled from it.
        most = max(0, (arrival.tokens - 1) // size * size)

        def prefills(of: Sequence[Instance]) -> Sequence[PrefillView]:
            return [
                self._prefill(instance, keys, matched.get(instance.name, 0), most, now) for instance in of
            ]

        def decodes(later: float) -> Sequence[DecodeView]:
            return ledger.decode_at(now + later, now)

        computers, writers = ledger.computers("prefill"), ledger.writers()
        return self._router.route(arrival, computers, writers, prefills, decodes, answer.mean)

    def _prefill(
        self, instance: Instance, keys: Sequence[int], held: int, most: int, now: float
    ) -> PrefillView:
        """An engine that holds so many blocks of a prompt of which `most` tokens need not be computed."""
        name, size = instance.name, self._index.block_size
        queue = self._ledger.prompts(name)
        reach = self._underway.reach(name, keys, held)
        return PrefillView(
            name,
            instance.group,
            queue.seconds(now),
            min(reach * size, most),
            min(held * size, most),
            len(queue),
            queue.tokens,
            instance.receives,
        )

    def _place(self, arrival: Arrival, route: Route, answer: Answer, now: float, came: float) -> Placement:
        whole = route.computes == route.decode
        placement = Placement(
            decode=route.decode,
            prefill=None if whole else route.computes,
            reason=route.reason,
            copy=route.copy,
            cached=route.cached,
            ttft=now - came + route.ttft,
            tbt=route.tbt,
        )
        booking = Booking(
            placement=placement,
            computes=route.computes,
            prompt=arrival.tokens,
            seconds=route.seconds,
            copying=route.copying,
            handover=route.handover,
            joins=now + route.ttft,
            answer=answer,
            limit=arrival.slo.tbt,
        )
        self._usage.add(arrival, self._cost(arrival.tokens, route, answer), now)
        self._flights[arrival.id] = Flight(arrival, route, answer, self._gate.margins(now), came, now)
        self._underway.begin(route.computes, arrival.id, arrival.keys)
        self._ledger.open(arrival.id, booking, now)
        return placement
