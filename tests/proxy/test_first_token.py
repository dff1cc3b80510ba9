"""Streams that begin with prefill's token, and the timeline of a request."""

import asyncio
import gc
import json
from typing import Any

import pytest

from mooncake_connector.scheduler.proxy.answer import Answer
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import DONE, MODEL, FakeEngine

BODY = {"model": MODEL, "prompt": "one two", "max_tokens": 7, "stream": True}


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c", "created": 3, "choices": [choice]}).encode() + b"\n\n"


def engines(
    first: bytes = event("Hi", "length"), *, able: bool = True
) -> tuple[list[FakeEngine], list[FakeEngine]]:
    prefill = FakeEngine("kv_producer", first_token=able)
    decode = FakeEngine("kv_consumer", first_token=True)
    prefill.stream = [first, DONE]
    decode.stream = [event("Hi"), event(" you"), event("", "stop"), DONE]
    return [prefill], [decode]


def text(answer: bytes) -> str:
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["text"] for found in events for choice in found.get("choices", []))


async def first_chunk(setting: Setting) -> tuple[bytes, bytes, str | None]:
    async with setting.http.post("/v1/completions", json=BODY) as reply:
        assert reply.status == 200
        first = await reply.content.readany()
        return first, await reply.read(), reply.headers.get("x-mooncake-first-token")


@pytest.mark.parametrize("order", ["concurrent", "serial"])
async def test_the_first_token_does_not_wait_for_decode(start: Start, order: str):
    prefill, decode = engines()
    decode[0].first_gap = 0.4
    setting = await start(prefill, decode, first_token="prefill", order=order)
    first, rest, by = await first_chunk(setting)
    assert by == "prefill"
    assert text(first) == "Hi"
    assert text(rest) == " you"
    assert rest.endswith(DONE)
    p, d = prefill[0].calls[0], decode[0].calls[0]
    assert p.params["first_token"] is True
    assert d.params["first_token"] is True
    assert d.params["transfer_id"] == p.params["transfer_id"]
    assert setting.count("first_tokens_total", by="prefill") == 1


