"""vLLM's engine core and asynchronous scheduler on a GPU that is made of a thread and is always late.

What the engine issues (a layer's KV, its attention, events) runs in order on that thread, some time after.
Each KV entry is a number made from layer, position and the tokens up to there, and attention checks all it
reads: so a push that overtakes the GPU, or a write into blocks that others have now, is seen.
"""

import functools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import AsyncOutputFuture
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from mooncake_connector.demo.models import make
from mooncake_connector.kv_transfer.clock import GpuClock

LAYERS, BLOCK, LAYER_S = 4, 16, 0.001
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
ENTRY_BYTES = 16  # of one token in one layer


class Stream:
    """Runs what it is given, in order, late."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.issue = self._work.put
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()


class StreamEvent:
    handle = 0

    def __init__(self, stream: Stream) -> None:
        self._stream, self._changed = stream, threading.Condition()
        self._recorded = self._happened = 0

    def record(self, stream: int) -> None:
        self._recorded += 1
        self._stream.issue(functools.partial(self._happens, self._recorded))

    def _happens(self, record: int) -> None:
        with self._changed:
            self._happened = record
            self._changed.notify_all()

    def query(self) -> bool:
        return self._happened >= self._recorded

    def synchronize(self) -> None:
        with self._changed:
            record = self._recorded
            self._changed.wait_for(lambda: self._happened >= record)


def late_clock(stream: Stream, num_layers: int) -> GpuClock:
    return GpuClock(num_layers, [StreamEvent(stream) for _ in range(128)], lambda: 0)


@functools.lru_cache(4096)
def _prefix_hashes(tokens: tuple[int, ...]) -> list[int]:
    found, value = [], 0
    for token in tokens:
        value = hash((value, token))
        found.append(value)
    return found


def _entry(layer: int, prefixes: Sequence[int], position: int) -> int:
    known = prefixes[position] if position < len(prefixes) else (prefixes[-1], position)
    return hash((layer, known)) & 0x7FFFFFFFFFFFFFFF


Share = tuple[str, Sequence[int], int, int, list[int]]  # request, prefix hashes, start, end, blocks


class _Output(AsyncModelRunnerOutput):
    def __init__(self, output: ModelRunnerOutput, event: StreamEvent, tokens: list[list[int]]) -> None:
        self._output, self._event, self._tokens = output, event, tokens

    def get_output(self) -> ModelRunnerOutput:
        self._event.synchronize()
        self._output.sampled_token_ids = self._tokens
        return self._output


class LateExecutor(Executor):
    """One worker; calls the connector when vLLM's second model runner does."""

    supported_tasks = ("generate",)
    num_blocks = 400

    def _init_executor(self) -> None:
        self.stream, self.errors = Stream(), list[str]()
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._lengths: dict[str, int] = {}
        self._blocks: dict[str, list[int]] = {}
        self._pending: tuple[Any, list[Share]] | None = None

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=4, dtype=torch.bfloat16)
        return [dict.fromkeys(NAMES, spec)]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBHNC"]]

    def set_kv_cache_layout(self, name: str) -> None: ...

    def compile_or_warm_up_model(self) -> None: ...

    def determine_available_memory(self) -> list[int]:
        return [self.num_blocks * BLOCK * ENTRY_BYTES * LAYERS]

    def initialize_from_config(self, configs: list[Any]) -> list[float]:
        self._connector: Any = KVConnectorFactory.create_connector(
            config=self.vllm_config, role=KVConnectorRole.WORKER, kv_cache_config=configs[0]
        )
        count = configs[0].num_blocks
        tensors = [torch.zeros(count, 1, BLOCK, ENTRY_BYTES // 2, dtype=torch.bfloat16) for _ in NAMES]
        self._kv = [t.view(torch.int64).numpy().reshape(count, BLOCK, 2)[:, :, 0] for t in tensors]
        self._connector.register_kv_caches(dict(zip(NAMES, tensors, strict=True)))
        return []

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if method == "get_kv_connector_handshake_metadata":
            return [{(0, 0): self._connector.get_handshake_metadata()}]
        return [None]

    def check_health(self) -> None: ...

    def execute_model(self, scheduled: Any, non_block: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        work = self._update(scheduled)
        connector = self._connector
        connector.handle_preemptions(scheduled.kv_connector_metadata)
        connector.bind_connector_metadata(scheduled.kv_connector_metadata)
        connector.start_load_kv(None)
        if not work:
            future.set_result(ModelRunnerOutput.with_kv_conn_output_only(self._ask(scheduled)))
            return future
        for layer, name in enumerate(NAMES):
            self.stream.issue(functools.partial(self._run_layer, layer, work))
            connector.save_kv_layer(name, None, None)
        self._pending = (scheduled, work)
        future.set_result(None)
        return future

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Future[Any]:
        assert self._pending is not None
        scheduled, work = self._pending
        event = StreamEvent(self.stream)
        event.record(0)
        ids = [share[0] for share in work]
        tokens = [[1000] if share[3] >= self._lengths[share[0]] else [] for share in work]
        self._connector.wait_for_save()
        output = ModelRunnerOutput(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)})
        output.kv_connector_output = self._ask(scheduled)
        return AsyncOutputFuture(_Output(output, event, tokens), True)

    def _update(self, scheduled: Any) -> list[Share]:
        for new in scheduled.scheduled_new_reqs:
            self._prompts[new.req_id] = tuple(new.prompt_token_ids)
            self._lengths[new.req_id] = len(new.prefill_token_ids or new.prompt_token_ids)
            self._blocks[new.req_id] = list(new.block_ids[0])
        cached = scheduled.scheduled_cached_reqs
        for request, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request in cached.resumed_req_ids:
                self._lengths[request] = len(cached.all_token_ids[request])
                self._blocks[request] = []
            self._blocks[request] += blocks[0] if blocks else []
        starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return [
            (r, _prefix_hashes(self._prompts[r]), starts[r], starts[r] + count, list(self._blocks[r]))
            for r, count in scheduled.num_scheduled_tokens.items()
        ]

    def _run_layer(self, layer: int, work: list[Share]) -> None:
        time.sleep(LAYER_S)
        kv = self._kv[layer]
        for _, prefixes, start, end, blocks in work:
            for p in range(start, end):
                kv[blocks[p // BLOCK], p % BLOCK] = _entry(layer, prefixes, p)
        for request, prefixes, _, end, blocks in work:
            wrong = [p for p in range(end) if kv[blocks[p // BLOCK], p % BLOCK] != _entry(layer, prefixes, p)]
            if wrong:
                self.errors.append(f"{request} layer {layer}: {len(wrong)} of {end}, first {wrong[0]}")

    def _ask(self, scheduled: Any) -> KVConnectorOutput:
        connector, output = self._connector, KVConnectorOutput()
        if hasattr(output, "failed_recving"):
            results = connector.get_transfer_results(scheduled.finished_req_ids)
            output.finished_sending, output.finished_recving = (
                results.finished_sending,
                results.finished_recving,
            )
            output.failed_recving = results.failed_recving
        else:
            output.finished_sending, output.finished_recving = connector.get_finished(
                scheduled.finished_req_ids
            )
        output.invalid_block_ids = connector.get_block_ids_with_load_errors()
        output.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return output


class LateEngine:
    """An engine core and its busy loop."""

    def __init__(self, engine_id: str, num_blocks: int) -> None:
        transfer = KVTransferConfig(
            kv_connector="MooncakePushConnector",
            kv_connector_module_path="mooncake_connector.kv_transfer.vllm",
            kv_role="kv_both",
            engine_id=engine_id,
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"push_bytes": 1},
        )
        config = EngineArgs(
            model=str(make("tiny-llama")),
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=2048,
            max_num_batched_tokens=256,
            max_num_seqs=16,
            kv_transfer_config=transfer,
        ).create_engine_config()
        # The CPU platform takes it away.
        config.scheduler_config.async_scheduling = True
        config.scheduler_config.scheduler_cls = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
        executor = type("Executor", (LateExecutor,), {"num_blocks": num_blocks})
        self.core = EngineCore(config, executor, log_stats=False)
        assert self.core.batch_queue_size == 2
        self.finished: dict[str, dict[str, Any]] = {}
        self.num_tokens: Counter[str] = Counter()
        self.died: BaseException | None = None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stop = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @property
    def errors(self) -> list[str]:
        executor: Any = self.core.model_executor
        return list(executor.errors)

    @property
    def idle(self) -> bool:
        """No request is left, not even one whose blocks are held."""
        return not self.core.scheduler.requests and not self.core.batch_queue

    @property
    def connector(self) -> Any:
        return self.core.scheduler.connector

    @property
    def num_used_blocks(self) -> int:
        pool = self.core.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def add(self, request_id: str, tokens: list[int], max_tokens: int, params: dict[str, Any] | None) -> None:
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=tokens,
            mm_features=None,
            sampling_params=SamplingParams(
                max_tokens=max_tokens,
                temperature=0,
                ignore_eos=True,
                extra_args={"kv_transfer_params": params} if params else None,
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._calls.put(lambda: self.core.add_request(*self.core.preprocess_add_request(request)))

    def abort(self, request_id: str) -> None:
        self._calls.put(lambda: self.core.abort_requests([request_id]))

    def close(self) -> None:
        self._stop = True
        self._thread.join(10)
        self.core.shutdown()

    def _loop(self) -> None:
        try:
            while not self._stop:
                self._turn()
        except BaseException as e:
            self.died = e
            raise

    def _turn(self) -> None:
        core = self.core
        while True:
            busy = core.scheduler.has_requests() or bool(core.batch_queue)
            try:
                self._calls.get(block=not busy, timeout=0.05)()
            except queue.Empty:
                break
        if not core.scheduler.has_requests() and not core.batch_queue:
            return
        outputs, executed = core.step_with_batch_queue()
        for output in [o for group in (outputs or {}).values() for o in group.outputs]:
            self.num_tokens[output.request_id] += len(output.new_token_ids)
            if output.finish_reason is not None:
                self.finished[output.request_id] = output.kv_transfer_params or {}
        if not executed and core.scheduler.has_requests():
            time.sleep(0.001)
