"""A target as an initiator names it: where it is, what it may be written."""

import base64
from collections.abc import Sequence

import msgspec
import numpy as np

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.memory import Region, U64Array
from mooncake_connector.kv_transfer.outbound import Outbound
from mooncake_connector.kv_transfer.transport import Endpoint

_SCHEME = "mooncake://"


class Address(msgspec.Struct, frozen=True):
    """What a target hands to one initiator: where to connect, and what it may write. As text: `str`.

    Attributes:
        endpoint: good for one link.
        key: of the grant.
        regions: the memory that it covers.
        paths: ways that the target can be reached by, the preferred first.
        pid: of the target, which process_vm has to let read the initiator's memory.
    """

    endpoint: Endpoint
    key: int
    regions: tuple[Region, ...]
    paths: tuple[str, ...]
    pid: int

    def __str__(self) -> str:
        return _SCHEME + base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode()

    @staticmethod
    def parse(text: str) -> "Address":
        """Raises ConfigError if `text` is no address."""
        try:
            if not text.startswith(_SCHEME):
                raise ValueError(f"it does not begin with {_SCHEME}")
            return _address.decode(base64.urlsafe_b64decode(text[len(_SCHEME) :]))
        except (ValueError, msgspec.MsgspecError) as bad:
            raise ConfigError(f"{text[:40]!r} is no address of a transfer engine: {bad}") from bad


_address = msgspec.msgpack.Decoder(Address)


class Peer:
    """A target, as `TransferEngine.connect` gives it.

    Attributes:
        name: for logs.
        key: the grant that writes use unless they name another.
        regions: the target's memory behind that grant.
    """

    def __init__(self, name: str, key: int, regions: Sequence[Region], outbound: Outbound) -> None:
        self.name, self.key, self.regions = name, key, tuple(regions)
        self.outbound = outbound

    def close(self) -> None:
        """Hang up; transfers that run end with an error."""
        self.outbound.close()

    def place(self, region: Region, offset: int) -> tuple[U64Array, U64Array, U64Array]:
        """Which of the peer's ranges `region` meets from `offset` on, as if its regions were one.

        Returns:
            uint64 [n] each: addresses here, addresses there, lengths.

        Raises:
            ConfigError: The peer's regions end before `region` does.
        """
        length = np.array([r.length for r in self.regions], np.int64)
        end = np.cumsum(length)
        total = int(end[-1]) if end.size else 0
        if offset < 0 or offset + region.length > total:
            raise ConfigError(
                f"bytes {offset} to {offset + region.length} do not fit the {total} bytes that "
                f"{self.name} offered: offer more, or move less"
            )
        low = np.maximum(end - length, offset)
        high = np.minimum(end, offset + region.length)
        meets = high > low
        base = np.array([r.address for r in self.regions], np.int64) - (end - length)
        there = (base + low)[meets].astype(np.uint64)
        here = (region.address + low - offset)[meets].astype(np.uint64)
        return here, there, (high - low)[meets].astype(np.uint64)
