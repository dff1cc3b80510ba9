"""The half of the connector that lives in each worker process: feeds the agent, reports what it finished."""

import logging
import math
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank

from mooncake_connector import __version__
from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.agent import WorkerAgent
from mooncake_connector.kv_transfer.layout import WorkerInfo
from mooncake_connector.kv_transfer.messages import PROTOCOL
from mooncake_connector.kv_transfer.ports import LoadReport
from mooncake_connector.kv_transfer.vllm import first_token
from mooncake_connector.kv_transfer.vllm.kv_layout import layout_of, model_hash
from mooncake_connector.kv_transfer.vllm.metadata import LoadReports, StepMetadata, WorkerHandshake

logger = logging.getLogger(__name__)

# An engine whose requests all wait for KV steps a thousand times a second, on a processor that prefill may
# need. Waiting inside such a step for what it is about spares that, and the news arrives with the very step.
IDLE_WAIT_S = 0.003
# Steps that vLLM may have under way: after news, the step that acts on it must not wait behind idle ones.
STEPS_IN_FLIGHT = 2
SWITCH_INTERVAL_S = 0.0005


class WorkerSide:
    """Worker-side state. The engine's thread calls; the agent's thread does the work."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig) -> None:
        self._vllm_config, self._kv_cache_config, self._config = vllm_config, kv_cache_config, config
        self._agent: WorkerAgent | None = None
        self._layers: dict[str, int] = {}
        self._token_bytes = 0.0
        self._wake_after = 1
        self._meta: StepMetadata | None = None
        self._since_wake = 0
        self._empty_handed = 0
        self._reports: list[LoadReport] = []

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The KV caches exist: start serving them."""
        config = self._vllm_config
        model, parallel = config.model_config, config.parallel_config
        context = config.compilation_config.static_forward_context
        backends = {name: _backend(context.get(name)) for name in kv_caches}
        layout, self._layers = layout_of(kv_caches, self._kv_cache_config, backends)
        info = WorkerInfo(
            protocol=PROTOCOL,
            plugin=__version__,
            engine=f"vllm {vllm.__version__}",
            engine_id=config.kv_transfer_config.engine_id,
            incarnation=secrets.token_hex(4),
            model=str(model.model),
            model_hash=model_hash(model),
            dtype=str(model.dtype).removeprefix("torch."),
            tp_size=parallel.tensor_parallel_size,
            pp_size=parallel.pipeline_parallel_size,
            rank=get_tensor_model_parallel_rank(),
            layout=layout,
        )
        blocks = sum(plane.nbytes for plane in layout.planes)
        self._token_bytes = blocks / layout.groups[0].block_size / len(self._layers)
        # The I/O thread's hand-overs are short and urgent; by default it may wait 5 ms for the interpreter.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._agent = WorkerAgent(info, self._config)

    @property
    def handshake(self) -> WorkerHandshake | None:
        agent = self._agent
        if agent is None:
            return None
        forces = first_token.install(self._vllm_config)
        return WorkerHandshake(agent.address, agent.token, agent.info, forces)

    def step_begins(self, meta: StepMetadata) -> None:
        self._meta = meta
        first_token.force(meta.first_tokens)
        # Waking the I/O thread takes the interpreter from the forward pass: only where it will find enough
        # to push.
        layer_bytes = self._token_bytes * sum(chunk.end - chunk.start for chunk in meta.chunks)
        self._wake_after = max(1, math.ceil(self._config.push_bytes / max(layer_bytes, 1.0)))
        self._since_wake = 0
        if self._agent is not None and (meta.chunks or meta.preempted or meta.ended):
            self._agent.step(meta.step, meta.chunks, meta.preempted, meta.ended)

    def layer_written(self, layer_name: str) -> None:
        """The layer's KV of this step is in memory."""
        if self._agent is None or self._meta is None or not self._meta.chunks:
            return
        if (layer := self._layers.get(layer_name)) is None:
            return
        self._agent.clock.layer_written(layer, self._meta.step)
        self._since_wake += 1
        last = layer == len(self._layers) - 1
        if self._agent.busy and (last or self._since_wake >= self._wake_after):
            self._since_wake = 0
            self._agent.wake()

    def step_ended(self) -> None:
        if self._agent is None or self._meta is None:
            return
        self._agent.clock.step_ended(self._meta.step)
        if self._meta.chunks:
            self._agent.wake()

    def results(self) -> tuple[set[str], list[LoadReport]]:
        """Since the last call: requests whose blocks may be freed, and loads that ended."""
        agent = self._agent
        if agent is None:
            return set(), []
        if self._meta is not None and self._meta.idle and self._empty_handed > STEPS_IN_FLIGHT:
            agent.results_ready.wait(IDLE_WAIT_S)
        agent.results_ready.clear()
        taken = time.monotonic()
        sent = agent.take_sent()
        loads = [msgspec.structs.replace(load, taken=taken) for load in agent.take_reports()]
        self._empty_handed = 0 if sent or loads else self._empty_handed + 1
        self._reports += loads
        return sent, [load for load in loads if not load.token_only]

    def take_reports(self) -> LoadReports | None:
        reports, self._reports = self._reports, []
        return LoadReports(reports) if reports else None

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()


def _backend(layer: Any) -> str:
    getter = getattr(layer, "get_attn_backend", None)
    return "unknown" if getter is None else str(getter().get_name())
