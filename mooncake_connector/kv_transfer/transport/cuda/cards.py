"""What the two ends of a cuda_ipc rail tell each other, over the link's streams."""

import msgspec

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.transport.cuda.share import Allocation

OPEN = "cuda.open"
"""The question's topic: `Open` -> `Opened`."""


class Open(msgspec.Struct, frozen=True):
    """Let this process's GPU write into the target's.

    Attributes:
        token: of the link's endpoint: proof that this is the very link that was admitted.
        host_id: as in `SourceIdentity`.
    """

    token: bytes
    pid: int
    host_id: str


class Opened(msgspec.Struct, frozen=True):
    """Attributes: pid: of the target; gate: its descriptor of the gate; allocations: all that it shares."""

    pid: int
    gate: int
    allocations: tuple[Allocation, ...]


encode = msgspec.msgpack.Encoder().encode
_open = msgspec.msgpack.Decoder(Open)
_opened = msgspec.msgpack.Decoder(Opened)


def decode_open(body: bytes) -> Open:
    """Raises TransportError if it is none."""
    try:
        return _open.decode(body)
    except msgspec.MsgspecError as bad:
        raise TransportError(f"cuda_ipc: a malformed question: {bad}") from bad


def decode_opened(body: bytes) -> Opened:
    """Raises TransportError if it is none."""
    try:
        return _opened.decode(body)
    except msgspec.MsgspecError as bad:
        raise TransportError(f"cuda_ipc: a malformed answer: {bad}") from bad
