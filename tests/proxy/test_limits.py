"""Clients that are too slow, too large or too many: on raw sockets."""

import asyncio
import contextlib
import hashlib
import json
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from mooncake_connector.scheduler.proxy.connections import Connections
from mooncake_connector.scheduler.proxy.settings import InForce, ProxySettings, ServiceClass
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, WITHIN, events

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
BODY = json.dumps({"model": MODEL, "prompt": "a", "stream": True}).encode()


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: proxy", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "\r\n"]).encode()


@asynccontextmanager
async def connected(setting: Setting) -> AsyncIterator[Streams]:
    host, port = setting.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def told(reader: asyncio.StreamReader, within: float = WITHIN) -> bytes:
    """All until the proxy closes."""
    async with asyncio.timeout(within):
        return await reader.read()


async def dribble(writer: asyncio.StreamWriter, data: bytes, pause: float = 0.02) -> None:
    for byte in data:
        writer.write(bytes([byte]))
        await asyncio.sleep(pause)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", head(2)[:-2]])
async def test_headers_that_do_not_come_in_time(start: Start, sent: bytes):
    setting = await start(header_seconds=0.2)
    async with connected(setting) as (reader, writer):
        began = time.monotonic()
        writer.write(sent)
        assert (await told(reader)).startswith(b"HTTP/1.1 408 ")
        assert 0.15 < time.monotonic() - began < WITHIN


async def test_headers_byte_by_byte_do_not_live_longer(start: Start):
    setting = await start(header_seconds=0.2)
    async with connected(setting) as (reader, writer):
        slow = asyncio.create_task(dribble(writer, head(2, f"X-Pad: {'a' * 10_000}")))
        began = time.monotonic()
        # Who still sends when the proxy closes may get a reset before the answer.
        with contextlib.suppress(ConnectionResetError):
            assert (await told(reader)).startswith(b"HTTP/1.1 408 ")
        assert 0.15 < time.monotonic() - began < WITHIN
        slow.cancel()


async def test_between_two_requests_a_connection_may_be_idle_but_the_second_must_hurry(start: Start):
    setting = await start(header_seconds=0.2)
    async with connected(setting) as (reader, writer):
        for _ in range(2):
            writer.write(head(len(BODY)) + BODY)
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"0\r\n\r\n")
            await asyncio.sleep(0.4)
        writer.write(b"P")
        assert (await told(reader)).startswith(b"HTTP/1.1 408 ")


async def test_an_idle_connection_is_closed_in_the_end(start: Start):
    setting = await start(keepalive_seconds=0.3)
    async with connected(setting) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: proxy\r\n\r\n")
        got = await told(reader)
        assert got.startswith(b"HTTP/1.1 200 ")


async def test_an_answer_may_take_longer_than_all_of_these(start: Start):
    setting = await start(header_seconds=0.1, body_seconds=0.1, keepalive_seconds=0.1)
    setting.decode[0].gap, setting.decode[0].stream = 0.05, events(10)
    async with connected(setting) as (reader, writer):
        writer.write(head(len(BODY)) + BODY)
        got = await told(reader)
        assert b"data: [DONE]" in got


async def test_a_body_that_does_not_come_in_time(start: Start):
    setting = await start(body_seconds=0.2)
    async with connected(setting) as (reader, writer):
        writer.write(head(len(BODY)) + BODY[:-1])
        began = time.monotonic()
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"Connection: close" in answer
        assert 0.15 < time.monotonic() - began < WITHIN
        assert b"did not come within 0.2 s" in await reader.readuntil(b"}}")
    assert not setting.decode[0].calls
    assert setting.count("requests_total", path="/v1/completions", outcome="client_error") == 1


async def test_a_body_that_says_it_is_too_large_is_not_read(start: Start):
    setting = await start(max_body_mib=1)
    async with connected(setting) as (reader, writer):
        writer.write(head(2 << 20))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
        assert b"larger than 1 MiB" in await reader.readuntil(b"}}")


async def test_a_body_that_turns_out_too_large(start: Start):
    setting = await start(max_body_mib=1)
    async with connected(setting) as (reader, writer):
        chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        chunked = b"POST /v1/completions HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(chunked + 17 * chunk)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")


async def test_header_lines_that_are_too_long_or_too_many(start: Start):
    setting = await start(max_header_kib=2)
    for extra, status in (
        ([f"X-Pad: {'a' * 1900}"], 200),
        ([f"X-Pad: {'a' * 2100}"], 431),
        ([f"X-{at}: a" for at in range(200)], 400),
    ):
        async with connected(setting) as (reader, writer):
            writer.write(head(len(BODY), *extra) + BODY)
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == str(status).encode()


async def test_so_many_connections_and_no_more(start: Start):
    setting = await start(max_connections=2)
    await setting.http.close()
    async with connected(setting):
        async with connected(setting) as second:
            async with connected(setting) as (reader, _):
                got = await told(reader)
                assert got.startswith(b"HTTP/1.1 503 ")
                assert b"2 connections" in got
            second[1].write(b"GET /health HTTP/1.1\r\nHost: proxy\r\n\r\n")
            assert b"200 OK" in await second[0].readuntil(b"\r\n")
        await asyncio.sleep(0.05)
        async with connected(setting) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: proxy\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n")


async def test_a_body_that_comes_after_its_answer_is_no_slow_request(start: Start):
    """Who gets 401 before the body was sent keeps a good connection."""
    key = hashlib.sha256(b"gold").hexdigest()
    classes = {"gold": ServiceClass(api_keys=(key,))}
    setting = await start(header_seconds=0.2, require_key=True, classes=classes)
    async with connected(setting) as (reader, writer):
        writer.write(head(len(BODY)))
        assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 401 ")
        for part in (BODY[:10], BODY[10:]):
            writer.write(part)
            await asyncio.sleep(0.3)
        writer.write(head(len(BODY), "Authorization: Bearer gold") + BODY)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_requests_that_come_at_once_are_served_one_by_one(start: Start):
    setting = await start(header_seconds=0.2)
    setting.decode[0].delay = 0.15
    whole = head(len(BODY)) + BODY
    async with connected(setting) as (reader, writer):
        writer.write(whole + whole + whole[:40])
        for _ in range(2):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b"0\r\n\r\n")
        writer.write(whole[40:])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_who_asks_before_sending_a_body_is_told_to_go_on_only_if_it_is_wanted(start: Start):
    key = hashlib.sha256(b"gold").hexdigest()
    classes = {"gold": ServiceClass(api_keys=(key,))}
    setting = await start(max_body_mib=1, require_key=True, classes=classes)
    gold, ask = "Authorization: Bearer gold", "Expect: 100-continue"
    for size, lines, status in (
        (len(BODY), [ask], 401),
        (2 << 20, [ask, gold], 413),
        (len(BODY), ["Expect: miracles", gold], 417),
        (len(BODY), [ask, gold], 100),
    ):
        async with connected(setting) as (reader, writer):
            writer.write(head(size, *lines))
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == str(status).encode()
            if status == 100:
                writer.write(BODY)
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("files", "most"), [(364, 100), (1 << 20, 500), (10, 1), (resource.RLIM_INFINITY, 500)]
)
async def test_no_more_connections_than_there_are_files_for(
    monkeypatch: pytest.MonkeyPatch, files: int, most: int
):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    settings = ProxySettings(prefill=("http://p",), decode=("http://d",), max_connections=500)
    assert Connections(web.Server(lambda _: None), InForce(settings)).most == most
