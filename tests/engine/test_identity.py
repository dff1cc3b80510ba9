"""Token for token what one engine answers: the point of it all."""

import asyncio
import random

import aiohttp
import pytest

from tests.engine.harness import (
    Cluster,
    Clusters,
    Shape,
    complete,
    greedy,
    metric,
    random_prompt,
)

Http = aiohttp.ClientSession
EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 96, 128, 1024, 1500]


async def answers(
    http: Http,
    url: str,
    prompts: list[list[int]],
    *,
    n: int = 16,
    stream: bool | None = None,
    at_once: int = 8,
) -> list[list[int]]:
    """Greedy answers, `at_once` requests at a time; every other one streamed unless `stream` says."""
    slots = asyncio.Semaphore(at_once)

    async def one(i: int, prompt: list[int]) -> list[int]:
        async with slots:
            return await greedy(http, url, prompt, n, stream=i % 2 == 0 if stream is None else stream)

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))


async def assert_identical(
    http: Http, cluster: Cluster, prompts: list[list[int]], url: str | None = None
) -> None:
    """Through P and D (at `url`, or by the cluster's proxy) as by one engine."""
    expected = await answers(http, cluster.single.url, prompts)
    got = await answers(http, url or cluster.url, prompts)
    different = [(len(p), e, g) for p, e, g in zip(prompts, expected, got, strict=True) if e != g]
    assert not different, f"{len(different)} of {len(prompts)} differ; the first: {different[0]}"


async def loaded_tokens(http: Http, cluster: Cluster) -> float:
    """Tokens that the decode engine took from elsewhere, by its own count."""
    return await metric(http, cluster.decode.url, "vllm:external_prefix_cache_hits_total")


async def test_random_prompts(cluster: Cluster, http: Http) -> None:
    rng = random.Random(1)
    prompts = [random_prompt(rng, rng.randint(1, 1500)) for _ in range(100)]
    before = await loaded_tokens(http, cluster)
    await assert_identical(http, cluster, prompts)
    # Nothing was quietly prefilled on the decode engine: all but the last token of each prompt came over.
    assert await loaded_tokens(http, cluster) - before == sum(len(p) - 1 for p in prompts)


async def test_edges_of_blocks(cluster: Cluster, http: Http) -> None:
    rng = random.Random(2)
    await assert_identical(http, cluster, [random_prompt(rng, n) for n in EDGES])


async def test_serial_order(cluster: Cluster, http: Http) -> None:
    """Prefill first, its answer's parameters handed to decode: as proxies made for NixlConnector do it."""
    rng = random.Random(3)
    proxy = cluster.another_proxy("--order", "serial")
    prompts = [random_prompt(rng, rng.randint(1, 1500)) for _ in range(40)]
    before = await loaded_tokens(http, cluster)
    await assert_identical(http, cluster, prompts, proxy.url)
    assert await loaded_tokens(http, cluster) - before == sum(len(p) - 1 for p in prompts)


@pytest.mark.parametrize("cached", ["prefill", "decode", "both"])
async def test_prefix_cached(cluster: Cluster, http: Http, cached: str) -> None:
    rng = random.Random(f"cached on {cached}")
    prefixes = [random_prompt(rng, n) for n in (32, 70, 320, 700)]
    warm = {
        "prefill": [cluster.prefill],
        "decode": [cluster.decode],
        "both": [cluster.prefill, cluster.decode],
    }
    for engine in warm[cached]:
        await answers(http, engine.url, prefixes, n=1)
    prompts = [p + random_prompt(rng, n) for p in prefixes for n in (0, 1, 40, 400)]
    before = await loaded_tokens(http, cluster)
    await assert_identical(http, cluster, prompts)
    moved = await loaded_tokens(http, cluster) - before
    if cached == "prefill":
        # Prompts of one prefix run at once, so how many of them find each other's blocks on decode varies.
        assert 0 < moved <= sum(len(p) - 1 for p in prompts)
    else:
        assert 0 < moved < sum(len(p) - 1 for p in prompts), "what decode had was sent again"


async def test_many_samples_of_one_prompt(cluster: Cluster, http: Http) -> None:
    prompt = random_prompt(random.Random(5), 333)
    body = {"model": "m", "prompt": prompt, "max_tokens": 16, "n": 4, "temperature": 0.9, "seed": 3}
    both = []
    for url in (cluster.single.url, cluster.url):
        async with http.post(f"{url}/v1/completions", json={**body, "return_token_ids": True}) as reply:
            both.append([c["token_ids"] for c in (await reply.json())["choices"]])
    assert both[0] == both[1]
    assert len({tuple(ids) for ids in both[1]}) == 4, "samples that do not differ show nothing"


