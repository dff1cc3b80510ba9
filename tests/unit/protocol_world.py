"""A world for the push protocol: two schedulers, their memories and a bad network, under the real ends.

The transport modelled here is weaker than ours: the target can't refuse a write, it can only have a fence
*completed* some time after asking for it, and until then anything in flight may land (as with RDMA or CUDA
IPC). What holds here holds for transports whose target writes its own memory all the more.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv_transfer.clock import LayerClock
from mooncake_connector.kv_transfer.decode_end import DecodeEnd
from mooncake_connector.kv_transfer.layout import Group, KVLayout, Plane, WorkerInfo
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.messages import (
    PROTOCOL,
    LoadReport,
    LocalRelease,
    LocalReserve,
    Message,
    OpenLink,
    WantBlocks,
    pack_blocks,
)
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.prefill_end import PrefillEnd
from mooncake_connector.kv_transfer.push import Chunk
from mooncake_connector.kv_transfer.session import Outcome
from mooncake_connector.kv_transfer.transport.base import Endpoint, Mark, SourceIdentity

LAYERS = 2
BLOCK = 4  # tokens
PAGE = 16  # bytes of one block of one layer
POOL = 12  # blocks on each side
PLANE = 1 << 20  # bytes between the layers

CONFIG = ConnectorConfig(
    lease_s=30,
    heartbeat_s=5,
    peer_timeout_s=12,
    load_timeout_s=60,
    match_timeout_s=5,
    handshake_timeout_s=3,
    push_bytes=0,
)


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


def info(engine_id: str, incarnation: int, base: int) -> WorkerInfo:
    planes = tuple(Plane(layer, 0, base + layer * PLANE, PAGE, PAGE) for layer in range(LAYERS))
    layout = KVLayout(POOL, (Group(BLOCK, 0, "full"),), planes, ("page",) * LAYERS)
    return WorkerInfo(
        protocol=PROTOCOL,
        plugin="0",
        engine="none",
        engine_id=engine_id,
        incarnation=str(incarnation),
        model="m",
        model_hash="h",
        dtype="float32",
        tp_size=1,
        pp_size=1,
        rank=0,
        layout=layout,
    )


class WriteAfterFree(AssertionError):
    """A byte landed in a block that its reservation no longer owns."""


@dataclass(eq=False)
class Connection:
    """One side channel and one data link between a decode and a prefill incarnation."""

    id: int
    prefill: "PrefillWorld"
    decode: "DecodeWorld"
    to_prefill: deque[Message] = field(default_factory=deque)
    to_decode: deque[Message] = field(default_factory=deque)
    offer: OpenLink | None = None
    name: str = ""
    linked: bool = False
    hung_up: bool = False  # by decode
    prefill_told: bool = False
    decode_told: bool = False

    @property
    def peer(self) -> bytes:
        return self.id.to_bytes(4, "big")


@dataclass(eq=False)
class FlyingWrite:
    connection: Connection
    key: int
    op: int
    pages: deque[tuple[int, int, int]]  # layer, source block, target block
    refused: bool = False


@dataclass(eq=False)
class PrefillRequest:
    id: str
    transfer: str
    prompt: int
    num_tokens: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    waiting: bool = True  # for its first chunk, or after a preemption
    ended: bool = False
    held: bool = False


class PrefillWorld:
    """Prefill's scheduler and memory, and the ports of the real `PrefillEnd`."""

    def __init__(self, world: "World", incarnation: int) -> None:
        self.world, self.incarnation, self.alive = world, incarnation, True
        self.clock = LayerClock(LAYERS)
        self.end = PrefillEnd(
            info("p", incarnation, 0), SourceIdentity(1, "h", 0, b""), CONFIG, self, self.clock, ["model"]
        )
        self.free = list(range(1, POOL))
        self.memory: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(LAYERS)]
        self.requests: dict[str, PrefillRequest] = {}
        self.steps = 0
        self.chunk: tuple[PrefillRequest, int, int] | None = None  # of the running step: request, start, end
        self.layers_written = LAYERS

    # the ports
    def send(self, peer: bytes, message: Message) -> None:
        if (connection := self.world.connection(peer)) is not None and not connection.hung_up:
            connection.to_decode.append(message)

    def open_link(self, peer: bytes, name: str, offer: OpenLink) -> None:
        if (connection := self.world.connection(peer)) is not None:
            connection.offer = offer

    def write(self, peer: bytes, key: int, op: int, plan: CopyPlan) -> None:
        connection = self.world.connection(peer)
        assert connection is not None
        assert connection.linked, "a write before its link"
        pages: deque[tuple[int, int, int]] = deque()
        for src, dst, length in zip(plan.src.tolist(), plan.dst.tolist(), plan.length.tolist(), strict=True):
            for offset in range(0, length, PAGE):
                layer, source = divmod(src + offset, PLANE)
                pages.append((layer, source // PAGE, (dst + offset - DECODE_BASE) % PLANE // PAGE))
        self.world.flying.append(FlyingWrite(connection, key, op, pages, key in self.world.fenced))

    def cancel(self, key: int) -> None:
        """Writes of which nothing was sent end; which these are is up to the network."""
        for write in [w for w in self.world.flying if w.key == key][1::2]:
            write.refused = True

    def marks(self, peer: bytes) -> tuple[Mark, ...]:
        return (Mark(0, 1),)

    def close_link(self, peer: bytes) -> None:
        self.world.end_writes(lambda w: w.connection.peer == peer)
        if (connection := self.world.connection(peer)) is not None:
            connection.linked, connection.prefill_told = False, True

    def allow_reader(self, pid: int) -> None: ...

    def sent(self, request_id: str) -> None:
        request = self.requests.pop(request_id)
        assert request.held, "blocks freed that nobody held"
        self.free += request.blocks

    # the scheduler
    def begin_step(self, request: PrefillRequest, tokens: int, hits: int) -> None:
        """Compute `tokens` more; a request that begins finds `hits` blocks in the prefix cache."""
        assert self.chunk is None
        start = request.computed
        if request.waiting:
            start = min(hits * BLOCK, request.num_tokens - 1) // BLOCK * BLOCK
        end = min(start + tokens, request.num_tokens)
        new = blocks_of(end) - len(request.blocks)
        if new > len(self.free):
            return
        fresh = [self.free.pop(0) for _ in range(new)]
        request.blocks += fresh
        if request.waiting:
            for layer in range(LAYERS):
                for i in range(start // BLOCK):
                    self.memory[layer][request.blocks[i]] = (request.prompt, i, BLOCK)
        self.steps += 1
        blocks = (list(request.blocks if request.waiting else fresh),)
        chunk = Chunk(
            request.id, request.transfer, hash_of(request.prompt), start, end, blocks, request.waiting, True
        )
        request.waiting = False
        request.computed = end
        self.end.step(self.steps, [chunk], self.world.now)
        self.chunk, self.layers_written = (request, start, end), 0

    def write_layer(self) -> None:
        assert self.chunk is not None
        request, start, end = self.chunk
        for i in range(start // BLOCK, blocks_of(end)):
            filled = min(BLOCK, end - i * BLOCK)
            self.memory[self.layers_written][request.blocks[i]] = (request.prompt, i, filled)
        self.clock.layer_written(self.layers_written, self.steps)
        self.layers_written += 1
        if self.layers_written == LAYERS:
            self.clock.step_ended(self.steps)
            self.chunk = None

    def preempt(self, request: PrefillRequest) -> None:
        self.end.preempted([request.id])
        self.scrap(request)
        request.waiting, request.computed = True, 0

    def finish(self, request: PrefillRequest, aborted: bool) -> None:
        request.ended = True
        request.held = not aborted
        if aborted:
            del self.requests[request.id]
            self.scrap(request)
        self.end.ended(request.id, request.held, self.world.now)

    def scrap(self, request: PrefillRequest) -> None:
        """Free its blocks; others write into them at once."""
        for block in request.blocks:
            for layer in range(LAYERS):
                self.memory[layer][block] = (-1, -1, BLOCK)
        self.free += request.blocks
        request.blocks = []


DECODE_BASE = 1 << 40


def hash_of(prompt: int) -> bytes:
    return prompt.to_bytes(16, "big")


@dataclass(eq=False)
class DecodeRequest:
    id: str
    transfer: str
    prompt: int
    num_tokens: int
    cached: int  # blocks of its own prefix cache
    blocks: list[int]
    reported: LoadReport | None = None
    gone: bool = False


class DecodeWorld:
    """Decode's scheduler and memory, and the ports of the real `DecodeEnd`."""

    def __init__(self, world: "World", incarnation: int) -> None:
        self.world, self.incarnation, self.alive = world, incarnation, True
        # As agent.py does: reservations of two incarnations never share a key.
        self.end = DecodeEnd(
            info("d", incarnation, DECODE_BASE), CONFIG, self, pid=2, first_key=incarnation * 1_000_000 + 1
        )
        self.free = list(range(1, POOL))
        self.owner: dict[int, DecodeRequest] = {}
        self.memory: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(LAYERS)]
        self.requests: dict[str, DecodeRequest] = {}
        self.granted: dict[int, set[int]] = {}

    # the ports
    def dial(self, address: str) -> int:
        return self.world.dial(self, address).id

    def send(self, peer: int, message: Message) -> None:
        self.world.connections[peer].to_prefill.append(message)

    def hang_up(self, peer: int, name: str) -> None:
        self.world.connections[peer].hung_up = True

    def choose_paths(self, identity: SourceIdentity, theirs: Sequence[str]) -> tuple[tuple[str, ...], str]:
        return tuple(theirs), "it is one"

    def admit(self, name: str, paths: Sequence[str]) -> Endpoint:
        return Endpoint("", 0, name.encode())

    def grant(self, key: int, name: str, ranges: Ranges) -> None:
        blocks: set[int] = set()
        for start, end in zip(ranges.start.tolist(), ranges.end.tolist(), strict=True):
            blocks |= {(at - DECODE_BASE) % PLANE // PAGE for at in range(start, end, PAGE)}
        self.granted[key] = blocks

    def fence(self, key: int) -> None:
        self.world.fences.append((self, key))

    def ungrant(self, key: int) -> None:
        self.granted.pop(key, None)

    def await_marks(self, name: str, marks: Sequence[Mark], then: Callable[[float], None]) -> None:
        self.world.awaited.append((self, then))

    def report(self, report: LoadReport) -> None:
        request = self.requests[report.request_id]
        assert request.reported is None, "reported twice"
        request.reported = report
        if report.outcome is Outcome.LOADED:
            needed = request.num_tokens - 1
            for layer in range(LAYERS):
                for i in range(request.cached, blocks_of(needed)):
                    prompt, index, filled = self.memory[layer].get(request.blocks[i], (0, 0, 0))
                    assert (prompt, index) == (request.prompt, i), "another request's KV was taken for ours"
                    assert filled >= min(BLOCK, needed - i * BLOCK), "KV was taken before it was complete"
        if request.gone or report.outcome is not Outcome.LOADED:
            self.release(request)

    # the scheduler
    def reserve(self, request: DecodeRequest, address: str) -> None:
        self.requests[request.id] = request
        for block in request.blocks:
            self.owner[block] = request
        index = list(range(request.cached, blocks_of(request.num_tokens - 1)))
        want = WantBlocks(pack_blocks(index), pack_blocks([request.blocks[i] for i in index]))
        self.end.reserve(
            LocalReserve(
                b"",
                request.id,
                "p",
                address,
                request.transfer,
                hash_of(request.prompt),
                request.num_tokens - 1,
                (want,),
            ),
            self.world.now,
        )

    def abort(self, request: DecodeRequest) -> None:
        request.gone = True
        if request.reported is None:
            self.end.abort(request.id, self.world.now)
        else:
            self.release(request)

    def release(self, request: DecodeRequest) -> None:
        """Its blocks go back to the pool, and are soon another's."""
        for block in request.blocks:
            if self.owner.get(block) is request:
                del self.owner[block]
                self.free.append(block)
        request.blocks = []


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.connections: dict[int, Connection] = {}
        self.flying: list[FlyingWrite] = []
        self.fences: list[tuple[DecodeWorld, int]] = []
        self.fenced: set[int] = set()
        self.awaited: list[tuple[DecodeWorld, Callable[[float], None]]] = []
        self.made = 0
        self.prefill = PrefillWorld(self, 0)
        self.decode = DecodeWorld(self, 0)
        self.dead: list[DecodeWorld] = []

    def number(self) -> int:
        self.made += 1
        return self.made

    @property
    def address(self) -> str:
        return f"tcp://p:{self.prefill.incarnation}"

    def connection(self, peer: bytes) -> Connection | None:
        return self.connections.get(int.from_bytes(peer, "big"))

    def dial(self, decode: DecodeWorld, address: str) -> Connection:
        connection = Connection(self.number(), self.prefill, decode)
        if address != self.address:  # nobody listens there any more
            connection.prefill_told = True
            connection.hung_up = True
        self.connections[connection.id] = connection
        return connection

    # what can happen
    def deliver(
        self, connection: Connection, to_prefill: bool, *, lose: bool = False, double: bool = False
    ) -> None:
        queue = connection.to_prefill if to_prefill else connection.to_decode
        message = queue[0] if double else queue.popleft()
        if lose:
            return
        if to_prefill:
            if connection.prefill is self.prefill and not connection.prefill_told:
                self.prefill.end.message(connection.peer, message, self.now)
        elif connection.decode is self.decode and not connection.hung_up:
            self.decode.end.message(connection.id, message, self.now)

    def calm(self) -> None:
        """Everything under way in the network arrives, answers to it included."""
        for _ in range(6):
            for c in list(self.connections.values()):
                while c.to_prefill:
                    self.deliver(c, True)
                while c.to_decode:
                    self.deliver(c, False)
                if c.offer is not None:
                    self.complete_link(c)
            while self.awaited:
                self.see_marks()

    def complete_link(self, connection: Connection) -> None:
        assert connection.offer is not None
        name, connection.offer = connection.offer.endpoint.token.decode(), None
        if connection.hung_up or connection.prefill_told or connection.prefill is not self.prefill:
            return
        connection.name, connection.linked = name, True
        self.decode.end.link_up(name, self.now)
        self.prefill.end.link_up(connection.peer, self.now)

    def notice(self, connection: Connection, by_prefill: bool) -> None:
        """One side learns that the other is gone (or hung up, or that the link broke)."""
        if by_prefill:
            connection.prefill_told, connection.linked = True, False
            if connection.prefill is self.prefill:
                # The contract of a link that is down: no write of it is in flight.
                self.end_writes(lambda w: w.connection is connection)
                self.prefill.end.link_down(connection.peer, "gone", self.now)
        else:
            connection.decode_told = True
            if connection.decode is self.decode:
                self.decode.end.peer_lost(connection.id, "gone", self.now)

    def end_writes(self, which: Callable[[FlyingWrite], bool]) -> None:
        self.flying = [w for w in self.flying if not which(w)]

    def land(self, write: FlyingWrite, pages: int) -> None:
        """Some pages of a write land; the last one ends it."""
        decode, prefill = write.connection.decode, write.connection.prefill
        while write.pages and pages:
            pages -= 1
            layer, source, target = write.pages.popleft()
            if write.refused or decode is not self.decode:
                continue
            if target not in decode.granted.get(write.key, ()):
                raise WriteAfterFree(f"block {target} got bytes of reservation {write.key}")
            decode.memory[layer][target] = prefill.memory[layer].get(source, (-2, -2, 0))
        if not write.pages:
            self.flying.remove(write)
            if prefill is self.prefill and not write.connection.prefill_told:
                why = "fenced" if write.refused else None
                self.prefill.end.write_ended(write.key, write.op, why, self.now)

    def complete_fence(self) -> None:
        decode, key = self.fences.pop(0)
        self.fenced.add(key)
        for write in self.flying:
            if write.key == key:
                write.refused = True
        if decode is self.decode:
            decode.end.fenced(key, self.now)

    def see_marks(self) -> None:
        decode, then = self.awaited.pop(0)
        if decode is self.decode:
            then(self.now)

    def crash_prefill(self) -> None:
        """What its hardware had in flight may still land: on decode's memory it has the rights it had."""
        self.prefill.alive = False
        self.prefill = PrefillWorld(self, self.prefill.incarnation + 1)

    def crash_decode(self) -> None:
        self.decode.alive = False
        self.dead.append(self.decode)
        self.decode = DecodeWorld(self, self.decode.incarnation + 1)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.prefill.end.tick(self.now)
        self.decode.end.tick(self.now)
        self.prefill.end.pump(self.now)

    def release(self, transfer: str, prompt: int) -> None:
        self.decode.end.release(LocalRelease(b"", "p", self.address, transfer, hash_of(prompt)), self.now)
