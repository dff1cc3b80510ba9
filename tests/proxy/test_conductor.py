"""The proxy asks the conductor: who serves, who waits, who is sent away, and what is copied where."""

import asyncio
import json
import time
from typing import Any

import openai
import pytest

from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.prompts.tokenizer_files import TokenizerFiles
from mooncake_connector.scheduler.prompts.tokens import Tokenizer
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, FakeEngine, events
from tests.proxy.test_failures import idle
from tests.unit.chat_templates import TEMPLATES
from tests.unit.tiny_tokenizers import make

LONG = 8192


def prompt(first: int, tokens: int = LONG) -> dict[str, Any]:
    """A streamed completion of a prompt that begins like no other."""
    return {"model": MODEL, "prompt": [first, *range(1, tokens)], "max_tokens": 7, "stream": True}


async def ask(setting: Setting, body: dict[str, Any], **headers: str) -> tuple[int, bytes, Any]:
    async with setting.http.post("/v1/completions", json=body, headers=headers) as reply:
        return reply.status, await reply.read(), reply.headers


async def test_a_prompt_goes_where_its_prefix_is(start: Start):
    setting = await start(2, 1)
    for engine in setting.prefill:
        engine.per_token = 1e-4
        engine.delay = 0.1
    both = await asyncio.gather(*(ask(setting, prompt(first)) for first in (1, 2)))
    homes = [headers["x-mooncake-prefill"] for _, _, headers in both]
    assert homes[0] != homes[1]
    for first in (1, 2, 2, 1):
        status, _, headers = await ask(setting, prompt(first))
        assert status == 200
        assert headers["x-mooncake-prefill"] == homes[first - 1]
    assert setting.count("cached_tokens_total") == 4 * (LONG - 32)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_a_turn_goes_where_the_turns_before_it_were(start: Start, path: str):
    setting = await start(2, 1)
    files = TokenizerFiles(make("byte_level").to_str(), {}, {"default": TEMPLATES["chatml"]})
    setting.proxy._tokens._tokenizer = Tokenizer(files)
    turns, homes, cached = [], set(), [0.0]
    for said in ("first " * 500, "second", "third"):
        turns.append({"role": "user", "content": said})
        body = {"model": MODEL, "max_tokens": 7, "input" if path == "/v1/responses" else "messages": turns}
        async with setting.http.post(path, json=body) as reply:
            assert reply.status == 200
            homes.add(reply.headers["x-mooncake-prefill"])
        turns.append({"role": "assistant", "content": "answer"})
        cached.append(setting.count("cached_tokens_total") - sum(cached))
    assert len(homes) == 1
    assert cached[1] == 0
    assert cached[3] >= cached[2] > 0


async def test_salted_prompts_share_nothing(start: Start):
    setting = await start()
    for salt in ("a", "b", "a"):
        await ask(setting, prompt(1) | {"cache_salt": salt})
    assert setting.count("cached_tokens_total") == LONG - 32


async def test_an_engine_without_a_prefix_cache_holds_nothing(start: Start):
    engines = [FakeEngine(role, prefix_caching=False) for role in ("kv_producer", "kv_consumer")]
    setting = await start(engines[:1], engines[1:])
    for _ in range(2):
        await ask(setting, prompt(1))
    assert setting.count("cached_tokens_total") == len(setting.proxy.index) == 0


@pytest.mark.parametrize("routing", ["least_loaded", "round_robin"])
async def test_modes_that_look_at_no_prefix_take_turns(start: Start, routing: Any):
    setting = await start(2, 1, scheduling=Scheduling(routing=routing))
    chosen = [(await ask(setting, prompt(1)))[2]["x-mooncake-prefill"] for _ in range(4)]
    assert chosen[:2] == chosen[2:]
    assert chosen[0] != chosen[1]


async def test_an_engine_that_was_started_anew_holds_nothing(start: Start):
    setting = await start()
    await ask(setting, prompt(1))
    assert len(setting.proxy.index) == LONG // 32
    setting.prefill[0].probe_changes = {"incarnation": "second"}
    setting.decode[0].probe_changes = {"incarnation": "second"}
    for instance in setting.proxy.pool:
        instance.suspect("a test says so")
    await setting.settled(lambda proxy: all(instance.restarts == 1 for instance in proxy.pool))
    assert len(setting.proxy.index) == 0
    await ask(setting, prompt(1))
    assert setting.count("cached_tokens_total") == 0


async def test_nobody_is_rejected_when_the_engines_are_idle(start: Start):
    setting = await start(scheduling=Scheduling(slo=Slo(ttft=0.001, tbt=0.0001)), fixed_slo=("ttft", "tbt"))
    for first in range(3):
        assert (await ask(setting, prompt(first)))[0] == 200
    assert setting.count("rejected_total", target="ttft") == 0


