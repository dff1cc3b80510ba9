"""Engines that are killed or stopped in the middle of pushes: answers stay right, nothing leaks, survivors
stay.
"""

import asyncio
import random
import signal
import time
from typing import Any

import aiohttp
import pytest

from tests.engine.direct import Pair, probe
from tests.engine.harness import (
    Cluster,
    Clusters,
    Shape,
    complete,
    eventually,
    greedy,
    kv_usage,
    random_prompt,
    requests_inside,
)
from tests.engine.test_aborts import assert_idle
from tests.engine.test_identity import assert_identical, loaded_tokens

Http = aiohttp.ClientSession
pytestmark = pytest.mark.timeout(900)


async def start_pairs(
    http: Http, cluster: Cluster, rng: random.Random, count: int
) -> list[tuple[list[int], Pair]]:
    """Long prompts under way on both engines, enough of them that some are being pushed for a second."""
    probed = await probe(http, cluster.prefill.url)
    pairs = []
    for _ in range(count):
        prompt = random_prompt(rng, rng.randint(1000, 2500))
        pairs.append((prompt, Pair(http, cluster.prefill.url, cluster.decode.url, probed, prompt)))
    return pairs


async def expect_answers(http: Http, cluster: Cluster, pairs: list[tuple[list[int], Pair]]) -> None:
    for prompt, pair in pairs:
        _, tokens = await pair.gather()
        assert tokens == await greedy(http, cluster.single.url, prompt)


async def pushing(http: Http, cluster: Cluster) -> None:
    """Wait until decode has blocks for requests whose KV is on its way."""

    async def busy() -> bool:
        return await kv_usage(http, cluster.decode.url) > 0 and await kv_usage(http, cluster.prefill.url) > 0

    await eventually(busy, 5, "nothing is being pushed", every=0.005)


async def test_prefill_is_killed(cluster: Cluster, http: Http) -> None:
    rng = random.Random(30)
    decode_pid = cluster.decode.pid
    pairs = await start_pairs(http, cluster, rng, 4)
    await pushing(http, cluster)
    cluster.prefill.signal(signal.SIGKILL)
    killed = time.monotonic()
    await asyncio.gather(*(pair.gather() for _, pair in pairs))
    took = time.monotonic() - killed
    await expect_answers(http, cluster, pairs)
    print(f"decode answered {len(pairs)} requests {took:.2f} s after prefill had died")
    assert took < 5, f"decode answered {took:.1f} s after prefill had died"
    assert cluster.decode.alive()

    cluster.prefill.start()
    cluster.prefill.wait_ready(300)
    before = await loaded_tokens(http, cluster)

    async def used_again() -> bool:
        await greedy(http, cluster.url, random_prompt(rng, 300))
        return await loaded_tokens(http, cluster) > before

    await eventually(used_again, 20, "the restarted prefill engine is not used")
    await assert_identical(http, cluster, [random_prompt(rng, rng.randint(1, 1500)) for _ in range(8)])
    assert cluster.decode.pid == decode_pid
    await assert_idle(http, cluster)


async def test_decode_is_killed(cluster: Cluster, http: Http) -> None:
    rng = random.Random(31)
    prefill_pid = cluster.prefill.pid
    pairs = await start_pairs(http, cluster, rng, 6)
    await pushing(http, cluster)
    cluster.decode.signal(signal.SIGKILL)
    killed = time.monotonic()
    for _, pair in pairs:
        pair.prefill.cancel()

    async def freed() -> bool:
        return await kv_usage(http, cluster.prefill.url) == 0

    await eventually(freed, 2, "prefill holds KV for a decode side that is dead", every=0.02)
    assert time.monotonic() - killed < 2.5
    await asyncio.gather(*(pair.gather() for _, pair in pairs))
    assert cluster.prefill.alive()

    cluster.decode.start()
    cluster.decode.wait_ready(300)

    async def serves() -> bool:
        try:
            await greedy(http, cluster.url, random_prompt(rng, 300))
        except aiohttp.ClientResponseError:
            return False
        return True

    await eventually(serves, 20, "the restarted decode engine is not used")
    await assert_identical(http, cluster, [random_prompt(rng, rng.randint(1, 1500)) for _ in range(8)])
    assert cluster.prefill.pid == prefill_pid


