"""GPU memory over tcp, by way of page-locked buffers: from a GPU, to one, or both.

How it works is tried in tests/unit/test_staging.py with a GPU made of host memory, how fast it is beside a
bare socket and page-locked copies in benchmarks/gpu.py.
"""

import random
import statistics
from dataclasses import dataclass

import pytest

from mooncake_connector.config import TransferConfig
from mooncake_connector.kv_transfer.engine import TransferEngine
from tests.gpu import test_cuda_ipc, test_fences
from tests.gpu.conftest import EXPANDABLE
from tests.gpu.half import GUARD, Half
from tests.gpu.processes import Process, Processes
from tests.gpu.ranges import scattered
from tests.gpu.test_cuda_ipc import MIB, Where, check, ranges_of, tiles_of


class Checked(Half):
    """One that has checksums compared."""

    def __init__(self, device: str, path: str, nbytes: int) -> None:
        super().__init__(device, path, nbytes)
        self.engine.close()
        self.engine = TransferEngine(TransferConfig(path=path, checksum=True))


@dataclass(frozen=True)
class Staged(Where):
    """Over tcp."""

    path: str = "tcp"


GPU_TO_GPU = Staged("cuda:0", "cuda:0")
ACROSS = Staged("cuda:0", "cuda:1")
PLACES = [
    pytest.param(GPU_TO_GPU, id="one GPU", marks=pytest.mark.gpus(1)),
    pytest.param(ACROSS, id="two GPUs", marks=pytest.mark.gpus(2)),
    pytest.param(Staged("cuda:0", "cpu"), id="GPU to host", marks=pytest.mark.gpus(1)),
    pytest.param(Staged("cpu", "cuda:0"), id="host to GPU", marks=pytest.mark.gpus(1)),
]
GPUS = PLACES[:2]
NBYTES = 8 * MIB


def connected(initiator: Process, target: Process) -> tuple[Process, Process]:
    initiator.call("connect", name="t", address=target.call("offer", peer="i"))
    return initiator, target


@pytest.mark.parametrize("where", GPUS)
@pytest.mark.parametrize("kind", ["ranges", "tiles"])
def test_every_byte(processes: Processes, where: Where, kind: str) -> None:
    initiator, target = connected(*where.start(processes, NBYTES))
    made = ranges_of if kind == "ranges" else tiles_of
    check(initiator, target, made(random.Random(kind), NBYTES))


@pytest.mark.parametrize("where", PLACES)
def test_every_byte_with_checksums(processes: Processes, where: Where) -> None:
    initiator = processes.take().new(Checked, device=where.initiator, path="tcp", nbytes=NBYTES)
    target = processes.take().new(Checked, device=where.target, path="tcp", nbytes=NBYTES)
    plans = ranges_of(random.Random(2), NBYTES) | tiles_of(random.Random(2), NBYTES)
    few = ["1 byte aligned", "pages of 16384", "long ranges, odd", "all sizes", "half of the heads, NHD"]
    check(*connected(initiator, target), {name: plans[name] for name in few})


@pytest.mark.gpus(1)
def test_memory_of_expandable_segments(processes: Processes) -> None:
    where = Staged("cuda:0", "cuda:0", environments=(EXPANDABLE, EXPANDABLE))
    plans = ranges_of(random.Random(3), NBYTES)
    few = ["2 byte aligned", "pages of 16384", "long ranges, odd"]
    check(*connected(*where.start(processes, NBYTES)), {name: plans[name] for name in few})


@pytest.mark.parametrize("where", PLACES)
def test_a_part_of_an_allocation_and_a_read(processes: Processes, where: Where) -> None:
    test_cuda_ipc.test_memory_that_begins_inside_an_allocation(processes, where)
    processes.give_back()
    test_cuda_ipc.test_read(processes, where)


@pytest.mark.parametrize("where", GPUS)
def test_data_that_a_stream_has_yet_to_write(processes: Processes, where: Where) -> None:
    test_cuda_ipc.test_data_that_a_stream_has_yet_to_write(processes, where)


@pytest.mark.parametrize("where", [*GPUS, PLACES[3]])
def test_fenced_in_the_middle_of_writes(processes: Processes, where: Where) -> None:
    test_fences.test_fenced_in_the_middle_of_writes(processes, where, "pages")


@pytest.mark.parametrize("where", GPUS[-1:])
def test_fenced_while_the_initiator_is_stopped(processes: Processes, where: Where) -> None:
    test_fences.test_fenced_while_the_initiator_is_stopped(processes, where, "pages")


@pytest.mark.parametrize("where", GPUS[-1:])
def test_fenced_before_its_data_is_there(processes: Processes, where: Where) -> None:
    test_fences.test_fenced_before_its_data_is_there(processes, where, "pages")


@pytest.mark.parametrize("where", GPUS[-1:])
def test_the_initiator_is_killed(processes: Processes, where: Where) -> None:
    test_fences.test_the_initiator_is_killed(processes, where)


@pytest.mark.parametrize("where", PLACES)
def test_pages_at_speed(processes: Processes, where: Where) -> None:
    """Enough of them for all buffers to be in use all the time; then every byte is looked at."""
    mixed = "cpu" in (where.initiator, where.target)
    nbytes = 64 * MIB if mixed else 256 * MIB
    initiator, target = connected(*where.start(processes, nbytes))
    for page in (64 << 10,) if mixed else (64 << 10, 16 << 10):
        copies = scattered(random.Random(page), [page] * (nbytes * 3 // 4 // page), 16, nbytes, nbytes)
        initiator.call("fill", seed=page)
        target.call("fill", seed=GUARD)
        took = [initiator.call("write", peer="t", copies=copies)[0] for _ in range(5)]
        assert not target.call("wrong", seed=page, copies=[copies])
        print(f"pages of {page >> 10} KiB: {copies.nbytes / statistics.median(took) / 1e9:.2f} GB/s")
