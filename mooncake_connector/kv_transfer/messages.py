"""Wire messages of the side channel: tagged msgspec structs in msgpack, one ZeroMQ frame each.

The *prefill worker* listens (ROUTER); *decode workers* and its own scheduler connect (DEALER). Block ids
travel as int32 little-endian bytes. `key` names one reservation for ever: a message about a reservation that
is gone is ignored.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from mooncake_connector.kv_transfer.layout import BlockIds, WorkerInfo
from mooncake_connector.kv_transfer.push import Want
from mooncake_connector.kv_transfer.routes import WorkerAt
from mooncake_connector.kv_transfer.session import Outcome
from mooncake_connector.kv_transfer.transport.base import Endpoint, Mark, SourceIdentity

PROTOCOL = 3


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages."""


# --- handshake: decode worker <-> prefill worker


class Find(Message, frozen=True):
    """Decode asks any worker of an engine where all of them are."""


class Found(Message, frozen=True):
    """All workers of this engine, stage after stage, rank after rank."""

    workers: tuple[WorkerAt, ...]


class Hello(Message, frozen=True):
    """Decode asks to be served by this very worker; `pid` is who may read our memory."""

    info: WorkerInfo
    pid: int


class Welcome(Message, frozen=True):
    """Prefill agrees; `paths` are the ways that it can push by."""

    info: WorkerInfo
    identity: SourceIdentity
    paths: tuple[str, ...]


class Refused(Message, frozen=True):
    reason: str


class OpenLink(Message, frozen=True):
    """Decode chose the paths, the preferred first; prefill opens the data connections."""

    paths: tuple[str, ...]
    endpoint: Endpoint
    connections: int


# --- transfers: decode worker <-> prefill worker


class WantBlocks(msgspec.Struct, frozen=True):
    """One group's wanted blocks: positions in the block table, and decode's block ids (both int32 bytes)."""

    index: bytes
    block: bytes


class Reserve(Message, frozen=True):
    """Decode's blocks are ready.

    Attributes:
        num_tokens: tokens of the prompt whose KV is wanted.
        first_token: DONE is to bring the token that prefill samples.
        shares: how many decode workers reserve this transfer at this prefill worker.
    """

    key: int
    transfer_id: str
    prompt_hash: bytes
    num_tokens: int
    want: tuple[WantBlocks, ...]
    first_token: bool = False
    shares: int = 1


class Cancel(Message, frozen=True):
    key: int


class Release(Message, frozen=True):
    """Decode will not reserve this request's KV (its own cache has it all, or it rejected the request)."""

    transfer_id: str
    prompt_hash: bytes


class Done(Message, frozen=True):
    """Every byte has landed.

    Attributes:
        nbytes: bytes moved for this reservation.
        early_bytes: of these, landed before the prefill's last chunk ended.
        push_s: from the first write to the last byte landed.
        marks: what decode's hardware must have seen land before the KV is used.
        first_write, landed: when the first write began and the last byte landed, monotonic seconds of
            prefill's host.
        first_token: what prefill sampled, if the reservation asked for it; else -1.
    """

    key: int
    nbytes: int
    early_bytes: int
    push_s: float
    marks: tuple[Mark, ...] = ()
    first_write: float = 0.0
    landed: float = 0.0
    first_token: int = -1


class Failed(Message, frozen=True):
    """The load will not complete; no write is in flight (`marks` as in `Done`)."""

    key: int
    reason: str
    marks: tuple[Mark, ...] = ()


class CancelAck(Message, frozen=True):
    """Cancelled; no write is in flight (`marks` as in `Done`)."""

    key: int
    marks: tuple[Mark, ...] = ()


class Heartbeat(Message, frozen=True):
    """Decode renews the leases of these reservations."""

    keys: tuple[int, ...]


class HeartbeatAck(Message, frozen=True):
    """Prefill does not know these reservations: they are over, and the message that said so was lost."""

    unknown: tuple[int, ...]


