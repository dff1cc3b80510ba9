"""DONE brings prefill's first token where decode asked for it, and waits for nothing where it did not."""

import queue
from collections.abc import Iterator, Sequence

import pytest

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.messages import LoadReport, LocalReserve, WantBlocks, pack_blocks
from mooncake_connector.kv_transfer.session import Outcome
from tests.agents import BLOCK, PROMPT, Pair

BLOCKS = list(range(1, 9))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(ConnectorConfig(path="tcp"))
    yield made
    made.close()


def reserve(pair: Pair, blocks: Sequence[int]) -> None:
    want = WantBlocks(pack_blocks(range(len(blocks))), pack_blocks(blocks))
    tokens = len(BLOCKS) * BLOCK
    address = pair.prefill.agent.address
    message = LocalReserve(b"", "r", "p", address, "r", PROMPT, tokens, (want,), first_token=True)
    pair.decode.agent.post(lambda now: pair.decode.agent.decode.reserve(message, now))


def sampled(pair: Pair, token: int) -> None:
    pair.prefill.agent.post(lambda now: pair.prefill.agent.prefill.first_token("r", token, now))


@pytest.mark.parametrize("late", [False, True], ids=["reserved first", "computed first"])
def test_done_waits_for_the_token(pair: Pair, late: bool) -> None:
    if not late:
        reserve(pair, BLOCKS)
    pair.compute("r", BLOCKS, 0, len(BLOCKS), seed=1)
    if late:
        reserve(pair, BLOCKS)
    with pytest.raises(AssertionError):
        pair.report(0.5)
    sampled(pair, 42)
    report = pair.report(5)
    assert report.outcome is Outcome.LOADED
    assert report.first_token == 42
    assert not report.token_only
    assert report.reserve_sent > 0
    assert 0 < report.first_write <= report.landed <= report.done
    assert report.done - report.landed > 0.3, "the wait for the token counts as pushing"
    assert report.push_s < 0.3
    assert pair.equal(BLOCKS, BLOCKS)


def test_the_token_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode's cache has the prompt: nothing is to be written, and only our scheduler side is told."""
    told: queue.SimpleQueue[LoadReport] = queue.SimpleQueue()
    monkeypatch.setattr(pair.decode.agent.decode._ports, "report", told.put)
    pair.compute("r", BLOCKS, 0, len(BLOCKS), seed=1)
    reserve(pair, [])
    sampled(pair, 42)
    report = told.get(timeout=5)
    assert report.outcome is Outcome.LOADED
    assert report.first_token == 42
    assert report.token_only
    assert report.nbytes == 0


def test_nobody_asked(pair: Pair) -> None:
    pair.reserve("r", BLOCKS)
    pair.compute("r", BLOCKS, 0, len(BLOCKS), seed=1)
    report = pair.report(5)
    assert report.outcome is Outcome.LOADED
    assert report.first_token == -1
