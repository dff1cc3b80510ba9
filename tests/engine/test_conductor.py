"""The conductor and real engines: it knows what they hold, copies what is hot, refuses what is too much."""

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from mooncake_connector.demo.models import make, server_args
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    LocalProxy,
    PreloadedVllm,
    free_port,
    push_config,
    start_all,
    stop_all,
)
from tests.engine.harness import eventually, greedy, metric, random_prompt

Http = aiohttp.ClientSession
BLOCK = 32
LONG = 3000


@dataclass
class Pair:
    """Two prefill engines that publish their KV events, one decode engine, and proxies before them."""

    prefills: list[LocalEngine]
    decode: LocalEngine
    logs: Path

    def proxy(self, *args: str) -> LocalProxy:
        urls = [engine.url for engine in self.prefills]
        proxy = LocalProxy(urls, [self.decode.url], args=args, name="proxy" + "".join(args), logs=self.logs)
        start_all([proxy], timeout=60)
        return proxy


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, preload: PreloadedVllm | None) -> Iterator[Pair]:
    logs = tmp_path_factory.mktemp("conductor")

    def engine(name: str, *args: str) -> LocalEngine:
        return LocalEngine(
            make("tiny-llama"),
            kv_config=push_config("both"),
            args=[*server_args("tiny-llama"), *args],
            name=name,
            env={"VLLM_SERVER_DEV_MODE": "1"},
            logs=logs,
            preload=preload,
        )

    def events() -> str:
        ports = {"endpoint": f"tcp://*:{free_port()}", "replay_endpoint": f"tcp://*:{free_port()}"}
        return json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", **ports})

    prefills = [engine(f"prefill-{i}", "--kv-events-config", events()) for i in range(2)]
    decode = engine("decode")
    try:
        start_all([*prefills, decode], timeout=400)
        yield Pair(prefills, decode, logs)
    finally:
        stop_all([*prefills, decode])


@pytest.fixture(scope="module")
def proxy(pair: Pair) -> Iterator[str]:
    """With the settings that users get."""
    process = pair.proxy()
    yield process.url
    stop_all([process])


