"""Engines that fail, clients that leave: what is retried, what is cancelled, what the client is told."""

import asyncio
import contextlib
import time

import aiohttp
import openai
import pytest

from mooncake_connector.scheduler.proxy import dispatch
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, SOON, WITHIN, events

TEXT = {"model": MODEL, "prompt": "one two three four", "max_tokens": 7}
STREAM = {**TEXT, "stream": True}


def idle(setting: Setting) -> bool:
    """Whether neither the proxy nor the conductor counts anything in flight."""
    counted = any(instance.requests or instance.tokens for instance in setting.proxy.pool)
    booked = any(account.prompts or account.answers for account in setting.proxy.conductor.accounts(0.0))
    return not counted and not booked


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("order", ["concurrent", "serial"])
async def test_a_client_that_leaves_ends_both_upstream_calls(start: Start, streamed: bool, order: str):
    setting = await start(order=order)
    setting.prefill[0].delay = 0 if order == "serial" else 30
    setting.decode[0].delay = 30
    leaving = asyncio.create_task(_generate(setting, STREAM if streamed else TEXT))
    called = [await setting.decode[0].call()] + (
        [await setting.prefill[0].call()] if order == "concurrent" else []
    )
    leaving.cancel()
    for call in called:
        await asyncio.wait_for(call.over.wait(), SOON)
        assert call.aborted
    await setting.settled(lambda _: idle(setting), SOON)
    # Decode's engine may never have seen the request: prefill is told that nobody comes for its KV.
    transfer = setting.decode[0].calls[0].params["transfer_id"]
    await setting.settled(lambda _: setting.prefill[0].released == [transfer])
    assert setting.count("requests_total", path="/v1/completions", outcome="cancelled") == 1


async def test_a_client_that_leaves_mid_stream_ends_both_upstream_calls(start: Start):
    setting = await start()
    setting.prefill[0].delay = 30
    setting.decode[0].stream = events(1000)
    setting.decode[0].gap = 0.02
    async with setting.http.post("/v1/completions", json=STREAM) as reply:
        await reply.content.readany()
        reply.close()
    for engine in (setting.decode[0], setting.prefill[0]):
        await asyncio.wait_for((await engine.call()).over.wait(), SOON)
        assert engine.calls[0].aborted
    await setting.settled(lambda _: idle(setting), SOON)


@pytest.mark.parametrize("failure", [500, 503, "reset", "event"])
async def test_decode_fails_before_its_first_byte_and_another_serves(start: Start, failure: int | str):
    setting = await start(1, 2)
    first, second = setting.decode
    first.failures = second.failures = [failure]  # one list: whoever is asked first fails
    assert await _generate(setting, STREAM) == b"".join(events())
    assert [len(first.calls), len(second.calls)] == [1, 1]
    bad, good = (first, second) if first.calls[0].started < second.calls[0].started else (second, first)
    assert setting.count("retries_total", side="decode") == 1
    assert bad.calls[0].params["transfer_id"] != good.calls[0].params["transfer_id"]
    pushed = [call.params["transfer_id"] for call in setting.prefill[0].calls]
    assert good.calls[0].params["transfer_id"] in pushed
    await setting.settled(lambda _: setting.prefill[0].released == [bad.calls[0].params["transfer_id"]])
    await setting.settled(lambda _: idle(setting), SOON)


async def test_decode_that_went_away_is_left_out_at_once(start: Start):
    setting = await start(1, 2, check_seconds=60.0)
    await setting.decode[0].stop()
    for _ in range(4):
        assert await _generate(setting, TEXT) == setting.decode[1].answer
    assert setting.count("retries_total", side="decode") <= 1
    assert setting.count("engine_up", side="decode", engine=setting.decode[0].url) == 0


async def test_the_only_decode_is_tried_again_after_a_reset(start: Start):
    setting = await start()
    setting.decode[0].failures = ["reset"]
    assert await _generate(setting, STREAM) == b"".join(events())
    assert len(setting.decode[0].calls) == 2


async def test_the_only_decode_that_answers_500_is_asked_once_more_without_a_transfer(start: Start):
    setting = await start()
    setting.decode[0].failures = [500, 500, 500]
    async with setting.http.post("/v1/completions", json=STREAM) as reply:
        assert reply.status == 500
        assert (await reply.json())["error"]["message"] == "engine says 500"
    assert [bool(call.params) for call in setting.decode[0].calls] == [True, False]
    assert setting.count("requests_total", path="/v1/completions", outcome="decode_error") == 1


async def test_an_error_event_as_first_event_becomes_the_status(start: Start):
    setting = await start(max_retries=0)
    setting.decode[0].failures = ["event"]
    async with setting.http.post("/v1/completions", json=STREAM) as reply:
        assert reply.status == 500
        assert (await reply.json())["error"]["message"] == "load failed"


async def test_retries_are_limited(start: Start):
    setting = await start(1, 4, max_retries=2)
    for engine in setting.decode:
        engine.failures = ["reset"] * 9
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        assert reply.status == 502
        assert (await reply.json())["error"]["type"] == "BadGatewayError"
    assert sum(len(engine.calls) for engine in setting.decode) == 3


