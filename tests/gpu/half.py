"""One end of a transfer in a process of its own: a transfer engine, and one piece of memory of some kind."""

import threading
import time
from typing import Any

import numpy as np
import torch

from mooncake_connector.config import TransferConfig
from mooncake_connector.errors import MooncakeError
from mooncake_connector.kv_transfer.engine import TransferEngine
from mooncake_connector.kv_transfer.memory import Region, region_of
from mooncake_connector.kv_transfer.peer import Peer
from mooncake_connector.kv_transfer.plan import CopyPlan, Tile
from mooncake_connector.kv_transfer.transfer import Transfer
from tests.gpu.ranges import Copies

GUARD, POISON = 77, 0xA5
STEP = 1 << 25  # bytes that are looked at at once


def pattern(seed: int, index: torch.Tensor) -> torch.Tensor:
    """The byte that a memory of that seed has at each index: differs from its neighbours and other seeds."""
    return (((index * 0x9E3779B1 + seed * 0x85EBCA6B) >> 15) & 0xFF).to(torch.uint8)


class Vmm:
    """GPU memory as cuMemCreate makes it, in two pieces side by side, shareable by file descriptors."""

    def __init__(self, nbytes: int, device: int) -> None:
        from cuda.bindings import driver as cu

        self._cu, self._handles = cu, []
        torch.zeros(1, device=f"cuda:{device}")  # makes the context current
        prop = cu.CUmemAllocationProp()
        prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = device
        prop.requestedHandleTypes = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        least = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = self._ok(cu.cuMemGetAllocationGranularity(prop, least))
        half = -(-nbytes // (2 * granularity)) * granularity
        self._size = 2 * half
        self.address = int(self._ok(cu.cuMemAddressReserve(self._size, 0, 0, 0)))
        for at in (self.address, self.address + half):
            handle = self._ok(cu.cuMemCreate(half, prop, 0))
            self._handles.append(handle)
            self._ok(cu.cuMemMap(at, half, 0, handle, 0))
        access = cu.CUmemAccessDesc()
        access.location = prop.location
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._ok(cu.cuMemSetAccess(self.address, self._size, [access], 1))
        # As torch.as_tensor reads it.
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    def close(self) -> None:
        self._ok(self._cu.cuMemUnmap(self.address, self._size))
        for handle in self._handles:
            self._ok(self._cu.cuMemRelease(handle))
        self._ok(self._cu.cuMemAddressFree(self.address, self._size))

    def _ok(self, result: Any) -> Any:
        assert int(result[0]) == 0, f"CUDA driver: {result[0]}"
        return result[1] if len(result) > 1 else None


class Half:
    """Target or initiator.

    Args:
        device: ``cpu``, or ``cuda:N`` as this process counts.
        path: of the engine.
        nbytes: of the memory.
        vmm: whether it is made by cuMemCreate, in two pieces.
    """

    def __init__(self, device: str, path: str, nbytes: int, *, vmm: bool = False) -> None:
        self.device = device
        self.ordinal = int(device.partition(":")[2] or 0)
        if device != "cpu":
            torch.cuda.set_device(self.ordinal)
        self._vmm = Vmm(nbytes, self.ordinal) if vmm else None
        if self._vmm is not None:
            self.memory = torch.as_tensor(self._vmm, device=device)
            assert self.memory.data_ptr() == self._vmm.address, "torch made a copy"
        else:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.engine = TransferEngine(TransferConfig(path=path))
        self.peers: dict[str, Peer] = {}
        self._storm: threading.Thread | None = None
        self._stop = threading.Event()
        self._landed, self._under_way, self._ended = 0, 0, ""

    def close(self) -> None:
        self._stop.set()
        self.engine.close()
        if self._storm is not None:
            self._storm.join(20)
        self.memory = torch.empty(0)
        if self._vmm is not None:
            self._vmm.close()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ memory

    def fill(self, seed: int) -> None:
        """Every byte by `pattern`."""
        for at in range(0, self.memory.numel(), STEP):
            piece = self.memory[at : at + STEP]
            piece.copy_(pattern(seed, torch.arange(at, at + piece.numel(), device=self.device)))
        self._synchronize()

    def wrong(self, seed: int, copies: list[Copies], at: int = 0, nbytes: int | None = None) -> str:
        """What is not as these copies from a memory of `seed` leave one of `GUARD`; empty if all is right.

        Args:
            at, nbytes: look only at this piece of the memory.
        """
        end = self.memory.numel() if nbytes is None else at + nbytes
        expected = torch.empty(end, dtype=torch.uint8, device=self.device)
        for low in range(at, end, STEP):
            piece = expected[low : low + STEP]
            piece.copy_(pattern(GUARD, torch.arange(low, low + piece.numel(), device=self.device)))
        for one in copies:
            src, dst, length = (torch.from_numpy(a).to(self.device) for a in one.runs())
            start = torch.cumsum(length, 0) - length
            inside = torch.arange(int(length.sum()), device=self.device)
            inside -= torch.repeat_interleave(start, length)
            to = torch.repeat_interleave(dst, length) + inside
            expected[to] = pattern(seed, torch.repeat_interleave(src, length) + inside)
        self._synchronize()
        here, expected = self.memory[at:end], expected[at:]
        if torch.equal(here, expected):
            return ""
        different = (here != expected).nonzero()[:, 0]
        first = int(different[0])
        near = slice(max(0, first - 8), first + 24)
        return (
            f"{different.numel()} bytes differ, the first at {at + first}, the last at "
            f"{at + int(different[-1])}; there is {here[near].tolist()}, expected {expected[near].tolist()}"
        )

    def poison(self) -> None:
        """Use the memory for something else, at once."""
        self.memory.fill_(POISON)
        self._synchronize()

    def changed(self, seconds: float) -> tuple[int, int]:
        """Watch poisoned memory: how often it was looked at, and how many bytes have changed."""
        looks, end = 0, time.monotonic() + seconds
        while True:
            looks += 1
            if wrong := int((self.memory != POISON).sum()):
                return looks, wrong
            if time.monotonic() > end:
                return looks, 0
            time.sleep(0.01)

    def free_bytes(self) -> int:
        """Free on the GPU, whoever uses the rest."""
        return int(torch.cuda.mem_get_info(self.ordinal)[0])

    def computes(self) -> bool:
        """Whether this process's CUDA context works."""
        numbers = torch.arange(1000, device=self.device, dtype=torch.int64)
        return int((numbers * 2).sum()) == 999_000

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.ordinal)

    # ------------------------------------------------------------------ target

    def offer(self, peer: str, parts: list[tuple[int, int]] | None = None) -> str:
        """An address for `peer`: of everything, or of parts (offset, bytes) registered one by one."""
        if parts is None:
            return self.engine.offer([self.engine.register(self.memory)], peer=peer)
        whole = region_of(self.memory)
        regions = [Region(whole.address + at, length, whole.location) for at, length in parts]
        return self.engine.offer([self.engine.register(region) for region in regions], peer=peer)

    def fence_and_poison(self, peer: str) -> float:
        """End the peer's link and use the memory for something else at once; the seconds the fence took."""
        began = time.monotonic()
        self.engine.fence(peer)
        took = time.monotonic() - began
        self.poison()
        return took

    # ------------------------------------------------------------------ initiator

    def connect(self, name: str, address: str) -> None:
        self.engine.register(self.memory)
        self.peers[name] = self.engine.connect(address)

    def hang_up(self, name: str) -> None:
        self.peers.pop(name).close()

    def plan(self, peer: str, copies: Copies, after: tuple[Any, ...] = ()) -> CopyPlan:
        src = (self.memory.data_ptr() + copies.src).astype(np.uint64)
        dst = (self.peers[peer].regions[0].address + copies.dst).astype(np.uint64)
        if (t := copies.shape) is not None:
            tile = Tile(t.n1, t.n2, t.run, t.src1, t.src2, t.dst1, t.dst2)
            return CopyPlan(src, dst, copies.length.astype(np.uint64), tile, after)
        return CopyPlan.of(src, dst, copies.length.astype(np.uint64), after)

    def write(self, peer: str, copies: Copies, deadline: float = 30.0) -> tuple[float, list[str]]:
        """Copy; the seconds that took, and the paths that it took."""
        before = dict(self.peers[peer].outbound.sent)
        began = time.monotonic()
        self.engine.submit(self.plan(peer, copies), to=self.peers[peer], deadline=deadline).wait(deadline + 5)
        took = time.monotonic() - began
        sent = self.peers[peer].outbound.sent
        return took, sorted(rail for rail in sent if sent[rail] > before.get(rail, 0))

    def fails(self, peer: str, copies: Copies, deadline: float = 10.0) -> str:
        """Why a copy fails; empty if it does not."""
        try:
            self.write(peer, copies, deadline)
        except (MooncakeError, TimeoutError) as failed:
            return str(failed) or type(failed).__name__
        return ""

    def read(self, peer: str, offset: int, nbytes: int) -> None:
        """Have the beginning of this memory filled from the peer's."""
        self.engine.read(self.peers[peer], self.memory[:nbytes], offset=offset, deadline=20).wait(25)

    def write_late_data(self, peer: str, copies: Copies, seed: int, cycles: int) -> tuple[bool, float, bool]:
        """Copy data that a stream writes only after a slow kernel; nobody waits but the GPU.

        Returns:
            Whether the data was not yet written when the copy was submitted, the seconds that `submit` took,
            and whether it was still not written when `submit` returned.
        """
        from mooncake_connector.kv_transfer.transport.cuda import driver

        index = torch.arange(self.memory.numel(), device=self.device)
        late = pattern(seed, index)
        event = driver.Event(driver.context_at(self.memory.data_ptr()))
        plan = self.plan(peer, copies, (event,))
        stream = torch.cuda.Stream(self.ordinal)
        self._synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            self.memory.copy_(late)
            event.record(stream.cuda_stream)
        early = not event.query()
        began = time.monotonic()
        transfer = self.engine.submit(plan, to=self.peers[peer], deadline=30)
        took = time.monotonic() - began
        still = not event.query()
        transfer.wait(35)
        assert event.query(), "the copy ended before the data was there"
        event.close()
        return early, took, still

    def submit_behind_sleep(self, peer: str, copies: Copies, cycles: int) -> None:
        """Submit a copy that has to wait for a slow kernel, and leave it alone."""
        from mooncake_connector.kv_transfer.transport.cuda import driver

        event = driver.Event(driver.context_at(self.memory.data_ptr()))
        stream = torch.cuda.Stream(self.ordinal)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            event.record(stream.cuda_stream)
        began = time.monotonic()
        self._watch(self.engine.submit(self.plan(peer, copies, (event,)), to=self.peers[peer], deadline=60))
        # Many ranges given to copy engines that wait fill their queue, and then `submit` waits, too.
        took = time.monotonic() - began
        assert not event.query(), f"the slow kernel ended within the {took:.2f} s that the submit took"

    def _watch(self, transfer: Transfer) -> None:
        self._under_way, self._ended = 1, ""

        def ended(transfer: Transfer) -> None:
            self._under_way, self._ended = 0, transfer.error or "it landed"

        transfer.add_done_callback(ended)

    def storm(self, peer: str, copies: Copies, at_once: int = 3) -> None:
        """Write the same again and again, from a thread, `at_once` transfers at a time, until one fails."""
        plan, to = self.plan(peer, copies), self.peers[peer]
        self._stop.clear()
        self._landed, self._under_way, self._ended = 0, 0, ""

        def blow() -> None:
            running: list[Transfer] = []
            failed = ""
            while running or not (failed or self._stop.is_set()):
                try:
                    while len(running) < at_once and not failed and not self._stop.is_set():
                        running.append(self.engine.submit(plan, to=to, deadline=30))
                        self._under_way = len(running)
                    running[0].wait(40)
                    self._landed += 1
                except (MooncakeError, TimeoutError) as e:
                    failed = failed or str(e) or type(e).__name__
                running = running[1:]
                self._under_way = len(running)
            self._ended = failed or "it was told to stop"

        self._storm = threading.Thread(target=blow, daemon=True)
        self._storm.start()

    def still(self) -> None:
        """Let no more writes follow."""
        self._stop.set()

    def storm_state(self) -> tuple[int, int, str]:
        """Writes that landed, those under way, and why it ended (empty: it has not)."""
        return self._landed, self._under_way, self._ended

    def await_end(self, seconds: float) -> str:
        """Why the storm, or the one write, ended."""
        end = time.monotonic() + seconds
        while not self._ended:
            assert time.monotonic() < end, f"{self._under_way} writes are under way after {seconds} s"
            time.sleep(0.005)
        return self._ended

    def await_landed(self, count: int, seconds: float = 20) -> int:
        """Wait until so many writes of the storm have landed."""
        end = time.monotonic() + seconds
        while self._landed < count:
            assert not self._ended, f"the storm ended early: {self._ended}"
            assert time.monotonic() < end, f"{self._landed} writes landed in {seconds} s"
            time.sleep(0.0005)
        return self._landed
