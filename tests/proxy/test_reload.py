"""Settings that change while the proxy runs: what does, what does not, and that no stream notices."""

import asyncio
import hashlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.engines.pool import Lease, Pool, Side
from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from mooncake_connector.scheduler.proxy.membership import Membership
from mooncake_connector.scheduler.proxy.settings import ServiceClass
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, FakeEngine, events
from tests.proxy.test_logs import running

REQUEST = {"model": MODEL, "prompt": [1, 2, 3]}
STREAM = {**REQUEST, "stream": True}
GOLD = hashlib.sha256(b"gold").hexdigest()


async def status(setting: Setting, body: Any = None, key: str = "") -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with setting.http.post("/v1/completions", json=body or REQUEST, headers=headers) as reply:
        return reply.status


async def test_pools_change_under_a_stream_that_does_not_notice(start: Start):
    setting = await start()
    old, new = setting.decode[0], FakeEngine("kv_consumer")
    await new.start()
    old.stream, old.gap = events(30), 0.02
    async with setting.http.post("/v1/completions", json=STREAM) as reply:
        got = await reply.content.readany()
        assert setting.reload(decode=(new.url,)) == ["decode"]
        await setting.settled(lambda proxy: new.url in proxy.pool and proxy.pool[new.url].usable)
        assert await status(setting) == 200
        assert (len(old.calls), len(new.calls)) == (1, 1)
        assert old.url in setting.proxy.pool
        got += await reply.content.read()
    assert got == b"".join(events(30))
    await setting.settled(lambda proxy: old.url not in proxy.pool)
    assert await status(setting) == 200
    await new.stop()


async def test_an_engine_changes_sides_and_one_that_comes_back_stays(start: Start):
    setting = await start(2, [FakeEngine("kv_both"), FakeEngine("kv_both")])
    first, second = setting.decode
    held = setting.proxy.pool[second.url].lease(1)
    prefill = setting.settings.prefill
    setting.reload(decode=(first.url,), prefill=(*prefill, second.url))
    await asyncio.sleep(0.05)
    assert [i.url for i in setting.proxy.pool.decode if i.usable] == [first.url]
    held.release()
    await setting.settled(lambda proxy: proxy.pool[second.url].side == "prefill")

    held = setting.proxy.pool[first.url].lease(1)
    setting.reload(prefill=prefill, decode=(second.url,))
    setting.reload(decode=(first.url, second.url))
    held.release()
    await asyncio.sleep(0.05)
    await setting.settled(lambda proxy: {i.url for i in proxy.pool.decode} == {first.url, second.url})
    assert setting.proxy.pool[first.url].usable


async def test_what_the_admin_api_added_stays(start: Start):
    setting = await start()
    setting.proxy.pool.add("http://127.0.0.1:9", "prefill")
    setting.reload(max_body_mib=1)
    assert "http://127.0.0.1:9" in setting.proxy.pool
    setting.reload(prefill=(*setting.settings.prefill, "http://127.0.0.1:9"))
    assert setting.proxy.pool["http://127.0.0.1:9"].usable is False


async def test_keys_limits_and_promises_change(start: Start):
    setting = await start()
    assert await status(setting) == 200
    classes = {"gold": ServiceClass(api_keys=(GOLD,))}
    assert setting.reload(require_key=True, classes=classes) == ["require_key", "classes"]
    assert [await status(setting), await status(setting, key="gold")] == [401, 200]
    large = {**REQUEST, "prompt": "a" * (2 << 20)}
    assert await status(setting, large, "gold") == 200
    setting.reload(max_body_mib=1)
    assert await status(setting, large, "gold") == 413
    slo = Slo(ttft=77, tbt=7)
    setting.reload(scheduling=Scheduling(routing="round_robin", slo=slo), fixed_slo=("ttft", "tbt"))
    assert setting.proxy.steering.promise(MODEL, "", 3) == slo
    async with setting.http.get("/health") as reply:
        assert (await reply.json())["scheduling"]["routing"] == "round_robin"
    setting.reload(require_key=False)
    assert await status(setting) == 200


