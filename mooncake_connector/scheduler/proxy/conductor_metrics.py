"""What the conductor knows and how well it predicts, as Prometheus metrics read when they are scraped."""

from collections.abc import Callable, Iterator, Sequence

import msgspec
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mooncake_connector.scheduler.policy.estimators import Calibration
from mooncake_connector.scheduler.policy.ledger import Account
from mooncake_connector.scheduler.policy.margin import Margins

PREFIX = "mooncake_proxy_"
ACCOUNTS: tuple[tuple[str, str, Callable[[Account], float]], ...] = (
    ("queue_seconds", "Predicted seconds until it could begin with another prompt.", lambda a: a.queue),
    ("queued_tokens", "Prompt tokens waiting or being computed.", lambda a: a.tokens),
    ("decode_batch", "Requests that decode, as the conductor believes.", lambda a: a.batch),
    ("decode_context_tokens", "Tokens of KV that they attend to.", lambda a: a.context),
    ("committed_tokens", "Tokens of KV of all its answers at their predicted ends.", lambda a: a.committed),
    ("predicted_tbt_seconds", "Predicted time between two tokens now.", lambda a: a.tbt),
)


class ConductorMetrics(Collector):
    """Reads the conductor's books.

    Args:
        accounts: every engine's load now.
        waiting: requests that wait to be let in.
        margins: on what is predicted of TTFT and TBT.
        blocks: that the prefix index knows.
    """

    def __init__(
        self,
        accounts: Callable[[], Sequence[Account]],
        waiting: Callable[[], int],
        margins: Callable[[], Margins],
        blocks: Callable[[], int],
        calibration: Calibration,
    ) -> None:
        self._accounts = accounts
        self._waiting = waiting
        self._margins = margins
        self._blocks = blocks
        self._calibration = calibration

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All families, whether or not there is something in them."""
        accounts = self._accounts()
        for name, text, read in ACCOUNTS:
            family = GaugeMetricFamily(PREFIX + name, text, labels=["side", "engine"])
            for account in accounts:
                family.add_metric([account.side, account.name], read(account))
            yield family
        yield GaugeMetricFamily(PREFIX + "waiting", "Requests that wait to be let in.", self._waiting())
        yield GaugeMetricFamily(PREFIX + "index_blocks", "KV blocks in the prefix index.", self._blocks())
        margin = GaugeMetricFamily(
            PREFIX + "margin", "By how much predictions are taken to fall short.", labels=["slo"]
        )
        for slo, factor in msgspec.structs.asdict(self._margins()).items():
            margin.add_metric([slo], factor)
        yield margin
        yield from self._predictions()

    def _predictions(self) -> Iterator[GaugeMetricFamily]:
        ratio = GaugeMetricFamily(
            PREFIX + "observed_over_predicted", "Quantiles of the recent past.", labels=["what", "quantile"]
        )
        error = GaugeMetricFamily(
            PREFIX + "prediction_error",
            "Quantiles of the absolute error: seconds, or tokens of output.",
            labels=["what", "quantile"],
        )
        count = GaugeMetricFamily(
            PREFIX + "predictions", "Predictions that came true or not.", labels=["what"]
        )
        for what in self._calibration.quantities():
            if found := self._calibration.summary(what):
                for quantile, value in zip(("0.1", "0.5", "0.9"), found.ratio, strict=True):
                    ratio.add_metric([what, quantile], value)
                for quantile, value in zip(("0.5", "0.9"), found.error, strict=True):
                    error.add_metric([what, quantile], value)
                count.add_metric([what], found.observations)
        yield from (ratio, error, count)
