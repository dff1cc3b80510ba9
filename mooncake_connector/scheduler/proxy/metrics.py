"""The proxy's Prometheus metrics, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mooncake_connector.scheduler.engines.pool import Pool
from mooncake_connector.scheduler.proxy.pool_metrics import PoolMetrics
from mooncake_connector.scheduler.proxy.retry_budget import RetryBudget

# What `step_seconds` tells of: the names, and the moments of a request's timeline from and to.
STEPS = {
    "dispatch": ("received", "decode_sent"),
    "hand_over": ("prefill_answer", "decode_first"),
    "answer": ("decode_first", "decode_end"),
}
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)


class ProxyMetrics:
    """Counters the handlers move, and what `PoolMetrics` reads from the pool when scraped."""

    def __init__(self, pool: Pool, budget: RetryBudget) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mooncake_proxy_requests",
            "Requests by how they ended.",
            ["path", "outcome"],
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "mooncake_proxy_time_to_first_byte_seconds",
            "From the request's arrival to the first byte of a streamed answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "mooncake_proxy_request_seconds",
            "From the request's arrival to its answer's last byte.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prefill_seconds = Histogram(
            "mooncake_proxy_prefill_seconds",
            "Prefill calls that succeeded.",
            buckets=SECONDS,
            registry=self.registry,
        )
        steps = Histogram(
            "mooncake_proxy_step_seconds",
            "dispatch: until decode is asked; hand_over: from prefill's answer to decode's first bytes; "
            "answer: from those to the last.",
            ["step"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.step_seconds = {name: steps.labels(name) for name in STEPS}
        self.first_tokens = Counter(
            "mooncake_proxy_first_tokens",
            "Streams by whose first token the client got, where prefill's could have been.",
            ["by"],
            registry=self.registry,
        )
        self.retries = Counter(
            "mooncake_proxy_retries",
            "Further attempts, by the side that failed.",
            ["side"],
            registry=self.registry,
        )
        self.retries_refused = Counter(
            "mooncake_proxy_retries_refused",
            "Further attempts that the retry budget did not allow.",
            registry=self.registry,
        )
        Gauge(
            "mooncake_proxy_retry_budget", "Further attempts that may be made now.", registry=self.registry
        ).set_function(lambda: budget.left)
        self.prefill_skipped = Counter(
            "mooncake_proxy_prefill_skipped",
            "Requests that decode served alone, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.rejected = Counter(
            "mooncake_proxy_rejected",
            "Requests answered with 429 by the proxy itself, by the promise that would have been broken.",
            ["target"],
            registry=self.registry,
        )
        self.waited_seconds = Histogram(
            "mooncake_proxy_waited_seconds",
            "How long requests waited to be let in, those that had to.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.cached_tokens = Counter(
            "mooncake_proxy_cached_tokens",
            "Prompt tokens that the chosen engine was expected to hold already, copies included.",
            registry=self.registry,
        )
        self.copies = Counter(
            "mooncake_proxy_copies",
            "Copies of prefixes between engines: copied, failed, or refused (too many, or roles forbid it).",
            ["outcome"],
            registry=self.registry,
        )
        self.copied_tokens = Counter(
            "mooncake_proxy_copied_tokens", "Prompt tokens copied between engines.", registry=self.registry
        )
        self.registry.register(PoolMetrics(pool))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
