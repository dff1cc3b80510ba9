"""What RDMA says where there is none, how memory is registered, which NICs meet: all without a device."""

import logging
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from mooncake_connector.errors import TransportError
from mooncake_connector.kv_transfer.memory import Region
from mooncake_connector.kv_transfer.transport.rdma import cards, verbs
from mooncake_connector.kv_transfer.transport.rdma.initiator import pairs
from mooncake_connector.kv_transfer.transport.rdma.poller import Poller
from mooncake_connector.kv_transfer.transport.rdma.registration import Registered, Way, register

CPU, GPU = Region(1 << 20, 4096), Region(1 << 30, 4096, "cuda:0")


def card(label: str) -> cards.NicCard:
    return cards.NicCard(label, "::", 0.0, 1.0)


def test_why_there_is_no_rdma_names_the_mend() -> None:
    missing = verbs.import_problem(ModuleNotFoundError("No module named 'pyverbs'", name="pyverbs"))
    assert missing is not None
    assert "python3-pyverbs" in missing
    misfit = verbs.import_problem(ImportError("version `IBVERBS_PRIVATE_59' not found"))
    assert misfit is not None
    assert "IBVERBS_PRIVATE_59" in misfit
    assert "don't fit together" in misfit
    assert "--device=/dev/infiniband" in verbs.no_device_problem(["mlx5_0"])
    assert "no RDMA device" in verbs.no_device_problem([])


@pytest.mark.parametrize("scoped", [False, True])
def test_enums_of_both_kinds(scoped: bool) -> None:
    import enum

    if scoped:
        opcodes = enum.IntEnum("ibv_wr_opcode", {"IBV_WR_RDMA_WRITE": 0, "IBV_WR_RDMA_WRITE_WITH_IMM": 1})
        module: Any = SimpleNamespace(ibv_wr_opcode=opcodes)
    else:
        module = SimpleNamespace(IBV_WR_RDMA_WRITE=0, IBV_WR_RDMA_WRITE_WITH_IMM=1)
    assert verbs._flat(module).IBV_WR_RDMA_WRITE_WITH_IMM == 1


def refuse(reason: str) -> Any:
    raise TransportError(reason)


def made(way: Way, base: int = 0) -> Any:
    return lambda: Registered(SimpleNamespace(), base, way)


def test_gpu_memory_goes_by_dma_buf_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    makers = {Way.HOST: made(Way.HOST), Way.DMA_BUF: made(Way.DMA_BUF, 512), Way.PEERMEM: made(Way.PEERMEM)}
    assert register(GPU, "mlx5_0", makers)[1:] == (512, Way.DMA_BUF)
    assert "cuda:0 by dma-buf" in caplog.text
    makers[Way.DMA_BUF] = lambda: refuse("the driver exports no dma-buf")
    assert register(GPU, "mlx5_0", makers).way is Way.PEERMEM
    assert "cuda:0 by nvidia-peermem" in caplog.text
    assert register(CPU, "mlx5_0", makers).way is Way.HOST


def test_memory_that_no_way_registers_names_every_mend() -> None:
    makers = dict.fromkeys(Way, lambda: refuse("no"))
    with pytest.raises(
        TransportError, match=r"dma-buf: no .*modprobe nvidia-peermem.*stage it through"
    ) as gpu:
        register(GPU, "mlx5_0", makers)
    assert "mlx5_0 can't register 4096 bytes at 0x40000000 of cuda:0" in str(gpu.value)
    with pytest.raises(TransportError, match="memlock=-1") as cpu:
        register(CPU, "mlx5_0", makers)
    assert "stage" not in str(cpu.value)


@pytest.mark.parametrize(("here", "there"), [(1, 1), (2, 1), (1, 4), (3, 8), (8, 8), (0, 2), (2, 0)])
def test_every_nic_of_both_sides_meets_one(here: int, there: int) -> None:
    ours: Any = [SimpleNamespace(label=f"a{i}") for i in range(here)]
    theirs = [card(f"b{i}") for i in range(there)]
    met = [(a.label, b.label) for a, b in pairs(ours, theirs)]
    assert len(met) == (max(here, there) if here and there else 0)
    assert len(set(met)) == len(met)
    if met:
        assert met[0] == ("a0", "b0")
        assert {a for a, _ in met} == {a.label for a in ours}
        assert {b for _, b in met} == {b.label for b in theirs}


def test_malformed_answers_are_refused() -> None:
    fence = cards.Fence(b"token", 3)
    assert cards.decode(cards.encode(fence), cards.Fence) == fence
    with pytest.raises(TransportError, match=r"malformed rdma Open: .*one version on both sides"):
        cards.decode(b"\xc1", cards.Open)


def test_poller_calls_back_and_outlives_a_callback_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    poller = Poller()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    called: list[int] = []

    def ready() -> None:
        os.eventfd_read(fd)
        called.append(1)
        raise RuntimeError("a bug")

    blind: list[int] = []
    unseen = lambda: blind.append(1)  # noqa: E731 - compared by identity
    try:
        poller.add(fd, ready)
        for n in (1, 2):
            os.eventfd_write(fd, 1)
            _until(lambda n=n: len(called) == n)
        assert "could not be handled" in caplog.text
        poller.add(None, unseen)
        _until(lambda: len(blind) > 3)
        poller.remove(None, unseen)
        poller.remove(fd, ready)
        os.eventfd_write(fd, 1)
        time.sleep(0.05)
        assert len(called) == 2
    finally:
        poller.close()
        os.close(fd)


def _until(holds: Any) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)
