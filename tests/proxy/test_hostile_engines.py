"""Engines that break HTTP, JSON or off: what clients get of it, and that nothing stays."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from mooncake_connector.scheduler.proxy.progress import StreamCount
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import Call
from tests.proxy.misbehaviour import BEFORE, bytes_and_on, cut_at_all_moments, garbage, hangs
from tests.proxy.raw import (
    SSE,
    STREAM,
    TEXT,
    Got,
    RawEngine,
    Script,
    chunk,
    engines,
    nothing_left,
    post,
    say,
    stream,
    streamed,
    text,
    usual,
    whole,
)

SOON = {"prefill_timeout": 0.3, "first_byte_timeout": 0.3, "chunk_timeout": 0.3}
BOTH = [("concurrent", "decode"), ("serial", "prefill")]


async def one(setting: Setting, body: dict[str, Any]) -> Got:
    """An answer in good time that is well-formed; a stream ends with [DONE] or an error."""
    got = await say(setting, post(body), 8)
    assert got is not None, "the proxy hung up without a word"
    return got


def told(got: Got) -> str:
    """The text of an answer to which nothing happened."""
    assert got.status == 200, got
    if not got.headers["Content-Type"].startswith("text/event-stream"):
        return json.loads(got.body)["choices"][0]["text"]
    said, done, error = streamed(got.body)
    assert done, error
    return said


async def all_of(cases: Mapping[str, Script], attempt: Callable[[Script], Awaitable[None]]) -> None:
    """Try each; fails with those that failed, by name."""
    wrong: dict[str, str] = {}
    few = asyncio.Semaphore(12)

    async def guarded(name: str, script: Script) -> None:
        async with few:
            try:
                await attempt(script)
            except (Exception, asyncio.CancelledError) as error:
                wrong[name] = repr(error)[:300]

    await asyncio.gather(*(guarded(name, script) for name, script in cases.items()))
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())
    await nothing_left()


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_prefill_that_misbehaves_costs_no_client_its_answer(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token)
        for body in (TEXT, STREAM):
            p.scripts.append(script)
            assert told(await one(setting, body)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(BEFORE | garbage(), attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_another_decode_serves_when_one_misbehaves_in_time(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        scripts: list[Script] = []  # whoever is asked first
        p = RawEngine("kv_producer", first_token=True)
        ds = [RawEngine("kv_consumer", scripts, first_token=True) for _ in range(2)]
        setting = await start([p], ds, order=order, first_token=first_token)
        for body in (TEXT, STREAM):
            scripts.append(script)
            assert told(await one(setting, body)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(BEFORE, attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_a_broken_answer_of_the_only_decode_is_an_error(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token)
        d.always = script
        assert (await one(setting, TEXT)).status >= 500
        got = await one(setting, STREAM)
        if got.status == 200:
            assert first_token == "prefill"
            assert streamed(got.body)[2]
        await nothing_left(setting, alone=False)

    await all_of(BEFORE, attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_garbage_of_decode_breaks_nothing_but_the_answer(start: Start, order: str, first_token: str):
    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token)
        for body in (TEXT, STREAM):
            d.scripts.append(script)
            got = await one(setting, body)
            if got.headers["Content-Type"].startswith("text/event-stream"):
                streamed(got.body)
            assert told(await one(setting, body)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(garbage(), attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_a_stream_that_breaks_off_ends_with_an_error(start: Start, order: str, first_token: str):
    """What the client has of it is the beginning of the answer, and it is told that there is no more."""

    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
        setting = await start([p], [d], order=order, first_token=first_token, max_retries=0)
        d.scripts.append(script)
        got = await one(setting, STREAM)
        if got.status == 200:
            said, done, error = streamed(got.body)
            # What follows prefill's token is decode's again if decode had not begun: then it is whole.
            assert done if first_token == "prefill" and not error else error["code"] == 502
            assert text(3).startswith(said)
        else:
            assert got.error["code"] == 502
        assert told(await one(setting, STREAM)) == text(3)
        await nothing_left(setting, alone=False)

    await all_of(cut_at_all_moments(), attempt)


@pytest.mark.parametrize(("order", "first_token"), BOTH)
async def test_an_engine_that_says_nothing_more_is_given_up(start: Start, order: str, first_token: str):

    async def attempt(script: Script) -> None:
        for side in ("prefill", "decode"):
            p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
            setting = await start([p], [d], order=order, first_token=first_token, max_retries=1, **SOON)
            (p if side == "prefill" else d).always = script
            began = asyncio.get_running_loop().time()
            got = await one(setting, STREAM)
            assert asyncio.get_running_loop().time() - began < 6
            if side == "prefill":
                assert told(got) == text(3)
            elif got.status == 200:
                said, done, error = streamed(got.body)
                assert text(3).startswith(said)
                assert done or error
            else:
                assert got.error["code"] == 502
            await nothing_left(setting, within=6, alone=False)

    await all_of(hangs(), attempt)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_bytes_beyond_an_answer_are_nobodys_answer(start: Start, side: str):
    """On a connection that is used again they would be the next client's (response desynchronisation)."""
    evil = whole(b'{"choices":[{"index":0,"text":"evil"}],"kv_transfer_params":{"transfer_id":"evil"}}')

    def with_more(*parts: bytes) -> Script:
        async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await usual(call, reader, writer)
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)

        return script

    ways = {
        "at once": with_more(evil),
        "thrice": with_more(evil * 3),
        "later": with_more(b"", evil),
        "half of it later": with_more(b"", evil[:20], evil[20:]),
        "garbage later": with_more(b"", b"garbage\r\n\r\n"),
        "a blank line": with_more(b"\r\n"),
    }

    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
        setting = await start([p], [d], order="serial", check_seconds=60.0, probe_seconds=60.0)
        (p if side == "prefill" else d).scripts += [script] * 6
        for body in (TEXT, STREAM) * 4:
            assert told(await one(setting, body)) == text(3)
            await asyncio.sleep(0.015)
        assert all(call.params.get("transfer_id") != "evil" for call in d.calls)
        await nothing_left(setting, alone=False)

    await all_of(ways, attempt)


