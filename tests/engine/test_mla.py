"""Multi-head latent attention: one latent of 512 + 64 numbers per token and layer, the same on every rank."""

import asyncio
import random

import aiohttp
import pytest

from mooncake_connector.demo.models import make
from tests.engine.harness import Cluster, Clusters, Shape, complete, greedy, random_prompt
from tests.engine.test_identity import answers, assert_identical, loaded_tokens

Http = aiohttp.ClientSession
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 1500]  # blocks are of 16 tokens
TOKEN_BYTES = 4 * 576 * 4  # layers, numbers, bytes of each


@pytest.fixture(scope="module", params=["tp1", "tp2"])
def mla(request: pytest.FixtureRequest, clusters: Clusters) -> Cluster:
    """One rank, then two, on P, D and the single engine alike."""
    args = () if request.param == "tp1" else ("--tensor-parallel-size", "2")
    return clusters(Shape(model="tiny-deepseek", args=args))


def prompts_of(name: str, n: int) -> list[list[int]]:
    """`n` random prompts: the edges of blocks, then any length from 1 to 1,500."""
    rng = random.Random(name)
    edges = [random_prompt(rng, k) for k in EDGES[:n]]
    return edges + [random_prompt(rng, rng.randint(1, 1500)) for _ in range(n - len(edges))]


async def test_one_engine_is_right(mla: Cluster, http: Http) -> None:
    """Batched, decoding from its cache, a lone engine answers as transformers does without cache or batch.

    Everything else here compares with this engine. Versions of vLLM have been wrong about just this: with
    unscaled rotary embedding, a token's position depended on its neighbours in the batch.
    """
    import torch
    from transformers import AutoModelForCausalLM

    prompts = prompts_of("right", 20)
    got = await answers(http, mla.single.url, prompts)
    assert len({token for answer in got for token in answer}) > 50, "answers all alike show nothing"
    model = AutoModelForCausalLM.from_pretrained(make("tiny-deepseek"), dtype=torch.float32).eval()

    @torch.inference_mode()
    def best_next(prompt: list[int], answer: list[int]) -> list[int]:
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        return list(logits.argmax(-1).tolist())

    expected = [await asyncio.to_thread(best_next, p, a) for p, a in zip(prompts, got, strict=True)]
    assert got == expected


@pytest.mark.parametrize("order", ["concurrent", "serial"])
async def test_identical(mla: Cluster, http: Http, order: str) -> None:
    prompts = prompts_of(order, 100 if order == "concurrent" else 40)
    before = await loaded_tokens(http, mla)
    await assert_identical(http, mla, prompts, mla.another_proxy("--order", order).url)
    # Nothing was quietly prefilled on the decode engine: all but the last token of each prompt came over.
    assert await loaded_tokens(http, mla) - before == sum(len(p) - 1 for p in prompts)


async def test_one_at_a_time(mla: Cluster, http: Http) -> None:
    """No batch on either side, answers long enough to fill blocks of their own."""
    for prompt in prompts_of("alone", 8):
        assert await greedy(http, mla.url, prompt, 40) == await greedy(http, mla.single.url, prompt, 40)


async def test_the_latent_moves(mla: Cluster, http: Http) -> None:
    """576 numbers per token and layer to each rank, not keys and values of every head."""
    prompt = random_prompt(random.Random("latent"), 640)
    answer = await complete(http, mla.url, prompt, 2)
    ranks = 2 if "--tensor-parallel-size" in mla.shape.args else 1
    assert answer["kv_transfer_params"]["transfer"]["bytes"] == ranks * 640 * TOKEN_BYTES
