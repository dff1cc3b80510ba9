"""One request's life: who is asked for it, what is tried again, and what goes on after it."""

import asyncio
import logging
from collections.abc import Collection, Coroutine
from functools import partial
from typing import Any

from mooncake_connector.scheduler.engines.base import Engine
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.pool import Lease, Pool
from mooncake_connector.scheduler.policy.base import Placement
from mooncake_connector.scheduler.proxy.answer import (
    Answer,
    DecodeFailed,
    NoDecode,
    Overloaded,
    PrefillFailed,
)
from mooncake_connector.scheduler.proxy.arrivals import Asked
from mooncake_connector.scheduler.proxy.aside import LINGER, Aside
from mooncake_connector.scheduler.proxy.attempt import Attempt, Upstream, cancelled
from mooncake_connector.scheduler.proxy.copies import Copies
from mooncake_connector.scheduler.proxy.deadlines import Deadlines
from mooncake_connector.scheduler.proxy.journey import Journey
from mooncake_connector.scheduler.proxy.metrics import ProxyMetrics
from mooncake_connector.scheduler.proxy.retry_budget import RetryBudget
from mooncake_connector.scheduler.proxy.steering import Steering
from mooncake_connector.scheduler.proxy.timeline import Timeline

log = logging.getLogger(__name__)

# The client's stream hangs on this one, and the engine that is asked may be in a long step.
TOKEN_WAIT = 30.0
SPENT = "not tried again, as too many requests are"


