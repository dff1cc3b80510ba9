"""Where this engine publishes its KV events, as others can reach it."""

from typing import Any

from mooncake_connector.kv_transfer.side_channel import address_of


def event_source(vllm_config: Any, host: str) -> dict[str, str] | None:
    """For the probe's answer; None if it publishes none, or where nobody can subscribe.

    vLLM listens at endpoints with a wildcard host and at ``ipc://``; to all others it connects, where a
    collector is expected. A port that the system chooses is known to nobody but the publisher.

    Args:
        vllm_config: vLLM's configuration.
        host: at which this engine is reached.
    """
    config = getattr(vllm_config, "kv_events_config", None)
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        return None
    rank = _rank(vllm_config.parallel_config)
    if not (endpoint := _reachable(config.endpoint, host, rank)):
        return None
    replay = config.replay_endpoint
    return {
        "endpoint": endpoint,
        "replay_endpoint": (_reachable(replay, host, rank, listens=True) or "") if replay else "",
        "topic": config.topic,
    }


def _rank(parallel_config: Any) -> int:
    # Of dense models vLLM makes each rank an engine of rank 0, but numbers their publishers on.
    rank = getattr(parallel_config, "data_parallel_index", None)
    return int(parallel_config.data_parallel_rank if rank is None else rank)


def _reachable(endpoint: str, host: str, rank: int, *, listens: bool = False) -> str | None:
    """The address to connect to for one that vLLM was given; `listens`: it does whatever the host."""
    if endpoint.startswith("ipc://"):
        return endpoint if rank == 0 else None
    if not endpoint.startswith("tcp://"):
        return None
    name, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    wildcard = name in ("*", "0.0.0.0", "[::]", "::")
    if not port.isdecimal() or int(port) == 0 or not (listens or "*" in name or "::" in name):
        return None
    return address_of(host if wildcard else name.strip("[]"), int(port) + rank)
