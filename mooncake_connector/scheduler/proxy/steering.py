"""Between the proxy's sockets and the conductor: asks it who serves, and tells it what became of that."""

import asyncio
import itertools
import math
from collections.abc import Collection, Iterable

import msgspec

from mooncake_connector.scheduler.engines.holdings import Holdings
from mooncake_connector.scheduler.engines.pool import Instance, Pool, Side
from mooncake_connector.scheduler.policy import base
from mooncake_connector.scheduler.policy.base import Arrival, Placement, Rejected, Slo, Verdict, Waiting
from mooncake_connector.scheduler.policy.conductor import Conductor
from mooncake_connector.scheduler.policy.estimators import Estimators
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.proxy.answer import NoDecode, Overloaded
from mooncake_connector.scheduler.proxy.journey import Journey
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics

# Mooncake's experiments promise so many times what an idle system takes (arXiv 2407.00079v3, section 8.1.2).
TTFT_FACTOR, TBT_FACTOR = 10.0, 5.0
# Who was let in once is not sent away because an engine failed.
NO_LIMIT = Slo(ttft=1e6, tbt=1e6)
LEAST_PATIENCE = 0.5


class Steering:
    """One per proxy; its clock is the event loop's.

    Args:
        holdings: is told which engines there are and what was routed to them.
        fixed_slo: which of ``ttft`` and ``tbt`` in `settings.slo` are promised as they are. The others are
            the least that is promised: ten times what an idle engine needs for the first token, five times
            what it needs for one more, if that is longer.
    """

    def __init__(
        self,
        pool: Pool,
        conductor: Conductor,
        estimators: Estimators,
        holdings: Holdings,
        metrics: ProxyMetrics,
        settings: Scheduling,
        fixed_slo: Collection[str] = (),
    ) -> None:
        self._pool = pool
        self._conductor = conductor
        self._estimators = estimators
        self._holdings = holdings
        self._metrics = metrics
        self._settings = settings
        self._fixed_slo = fixed_slo
        self._clock = asyncio.get_running_loop().time
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[Verdict]] = {}
        self._identities: dict[str, tuple[str, str | int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._usable: dict[Side, list[str]] = {"prefill": [], "decode": []}

    def configure(self, settings: Scheduling, fixed_slo: Collection[str]) -> None:
        """Promise, choose and admit by these settings from now on."""
        self._settings = settings
        self._fixed_slo = fixed_slo
        self._conductor.configure(settings)
        self._rearm()

    def promise(self, model: str, service_class: str, tokens: int) -> Slo:
        """What a request for this model by a client of this class is promised, for a prompt of `tokens`."""
        slo = self._settings.slo_of(model, service_class)
        if slo is not self._settings.slo or len(self._fixed_slo) == 2:
            return slo
        prefill, step = self._estimators.prefill.seconds, self._estimators.step.seconds
        ttft = least = slo.ttft_of(tokens)
        tbt = slo.tbt
        if "ttft" not in self._fixed_slo:
            engines = self._usable["prefill"] or self._usable["decode"]
            ttft = _or_shortest(least, (TTFT_FACTOR * prefill(name, tokens, 0) for name in engines))
        if "tbt" not in self._fixed_slo:
            tbt = _or_shortest(tbt, (TBT_FACTOR * step(name, 1, tokens) for name in self._usable["decode"]))
        return slo if ttft == least and tbt == slo.tbt else Slo(ttft=ttft, tbt=tbt)

    async def place(
        self, arrival: Arrival, alone: str, avoid: Collection[str], *, again: bool = False
    ) -> Journey:
        """Who serves it; waits if the conductor has it wait.

        Args:
            alone: why no prefill engine can serve it; empty if one can.
            avoid: engines that failed it.
            again: it was let in before.

        Raises:
            NoDecode: no decode engine is usable.
            Overloaded: the conductor rejects it.
        """
        id = f"{next(self._numbers)}"
        slo = NO_LIMIT if again else arrival.slo
        arrival = msgspec.structs.replace(arrival, id=id, alone=alone, avoid=frozenset(avoid), slo=slo)
        verdict = self._conductor.arrive(arrival, self._clock())
        self._rearm()
        if isinstance(verdict, Waiting):
            verdict = await self._wait(id)
        if isinstance(verdict, Rejected):
            self._metrics.rejected.labels(verdict.target).inc()
            raise Overloaded(verdict)
        if not isinstance(verdict, Placement):
            raise NoDecode(self._nobody())
        self._holdings.routed(verdict, arrival.keys)
        self._metrics.cached_tokens.inc(verdict.cached)
        patience = self._patience(arrival, verdict)
        return Journey(id, verdict, arrival.avoid, patience, self._conductor, self._clock, self._rearm)

    def follow(self, instance: Instance) -> None:
        """An engine came, went, came anew, is drained or not any more, or was removed.

        What it has stays in the books as long as it is the same process, whether or not it gets more.
        """
        now = self._clock()
        info, name = instance.info, instance.url
        anew = info is not None and self._identities.get(name, info.identity) != info.identity
        if instance.removed or anew:
            self._conductor.leave(name, now)
            self._identities.pop(name, None)
        if instance.up and info and name not in self._identities:
            self._identities[name] = info.identity
            found = base.Instance(
                name=name,
                side=instance.side,
                group=info.group,
                kv_tokens=info.kv_tokens,
                receives=info.role != "kv_producer",
            )
            self._conductor.join(found, now)
        if instance.usable:
            self._conductor.resume(name, now)
        else:
            self._conductor.pause(name, now)
        self._holdings.follow(instance)
        self._usable = {side: [each.url for each in self._pool.live(side)] for side in self._usable}
        self._rearm()

    def copied(self, source: str, target: str, tokens: int, seconds: float) -> None:
        """KV of so many tokens went from one engine to another."""
        self._conductor.copied(source, target, tokens, seconds)

    def close(self) -> None:
        """Stop the clockwork."""
        if self._timer:
            self._timer.cancel()

    async def _wait(self, id: str) -> Verdict:
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[id] = future
        began = self._clock()
        try:
            return await future
        except asyncio.CancelledError:
            # It may have been let in at this very moment.
            self._conductor.ended(id, self._clock())
            self._rearm()
            raise
        finally:
            self._waiting.pop(id, None)
            self._metrics.waited_seconds.observe(self._clock() - began)

    def _rearm(self) -> None:
        due = self._conductor.due()
        if due == self._due:
            return
        self._due = due
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._wake)

    def _wake(self) -> None:
        self._timer = self._due = None
        for id, verdict in self._conductor.wake(self._clock()):
            future = self._waiting.pop(id, None)
            if future and not future.done():
                future.set_result(verdict)
            else:
                self._conductor.ended(id, self._clock())
        self._rearm()

    def _patience(self, arrival: Arrival, placement: Placement) -> float:
        """Seconds that a copy saves: to wait longer for it would be worse than to compute."""
        copy, target = placement.copy, placement.prefill
        if target is None:
            return 0.0
        seconds = self._estimators.prefill.seconds
        without = seconds(target, arrival.tokens, placement.cached - copy.missing if copy else 0)
        return max(LEAST_PATIENCE, without - seconds(target, arrival.tokens, placement.cached))

    def _nobody(self) -> str:
        states = "; ".join(f"{d.url}: {d.reason}" for d in self._pool.decode)
        return f"no decode engine is usable ({states})"


def _or_shortest(least: float, times: Iterable[float]) -> float:
    """`least`, unless all of `times` are longer: then the shortest. It looks no further than it must."""
    shortest = math.inf
    for seconds in times:
        if seconds <= least:
            return least
        shortest = min(shortest, seconds)
    return least if shortest == math.inf else shortest
