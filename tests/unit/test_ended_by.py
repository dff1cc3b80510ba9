"""Waiting for decode while prefill works, moment by moment."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.proxy import ended_by
from mooncake_connector.scheduler.proxy.answer import DecodeFailed, PrefillFailed
from mooncake_connector.scheduler.proxy.ended_by import EndedBy


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@given(
    prefill=st.sampled_from(["fails", "ends", "is cancelled"]),
    prefill_turns=st.integers(0, 6),
    decode=st.sampled_from(["answers", "fails"]),
    decode_turns=st.integers(0, 6),
    began=st.booleans(),
)
def test_one_of_both_decides_and_nothing_comes_after(
    prefill: str, prefill_turns: int, decode: str, decode_turns: int, began: bool
):
    """Whatever comes first, in whichever turn: its result is the result, and the task goes on uncancelled."""

    async def run() -> None:
        async def computing() -> bytes:
            await turns(prefill_turns)
            if prefill == "fails":
                raise PrefillFailed("p")
            if prefill == "is cancelled":
                raise asyncio.CancelledError
            return b""

        task = asyncio.create_task(computing())
        if began:
            await turns(3)
        found = ""
        try:
            async with EndedBy(task):
                await turns(decode_turns)
                if decode == "fails":
                    raise DecodeFailed("d")
                found = "answer"
        except PrefillFailed:
            found = "prefill"
        except DecodeFailed:
            found = "decode"
        expected = "answer" if decode == "answers" else "decode"
        assert found in {expected, "prefill"} if prefill == "fails" else found == expected
        current = asyncio.current_task()
        assert current
        await turns(10)  # a late callback would cancel it here
        assert not current.cancelling()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


async def test_prefill_that_failed_before_ends_the_wait():
    async def computing() -> bytes:
        raise PrefillFailed("p")

    task = asyncio.create_task(computing())
    await turns(3)
    with pytest.raises(PrefillFailed):
        async with asyncio.timeout(5), EndedBy(task):
            await asyncio.sleep(60)


@pytest.mark.parametrize("answers", [True, False])
async def test_what_prefill_refuses_decode_may_answer_for_a_while(
    answers: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ended_by, "REFUSAL_GRACE", 60.0 if answers else 0.05)

    async def computing() -> bytes:
        raise PrefillFailed("p", refused=True)

    task = asyncio.create_task(computing())
    goes_on = asyncio.Event()
    if answers:
        asyncio.get_running_loop().call_later(0.02, goes_on.set)
        async with asyncio.timeout(5), EndedBy(task):
            await goes_on.wait()
        return
    with pytest.raises(PrefillFailed):
        async with asyncio.timeout(5), EndedBy(task):
            await goes_on.wait()


async def test_who_is_cancelled_from_outside_is_cancelled():
    async def computing() -> bytes:
        await asyncio.sleep(60)
        return b""

    async def waiting() -> None:
        async with EndedBy(task):
            await asyncio.sleep(60)

    task = asyncio.create_task(computing())
    waits = asyncio.create_task(waiting())
    await turns(2)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert not task.done()
    task.cancel()
