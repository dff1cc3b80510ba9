"""The load benchmark's simulated engines and client, with our proxy between them and without."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from benchmarks.load_client import Client, Figures, Plan
from benchmarks.sim_engine import HOST, Fixed, SimEngine
from mooncake_connector.scheduler.proxy.app import Proxy
from mooncake_connector.scheduler.proxy.settings import ProxySettings
from tests.proxy.conftest import free_port

COSTS = Fixed(0.004, 0.002, 0.001)


async def engines(apart: bool = False) -> tuple[int, int]:
    """The ports of a prefill and a decode engine; `apart`: as in processes of their own."""
    together: dict[int, SimEngine] = {}
    ports = free_port(), free_port()
    for role, port in zip(("prefill", "decode"), ports, strict=True):
        await SimEngine(role, port, COSTS, False, {} if apart else together).start()
    return ports


@asynccontextmanager
async def proxy(prefill: int, decode: int) -> AsyncIterator[int]:
    urls = {"prefill": (f"http://{HOST}:{prefill}",), "decode": (f"http://{HOST}:{decode}",)}
    ours = Proxy(ProxySettings(port=0, drain_seconds=1, **urls))
    async with ours.open() as port, asyncio.timeout(10):
        while not ours.pool.paired():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield port


async def figures(**plan: Any) -> Figures:
    found = Figures()
    async with asyncio.timeout(20):
        await Client(Plan(out="", **plan), found).run()
    return found


@pytest.mark.parametrize("apart", [False, True])
async def test_every_token_of_every_stream_is_seen_and_timed(apart: bool) -> None:
    prefill, decode = await engines(apart)
    found = await figures(prefill=[prefill], decode=[decode], streams=20, tokens=5)
    assert not found.failures
    assert (len(found.arrays["added"]), len(found.arrays["chunk"])) == (20, 20 * 4)
    assert all(
        0 <= added < ttft and ttft - added > COSTS.prompt
        for added, ttft in zip(found.arrays["added"], found.arrays["ttft"], strict=True)
    )


@pytest.mark.parametrize(("stream", "chat"), [*itertools.product((True, False), repeat=2)])
async def test_our_proxy_serves_the_client_from_simulated_engines(stream: bool, chat: bool) -> None:
    prefill, decode = await engines()
    async with proxy(prefill, decode) as port:
        found = await figures(proxy=port, streams=10, tokens=4, stream=stream, chat=chat)
        assert not found.failures
        assert len(found.arrays["whole"]) == 10
        body = {"prompt": "hi", "max_tokens": 2}
        url = f"http://{HOST}:{port}/v1/completions"
        async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
            assert answer.headers["x-mooncake-prefill"].endswith(f":{prefill}")


async def test_what_fails_is_counted() -> None:
    found = await figures(proxy=free_port(), streams=3)
    assert sum(found.failures.values()) == 3


async def test_peers_parameters_are_understood() -> None:
    prefill, decode = await engines()
    async with aiohttp.ClientSession() as http:

        async def ask(port: int, **more: Any) -> dict[str, Any]:
            body = {"prompt": "hi", "max_tokens": 3} | more
            async with http.post(f"http://{HOST}:{port}/v1/completions", json=body) as answer:
                assert answer.status == 200
                return await answer.json()

        # vLLM's NIXL connector: prefill's answer has what decode is to be told.
        said = await ask(prefill, kv_transfer_params={"do_remote_decode": True, "remote_host": None})
        answered = await ask(decode, kv_transfer_params=said["kv_transfer_params"])
        assert answered["usage"]["completion_tokens"] == 3
        # vLLM's Mooncake connector.
        async with http.get(f"http://{HOST}:{prefill}/query") as answer:
            assert (await answer.json())["0"]["engine_id"]
        id = {"transfer_id": "t1"}
        there = {"do_remote_prefill": True, "remote_bootstrap_addr": f"http://{HOST}:{prefill}"} | id
        both = await asyncio.gather(
            ask(decode, kv_transfer_params=there),
            ask(prefill, kv_transfer_params={"do_remote_decode": True} | id),
        )
        assert both[0]["usage"]["completion_tokens"] == 3
        # SGLang: both get the same.
        room = {"bootstrap_host": HOST, "bootstrap_port": prefill, "bootstrap_room": 7}
        both = await asyncio.gather(ask(prefill, **room), ask(decode, **room))
        assert both[1]["usage"]["completion_tokens"] == 3