# --- the engine's own scheduler -> its workers; `token` proves it


class LocalDirectory(Message, frozen=True):
    """All workers of the engine, stage after stage, rank after rank."""

    token: bytes
    workers: tuple[WorkerAt, ...]


class LocalExpect(Message, frozen=True):
    """A request to prefill for others has arrived."""

    token: bytes
    request_id: str
    transfer_id: str
    prompt_hash: bytes


class LocalReserve(Message, frozen=True):
    """A request's blocks are allocated: have them filled by the prefill engine at `address`.

    Attributes:
        first_token: and have it tell the token that it samples; with no blocks wanted, nothing else.
    """

    token: bytes
    request_id: str
    engine_id: str
    address: str
    transfer_id: str
    prompt_hash: bytes
    num_tokens: int
    want: tuple[WantBlocks, ...]
    first_token: bool = False


class LocalFirstToken(Message, frozen=True):
    """What was sampled after a prompt that was prefilled for others."""

    token: bytes
    request_id: str
    first_token: int


class LocalDrop(Message, frozen=True):
    """Nobody will come for this transfer: its KV need not be held, whatever the prompt."""

    token: bytes
    transfer_id: str


class LocalAbort(Message, frozen=True):
    token: bytes
    request_id: str


class LocalRelease(Message, frozen=True):
    token: bytes
    engine_id: str
    address: str
    transfer_id: str
    prompt_hash: bytes


# --- a worker -> its engine's own scheduler


class LoadReport(msgspec.Struct, frozen=True):
    """How one load went, for the request's answer, logs and metrics.

    Attributes:
        path: transport that carried it; empty if none was reached.
        wait_s: from the reservation to the end.
        early_bytes: of `nbytes`, landed before the prefill's last chunk ended.
        failed_blocks: ids of the reserved blocks of the first group, if the load failed.
        first_token: what prefill sampled, if it was asked for; else -1.
        token_only: nothing but that was asked for; vLLM knows of no load.
        reserve_sent, first_write, landed, done: moments, monotonic seconds (`first_write` and `landed` of
            prefill's host); 0 if it never came to that.
    """

    request_id: str
    outcome: Outcome
    reason: str
    path: str
    nbytes: int
    early_bytes: int
    wait_s: float
    push_s: float
    failed_blocks: tuple[int, ...] = ()
    first_token: int = -1
    token_only: bool = False
    reserve_sent: float = 0.0
    first_write: float = 0.0
    landed: float = 0.0
    done: float = 0.0


class LoadOver(Message, frozen=True):
    """A load has ended here; vLLM's step outputs tell the same, but late."""

    report: LoadReport


AnyMessage = (
    Find
    | Found
    | Hello
    | Welcome
    | Refused
    | OpenLink
    | Reserve
    | Cancel
    | Release
    | Done
    | Failed
    | CancelAck
    | Heartbeat
    | HeartbeatAck
    | LocalDirectory
    | LocalExpect
    | LocalReserve
    | LocalFirstToken
    | LocalDrop
    | LocalAbort
    | LocalRelease
    | LoadOver
)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnyMessage).decode


def pack_blocks(ids: Sequence[int] | BlockIds) -> bytes:
    return np.asarray(ids, "<i4").tobytes()


def unpack_blocks(raw: bytes) -> BlockIds:
    """Raises ValueError if `raw` is not a whole number of int32."""
    return np.frombuffer(raw, "<i4").astype(np.int64)


def unpack_want(want: Sequence[WantBlocks]) -> tuple[Want, ...]:
    """Raises ValueError if an entry is malformed."""
    unpacked = tuple(Want(unpack_blocks(w.index), unpack_blocks(w.block)) for w in want)
    if any(w.index.size != w.block.size for w in unpacked):
        raise ValueError("block positions and block ids differ in number")
    return unpacked
