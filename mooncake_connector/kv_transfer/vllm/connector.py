"""MooncakePushConnector: the class that vLLM loads. Splits its calls over scheduler side and worker side."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.request import RequestStatus

from mooncake_connector.config import load_connector_config
from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.session import Outcome
from mooncake_connector.kv_transfer.vllm import compat
from mooncake_connector.kv_transfer.vllm.logs import log_with_vllm
from mooncake_connector.kv_transfer.vllm.metadata import StepMetadata, WorkerHandshake
from mooncake_connector.kv_transfer.vllm.scheduler_side import SchedulerSide
from mooncake_connector.kv_transfer.vllm.worker_side import WorkerSide

_COMPLETED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


class MooncakePushConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector interface (``KVConnectorBase_V1``); see `SchedulerSide` and `WorkerSide`.

    Raises:
        ConfigError: a setting, or a model whose KV can't be moved.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_with_vllm()
        config = load_connector_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        _check_parallelism(vllm_config.parallel_config)
        _check_scales(vllm_config.cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config)
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, config)
        compat.check_failure_reporting(kv_cache_config)
        self._invalid_blocks: set[int] = set()

    @property
    def _s(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler-side call on a worker-side connector"
        return self._scheduler

    @property
    def _w(self) -> WorkerSide:
        assert self._worker is not None, "a worker-side call on a scheduler-side connector"
        return self._worker

    # ------------------------------------------------------------------ worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._w.register(kv_caches)

    def get_handshake_metadata(self) -> WorkerHandshake | None:
        return self._w.handshake

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self._w.step_begins(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads start when the scheduler allocates their blocks, not here: a step would be lost."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: a request is scheduled once its KV is complete."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._w.layer_written(layer_name)

    def wait_for_save(self) -> None:
        self._w.step_ended()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        sent, loads = self._w.results()
        failed = {load.request_id for load in loads if load.outcome is not Outcome.LOADED}
        return compat.transfer_results(sent, {load.request_id for load in loads}, failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Called by vLLM versions without ``get_transfer_results``: failed loads are told by their blocks."""
        sent, loads = self._w.results()
        self._invalid_blocks.update(block for load in loads for block in load.failed_blocks)
        return sent or None, {load.request_id for load in loads} or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def build_connector_worker_meta(self) -> Any:
        return self._w.for_scheduler()

    # ------------------------------------------------------------------ scheduler

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, WorkerHandshake]) -> None:
        self._s.connect_workers({(0, tp): handshake for tp, handshake in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], WorkerHandshake]
    ) -> None:
        self._s.connect_workers(metadata)

    def on_new_request(self, request: Any) -> None:
        self._s.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._s.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._s.blocks_allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._s.step_metadata(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        connector_output.finished_recving = self._s.loaded(connector_output.finished_recving or set())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._s.request_finished(request, request.status in _COMPLETED)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._s.request_finished(request, request.status in _COMPLETED)

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()


def _check_parallelism(parallel: Any) -> None:
    for flag, size in (
        ("--data-parallel-size", parallel.data_parallel_size),
        ("--decode-context-parallel-size", getattr(parallel, "decode_context_parallel_size", 1)),
        ("--prefill-context-parallel-size", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if size > 1:
            mend = "start one server per data-parallel rank" if "data" in flag else f"leave {flag} at 1"
            raise ConfigError(f"MooncakePushConnector does not support {flag} {size} yet: {mend}")


def _check_scales(cache: Any) -> None:
    if getattr(cache, "calculate_kv_scales", False):
        raise ConfigError(
            "with --calculate-kv-scales each engine reads fp8 KV by scales of its own: decode would misread "
            "prefill's: leave it away (scales come from the checkpoint, or are 1)"
        )
