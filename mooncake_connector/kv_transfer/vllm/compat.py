"""All that differs between vLLM 0.26 and 0.33, in one place."""

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base

from mooncake_connector.errors import ConfigError

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError:  # before failed_recving
    KVConnectorTransferResults = None

WorkerMetadata: type = getattr(base, "KVConnectorWorkerMetadata", object)


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> Any:
    """What ``get_transfer_results`` returns, where vLLM has it."""
    return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)


def check_failure_reporting(kv_cache_config: Any) -> None:
    """Refuse what this vLLM can't recover: a failed load is told by block ids, which only one group makes
    unique.

    Raises:
        ConfigError: several KV cache groups on a vLLM without ``failed_recving``.
    """
    if KVConnectorTransferResults is None and len(kv_cache_config.kv_cache_groups) > 1:
        raise ConfigError(
            "this vLLM can't recover a failed load of a model with several KV cache groups: "
            "upgrade vLLM, or pass --disable-hybrid-kv-cache-manager"
        )


def transfer_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """KV cache groups that take part in transfers."""
    ids = getattr(kv_cache_config, "transfer_group_ids", None)
    return tuple(range(len(kv_cache_config.kv_cache_groups))) if ids is None else tuple(ids)


def preempted_ids(scheduler_output: Any) -> Iterable[str]:
    return getattr(scheduler_output, "preempted_req_ids", None) or ()


def adapter_name(request: Any) -> str:
    lora = getattr(request, "lora_request", None)
    return "" if lora is None else str(lora.lora_name)


def media_ids(request: Any) -> list[str]:
    """What identifies a request's images and sounds."""
    features = getattr(request, "mm_features", None) or ()
    return [str(getattr(f, "identifier", f)) for f in features]


def params_of(request: Any) -> dict[str, Any]:
    """A request's ``kv_transfer_params``; empty if it has none.

    Not every version checks that they are an object: a client can name them in ``vllm_xargs``, too, whose
    values are strings, numbers and lists.
    """
    params = request.kv_transfer_params
    return params if isinstance(params, dict) else {}