async def home(http: Http, url: str, prompt: list[int] | str, n: int = 4) -> str:
    """The prefill engine that a proxy chooses."""
    body = {"model": "m", "prompt": prompt, "max_tokens": n, "temperature": 0}
    async with http.post(f"{url}/v1/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        await reply.read()
        return reply.headers["x-mooncake-prefill"]


async def settled(http: Http, pair: Pair, proxy: str) -> None:
    """Wait until the index has what the engines have: as many blocks for a while."""
    seen: list[float] = []

    async def steady() -> bool:
        seen.append(await metric(http, proxy, "mooncake_proxy_index_blocks"))
        return len(seen) > 5 and len(set(seen[-5:])) == 1

    await eventually(steady, 20, "the index goes on growing")


async def test_a_prompt_goes_where_its_prefix_is(pair: Pair, proxy: str, http: Http) -> None:
    rng = random.Random("prefix")
    # What engines hold counts, not what went through this proxy.
    asked = []
    for engine in (*pair.prefills, *reversed(pair.prefills)):
        prompt = random_prompt(rng, 20 * BLOCK + 5)
        await greedy(http, engine.url, prompt, 1)
        asked.append((engine, prompt))
    await settled(http, pair, proxy)
    for engine, prompt in asked:
        before = await metric(http, engine.url, "vllm:prefix_cache_hits_total")
        assert await home(http, proxy, [*prompt, 7]) == engine.url

        # Decode's answer may be here before prefill has counted.
        async def counted(url: str = engine.url, before: float = before) -> bool:
            return await metric(http, url, "vllm:prefix_cache_hits_total") - before >= 20 * BLOCK

        await eventually(counted, 10, "prefill did not find the prefix in its cache")
    assert await metric(http, proxy, "mooncake_proxy_cached_tokens_total") >= 4 * 20 * BLOCK


async def test_text_is_known_by_its_tokens(pair: Pair, proxy: str, http: Http) -> None:
    text = " ".join(random.Random("text").choices(["one", "two", "three", "four", "five"], k=400))

    async def known() -> bool:
        before = await metric(http, proxy, "mooncake_proxy_cached_tokens_total")
        await home(http, proxy, text)
        return await metric(http, proxy, "mooncake_proxy_cached_tokens_total") - before >= 5 * BLOCK

    # The proxy may still be reading the engines' tokenizer.
    await eventually(known, 60, "the prompt's prefix is not recognised", every=0.5)


async def test_a_hot_prefix_is_copied(pair: Pair, http: Http) -> None:
    # A proxy that has not learned yet how little this model's prompts cost: a copy is cheaper than computing.
    process = pair.proxy("--routing", "conductor")
    try:
        await _copied(http, pair, process.url)
    finally:
        stop_all([process])


async def _copied(http: Http, pair: Pair, proxy: str) -> None:
    rng = random.Random("hot")
    prefix = random_prompt(rng, 60 * BLOCK)
    holder = await home(http, proxy, prefix)
    (other,) = (engine for engine in pair.prefills if engine.url != holder)
    await settled(http, pair, proxy)
    prompts = [[*prefix, *random_prompt(rng, 40)] for _ in range(16)]
    loaded = "vllm:external_prefix_cache_hits_total"
    before = await metric(http, other.url, loaded)
    homes = await asyncio.gather(*(home(http, proxy, prompt) for prompt in prompts))
    assert set(homes) == {holder, other.url}
    assert await metric(http, proxy, "mooncake_proxy_copied_tokens_total") >= 60 * BLOCK
    # It came from the other engine, and whoever asks there now need not compute it.
    assert await metric(http, other.url, loaded) - before >= 60 * BLOCK
    cached = await metric(http, other.url, "vllm:prefix_cache_hits_total")
    tail = random_prompt(rng, 40)
    answer = await greedy(http, other.url, [*prefix, *tail], 8)
    assert await metric(http, other.url, "vllm:prefix_cache_hits_total") - cached >= 60 * BLOCK
    assert answer == await greedy(http, holder, [*prefix, *tail], 8)


async def test_too_much_is_sent_away_and_let_in_later(pair: Pair, http: Http) -> None:
    process = pair.proxy("--slo-ttft", "0.001")
    try:
        await _sent_away(http, process.url)
    finally:
        stop_all([process])


async def _sent_away(http: Http, url: str) -> None:
    rng = random.Random("away")
    body = {"model": "m", "max_tokens": 20, "ignore_eos": True, "stream": True, "temperature": 0}
    took = []

    async def ask() -> int:
        began = asyncio.get_running_loop().time()
        async with http.post(
            f"{url}/v1/completions", json={**body, "prompt": random_prompt(rng, LONG)}
        ) as reply:
            if reply.status == 200:
                assert b"[DONE]" in await reply.read()
                return 200
            said = (await reply.json())["error"]
        took.append(asyncio.get_running_loop().time() - began)
        assert int(reply.headers["Retry-After"]) >= 1
        assert said["slo"] == "ttft"
        assert said["predicted"] > said["limit"] > 0
        assert "first token" in said["message"]
        return reply.status

    # One begins at once, although no engine could keep that promise: the others come while it is computed.
    found = await asyncio.gather(*(ask() for _ in range(6)))
    assert set(found) == {200, 429}
    assert min(took) < 0.5
    assert await metric(http, url, "mooncake_proxy_rejected_total") == found.count(429)

    async def let_in() -> bool:
        async with http.post(
            f"{url}/v1/completions", json={**body, "prompt": random_prompt(rng, LONG)}
        ) as reply:
            return reply.status == 200 and b"[DONE]" in await reply.read()

    await eventually(let_in, 10, "nobody is let in although nothing runs")
