"""What the proxy learns of its engines: starting, down, restarted, incompatible, unfit."""

import asyncio
import logging

import pytest

from mooncake_connector.scheduler.engines.probe import Prober
from mooncake_connector.scheduler.engines.vllm import VllmEngine
from tests.proxy.conftest import Start, free_port
from tests.proxy.fakes import MODEL, FakeEngine

TEXT = {"model": MODEL, "prompt": "one two three four"}


async def test_engines_may_start_after_the_proxy(start: Start):
    prefill, decode = FakeEngine("kv_producer"), FakeEngine("kv_both")
    prefill.port, decode.port = free_port(), free_port()
    setting = await start([prefill], [decode], ready=False)
    async with setting.http.get("/health") as reply:
        assert reply.status == 503
        assert (await reply.json())["decode"][0]["state"] == "starting"
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        assert reply.status == 503
    for engine in (prefill, decode):
        await engine.start()
    await setting.settled(lambda proxy: proxy.pool.paired())
    async with setting.http.get("/health") as reply:
        assert reply.status == 200
        report = await reply.json()
    assert report["status"] == "ok"
    assert report["prefill"][0]["engine_id"] == prefill.engine_id
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        assert reply.status == 200


async def test_a_restarted_prefill_is_recognised_and_used(start: Start, caplog: pytest.LogCaptureFixture):
    setting = await start()
    prefill = setting.prefill[0]
    before = prefill.engine_id
    await prefill.stop()
    await setting.settled(lambda proxy: not proxy.pool.prefill[0].up)
    prefill.engine_id = "engine-new"
    await prefill.start()
    await setting.settled(lambda proxy: proxy.pool.prefill[0].up)
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        assert reply.status == 200
    assert setting.decode[0].calls[-1].params["remote_engine_id"] == "engine-new"
    assert setting.count("engine_restarts", side="prefill", engine=prefill.url) == 1
    assert f"restarted: engine engine-new, was {before}" in caplog.text


async def test_a_restart_too_quick_for_the_health_check_shows_by_a_failed_request(start: Start):
    setting = await start(check_seconds=60.0)
    prefill = setting.prefill[0]
    prefill.probe_changes = {"incarnation": "second"}
    prefill.failures = ["reset"]
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        assert reply.status == 200
    await setting.settled(lambda proxy: proxy.pool.prefill[0].restarts == 1)


async def test_an_idle_engine_is_probed_again(start: Start):
    setting = await start(check_seconds=0.02, probe_seconds=0.1)
    before = setting.prefill[0].probes
    setting.prefill[0].engine_id = "other"
    await setting.settled(lambda proxy: proxy.pool.prefill[0].info.engine_id == "other")
    assert setting.prefill[0].probes > before
    assert setting.prefill[0].calls == []


async def test_health_checks_alone_cost_no_tokens(start: Start):
    setting = await start(check_seconds=0.01)
    await setting.settled(lambda proxy: proxy.pool.prefill[0].up)
    before = [engine.probes for engine in (*setting.prefill, *setting.decode)]
    for engine in (*setting.prefill, *setting.decode):
        engine.healthy = True
    for _ in range(20):
        async with setting.http.get("/health") as reply:
            assert reply.status == 200
    assert [engine.probes for engine in (*setting.prefill, *setting.decode)] == before == [1, 1]


async def test_an_engine_that_turns_unhealthy_is_left_out_until_it_recovers(start: Start):
    setting = await start(1, 2)
    setting.decode[0].healthy = False
    await setting.settled(lambda proxy: not proxy.pool.decode[0].up)
    for _ in range(3):
        async with setting.http.post("/v1/completions", json=TEXT) as reply:
            assert reply.status == 200
    assert setting.decode[0].calls == []
    setting.decode[0].healthy = True
    await setting.settled(lambda proxy: proxy.pool.decode[0].up)


