"""Two workers' halves of the connector over real sockets, with real KV tensors."""

import random
from collections.abc import Iterator

import pytest

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.session import Outcome
from tests.agents import Pair


@pytest.fixture(params=["process_vm", "tcp", "tcp with checksums"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    path, _, checksum = request.param.partition(" ")
    made = Pair(ConnectorConfig(path=path, checksum=bool(checksum)))
    yield made
    made.close()


def test_kv_arrives_in_its_blocks_and_only_there(pair: Pair) -> None:
    rng = random.Random(1)
    for round in range(5):
        here, there = rng.sample(range(1, 65), 24), rng.sample(range(1, 65), 24)
        untouched = [b for b in range(65) if b not in here]
        before = pair.decode.kv[:, untouched].clone()
        request = f"r{round}"
        if round % 2:
            pair.reserve(request, here)
        pair.compute(request, there, 0, 10, seed=2 * round)
        pair.compute(request, there, 10, 24, seed=2 * round + 1)
        pair.finish(request)
        if not round % 2:
            pair.reserve(request, here)
        report = pair.report(10)
        assert report.outcome is Outcome.LOADED, report.reason
        assert report.nbytes == pair.decode.kv[:, here].numel() * 2
        assert pair.equal(there, here)
        assert bool((pair.decode.kv[:, untouched] == before).all())


def test_an_abort_frees_both_sides(pair: Pair) -> None:
    blocks = list(range(1, 20))
    pair.reserve("r", blocks)
    pair.compute("r", blocks, 0, 5, seed=1)
    pair.decode.agent.post(lambda now: pair.decode.agent.decode.abort("r", now))
    assert pair.report(5).outcome is Outcome.ABORTED
    pair.finish("r")
    assert not pair.decode.agent.decode.num_loads
