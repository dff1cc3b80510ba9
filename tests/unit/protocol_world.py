"""A world for the push protocol: two schedulers, memories of all ranks, a bad network, under the real ends.

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
from mooncake_connector.kv_transfer.layout import Field, Group, KVLayout, Plane, WorkerInfo
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
from mooncake_connector.kv_transfer.routes import WorkerAt
from mooncake_connector.kv_transfer.session import Outcome
from mooncake_connector.kv_transfer.transport.base import Endpoint, Mark, SourceIdentity

LAYERS = 2
BLOCK = 4  # tokens
CELL = 16  # bytes of one head of one block of one layer
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

Cell = tuple[int, int, int]
"""Layer, block, head (of those that the rank holds)."""


@dataclass(frozen=True)
class Ranks:
    """How many ranks each side has, and how many KV heads the model: fewer than ranks are held alike."""

    prefill: int = 1
    decode: int = 1
    heads: int = 1


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


def info(engine_id: str, incarnation: int, base: int, tp_size: int, rank: int, heads: int) -> WorkerInfo:
    own = max(1, heads // tp_size)
    content = (Field(0, CELL // BLOCK, CELL // BLOCK),)
    planes = tuple(
        Plane(layer, 0, base + layer * PLANE, own * CELL, own * CELL, BLOCK, own, CELL, content)
        for layer in range(LAYERS)
    )
    return WorkerInfo(
        protocol=PROTOCOL,
        plugin="0",
        engine="none",
        engine_id=engine_id,
        incarnation=f"{incarnation}-{rank}",  # each worker draws its own
        model="m",
        model_hash="h",
        dtype="float32",
        tp_size=tp_size,
        pp_size=1,
        rank=rank,
        layout=KVLayout(
            POOL,
            (Group(BLOCK, 0, "full"),),
            planes,
            ("page",) * LAYERS,
            heads=(heads,) * LAYERS,
        ),
    )


class WriteAfterFree(AssertionError):
    """A byte landed in a block that its reservation no longer owns."""


@dataclass(eq=False)
class Connection:
    """One side channel and one data link between a rank of decode and one of prefill."""

    id: int
    prefill: "PrefillRank"
    decode: "DecodeRank"
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
    cells: deque[tuple[Cell, Cell]]
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
    sent: int = 0  # by so many ranks


class PrefillRank:
    """One rank's memory, and the ports of its real `PrefillEnd`."""

    def __init__(self, engine: "PrefillWorld", rank: int) -> None:
        world = engine.world
        self.world, self.engine = world, engine
        self.clock = LayerClock(LAYERS)
        self.info = info("p", engine.incarnation, 0, world.ranks.prefill, rank, world.ranks.heads)
        self.address = f"tcp://p:{engine.incarnation}:{rank}"
        self.end = PrefillEnd(self.info, SourceIdentity(1, "h", 0, b""), CONFIG, self, self.clock, ["model"])
        self.memory: dict[Cell, tuple[int, int, int, int]] = {}

    @property
    def alive(self) -> bool:
        return self.world.prefill is self.engine

    def fill(self, layer: int, block: int, prompt: int, index: int, filled: int) -> None:
        for at, head in enumerate(self.info.heads_of(self.info.layout.planes[layer])):
            self.memory[layer, block, at] = (prompt, index, filled, head)

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
        cells: deque[tuple[Cell, Cell]] = deque()
        flat = plan.flat()
        for src, dst, length in zip(flat.src.tolist(), flat.dst.tolist(), flat.length.tolist(), strict=True):
            for offset in range(0, length, CELL):
                source = cell_at(self.info, src + offset)
                cells.append((source, cell_at(connection.decode.info, dst + offset - DECODE_BASE)))
        self.world.flying.append(FlyingWrite(connection, key, op, cells, key in self.world.fenced))

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
        self.engine.sent(request_id)


