"""Pools that change while they serve: engines are added, drained and removed, and no request is lost."""

import asyncio

import pytest

from mooncake_connector.scheduler.engines.pool import PoolError
from mooncake_connector.scheduler.policy.scheduling import Scheduling
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, WITHIN, FakeEngine, events
from tests.proxy.test_failures import idle

TEXT = {"model": MODEL, "prompt": "one two three four", "max_tokens": 7}
STREAM = {**TEXT, "stream": True}
PATH = "/v1/completions"


async def generate(setting: Setting, body: dict = STREAM) -> bytes:
    async with setting.http.post(PATH, json=body) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.read()


def slow(engine: FakeEngine) -> None:
    engine.stream, engine.gap = events(20), 0.02


async def test_a_drained_engine_ends_what_it_has_and_gets_no_more(start: Start):
    setting = await start(1, 2)
    first, second = setting.decode
    slow(first)
    slow(second)
    running = asyncio.create_task(generate(setting))
    await setting.settled(lambda _: first.calls or second.calls)
    busy, other = (first, second) if first.calls else (second, first)
    instance = setting.proxy.pool.drain(busy.url)
    emptied = asyncio.create_task(instance.emptied())
    for _ in range(3):
        assert await generate(setting) == b"".join(events(20))
    assert [len(busy.calls), len(other.calls)] == [1, 3]
    assert await running == b"".join(events(20))
    await asyncio.wait_for(emptied, WITHIN)
    async with setting.http.get("/health") as reply:
        states = {each["url"]: each["state"] for each in (await reply.json())["decode"]}
    assert states == {busy.url: "draining", other.url: "up"}
    assert setting.count("engine_draining", side="decode", engine=busy.url) == 1

    setting.proxy.pool.undrain(busy.url)
    setting.proxy.pool.drain(other.url)
    await generate(setting)
    assert len(busy.calls) == 2


async def test_prefill_is_not_empty_before_decode_has_what_it_computed(start: Start):
    setting = await start()
    setting.decode[0].first_gap = 0.3
    running = asyncio.create_task(generate(setting))
    call = await setting.prefill[0].call()
    await asyncio.wait_for(call.over.wait(), WITHIN)
    instance = setting.proxy.pool.drain(setting.prefill[0].url)
    await setting.settled(lambda _: instance.requests == 0)
    assert instance.transfers == 1
    await asyncio.wait_for(instance.emptied(), WITHIN)
    assert await running == b"".join(events())


async def test_an_engine_that_restarts_while_it_is_drained_stays_drained(start: Start):
    setting = await start(1, 2)
    engine = setting.decode[0]
    instance = setting.proxy.pool.drain(engine.url)
    await engine.stop()
    await setting.settled(lambda _: not instance.up)
    engine.engine_id = "another"
    await engine.start()
    await setting.settled(lambda _: instance.up)
    for _ in range(4):
        await generate(setting)
    assert engine.calls == []
    setting.proxy.pool.undrain(engine.url)
    setting.proxy.pool.drain(setting.decode[1].url)
    await generate(setting)
    assert len(engine.calls) == 1


@pytest.mark.parametrize("how", ["drained", "down"])
async def test_an_engine_that_comes_back_has_the_requests_that_it_had(start: Start, how: str):
    setting = await start(1, 2, scheduling=Scheduling(routing="least_loaded"))
    busy, other = setting.decode
    for engine in setting.decode:
        engine.goes_on.clear()
    running = [asyncio.create_task(generate(setting)) for _ in setting.decode]
    for engine in setting.decode:
        await engine.call()
    instance = setting.proxy.pool[busy.url]
    if how == "drained":
        setting.proxy.pool.drain(busy.url)
    else:
        instance.mark_down("a test says so")
    assert not instance.usable
    assert answers(setting) == {busy.url: 1, other.url: 1}
    other.goes_on.set()
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    if how == "drained":
        setting.proxy.pool.undrain(busy.url)
    # Whoever is marked down is probed again.
    await setting.settled(lambda _: instance.usable and answers(setting) == {busy.url: 1, other.url: 0})
    for _ in range(3):
        await asyncio.wait_for(generate(setting), WITHIN)
        await setting.settled(lambda _: answers(setting)[other.url] == 0)
    assert [len(busy.calls), len(other.calls)] == [1, 4]
    busy.goes_on.set()
    assert [await task for task in running] == [b"".join(events())] * 2
    await setting.settled(lambda _: idle(setting))