async def test_several_prompts_in_one_request(cluster: Cluster, http: Http) -> None:
    rng = random.Random(7)
    prompts = [random_prompt(rng, n) for n in (5, 100, 257)]
    body = {"model": "m", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    both = []
    for url in (cluster.single.url, cluster.url):
        async with http.post(f"{url}/v1/completions", json={**body, "prompt": prompts}) as reply:
            both.append([c["token_ids"] for c in (await reply.json())["choices"]])
    assert both[0] == both[1]


async def test_prompt_logprobs_need_no_transfer(cluster: Cluster, http: Http) -> None:
    """vLLM reads no cache for these, so decode computes the prompt; prefill must not keep it."""
    prompt = random_prompt(random.Random(8), 200)
    got = await complete(http, cluster.url, prompt, 4, prompt_logprobs=1, logprobs=2)
    expected = await complete(http, cluster.single.url, prompt, 4, prompt_logprobs=1, logprobs=2)
    assert got["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"]
    assert len(got["choices"][0]["prompt_logprobs"]) == 200


async def test_stop_at_the_first_token(cluster: Cluster, http: Http) -> None:
    """The first token ends the answer on prefill as on decode: as a stop token, a stop string, as EOS."""
    for seed in range(3):
        prompt = random_prompt(random.Random(f"stop {seed}"), 150 + seed)
        first = (await greedy(http, cluster.single.url, prompt, 1))[0]
        text = (await complete(http, cluster.single.url, prompt, 1))["choices"][0]["text"]
        fields = [{"stop_token_ids": [first]}, {"logit_bias": {"1": 100.0}, "ignore_eos": False}]
        if text.strip():
            fields.append({"stop": [text]})
        for f in fields:
            expected = await complete(http, cluster.single.url, prompt, 8, **f)
            got = await complete(http, cluster.url, prompt, 8, **f)
            for key in ("token_ids", "text", "finish_reason"):
                assert got["choices"][0][key] == expected["choices"][0][key], f


async def test_chat_with_logprobs(cluster: Cluster, http: Http) -> None:
    words = "the quick brown fox jumps over the lazy dog " * 20
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": words}],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    both = []
    for url in (cluster.single.url, cluster.url):
        async with http.post(f"{url}/v1/chat/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            both.append((await reply.json())["choices"][0])
    assert both[0]["message"]["content"] == both[1]["message"]["content"]
    for a, b in zip(both[0]["logprobs"]["content"], both[1]["logprobs"]["content"], strict=True):
        assert a["token"] == b["token"]
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-3)


async def test_the_answer_says_what_moved(cluster: Cluster, http: Http) -> None:
    answer = await complete(http, cluster.url, random_prompt(random.Random(9), 1000), 2)
    transfer = answer["kv_transfer_params"]["transfer"]
    # 1,000 tokens are 32 blocks of 32 tokens; 4 layers x 2 KV heads x 64 x K and V x 4 bytes a token.
    assert transfer["bytes"] == 32 * 32 * 4 * 2 * 64 * 2 * 4
    assert transfer["path"] in ("process_vm", "tcp")
    assert transfer["outcome"] == "loaded"


@pytest.mark.parametrize("path", ["process_vm", "tcp"])
async def test_small_chunks_preemption_and_no_prefix_cache(clusters: Clusters, http: Http, path: str) -> None:
    """Prefill in small chunks, pools so small that decode preempts, no prefix cache; each path forced."""
    pool = ("--num-gpu-blocks-override", "130", "--max-model-len", "2048")
    small = ("--no-enable-prefix-caching", "--max-num-batched-tokens", "256", *pool)
    # Admission would spare decode what is tried here.
    shape = Shape(args=small, extra=(("path", path),), proxy_args=("--admission", "none"))
    cluster = clusters(shape)
    rng = random.Random(f"small {path}")
    prompts = [random_prompt(rng, rng.randint(1, 1500)) for _ in range(24)]
    expected = await answers(http, cluster.single.url, prompts, n=100)
    got = await answers(http, cluster.url, prompts, n=100)
    assert got == expected
    preempted = [
        await metric(http, e.url, "vllm:num_preemptions_total") for e in (cluster.prefill, cluster.decode)
    ]
    assert preempted[1] > 0, f"the pool was to be too small, but preemptions were {preempted}"
    sample = await complete(http, cluster.url, random_prompt(rng, 600), 2)
    assert sample["kv_transfer_params"]["transfer"]["path"] == path
