"""How memory becomes reachable for a NIC: the choice among the ways that its location has."""

import contextlib
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.transport.cuda import driver
from mooncake_connector.kv_transfer.transport.rdma import verbs

log = logging.getLogger(__name__)


class Way(StrEnum):
    HOST = "host memory"
    DMA_BUF = "dma-buf"
    PEERMEM = "nvidia-peermem"


class Registered(NamedTuple):
    """A region that a NIC can read and write.

    Attributes:
        mr: the memory region object of pyverbs.
        base: what the NIC calls the region's first byte: its address, or for a dma-buf an offset into it.
    """

    mr: Any
    base: int
    way: Way


Maker = Callable[[], Registered]


def ways(location: str) -> tuple[Way, ...]:
    """The ways to register memory of a location, the preferred first."""
    return (Way.DMA_BUF, Way.PEERMEM) if location.startswith("cuda:") else (Way.HOST,)


def register(region: Region, nic: str, makers: Mapping[Way, Maker]) -> Registered:
    """Register by the first way that works, and log which.

    Raises:
        TransportError: None does; the message has the mend of each. GPU memory then has to be staged through
            registered host memory.
    """
    failed = []
    for way in ways(region.location):
        try:
            made = makers[way]()
        except (verbs.PyverbsError, TransportError, OSError, ImportError) as refused:
            failed.append(f"{way}: {refused} ({_MENDS[way]})")
            continue
        log.info("rdma: %s has %d MiB of %s by %s", nic, region.length >> 20, region.location, way)
        return made
    staged = "; stage it through registered host memory" if len(failed) > 1 else ""
    raise TransportError(
        f"{nic} can't register {region.length} bytes at {region.address:#x} of {region.location}: "
        f"{'; '.join(failed)}{staged}"
    )


def makers(pd: Any, region: Region) -> dict[Way, Maker]:
    """How each way is gone, in a protection domain."""
    access = verbs.e.IBV_ACCESS_LOCAL_WRITE | verbs.e.IBV_ACCESS_REMOTE_WRITE

    def plain(way: Way) -> Registered:
        mr = verbs.MR(pd, region.length, access, address=region.address)
        return Registered(mr, region.address, way)

    def dma_buf() -> Registered:
        with _exported(region) as (fd, offset):
            mr = verbs.DmaBufMR(pd, region.length, access, dmabuf=fd, offset=offset)
        return Registered(mr, offset, Way.DMA_BUF)

    return {
        Way.HOST: lambda: plain(Way.HOST),
        Way.PEERMEM: lambda: plain(Way.PEERMEM),
        Way.DMA_BUF: dma_buf,
    }


@contextlib.contextmanager
def _exported(region: Region) -> Iterator[tuple[int, int]]:
    """A dma-buf of the pages that hold GPU memory, and the region's offset in it."""
    start = region.address & -mmap.PAGESIZE
    end = -(-(region.address + region.length) // mmap.PAGESIZE) * mmap.PAGESIZE
    # The driver exports in threads with a context only, and NICs that come later find a thread without.
    with driver.context_at(region.address):
        kind = driver.bindings().CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
        fd = int(driver.call("cuMemGetHandleForAddressRange", start, end - start, kind, 0))
    try:
        yield fd, region.address - start
    finally:
        os.close(fd)  # the NIC's registration keeps the buffer


_MENDS = {
    Way.HOST: "mend: `ulimit -l unlimited`, in a container --ulimit memlock=-1",
    Way.DMA_BUF: "mend: open NVIDIA kernel modules, kernel >= 5.12, pip install 'mooncake-connector[cuda]'",
    Way.PEERMEM: "mend: modprobe nvidia-peermem",
}