def answers(setting: Setting) -> dict[str, int]:
    """What decode engines have by the conductor's books."""
    accounts = setting.proxy.conductor.accounts(0.0)
    return {account.name: account.answers for account in accounts if account.side == "decode"}


async def test_an_added_engine_is_probed_and_serves(start: Start):
    setting = await start()
    pool = setting.proxy.pool
    another = FakeEngine("kv_consumer")
    await another.start()
    try:
        added = pool.add(another.url, "decode")
        await setting.settled(lambda _: added.up)
        pool.drain(setting.decode[0].url)
        await generate(setting)
        assert len(another.calls) == 1
        assert setting.count("engine_up", side="decode", engine=another.url) == 1
        with pytest.raises(PoolError, match="is in the decode pool already"):
            pool.add(another.url, "prefill")
    finally:
        await another.stop()


async def test_removal_waits_for_the_last_request_and_leaves_nothing_behind(start: Start):
    setting = await start(2, 2)
    proxy = setting.proxy
    for engine in setting.decode:
        slow(engine)
    running = asyncio.create_task(generate(setting))
    await setting.settled(lambda _: any(engine.calls for engine in setting.decode))
    busy = next(engine for engine in setting.decode if engine.calls)
    removing = asyncio.create_task(proxy.pool.remove(busy.url))
    await asyncio.sleep(0.05)
    assert not removing.done()
    with pytest.raises(PoolError, match="leaves when its last request ended"):
        proxy.pool.add(busy.url, "decode")
    assert await running == b"".join(events(20))
    await asyncio.wait_for(removing, WITHIN)
    assert busy.url not in proxy.pool
    assert busy.url not in proxy.index
    assert busy.url not in {account.name for account in proxy.conductor.accounts(0.0)}
    async with setting.http.get("/metrics") as reply:
        assert busy.url not in await reply.text()
    probes, checks = busy.probes, len(busy.calls)
    await busy.stop()
    await generate(setting)
    assert (busy.probes, len(busy.calls)) == (probes, checks)
    with pytest.raises(PoolError, match="is in no pool"):
        proxy.pool.drain(busy.url)
    # It may come back, even on the other side.
    assert not proxy.pool.add(busy.url, "prefill").removed


async def test_a_removal_that_is_called_off_leaves_the_engine_drained(start: Start):
    setting = await start(1, 2)
    pool = setting.proxy.pool
    instance = pool[setting.decode[0].url]
    lease = instance.lease(1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pool.remove(instance.url), 0.05)
    assert instance.draining
    assert instance.url in pool
    removing = asyncio.create_task(pool.remove(instance.url))
    await asyncio.sleep(0)
    pool.undrain(instance.url)
    lease.release()
    with pytest.raises(PoolError, match="was undrained"):
        await removing
    assert instance.usable


async def test_those_that_wait_for_their_turn_do_not_go_to_a_removed_engine(start: Start):
    setting = await start(1, 1)
    pool = setting.proxy.pool
    place = setting.proxy.steering.place
    url = setting.decode[0].url
    another = FakeEngine("kv_consumer")
    await another.start()
    try:
        added = pool.add(another.url, "decode")
        await setting.settled(lambda _: added.up)
        pool.drain(another.url)
        tries = 0

        async def late(*args, **options):
            nonlocal tries
            journey = await place(*args, **options)
            tries += 1
            if tries == 1:
                assert journey.placement.decode == url
                pool.undrain(another.url)
                await pool.remove(url)
            return journey

        setting.proxy.steering.place = late
        assert await generate(setting) == b"".join(events())
        assert (tries, len(another.calls)) == (2, 1)
    finally:
        await another.stop()
