"""GPU memory registered for a NIC, as far as that goes without one: the dma-buf that the driver exports.

What a NIC would be handed is looked at: a file of the right size, and where the memory begins in it.
"""

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Region, region_of
from mooncake_connector.kv_transfer.transport.cuda import driver
from mooncake_connector.kv_transfer.transport.rdma.registration import Way, _exported, register
from tests.gpu.conftest import EXPANDABLE, only
from tests.gpu.processes import Processes

MIB = 1 << 20
PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Export:
    """What came of one: either `refused`, or a dma-buf.

    Attributes:
        begin: of the memory, within its first page.
        offset: of the memory in the dma-buf.
        size: of the dma-buf, as the kernel says; -1 if it doesn't.
        file: what the kernel calls the descriptor.
        closed: the descriptor was closed afterwards.
        context_kept: the thread had the same context before and afterwards.
    """

    refused: str = ""
    begin: int = -1
    offset: int = -1
    size: int = -1
    file: str = ""
    closed: bool = False
    context_kept: bool = False


def export(region: Region) -> Export:
    before = int(driver.call("cuCtxGetCurrent"))
    try:
        with _exported(region) as (fd, offset):
            file = str(Path(f"/proc/self/fd/{fd}").readlink())
            try:
                size = os.lseek(fd, 0, os.SEEK_END)
            except OSError:
                size = -1
    except TransportError as refused:
        return Export(refused=str(refused), context_kept=int(driver.call("cuCtxGetCurrent")) == before)
    try:
        os.fstat(fd)
        closed = False
    except OSError:
        closed = True
    kept = int(driver.call("cuCtxGetCurrent")) == before
    return Export("", region.address % PAGE, offset, size, file, closed, kept)


class Exporter:
    """A process with one tensor on a GPU.

    Args:
        device: as this process counts them.
    """

    def __init__(self, nbytes: int, device: int = 0) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{device}")
        torch.cuda.synchronize(device)

    def close(self) -> None:
        self.memory = torch.empty(0)
        torch.cuda.empty_cache()

    def export(self, offset: int, nbytes: int, where: str = "here") -> Export:
        """Export a part of the tensor, in this thread or in a new one (which has no context)."""
        region = region_of(self.memory[offset : offset + nbytes])
        assert region.location.startswith("cuda:")
        if where == "here":
            return export(region)
        made: list[Export] = []
        thread = threading.Thread(target=lambda: made.append(export(region)))
        thread.start()
        thread.join(20)
        return made[0]

    def refusals(self) -> dict[str, str]:
        """What is said where nothing works: of this GPU's memory without a NIC, and of memory of no GPU."""

        def no_nic(region: Region) -> Callable[[], Any]:
            def make() -> Any:
                with _exported(region):
                    raise TransportError("no NIC is here")

            return make

        def no_peermem() -> Any:
            raise OSError(14, "Bad address")

        host = bytearray(3 * PAGE)
        regions = {"gpu": region_of(self.memory), "host": Region(region_of(host).address, PAGE, "cuda:0")}
        said = {}
        for name, region in regions.items():
            with pytest.raises(TransportError) as refused:
                register(region, "mlx5_0", {Way.DMA_BUF: no_nic(region), Way.PEERMEM: no_peermem})
            said[name] = str(refused.value)
        return said


def assert_holds(made: Export, nbytes: int) -> None:
    """The dma-buf has exactly the pages that hold the memory."""
    print(made)
    assert not made.refused
    assert made.offset == made.begin
    pages = -(-(made.begin + nbytes) // PAGE) * PAGE
    assert made.size in (pages, -1)
    assert made.closed
    assert made.context_kept


@pytest.mark.gpus(1)
@pytest.mark.parametrize("where", ["here", "in a thread without a context"])
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 64 * MIB), (3 * PAGE + 48, MIB + 100), (PAGE - 1, 2), (5, 10), (31 * MIB + 512, 33 * MIB - 512)],
)
def test_a_part_of_a_tensor(processes: Processes, offset: int, nbytes: int, where: str) -> None:
    exporter = processes.take().new(Exporter, nbytes=64 * MIB)
    assert_holds(exporter.call("export", offset=offset, nbytes=nbytes, where=where), nbytes)


@pytest.mark.gpus(2)
def test_of_a_gpu_that_is_not_the_first(processes: Processes) -> None:
    second = processes.take().new(Exporter, nbytes=8 * MIB, device=1)
    alone = processes.take(only(1)).new(Exporter, nbytes=8 * MIB)
    for exporter in (second, alone):
        for where in ("here", "in a thread without a context"):
            assert_holds(exporter.call("export", offset=100, nbytes=MIB, where=where), MIB)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("nbytes", [MIB, 64 * MIB])
def test_expandable_segments(processes: Processes, nbytes: int) -> None:
    """Memory of several allocations side by side: exported as a whole, or refused by the driver's name."""
    exporter = processes.take(EXPANDABLE).new(Exporter, nbytes=nbytes)
    for at, length in ((0, nbytes), (PAGE + 48, nbytes // 2)):
        made = exporter.call("export", offset=at, nbytes=length)
        if made.refused:
            print(f"{length} bytes: {made.refused}")
            assert "CUDA_ERROR" in made.refused
            assert made.context_kept
        else:
            assert_holds(made, length)


@pytest.mark.gpus(1)
def test_what_is_said_where_nothing_works(processes: Processes) -> None:
    said = processes.take().new(Exporter, nbytes=MIB).call("refusals")
    for message in said.values():
        print(message)
        assert "mlx5_0 can't register" in message
        assert "open NVIDIA kernel modules" in message
        assert "modprobe nvidia-peermem" in message
        assert "stage it through registered host memory" in message
    assert "dma-buf: no NIC is here" in said["gpu"]  # the export itself had worked
    assert "is no GPU's memory" in said["host"]
