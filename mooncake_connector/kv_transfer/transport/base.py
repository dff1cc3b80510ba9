"""What a transport is: the contract that tcp and process_vm (later rdma and cuda_ipc) fulfil.

Roles. The *initiator* (prefill) owns the source and decides when bytes move. The *target* (decode) owns the
memory they land in and may take back its permission at any time. Between two processes there is one `Link`
from initiator to target, opened at the handshake; it also is the sign of life: when either process dies both
sides learn it at once.

The rule every transport obeys: **after `Target.revoke(key)` returned, no byte lands under that key**,
whatever the initiator is doing (running, stopped, partitioned, malicious).
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.plan import CopyPlan


class SourceIdentity(msgspec.Struct, frozen=True):
    """How a target on the same host can recognise and read an initiator's memory.

    Attributes:
        pid: process id inside its own pid namespace.
        host_id: equal for two processes exactly if they share a kernel boot and a pid namespace.
        probe_address: address of `probe_value` in the initiator, for a trial read.
        probe_value: random bytes that prove the trial read reached the right process.
    """

    pid: int
    host_id: str
    probe_address: int
    probe_value: bytes


class Endpoint(msgspec.Struct, frozen=True):
    """Where an initiator opens its link to a target, and the secret that admits it (good for one peer)."""

    host: str
    port: int
    token: bytes


class Landed(msgspec.Struct, frozen=True):
    """What arrived under a grant until it was revoked.

    Attributes:
        nbytes: bytes written, those of unfinished writes included; bytes that came twice count twice.
        writes: calls of `Link.write` that landed as a whole.
    """

    nbytes: int
    writes: int


class Link(Protocol):
    """Initiator's side. Thread-safe; `write` only enqueues."""

    path: str

    def write(self, key: int, plan: CopyPlan, on_done: Callable[[str | None], None]) -> None:
        """Move `plan`'s bytes into the target's memory under grant `key`.

        `on_done(None)` is called from a transport thread once every byte has landed in the target's memory,
        `on_done(reason)` if the target refused or the link broke. Called exactly once for each write. Unless
        the link broke, nothing of the write is under way any more then: the source's memory may be reused.
        On a link that is down already it is called before `write` returns.
        """

    def close(self) -> None:
        """Close all connections; writes not yet landed end with a reason."""


class Target(Protocol):
    """Target's side: one per process, shared by all peers. Thread-safe."""

    def admit(self, peer: str) -> Endpoint:
        """A fresh endpoint for one link from `peer`."""

    def grant(self, key: int, peer: str, ranges: Ranges) -> None:
        """Allow `peer` to write into `ranges` under `key` until revoked."""

    def revoke(self, key: int) -> Landed:
        """Fence: when this returns no byte can land under `key` any more. Unknown keys: nothing landed."""

    def drop(self, peer: str) -> None:
        """Close the peer's connections and forget its token."""

    def close(self) -> None:
        """Stop listening and close every connection."""
