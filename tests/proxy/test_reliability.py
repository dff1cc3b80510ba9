"""Engines that are silent or fail again and again, and clients that take nothing: what ends, what goes on."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from aiohttp import web

from mooncake_connector.scheduler.engines.breaker import FAILURES, PAUSE
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.proxy import deadlines
from mooncake_connector.scheduler.proxy.retry_budget import RetryBudget
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, SOON, WITHIN, FakeEngine, events
from tests.proxy.test_failures import idle

TEXT = {"model": MODEL, "prompt": "one two three four", "max_tokens": 7}
STREAM = {**TEXT, "stream": True}
PATH = "/v1/completions"


class Deaf(FakeEngine):
    """Its port is open, but it answers nothing more once it is deaf."""

    deaf = False

    async def _health(self, http: web.Request) -> web.Response:
        if self.deaf:
            await asyncio.sleep(60)
        return await super()._health(http)


async def generate(setting: Setting, body: dict = STREAM) -> bytes:
    async with setting.http.post(PATH, json=body) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.read()


async def aborted(engine: FakeEngine, index: int = 0) -> None:
    call = await engine.call(index)
    await asyncio.wait_for(call.over.wait(), WITHIN)
    assert call.aborted


@pytest.fixture
def predicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are what the settings say, whatever was predicted."""
    monkeypatch.setattr(deadlines, "FACTOR", 0.0)
    monkeypatch.setattr(deadlines, "SLOWEST", 0.01)


@pytest.mark.usefixtures("predicts_nothing")
async def test_prefill_that_does_not_answer_is_given_up_and_another_one_asked(start: Start):
    setting = await start(2, 1, prefill_timeout=0.3)
    first, second = setting.prefill
    first.failures = second.failures = ["hang"]  # one list: whoever is asked first hangs
    setting.decode[0].failures = ["hang"]
    assert await generate(setting) == b"".join(events())
    hung = min((first, second), key=lambda engine: engine.calls[0].started)
    await aborted(hung)
    await aborted(setting.decode[0])
    assert setting.count("retries_total", side="prefill") == 1
    await setting.settled(lambda _: idle(setting), SOON)


@pytest.mark.usefixtures("predicts_nothing")
@pytest.mark.parametrize("body", [STREAM, TEXT])
async def test_decode_that_does_not_begin_is_given_up_and_another_one_asked(start: Start, body: dict):
    setting = await start(1, 2, prefill_timeout=0.2, first_byte_timeout=0.2)
    first, second = setting.decode
    first.failures = second.failures = ["hang"]
    assert await generate(setting, body) == (b"".join(events()) if "stream" in body else first.answer)
    await aborted(min((first, second), key=lambda engine: engine.calls[0].started))
    await setting.settled(lambda _: idle(setting), SOON)


@pytest.mark.usefixtures("predicts_nothing")
async def test_when_all_are_silent_the_client_is_told(start: Start):
    setting = await start(prefill_timeout=0.1, first_byte_timeout=0.1, max_retries=1)
    setting.decode[0].failures = ["hang"] * 4
    async with setting.http.post(PATH, json=STREAM) as reply:
        assert reply.status == 502
        assert "no answer within" in (await reply.json())["error"]["message"]


async def test_a_stream_that_stops_ends_with_an_error_and_the_engine_is_freed(start: Start):
    setting = await start(chunk_timeout=0.2)
    setting.decode[0].gap = 60
    body = await generate(setting)
    assert body.startswith(events()[0])
    assert b"it said nothing for too long" in body
    assert b"[DONE]" not in body
    await aborted(setting.decode[0])
    await setting.settled(lambda _: idle(setting), SOON)


async def test_a_stream_that_is_slow_but_goes_on_is_left_alone(start: Start):
    setting = await start(chunk_timeout=0.4)
    setting.decode[0].gap = 0.2
    assert await generate(setting) == b"".join(events())


@pytest.mark.parametrize("streaming", [False, True])
async def test_what_waits_for_an_engine_that_went_deaf_is_ended(
    start: Start, streaming: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deadlines, "LOOK", 0.1)
    engines = [Deaf("kv_consumer"), Deaf("kv_consumer")]
    setting = await start(1, engines, down_timeout=0.4)
    setting.proxy._engine._check_timeout = 0.1
    for engine in engines:
        engine.gap = 60.0 if streaming else 0.0
        engine.delay = 0.0 if streaming else 60.0
    running = asyncio.create_task(generate(setting))
    await setting.settled(lambda _: any(engine.calls for engine in engines))
    silent, other = engines if engines[0].calls else engines[::-1]
    silent.deaf, other.delay = True, 0.0
    body = await asyncio.wait_for(running, WITHIN)
    if streaming:
        assert b"it said nothing for too long" in body
    else:
        assert body == b"".join(events())
    await aborted(silent)


