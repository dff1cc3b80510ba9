"""Other shapes: two ranks, and sliding windows. (Multi-head latent attention has a file of its own.)"""

import random

import aiohttp
import pytest

from tests.engine.harness import Cluster, complete, random_prompt
from tests.engine.test_identity import EDGES, assert_identical, loaded_tokens


async def test_a_window_moves_less(gemma: Cluster, http: aiohttp.ClientSession) -> None:
    """Blocks that no sliding-window layer attends to any more stay behind."""
    rng = random.Random(11)
    moved = []
    for n in (640, 1280):
        answer = await complete(http, gemma.url, random_prompt(rng, n), 2)
        moved.append(answer["kv_transfer_params"]["transfer"]["bytes"])
    assert moved[1] < 1.9 * moved[0], f"twice the tokens moved {moved[1] / moved[0]:.2f} times the bytes"


@pytest.mark.parametrize("name", ["gemma", "tp2"])
async def test_identical(name: str, request: pytest.FixtureRequest, http: aiohttp.ClientSession) -> None:
    cluster: Cluster = request.getfixturevalue(name)
    rng = random.Random(name)
    prompts = [random_prompt(rng, n) for n in EDGES]
    prompts += [random_prompt(rng, rng.randint(1, 1500)) for _ in range(100 - len(prompts))]
    before = await loaded_tokens(http, cluster)
    await assert_identical(http, cluster, prompts)
    assert await loaded_tokens(http, cluster) - before == sum(len(p) - 1 for p in prompts)
    # The same prompts once more: now both sides have prefixes in their caches.
    await assert_identical(http, cluster, [p + random_prompt(rng, 50) for p in prompts[:20]])
    await assert_identical(
        http,
        cluster,
        [random_prompt(rng, 700) for _ in range(8)],
        cluster.another_proxy("--order", "serial").url,
    )
