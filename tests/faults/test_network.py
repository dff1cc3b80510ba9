"""Networks that cut, delay, throttle, lose and garble: every byte is right, and recovery is bounded.

Bounds stated here: a connection that is cut costs 1 s, one that stalls `RailPolicy.stall_s` and 1 s; a
partition is noticed within `wire.SILENCE_S` and 5 s.
"""

import json
import os
import queue
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import TransferError
from mooncake_connector.kv_transfer.engine import Peer, TransferEngine
from mooncake_connector.kv_transfer.peer import Address
from mooncake_connector.kv_transfer.rails import RailPolicy
from mooncake_connector.kv_transfer.transport import wire
from tests.unit.transport_peer import until

NBYTES = 64 << 20
CUT_S = 1.0
PATHS = ["tcp", "process_vm,tcp"]


class Cable:
    """One connection through the relay.

    Attributes:
        rate: bytes/s that go from initiator to target, at most; None for no limit.
        delay: seconds that bytes take, in both directions.
        stalled: nothing goes on while this is set.
        garble: the next so many pieces get one byte changed.
    """

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._ends = near, far
        self.rate: float | None = None
        self.delay = 0.0
        self.garble = 0
        self.carried = 0
        self._open = threading.Event()
        self._open.set()
        for number, (source, sink) in enumerate(((near, far), (far, near))):
            pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            threading.Thread(target=self._read, args=(source, pieces), daemon=True).start()
            threading.Thread(target=self._write, args=(pieces, sink, number == 0), daemon=True).start()

    def stall(self) -> None:
        self._open.clear()

    def flow(self) -> None:
        self._open.set()

    def cut(self) -> None:
        """Reset both ends."""
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.hang_up(end)
        self._open.set()

    def _read(self, source: socket.socket, pieces: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        try:
            while data := source.recv(1 << 18):
                self._open.wait()
                pieces.put((time.monotonic() + self.delay, data))
        except OSError:
            pass  # cut
        pieces.put((0, b""))

    def _write(
        self, pieces: "queue.SimpleQueue[tuple[float, bytes]]", sink: socket.socket, out: bool
    ) -> None:
        try:
            while (piece := pieces.get())[1]:
                due, data = piece
                time.sleep(max(0, due - time.monotonic()))
                self._open.wait()
                if out:
                    self.carried += len(data)
                    if self.rate is not None:
                        time.sleep(len(data) / self.rate)
                    if self.garble and len(data) > 65536:
                        self.garble -= 1
                        data = data[:-1] + bytes([data[-1] ^ 1])
                sink.sendall(data)
        except OSError:
            pass  # cut
        wire.hang_up(sink)


class Relay:
    """Stands between initiator and target, in the path of every connection."""

    def __init__(self, host: str, port: int) -> None:
        self.cables: list[Cable] = []
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        wire.hang_up(self._listener)
        for cable in self.cables:
            cable.cut()

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    near, _ = self._listener.accept()
                except OSError:
                    return
                self.cables.append(Cable(near, socket.create_connection(self._target)))


class World:
    """Two engines and the relay between them."""

    def __init__(self, path: str, checksum: bool = False) -> None:
        self.downs: list[str] = []
        self.target = TransferEngine(on_link_down=lambda peer, reason: self.downs.append(reason))
        self.initiator = TransferEngine(TransferConfig(path=path, connections=2, checksum=checksum))
        self.memory = np.zeros(NBYTES, np.uint8)
        self.source = np.random.default_rng(1).integers(1, 256, NBYTES, np.uint8)
        self.initiator.register(self.source)
        self.region = self.target.register(self.memory)
        self.relay: Relay
        self.peer: Peer = self.connect()

    def connect(self) -> Peer:
        address = Address.parse(self.target.offer([self.region], peer="writer"))
        self.relay = Relay(address.endpoint.host, address.endpoint.port)
        through = msgspec.structs.replace(address.endpoint, host="127.0.0.1", port=self.relay.port)
        peer = self.initiator.connect(str(msgspec.structs.replace(address, endpoint=through)))
        self.initiator.write(peer, self.source[:64]).wait(5)
        until(lambda: len(peer.outbound.rails) >= 2, 2, "both connections are up")
        return peer

    def cables(self) -> list[Cable]:
        return self.relay.cables[-2:]

    def half_way(self) -> None:
        until(lambda: self.memory[NBYTES // 3] != 0, 20, "much of the transfer has landed")

    def check(self) -> None:
        assert np.array_equal(self.memory, self.source)

    def close(self) -> None:
        self.initiator.close()
        self.target.close()
        self.relay.close()


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def made(*args: Any) -> World:
        worlds.append(World(*args))
        return worlds[-1]

    yield made
    for world in worlds:
        world.close()


def calm(world: World) -> float:
    """Seconds that the transfer takes if nothing happens."""
    start = time.monotonic()
    world.initiator.write(world.peer, world.source).wait(60)
    world.check()
    world.memory[:] = 0
    return time.monotonic() - start


@pytest.mark.parametrize("path", PATHS)
def test_a_connection_cut_in_the_middle(make: Callable[..., World], path: str) -> None:
    world = make(path)
    alone = calm(world)
    start = time.monotonic()
    transfer = world.initiator.write(world.peer, world.source)
    world.half_way()
    world.cables()[1].cut()
    transfer.wait(60)
    took = time.monotonic() - start
    world.check()
    assert took < 3 * alone + CUT_S
    until(lambda: len(world.peer.outbound.rails) == len(path.split(",")) * 2, 5, "it is used again")
    assert world.downs == []


def test_connections_cut_again_and_again(make: Callable[..., World]) -> None:
    world = make("tcp")
    for _ in range(4):
        world.memory[:] = 0
        transfer = world.initiator.write(world.peer, world.source)
        world.half_way()
        world.relay.cables[-1].cut()
        transfer.wait(60)
        world.check()
        until(lambda: len(world.peer.outbound.rails) == 2, 10, "it is used again")


@pytest.mark.parametrize("path", PATHS)
def test_all_connections_cut(make: Callable[..., World], path: str) -> None:
    world = make(path)
    transfer = world.initiator.write(world.peer, world.source)
    if path == "tcp":
        world.half_way()
    start = time.monotonic()
    for cable in world.relay.cables:
        cable.cut()
    try:
        transfer.wait(CUT_S)
    except TransferError:
        assert time.monotonic() - start < CUT_S
    until(lambda: bool(world.downs), CUT_S, "the target knows")
    world.memory[:] = 0
    time.sleep(0.1)
    assert not world.memory.any()
    world.peer = world.connect()
    world.initiator.write(world.peer, world.source).wait(60)
    world.check()


def test_a_connection_that_stalls_is_left_and_lands_nothing_later(make: Callable[..., World]) -> None:
    world = make("tcp")
    transfer = world.initiator.write(world.peer, world.source)
    world.half_way()
    stalled = world.cables()[1]
    stalled.stall()
    start = time.monotonic()
    transfer.wait(60)
    assert time.monotonic() - start < RailPolicy().stall_s + CUT_S + 5
    world.check()
    world.memory[:] = 0
    stalled.flow()  # what it held back arrives now
    time.sleep(0.2)
    assert not world.memory.any()


def test_delay(make: Callable[..., World]) -> None:
    world = make("tcp")
    for cable in world.cables():
        cable.delay = 0.02
    world.initiator.write(world.peer, world.source).wait(60)
    world.check()


def test_a_throttled_connection_gets_less_to_carry(make: Callable[..., World]) -> None:
    world = make("tcp")
    slow, fast = world.cables()
    slow.rate = 20e6
    transfer = world.initiator.write(world.peer, world.source)
    transfer.wait(60)
    world.check()
    assert slow.carried < 0.75 * fast.carried


def test_garbled_bytes_are_sent_again(make: Callable[..., World]) -> None:
    world = make("tcp", True)
    transfer = world.initiator.write(world.peer, world.source)
    world.half_way()
    world.cables()[0].garble = 1
    transfer.wait(60)
    world.check()
    assert world.target._receiver.mismatches == 1


# ---------------------------------------------------------------------- real networks, in namespaces


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def lacking(qdisc: str) -> str | None:
    """What this machine lacks to make networks of its own; None if nothing."""
    if os.geteuid() != 0:
        return "takes root to make network namespaces"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "takes ip and tc (iproute2)"
    name = f"mc-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"can't make a network namespace: {made.stderr.strip()}"
    limits = {"netem": ["loss", "1%"], "tbf": ["rate", "1mbit", "burst", "32kbit", "limit", "4kb"]}
    tried = subprocess.run(
        ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", qdisc, *limits[qdisc]],
        capture_output=True,
        text=True,
        check=False,
    )
    ip("netns", "del", name)
    if tried.returncode == 0:
        return None
    return (
        f"this kernel has no {qdisc}; another has: "
        f"scripts/rdma/guest.sh -- .venv/bin/python -m pytest tests/faults/test_network.py -k {qdisc}"
    )


class Remote:
    """A `network_peer` in a namespace."""

    def __init__(self, space: str, host: str, nbytes: int) -> None:
        command = ["ip", "netns", "exec", space, sys.executable, "-m", "tests.faults.network_peer"]
        self._process = subprocess.Popen(
            [*command, host, str(nbytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, *call: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def call(self, *call: Any) -> Any:
        self.begin(*call)
        return self.result()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


class Net:
    """Two namespaces, a cable between them, and an engine in each."""

    NBYTES = 16 << 20

    def __init__(self) -> None:
        self.spaces = [f"mc-{side}-{os.getpid()}" for side in "it"]
        for space in self.spaces:
            ip("netns", "add", space)
        first, second = self.spaces
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        hosts = ["10.98.0.1", "10.98.0.2"]
        for space, host in zip(self.spaces, hosts, strict=True):
            ip("-n", space, "address", "add", f"{host}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        pairs = zip(self.spaces, hosts, strict=True)
        self.initiator, self.target = (Remote(space, host, self.NBYTES) for space, host in pairs)
        self.initiator.call("connect", self.target.call("offer"))
        self.write(1)

    def shape(self, *qdisc: str) -> None:
        for space in self.spaces:
            ip("netns", "exec", space, "tc", "qdisc", "replace", "dev", "eth0", "root", *qdisc)

    def write(self, seed: int, deadline: float = 60) -> float:
        """Write, compare every byte: seconds."""
        result = self.initiator.call("write", seed, deadline)
        assert result["error"] is None
        assert self.target.call("wrong_bytes", seed) == 0
        seconds: float = result["seconds"]
        return seconds

    def close(self) -> None:
        self.initiator.end()
        self.target.end()
        for space in self.spaces:
            ip("netns", "del", space)


@pytest.fixture
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    lack = lacking(getattr(request, "param", "tbf"))
    if lack:
        pytest.skip(f"{request.node.name} did not run: {lack}")
    net = Net()
    yield net
    net.close()


def test_a_narrow_network_that_drops_what_it_can_not_take(net: Net) -> None:
    net.shape("tbf", "rate", "400mbit", "burst", "64kb", "limit", "200kb")
    seconds = net.write(2)
    assert 0.3 < seconds < 20
    dropped = subprocess.run(
        ["ip", "netns", "exec", net.spaces[0], "tc", "-s", "qdisc", "show", "dev", "eth0"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "dropped 0," not in dropped


def test_a_partition_that_heals_in_time_costs_nothing_else(net: Net) -> None:
    net.shape("tbf", "rate", "100mbit", "burst", "64kb", "limit", "1mb")
    net.initiator.begin("write", 2, 60)
    time.sleep(0.3)
    ip("-n", net.spaces[1], "link", "set", "eth0", "down")
    time.sleep(1)
    ip("-n", net.spaces[1], "link", "set", "eth0", "up")
    result = net.initiator.result()
    assert result["error"] is None
    assert result["seconds"] < 20
    assert net.target.call("wrong_bytes", 2) == 0


def test_a_partition_is_noticed(net: Net) -> None:
    net.shape("tbf", "rate", "100mbit", "burst", "64kb", "limit", "1mb")
    net.initiator.begin("write", 2, 60)
    time.sleep(0.3)
    ip("-n", net.spaces[1], "link", "set", "eth0", "down")
    result = net.initiator.result()
    assert result["error"]
    assert result["seconds"] < wire.SILENCE_S + 5
    ip("-n", net.spaces[1], "link", "set", "eth0", "up")
    ip("-n", net.spaces[0], "neighbour", "flush", "dev", "eth0")  # else it says "no route" for a while yet
    net.initiator.call("connect", net.target.call("offer"))
    net.write(3)


@pytest.mark.parametrize("net", ["netem"], indirect=True)
@pytest.mark.parametrize(
    "trouble",
    [
        "delay 20ms 5ms",
        "loss 2%",
        "delay 5ms 4ms reorder 25%",
        "duplicate 5%",
        "corrupt 0.5%",
        "rate 200mbit",
    ],
)
def test_netem(net: Net, trouble: str) -> None:
    net.shape("netem", *trouble.split(), "limit", "10000")
    for seed in (2, 3):
        assert net.write(seed) < 40
