"""What the conductor expects of engines and links: costs learned online."""

import random

import pytest

from mooncake_connector.scheduler.estimators import Estimators, PrefillCost, PrefillEstimator


def test_before_any_data_the_prior_is_what_is_expected() -> None:
    prior = PrefillCost(0.5, 1e-3, 1e-8)
    assert PrefillEstimator(prior).seconds("a", 1000, 200) == pytest.approx(prior.seconds(1000, 200))


@pytest.mark.parametrize(
    "true", [PrefillCost(0.005, 5e-5, 2e-9), PrefillCost(0.3, 2e-3, 1e-8), PrefillCost(1e-3, 1e-6, 1e-11)]
)
def test_prefill_is_learned_under_noise_and_stalls(true: PrefillCost) -> None:
    estimator, rng = Estimators().prefill, random.Random(1)
    for at in range(1500):
        tokens = int(rng.lognormvariate(8.5, 1.2)) + 1
        cached = rng.choice([0, 0, tokens // 2, tokens - 1])
        stall = 5.0 if rng.random() < 0.02 else 0.0
        seconds = true.seconds(tokens, cached) * rng.lognormvariate(0, 0.1) + stall
        estimator.observe("abc"[at % 3], tokens, cached, seconds)
    for tokens, cached in ((100, 0), (2000, 0), (10_000, 5000), (100_000, 0)):
        assert estimator.seconds("a", tokens, cached) == pytest.approx(true.seconds(tokens, cached), rel=0.1)
