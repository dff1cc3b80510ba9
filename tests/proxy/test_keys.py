"""API keys: who is served, what engines get to see, and what a look-up tells."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.proxy.keys import KeyRing, hashed, key_of
from mooncake_connector.scheduler.proxy.settings import ServiceClass
from tests.proxy.conftest import Start
from tests.proxy.fakes import MODEL, FakeEngine

CLASSES = {"gold": ServiceClass(api_keys=(hashlib.sha256(b"gold").hexdigest(),), priority=3)}
REQUEST: dict[str, Any] = {"model": MODEL, "prompt": "a"}


@given(st.dictionaries(st.text(min_size=1), st.sampled_from(["a", "b"])), st.text())
def test_a_ring_knows_its_keys_and_no_other(names: dict[str, str], other: str):
    def hash(key: str) -> str:
        return hashed(key.encode(errors="replace").decode())

    ring = KeyRing({hash(key): name for key, name in names.items()})
    known = {hash(key): name for key, name in names.items()}
    for key in [*names, other]:
        assert ring.find(hash(key)) == known.get(hash(key))
    assert ring.find("") is None


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"Authorization": "Bearer a"}, "a"),
        ({"Authorization": "bearer  a "}, "a"),
        ({"Authorization": "Basic a"}, ""),
        ({"Authorization": "Bearer "}, ""),
        ({"x-api-key": "a"}, "a"),
        ({"Authorization": "Bearer b", "x-api-key": "a"}, "b"),
        ({}, ""),
    ],
)
def test_where_a_key_is(headers: dict[str, str], key: str):
    assert key_of(headers) == key


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/v1/embeddings", "/nothing"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer brass"}])
async def test_without_a_key_nobody_is_served(start: Start, path: str, headers: dict[str, str]):
    setting = await start(require_key=True, classes=CLASSES)
    async with setting.http.post(path, json=REQUEST, headers=headers) as reply:
        assert reply.status == 401
        error = (await reply.json())["error"]
        assert (error["type"], error["code"]) == ("AuthenticationError", 401)
        assert "brass" not in error["message"]
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert reply.headers["X-Request-Id"]
    assert not setting.decode[0].calls
    for path in ("/health", "/metrics"):
        async with setting.http.get(path) as reply:
            assert reply.status == 200


@pytest.mark.parametrize("key", ["engine", ""])
@pytest.mark.parametrize("named", ["Authorization", "x-api-key"])
async def test_engines_get_their_own_key_and_never_the_clients(start: Start, key: str, named: str):
    setting = await start(require_key=True, classes=CLASSES, engine_api_key=key)
    mine = {named: "Bearer gold" if named == "Authorization" else "gold"}
    async with setting.http.post("/v1/completions", json=REQUEST, headers=mine) as reply:
        assert reply.status == 200
    async with setting.http.get("/v1/models", headers=mine) as reply:
        assert reply.status == 200
    for call in (await setting.prefill[0].call(), await setting.decode[0].call()):
        assert call.headers.get("Authorization") == (f"Bearer {key}" if key else None)
        assert "x-api-key" not in call.headers
        assert "gold" not in str(call.headers)


async def test_where_keys_are_not_required_the_clients_goes_on_to_the_engines(start: Start):
    setting = await start(classes=CLASSES, engine_api_key="engine")
    for key in ("gold", "brass"):
        headers = {"Authorization": f"Bearer {key}"}
        async with setting.http.post("/v1/completions", json=REQUEST, headers=headers) as reply:
            assert reply.status == 200
    assert [call.headers["Authorization"] for call in setting.decode[0].calls] == [
        "Bearer gold",
        "Bearer brass",
    ]


def guarded() -> tuple[list[FakeEngine], list[FakeEngine]]:
    """Engines as with vLLM's --api-key."""
    pair = FakeEngine("kv_producer"), FakeEngine("kv_consumer")
    for engine in pair:
        engine.key = "engine"
    return [pair[0]], [pair[1]]


async def test_engines_with_an_api_key_and_clients_with_keys_of_their_own(start: Start):
    setting = await start(*guarded(), require_key=True, classes=CLASSES, engine_api_key="engine")
    for key, status in (("gold", 200), ("engine", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        async with setting.http.post("/v1/completions", json=REQUEST, headers=headers) as reply:
            assert reply.status == status
    assert (len(setting.prefill[0].calls), len(setting.decode[0].calls)) == (1, 1)


async def test_engines_with_an_api_key_that_the_clients_know(start: Start):
    setting = await start(*guarded(), engine_api_key="engine")
    for headers, status in (({"Authorization": "Bearer engine"}, 200), ({}, 401)):
        async with setting.http.post("/v1/completions", json=REQUEST, headers=headers) as reply:
            assert reply.status == status


async def test_engines_with_an_api_key_that_nobody_told_the_proxy(start: Start):
    setting = await start(*guarded(), ready=False)
    await setting.settled(lambda proxy: "MOONCAKE_PROXY_ENGINE_API_KEY" in proxy.pool.decode[0].reason)