async def test_connections_that_engines_close_after_each_answer_cost_nothing(start: Start):
    """A pooled connection that is dead when it is used again is no failure of the engine."""

    def close_after(pause: float, *, reset: bool = False) -> Script:
        async def script(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await usual(call, reader, writer)
            await writer.drain()
            await asyncio.sleep(pause)
            writer.transport.abort() if reset else writer.close()

        return script

    async def attempt(script: Script) -> None:
        p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
        setting = await start([p], [d], order="concurrent")
        p.always = d.always = script
        for _ in range(5):
            for body in (TEXT, STREAM):
                assert told(await one(setting, body)) == text(3)
                await asyncio.sleep(0.015)
        assert setting.count("retries_total", side="decode") == 0
        assert setting.count("retries_total", side="prefill") == 0
        await nothing_left(setting, alone=False)

    ways = {f"{pause} s": close_after(pause) for pause in (0, 0.001, 0.005)}
    ways |= {"reset": close_after(0.002, reset=True)}
    await all_of(ways, attempt)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
async def test_bytes_may_come_one_by_one(start: Start, first_token: str):
    """Characters, events and chunks are cut at every place; the client gets the same bytes."""

    async def dribble(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE)
        for byte in b"".join(stream(1 if call.params.get("do_remote_decode") else 3, "length")):
            writer.write(chunk(bytes([byte])))
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")

    p, d = RawEngine("kv_producer", first_token=True), RawEngine("kv_consumer", first_token=True)
    setting = await start([p], [d], first_token=first_token)
    p.always = dribble if first_token == "prefill" else usual
    d.always = dribble
    got = await one(setting, STREAM)
    assert told(got) == text(3)
    if first_token == "decode":
        assert got.body == b"".join(stream(3, "length"))
    await nothing_left(setting)


async def test_engines_that_restart_under_requests_lose_none(start: Start):
    setting = await start(2, 2)
    for engine in engines(setting.prefill, setting.decode):
        engine.delay = 0.02
    over = False
    answers: list[Got] = []

    async def ask() -> None:
        while not over:
            answers.append(await one(setting, TEXT))

    asking = [asyncio.create_task(ask()) for _ in range(6)]
    for engine in engines(setting.prefill, setting.decode):
        await engine.stop()
        await asyncio.sleep(0.05)
        engine.engine_id += "-again"
        await engine.start()
        await setting.settled(lambda proxy: all(instance.up for instance in proxy.pool))
    over = True
    await asyncio.gather(*asking)
    assert {got.status for got in answers} == {200}
    assert len(answers) > 20
    await nothing_left(setting)


async def test_headers_of_engines_go_no_further_than_they_should(start: Start):
    async def odd(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = (
            "Connection: keep-alive, X-Hop",
            "X-Hop: 1",
            "Keep-Alive: timeout=1",
            "Proxy-Authenticate: Basic",
            "X-Mooncake-Decode: evil",
            "X-Request-Id: evil",
            "Server: evil",
            "X-Kept: \u00e9\u00ff",
            "X-Twice: 1",
            "X-Twice: 2",
        )
        writer.write(whole(b"{}", *own).decode().encode("latin-1"))

    p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
    setting = await start([p], [d])
    d.always = odd
    got = await one(setting, TEXT)
    assert got.status == 200
    assert "X-Hop" not in got.headers
    assert "Keep-Alive" not in got.headers
    assert "Proxy-Authenticate" not in got.headers
    assert got.headers.getall("X-Mooncake-Decode") == [d.url]
    assert "evil" not in str(got.headers)
    assert got.headers.getall("X-Twice") == ["1", "2"]
    await nothing_left(setting)


async def test_a_bug_in_the_middle_of_a_stream_ends_it_in_good_form(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    def feed(self: StreamCount, chunk: bytes) -> None:
        if b"w1" in chunk:
            raise ZeroDivisionError

    async def slow(call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await bytes_and_on(SSE, *map(chunk, stream()))(call, reader, writer)

    monkeypatch.setattr(StreamCount, "feed", feed)
    p, d = RawEngine("kv_producer"), RawEngine("kv_consumer")
    setting = await start([p], [d])
    d.always = slow
    got = await one(setting, STREAM)
    assert got.status == 200
    said, done, error = streamed(got.body)
    assert text(1) == said
    assert not done
    assert error
    assert error["code"] == 502
    counted = {"path": "/v1/completions", "outcome": "proxy_error"}
    await setting.settled(lambda _: setting.count("requests_total", **counted) == 1)
    await nothing_left(setting)


async def test_endpoints_of_any_one_engine_get_an_answer_or_an_error(start: Start):
    async def attempt(script: Script) -> None:
        scripts: list[Script] = []
        p, d = (RawEngine(role, scripts, first_token=True) for role in ("kv_producer", "kv_consumer"))
        setting = await start([p], [d], **SOON, max_retries=1)
        ask = post({"model": "m", "input": "a"}, path="/v1/embeddings")
        scripts.append(script)
        got = await say(setting, ask, 8)
        assert got
        assert told(got) == text(3)
        scripts += [script] * 2
        got = await say(setting, ask, 8)
        assert got
        assert got.status >= 500
        await nothing_left(setting, alone=False)

    # What says nothing wrong until it breaks off in the middle can't be tried again.
    quiet = {"empty stream", "stream that breaks off at once", "stream of half a chunk"}
    events = {"error event", "error event in two", "no content"}
    cases = {name: script for name, script in BEFORE.items() if name not in quiet | events}
    await all_of(cases | {name: hangs()[name] for name in ("at once", "after the headers")}, attempt)


async def test_an_engine_whose_checks_are_answered_with_garbage_is_left_out_until_it_is_well(start: Start):
    async def attempt(script: Script) -> None:
        p, ill, well = (RawEngine(role) for role in ("kv_producer", "kv_consumer", "kv_consumer"))
        # The 500s of probes are no failures of requests.
        setting = await start([p], [ill, well], check_seconds=0.05, probe_timeout=0.5, **SOON)
        instance = setting.proxy.pool[ill.url]
        ill.ill = script
        instance.suspect("a test says so")
        await setting.settled(lambda _: not instance.up)
        assert instance.reason
        assert instance.reason.isprintable()
        assert told(await one(setting, STREAM)) == text(3)
        ill.ill = None
        await setting.settled(lambda _: instance.up)
        await nothing_left(setting, alone=False)

    # Garbage is a good enough answer to a health check, but to no probe.
    await all_of(BEFORE | garbage(), attempt)
