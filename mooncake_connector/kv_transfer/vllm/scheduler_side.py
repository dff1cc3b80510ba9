"""The half of the connector that lives beside vLLM's scheduler: what to load, what to push, what to hold."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import zmq

from mooncake_connector import __version__
from mooncake_connector.kv_transfer.layout import Group, fingerprint
from mooncake_connector.kv_transfer.messages import (
    PROTOCOL,
    LoadOver,
    LoadReport,
    LocalAbort,
    LocalDirectory,
    LocalDrop,
    LocalExpect,
    LocalFirstToken,
    LocalRelease,
    LocalReserve,
    WantBlocks,
)
from mooncake_connector.kv_transfer.push import Chunk
from mooncake_connector.kv_transfer.routes import WorkerAt
from mooncake_connector.kv_transfer.session import Outcome
from mooncake_connector.kv_transfer.side_channel import Client, address_of, split_address
from mooncake_connector.kv_transfer.vllm.compat import params_of, preempted_ids, transfer_group_ids
from mooncake_connector.kv_transfer.vllm.event_source import event_source
from mooncake_connector.kv_transfer.vllm.first_token import Forced
from mooncake_connector.kv_transfer.vllm.kv_layout import capacity_of, groups_of
from mooncake_connector.kv_transfer.vllm.loads import Loads
from mooncake_connector.kv_transfer.vllm.metadata import StepMetadata, WorkerHandshake
from mooncake_connector.kv_transfer.vllm.requests import (
    Receive,
    Send,
    TransferKey,
    prompt_hash,
    transfer_id_of,
    wanted_blocks,
)
from mooncake_connector.kv_transfer.vllm.timeline import Timelines, mark, summary

logger = logging.getLogger(__name__)

_NOTHING = WantBlocks(b"", b"")
IDLE_WAIT_MS = 2


class SchedulerSide:
    """Scheduler-side state. Everything runs on the scheduler's thread; nothing here blocks.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: its KV cache groups.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        self._vllm_config = vllm_config
        self._role: str = transfer.kv_role
        self._produces, self._consumes = transfer.is_kv_producer, transfer.is_kv_consumer
        self._engine_id: str = transfer.engine_id
        self._max_model_len = int(vllm_config.model_config.max_model_len)
        self._caching = bool(vllm_config.cache_config.enable_prefix_caching)
        self._group_ids = transfer_group_ids(kv_cache_config)
        self._groups: tuple[Group, ...] = groups_of(kv_cache_config)
        self._kv_tokens = capacity_of(kv_cache_config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._workers: list[tuple[Client, bytes]] = []
        self._poller = zmq.Poller()
        self._handshakes: list[WorkerHandshake] = []
        self._step = 0
        self._sends: dict[str, Send] = {}
        self._ended: list[tuple[str, bool]] = []
        self._receives: dict[str, Receive] = {}
        self._leaders: dict[TransferKey, str] = {}
        self._reports: dict[str, list[LoadReport]] = {}
        self._loads = Loads()
        self._idle = False
        self._forced = Forced()
        self._unanswered: dict[str, Receive] = {}
        self._timelines = Timelines()

    def connect_workers(self, handshakes: Mapping[tuple[int, int], WorkerHandshake]) -> None:
        """Learn where this engine's workers listen, by (pipeline stage, tensor-parallel rank)."""
        self._handshakes = [handshakes[rank] for rank in sorted(handshakes)]
        workers = tuple(WorkerAt(h.address, h.info) for h in self._handshakes)
        for h in self._handshakes:
            client = Client(self._context, h.address, monitor=False)
            self._workers.append((client, h.token))
            self._poller.register(client.socket, zmq.POLLIN)
            client.send(LocalDirectory(h.token, workers))
        logger.info("KV side channel at %s", ", ".join(h.address for h in self._handshakes))

    # ------------------------------------------------------------------ requests come

    def on_new_request(self, request: Any) -> None:
        params = params_of(request)
        if released := params.get("release"):
            for client, token in self._workers:
                client.send(LocalDrop(token, str(released)))
            return
        if not request.prompt_token_ids:
            return  # prompt embeddings have no token ids to recognise the prompt by
        if type(given := params.get("first_token")) is int:
            self._forced.add(request.request_id, given, request.num_prompt_tokens)
        if params.get("do_remote_decode"):
            if not self._produces:
                logger.warning("request %s asks a %s to prefill for others", request.request_id, self._role)
                return
            id = (transfer_id_of(params, request.request_id), prompt_hash(request))
            send = self._sends[request.request_id] = Send(id, request.num_prompt_tokens)
            mark(send.moments, "received")
            for client, token in self._workers:
                client.send(LocalExpect(token, request.request_id, *id))
        elif params.get("do_remote_prefill"):
            if not self._consumes:
                logger.warning("request %s asks a %s to load KV", request.request_id, self._role)
                return
            missing = [k for k in ("remote_engine_id", "remote_host", "remote_port") if not params.get(k)]
            if missing:
                logger.warning(
                    "request %s: kv_transfer_params lack %s; it is prefilled here",
                    request.request_id,
                    ", ".join(missing),
                )
                return
            id = (transfer_id_of(params, ""), prompt_hash(request))
            address = address_of(str(params["remote_host"]), int(params["remote_port"]))
            receive = Receive(
                id, str(params["remote_engine_id"]), address, request.num_prompt_tokens, request
            )
            mark(receive.moments, "received")
            receive.wants_token = params.get("first_token") is True
            receive.sibling = self._leaders.setdefault(id, request.request_id) != request.request_id
            self._receives[request.request_id] = receive

    # ------------------------------------------------------------------ decode: load

    def matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond `num_computed_tokens` to load; (None, False) asks to be asked again.

        All but the last prompt token: decode computes that one anyway, to sample from it.
        """
        receive = self._receives.get(request.request_id)
        if receive is None or receive.asked:
            return 0, False
        if receive.sibling:
            # n > 1: the first sample's load fills the prefix cache for the others.
            leader = self._receives.get(self._leaders.get(receive.id, ""))
            waits = self._caching and leader is not None and (leader.loading or not leader.asked)
            return (None, False) if waits else (0, False)
        if receive.token_only:
            return (None, False) if receive.loading else (0, False)
        count = receive.num_prompt_tokens - 1 - num_computed_tokens
        if count <= 0 and receive.wants_token:
            # Our cache has the whole prompt, but not what prefill samples after it.
            receive.token_only = receive.loading = True
            self._reserve(request.request_id, receive, (_NOTHING,) * len(self._groups))
            return None, False
        return (count, True) if count > 0 else (0, False)

    def blocks_allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The scheduler allocated the request's blocks: have them filled."""
        receive = self._receives.get(request.request_id)
        if receive is None or receive.asked:
            return
        receive.asked = True
        if num_external_tokens > 0:
            num_tokens = receive.num_prompt_tokens - 1
            table = blocks.get_block_ids()
            want = tuple(
                wanted_blocks(group, table[index], num_tokens - num_external_tokens, num_tokens)
                for group, index in zip(self._groups, self._group_ids, strict=True)
            )
            receive.loading = True
            mark(receive.moments, "reserved")
            self._reserve(request.request_id, receive, want)
        elif not receive.sibling and not receive.token_only:
            self._release(receive)

    def _reserve(self, request_id: str, receive: Receive, want: tuple[WantBlocks, ...]) -> None:
        # Steps under way never write to blocks that vLLM gives out: it takes a block back only once the last
        # step that may write to it is over (Scheduler.defer_block_free).
        num_tokens = receive.num_prompt_tokens - 1
        self._loads.begin(request_id, len(self._workers), token_only=receive.token_only)
        for client, token in self._workers:
            client.send(
                LocalReserve(
                    token,
                    request_id,
                    receive.engine_id,
                    receive.address,
                    *receive.id,
                    num_tokens,
                    want,
                    first_token=receive.wants_token,
                )
            )

    def _release(self, receive: Receive) -> None:
        for client, token in self._workers:
            client.send(LocalRelease(token, receive.engine_id, receive.address, *receive.id))

    # ------------------------------------------------------------------ steps

    def step_metadata(self, output: Any) -> StepMetadata:
        """What the workers need to know of the step that was just scheduled."""
        self._step += 1
        idle = not output.total_num_scheduled_tokens and any(r.loading for r in self._receives.values())
        self._idle = idle
        meta = StepMetadata(self._step, idle, ended=self._ended)
        self._ended = []
        self._follow_receives(meta, output)
        if not self._sends:
            return meta
        for request_id in preempted_ids(output):
            if request_id in self._sends:
                meta.preempted.append(request_id)
        # A prefix hit may be another request's chunk of this very step; alone, it can't be.
        alone = len(output.num_scheduled_tokens) == 1
        for new in output.scheduled_new_reqs:
            self._add_chunk(meta, output, new.req_id, new.num_computed_tokens, new.block_ids, True, alone)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in self._sends:
                resumed = request_id in cached.resumed_req_ids
                blocks = cached.new_block_ids[i]
                start = cached.num_computed_tokens[i]
                self._add_chunk(meta, output, request_id, start, blocks, resumed, resumed and alone)
        return meta

    def _add_chunk(
        self,
        meta: StepMetadata,
        output: Any,
        request_id: str,
        start: int,
        blocks: Sequence[list[int]] | None,
        replace: bool,
        hits_ready: bool,
    ) -> None:
        send = self._sends.get(request_id)
        if send is None:
            return
        end = start + output.num_scheduled_tokens[request_id]
        own = tuple(list(blocks[i]) if blocks else [] for i in self._group_ids)
        meta.chunks.append(Chunk(request_id, *send.id, start, end, own, replace, hits_ready))
        if not send.scheduled:
            send.scheduled, send.cached = True, start
        mark(send.moments, "scheduled")

    def _follow_receives(self, meta: StepMetadata, output: Any) -> None:
        """Note which requests are computed for the first time, and which must sample a given token."""
        for request_id in [r for r, known in self._unanswered.items() if known.request.num_output_tokens]:
            mark(self._unanswered.pop(request_id).moments, "first_token")
        for new in output.scheduled_new_reqs:
            if (receive := self._receives.get(new.req_id)) is not None:
                mark(receive.moments, "scheduled")
                self._unanswered[new.req_id] = receive
        meta.first_tokens = self._forced.due(output)

    def loaded(self, in_outputs: Collection[str]) -> set[str]:
        """Which loads vLLM must be told to be over; a step's output has come.

        Args:
            in_outputs: those that all ranks' step outputs say.
        """
        over: set[str] = set()
        for report in self._news() if self._loads else ():
            if report.request_id in self._receives:
                self._reports.setdefault(report.request_id, []).append(report)
            if self._loads.reported(report):
                if report.token_only:
                    self._load_over(report.request_id)
                else:
                    over.add(report.request_id)
        over |= self._loads.in_outputs(in_outputs)
        for request_id in over:
            self._load_over(request_id)
        return over

    def _news(self) -> Iterator[LoadReport]:
        if self._idle:
            # With nothing to compute vLLM would ask us a thousand times a second, on a processor that
            # prefill or our own threads may need.
            self._poller.poll(IDLE_WAIT_MS)
        for client, _ in self._workers:
            while (message := client.receive()) is not None:
                if isinstance(message, LoadOver):
                    yield message.report

    def _load_over(self, request_id: str) -> None:
        """All ranks have reported the request."""
        if (receive := self._receives.get(request_id)) is None:
            return
        receive.loading = False
        mark(receive.moments, "loaded")
        reports = self._reports.get(request_id, [])
        tokens = {r.first_token if r.outcome is Outcome.LOADED else -1 for r in reports}
        if len(tokens) == 1 and (token := tokens.pop()) >= 0:
            self._forced.add(request_id, token, receive.num_prompt_tokens)
        elif receive.wants_token:
            logger.warning("request %s samples its first token itself: prefill's did not come", request_id)

    # ------------------------------------------------------------------ requests go

    def request_finished(self, request: Any, completed: bool) -> tuple[bool, dict[str, Any] | None]:
        """The request leaves the scheduler.

        Returns:
            Whether its blocks must be held for us, and the parameters for its answer.
        """
        params = params_of(request)
        self._forced.discard(request.request_id)
        if params.get("probe"):
            return False, self.describe()
        if type(asked := params.get("timeline")) is str:  # prefill's answer, handed on, has one of its own
            return False, self._timelines.get(asked)
        if (receive := self._receives.pop(request.request_id, None)) is not None:
            return False, self._receive_finished(request.request_id, receive)
        if (send := self._sends.pop(request.request_id, None)) is None:
            return False, None
        held = completed and send.scheduled
        self._ended.append((request.request_id, held))
        if not held:
            return False, None
        mark(send.moments, "prefilled")
        first_token = request.output_token_ids[0] if request.num_output_tokens else -1
        self._timelines.keep(send.id[0], send.moments, first_token)
        if params.get("first_token"):
            for client, token in self._workers:
                client.send(LocalFirstToken(token, request.request_id, first_token))
        host, port = split_address(self._handshakes[0].address)
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._engine_id,
            "remote_request_id": send.id[0],
            "remote_block_ids": [],
            "remote_host": host,
            "remote_port": port,
            "tp_size": len(self._handshakes),
            "remote_num_tokens": send.num_prompt_tokens,
            "transfer_id": send.id[0],
            "timeline": send.moments,
            "cached_tokens": send.cached,
        }

    def _receive_finished(self, request_id: str, receive: Receive) -> dict[str, Any] | None:
        if self._leaders.get(receive.id) == request_id:
            del self._leaders[receive.id]
        if not receive.asked and not receive.sibling:
            self._release(receive)
        elif receive.loading:
            for client, token in self._workers:
                client.send(LocalAbort(token, request_id))
        self._unanswered.pop(request_id, None)
        mark(receive.moments, "finished")
        self._timelines.keep(receive.id[0], receive.moments)
        reports = self._reports.pop(request_id, [])
        if not reports:
            return None
        return {"transfer": summary(reports, receive.moments)}

    def describe(self) -> dict[str, Any] | None:
        """The answer to a probe: all that a proxy needs to pair this engine with others."""
        if not self._handshakes:
            return None
        first = self._handshakes[0].info
        host, port = split_address(self._handshakes[0].address)
        return {
            "engine_id": self._engine_id,
            "incarnation": first.incarnation,
            "host": host,
            "port": port,
            "addresses": [h.address for h in self._handshakes],
            "tp_size": first.tp_size,
            "pp_size": first.pp_size,
            "block_size": first.layout.groups[0].block_size,
            "max_model_len": self._max_model_len,
            "kv_tokens": self._kv_tokens,
            "prefix_caching": self._caching,
            "layout": fingerprint([h.info for h in self._handshakes]),
            "model": first.model,
            "model_hash": first.model_hash,
            "dtype": first.dtype,
            "role": self._role,
            "first_token": all(h.first_token for h in self._handshakes),
            "version": __version__,
            "protocol": PROTOCOL,
            "kv_events": event_source(self._vllm_config, host),
        }

    def close(self) -> None:
        for client, _ in self._workers:
            client.close()
        self._workers.clear()
        self._context.term()