class Dispatcher:
    """Serves requests from the pool.

    Args:
        steering: who says which engines serve a request.
        order: ``concurrent`` or ``serial``.
        first_token: ``decode`` or ``prefill``: who sends a stream's first token.
        max_retries: further attempts after decode failed, and after prefill failed, each.
        budget: of further attempts of all requests.
    """

    def __init__(
        self,
        pool: Pool,
        steering: Steering,
        engine: Engine,
        client: EngineClient,
        metrics: ProxyMetrics,
        *,
        order: str,
        first_token: str,
        max_retries: int,
        budget: RetryBudget,
        deadlines: Deadlines,
    ) -> None:
        self._pool = pool
        self._steering = steering
        self._engine = engine
        self._metrics = metrics
        self._max_retries = max_retries
        self._budget = budget
        self._aside = Aside(engine, client)
        self._copies = Copies(engine, client, self._aside, metrics, steering.copied)
        self._up = Upstream(
            pool,
            engine,
            client,
            metrics,
            self._aside,
            self._copies,
            deadlines,
            serial=order == "serial",
            early=first_token == "prefill",
            keep=self._keep,
        )
        self._lingering: set[asyncio.Task[None]] = set()
        self._without_prefill = False

    async def open(self, asked: Asked, timeline: Timeline) -> Answer:
        """An answer whose first bytes are there; retries until then.

        Raises:
            NoDecode: nobody can serve it.
            Overloaded: the conductor rejects it.
            DecodeFailed: everybody tried failed.
        """
        doubted: list[Lease] = []
        try:
            answer = await self._tried(asked, timeline, doubted)
        except DecodeFailed:
            # What two engines answer with a 5xx is more likely the request's fault than theirs.
            if len({lease.url for lease in doubted}) < 2:
                for lease in doubted:
                    lease.blame()
            raise
        for lease in doubted:
            lease.blame()
        return answer

    async def _tried(self, asked: Asked, timeline: Timeline, doubted: list[Lease]) -> Answer:
        """See `open`; notes in `doubted` whom somebody else's answer puts in the wrong."""
        alone = self._engine.alone(asked.request)
        avoid: set[str] = set(asked.avoid)
        answered: set[str] = set()
        spent: set[str] = set()
        decode_failures = prefill_failures = 0
        failure: DecodeFailed | None = None
        self._budget.earn()
        while True:
            try:
                again = decode_failures + prefill_failures > 0
                shunned = avoid | self._pool.shunned()
                journey = await self._place(asked, alone, shunned, again=again)
            except NoDecode as error:
                raise failure or error from None
            choice = journey.placement
            if choice.decode in spent and failure:
                journey.over(None)
                raise failure
            if choice.decode in answered and choice.prefill and not alone:
                journey.over(None)
                alone = "decode_failed"
                continue
            attempt = Attempt(self._up, asked, journey, timeline)
            try:
                answer = await attempt.open()
            except PrefillFailed as error:
                if not error.refused and not self._affordable():
                    raise DecodeFailed(f"{error}; {SPENT}") from None
                log.warning("%s; trying without it", error)
                self._metrics.retries.labels("prefill").inc()
                avoid.add(choice.prefill or "")
                prefill_failures += 1
                if error.refused or prefill_failures > self._max_retries:
                    alone = "prefill_failed"
            except DecodeFailed as error:
                log.warning("%s", error)
                failure = error
                decode_failures += 1
                if decode_failures > self._max_retries:
                    raise
                if not self._affordable():
                    raise DecodeFailed(f"{error}; {SPENT}", error.reply) from None
                self._metrics.retries.labels("decode").inc()
                avoid.add(choice.decode)
                if error.reply:
                    # The transfer may be to blame: once more without it. Else it would say the same again.
                    (answered if choice.prefill else spent).add(choice.decode)
            else:
                if choice.prefill is None:
                    self._metrics.prefill_skipped.labels(choice.reason).inc()
                if not avoid:
                    self._note(choice)
                if answer.early:
                    answer.again = partial(self._again, asked, answer, timeline)
                return answer
            finally:
                doubted += attempt.doubted

    async def finish(self, answer: Answer, *, whole: bool) -> None:
        """Close `answer`; unless it reached its end (`whole`), its prefill is cancelled too."""
        answer.close(whole=whole)
        # It holds the answer, too: the two would wait for the garbage collector, and all that they hold.
        answer.again = None
        prefill = answer.prefill
        if prefill is None:
            return
        if whole and answer.status == 200 and not prefill.done():
            # Its answer is due any moment; waiting for it keeps the connection, but not the client.
            self._keep(self._outlive(prefill))
            return
        await cancelled(prefill)

    async def close(self) -> None:
        """Cancel what still lingers."""
        await asyncio.gather(self._copies.close(), *(cancelled(task) for task in self._lingering))

    async def timeline(self, answer: Answer, asked: Asked) -> dict[str, Any]:
        """What both engines' connectors say of when the request came by."""
        if not (answer.transfer_id and answer.choice.prefill):
            return {}
        found: dict[str, Any] = {"transfer_id": answer.transfer_id}
        for side, url in (("prefill", answer.choice.prefill), ("decode", answer.choice.decode)):
            said = await self._aside.told(url, asked.request, asked.headers, answer.transfer_id)
            found[side] = said.get("timeline", {})
        return found

    async def _place(self, asked: Asked, alone: str, avoid: Collection[str], *, again: bool) -> Journey:
        """See `Steering.place`; engines that were removed while the request waited are not taken."""
        while True:
            journey = await self._steering.place(asked.arrival, alone, avoid, again=again)
            choice = journey.placement
            if choice.decode in self._pool and (choice.prefill is None or choice.prefill in self._pool):
                return journey
            journey.over(None)

    async def _again(self, asked: Asked, answer: Answer, timeline: Timeline, why: str) -> Answer:
        """The client has prefill's token, but decode did not get it: decode alone, told to begin with it."""
        if not self._affordable():
            raise DecodeFailed(SPENT)
        log.warning("%s; decode computes the prompt itself", why)
        self._metrics.retries.labels("decode").inc()
        source = answer.choice.prefill or ""
        id = answer.transfer_id
        said = await self._aside.told(source, asked.request, asked.headers, id, TOKEN_WAIT)
        token = said.get("first_token", -1)
        if token < 0:
            raise DecodeFailed(f"prefill {source} can't tell which token that was")
        try:
            avoid = {answer.choice.decode}
            journey = await self._place(asked, "decode_failed", avoid, again=True)
        except (NoDecode, Overloaded) as error:
            raise DecodeFailed(str(error)) from None
        body = self._engine.decode_body(asked.request, {"first_token": token})
        return await Attempt(self._up, asked, journey, timeline).alone(body)

    def _affordable(self) -> bool:
        """Whether there may be a further attempt; then it is paid for."""
        if self._budget.spend():
            return True
        self._metrics.retries_refused.inc()
        return False

    def _keep(self, rest: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(rest)
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    async def _outlive(self, prefill: asyncio.Task[bytes]) -> None:
        await asyncio.wait({prefill}, timeout=LINGER)
        await cancelled(prefill)

    def _note(self, choice: Placement) -> None:
        without = choice.reason == "no_prefill"
        if without and not self._without_prefill:
            states = "; ".join(
                f"{p.url}: {p.reason or 'no decode engine to match'}" for p in self._pool.prefill
            )
            log.warning("no prefill engine is usable (%s): decode computes prompts itself", states)
        self._without_prefill = without