async def test_a_rejection_says_why_and_when_to_come_again(start: Start):
    setting = await start(scheduling=Scheduling(slo=Slo(ttft=0.001)), fixed_slo=("ttft",))
    engines = [*setting.prefill, *setting.decode]
    for engine in engines:
        engine.goes_on.clear()
    # Both engines are at the first prompt all along.
    before = asyncio.create_task(ask(setting, prompt(1)))
    for engine in engines:
        await engine.call()
    took = []
    for first in range(2, 7):
        # The processor's time: the clock on the wall tells of other processes, too.
        began = time.thread_time()
        status, body, headers = await ask(setting, prompt(first, 20_000))
        took.append(time.thread_time() - began)
        assert status == 429
        assert headers["Retry-After"].isdecimal()
        assert int(headers["Retry-After"]) >= 1
    assert min(took) < 0.05
    said = json.loads(body)["error"]
    assert said["code"] == 429
    assert said["slo"] == "ttft"
    assert said["predicted"] > 0.001
    assert said["predicted"] >= said["limit"]
    assert said["waited"] == setting.count("waited_seconds_count") == 0
    assert "(ttft)" in said["message"]
    assert setting.count("rejected_total", target="ttft") == 5
    assert setting.count("requests_total", path="/v1/completions", outcome="rejected") == 5
    assert len(setting.prefill[0].calls) == len(setting.decode[0].calls) == 1
    async with openai.AsyncOpenAI(base_url=f"{setting.url}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="try again in"):
            await client.completions.create(model=MODEL, prompt=[9] * 20_000)
    assert not before.done()
    for engine in engines:
        engine.goes_on.set()
    assert (await before)[0] == 200
    await setting.settled(lambda _: idle(setting))
    assert (await ask(setting, prompt(9)))[0] == 200
    await setting.settled(lambda _: idle(setting))


async def test_baseline_decides_about_decode_once_the_prompt_is_computed(start: Start):
    settings = Scheduling(admission="baseline", slo=Slo(ttft=60, tbt=0.0005))
    setting = await start(scheduling=settings, fixed_slo=("ttft", "tbt"))
    setting.decode[0].stream, setting.decode[0].gap = events(200), 0.02
    before = asyncio.create_task(ask(setting, prompt(1)))
    await setting.decode[0].call()
    status, body, _ = await ask(setting, prompt(2))
    assert status == 429
    assert b'"slo":"tbt"' in body
    assert len(setting.prefill[0].calls) == 2
    assert len(setting.decode[0].calls) == 1
    transfer = setting.prefill[0].calls[1].params["transfer_id"]
    await setting.settled(lambda _: setting.prefill[0].released == [transfer])
    assert (await before)[0] == 200
    await setting.settled(lambda _: idle(setting))


def crowded() -> tuple[list[FakeEngine], list[FakeEngine]]:
    """A decode engine that has room for one prompt, and one that takes its time over it."""
    decode = FakeEngine("kv_consumer", kv_tokens=12_000)
    decode.stream, decode.gap = events(25), 0.02
    return [FakeEngine("kv_producer")], [decode]


async def waits(setting: Setting, first: int) -> "asyncio.Task[tuple[int, bytes, Any]]":
    """A request that waits to be let in."""
    task = asyncio.create_task(ask(setting, prompt(first)))
    waiting = setting.count("waiting") + 1
    await setting.settled(lambda _: setting.count("waiting") == waiting)
    return task


async def test_who_has_no_room_waits_for_it(start: Start):
    setting = await start(*crowded())
    before = asyncio.create_task(ask(setting, prompt(1) | {"max_tokens": 1500}))
    await setting.decode[0].call()
    second = await waits(setting, 2)
    assert (await before)[0] == 200
    assert (await second)[0] == 200
    first, then = setting.decode[0].calls
    assert then.started >= first.ended
    assert setting.count("waited_seconds_count") == 1
    await setting.settled(lambda _: idle(setting) and setting.count("waiting") == 0)


async def test_who_leaves_while_waiting_leaves_nothing(start: Start):
    setting = await start(*crowded())
    before = asyncio.create_task(ask(setting, prompt(1) | {"max_tokens": 1500}))
    await setting.decode[0].call()
    second = await waits(setting, 2)
    second.cancel()
    await setting.settled(lambda _: setting.count("waiting") == 0)
    assert (await before)[0] == 200
    await setting.settled(lambda _: idle(setting))
    assert len(setting.decode[0].calls) == 1


async def test_who_waits_for_the_last_decode_engine_is_told_that_it_went(start: Start):
    setting = await start(*crowded())
    before = asyncio.create_task(ask(setting, prompt(1) | {"max_tokens": 1500}))
    await setting.decode[0].call()
    second = await waits(setting, 2)
    setting.decode[0].healthy = False
    assert (await second)[0] == 503
    before.cancel()
    await setting.settled(lambda _: idle(setting) and setting.count("waiting") == 0)


async def test_the_urgent_are_let_in_first(start: Start):
    setting = await start(*crowded())
    before = asyncio.create_task(ask(setting, prompt(1) | {"max_tokens": 1500}))
    await setting.decode[0].call()
    tasks = [asyncio.create_task(ask(setting, prompt(2)))]
    await setting.settled(lambda _: setting.count("waiting") == 1)
    tasks.append(asyncio.create_task(ask(setting, prompt(3), **{"X-Priority": "5"})))
    await setting.settled(lambda _: setting.count("waiting") == 2)
    assert [(await task)[0] for task in (before, *tasks)] == [200] * 3
    assert [call.body["prompt"][0] for call in setting.decode[0].calls] == [1, 3, 2]


async def test_metrics_of_the_conductor(start: Start):
    setting = await start()
    await ask(setting, prompt(1))
    async with setting.http.get("/metrics") as reply:
        text = await reply.text()
    url = setting.decode[0].url
    assert f'mooncake_proxy_committed_tokens{{engine="{url}",side="decode"}} 0.0' in text
    assert f"mooncake_proxy_index_blocks {LONG // 32}.0" in text
    assert 'mooncake_proxy_predictions{what="ttft"} 1.0' in text
    assert 'mooncake_proxy_margin{slo="ttft"} 1.0' in text
    assert 'mooncake_proxy_observed_over_predicted{quantile="0.5",what="output"}' in text


async def hot(start: Start, role: str) -> "tuple[Setting, FakeEngine, FakeEngine, asyncio.Task[Any]]":
    """Two prefill engines: one holds a prefix and is busy, the other is idle."""
    engines = [FakeEngine(role), FakeEngine(role)]
    for engine in engines:
        engine.per_token = 1e-4
    setting = await start(engines, 1, order="serial")
    _, _, headers = await ask(setting, prompt(1))
    holder = next(engine for engine in engines if engine.url == headers["x-mooncake-prefill"])
    other = next(engine for engine in engines if engine is not holder)
    holder.delay = 0.5
    busy = asyncio.create_task(ask(setting, {**prompt(1), "prompt": [1, *range(1, LONG), *[7] * LONG]}))
    await holder.call(1)
    holder.delay = 0.0
    return setting, holder, other, busy


async def test_a_hot_prefix_is_copied_to_an_idle_engine(start: Start):
    setting, holder, other, busy = await hot(start, "kv_both")
    body = prompt(1) | {"prompt": [1, *range(1, LONG), *range(40)]}
    status, _, headers = await ask(setting, body)
    assert status == 200
    assert headers["x-mooncake-prefill"] == other.url
    received, computed = other.calls
    sent = holder.calls[-1]
    assert sent.params["do_remote_decode"] is received.params["do_remote_prefill"] is True
    assert sent.params["transfer_id"] == received.params["transfer_id"]
    assert received.params["remote_engine_id"] == holder.engine_id
    assert sent.body["prompt"] == received.body["prompt"] == body["prompt"][: LONG + 1]
    assert sent.body["max_tokens"] == received.body["max_tokens"] == 1
    assert computed.body["prompt"] == body["prompt"]
    assert computed.started >= received.ended
    assert setting.count("copies_total", outcome="copied") == 1
    assert setting.count("copied_tokens_total") == LONG
    await busy


async def test_who_comes_while_a_prefix_is_copied_waits_for_it(start: Start):
    setting, _, other, busy = await hot(start, "kv_both")
    other.delay = 0.2
    bodies = [prompt(1) | {"prompt": [1, *range(1, LONG), *([at] * 40)]} for at in range(2)]
    assert [status for status, *_ in await asyncio.gather(*(ask(setting, body) for body in bodies))] == [
        200,
        200,
    ]
    received, *computed = other.calls
    assert received.params["do_remote_prefill"] is True
    assert all(call.started >= received.ended for call in computed)
    assert len(computed) == 2
    assert setting.count("copies_total", outcome="copied") == 1
    await busy


async def test_a_copy_that_fails_is_computed(start: Start):
    setting, holder, other, busy = await hot(start, "kv_both")
    other.failures = [500]
    body = prompt(1) | {"prompt": [1, *range(1, LONG), *range(40)]}
    status, _, headers = await ask(setting, body)
    assert status == 200
    assert headers["x-mooncake-prefill"] == other.url
    assert len(other.calls) == 2
    assert setting.count("copies_total", outcome="failed") == 1
    await setting.settled(lambda _: len(holder.released) == 1)
    await busy


async def test_engines_that_only_send_are_copied_nothing(start: Start):
    setting, _, other, busy = await hot(start, "kv_producer")
    body = prompt(1) | {"prompt": [1, *range(1, LONG), *range(40)]}
    assert (await ask(setting, body))[0] == 200
    assert all(
        "do_remote_prefill" not in call.params or not call.params["do_remote_prefill"] for call in other.calls
    )
    for outcome in ("copied", "failed", "refused"):
        assert setting.count("copies_total", outcome=outcome) == 0
    await busy
