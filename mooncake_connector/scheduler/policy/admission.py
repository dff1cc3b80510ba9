"""Who is let in: early rejection (arXiv 2407.00079v3, section 7), and ours, that looks at each request.

A decode engine's load is the larger of time per token over what is promised, and of KV taken over all KV.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from mooncake_connector.scheduler.policy.base import Arrival, Rejected
from mooncake_connector.scheduler.policy.decode_table import Answer
from mooncake_connector.scheduler.policy.estimators import Estimators
from mooncake_connector.scheduler.policy.fairness import Demand, Ranks, Usage, Waiter
from mooncake_connector.scheduler.policy.ledger import Ledger
from mooncake_connector.scheduler.policy.margin import Margin, Margins, allowed
from mooncake_connector.scheduler.policy.routing import Route, Router
from mooncake_connector.scheduler.policy.scheduling import Scheduling

# How long an answer is taken to last before any ended, seconds.
LASTING = 10.0
# How long an answer lasted counts for 1/e after so many others.
MEMORY = 200
# Where in the answer it is looked whether promises are kept, as shares of the length that 81% do not exceed.
STAGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
# When room is looked for, seconds after the prompt would be computed.
LATER = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
# So many other decode engines are looked at when the best one has no room.
OTHERS = 1
# An engine with fewer answers than that is one that has nothing to do.
IDLE = 0.5
# Who takes more of decode than so many others only makes way when it is tight: the power of the rank.
STEEP = 4
# Whoever is rejected is told to come back no sooner, seconds.
SOONEST = 1.0


class Refusal(msgspec.Struct, frozen=True):
    """Not now.

    Attributes:
        wait: predicted seconds after which it would be let in; None: waiting does not help.
        patience: seconds after which its promise could not be kept any more.
    """

    rejected: Rejected
    wait: float | None = None
    patience: float = 0.0


class Ahead(msgspec.Struct, frozen=True):
    """Those that wait before a request.

    Attributes:
        requests: how many.
        tokens: of KV that they will need.
        seconds: of prefill that they will need.
    """

    requests: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, waiters: Sequence[Waiter]) -> "Ahead":
        if not waiters:
            return NOBODY
        need = sum(waiter.arrival.tokens + waiter.answer.mean for waiter in waiters)
        return cls(len(waiters), need, sum(waiter.seconds for waiter in waiters))


NOBODY = Ahead()


class Load(msgspec.Struct, frozen=True):
    """What is predicted of a promise; more than the limit breaks it."""

    target: Literal["ttft", "tbt", "overload"]
    predicted: float
    limit: float

    @property
    def share(self) -> float:
        return self.predicted / self.limit

    def rejected(self, retry_after: float) -> Rejected:
        """What the client is told."""
        return Rejected(
            target=self.target,
            predicted=self.predicted,
            limit=self.limit,
            retry_after=max(SOONEST, retry_after),
        )


class Gate:
    """Judges routes. ``none`` lets everybody in, any other mode nobody above the emergency threshold.

    - ``baseline``: TTFT at arrival; decode when the prompt is computed, which may have been in vain.
    - ``early``: at arrival TTFT, and the mean load of decode engines as it is now.
    - ``predicted``: the same for the moment when the prompt is computed, if every answer takes the mean time.
    - ``per_request``: at arrival, for all of this answer, by the lengths predicted of each one in flight.

    Nobody is rejected where nothing is in flight, nor for a TTFT that no engine could keep if one is idle.

    Attributes:
        ttft, tbt: margins on what is predicted; ``per_request`` only.
    """

    def __init__(
        self, settings: Scheduling, ledger: Ledger, router: Router, estimators: Estimators, usage: Usage
    ) -> None:
        self.configure(settings, router)
        self._ledger = ledger
        self._step = estimators.step
        self._usage = usage
        self._lasting, self._lasted = LASTING, 0
        self._prompts, self._answers = Demand(), Ranks()
        self.ttft, self.tbt = Margin(), Margin()

    def configure(self, settings: Scheduling, router: Router) -> None:
        """Judge by these settings from now on; what was learned stays."""
        self._settings = settings
        self._mode = settings.admission
        self._router = router

    def margins(self, now: float) -> Margins:
        """As they are."""
        return Margins(self.ttft.factor(now), self.tbt.factor(now))

    def lasted(
        self, arrival: Arrival, predicted: float, observed: float, seconds: float, made: Margins, now: float
    ) -> None:
        """An answer ended: TBT as predicted and as it was, and seconds from its first token to its last."""
        self.tbt.add(predicted, observed, arrival.slo.tbt, made.tbt, now, allowed(self.ttft))
        self._lasted = min(self._lasted + 1, MEMORY)
        self._lasting += (seconds - self._lasting) / self._lasted

    def began(self, arrival: Arrival, predicted: float, observed: float, made: Margins, now: float) -> None:
        """TTFT of an answer, as was predicted and as it was."""
        limit = arrival.slo.ttft_of(arrival.tokens)
        self.ttft.add(predicted, observed, limit, made.ttft, now, allowed(self.tbt))

    def came(self, arrival: Arrival, route: Route, answer: Answer, now: float) -> None:
        """A request came; whether it is let in is another question."""
        self._prompts.add(route.seconds, self._computing(route), now)
        self._answers.add(_area(arrival, answer))

    def judge(
        self,
        arrival: Arrival,
        route: Route,
        answer: Answer,
        now: float,
        *,
        waited: float = 0.0,
        aged: Ahead = NOBODY,
        ahead: Ahead = NOBODY,
    ) -> Route | Refusal:
        """A route that keeps all promises: this one, or with another decode engine; or why there is none.

        Args:
            waited: seconds since it came.
            aged: those that it must not pass.
            ahead: all whose turn is before its own.
        """
        if self._mode == "none" or self._idle(route):
            return route
        if emergency := self._emergency(route):
            return Refusal(emergency)
        limit = arrival.slo.ttft_of(arrival.tokens)
        margin = self.ttft.factor(now) if self._mode == "per_request" else 1.0
        if margin * (route.ttft - route.queue) > limit:
            # What no engine could keep is no reason to send it away from one that has nothing to do.
            if not self._startable(route):
                return Refusal(Load("ttft", margin * route.ttft, limit).rejected(route.queue))
            limit = math.inf
        if self._mode == "per_request":
            return self._per_request(arrival, route, answer, limit - waited, now, aged, ahead)
        if route.ttft > limit:
            return Refusal(Load("ttft", route.ttft, limit).rejected(route.ttft - limit))
        if self._mode == "baseline":
            return route
        load = self._pool(arrival, route, now)
        return Refusal(load.rejected(0.0)) if load.share > 1 else route

    def rejudge(self, arrival: Arrival, route: Route, now: float) -> Rejected | None:
        """After the prompt was computed: ``baseline`` looks at decode only now."""
        if self._mode != "baseline" or route.decode not in self._ledger.instances:
            return None
        slot = self._ledger.decode(route.decode)
        if slot.requests == 1:
            return None
        load = self._load(route.decode, slot.batch - 1, slot.context(now), arrival.slo.tbt)
        return load.rejected(0.0) if load.share > 1 else None

    def _idle(self, route: Route) -> bool:
        answers = self._ledger.decode(route.decode).requests
        return not answers and not len(self._ledger.prompts(route.computes))

    def _computing(self, route: Route) -> int:
        """How many engines compute prompts such as this one."""
        return len(self._ledger.computers(self._ledger.instances[route.computes].side))

    def _startable(self, route: Route) -> bool:
        """Whether the engine that is to compute the prompt has nothing to do."""
        if len(self._ledger.prompts(route.computes)):
            return False
        prefill = self._ledger.instances[route.computes].side == "prefill"
        return prefill or not self._ledger.decode(route.computes).requests

    def _emergency(self, route: Route) -> Rejected | None:
        settings = self._settings
        if route.queue > settings.emergency_seconds:
            queue = Load("overload", route.queue, settings.emergency_seconds)
            return queue.rejected(queue.predicted - queue.limit)
        slots = [self._ledger.decode(writer.name) for writer in self._ledger.writers() if writer.kv_tokens]
        committed, capacity = sum([slot.committed for slot in slots]), sum([slot.capacity for slot in slots])
        if committed <= settings.emergency_kv * capacity:
            return None
        kv = Load("overload", committed / capacity, settings.emergency_kv)
        return kv.rejected(self._lasting * (1 - 1 / kv.share))

    def _share(self, arrival: Arrival) -> float:
        """The part of all that it may take: the last is for the urgent, and for modest tenants."""
        bound = self._usage.above(arrival.priority) or self._usage.over(arrival.tenant)
        return 1.0 - self._settings.reserve if bound else 1.0

    def _pool(self, arrival: Arrival, route: Route, now: float) -> Load:
        """Mean load of decode engines with this request in addition."""
        if self._mode == "early":
            found = self._ledger.all_at(now, now)
        else:
            found = self._ledger.lasting(now + route.ttft, self._lasting, now)
        loads = [
            self._load(writer.name, batch, context + arrival.tokens, arrival.slo.tbt)
            for writer, batch, context in zip(
                self._ledger.writers(), found.batch.tolist(), found.context.tolist(), strict=True
            )
        ]
        worst = max(loads, key=lambda load: load.share)
        mean = sum(load.share for load in loads) / len(loads)
        return Load(worst.target, mean * worst.limit, worst.limit)

    def _load(self, name: str, others: float, context: float, slowest: float) -> Load:
        """One decode engine's with a batch of one request and others, if steps may take `slowest` seconds."""
        tbt = Load("tbt", self._step.seconds(name, round(others) + 1, int(context)), slowest)
        capacity = self._ledger.decode(name).capacity
        kv = Load("overload", context / capacity if capacity else 0.0, 1.0)
        return max(tbt, kv, key=lambda load: load.share)

    def _per_request(
        self,
        arrival: Arrival,
        route: Route,
        answer: Answer,
        limit: float,
        now: float,
        aged: Ahead,
        ahead: Ahead,
    ) -> Route | Refusal:
        reserved = self._share(arrival)
        own = route.ttft - route.queue
        share = reserved * self._modest(route.seconds >= self._prompts.bound)
        margin = self.ttft.factor(now)
        room = share * (limit / margin - own)
        queue = route.queue + ahead.seconds / self._computing(route)
        if queue > room:
            # Both in the terms of the promise: what it may come to, not what is expected.
            load = Load("ttft", margin * (own + queue), min(limit, margin * (own + max(0.0, room))))
            return Refusal(load.rejected(queue - room))
        share = reserved * self._modest(self._answers.rank(_area(arrival, answer)) ** STEEP)
        worst, tbt = self._whole(arrival, route, answer, share, now, aged)
        if worst.share <= 1:
            return msgspec.structs.replace(route, tbt=tbt)
        if route.computes != route.decode:
            for other in self._others(arrival, route, now):
                load, tbt = self._whole(arrival, other, answer, share, now, aged)
                if load.share <= 1:
                    return msgspec.structs.replace(other, tbt=tbt)
        wait, again = self._wait(arrival, route, answer, share, now, ahead)
        patience = limit - margin * route.ttft
        return Refusal(worst.rejected(again), wait if math.isfinite(patience) else None, patience)

    def _modest(self, dear: float) -> float:
        """The part of what is left that a request may use: who takes much makes room for many."""
        return 1.0 - self._settings.favour_cheap * dear

    def _others(self, arrival: Arrival, route: Route, now: float) -> list[Route]:
        instances = self._ledger.instances
        group = instances[route.decode].group
        views = [
            view
            for view in self._ledger.decode_at(now + route.ttft, now)
            if view.group == group and view.name != route.decode and view.name not in arrival.avoid
            if instances[view.name].side == "decode"
        ]
        routes = [self._router.redecode(route, arrival, view) for view in views]
        return sorted(routes, key=lambda other: other.tbt)[:OTHERS]

    def _whole(
        self, arrival: Arrival, route: Route, answer: Answer, share: float, now: float, aged: Ahead
    ) -> tuple[Load, float]:
        """What comes nearest to breaking a promise while it is written, its own or another's; and its TBT.

        What it takes itself is not held against it, `share` is of what it has in common with others.
        """
        slot, prompt = self._ledger.decode(route.decode), arrival.tokens
        longest = answer.ends[-2]
        # No faster than promised: whoever is let in may slow it down to that.
        seconds, begins = longest * max(route.tbt, slot.pace), now + route.ttft
        crowd = self._crowd(route.decode, [begins + stage * seconds for stage in STAGES], now, aged)
        tightest = Load("overload", 0.0, 1.0)
        passed = before = total = mean = predicted = 0.0
        for stage, (others, context, beyond) in zip(STAGES, crowd, strict=True):
            need = prompt + stage * longest
            pace = self._step.seconds(route.decode, round(others) + 1, int(context + need))
            if stage:
                # The promise is of the mean over an answer; answers end at any of the stages.
                total += (before + pace) / 2 * (stage - passed)
                mean = total / stage
                predicted = max(predicted, mean)
            passed, before = stage, pace
            if slot.capacity:
                taken, full = context + beyond + need, need + share * max(slot.capacity - need, 0.0)
                if taken / full > tightest.share:
                    tightest = Load("overload", taken / slot.capacity, full / slot.capacity)
        slowest = self._slowest(arrival, route.decode, share, now)
        # An engine that has nothing to do does what it can.
        tbt = Load("tbt", predicted, slowest if slot.requests else max(slowest, predicted))
        return tightest if tightest.share > tbt.share else tbt, mean

    def _wait(
        self, arrival: Arrival, route: Route, answer: Answer, share: float, now: float, ahead: Ahead
    ) -> tuple[float, float]:
        """Seconds until its decode engine is predicted to have room for it and for those ahead of it; and
        until it lets it in, be it that it has nothing to do."""
        begins = now + route.ttft
        crowd = self._crowd(route.decode, [begins + later for later in LATER], now, ahead)
        need = arrival.tokens + answer.mean
        slowest = self._slowest(arrival, route.decode, 1.0, now)
        few = IDLE + ahead.requests / len(self._ledger.writers())
        idle = LATER[-1]
        for later, (others, context, beyond) in zip(LATER, crowd, strict=True):
            if others < few:
                idle = min(idle, later)
            if self._load(route.decode, others, context + beyond + need, slowest).share <= share:
                return later, min(idle, later)
        return LATER[-1], idle

    def _slowest(self, arrival: Arrival, name: str, share: float, now: float) -> float:
        """Seconds per token up to which an engine may be slowed down; what it takes alone is not shared."""
        alone = self._step.seconds(name, 1, arrival.tokens)
        limit = min(arrival.slo.tbt, self._ledger.strictest(name))
        return (alone + share * max(0.0, limit - alone)) / self.tbt.factor(now)

    def _crowd(
        self, name: str, moments: Sequence[float], now: float, ahead: Ahead
    ) -> list[tuple[float, float, float]]:
        """Batch and context of an engine at some moments, and tokens of KV that may be taken beyond that."""
        found, caution = self._ledger.decode_over(name, moments, now), self._settings.caution
        engines = len(self._ledger.writers())
        requests, tokens = ahead.requests / engines, ahead.tokens / engines
        # Time per token is a mean over an answer, and evens out; KV that is not there stops an engine.
        return [
            (batch + requests, context + tokens, caution * spread * context / max(batch, 1.0))
            for batch, context, spread in zip(
                found.batch.tolist(), found.context.tolist(), found.spread.tolist(), strict=True
            )
        ]


def _area(arrival: Arrival, answer: Answer) -> float:
    """KV that an answer takes, times the steps for which it does."""
    return (arrival.tokens + answer.mean / 2) * answer.mean
