"""Every engine is replaced while requests come: none is lost, none is even tried twice."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import aiohttp
import pytest

from mooncake_connector.scheduler.actuator.local import LocalEngine, start_all
from mooncake_connector.scheduler.engines.pool import Instance
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.proxy.app import Proxy
from mooncake_connector.scheduler.proxy.settings import ProxySettings
from tests.engine.harness import Cluster, eventually, greedy, random_prompt

Http = aiohttp.ClientSession
Answered = list[tuple[list[int], int, list[int]]]
pytestmark = pytest.mark.timeout(600)


class Load:
    """Clients that ask, one request after the other, until they are stopped; every failure is raised."""

    def __init__(self, http: Http, url: str) -> None:
        self._http = http
        self._url = url
        self._stop = False
        self.answered: Answered = []

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop:
            prompt, tokens = random_prompt(rng, rng.randint(20, 400)), rng.randint(1, 24)
            got = await greedy(self._http, self._url, prompt, tokens, stream=rng.random() < 0.5)
            self.answered.append((prompt, tokens, got))

    def stop(self) -> None:
        self._stop = True

    async def more(self, count: int) -> None:
        """Wait until so many further requests were answered."""
        enough = len(self.answered) + count

        async def answered() -> bool:
            return len(self.answered) >= enough

        await eventually(answered, 60, f"{count} more answers")


@asynccontextmanager
async def proxied(prefill: str, decode: str) -> AsyncIterator[tuple[Proxy, str]]:
    settings = ProxySettings(
        prefill=(prefill,),
        decode=(decode,),
        port=0,
        check_seconds=0.5,
        # The processors are shared with engines that start: nobody is to be sent away for that.
        scheduling=Scheduling(admission="none"),
    )
    proxy = Proxy(settings)
    async with proxy.open() as port:
        yield proxy, f"http://127.0.0.1:{port}"


async def up(instance: Instance) -> None:
    async def is_up() -> bool:
        return instance.up

    await eventually(is_up, 60, f"{instance.url} is up")


async def replace(proxy: Proxy, engine: LocalEngine) -> None:
    """What an operator does for each engine."""
    instance = proxy.pool.drain(engine.url)
    await asyncio.wait_for(instance.emptied(), 60)
    before = instance.info
    await asyncio.to_thread(engine.stop)
    engine.start()
    await asyncio.to_thread(engine.wait_ready, 300)
    await up(instance)
    assert before is not None
    assert instance.info is not None
    assert instance.info.identity != before.identity
    proxy.pool.undrain(engine.url)


async def test_every_engine_is_replaced_under_load(cluster: Cluster, http: Http) -> None:
    with ExitStack() as stack:
        spares = [cluster.spare("prefill"), cluster.spare("decode")]
        for spare in spares:
            stack.callback(spare.stop)
        async with (
            proxied(cluster.prefill.url, cluster.decode.url) as (proxy, url),
            asyncio.TaskGroup() as clients,
        ):
            for instance in proxy.pool:
                await up(instance)
            load = Load(http, url)
            for seed in range(3):
                clients.create_task(load.client(seed))
            await load.more(3)
            await asyncio.to_thread(start_all, spares, 300)
            await up(proxy.pool.add(spares[0].url, "prefill"))
            await up(proxy.pool.add(spares[1].url, "decode"))
            for engine, spare in zip((cluster.prefill, cluster.decode), spares, strict=True):
                await replace(proxy, engine)
                await load.more(10)
                await asyncio.wait_for(proxy.pool.remove(spare.url), 60)
                await asyncio.to_thread(spare.stop)
                # The new one is alone on its side now.
                await load.more(10)
            load.stop()
        count = proxy.metrics.registry.get_sample_value
        for side in ("prefill", "decode"):
            assert not count("mooncake_proxy_retries_total", {"side": side})
        assert not count("mooncake_proxy_prefill_skipped_total", {"reason": "no_prefill"})
    print(f"{len(load.answered)} requests while every engine was replaced")
    for prompt, tokens, got in load.answered[:: max(1, len(load.answered) // 20)]:
        assert got == await greedy(http, cluster.single.url, prompt, tokens)