@pytest.mark.parametrize("status", [400, 404, 422, 429])
async def test_4xx_is_the_clients_and_never_retried(start: Start, status: int):
    setting = await start(2, 2)
    for engine in [*setting.prefill, *setting.decode]:
        engine.failures = [status]
    # Prefill refuses first: decode's own words must be waited for.
    setting.decode[0].delay = setting.decode[1].delay = 0.1
    async with setting.http.post("/v1/completions", json=STREAM) as reply:
        assert reply.status == status
        assert (await reply.json())["error"] == {
            "message": f"engine says {status}",
            "type": "EngineError",
            "param": None,
            "code": status,
        }
    assert sum(len(engine.calls) for engine in setting.decode) == 1
    assert setting.count("retries_total", side="decode") == 0
    assert setting.count("requests_total", path="/v1/completions", outcome="client_error") == 1


async def test_no_retry_once_a_byte_was_streamed(start: Start):
    setting = await start(1, 2)
    for engine in setting.decode:
        engine.break_after = 3
        engine.gap = 0.02
    body = await _generate(setting, STREAM)
    assert body.startswith(b"".join(events()[:3]))
    assert b"[DONE]" not in body
    assert b'"code":502' in body
    assert sum(len(engine.calls) for engine in setting.decode) == 1
    assert setting.count("requests_total", path="/v1/completions", outcome="stream_broken") == 1
    async with openai.AsyncOpenAI(base_url=f"{setting.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                pass


@pytest.mark.parametrize("failure", [500, "reset"])
@pytest.mark.parametrize("order", ["concurrent", "serial"])
async def test_prefill_fails_and_another_serves(start: Start, failure: int | str, order: str):
    setting = await start(2, 1, order=order)
    first, second = setting.prefill
    first.failures = second.failures = [failure]  # one list: whoever is asked first fails
    # Decode would wait for KV that never comes: the proxy must not wait with it.
    setting.decode[0].failures = ["hang"] if order == "concurrent" else []
    began = time.monotonic()
    assert await _generate(setting, STREAM) == b"".join(events())
    assert time.monotonic() - began < WITHIN
    assert setting.count("retries_total", side="prefill") == 1
    assert [len(first.calls), len(second.calls)] == [1, 1]
    last = max((first, second), key=lambda engine: engine.calls[0].started)
    assert setting.decode[0].calls[-1].params["remote_engine_id"] == last.engine_id


@pytest.mark.parametrize("order", ["concurrent", "serial"])
async def test_without_prefill_decode_serves_alone(start: Start, order: str):
    setting = await start(order=order)
    await setting.prefill[0].stop()
    assert await _generate(setting, STREAM) == b"".join(events())
    assert setting.decode[0].calls[-1].params == {}
    assert setting.count("prefill_skipped_total", reason="no_prefill") == 1
    await setting.settled(lambda proxy: not proxy.pool.prefill[0].up)
    async with setting.http.get("/health") as reply:
        assert reply.status == 503
        assert (await reply.json())["status"] == "degraded"


@pytest.mark.parametrize("order", ["concurrent", "serial"])
async def test_what_only_prefill_refuses_decode_serves_alone(start: Start, order: str):
    setting = await start(order=order)
    setting.prefill[0].failures = [400]
    setting.decode[0].failures = ["hang"] if order == "concurrent" else []
    assert await _generate(setting, TEXT) == setting.decode[0].answer
    assert setting.decode[0].calls[-1].params == {}
    assert setting.count("prefill_skipped_total", reason="prefill_failed") == 1


async def test_prefill_that_fails_after_decode_began_changes_nothing(start: Start):
    setting = await start()
    setting.prefill[0].failures = [500]
    setting.prefill[0].delay = 0.1
    setting.decode[0].gap = 0.05
    assert await _generate(setting, STREAM) == b"".join(events())
    assert len(setting.decode[0].calls) == 1


async def test_a_slow_prefill_does_not_hold_the_client_and_is_cancelled_in_the_end(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dispatch, "LINGER", 1.0)
    setting = await start()
    setting.prefill[0].delay = 30
    began = time.monotonic()
    await _generate(setting, STREAM)
    assert time.monotonic() - began < WITHIN
    call = setting.prefill[0].calls[0]
    assert not call.over.is_set()
    await asyncio.wait_for(call.over.wait(), WITHIN)
    assert call.aborted
    await setting.settled(lambda _: idle(setting), SOON)


async def test_no_decode_is_a_503(start: Start):
    setting = await start()
    await setting.decode[0].stop()
    await setting.settled(lambda proxy: not proxy.pool.decode[0].up)
    for path, body in (("/v1/completions", TEXT), ("/v1/models", None)):
        async with setting.http.request("POST" if body else "GET", path, json=body) as reply:
            assert reply.status == 503
            error = (await reply.json())["error"]
            assert error["type"] == "ServiceUnavailableError"
            assert "decode" in error["message"]
    async with setting.http.get("/health") as reply:
        assert (await reply.json())["status"] == "down"


async def test_a_storm_of_failures_and_leavers_leaves_nothing_in_flight(start: Start):
    setting = await start(2, 2)
    for at, engine in enumerate([*setting.prefill, *setting.decode]):
        engine.failures = [500, "reset", "event", 400, "reset", 503] * 5
        engine.delay = 0.002 * at
        engine.gap = 0.003

    async def one(at: int) -> None:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, AssertionError):
            await asyncio.wait_for(_generate(setting, STREAM if at % 2 else TEXT), 0.01 * (at % 7 + 1))

    await asyncio.gather(*(one(at) for at in range(150)))
    await setting.settled(lambda _: idle(setting))
    for engine in [*setting.prefill, *setting.decode]:
        engine.failures = []
    await setting.settled(lambda proxy: all(instance.up for instance in proxy.pool))
    assert await _generate(setting, STREAM) == b"".join(events())


async def _generate(setting: Setting, body: dict) -> bytes:
    async with setting.http.post("/v1/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.read()
