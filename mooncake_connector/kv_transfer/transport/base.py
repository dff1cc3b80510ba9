"""What a transport is: the contract that tcp, process_vm, rdma and cuda_ipc fulfil.

Roles. The *initiator* (prefill) owns the source and decides when bytes move. The *target* (decode) owns the
memory they land in and may take back its permission at any time. Between two processes there is one `Link`
from initiator to target, opened at the handshake; it also is the sign of life: when either process dies both
sides learn it at once. A link consists of *rails*: one TCP connection, one pair of NICs, one GPU's stream.

Two rules that every transport obeys:

- After `Target.revoke(key)` returned (or `Target.fence` called back), no byte lands under that key, whatever
  the initiator is doing (running, stopped, partitioned, malicious).
- After `LinkEvents.rail_fenced(name)` no byte lands that was written over that rail before it went down.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

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
    """What arrived under a grant until it was revoked, as far as the target itself wrote it (not by rdma).

    Attributes:
        nbytes: bytes written, those of unfinished writes included; bytes that came twice count twice.
        writes: calls of `Rail.write` that landed as a whole.
    """

    nbytes: int
    writes: int


class Failure(msgspec.Struct, frozen=True):
    """Why a write did not land.

    Attributes:
        retry: the rail broke, another may carry it; False: the target refused, and would again.
    """

    reason: str
    retry: bool


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """How many of a rail's writes have completed; a one-sided transport's target must see as many.

    Attributes:
        rail: a number that both ends of the link know it by.
        count: of writes, since the rail was made.
    """

    rail: int
    count: int


class Ask(Protocol):
    """`Link.ask`."""

    def __call__(self, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None: ...


class Serve(Protocol):
    """`Target.serve`."""

    def __call__(self, topic: str, handler: Callable[[str, bytes], bytes]) -> None: ...


class Rail(Protocol):
    """One way from an initiator to a target. Thread-safe; `write` only enqueues.

    Attributes:
        name: what it is called in its link, also after it was restored.
        path: the transport.
        speed: bytes/s that the hardware claims; 0 if it claims nothing.
        penalty: 1 for the rail next to the memory, more for farther ones (NUMA tier).
        steady: `speed` is what it carries and it can't hang; how long writes take tells nothing of it, as
            they may wait for the GPU first (`CopyPlan.after`).
    """

    name: str
    path: str
    speed: float
    penalty: float
    steady: bool

    def write(self, key: int, plan: CopyPlan, on_done: Callable[[Failure | None], None]) -> None:
        """Move `plan`'s bytes into the target's memory under grant `key`.

        `on_done(None)` is called from a transport thread once every byte has landed (over a one-sided
        transport: once it is acknowledged, and the target has to see `Link.marks` before it looks). Called
        exactly once for each write, on a rail that is down before `write` returns.
        """


@runtime_checkable
class SyncRail(Rail, Protocol):
    """A rail that a caller can wait on with few hand-overs between threads, or none."""

    def write_sync(self, key: int, plan: CopyPlan, timeout: float) -> Failure | None:
        """`write`, and wait until every byte has landed, or nothing of it can land any more.

        Must not be called by whoever handles the link's events.

        Args:
            timeout: seconds without an answer after which the rail is given up.
        """


class LinkEvents(Protocol):
    """What a link tells its owner, from transport threads; must not block."""

    def rail_up(self, rail: Rail) -> None:
        """A rail can be used: at the start, and each time it was restored."""

    def rail_down(self, name: str, reason: str) -> None:
        """A rail is gone, or could not be restored. All its writes end as `Failure(retry=True)`."""

    def rail_fenced(self, name: str) -> None:
        """The target confirmed: nothing more lands over the rail that went down."""

    def link_down(self, reason: str) -> None:
        """No rail is left that could carry or fence anything: the peer died, hung up or refused. Final."""


class Link(Protocol):
    """All rails to one target. Connects in the background. Thread-safe."""

    def restore(self, rail: str) -> None:
        """Make a rail that is down anew; answered by `rail_up` or `rail_down`, after its fence."""

    def abandon(self, rail: str, reason: str) -> None:
        """Break a rail that is stuck; `rail_down` and `rail_fenced` follow."""

    def marks(self) -> tuple[Mark, ...]:
        """What the target has to see before it may use what has been written until now."""

    def ask(self, topic: str, body: bytes, on_answer: Callable[[bytes | Failure], None]) -> None:
        """Put a question to the target's handler of that topic, over any stream that is alive."""

    def close(self) -> None:
        """Close everything; writes not yet landed end as failures. `link_down` is not called."""


class Target(Protocol):
    """Target's side: one per process, shared by all peers. Thread-safe."""

    def admit(self, peer: str) -> Endpoint:
        """A fresh endpoint for one link from `peer`."""

    def grant(self, key: int, peer: str, ranges: Ranges) -> None:
        """Allow `peer` to write into `ranges` under `key` until revoked."""

    def revoke(self, key: int) -> Landed:
        """Take a grant back. Unknown keys: nothing landed.

        For what the target itself writes (tcp, process_vm) this is a fence: when it returns no byte can land
        under `key` any more. Against a one-sided transport use `fence`, unless the initiator has said that
        none of its writes is under way.
        """

    def serve(self, topic: str, handler: Callable[[str, bytes], bytes]) -> None:
        """Answer questions of a topic: ``handler(peer, body)``, on a receiver's thread.

        A handler that raises `TransportError` answers with its message.
        """

    def drop(self, peer: str) -> None:
        """Close the peer's connections and forget its token."""

    def close(self) -> None:
        """Stop listening and close every connection."""
