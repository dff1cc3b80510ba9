"""The admin API: closed, as described, and what it does to the pools of a running proxy."""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from mooncake_connector.scheduler.engines.pool import Pool
from mooncake_connector.scheduler.proxy.admin import Admin, shown
from mooncake_connector.scheduler.proxy.connections import Site
from mooncake_connector.scheduler.proxy.membership import Membership
from mooncake_connector.scheduler.proxy.reload import Reloader
from mooncake_connector.scheduler.proxy.settings import InForce, ProxySettings, ServiceClass
from tests.proxy.conftest import Start
from tests.proxy.fakes import MODEL, FakeEngine, events

KEY = {"Authorization": "Bearer admin"}
HASH = hashlib.sha256(b"admin").hexdigest()
STREAM = {"model": MODEL, "prompt": [1, 2], "stream": True}
SETTINGS = ProxySettings(prefill=("http://p:1",), decode=("http://d:1",), admin_keys=(HASH,))


@pytest.fixture
async def alone() -> AsyncIterator[str]:
    """An admin API whose engines nobody probes; its base URL."""
    in_force, pool = InForce(SETTINGS), Pool(SETTINGS.prefill, SETTINGS.decode)
    membership = Membership(pool)
    reloader = Reloader(lambda: SETTINGS, in_force, membership, None, [])
    runner = web.AppRunner(Admin(in_force, pool, membership, reloader).application(), shutdown_timeout=0)
    await runner.setup()
    await Site(runner, in_force, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()
    await membership.close()


# The command runs for seconds, and for minutes on a machine that is busy with something else.
@pytest.mark.timeout(300)
async def test_schemathesis_finds_nothing(alone: str, tmp_path: Path):
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{alone}/openapi.json"]
    options = [
        *("-H", "Authorization: Bearer admin", "--max-examples", "25", "--seed", "1", "--checks", "all"),
        # What is an engine's URL is more than the schema's pattern can say.
        *("--exclude-checks", "positive_data_acceptance", "--generation-database", "none", "--no-color"),
        # How long requests and making them up take says something of the machine only.
        *("--request-timeout", "60", "--suppress-health-check", "too_slow"),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, *options, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    told, _ = await process.communicate()
    assert process.returncode == 0, told.decode()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer nimda"}, {"Authorization": "Basic admin"}])
async def test_without_its_key_it_is_closed(alone: str, headers: dict[str, str]):
    async with aiohttp.ClientSession(alone, headers=headers) as http:
        for path in ("/engines", "/configuration", "/openapi.json", "/nothing"):
            async with http.get(path) as reply:
                assert reply.status == 401
                assert (await reply.json())["error"]["type"] == "AuthenticationError"
                assert reply.headers["WWW-Authenticate"] == "Bearer"
        async with http.post("/engines/add", json={"url": "http://evil:1", "side": "decode"}) as reply:
            assert reply.status == 401
    async with aiohttp.ClientSession(alone, headers=KEY) as http, http.get("/engines") as reply:
        assert "evil" not in await reply.text()


async def test_what_an_engine_may_be(alone: str):
    async with aiohttp.ClientSession(alone, headers=KEY) as http:
        for url, mend in [
            ("http://user:secret@d:2", "leave user, password"),
            ("http://d:2/v1", "leave /v1 out"),
            ("http://d:2?key=secret", "leave user, password, query"),
            ("http://d:2\n", "http://HOST:PORT"),
        ]:
            async with http.post("/engines/add", json={"url": url, "side": "decode"}) as reply:
                assert reply.status == 400
                assert mend in await reply.text()
        async with http.post("/engines/add", json={"url": "http://d:1/", "side": "prefill"}) as reply:
            assert reply.status == 409
            assert "in the decode pool already" in await reply.text()


def test_settings_are_shown_without_secrets():
    secret = hashlib.sha256(b"secret").hexdigest()
    settings = msgspec.structs.replace(
        SETTINGS, engine_api_key="sesame", classes={"gold": ServiceClass(api_keys=(secret,))}
    )
    text = msgspec.json.encode(shown(settings)).decode()
    for hidden in (HASH, secret, "sesame"):
        assert hidden not in text
    assert shown(settings)["classes"]["gold"]["api_keys"] == [f"{secret[:12]}..."]
    assert shown(settings)["port"] == 8000


async def test_engines_are_added_drained_and_removed_while_requests_run(start: Start):
    setting = await start(admin_keys=(HASH,), admin_port=0)
    old, new = setting.decode[0], FakeEngine("kv_consumer")
    await new.start()
    old.stream, old.gap = events(20), 0.02
    admin = aiohttp.ClientSession(f"http://127.0.0.1:{setting.proxy.admin_port}", headers=KEY)

    async def change(what: str, url: str, status: int, **more: str) -> dict[str, Any]:
        async with admin.post(f"/engines/{what}", json={"url": url, **more}) as reply:
            assert reply.status == status
            found: dict[str, Any] = await reply.json()
            return found

    async with admin, setting.http.post("/v1/completions", json=STREAM) as reply:
        got = await reply.content.readany()
        assert (await change("drain", old.url, 200))["state"] == "draining"
        async with setting.http.post("/v1/completions", json=STREAM) as refused:
            assert refused.status == 503
        assert (await change("add", new.url + "/", 201, side="decode"))["state"] == "starting"
        await setting.settled(lambda proxy: proxy.pool[new.url].usable)
        async with setting.http.post("/v1/completions", json=STREAM) as second:
            assert second.headers["x-mooncake-decode"] == new.url
        assert (await change("undrain", old.url, 200))["state"] == "up"
        assert (await change("remove", old.url, 202))["requests"] == 1
        got += await reply.content.read()
        assert got == b"".join(events(20))
        await setting.settled(lambda proxy: old.url not in proxy.pool)
        await change("remove", old.url, 404)
        async with admin.get("/engines") as listed:
            found = await listed.json()
        assert [engine["url"] for engine in found["decode"]] == [new.url]
    await new.stop()


async def test_a_reload_says_what_changed_or_why_nothing_did(start: Start):
    setting = await start(admin_keys=(HASH,), admin_port=0)
    other = hashlib.sha256(b"other").hexdigest()
    url = f"http://127.0.0.1:{setting.proxy.admin_port}"
    async with aiohttp.ClientSession(url, headers=KEY) as admin:
        setting.settings = msgspec.structs.replace(setting.settings, order="serial")
        async with admin.post("/reload") as reply:
            assert reply.status == 409
            assert "--order" in (await reply.json())["error"]["message"]
        setting.settings = msgspec.structs.replace(setting.settings, order="concurrent", admin_keys=(other,))
        async with admin.post("/reload") as reply:
            assert await reply.json() == {"changed": ["admin_keys"]}
        async with admin.post("/reload") as reply:
            assert reply.status == 401
    async with aiohttp.ClientSession(setting.url, headers=KEY) as http, http.get("/engines") as reply:
        assert reply.status == 404