async def test_decode_is_killed_while_kv_is_held_for_it(cluster: Cluster, http: Http) -> None:
    """Prefill has finished, and decode dies before all of it was taken: nothing waits for the lease."""
    rng = random.Random(32)
    pairs = await start_pairs(http, cluster, rng, 4)
    await asyncio.wait([pairs[0][1].prefill], timeout=20)
    cluster.decode.signal(signal.SIGKILL)

    async def freed() -> bool:
        idle = await requests_inside(http, cluster.prefill.url) == 0
        return idle and await kv_usage(http, cluster.prefill.url) == 0

    await asyncio.gather(*(pair.prefill for _, pair in pairs), return_exceptions=True)
    took = await eventually(freed, 2, "prefill holds KV for a decode side that is dead", every=0.02)
    await asyncio.gather(*(pair.gather() for _, pair in pairs))
    assert took < 2


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_stopped_for_ten_seconds(cluster: Cluster, http: Http, side: str) -> None:
    rng = random.Random(f"stop {side}")
    pairs = await start_pairs(http, cluster, rng, 6)
    await pushing(http, cluster)
    engine = cluster.prefill if side == "prefill" else cluster.decode
    engine.signal(signal.SIGSTOP)
    await asyncio.sleep(10)
    engine.signal(signal.SIGCONT)
    await expect_answers(http, cluster, pairs)
    await assert_idle(http, cluster)
    await assert_identical(http, cluster, [random_prompt(rng, rng.randint(1, 1500)) for _ in range(8)])


async def test_the_proxy_is_restarted(cluster: Cluster, http: Http) -> None:
    rng = random.Random(33)
    before = [(await probe(http, e.url))["incarnation"] for e in (cluster.prefill, cluster.decode)]
    cut = [asyncio.create_task(greedy(http, cluster.url, random_prompt(rng, 1500), 200)) for _ in range(4)]
    await asyncio.sleep(0.2)
    cluster.proxy.signal(signal.SIGKILL)
    await asyncio.gather(*cut, return_exceptions=True)
    cluster.proxy.start()
    cluster.proxy.wait_ready(30)
    await assert_idle(http, cluster)
    await assert_identical(http, cluster, [random_prompt(rng, rng.randint(1, 1500)) for _ in range(8)])
    assert [(await probe(http, e.url))["incarnation"] for e in (cluster.prefill, cluster.decode)] == before


async def test_policy_fail(clusters: Clusters, http: Http) -> None:
    """kv_load_failure_policy=fail: the request fails fast and clearly, the engine stays up."""
    cluster = clusters(Shape(failure_policy="fail", single=False))
    probed = await probe(http, cluster.prefill.url)
    params: dict[str, Any] = {
        "do_remote_prefill": True,
        "transfer_id": "never-prefilled",
        "remote_engine_id": probed["engine_id"],
        "remote_host": probed["host"],
        "remote_port": probed["port"],
    }
    began = time.monotonic()
    with pytest.raises(aiohttp.ClientResponseError) as refused:
        await complete(http, cluster.decode.url, [7] * 300, 4, kv_transfer_params=params)
    assert refused.value.status == 500
    assert time.monotonic() - began < 8
    await assert_idle(http, cluster)
    assert len(await greedy(http, cluster.url, [9] * 300, 4)) == 4


async def test_engines_that_do_not_fit(clusters: Clusters, http: Http) -> None:
    """Another model configuration: the handshake refuses with both's hashes, decode computes the prompt."""
    cluster = clusters(Shape(decode_args=("--hf-overrides", '{"note": "another"}'), proxy=False))
    prompt = random_prompt(random.Random(34), 300)
    probed = await probe(http, cluster.prefill.url)
    pair = Pair(http, cluster.prefill.url, cluster.decode.url, probed, prompt)
    _, tokens = await pair.gather()
    assert tokens == await greedy(http, cluster.single.url, prompt)
    log = cluster.decode.log.read_text()
    theirs = probed["model_hash"]
    assert f"model configuration: prefill has {theirs}, decode has " in log
