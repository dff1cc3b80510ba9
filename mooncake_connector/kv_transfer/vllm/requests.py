"""What the scheduler side knows of one request, and what it reads from vLLM's."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mooncake_connector.kv_transfer.layout import Group
from mooncake_connector.kv_transfer.messages import WantBlocks, pack_blocks
from mooncake_connector.kv_transfer.vllm.compat import adapter_name, media_ids
from mooncake_connector.kv_transfer.vllm.timeline import Moments

TransferKey = tuple[str, bytes]


@dataclass
class Send:
    """A request that this engine prefills for others."""

    id: TransferKey
    num_prompt_tokens: int
    scheduled: bool = False
    cached: int = 0  # tokens of the prompt that were there when it was first scheduled
    moments: Moments = field(default_factory=dict)


@dataclass
class Receive:
    """A request whose KV another engine computes."""

    id: TransferKey
    engine_id: str
    address: str
    num_prompt_tokens: int
    request: Any
    wants_token: bool = False  # that prefill samples, to go on from it
    sibling: bool = False
    asked: bool = False  # the scheduler has allocated its blocks: reserved or not, it is never asked again
    loading: bool = False
    token_only: bool = False  # what is loading, or was, is the first token alone
    moments: Moments = field(default_factory=dict)


def transfer_id_of(params: Mapping[str, Any], default: str) -> str:
    # Proxies made for NixlConnector hand on remote_request_id and may drop what they do not know.
    return str(params.get("transfer_id") or params.get("remote_request_id") or default)


def wanted_blocks(group: Group, table: Sequence[int], num_computed: int, num_tokens: int) -> WantBlocks:
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
