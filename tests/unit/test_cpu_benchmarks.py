"""What the benchmarks on CPU engines conclude from what they measured."""

import pytest

from benchmarks import cpu_replay, overload
from mooncake_connector.scheduler.simulator.costs import pairs


def test_costs_are_found_again_from_what_they_cost() -> None:
    def prompt(tokens: int) -> list[float]:
        return [
            tokens,
            0.005 + 1e-6 * tokens,
            0.003 + 5e-5 * tokens + 2e-8 * pairs(0, tokens),
            0.012 + 2e-6 * tokens,
        ]

    kinds = [(1, 100), (1, 2000), (4, 400), (4, 4000), (16, 1600)]
    measured = {
        "prompts": [prompt(tokens) for tokens in cpu_replay.LENGTHS],
        "batches": [[count, kv, 0.003 + 1e-4 * count + 4e-7 * kv] for count, kv in kinds],
    }
    costs = cpu_replay.fit(measured, "a test")
    found = (costs.base, costs.per_sequence, costs.per_context, costs.per_token, costs.per_pair)
    assert found == pytest.approx((0.003, 1e-4, 4e-7, 5e-5, 2e-8), rel=0.01)
    assert (costs.ingress, costs.ingress_per_token) == pytest.approx((0.005, 1e-6), rel=0.01)
    assert (costs.handoff, costs.egress_per_token) == pytest.approx((0.012 - 0.0031, 2e-6), rel=0.01)


def test_who_was_let_in_and_not_answered_in_time_broke_a_promise() -> None:
    kept = overload.Sent(prompt=9, output=9, status=200, ttft=0.9, tbt=0.01)
    late = overload.Sent(prompt=9, output=9, status=200, ttft=1.1, tbt=0.01)
    slow = overload.Sent(prompt=9, output=9, status=200, ttft=0.9, tbt=0.03)
    given_up = overload.Sent(prompt=9, output=9)
    rejected = overload.Sent(prompt=9, output=9, status=429)
    found = overload.phase([kept, late, slow, given_up, rejected], 2.0, (1.0, 0.02))
    assert found["goodput"] == 0.5
    assert found["rejected_ratio"] == pytest.approx(20)
    assert found["admitted_within_slo"] == 25
    assert found["admitted_within_ttft"] == found["admitted_within_tbt"] == 50
    assert found["unanswered"] == 1
