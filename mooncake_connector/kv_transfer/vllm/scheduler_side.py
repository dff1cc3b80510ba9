"""The half of the connector that lives beside vLLM's scheduler: what to load, what to push, what to hold."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from mooncake_connector import __version__
from mooncake_connector.kv_transfer.layout import Group
from mooncake_connector.kv_transfer.messages import (
    PROTOCOL,
    LocalAbort,
    LocalDirectory,
    LocalDrop,
    LocalExpect,
    LocalRelease,
    LocalReserve,
    WantBlocks,
    pack_blocks,
)
from mooncake_connector.kv_transfer.ports import LoadReport
from mooncake_connector.kv_transfer.push import Chunk
from mooncake_connector.kv_transfer.side_channel import Client, address_of, split_address
from mooncake_connector.kv_transfer.vllm.compat import (
    adapter_name,
    media_ids,
    preempted_ids,
    transfer_group_ids,
)
from mooncake_connector.kv_transfer.vllm.kv_layout import groups_of
from mooncake_connector.kv_transfer.vllm.metadata import StepMetadata, WorkerHandshake

logger = logging.getLogger(__name__)

TransferKey = tuple[str, bytes]


@dataclass
class _Send:
    """A request that this engine prefills for others."""

    id: TransferKey
    num_prompt_tokens: int
    scheduled: bool = False


@dataclass
class _Receive:
    """A request whose KV another engine computes."""

    id: TransferKey
    engine_id: str
    address: str
    num_prompt_tokens: int
    sibling: bool = False
    asked: bool = False  # the scheduler has allocated its blocks: reserved or not, it is never asked again
    loading: bool = False


class SchedulerSide:
    """Scheduler-side state. Everything runs on the scheduler's thread; nothing here blocks.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: its KV cache groups.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        self._role: str = transfer.kv_role
        self._produces, self._consumes = transfer.is_kv_producer, transfer.is_kv_consumer
        self._engine_id: str = transfer.engine_id
        self._max_model_len = int(vllm_config.model_config.max_model_len)
        self._caching = bool(vllm_config.cache_config.enable_prefix_caching)
        self._group_ids = transfer_group_ids(kv_cache_config)
        self._groups: tuple[Group, ...] = groups_of(kv_cache_config)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._workers: list[tuple[Client, bytes]] = []
        self._handshakes: list[WorkerHandshake] = []
        self._step = 0
        self._sends: dict[str, _Send] = {}
        self._preempted: set[str] = set()
        self._ended: list[tuple[str, bool]] = []
        self._receives: dict[str, _Receive] = {}
        self._leaders: dict[TransferKey, str] = {}
        self._reports: dict[str, list[LoadReport]] = {}

    def connect_workers(self, handshakes: Mapping[int, WorkerHandshake]) -> None:
        """Learn where this engine's workers listen, in rank order."""
        self._handshakes = [handshakes[rank] for rank in sorted(handshakes)]
        addresses = tuple(h.address for h in self._handshakes)
        for h in self._handshakes:
            client = Client(self._context, h.address, monitor=False)
            self._workers.append((client, h.token))
            client.send(LocalDirectory(h.token, addresses))
        logger.info("KV side channel at %s", ", ".join(addresses))

    # ------------------------------------------------------------------ requests come

    def on_new_request(self, request: Any) -> None:
        params = request.kv_transfer_params or {}
        if released := params.get("release"):
            for client, token in self._workers:
                client.send(LocalDrop(token, str(released)))
            return
        if not request.prompt_token_ids:
            return  # prompt embeddings have no token ids to recognise the prompt by
        if params.get("do_remote_decode"):
            if not self._produces:
                logger.warning("request %s asks a %s to prefill for others", request.request_id, self._role)
                return
            id = (_transfer_id(params, request.request_id), prompt_hash(request))
            self._sends[request.request_id] = _Send(id, request.num_prompt_tokens)
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
            id = (_transfer_id(params, ""), prompt_hash(request))
            address = address_of(str(params["remote_host"]), int(params["remote_port"]))
            receive = _Receive(id, str(params["remote_engine_id"]), address, request.num_prompt_tokens)
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
        count = receive.num_prompt_tokens - 1 - num_computed_tokens
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
                _want(group, table[index], num_tokens - num_external_tokens, num_tokens)
                for group, index in zip(self._groups, self._group_ids, strict=True)
            )
            receive.loading = True
            for client, token in self._workers:
                client.send(
                    LocalReserve(
                        token,
                        request.request_id,
                        receive.engine_id,
                        receive.address,
                        *receive.id,
                        num_tokens,
                        want,
                    )
                )
        elif not receive.sibling:
            self._release(receive)

    def _release(self, receive: _Receive) -> None:
        for client, token in self._workers:
            client.send(LocalRelease(token, receive.engine_id, receive.address, *receive.id))

    # ------------------------------------------------------------------ steps

    def step_metadata(self, output: Any) -> StepMetadata:
        """What the workers need to know of the step that was just scheduled."""
        self._step += 1
        idle = not output.total_num_scheduled_tokens and any(r.loading for r in self._receives.values())
        meta = StepMetadata(self._step, idle, ended=self._ended)
        self._ended = []
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
        send.scheduled = True

    def loads_ended(self, reports: Sequence[LoadReport]) -> None:
        for report in reports:
            if report.request_id in self._receives:
                self._reports.setdefault(report.request_id, []).append(report)

    def load_over(self, request_id: str) -> None:
        """All ranks have reported the request."""
        if (receive := self._receives.get(request_id)) is not None:
            receive.loading = False

    # ------------------------------------------------------------------ requests go

    def request_finished(self, request: Any, completed: bool) -> tuple[bool, dict[str, Any] | None]:
        """The request leaves the scheduler.

        Returns:
            Whether its blocks must be held for us, and the parameters for its answer.
        """
        params = request.kv_transfer_params or {}
        if params.get("probe"):
            return False, self.describe()
        if (receive := self._receives.pop(request.request_id, None)) is not None:
            return False, self._receive_finished(request.request_id, receive)
        if (send := self._sends.pop(request.request_id, None)) is None:
            return False, None
        held = completed and send.scheduled
        self._ended.append((request.request_id, held))
        if not held:
            return False, None
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
        }

    def _receive_finished(self, request_id: str, receive: _Receive) -> dict[str, Any] | None:
        if self._leaders.get(receive.id) == request_id:
            del self._leaders[receive.id]
        if not receive.asked and not receive.sibling:
            self._release(receive)
        elif receive.loading:
            for client, token in self._workers:
                client.send(LocalAbort(token, request_id))
        reports = self._reports.pop(request_id, [])
        if not reports:
            return None
        return {
            "transfer": {
                "outcome": reports[0].outcome.value,
                "reason": reports[0].reason,
                "path": reports[0].path,
                "bytes": sum(r.nbytes for r in reports),
                "early_bytes": sum(r.early_bytes for r in reports),
                "wait_ms": round(1e3 * max(r.wait_s for r in reports), 3),
                "push_ms": round(1e3 * max(r.push_s for r in reports), 3),
            }
        }

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
            "layout": first.layout.fingerprint(),
            "model": first.model,
            "model_hash": first.model_hash,
            "dtype": first.dtype,
            "role": self._role,
            "version": __version__,
            "protocol": PROTOCOL,
        }

    def close(self) -> None:
        for client, _ in self._workers:
            client.close()
        self._workers.clear()
        self._context.term()


def _transfer_id(params: Mapping[str, Any], default: str) -> str:
    # Proxies made for NixlConnector hand on remote_request_id and may drop what they do not know.
    return str(params.get("transfer_id") or params.get("remote_request_id") or default)


def _want(group: Group, table: Sequence[int], num_computed: int, num_tokens: int) -> WantBlocks:
    """The blocks of one group that hold tokens ``[num_computed, num_tokens)`` and are still attended to."""
    first = max(num_computed // group.block_size, group.first_needed(num_tokens))
    index = np.arange(first, -(-num_tokens // group.block_size), dtype=np.int64)
    block = np.asarray(table, np.int64)[index]
    real = block != 0  # vLLM's null block stands for what lies outside the window
    return WantBlocks(pack_blocks(index[real]), pack_blocks(block[real]))


def prompt_hash(request: Any) -> bytes:
    """16 bytes that two engines agree on exactly if their KV of this prompt is the same."""
    digest = hashlib.blake2b(np.asarray(request.prompt_token_ids, np.int64).tobytes(), digest_size=16)
    digest.update(repr((adapter_name(request), media_ids(request))).encode())
    return digest.digest()
