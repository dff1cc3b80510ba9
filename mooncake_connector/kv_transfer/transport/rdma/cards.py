"""What the two ends of an RDMA link tell each other, over its streams."""

from typing import Any, TypeVar

import msgspec

from mooncake_connector.errors import TransportError

NICS, OPEN, REGIONS, FENCE = "rdma.nics", "rdma.open", "rdma.regions", "rdma.fence"
"""The questions' topics: `Hello` -> `Nics`; `Open` -> `Opened`; `Which` -> `Regions`; `Fence` -> nothing,
once it is in force."""


class NicCard(msgspec.Struct, frozen=True):
    """A NIC of the target.

    Attributes:
        penalty: 1 if it is next to the target's memory, more if it is farther.
        gid: for the log only.
    """

    label: str
    gid: str
    speed: float
    penalty: float


class PairCard(msgspec.Struct, frozen=True):
    """One end of a queue pair.

    Attributes:
        mtu: the port's active one, as verbs number it.
        lid: of InfiniBand; 0 on RoCE.
    """

    gid: str
    lid: int
    qpn: int
    psn: int
    mtu: int


class Hello(msgspec.Struct, frozen=True):
    """Which NICs are there?

    Attributes:
        token: of the link's endpoint: proof that this is the very link that was admitted.
    """

    token: bytes


class Nics(msgspec.Struct, frozen=True):
    """Attributes: nics: those with an active port, the nearest to the target's memory first."""

    nics: list[NicCard]


class Open(msgspec.Struct, frozen=True):
    """Make the other end of a rail.

    Attributes:
        number: of the rail, never used before on this link.
        nic: label of the target's NIC.
    """

    token: bytes
    number: int
    nic: str
    card: PairCard


class Opened(msgspec.Struct, frozen=True):
    """The other end, ready to be written to."""

    card: PairCard
    regions: list[tuple[int, int, int, int]]


class Which(msgspec.Struct, frozen=True):
    """Which regions can be written over a NIC of the target?"""

    token: bytes
    nic: str


class Regions(msgspec.Struct, frozen=True):
    """Attributes: regions: (first byte, length, what the NIC calls the first byte, rkey) of each."""

    regions: list[tuple[int, int, int, int]]


class Fence(msgspec.Struct, frozen=True):
    """Make sure that nothing lands any more over this rail, now or later."""

    token: bytes
    number: int


Body = TypeVar("Body", Hello, Nics, Open, Opened, Which, Regions, Fence)

# Made once, at import, as in `wire`.
_DECODERS: dict[type, Any] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Hello, Nics, Open, Opened, Which, Regions, Fence)
}


def encode(body: Body) -> bytes:
    return msgspec.msgpack.encode(body)


def decode(raw: bytes, kind: type[Body]) -> Body:
    """Raises: TransportError: It is malformed."""
    try:
        body: Body = _DECODERS[kind].decode(raw)
    except msgspec.MsgspecError as bad:
        raise TransportError(f"malformed rdma {kind.__name__}: {bad}; use one version on both sides") from bad
    return body
