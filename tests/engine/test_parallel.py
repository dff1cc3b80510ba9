"""Prefill and decode of different parallelism and block size, token for token against one engine."""

import asyncio
import random

import aiohttp
import pytest

from tests.engine.harness import Cluster, Clusters, Shape, abandon, complete, random_prompt
from tests.engine.test_aborts import assert_idle
from tests.engine.test_identity import answers, assert_identical, loaded_tokens

Http = aiohttp.ClientSession
EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 1024, 1500]
# vLLM's CPU worker makes the tensors that stages exchange only when it warms up, which eager ones never do.
STAGES_ON_CPU = ("--no-enforce-eager", "--compilation-config", '{"mode": 1, "backend": "eager"}')


def engines(model: str, prefill: str, decode: str) -> Shape:
    """A shape from short descriptions of both sides: ``"tp2 bs64"``, ``"pp2"``."""
    flags = {"tp": "--tensor-parallel-size", "pp": "--pipeline-parallel-size", "bs": "--block-size"}

    def args(side: str) -> tuple[str, ...]:
        found = tuple(arg for part in side.split() for arg in (flags[part[:2]], part[2:]))
        return found + STAGES_ON_CPU if "pp" in side else found

    return Shape(model=model, prefill_args=args(prefill), decode_args=args(decode))


PAIRS = {
    # Heads divided and joined, blocks as well.
    "heads divided": engines("tiny-llama", "tp1 bs32", "tp2 bs64"),
    "heads joined": engines("tiny-llama", "tp2 bs64", "tp1 bs32"),
    "blocks that share a third": engines("tiny-llama", "tp1 bs64", "tp1 bs96"),
    # One KV head, on both ranks alike; a latent, too.
    "one head, to two ranks": engines("tiny-mqa", "tp1", "tp2"),
    "one head, of two ranks": engines("tiny-mqa", "tp2", "tp1"),
    "latent, to two ranks": engines("tiny-deepseek", "tp1", "tp2"),
    "latent, of two ranks": engines("tiny-deepseek", "tp2", "tp1"),
    "windows": engines("tiny-gemma3", "tp2 bs64", "tp1 bs32"),
    "stages joined": engines("tiny-llama", "pp2", "tp1"),
    "stages divided": engines("tiny-llama", "tp1 bs64", "pp2 bs32"),
}


@pytest.mark.parametrize("pair", ["heads divided", "heads joined"])
async def test_aborts(clusters: Clusters, http: Http, pair: str) -> None:
    """Every worker lets go of what the others do: nothing waits for a lease."""
    cluster = clusters(PAIRS[pair])
    rng = random.Random(pair)
    slots = asyncio.Semaphore(8)

    async def one(prompt: list[int], after: float) -> bool:
        async with slots:
            return await abandon(http, cluster.url, prompt, after)

    moments = [rng.choice([0.005, 0.03, 0.1, 0.4]) * rng.random() for _ in range(100)]
    cut = await asyncio.gather(*(one(random_prompt(rng, rng.randint(1, 1500)), m) for m in moments))
    assert sum(cut) > 60, "too many ended before they were to be cut off"
    await assert_idle(http, cluster, within=10)
    await assert_identical(http, cluster, [random_prompt(rng, rng.randint(1, 1500)) for _ in range(8)])
    await assert_idle(http, cluster)


@pytest.mark.parametrize("pair", PAIRS)
async def test_identical(clusters: Clusters, http: Http, pair: str) -> None:
    cluster: Cluster = clusters(PAIRS[pair])
    rng = random.Random(pair)
    prompts = [random_prompt(rng, n) for n in EDGES]
    prompts += [random_prompt(rng, rng.randint(1, 1500)) for _ in range(20)]
    before = await loaded_tokens(http, cluster)
    await assert_identical(http, cluster, prompts)
    # Nothing was quietly prefilled on the decode engine: all but the last token of each prompt came over.
    assert await loaded_tokens(http, cluster) - before == sum(len(p) - 1 for p in prompts)
    # Both sides have prefixes in their caches now.
    await assert_identical(http, cluster, [p + random_prompt(rng, 50) for p in prompts[:10]])
    serial = cluster.another_proxy("--order", "serial").url
    await assert_identical(http, cluster, [random_prompt(rng, 700) for _ in range(4)], serial)
    sample = await complete(http, cluster.url, random_prompt(rng, 500), 2)
    assert sample["kv_transfer_params"]["transfer"]["outcome"] == "loaded"
    assert await answers(http, cluster.decode.url, prompts[:2], n=4)  # and it serves by itself
