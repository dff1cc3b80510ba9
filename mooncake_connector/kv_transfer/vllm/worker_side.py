"""The half of the connector that lives in each worker process: feeds the agent, reports what it finished.

When vLLM tells on GPUs that a layer's KV is written (``save_kv_layer``): after each layer where it runs
eagerly, compiled, or between piecewise CUDA graphs. In a full CUDA graph never (by default decode-only
batches; with ``cudagraph_mode`` FULL prefills that fit a graph, too): the step counts as written once it is
issued. So it is with micro-batches (``--enable-dbo``): they tell a layer several times, from several streams.
"""

import logging
import math
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
import vllm
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from mooncake_connector import __version__
from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.agent import WorkerAgent
from mooncake_connector.kv_transfer.clock import NUM_EVENTS, GpuClock, LayerClock
from mooncake_connector.kv_transfer.layout import WorkerInfo
from mooncake_connector.kv_transfer.messages import PROTOCOL, LoadReport
from mooncake_connector.kv_transfer.transport.cuda.driver import Event, context_at
from mooncake_connector.kv_transfer.vllm import first_token
from mooncake_connector.kv_transfer.vllm.kv_layout import layout_of, model_hash
from mooncake_connector.kv_transfer.vllm.metadata import Listen, StepMetadata, WorkerHandshake

logger = logging.getLogger(__name__)

PUSH_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""By the KV's device, where the setting is 0: a fraction of a millisecond of what carries them."""
SWITCH_INTERVAL_S = 0.0005


class WorkerSide:
    """Worker-side state. The engine's thread calls; the agent's thread does the work."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig) -> None:
        self._vllm_config, self._kv_cache_config, self._config = vllm_config, kv_cache_config, config
        self._agent: WorkerAgent | None = None
        self._layers: dict[str, int] = {}
        self._token_bytes = 0.0
        self._mark_after = 1
        self._meta: StepMetadata | None = None
        self._since_mark = 0
        self._layerwise = not getattr(vllm_config.parallel_config, "use_ubatching", False)

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The KV caches exist: start serving them."""
        config = self._vllm_config
        model, parallel = config.model_config, config.parallel_config
        context = config.compilation_config.static_forward_context
        backends = {name: _backend(context.get(name)) for name in kv_caches}
        layout, self._layers = layout_of(
            kv_caches,
            self._kv_cache_config,
            backends,
            kv_heads=int(model.get_total_num_kv_heads()),
            tp_size=parallel.tensor_parallel_size,
            cache_dtype=str(config.cache_config.cache_dtype),
        )
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
            pp_rank=get_pp_group().rank_in_group,
        )
        tokens = sum(plane.nbytes / layout.page_tokens(plane) for plane in layout.planes)
        self._token_bytes = tokens / len(self._layers)
        # The I/O thread's hand-overs are short and urgent; by default it may wait 5 ms for the interpreter.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        kv = next(iter(kv_caches.values()))
        push_bytes = self._config.push_bytes or PUSH_BYTES.get(kv.device.type, PUSH_BYTES["cpu"])
        self._config = msgspec.structs.replace(self._config, push_bytes=push_bytes)
        self._agent = WorkerAgent(info, self._config, _clock(kv, layout.num_layers))

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
        if (agent := self._agent) is None:
            return
        if meta.chunks:
            # Waking the I/O thread takes the interpreter from the forward pass: only where it will find
            # enough to push.
            layer_bytes = self._token_bytes * sum(chunk.end - chunk.start for chunk in meta.chunks)
            self._mark_after = max(1, math.ceil(self._config.push_bytes / max(layer_bytes, 1.0)))
            self._since_mark = 0
            agent.clock.step_begins(meta.step)
        if meta.chunks or meta.preempted or meta.ended:
            agent.step(meta.step, meta.chunks, meta.preempted, meta.ended)

    def layer_written(self, layer_name: str) -> None:
        """All that writes the layer's KV of this step has been issued."""
        if self._agent is None or self._meta is None or not self._meta.chunks or not self._layerwise:
            return
        if (layer := self._layers.get(layer_name)) is None:
            return
        agent, step = self._agent, self._meta.step
        agent.clock.layer_written(layer, step)
        self._since_mark += 1
        if layer == len(self._layers) - 1 or self._since_mark >= self._mark_after:
            self._since_mark = 0
            agent.clock.mark(step)
            if agent.busy:
                agent.wake()

    def step_ended(self) -> None:
        if self._agent is not None and self._meta is not None and self._meta.chunks:
            self._agent.clock.step_ended(self._meta.step)
            self._agent.wake()

    def results(self) -> tuple[set[str], list[LoadReport]]:
        """Since the last call: requests whose blocks may be freed, and loads that ended."""
        if (agent := self._agent) is None:
            return set(), []
        return agent.take_sent(), agent.take_reports()

    def for_scheduler(self) -> Listen | None:
        """What goes to the scheduler with this step's output."""
        return Listen() if self._meta is not None and self._meta.idle else None

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()


def _backend(layer: Any) -> str:
    getter = getattr(layer, "get_attn_backend", None)
    return "unknown" if getter is None else str(getter().get_name())


def _clock(kv: torch.Tensor, num_layers: int) -> LayerClock:
    if kv.device.type != "cuda":
        return LayerClock(num_layers)
    context = context_at(kv.data_ptr())
    events = [Event(context) for _ in range(NUM_EVENTS)]
    return GpuClock(num_layers, events, lambda: int(torch.cuda.current_stream(kv.device).cuda_stream))