async def test_routing_and_admission_change_under_requests(start: Start):
    setting = await start(scheduling=Scheduling(slo=Slo(ttft=0.001)), fixed_slo=("ttft",))
    setting.prefill[0].delay = setting.decode[0].delay = 1.0
    before = asyncio.create_task(status(setting))
    await setting.decode[0].call()
    setting.prefill[0].delay = setting.decode[0].delay = 0.0
    long = {**REQUEST, "prompt": list(range(20_000))}
    assert await status(setting, long) == 429
    setting.reload(scheduling=Scheduling(admission="none", min_prefill_tokens=100_000))
    async with setting.http.post("/v1/completions", json=long) as reply:
        assert reply.status == 200
        assert reply.headers["x-mooncake-prefill"] == "none (short_prompt)"
    assert await before == 200


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"port": 1}, "--port (MOONCAKE_PROXY_PORT)"),
        (
            {"order": "serial", "engine_api_key": "a"},
            "--order (MOONCAKE_PROXY_ORDER), MOONCAKE_PROXY_ENGINE_API_KEY",
        ),
        (
            {"scheduling": Scheduling(admission="baseline")},
            "--admission (MOONCAKE_PROXY_ADMISSION) (from or to",
        ),
        ({"admin_keys": (GOLD,)}, "--admin-keys (MOONCAKE_PROXY_ADMIN_KEYS) (from none"),
        ({"tls_cert": "a", "tls_key": "b"}, "--tls-cert (MOONCAKE_PROXY_TLS_CERT) (from none"),
    ],
)
async def test_what_can_not_change_is_named_and_then_nothing_does(
    start: Start, changed: Mapping[str, Any], named: str
):
    setting = await start()
    before = setting.proxy.settings
    with pytest.raises(ConfigError) as raised:
        setting.reload(**changed, max_body_mib=1, decode=("http://127.0.0.1:9",))
    assert named in str(raised.value)
    assert "--max-body-mib" not in str(raised.value)
    assert setting.proxy.settings is before
    assert "http://127.0.0.1:9" not in setting.proxy.pool
    assert await status(setting) == 200


async def test_the_process_reloads_by_sighup_and_keeps_the_old_settings_if_the_new_are_wrong(tmp_path: Path):
    async with running(tmp_path) as (url, log, engines, process):
        config = tmp_path / "proxy.yaml"
        good = config.read_text()
        key = {"Authorization": "Bearer sk-client"}

        async def logged(text: str) -> None:
            process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(5):
                while text not in log.read_text():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

        async with aiohttp.ClientSession(url, headers=key) as http:
            engines[1].stream, engines[1].gap = events(100), 0.02
            async with asyncio.timeout(10):
                while (await http.get("/health")).status != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            async with http.post("/v1/completions", json=STREAM) as reply:
                got = await reply.content.readany()
                config.write_text(good + "prot: 1\n")
                await logged(
                    "the settings stay as they were: unknown proxy setting 'prot': did you mean port?"
                )
                config.write_text("classes: [\n")
                await logged("is no YAML")
                config.unlink()
                await logged("can't read")
                config.write_text(good + "host: 0.0.0.0\n")
                await logged("--host (MOONCAKE_PROXY_HOST) can't change while the proxy runs")
                config.write_text(good + "log_format: json\naccess_log: false\n")
                await logged('"message":"settings were read again: log_format, access_log changed"')
                got += await reply.content.read()
            assert got == b"".join(events(100))
        assert "path=/v1/completions" not in log.read_text()
        assert '"path":"/v1/completions"' not in log.read_text()


Step = tuple[str, Side | None, bool]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["http://a", "http://b"]),
            st.sampled_from(["prefill", "decode", None]),
            st.booleans(),
        ),
        max_size=8,
    )
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_whatever_is_asked_for_last_comes_true_once_the_requests_are_over(steps: list[Step]):
    asyncio.run(_become(steps))


async def _become(steps: list[Step]) -> None:
    """Each step asks for an engine's place; `busy`: it has got a request by then. Then the requests end."""
    pool = Pool(("http://a",), ("http://b",))
    membership = Membership(pool)
    leases: list[Lease] = []
    wanted: dict[str, Side | None] = {"http://a": "prefill", "http://b": "decode"}
    for url, side, busy in steps:
        if busy and url in pool and not pool[url].draining:
            leases.append(pool[url].lease(1))
        membership.become(url, side)
        wanted[url] = side
        if busy:
            await asyncio.sleep(0)
    for lease in leases:
        lease.release()
    for _ in range(10):
        await asyncio.sleep(0)
    assert {instance.url: instance.side for instance in pool} == {u: s for u, s in wanted.items() if s}
    assert not any(instance.draining for instance in pool)
    await membership.close()