async def test_an_engine_whose_requests_fail_is_left_out_and_comes_back(start: Start):
    # In turns: what engines seem to take is this machine's doing, and would keep requests from one of them.
    setting = await start(1, 2, scheduling=Scheduling(routing="round_robin", admission="none"))
    bad, _ = setting.decode
    instance = setting.proxy.pool[bad.url]
    now = 100.0
    instance.clock = lambda: now
    bad.failures = [503] * FAILURES
    while bad.failures:
        assert await generate(setting) == b"".join(events())
    assert instance.up
    assert instance.breaker.state(instance.clock()) == "open"
    before = len(bad.calls)
    for _ in range(6):
        await generate(setting)
    assert len(bad.calls) == before
    assert setting.count("engine_breaker", side="decode", engine=bad.url) == 2
    assert setting.count("breaker_opened_total", side="decode", engine=bad.url) == 1
    async with setting.http.get("/health") as reply:
        assert [each["breaker"] for each in (await reply.json())["decode"]] == ["open", "closed"]
    now += PAUSE
    assert instance.breaker.state(now) == "half_open"
    while instance.breaker.state(now) != "closed":
        await generate(setting)
    assert len(bad.calls) == before + 1


async def test_the_last_engine_of_a_pool_is_never_left_out(start: Start):
    setting = await start(1, 2, max_retries=0)
    for engine, instance in zip(setting.decode, setting.proxy.pool.decode, strict=True):
        instance.clock = lambda: 100.0
        engine.failures = [503] * 3 * FAILURES
    while any(engine.failures for engine in setting.decode):
        async with setting.http.post(PATH, json=TEXT) as reply:
            assert reply.status in (200, 503)
    for instance in setting.proxy.pool.decode:
        assert instance.breaker.opened >= 1
    assert await generate(setting) == b"".join(events())


async def test_a_request_that_every_engine_answers_with_an_error_is_held_against_none(start: Start):
    setting = await start(1, 2)
    for engine in setting.decode:
        engine.failures = [500] * 1000
    for _ in range(2 * FAILURES):
        async with setting.http.post(PATH, json=TEXT) as reply:
            assert reply.status == 500
    assert [instance.breaker.opened for instance in setting.proxy.pool] == [0, 0, 0]
    assert all(len(engine.calls) >= FAILURES for engine in setting.decode)


async def test_an_outage_does_not_become_a_storm(start: Start):
    setting = await start(1, 4)
    setting.proxy._dispatcher._budget = RetryBudget(0.2, 5)
    for engine in setting.decode:
        engine.failures = ["reset"] * 1000
    statuses = []
    for _ in range(40):
        async with setting.http.post(PATH, json=TEXT) as reply:
            statuses.append(reply.status)
    assert set(statuses) == {502}
    asked = sum(len(engine.calls) for engine in setting.decode)
    assert 40 <= asked <= 40 * 1.2 + 5
    assert setting.count("retries_refused_total") > 0


class Endless:
    """A stream that notes how much of it was asked for."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[bytes]:
        event = events()[0] + b": " + b"x" * (1 << 16) + b"\n\n"
        while True:
            self.taken += len(event)
            yield event


@contextlib.contextmanager
def asking(setting: Setting) -> Iterator[socket.socket]:
    """A client that has sent its request and reads nothing by itself."""
    body = json.dumps(STREAM).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.connect(("127.0.0.1", int(setting.url.rpartition(":")[2])))
        head = f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        yield client


async def test_a_client_that_takes_nothing_is_cut_off_and_nothing_piles_up(start: Start):
    setting = await start(client_timeout=0.4)
    stream = setting.decode[0].stream = Endless()
    with asking(setting):
        await aborted(setting.decode[0])
    # What the kernel buffers on three loopback sockets: megabytes; what the proxy does: see `relay`.
    assert stream.taken < 32 << 20
    await setting.settled(lambda _: idle(setting), SOON)
    assert setting.count("requests_total", path=PATH, outcome="slow_client") == 1


async def test_a_client_that_takes_little_at_a_time_keeps_its_stream(start: Start):
    setting = await start(client_timeout=0.4)
    setting.decode[0].stream = Endless()
    with asking(setting) as client:
        client.setblocking(False)
        for _ in range(15):
            await asyncio.sleep(0.1)
            assert client.recv(1 << 14)
        assert not setting.decode[0].calls[0].over.is_set()
    await aborted(setting.decode[0])
