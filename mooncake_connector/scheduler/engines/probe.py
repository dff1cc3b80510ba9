"""Keeps the view of every engine fresh: cheap health checks, and probes when something may have changed."""

import asyncio
import logging
from collections.abc import Callable
from typing import Self

from mooncake_connector.scheduler.engines.base import Engine, EngineUnready
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.pool import Instance, Pool

log = logging.getLogger(__name__)

MISSES = 2
WAITING_LOG_SECONDS = 10.0
RETRY_SECONDS = 1.0


class Prober:
    """One task per engine, for as long as the context is open.

    Args:
        check_seconds: pause between two health checks.
        probe_seconds: age at which an idle engine's last probe is renewed.
        down_seconds: how long an engine may fail its health checks before its requests are given up.
    """

    def __init__(
        self,
        pool: Pool,
        engine: Engine,
        client: EngineClient,
        *,
        check_seconds: float,
        probe_seconds: float,
        down_seconds: float,
    ) -> None:
        self._pool = pool
        self._engine = engine
        self._client = client
        self._check_seconds = check_seconds
        self._probe_seconds = probe_seconds
        self._down_seconds = down_seconds
        self._tasks: dict[Instance, asyncio.Task[None]] = {}
        self._unsubscribe: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Self:
        self._unsubscribe = self._pool.subscribe(self._follow)
        for instance in self._pool:
            self._follow(instance)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._unsubscribe()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self, instance: Instance) -> None:
        if instance.removed:
            if task := self._tasks.pop(instance, None):
                task.cancel()
        elif instance not in self._tasks:
            self._tasks[instance] = asyncio.create_task(self._watch(instance))

    async def _watch(self, instance: Instance) -> None:
        clock = asyncio.get_running_loop().time
        started = said = clock()
        probed = float("-inf")
        misses = 0
        wrong = False
        well = clock()
        while True:
            idle = instance.requests == 0 and clock() - probed > self._probe_seconds
            try:
                if not instance.up or instance.suspicion.is_set() or idle or wrong:
                    instance.suspicion.clear()
                    instance.mark_up(await self._engine.probe(self._client, instance.url))
                    self._pool.mismatches()
                    probed = clock()
                else:
                    await self._engine.health(self._client, instance.url)
                misses, wrong = 0, False
            except EngineUnready as error:
                misses += 1
                # A health check that succeeds does not make up for a wrong answer: only another probe does.
                wrong = not error.late
                # A busy engine may miss one check; one that never answered, or whose port is closed, is down.
                if error.gone or not instance.up or misses >= MISSES:
                    instance.mark_down(str(error))
            except Exception:
                log.exception("check of %s failed", instance.url)
                instance.mark_down("the proxy's own check failed; see its log")
            if instance.up or not instance.requests:
                well = clock()
            elif clock() - well >= self._down_seconds and not await self._answers(instance):
                instance.give_up(self._down_seconds)
            if not instance.info and clock() - said > WAITING_LOG_SECONDS:
                said = clock()
                log.info("waiting for %s %s since %.0f s", instance.side, instance.url, said - started)
            pause = self._check_seconds if instance.up else min(self._check_seconds, RETRY_SECONDS)
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that comes with the event.
                async with asyncio.timeout(pause):
                    await instance.suspicion.wait()
                # Many requests may fail at once: at most one probe each tenth of a second.
                await asyncio.sleep(min(0.1, pause))
            except TimeoutError:
                pass

    async def _answers(self, instance: Instance) -> bool:
        """Whether it is well but for the probe, as an engine is that has too much to do."""
        try:
            await self._engine.health(self._client, instance.url)
        except EngineUnready:
            return False
        return True
