"""The prefix index against a real engine: what it says is cached is what vLLM then does not compute."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from mooncake_connector.demo.models import make, server_args
from mooncake_connector.scheduler.actuator.local import (
    LocalEngine,
    PreloadedVllm,
    free_port,
    push_config,
    start_all,
    stop_all,
)
from mooncake_connector.scheduler.engines.base import EngineInfo, KvEventSource
from mooncake_connector.scheduler.engines.kv_events import KvEventSubscriber
from mooncake_connector.scheduler.policy.engine_blocks import EngineBlocks
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from tests.engine.direct import probe
from tests.engine.harness import complete, eventually, greedy, metric, random_prompt, reset_prefix_cache

Http = aiohttp.ClientSession
POOL = 60  # blocks: 1,920 tokens


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, preload: PreloadedVllm | None) -> Iterator[LocalEngine]:
    """One that publishes its events, and can keep few blocks."""
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{free_port()}",
        "replay_endpoint": f"tcp://*:{free_port()}",
        "topic": "kv",
    }
    pool = ["--max-model-len", "1024", "--num-gpu-blocks-override", str(POOL)]
    process = LocalEngine(
        make("tiny-llama"),
        kv_config=push_config("both"),
        args=[*server_args("tiny-llama"), *pool, "--kv-events-config", json.dumps(events)],
        name="events",
        env={"VLLM_SERVER_DEV_MODE": "1"},
        logs=tmp_path_factory.mktemp("events"),
        preload=preload,
    )
    try:
        start_all([process], timeout=400)
        yield process
    finally:
        stop_all([process])


class Relay:
    """Passes on what an engine publishes, or loses it."""

    def __init__(self, endpoint: str, topic: str) -> None:
        context = zmq.asyncio.Context.instance()
        self.sub, self.pub = context.socket(zmq.SUB), context.socket(zmq.PUB)
        self.sub.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self.sub.connect(endpoint)
        port = self.pub.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.loses = False
        self.lost = 0
        self.task = asyncio.create_task(self.pass_on())

    async def pass_on(self) -> None:
        while True:
            frames = await self.sub.recv_multipart()
            if self.loses:
                self.lost += 1
            else:
                await self.pub.send_multipart(frames)

    def close(self) -> None:
        self.task.cancel()
        self.sub.close(linger=0)
        self.pub.close(linger=0)


class Followed:
    """An engine's cache as its events tell it."""

    def __init__(self, http: Http, url: str, info: EngineInfo, relay: Relay) -> None:
        assert info.kv_events is not None
        self.http, self.url, self.relay = http, url, relay
        self.index = PrefixIndex(info.block_size)
        source = KvEventSource(relay.endpoint, info.kv_events.replay_endpoint, info.kv_events.topic)
        # Silence is not what shows gaps here.
        self.subscriber = KvEventSubscriber(EngineBlocks(self.index, url), source, check_seconds=60)

    def matched(self, prompt: list[int]) -> int:
        """Tokens of its whole blocks that are cached."""
        return self.index.match(self.index.keys(prompt)).get(self.url, 0) * self.index.block_size

    async def hit(self, prompt: list[int]) -> float:
        """Tokens of the prompt that vLLM finds in its cache, by its own count; and computes the others."""
        before = await metric(self.http, self.url, "vllm:prefix_cache_hits_total")
        await greedy(self.http, self.url, prompt, 1)
        return await metric(self.http, self.url, "vllm:prefix_cache_hits_total") - before

    async def learns(self, prompt: list[int], tokens: int) -> None:
        async def there() -> bool:
            return self.matched(prompt) == tokens

        await eventually(there, 10, f"{tokens} tokens known, {self.matched(prompt)} are")