def cell_at(worker: WorkerInfo, offset: int) -> Cell:
    layer, inside = divmod(offset, PLANE)
    block, head = divmod(inside // CELL, worker.layout.planes[0].heads)
    return layer, block, head


class PrefillWorld:
    """Prefill's scheduler, and its ranks, which compute in step."""

    def __init__(self, world: "World", incarnation: int) -> None:
        self.world, self.incarnation = world, incarnation
        self.ranks = [PrefillRank(self, rank) for rank in range(world.ranks.prefill)]
        for rank in self.ranks:
            rank.end.directory([WorkerAt(r.address, r.info) for r in self.ranks])
        self.free = list(range(1, POOL))
        self.requests: dict[str, PrefillRequest] = {}
        self.steps = 0
        self.chunk: tuple[PrefillRequest, int, int] | None = None  # of the running step: request, start, end
        self.layers_written = LAYERS

    @property
    def num_transfers(self) -> int:
        return sum(rank.end.num_transfers for rank in self.ranks)

    def sent(self, request_id: str) -> None:
        """A rank needs the request's blocks no more: with the last one's word they are free."""
        request = self.requests[request_id]
        assert request.held, "blocks freed that nobody held"
        request.sent += 1
        assert request.sent <= len(self.ranks), "a rank has freed blocks twice"
        if request.sent == len(self.ranks):
            del self.requests[request_id]
            self.scrap(request)

    # the scheduler
    def expect(self, request: PrefillRequest) -> None:
        self.requests[request.id] = request
        for rank in self.ranks:
            rank.end.expect(request.id, request.transfer, hash_of(request.prompt), self.world.now)

    def pump(self) -> None:
        for rank in self.ranks:
            rank.end.pump(self.world.now)

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
            for rank in self.ranks:
                for layer in range(LAYERS):
                    for i in range(start // BLOCK):
                        rank.fill(layer, request.blocks[i], request.prompt, i, BLOCK)
        self.steps += 1
        blocks = (list(request.blocks if request.waiting else fresh),)
        chunk = Chunk(
            request.id, request.transfer, hash_of(request.prompt), start, end, blocks, request.waiting, True
        )
        request.waiting = False
        request.computed = end
        for rank in self.ranks:
            rank.end.step(self.steps, [chunk], self.world.now)
        self.chunk, self.layers_written = (request, start, end), 0

    def write_layer(self) -> None:
        assert self.chunk is not None
        request, start, end = self.chunk
        for rank in self.ranks:
            for i in range(start // BLOCK, blocks_of(end)):
                filled = min(BLOCK, end - i * BLOCK)
                rank.fill(self.layers_written, request.blocks[i], request.prompt, i, filled)
            rank.clock.layer_written(self.layers_written, self.steps)
        self.layers_written += 1
        if self.layers_written == LAYERS:
            for rank in self.ranks:
                rank.clock.step_ended(self.steps)
            self.chunk = None

    def preempt(self, request: PrefillRequest) -> None:
        for rank in self.ranks:
            rank.end.preempted([request.id])
        self.scrap(request)
        request.waiting, request.computed = True, 0

    def finish(self, request: PrefillRequest, aborted: bool) -> None:
        request.ended = True
        request.held = not aborted
        if aborted:
            del self.requests[request.id]
            self.scrap(request)
        for rank in self.ranks:
            rank.end.ended(request.id, request.held, self.world.now)

    def scrap(self, request: PrefillRequest) -> None:
        """Free its blocks; others write into them at once."""
        for block in request.blocks:
            for rank in self.ranks:
                for layer in range(LAYERS):
                    rank.fill(layer, block, -1, -1, BLOCK)
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
    reports: dict[int, LoadReport] = field(default_factory=dict)  # by rank
    reported: Outcome | None = None  # by all ranks
    gone: bool = False


class DecodeRank:
    """One rank's memory, and the ports of its real `DecodeEnd`."""

    def __init__(self, engine: "DecodeWorld", rank: int) -> None:
        world = engine.world
        self.world, self.engine, self.rank = world, engine, rank
        ranks = world.ranks
        self.info = info("d", engine.incarnation, DECODE_BASE, ranks.decode, rank, ranks.heads)
        # As agent.py does: reservations of two incarnations, or ranks, never share a key.
        first_key = (engine.incarnation * 16 + rank) * 1_000_000 + 1
        self.end = DecodeEnd(self.info, CONFIG, self, pid=2, first_key=first_key)
        self.memory: dict[Cell, tuple[int, int, int, int]] = {}
        self.granted: dict[int, set[Cell]] = {}

    @property
    def alive(self) -> bool:
        return self.world.decode is self.engine

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
        self.granted[key] = {
            cell_at(self.info, at - DECODE_BASE)
            for start, end in zip(ranges.start.tolist(), ranges.end.tolist(), strict=True)
            for at in range(start, end, CELL)
        }

    def fence(self, key: int) -> None:
        self.world.fences.append((self, key))

    def ungrant(self, key: int) -> None:
        self.granted.pop(key, None)

    def await_marks(self, name: str, marks: Sequence[Mark], then: Callable[[float], None]) -> None:
        self.world.awaited.append((self, then))

    def report(self, report: LoadReport) -> None:
        request = self.engine.requests[report.request_id]
        assert self.rank not in request.reports, "reported twice"
        if report.outcome is Outcome.LOADED:
            needed = request.num_tokens - 1
            heads = list(enumerate(self.info.heads_of(self.info.layout.planes[0])))
            for layer in range(LAYERS):
                for i in range(request.cached, blocks_of(needed)):
                    for at, head in heads:
                        cell = self.memory.get((layer, request.blocks[i], at), (0, 0, 0, 0))
                        expected = (request.prompt, i, head)
                        assert (*cell[:2], cell[3]) == expected, "other KV was taken for ours"
                        assert cell[2] >= min(BLOCK, needed - i * BLOCK), (
                            "KV was taken before it was complete"
                        )
        request.reports[self.rank] = report
        self.engine.reported(request)


class DecodeWorld:
    """Decode's scheduler, and its ranks."""

    def __init__(self, world: "World", incarnation: int) -> None:
        self.world, self.incarnation = world, incarnation
        self.ranks = [DecodeRank(self, rank) for rank in range(world.ranks.decode)]
        for rank in self.ranks:
            rank.end.directory([WorkerAt("", r.info) for r in self.ranks])
        self.free = list(range(1, POOL))
        self.owner: dict[int, DecodeRequest] = {}
        self.requests: dict[str, DecodeRequest] = {}

    @property
    def num_loads(self) -> int:
        return sum(rank.end.num_loads for rank in self.ranks)

    @property
    def granted(self) -> bool:
        return any(rank.granted for rank in self.ranks)

    def reported(self, request: DecodeRequest) -> None:
        """A rank has reported; with the last one's word the request goes on, or its blocks are free."""
        if len(request.reports) < len(self.ranks):
            return
        outcomes = {report.outcome for report in request.reports.values()}
        request.reported = outcomes.pop() if len(outcomes) == 1 else Outcome.FAILED
        if request.gone or request.reported is not Outcome.LOADED:
            self.release(request)

    # the scheduler
    def reserve(self, request: DecodeRequest, address: str) -> None:
        self.requests[request.id] = request
        for block in request.blocks:
            self.owner[block] = request
        index = list(range(request.cached, blocks_of(request.num_tokens - 1)))
        want = WantBlocks(pack_blocks(index), pack_blocks([request.blocks[i] for i in index]))
        for rank in self.ranks:
            rank.end.reserve(
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
            for rank in self.ranks:
                rank.end.abort(request.id, self.world.now)
        else:
            self.release(request)

    def release(self, request: DecodeRequest) -> None:
        """Its blocks go back to the pool, and are soon another's."""
        granted = {cell[1] for rank in self.ranks for cells in rank.granted.values() for cell in cells}
        if granted & set(request.blocks):
            raise WriteAfterFree(f"blocks of {request.id} are free, and prefill may still write into them")
        for block in request.blocks:
            if self.owner.get(block) is request:
                del self.owner[block]
                self.free.append(block)
        request.blocks = []


class World:
    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.now = 100.0
        self.connections: dict[int, Connection] = {}
        self.flying: list[FlyingWrite] = []
        self.fences: list[tuple[DecodeRank, int]] = []
        self.fenced: set[int] = set()
        self.awaited: list[tuple[DecodeRank, Callable[[float], None]]] = []
        self.made = 0
        self.prefill = PrefillWorld(self, 0)
        self.decode = DecodeWorld(self, 0)

    def number(self) -> int:
        self.made += 1
        return self.made

    @property
    def address(self) -> str:
        return self.prefill.ranks[0].address

    def connection(self, peer: bytes) -> Connection | None:
        return self.connections.get(int.from_bytes(peer, "big"))

    def dial(self, decode: DecodeRank, address: str) -> Connection:
        rank = next((r for r in self.prefill.ranks if r.address == address), None)
        connection = Connection(self.number(), rank or self.prefill.ranks[0], decode)
        if rank is None:  # nobody listens there any more
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
            if connection.prefill.alive and not connection.prefill_told:
                connection.prefill.end.message(connection.peer, message, self.now)
        elif connection.decode.alive and not connection.hung_up:
            connection.decode.end.message(connection.id, message, self.now)

    def calm(self) -> None:
        """Everything under way in the network arrives, answers to it included."""
        for _ in range(8):
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
        if connection.hung_up or connection.prefill_told or not connection.prefill.alive:
            return
        connection.name, connection.linked = name, True
        if connection.decode.alive:
            connection.decode.end.link_up(name, self.now)
        connection.prefill.end.link_up(connection.peer, self.now)

    def notice(self, connection: Connection, by_prefill: bool) -> None:
        """One side learns that the other is gone (or hung up, or that the link broke)."""
        if by_prefill:
            connection.prefill_told, connection.linked = True, False
            if connection.prefill.alive:
                # The contract of a link that is down: no write of it is in flight.
                self.end_writes(lambda w: w.connection is connection)
                connection.prefill.end.link_down(connection.peer, "gone", self.now)
        else:
            connection.decode_told = True
            if connection.decode.alive:
                connection.decode.end.peer_lost(connection.id, "gone", self.now)

    def end_writes(self, which: Callable[[FlyingWrite], bool]) -> None:
        self.flying = [w for w in self.flying if not which(w)]

    def land(self, write: FlyingWrite, cells: int) -> None:
        """Some cells of a write land; the last one ends it."""
        decode, prefill = write.connection.decode, write.connection.prefill
        while write.cells and cells:
            cells -= 1
            source, target = write.cells.popleft()
            if write.refused or not decode.alive:
                continue
            if target not in decode.granted.get(write.key, ()):
                raise WriteAfterFree(f"{target} got bytes of reservation {write.key}")
            decode.memory[target] = prefill.memory.get(source, (-2, -2, 0, 0))
        if not write.cells:
            self.flying.remove(write)
            if prefill.alive and not write.connection.prefill_told:
                why = "fenced" if write.refused else None
                prefill.end.write_ended(write.key, write.op, why, self.now)

    def complete_fence(self) -> None:
        decode, key = self.fences.pop(0)
        self.fenced.add(key)
        for write in self.flying:
            if write.key == key:
                write.refused = True
        if decode.alive:
            decode.end.fenced(key, self.now)

    def see_marks(self) -> None:
        decode, then = self.awaited.pop(0)
        if decode.alive:
            then(self.now)

    def crash_prefill(self) -> None:
        """What its hardware had in flight may still land: on decode's memory it has the rights it had."""
        self.prefill = PrefillWorld(self, self.prefill.incarnation + 1)

    def crash_decode(self) -> None:
        self.decode = DecodeWorld(self, self.decode.incarnation + 1)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for prefill in self.prefill.ranks:
            prefill.end.tick(self.now)
        for decode in self.decode.ranks:
            decode.end.tick(self.now)
        self.prefill.pump()

    def release(self, transfer: str, prompt: int) -> None:
        for rank in self.decode.ranks:
            rank.end.release(LocalRelease(b"", "p", self.address, transfer, hash_of(prompt)), self.now)
