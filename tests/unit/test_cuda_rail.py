"""The rail of cuda_ipc on a GPU made of host memory: which way a write goes, and what a fence waits for."""

import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.memory import Ranges
from mooncake_connector.kv_transfer.plan import CopyPlan, Tile
from mooncake_connector.kv_transfer.transport.base import Failure
from mooncake_connector.kv_transfer.transport.cuda import gate, rail
from mooncake_connector.kv_transfer.transport.cuda.gate import Gate, Visitor
from mooncake_connector.kv_transfer.transport.cuda.rail import CopyPolicy, CudaRail
from tests.unit.fake_gpu import FakeEvent, FakeGpu, FakeStream

KEY, PAGE, PAGES = 5, 4096, 300
HALF = PAGE * PAGES


class Registered:
    """In place of making host memory reachable for a device."""

    def __init__(self, address: int, nbytes: int, context: object) -> None:
        self.device_address = address

    def close(self) -> None: ...


class Driver:
    """What the rail asks of CUDA, of a fake GPU. Its first half is here, the second is the target's."""

    device = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = FakeGpu(2 * HALF)
        self.gpu.memory[:HALF] = np.random.default_rng(3).integers(0, 256, HALF, np.uint8)
        self.left = threading.Event()
        for name in ("Pinned", "DeviceBuffer", "Event", "copy_async", "copy_batch_async"):
            monkeypatch.setattr(rail, name, getattr(self.gpu, name))
        monkeypatch.setattr(rail, "Stream", lambda context, urgent: FakeStream(self.gpu))
        monkeypatch.setattr(rail, "call", self.call)
        monkeypatch.setattr(rail.Scatter, "of", lambda device: self)
        monkeypatch.setattr(gate, "HostRegistration", Registered)

    def __enter__(self) -> "Driver":
        self.gpu._context.current = True
        return self

    def __exit__(self, *error: object) -> None: ...

    def call(self, name: str, stream: int, address: int, value: int, flags: int) -> None:
        assert name == "cuStreamWriteValue64"
        word = ctypes.c_uint64.from_address(address)
        FakeStream.by_handle[stream].put(lambda: setattr(word, "value", value))

    def launch(
        self, table: int, n: int, total: int, width: int, stream: int, *, blocks: int, tile: Any, gate: Any
    ) -> None:
        assert tile is None
        assert gate.key == KEY
        self.gpu.launch(table, n, total, width, stream, blocks=blocks)

    @property
    def moved(self) -> bool:
        return bool((self.gpu.memory[:HALF] == self.gpu.memory[HALF:]).all())


class Near:
    """Imported memory that lies where it was."""

    def place(self, plan: CopyPlan) -> CopyPlan:
        return plan

    def close(self) -> None: ...


class Writes:
    """A rail, the gate that it passes, and how its writes ended."""

    def __init__(self, driver: Driver, policy: CopyPolicy) -> None:
        self.driver, self.gate = driver, Gate()
        self.gate.open(KEY)
        self.ended: list[Failure | None] = []
        self._ended = threading.Semaphore(0)
        base = driver.gpu.region.address
        all_of_it = Ranges.of(np.array([base], np.uint64), np.array([2 * HALF], np.uint64))
        self.rail = CudaRail(
            "cuda_ipc",
            driver,  # type: ignore[arg-type]
            lambda: all_of_it,
            Near(),  # type: ignore[arg-type]
            Visitor(os.getpid(), self.gate.fd, driver),  # type: ignore[arg-type]
            policy,
            speed=1.0,
            on_broken=lambda reason: None,
            on_fenced=driver.left.set,
        )

    def write(self, *after: FakeEvent, pages: int = PAGES) -> None:
        length = HALF // pages
        src = self.driver.gpu.region.address + length * np.arange(pages)
        plan = CopyPlan(
            src.astype(np.uint64),
            (src + HALF).astype(np.uint64),
            np.full(pages, length, np.uint64),
            after=after,
        )
        self.rail.write(KEY, plan, self._end)

    def _end(self, failure: Failure | None) -> None:
        self.ended.append(failure)
        self._ended.release()

    def wait(self) -> Failure | None:
        """Until the next one has ended."""
        assert self._ended.acquire(timeout=5)
        return self.ended[-1]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


@pytest.fixture
def engines(driver: Driver) -> Iterator[Writes]:
    writes = Writes(driver, CopyPolicy("copy_engine"))
    yield writes
    writes.rail.close()
    assert driver.left.wait(5)


def event(driver: Driver, *, happened: bool) -> FakeEvent:
    made = FakeEvent(driver.gpu)
    if happened:
        made.happened.set()
    return made


def test_long_ranges_are_left_to_copy_engines() -> None:
    policy = CopyPolicy()
    one = np.array([1 << 20], np.uint64)
    assert not policy.takes_kernel(CopyPlan(one, one, one), 1 << 20)
    assert policy.takes_kernel(CopyPlan(one, one, one), (1 << 20) - 1)
    for copy in ("auto", "copy_engine"):  # copy engines know no tiles
        assert CopyPolicy(copy).takes_kernel(CopyPlan(one, one, one, Tile(2, 2, 4, 8, 4, 40, 8)), 64)


def test_a_fence_waits_for_copies_that_wait_for_the_model(driver: Driver, engines: Writes) -> None:
    layer = event(driver, happened=False)
    engines.write(layer)
    engines.gate.shut(KEY)
    inside = engines.gate.inside()
    assert not inside.left()
    layer.happened.set()
    assert engines.wait() is None
    assert inside.left()
    driver.gpu.memory[HALF:] = 9
    later = event(driver, happened=False)
    for after in (later, event(driver, happened=True)):
        engines.write(after)
        ended = engines.wait()
        assert ended is not None
        assert "took its grant back" in ended.reason
    later.happened.set()
    assert (driver.gpu.memory[HALF:] == 9).all()


@pytest.mark.parametrize(("copy", "kernel"), [("auto", True), ("kernel", True), ("copy_engine", False)])
def test_which_way_a_write_goes_and_what_it_waits_for(driver: Driver, copy: str, kernel: bool) -> None:
    writes = Writes(driver, CopyPolicy(copy))
    layer = event(driver, happened=False)
    writes.write(layer)
    assert driver.gpu.launches == ([PAGES] if kernel else [])
    assert driver.gpu.batches == ([] if kernel else [PAGES])
    layer.happened.set()
    assert writes.wait() is None
    assert driver.moved
    writes.rail.close()
    assert driver.left.wait(5)


def test_unknown_policies_are_refused() -> None:
    assert TransferConfig(cuda_copy="copy_engine").cuda_copy == "copy_engine"
    with pytest.raises(ConfigError, match="copy_engine"):
        TransferConfig(cuda_copy="patient")
