"""The command as a user runs it: settings, their errors, and signals."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.proxy.configuration import load
from tests.proxy.conftest import free_port
from tests.proxy.fakes import MODEL, WITHIN, FakeEngine, events

LEAVE = {"MOONCAKE_PROXY_LEAVE_SECONDS": "0"}
COMMAND = [sys.executable, "-m", "mooncake_connector.cli", "proxy"]
# Seconds until the process has started, at most: it imports much.
START = 60.0
P, D = "http://127.0.0.1:1", "http://127.0.0.1:2"


@pytest.fixture
async def engines() -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    pair = FakeEngine("kv_producer"), FakeEngine("kv_consumer")
    for engine in pair:
        await engine.start()
    yield pair
    for engine in pair:
        await engine.stop()


async def _spawn(*options: str, **environ: str) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--port", "0", *options, stdout=subprocess.PIPE, env=os.environ | LEAVE | environ
    )
    assert process.stdout
    line = await asyncio.wait_for(process.stdout.readline(), START)
    return process, line.decode().split()[-1]


async def _healthy(http: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(START):
        while True:
            async with http.get("/health") as reply:
                if reply.status == 200:
                    return
            await asyncio.sleep(0.02)


async def _closed(url: str) -> None:
    """Wait until nobody listens there."""
    async with asyncio.timeout(WITHIN):
        while True:
            async with aiohttp.ClientSession(url) as late:
                try:
                    await late.get("/health")
                except aiohttp.ClientConnectorError:
                    return
                except aiohttp.ClientConnectionError:
                    pass
            await asyncio.sleep(0.02)


async def test_sigterm_lets_running_streams_end_and_takes_no_new_ones(engines: tuple[FakeEngine, FakeEngine]):
    prefill, decode = engines
    decode.stream, decode.gap = events(20), 0.05
    environ = {"MOONCAKE_PROXY_PREFILL": prefill.url, "MOONCAKE_PROXY_DECODE": decode.url}
    process, url = await _spawn(**environ, MOONCAKE_PROXY_LEAVE_SECONDS="0.3")
    try:
        async with aiohttp.ClientSession(url) as http:
            await _healthy(http)
            body = {"model": MODEL, "prompt": "a", "stream": True}
            async with http.post("/v1/completions", json=body) as reply:
                got = await reply.content.readany()
                decode.goes_on.clear()
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                await _closed(url)
                assert time.monotonic() - began >= 0.3
                decode.goes_on.set()
                got += await reply.content.read()
        assert got == b"".join(events(20))
        assert await asyncio.wait_for(process.wait(), WITHIN) == 0
    finally:
        await _ended(process)


async def test_load_balancers_see_that_it_goes_and_lose_nothing(engines: tuple[FakeEngine, FakeEngine]):
    prefill, decode = engines
    environ = {"MOONCAKE_PROXY_LEAVE_SECONDS": "600"}
    process, url = await _spawn("--prefill", prefill.url, "--decode", decode.url, **environ)
    try:
        async with aiohttp.ClientSession(url) as http:
            await _healthy(http)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(WITHIN):
                while True:
                    async with http.get("/health") as reply:
                        if reply.status == 503 and (await reply.json())["status"] == "draining":
                            break
                    await asyncio.sleep(0.02)
            async with http.post("/v1/completions", json={"model": MODEL, "prompt": "a"}) as reply:
                assert reply.status == 200
                assert reply.headers["Connection"] == "close"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), WITHIN) == 0
    finally:
        await _ended(process)


@pytest.mark.parametrize("how", ["drain_seconds", "second_signal"])
async def test_a_stream_that_does_not_end_is_cut(engines: tuple[FakeEngine, FakeEngine], how: str):
    prefill, decode = engines
    decode.stream, decode.gap = events(5000), 0.05
    drain = "0.3" if how == "drain_seconds" else "60"
    process, url = await _spawn("--prefill", prefill.url, "--decode", decode.url, "--drain-seconds", drain)
    try:
        async with aiohttp.ClientSession(url) as http:
            await _healthy(http)
            body = {"model": MODEL, "prompt": "a", "stream": True}
            async with http.post("/v1/completions", json=body) as reply:
                await reply.content.readany()
                began = time.monotonic()
                process.send_signal(signal.SIGINT)
                if how == "second_signal":
                    await _closed(url)
                    process.send_signal(signal.SIGINT)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await reply.content.read()
        assert await asyncio.wait_for(process.wait(), WITHIN) == 0
        assert time.monotonic() - began < WITHIN
        await asyncio.wait_for(decode.calls[0].over.wait(), WITHIN)
        assert decode.calls[0].aborted
    finally:
        await _ended(process)


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--prefill", P, "--decode", D, "--port", port],
            capture_output=True,
            text=True,
            timeout=START,
        )
    assert done.returncode == 2
    assert f"can't listen on 127.0.0.1:{port}" in done.stderr
    assert "--port (MOONCAKE_PROXY_PORT)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ({}, {}, "--prefill (MOONCAKE_PROXY_PREFILL) is missing"),
        ({"prefill": [P]}, {}, "--decode (MOONCAKE_PROXY_DECODE) is missing"),
        ({"prefill": [P, P + "/"], "decode": [D]}, {}, "more than once"),
        ({"prefill": [P], "decode": [P]}, {}, "both --prefill and --decode"),
        ({"prefill": ["localhost:8100"], "decode": [D]}, {}, "http://HOST:PORT"),
        ({"prefill": ["http://h:99999"], "decode": [D]}, {}, "http://HOST:PORT"),
        ({"prefill": [P + "/v1"], "decode": [D]}, {}, "leave /v1 out"),
        ({"prefill": [P], "decode": [D], "order": "both"}, {}, "choose concurrent or serial"),
        ({"prefill": [P], "decode": [D], "port": "70000"}, {}, "between 0 and 65535"),
        (
            {"prefill": [P], "decode": [D]},
            {"MOONCAKE_PROXY_MAX_RETRIES": "many"},
            "MOONCAKE_PROXY_MAX_RETRIES",
        ),
        ({"prefill": [P], "decode": [D]}, {"MOONCAKE_PROXY_CHECK_SECONDS": "0"}, "at least 0.01"),
    ],
)
def test_wrong_settings_are_named_with_the_mend(options: dict, environ: dict[str, str], message: str):
    with pytest.raises(ConfigError) as raised:
        load(options, environ)
    assert message in str(raised.value)


def test_the_command_line_beats_the_environment():
    environ = {
        "MOONCAKE_PROXY_PREFILL": "http://e:1,http://e:2/",
        "MOONCAKE_PROXY_PORT": "81",
        "MOONCAKE_PROXY_HOST": "::1",
        "MOONCAKE_PROXY_ENGINE_API_KEY": "secret",
    }
    settings = load({"decode": [D], "port": "82", "host": None, "order": "serial"}, environ)
    assert settings.prefill == ("http://e:1", "http://e:2")
    assert (settings.host, settings.port, settings.order) == ("::1", 82, "serial")
    assert settings.engine_api_key == "secret"


async def test_a_port_that_nobody_serves_does_not_stop_the_proxy():
    gone = f"http://127.0.0.1:{free_port()}"
    process, url = await _spawn("--prefill", gone + "/", "--decode", gone.replace("127.0.0.1", "localhost"))
    try:
        async with aiohttp.ClientSession(url) as http, http.get("/health") as reply:
            assert reply.status == 503
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), WITHIN) == 0
