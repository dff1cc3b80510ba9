"""Handing arrays of work requests to pyverbs, which takes them only as one Python object for each.

An object costs several microseconds with the GIL held. `ChainPoster` therefore keeps a single `SendWR`, lays
the chain's first request over the C struct inside it, and lets ``next`` lead on through the array. Where in
the object that struct is, is found by looking for a value put there; `layout_problem` verifies all that this
relies on against requests built the official way, and `ObjectPoster` stands in if anything differs.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mooncake_connector.kv_transfer.transport.rdma import verbs
from mooncake_connector.kv_transfer.transport.rdma.wr import (
    SGE_BYTES,
    SGE_DTYPE,
    SIGNALED,
    WR_BYTES,
    WR_DTYPE,
    WRITE_WITH_IMM,
)

_MARKER = 0x6D6F6F6E63616B65
_log = logging.getLogger(__name__)


class Poster(Protocol):
    """Posts chains on one queue pair. Not thread-safe."""

    def post(self, qp: Any, wrs: NDArray[Any]) -> None:
        """Post requests [m] that ``next`` chains from first to last, and nothing beyond.

        Raises:
            PyverbsError: The queue pair did not take them.
        """


class ChainPoster:
    """Posts the array itself."""

    def __init__(self) -> None:
        self._head = _send_wr(_MARKER)
        self._struct = _inside(self._head, _offset(self._head))
        self._own = self._struct.copy()

    def post(self, qp: Any, wrs: NDArray[Any]) -> None:
        self._struct[0] = wrs[0]
        try:
            qp.post_send(self._head)
        finally:
            # The object shall never be seen to own a gather list that it did not allocate.
            self._struct[:] = self._own


class ObjectPoster:
    """Posts an object for each request: slow, but needs to know nothing about pyverbs's inside."""

    def post(self, qp: Any, wrs: NDArray[Any]) -> None:
        chain: list[Any] = []
        try:
            for wr in wrs[::-1]:
                chain.append(_official(wr, chain[-1] if chain else None))
            qp.post_send(chain[-1])
        finally:
            for made in chain:
                made.close()


def poster() -> Poster:
    """The fast way if it is sound with this pyverbs."""
    return ObjectPoster() if _problem() else ChainPoster()


@cache
def _problem() -> str | None:
    problem = layout_problem()
    if problem is not None:
        _log.warning("rdma: work requests are posted one object each, several us each: %s", problem)
    return problem


def layout_problem(make: Callable[..., Any] | None = None) -> str | None:
    """None if pyverbs keeps work requests the way `ChainPoster` takes for granted, else what differs.

    Args:
        make: stands in for pyverbs's `SendWR`, to test the test.
    """
    second = _send_wr(_MARKER + 1, make=make)
    first = _send_wr(_MARKER, next_wr=second, make=make)
    try:
        at = _offset(first)
        if at is None or _offset(second, _MARKER + 1) != at:
            return "the C struct isn't found inside its object"
        got = _inside(first, at)[0]
        for field, value in {
            "wr_id": _MARKER,
            "next": id(second) + at,
            "num_sge": 2,
            "opcode": WRITE_WITH_IMM,
            "flags": SIGNALED,
            "imm": 0x01020304,
            "remote_addr": 0x1122334455667788,
            "rkey": 0xABCDEF01,
        }.items():
            if got[field] != value:
                return f"field {field} is {int(got[field]):#x}, not {value:#x}"
        sges = np.frombuffer(ctypes.string_at(int(got["sg_list"]), 2 * SGE_BYTES), SGE_DTYPE)
        if sges.tolist() != [(0x1234567890ABCDEF, 4096, 7), (0xFEDCBA0987654321, 8192, 8)]:
            return "gather lists are laid out in another way"
        return None
    finally:
        first.close()
        second.close()


def _send_wr(wr_id: int, next_wr: Any = None, make: Callable[..., Any] | None = None) -> Any:
    sges = [verbs.SGE(0x1234567890ABCDEF, 4096, 7), verbs.SGE(0xFEDCBA0987654321, 8192, 8)]
    wr = (make or verbs.SendWR)(
        wr_id=wr_id,
        opcode=verbs.e.IBV_WR_RDMA_WRITE_WITH_IMM,
        num_sge=2,
        imm_data=int.from_bytes((0x01020304).to_bytes(4, "big"), "little"),
        sg=sges,
        send_flags=verbs.e.IBV_SEND_SIGNALED,
        next_wr=next_wr,
    )
    wr.set_wr_rdma(0xABCDEF01, 0x1122334455667788)
    for sge in sges:
        sge.close()
    return wr


def _offset(wr: Any, marker: int = _MARKER) -> int | None:
    """Where in the object its C struct begins, if that is beyond doubt."""
    raw = ctypes.string_at(id(wr), type(wr).__basicsize__)
    value = marker.to_bytes(8, "little")
    at = raw.find(value)
    alone = raw.count(value) == 1 and at + WR_BYTES <= len(raw)
    return at if at > 0 and alone else None


def _inside(wr: Any, at: int | None) -> NDArray[Any]:
    """The C struct inside an object, [1] of `WR_DTYPE`; valid as long as the object."""
    assert at is not None
    struct = memoryview((ctypes.c_uint8 * WR_BYTES).from_address(id(wr) + at))
    return np.frombuffer(struct, np.uint8).view(WR_DTYPE)


def _official(wr: Any, next_wr: Any) -> Any:
    n = int(wr["num_sge"])
    gathered = np.frombuffer(ctypes.string_at(int(wr["sg_list"]), n * SGE_BYTES), SGE_DTYPE) if n else ()
    # pyverbs makes no request without an element, but one may count as absent afterwards.
    sges = [verbs.SGE(int(s["addr"]), int(s["length"]), int(s["lkey"])) for s in gathered] or [
        verbs.SGE(0, 0, 0)
    ]
    made = verbs.SendWR(
        wr_id=int(wr["wr_id"]),
        opcode=int(wr["opcode"]),
        num_sge=len(sges),
        sg=sges,
        imm_data=int.from_bytes(int(wr["imm"]).to_bytes(4, "big"), "little"),
        send_flags=int(wr["flags"]),
        next_wr=next_wr,
    )
    made.num_sge = n
    made.set_wr_rdma(int(wr["rkey"]), int(wr["remote_addr"]))
    for sge in sges:
        sge.close()
    return made
