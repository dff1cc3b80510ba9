"""End to end over rdma: the connector's worker halves with real KV tensors.

Not with a vLLM in the guest: under emulation one engine takes minutes to start (docs/transfer-engine.md).
"""

import random

import pytest

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.session import Outcome
from tests.agents import Pair
from tests.rdma.nics import Nic


@pytest.mark.parametrize("path", ["rdma", "rdma,tcp"])
def test_kv_is_pushed_layer_by_layer(nics: list[Nic], path: str) -> None:
    pair = Pair(ConnectorConfig(path=path))
    rng = random.Random(path)
    try:
        for round in range(4):
            here, there = rng.sample(range(1, 65), 24), rng.sample(range(1, 65), 24)
            untouched = [b for b in range(65) if b not in here]
            before = pair.decode.kv[:, untouched].clone()
            request = f"r{round}"
            pair.reserve(request, here)
            pair.compute(request, there, 0, 10, seed=2 * round)
            pair.compute(request, there, 10, 24, seed=2 * round + 1)
            pair.finish(request)
            report = pair.report(60)
            assert report.outcome is Outcome.LOADED, report.reason
            assert report.path == "rdma"
            assert pair.equal(there, here)
            assert bool((pair.decode.kv[:, untouched] == before).all())
        sent = pair.prefill.sent()
        over_rdma = sum(nbytes for rail, nbytes in sent.items() if rail.startswith("rdma"))
        # What is submitted before the queue pairs are made goes by tcp, where that is allowed.
        assert over_rdma >= sum(sent.values()) * (1 if path == "rdma" else 0.7), sent
        for nic in nics:
            assert any(nic.device in rail for rail in sent), f"{nic.device} carried nothing: {sent}"
    finally:
        pair.close()


def test_an_abort_spares_the_link_and_late_bytes_spare_the_blocks() -> None:
    """The initiator says that it has stopped, so no queue pair is destroyed for it."""
    pair = Pair(ConnectorConfig(path="rdma"))
    blocks = list(range(1, 30))
    try:
        for n in range(3):
            request = f"a{n}"
            pair.reserve(request, blocks)
            pair.compute(request, blocks, 0, 10, seed=n)
            pair.decode.agent.post(lambda now, r=request: pair.decode.agent.decode.abort(r, now))  # type: ignore[misc]
            assert pair.report(20).outcome is Outcome.ABORTED
            freed = pair.decode.kv.clone()
            pair.compute(request, blocks, 10, 29, seed=100 + n)
            pair.finish(request)
            pair.reserve(f"b{n}", [60 + n])
            pair.compute(f"b{n}", [60 + n], 0, 1, seed=200 + n)
            pair.finish(f"b{n}")
            report = pair.report(20)
            assert report.outcome is Outcome.LOADED, report.reason
            assert pair.equal([60 + n], [60 + n])
            assert bool((pair.decode.kv[:, :60] == freed[:, :60]).all()), "a freed block was written"
        assert len(pair.prefill.agent.engine.outbounds) == 1
    finally:
        pair.close()
