"""Aborts at any moment, on both sides or on one: nothing stays held, and what comes after is right."""

import asyncio
import random

import aiohttp

from tests.engine.direct import Pair, probe
from tests.engine.harness import (
    Cluster,
    abandon,
    eventually,
    greedy,
    kv_usage,
    random_prompt,
    requests_inside,
)
from tests.engine.test_identity import assert_identical

Http = aiohttp.ClientSession


async def assert_idle(http: Http, cluster: Cluster, within: float = 5.0) -> None:
    """Both engines hold no KV block and no request, by their own metrics."""

    async def idle() -> bool:
        for engine in (*cluster.prefills, *cluster.decodes):
            if await kv_usage(http, engine.url) or await requests_inside(http, engine.url):
                return False
        return True

    await eventually(idle, within, "KV blocks or requests are left")


async def test_300_aborts(cluster: Cluster, http: Http) -> None:
    rng = random.Random(20)
    slots = asyncio.Semaphore(12)

    async def one(prompt: list[int], after: float, stream: bool) -> bool:
        async with slots:
            return await abandon(http, cluster.url, prompt, after, stream=stream)

    moments = [
        (
            random_prompt(rng, rng.randint(1, 1500)),
            rng.choice([0.005, 0.03, 0.1, 0.4]) * rng.random(),
            i % 2 == 0,
        )
        for i in range(300)
    ]
    cut = await asyncio.gather(*(one(*m) for m in moments))
    assert sum(cut) > 200, "too many ended before they were to be cut off"
    await assert_idle(http, cluster)
    await assert_identical(http, cluster, [random_prompt(rng, rng.randint(1, 1500)) for _ in range(24)])
    await assert_idle(http, cluster)


async def test_one_side_aborts(cluster: Cluster, http: Http) -> None:
    """Prefill's abort makes decode compute the prompt itself; decode's abort lets prefill free its blocks."""
    rng = random.Random(21)
    probed = await probe(http, cluster.prefill.url)
    jobs = []
    for i in range(60):
        prompt = random_prompt(rng, rng.randint(200, 1500))
        pair = Pair(http, cluster.prefill.url, cluster.decode.url, probed, prompt)
        victim = pair.prefill if i % 2 else pair.decode
        asyncio.get_running_loop().call_later(rng.random() * 0.3, victim.cancel)
        jobs.append((prompt, pair, i % 2 == 1))
        await asyncio.sleep(0.02)
    answered = 0
    for prompt, pair, prefill_was_cut in jobs:
        _, tokens = await pair.gather()
        if prefill_was_cut or isinstance(tokens, list):
            answered += 1
            assert tokens == await greedy(http, cluster.single.url, prompt)
    assert answered >= 30
    # A decode request that was cut before its engine saw it tells prefill nothing: there the lease ends it.
    await assert_idle(http, cluster, within=35)


async def test_decode_never_comes(cluster: Cluster, http: Http) -> None:
    """Decode that refuses its request before it was admitted lets prefill go at once, not when the lease
    ends.
    """
    prompt = random_prompt(random.Random(22), 600)
    probed = await probe(http, cluster.prefill.url)
    # The whole prompt is in decode's own cache: it needs nothing, and says so.
    await greedy(http, cluster.decode.url, prompt + prompt[:40], 1)
    pair = Pair(http, cluster.prefill.url, cluster.decode.url, probed, prompt[:577])
    assert all(isinstance(result, list) for result in await pair.gather())
    await assert_idle(http, cluster, within=2.0)


async def test_prefill_never_comes(cluster: Cluster, http: Http) -> None:
    """Its request got lost: decode gives up after match_timeout_s and computes the prompt."""
    prompt = random_prompt(random.Random(23), 600)
    probed = await probe(http, cluster.prefill.url)
    pair = Pair(http, cluster.prefill.url, cluster.decode.url, probed, prompt)
    pair.prefill.cancel()
    _, tokens = await asyncio.wait_for(pair.gather(), 8)
    assert tokens == await greedy(http, cluster.single.url, prompt)
    await assert_idle(http, cluster)


async def test_either_may_be_late(cluster: Cluster, http: Http) -> None:
    rng = random.Random(24)
    probed = await probe(http, cluster.prefill.url)
    for late in ({"prefill_delay": 1.0}, {"decode_delay": 1.0}):
        prompt = random_prompt(rng, 900)
        pair = Pair(http, cluster.prefill.url, cluster.decode.url, probed, prompt, **late)
        _, tokens = await pair.gather()
        assert tokens == await greedy(http, cluster.single.url, prompt)
    await assert_idle(http, cluster)