async def test_an_incompatible_pair_is_never_used_and_both_values_are_logged(
    start: Start, caplog: pytest.LogCaptureFixture
):
    other = FakeEngine("kv_producer", layout="layout-b", dtype="bfloat16")
    fitting = FakeEngine("kv_producer")
    setting = await start([other, fitting], 1)
    for _ in range(4):
        async with setting.http.post("/v1/completions", json=TEXT) as reply:
            assert reply.status == 200
    assert other.calls == []
    assert len(fitting.calls) == 4
    async with setting.http.get("/health") as reply:
        (mismatch,) = (await reply.json())["mismatches"]
    assert "layout 'layout-b' and 'layout-a'" in mismatch
    assert "dtype 'bfloat16' and 'float32'" in mismatch
    assert caplog.text.count("can't exchange KV") == 1


async def test_one_model_under_two_names_is_one_model(start: Start):
    setting = await start([FakeEngine("kv_producer", model="/elsewhere/tiny")], 1)
    async with setting.http.get("/health") as reply:
        assert reply.status == 200


async def test_two_models_are_named_with_their_hashes(start: Start):
    setting = await start([FakeEngine("kv_producer", model="other", model_hash="hash-b")], 1)
    async with setting.http.get("/health") as reply:
        (mismatch,) = (await reply.json())["mismatches"]
    assert "model 'other' and 'tiny'; model_hash 'hash-b' and 'hash-a'" in mismatch


async def test_an_engine_without_the_connector_is_named_with_the_mend(
    start: Start, caplog: pytest.LogCaptureFixture
):
    plain = FakeEngine("none")
    plain.connector = False
    setting = await start([plain], 1, ready=False)
    await setting.settled(
        lambda proxy: proxy.pool.decode[0].up and "connector" in proxy.pool.prefill[0].reason
    )
    assert "--kv-transfer-config" in setting.proxy.pool.prefill[0].reason
    assert plain.url in caplog.text
    assert [r for r in caplog.records if r.levelno >= logging.WARNING]
    async with setting.http.post("/v1/completions", json=TEXT) as reply:
        assert reply.status == 200
    assert plain.calls == []


async def test_an_engine_in_the_wrong_pool_is_named(start: Start):
    setting = await start([FakeEngine("kv_consumer")], [FakeEngine("kv_producer")], ready=False)
    await setting.settled(
        lambda proxy: "pool" in proxy.pool.prefill[0].reason and "pool" in proxy.pool.decode[0].reason
    )
    assert "kv_role kv_producer or kv_both" in setting.proxy.pool.prefill[0].reason
    assert "kv_role kv_consumer or kv_both" in setting.proxy.pool.decode[0].reason
    assert not setting.proxy.pool.paired()


async def test_a_probe_answer_of_another_version_is_explained(start: Start):
    setting = await start([FakeEngine("kv_producer", port=None)], 1, ready=False)
    await setting.settled(lambda proxy: "same mooncake-connector version" in proxy.pool.prefill[0].reason)


async def test_metrics_are_prometheus_text(start: Start):
    setting = await start()
    async with setting.http.post("/v1/completions", json={**TEXT, "stream": True}) as reply:
        await reply.read()
    async with setting.http.get("/metrics") as reply:
        assert reply.headers["Content-Type"].startswith("text/plain")
        text = await reply.text()
    url = setting.prefill[0].url
    assert f'mooncake_proxy_engine_up{{engine="{url}",side="prefill"}} 1.0' in text
    assert f'mooncake_proxy_inflight{{engine="{url}",side="prefill"}} 0.0' in text
    assert "mooncake_proxy_time_to_first_byte_seconds_bucket" in text
    assert 'mooncake_proxy_requests_total{outcome="ok",path="/v1/completions"} 1.0' in text


@pytest.mark.parametrize("turns", range(5))
async def test_the_prober_ends_even_if_an_engine_is_suspected_just_then(start: Start, turns: int):
    """`asyncio.wait_for` of Python 3.11 swallows a cancellation that comes with what it waits for."""
    setting = await start(check_seconds=5)
    prober = Prober(
        setting.proxy.pool,
        VllmEngine(),
        setting.http,
        check_seconds=5,
        probe_seconds=30,
        down_seconds=30,
    )
    async with asyncio.timeout(3):
        async with prober:
            await asyncio.sleep(0.1)
            for instance in setting.proxy.pool:
                instance.suspicion.set()
            for _ in range(turns):
                await asyncio.sleep(0)
