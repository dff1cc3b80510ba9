"""Garbage on the wire: the target survives, other links go on, and nothing outside a grant is touched."""

import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.transport import Endpoint, Receiver, wire
from tests.unit.transport_peer import Raw, copy

GRANTED = 4096
KEY = 1

u32 = st.one_of(st.integers(0, 4), st.sampled_from([4096, 4097, GRANTED, 8 << 20, 2**32 - 1]))
u64 = st.one_of(st.integers(0, 2 * GRANTED), st.sampled_from([2**63, 2**64 - 1, 2**64 - GRANTED]))
ranges = st.lists(st.tuples(st.integers(-GRANTED, 2 * GRANTED), u64), max_size=6)


class Target:
    """A receiver with a granted strip between two that must stay as they are."""

    def __init__(self) -> None:
        self.receiver = Receiver()
        self.memory = np.zeros(3 * GRANTED, np.uint8)
        self.strip = self.memory.ctypes.data + GRANTED
        self.good = self.connect("good")
        for number, peer in enumerate(["good", "bad"]):
            self.receiver.grant(
                KEY + number,
                peer,
                Ranges.of(np.array([self.strip]), np.array([GRANTED])),
            )

    def connect(self, peer: str) -> Raw:
        raw = Raw(self.receiver.admit(peer))
        assert raw.welcome == wire.Welcome()
        return raw

    def check(self) -> None:
        """The link of the good peer works, and the outer strips are untouched."""
        self.good.send(KEY, 5, copy(0, self.strip, 16), b"\x11" * 16)
        assert self.good.reply() == (5, wire.LANDED, b"")
        assert (self.memory[GRANTED : GRANTED + 16] == 0x11).all()
        assert not self.memory[:GRANTED].any()
        assert not self.memory[2 * GRANTED :].any()


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    target = Target()
    yield target
    target.good.sock.close()
    target.receiver.close()


def flush(sock: socket.socket, data: bytes) -> bytes:
    """Send all, end the stream, and read what the target still says until it hangs up."""
    said = b""
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while more := sock.recv(65536):
            said += more
    except OSError:
        pass  # the target hung up on garbage, as it should
    sock.close()
    return said


fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.binary(max_size=300), st.booleans())
def test_garbage_instead_of_hello(target: Target, data: bytes, framed: bool) -> None:
    endpoint: Endpoint = target.receiver.admit("bad")
    with socket.create_connection((endpoint.host, endpoint.port), 5) as sock:
        flush(sock, struct.pack("<4sI", b"MKVh", len(data)) + data if framed else data)
    target.check()


@fuzz
@given(st.binary(min_size=1, max_size=500))
def test_garbage_instead_of_frames(target: Target, data: bytes) -> None:
    assert flush(target.connect("bad").sock, data) == b""
    target.check()


FRAME = struct.Struct("<4sBBHIIQQQ")


def table(target: Target, rows: list) -> bytes:
    """dst, length, src of the first range, then those of all others."""
    at = [(target.strip + at) % 2**64 for at, _ in rows]
    length = [length for _, length in rows]
    first = struct.pack("<QQQ", *(column[0] if column else 0 for column in (at, length, at)))
    return first + struct.pack(f"<{3 * len(rows[1:])}Q", *at[1:], *length[1:], *at[1:])


@fuzz
@given(u32, u32, u32, u64, u64, u32, ranges, st.integers(0, 3 * GRANTED))
def test_frames_with_any_fields(
    target: Target,
    kind: int,
    flags: int,
    n: int,
    key: int,
    number: int,
    nbytes: int,
    rows: list,
    payload: int,
) -> None:
    head = FRAME.pack(b"MKVf", kind % 256, flags % 256, 0, n, nbytes, key, number, 0)
    flush(target.connect("bad").sock, head + table(target, rows) + b"\xff" * payload)
    target.check()


@fuzz
@given(ranges)
def test_well_formed_frames_with_any_ranges(target: Target, rows: list) -> None:
    """Lengths add up and the key is right: only the check against the grant stands in the way."""
    rows = [(at, length % GRANTED + 1) for at, length in rows]
    nbytes = sum(length for _, length in rows)
    head = FRAME.pack(b"MKVf", wire.PAYLOAD, wire.LAST, 0, len(rows), nbytes, KEY + 1, 9, 0)
    said = flush(target.connect("bad").sock, head + table(target, rows) + b"\xff" * nbytes)
    inside = all(at >= 0 and at + length <= GRANTED for at, length in rows)
    assert (said[:16] == wire.REPLY.pack(9, wire.LANDED, 0)) == inside
    assert (b"outside" in said) != inside
    target.check()


@fuzz
@given(st.sampled_from([wire.FENCE, wire.ECHO, wire.PROBE, "no such topic", ""]), st.binary(max_size=40))
def test_questions_with_any_body(target: Target, topic: str, body: bytes) -> None:
    said = flush(target.connect("bad").sock, wire.question(3, topic, body))
    number, status, _ = wire.REPLY.unpack(said[: wire.REPLY.size])
    assert (number, status) == (3, wire.LANDED if topic == wire.ECHO else wire.REFUSED)
    target.check()
