"""Other shapes: two ranks, and sliding windows. (Multi-head latent attention has a file of its own.)"""

import json
import random

import aiohttp
import pytest

from mooncake_connector.demo.models import make
from tests.engine.harness import Cluster, complete, random_prompt
from tests.engine.test_identity import EDGES, assert_identical, loaded_tokens


async def test_blocks_outside_the_window_stay_behind(gemma: Cluster, http: aiohttp.ClientSession) -> None:
    config = json.loads((make("tiny-gemma3") / "config.json").read_text())
    page = 32 * config["num_key_value_heads"] * config["head_dim"] * 2 * 4  # 32 tokens, K and V, float32
    sliding = config["layer_types"].count("sliding_attention")
    full = len(config["layer_types"]) - sliding
    assert sliding
    assert full
    for n in (640, 1280):
        answer = await complete(http, gemma.url, random_prompt(random.Random(n), n), 2)
        # The last token attends to the 64 before it, which are the last two blocks.
        expected = page * (full * n // 32 + sliding * 2)
        assert answer["kv_transfer_params"]["transfer"]["bytes"] == expected


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
