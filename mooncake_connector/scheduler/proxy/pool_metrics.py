"""Each engine's state as Prometheus metrics, read from the pool when they are scraped."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mooncake_connector.scheduler.engines.pool import Instance, Pool

PREFIX = "mooncake_proxy_"
GAUGES: tuple[tuple[str, str, Callable[[Instance], float]], ...] = (
    ("inflight", "Requests in flight.", lambda i: i.requests),
    ("inflight_tokens", "Estimated prompt tokens in flight.", lambda i: i.tokens),
    ("inflight_transfers", "Prompts whose KV decode may not have got yet.", lambda i: i.transfers),
    ("engine_up", "1 if the engine answers and fits its pool.", lambda i: i.up),
    ("engine_draining", "1 if it gets no further requests.", lambda i: i.draining),
    ("engine_restarts", "Restarts seen.", lambda i: i.restarts),
    (
        "engine_breaker",
        "0: closed, 1: half open (on trial), 2: open (left out, as requests failed there).",
        lambda i: ("closed", "half_open", "open").index(i.breaker.state(i.clock())),
    ),
)


class PoolMetrics(Collector):
    """Of the engines that are in the pools at that moment."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """All families, each with every engine."""
        for name, text, read in GAUGES:
            family = GaugeMetricFamily(PREFIX + name, text, labels=["side", "engine"])
            for instance in self._pool:
                family.add_metric([instance.side, instance.url], read(instance))
            yield family
        opened = CounterMetricFamily(
            PREFIX + "breaker_opened",
            "How often requests' failures had it left out.",
            labels=["side", "engine"],
        )
        for instance in self._pool:
            opened.add_metric([instance.side, instance.url], instance.breaker.opened)
        yield opened