@pytest.fixture
async def followed(engine: LocalEngine, http: Http) -> AsyncIterator[Followed]:
    info = msgspec.convert(await probe(http, engine.url), EngineInfo)
    assert info.kv_events is not None, "the connector does not say where the engine publishes"
    relay = Relay(info.kv_events.endpoint, info.kv_events.topic)
    follow = Followed(http, engine.url, info, relay)
    async with follow.subscriber:
        # Something must be published after the subscription has arrived, as only that shows that it has.
        async def arrives() -> bool:
            await greedy(http, engine.url, random_prompt(random.Random(), 40), 1)
            return follow.subscriber.batches > 0

        await eventually(arrives, 30, "events", every=0.2)
        yield follow
    relay.close()


async def test_what_is_cached(followed: Followed, http: Http) -> None:
    """Prompts that share prefixes, in a pool that can't keep them all; then an empty cache."""
    rng = random.Random(1)
    prefixes = [random_prompt(rng, n) for n in (100, 200, 230, 300, 333, 400, 450, 500)]
    evicted = 0
    longest: dict[int, int] = {}
    for turn in range(40):
        which = rng.randrange(8)
        prompt = prefixes[which] + random_prompt(rng, rng.choice([1, 35, 200]))
        prompt = prompt[:-1] if len(prompt) % 32 == 0 else prompt  # vLLM computes the last token anyway
        known = followed.matched(prompt)
        evicted += known < longest.get(which, 0)
        assert await followed.hit(prompt) == known, f"turn {turn}, {len(prompt)} tokens"
        await followed.learns(prompt, len(prompt) // 32 * 32)
        longest[which] = len(prefixes[which]) // 32 * 32
    assert evicted, "the pool was to be too small for all"
    # A generated token that fills a block makes it one that can be hit.
    answer = await greedy(http, followed.url, prompt, 64)
    await followed.learns(prompt + answer, (len(prompt) + 63) // 32 * 32)
    await reset_prefix_cache(http, followed.url)
    await greedy(http, followed.url, random_prompt(rng, 5), 2)  # vLLM publishes after steps only
    await followed.learns(prompt, 0)
    assert followed.index.held(followed.url) == 0
    assert (followed.subscriber.gaps, followed.subscriber.lost) == (0, 0)


async def test_copies_and_salts(followed: Followed, http: Http) -> None:
    """Prompts computed side by side are cached twice; salted ones are nobody else's."""
    rng = random.Random(2)
    prompt = random_prompt(rng, 300)
    await asyncio.gather(*(complete(http, followed.url, prompt, 1) for _ in range(3)))
    await followed.learns(prompt, 288)
    assert await followed.hit(prompt) == 288
    salted = random_prompt(rng, 300)
    await complete(http, followed.url, salted, 1, cache_salt="s")
    await followed.learns(prompt, 288)
    assert followed.matched(salted) == 0
    assert await followed.hit(salted) == 0


async def test_a_gap_and_a_restart(followed: Followed, engine: LocalEngine, http: Http) -> None:
    rng = random.Random(3)
    first, second, third = (random_prompt(rng, n) for n in (100, 200, 300))
    await followed.hit(first)
    await followed.learns(first, 96)
    followed.relay.loses = True
    await followed.hit(second)

    async def lost() -> bool:
        return followed.relay.lost > 0

    await eventually(lost, 10, "nothing was published")
    assert followed.matched(second) == 0
    followed.relay.loses = False
    await followed.hit(third)
    await followed.learns(third, 288)
    assert (followed.matched(first), followed.matched(second)) == (96, 192)
    assert (followed.subscriber.gaps, followed.subscriber.lost) == (1, 0)
    stop_all([engine])
    start_all([engine], timeout=400)

    async def forgotten() -> bool:
        await greedy(http, followed.url, random_prompt(rng, 40), 1)
        return followed.subscriber.lost == 1

    await eventually(forgotten, 30, "the restart was not noticed", every=0.2)
    assert [followed.matched(p) for p in (first, second, third)] == [0, 0, 0]
    assert await followed.hit(third) == 0
    await followed.learns(third, 288)