async def test_bodies(start: Start):
    prefill, decode = engines()
    setting = await start(prefill, decode, first_token="prefill")
    body = {
        **BODY,
        "min_tokens": 5,
        "structured_outputs": {"regex": "a+"},
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    async with setting.http.post("/v1/completions", json=body) as reply:
        await reply.read()
    p, d = await prefill[0].call(), decode[0].calls[0]
    without = {"kv_transfer_params"}
    assert {k: v for k, v in p.body.items() if k not in without} == {**body, "max_tokens": 1, "min_tokens": 1}
    assert {k: v for k, v in d.body.items() if k not in without} == body


@pytest.mark.parametrize(
    "change",
    [{"first_token": "decode"}, {"stop": ["x"]}, {"n": 2}, {"old": True}],
    ids=["off", "stop", "n", "old connector"],
)
async def test_decode_sends_its_own_first_token(start: Start, change: dict[str, Any]):
    prefill, decode = engines(able=not change.get("old"))
    setting = await start(prefill, decode, first_token=change.get("first_token", "prefill"))
    async with setting.http.post("/v1/completions", json=BODY | change) as reply:
        assert await reply.read() == b"".join(decode[0].stream)
        assert "x-mooncake-first-token" not in reply.headers
    assert "first_token" not in (await prefill[0].call()).params
    assert "first_token" not in decode[0].calls[0].params


async def test_a_token_that_ends_the_answer_is_decodes(start: Start):
    prefill, decode = engines(event("", "stop"))
    decode[0].stream = [event("", "stop"), DONE]
    setting = await start(prefill, decode, first_token="prefill")
    first, rest, by = await first_chunk(setting)
    assert by is None
    assert first + rest == b"".join(decode[0].stream)


async def test_decode_that_is_faster_is_not_held_up(start: Start):
    prefill, decode = engines()
    prefill[0].delay = 0.3
    setting = await start(prefill, decode, first_token="prefill")
    first, rest, by = await first_chunk(setting)
    assert by is None
    assert first + rest == b"".join(decode[0].stream)
    assert setting.count("first_tokens_total", by="decode") == 1


async def test_decodes_refusal_comes_before_prefills_token(start: Start):
    prefill, decode = engines()
    decode[0].failures = [400]
    setting = await start(prefill, decode, first_token="prefill")
    async with setting.http.post("/v1/completions", json=BODY) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["message"] == "engine says 400"


async def test_a_different_token_ends_the_stream_with_an_error(start: Start):
    prefill, decode = engines()
    decode[0].first_gap = 0.1
    decode[0].stream = [event("Ho"), event(" you", "stop"), DONE]
    setting = await start(prefill, decode, first_token="prefill")
    first, rest, _ = await first_chunk(setting)
    assert text(first) == "Hi"
    assert b'"error"' in rest
    assert b"you" not in rest
    assert DONE not in rest
    assert setting.count("requests_total", path="/v1/completions", outcome="stream_broken") == 1


@pytest.mark.parametrize(
    "bad", [[event("Ho")], [b'data: {"error": {"message": "load failed"}}\n\n'], [event("H")]]
)
async def test_decode_that_did_not_get_the_token_is_told(start: Start, bad: list[bytes]):
    """Its load failed: it computes the prompt itself, and would draw another token."""
    prefill, decode = engines()
    decode[0].first_gap = 0.1
    prefill[0].sampled = 17
    decode[0].later_streams = [decode[0].stream]
    decode[0].stream = [*bad, DONE]
    setting = await start(prefill, decode, first_token="prefill")
    first, rest, by = await first_chunk(setting)
    assert by == "prefill"
    assert text(first + rest) == "Hi you"
    assert rest.endswith(DONE)
    assert b"error" not in rest
    assert decode[0].calls[1].params == {"first_token": 17}
    assert setting.count("requests_total", path="/v1/completions", outcome="ok") == 1
    await setting.settled(lambda proxy: all(i.requests == 0 for i in proxy.pool))


async def test_another_decode_takes_over_after_prefills_token(start: Start):
    prefill, (dying,) = engines()
    _, (other,) = engines()
    prefill[0].sampled = 17
    dying.first_gap, dying.break_after = 0.1, 0
    setting = await start(prefill, [dying, other], first_token="prefill")
    first, rest, _ = await first_chunk(setting)
    assert text(first + rest) == "Hi you"
    assert other.calls[0].params == {"first_token": 17}


async def test_decode_that_dies_after_prefills_token(start: Start):
    prefill, decode = engines()
    decode[0].first_gap, decode[0].break_after = 0.1, 0
    setting = await start(prefill, decode, first_token="prefill")
    first, rest, _ = await first_chunk(setting)
    assert text(first) == "Hi"
    assert b'"error"' in rest
    assert DONE not in rest


async def test_prefill_that_fails_in_its_stream_is_replaced(start: Start):
    (bad,), decode = engines()
    (good,), _ = engines()
    decode[0].first_gap = 0.2
    bad.failures = ["event"]
    setting = await start([bad, good], decode, first_token="prefill")
    first, rest, by = await first_chunk(setting)
    assert by == "prefill"
    assert text(first + rest) == "Hi you"
    assert len(good.calls) == 1


async def test_a_client_that_leaves_after_prefills_token(start: Start):
    prefill, decode = engines()
    decode[0].first_gap = 30
    setting = await start(prefill, decode, first_token="prefill")
    async with setting.http.post("/v1/completions", json=BODY) as reply:
        assert text(await reply.content.readany()) == "Hi"
    call = await decode[0].call()
    await call.over.wait()
    assert call.aborted
    await setting.settled(lambda proxy: all(i.requests == 0 for i in proxy.pool))


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
async def test_timeline_of_a_stream(start: Start, first_token: str):
    prefill, decode = engines()
    decode[0].first_gap = 0.05
    setting = await start(prefill, decode, first_token=first_token)
    headers = {"x-mooncake-timeline": "1"}
    async with setting.http.post("/v1/completions", json=BODY, headers=headers) as reply:
        lines = (await reply.read()).splitlines()
    assert lines[-2] == DONE.strip()
    assert lines[-4].startswith(b": timeline {")
    told = json.loads(lines[-4].removeprefix(b": timeline "))
    assert told["prefill"] == told["decode"] == {"received": 1.5}
    assert told["transfer_id"] == prefill[0].calls[0].params["transfer_id"]
    order = ["received", "parsed", "decode_sent", "decode_headers", "decode_first", "decode_end"]
    moments = [told["proxy"][name] for name in order]
    assert moments == sorted(moments)
    assert ("early" in told["proxy"]) == (first_token == "prefill")
    assert told["proxy"]["decode_first"] - told["proxy"]["decode_headers"] > 0.04


async def test_timeline_of_a_whole_answer(start: Start):
    setting = await start()
    headers = {"x-mooncake-timeline": "1"}
    body = {**BODY, "stream": False}
    async with setting.http.post("/v1/completions", json=body, headers=headers) as reply:
        answer = await reply.json()
    assert answer["choices"][0]["text"] == "hi"
    told = answer["kv_transfer_params"]["timeline"]
    assert told["decode"] == {"received": 1.5}
    assert told["proxy"]["received"] <= told["proxy"]["decode_first"]
    assert setting.count("step_seconds_count", step="hand_over") == 1


async def test_nothing_is_told_unasked(start: Start):
    setting = await start()
    async with setting.http.post("/v1/completions", json=BODY) as reply:
        assert await reply.read() == b"".join(setting.decode[0].stream)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
async def test_what_an_answer_held_does_not_wait_for_the_garbage_collector(start: Start, first_token: str):
    def answers() -> list[Answer]:
        return [each for each in gc.get_objects() if isinstance(each, Answer)]

    gc.collect()
    gc.disable()
    older = answers()
    try:
        prefill, decode = engines()
        decode[0].first_gap = 0.1
        setting = await start(prefill, decode, first_token=first_token)
        first, _, by = await first_chunk(setting)
        assert first
        assert by == ("prefill" if first_token == "prefill" else None)
        async with asyncio.timeout(5):
            while len(answers()) > len(older):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
