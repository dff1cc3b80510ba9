"""Predicted against observed."""

import math
import random

import pytest

from mooncake_connector.scheduler.policy.estimators import Calibration


def test_quantiles_of_ratio_and_error_and_the_covered_share() -> None:
    calibration, rng = Calibration(), random.Random(2)
    ratios = []
    for _ in range(900):
        ratios.append(rng.lognormvariate(0.3, 0.4))
        calibration.observe("ttft", 2.0, 2.0 * ratios[-1])
    ratios.sort()
    found = calibration.summary("ttft")
    assert found is not None
    assert found.observations == 900
    assert found.ratio == pytest.approx((ratios[90], ratios[450], ratios[810]), rel=0.1)
    errors = sorted(abs(ratio - 1) * 2 for ratio in ratios)
    assert found.error == pytest.approx((errors[450], errors[810]), rel=0.1)
    assert found.covered == pytest.approx(sum(ratio <= 1 for ratio in ratios) / 900, abs=0.05)


def test_what_is_long_ago_counts_no_more() -> None:
    calibration = Calibration()
    for _ in range(5000):
        calibration.observe("tbt", 1.0, 10.0)
    # Past the point where weights are made small again.
    for _ in range(40_000):
        calibration.observe("tbt", 1.0, 2.0)
    for q in (0.001, 0.5, 0.9999):
        assert calibration.ratio("tbt", q) == pytest.approx(2.0, rel=0.03)
    assert calibration.error("tbt", 0.99) == pytest.approx(1.0, rel=0.03)


def test_a_perfect_prediction_has_no_error_and_nothings_are_taken() -> None:
    calibration = Calibration()
    calibration.observe("prefill", 1.5, 1.5)
    assert calibration.error("prefill", 0.9) == 0
    assert calibration.ratio("prefill", 0.5) == pytest.approx(1, rel=0.03)
    calibration.observe("prefill", 0.0, 3.0)
    calibration.observe("prefill", 3.0, 0.0)
    assert calibration.ratio("prefill", 1.0) > 1e6


def test_a_quantity_that_was_not_observed_is_not_known() -> None:
    calibration = Calibration()
    assert calibration.summary("ttft") is None
    assert math.isnan(calibration.ratio("ttft", 0.5))
    assert math.isnan(calibration.error("ttft", 0.5))
    calibration.observe("ttft", 1.0, 1.0)
    assert calibration.quantities() == ["ttft"]
