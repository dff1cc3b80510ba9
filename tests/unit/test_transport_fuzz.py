"""Garbage on the wire: the target survives, other links go on, and nothing outside a grant is touched."""

import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.plan import CopyPlan
from mooncake_connector.kv_transfer.transport import Endpoint, Receiver, wire

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

    def connect(self, peer: str) -> socket.socket:
        endpoint = self.receiver.admit(peer)
        sock = socket.create_connection((endpoint.host, endpoint.port), 5)
        wire.put(sock, wire.Hello(wire.VERSION, endpoint.token, "tcp", b"link", 0, 1))
        assert wire.get(sock, wire.Welcome).reason is None
        return sock

    def check(self) -> None:
        """The link of the good peer works, and the outer strips are untouched."""
        dst, length = np.array([self.strip], np.uint64), np.array([16], np.uint64)
        head = wire.frame_head(KEY, 5, 1, CopyPlan(dst, dst, length), False)
        self.good.sendall(head + b"\x11" * 16)
        assert wire.get_ack(self.good) == (5, None)
        assert (self.memory[GRANTED : GRANTED + 16] == 0x11).all()
        assert not self.memory[:GRANTED].any()
        assert not self.memory[2 * GRANTED :].any()


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    target = Target()
    yield target
    target.good.close()
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
    assert flush(target.connect("bad"), data) == b""
    target.check()


@fuzz
@given(u32, u64, u64, u32, u32, ranges, st.integers(0, 3 * GRANTED))
def test_frames_with_any_fields(
    target: Target, n: int, key: int, write: int, parts: int, nbytes: int, rows: list, payload: int
) -> None:
    head = struct.pack("<4sIQQII", b"MKVf", n, key, write, parts, nbytes)
    body = b"".join(struct.pack("<Q", (target.strip + at) % 2**64) for at, _ in rows)
    body += b"".join(struct.pack("<Q", length) for _, length in rows)
    flush(target.connect("bad"), head + body + b"\xff" * payload)
    target.check()


@fuzz
@given(ranges)
def test_well_formed_frames_with_any_ranges(target: Target, rows: list) -> None:
    """Lengths add up and the key is right: only the check against the grant stands in the way."""
    rows = [(at, length % GRANTED + 1) for at, length in rows]
    nbytes = sum(length for _, length in rows)
    head = struct.pack("<4sIQQII", b"MKVf", len(rows), KEY + 1, 9, 1, nbytes)
    body = struct.pack(f"<{len(rows)}Q", *((target.strip + at) % 2**64 for at, _ in rows))
    body += struct.pack(f"<{len(rows)}Q", *(length for _, length in rows))
    said = flush(target.connect("bad"), head + body + b"\xff" * nbytes)
    inside = all(at >= 0 and at + length <= GRANTED for at, length in rows)
    assert (said[:12] == struct.pack("<QI", 9, 0)) == inside
    assert (b"outside" in said) != inside
    target.check()
