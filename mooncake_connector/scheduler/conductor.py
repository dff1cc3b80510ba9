"""The conductor: who serves a request, now, later or not at all. Every call says when it is."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from mooncake_connector.scheduler.base import (
    Arrival,
    DecodeView,
    Instance,
    Placement,
    PrefillView,
    Rejected,
    Unserved,
    Verdict,
)
from mooncake_connector.scheduler.estimators import Estimators, Lengths
from mooncake_connector.scheduler.ledger import Account, Booking, Ledger
from mooncake_connector.scheduler.routing import Route, Router
from mooncake_connector.scheduler.scheduling import Scheduling


class Prefixes(Protocol):
    """Who holds which prefix; `PrefixIndex` is one, a KVCache store can be another.

    Attributes:
        block_size: tokens of one block.
    """

    block_size: int

    def match(self, keys: Sequence[int]) -> Mapping[str, int]:
        """Blocks of the prefix that each instance holds, of those that hold any."""


class Flight(msgspec.Struct):
    """A placed request.

    Attributes:
        began: when it was placed.
        prefilled: when its prompt was computed; 0 before.
        first: when its first token came; 0 before.
        areas: batch and context of decode, summed over time, at its first token.
    """

    arrival: Arrival
    route: Route
    lengths: Lengths
    began: float
    prefilled: float = 0.0
    first: float = 0.0
    areas: tuple[float, float] = (0.0, 0.0)


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
        self._router = Router(
            settings.routing,
            settings.replication_threshold,
            settings.min_prefill_tokens,
            estimators,
            seed,
        )
        self._flights: dict[str, Flight] = {}

    def join(self, instance: Instance, now: float) -> None:
        """An engine came up, or came anew: nothing is in flight there."""
        self._ledger.join(instance, now)

    def leave(self, name: str, now: float) -> None:
        """An engine went. Its requests stay open until `ended` is said of each."""
        self._ledger.leave(name, now)

    def arrive(self, arrival: Arrival, now: float) -> Verdict:
        """Decide about a request. One that is placed is in flight until `ended`, whatever becomes of it.

        One that is in flight already, as it failed somewhere and comes again, gives up its first place.
        """
        self.ended(arrival.id, now, None)
        lengths = self._estimators.lengths.predict(arrival)
        route = self._route(arrival, lengths, now)
        if route is None:
            return Unserved()
        return self._place(arrival, route, lengths, now)

    def due(self) -> float | None:
        """When `wake` has something to do; None: not before another call."""
        return None

    def wake(self, now: float) -> list[tuple[str, Verdict]]:
        """Decide about those that wait: by request, what became of it."""
        return []

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
            computed: seconds of computing.
            cached: tokens of the prompt that the engine held.

        Returns:
            A rejection if decode turns out to have no room for it: it is not in flight any more.
        """
        flight = self._flights.get(id)
        if flight is None:
            return None
        route = flight.route
        alone = self._ledger.prefilled(id, now, route.handover)
        flight.prefilled = now
        if computed is None and alone:
            # Nothing was before it, so all that passed is its own, the copy excepted.
            computed = now - flight.began - route.copying
        if computed is not None:
            held = route.cached if cached is None else cached
            tokens = flight.arrival.tokens
            predicted = self._estimators.prefill.seconds(route.computes, tokens, held)
            self._estimators.calibration.observe("prefill", predicted, computed)
            self._estimators.prefill.observe(route.computes, tokens, held, computed)
        return None

    def first_token(self, id: str, now: float) -> None:
        """Its answer began."""
        flight = self._flights.get(id)
        if flight is None or flight.first:
            return
        flight.first = now
        self._ledger.progressed(id, 1, now)
        self._estimators.calibration.observe("ttft", flight.route.ttft, now - flight.began)
        route = flight.route
        if flight.prefilled and route.computes != route.decode:
            self.copied(route.computes, route.decode, flight.arrival.tokens, now - flight.prefilled)
        if route.decode in self._ledger.instances:
            flight.areas = self._ledger.decode(route.decode).areas(now)

    def progressed(self, id: str, tokens: int, now: float) -> None:
        """Its answer has so many tokens."""
        if id in self._flights:
            self._ledger.progressed(id, tokens, now)

    def copied(self, source: str, target: str, tokens: int, seconds: float) -> None:
        """KV of so many tokens went from one engine to another."""
        predicted = self._estimators.transfer.seconds(source, target, tokens)
        self._estimators.calibration.observe("transfer", predicted, seconds)
        self._estimators.transfer.observe(source, target, tokens, seconds)

    def ended(self, id: str, now: float, output_tokens: int | None = None) -> None:
        """It is over: after so many tokens, or None if it failed or nobody wanted it any more."""
        flight = self._flights.pop(id, None)
        if flight is None:
            return
        if output_tokens:
            self._learn(flight, now, output_tokens)
        self._ledger.close(id, now)

    def accounts(self, now: float) -> Sequence[Account]:
        """Load of every engine."""
        return list(self._ledger.accounts(now))

    def _learn(self, flight: Flight, now: float, output: int) -> None:
        estimators, decode = self._estimators, flight.route.decode
        estimators.calibration.observe("output", flight.lengths.quantile(0.5), output)
        estimators.lengths.observe(flight.arrival, output)
        lasted = now - flight.first
        if not flight.first or output < 2 or lasted <= 0 or decode not in self._ledger.instances:
            return
        tbt = lasted / (output - 1)
        batch, context = (
            (after - before) / lasted
            for before, after in zip(flight.areas, self._ledger.decode(decode).areas(now), strict=True)
        )
        estimators.calibration.observe("tbt", flight.route.tbt, tbt)
        estimators.step.observe(decode, max(1, round(batch)), round(context), tbt)

    def _route(self, arrival: Arrival, lengths: Lengths, now: float) -> Route | None:
        ledger = self._ledger

        def decodes(later: float) -> Sequence[DecodeView]:
            return ledger.decode_at(now + later, now)

        instances = ledger.instances.values()
        writers = [instance for instance in instances if instance.side != "prefill"]
        return self._router.route(arrival, self._prefills(arrival, now), writers, decodes, lengths.mean())

    def _prefills(self, arrival: Arrival, now: float) -> Sequence[PrefillView]:
        size, held = self._index.block_size, self._index.match(arrival.keys)
        # An engine computes one token at least: the answer is sampled from it.
        most = max(0, (arrival.tokens - 1) // size * size)
        views = []
        for name, instance in self._ledger.instances.items():
            queue = self._ledger.prompts(name)
            cached = min(held.get(name, 0) * size, most)
            views.append(
                PrefillView(name, instance.group, queue.seconds(now), cached, len(queue), queue.tokens)
            )
        return views

    def _place(self, arrival: Arrival, route: Route, lengths: Lengths, now: float) -> Placement:
        whole = route.computes == route.decode
        placement = Placement(
            decode=route.decode,
            prefill=None if whole else route.computes,
            reason=route.reason,
            copy=route.copy,
            cached=route.cached,
            ttft=route.ttft,
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
            lengths=lengths,
            limit=arrival.slo.tbt,
        )
        self._flights[arrival.id] = Flight(arrival, route, lengths, now)
        self._ledger.open(arrival.id, booking, now)
        return placement
