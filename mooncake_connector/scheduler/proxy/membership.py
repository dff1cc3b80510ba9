"""Who is in the pools, changed while requests run: what takes time goes on in the background."""

import asyncio
import logging

from mooncake_connector.scheduler.engines.pool import Instance, Pool, PoolError, Side

log = logging.getLogger(__name__)


class Membership:
    """Changes of the pools, by the admin API and by reloads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._leaving: dict[str, asyncio.Task[None]] = {}

    def add(self, url: str, side: Side) -> Instance:
        """An engine comes.

        Raises:
            PoolError: it is there already.
        """
        return self._pool.add(url, side)

    def drain(self, url: str) -> Instance:
        """Send an engine no more requests.

        Raises:
            PoolError: there is no such engine.
        """
        return self._pool.drain(url)

    def undrain(self, url: str) -> Instance:
        """Send an engine requests again; if it was to be removed, it stays.

        Raises:
            PoolError: there is no such engine.
        """
        if task := self._leaving.pop(url, None):
            task.cancel()
        return self._pool.undrain(url)

    def remove(self, url: str, then: Side | None = None) -> Instance:
        """Drain an engine, and take it out once it has no request; `then` it comes into that pool.

        Raises:
            PoolError: there is no such engine.
        """
        instance = self._pool.drain(url)
        if task := self._leaving.pop(url, None):
            task.cancel()
        task = self._leaving[url] = asyncio.create_task(self._leave(url, then))
        task.add_done_callback(lambda done: self._left(url, done))
        return instance

    def become(self, url: str, side: Side | None) -> None:
        """Have an engine in that pool, or in none, wherever it is now."""
        if url not in self._pool:
            if side:
                self._pool.add(url, side)
        elif side != self._pool[url].side:
            self.remove(url, side)
        elif url in self._leaving:
            self.undrain(url)

    async def close(self) -> None:
        """Wait for nobody any more."""
        tasks = list(self._leaving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave(self, url: str, then: Side | None) -> None:
        try:
            await self._pool.remove(url)
            if then:
                self._pool.add(url, then)
        except PoolError as error:
            log.warning("%s", error)

    def _left(self, url: str, task: asyncio.Task[None]) -> None:
        if self._leaving.get(url) is task:
            del self._leaving[url]
