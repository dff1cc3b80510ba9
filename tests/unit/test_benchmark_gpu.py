"""benchmarks/gpu.py without a GPU: what it moves, how it checks that, what it does when something fails."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_subjects  # noqa: E402
import gpu_tuning  # noqa: E402
import report  # noqa: E402
from gpu_memory import POISON, CudaMemory, HostMemory, Move, content, scattered  # noqa: E402
from gpu_pair import BLOCK, SAMPLES, Task, measure, two_at_a_time  # noqa: E402
from gpu_processes import Failed, Measuring  # noqa: E402

MIB = 1 << 20


def test_pages_lie_at_random_on_both_sides_and_always_the_same() -> None:
    move, again = scattered(MIB, 4096), scattered(MIB, 4096)
    for side in (move.src, move.dst):
        assert sorted(side) == list(range(256))
        assert not np.array_equal(side, np.arange(256))
    assert not np.array_equal(move.src, move.dst)
    assert np.array_equal(move.src, again.src)
    assert np.array_equal(move.dst, again.dst)
    assert scattered(MIB, 4096, 64 << 10).nbytes == 64 << 10


@pytest.mark.parametrize(("page", "nbytes"), [(4096, 6000), (4096, 2 * MIB), (12, 12)])
def test_what_does_not_fit_is_refused(page: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        scattered(MIB, page, nbytes)


def moved(move: Move, memory: HostMemory) -> None:
    """The move, done byte by byte, as if by a subject."""
    source, target = content(memory.nbytes).view(np.uint8), memory.words.view(np.uint8)
    for src, dst in zip(move.src, move.dst, strict=True):
        page = source[src * move.page : (src + 1) * move.page]
        if move.swap is not None:
            outer, inner = move.swap
            run = move.page // (outer * inner)
            parts = [page[(o * inner + i) * run :][:run] for i in range(inner) for o in range(outer)]
            page = np.concatenate(parts)
        target[dst * move.page : (dst + 1) * move.page] = page


@pytest.mark.parametrize("swap", [None, (16, 8), (8, 16)])
@pytest.mark.parametrize("nbytes", [MIB, 128 << 10])
def test_every_byte_is_compared(swap: tuple[int, int] | None, nbytes: int) -> None:
    memory, move = HostMemory(MIB), scattered(MIB, 64 << 10, nbytes, swap)
    memory.poison()
    assert not memory.has(move)
    moved(move, memory)
    assert memory.has(move)
    words = memory.words
    for at in (0, words.size // 2, words.size - 1):
        kept = words[at]
        words[at] ^= 1
        assert not memory.has(move), "a changed bit, in a page that was written or in one that was not"
        words[at] = kept
    assert memory.has(move)


@pytest.mark.parametrize("swap", [None, (16, 8)])
def test_a_gpus_memory_is_compared_alike(swap: tuple[int, int] | None) -> None:
    torch = pytest.importorskip("torch")
    host, move = HostMemory(MIB), scattered(MIB, 64 << 10, 512 << 10, swap)
    host.poison()
    moved(move, host)
    memory = CudaMemory.__new__(CudaMemory)  # with a CPU's tensor in the place of a GPU's
    memory.nbytes, memory.words, memory._torch = MIB, torch.from_numpy(host.words.copy()), torch
    memory._reference = None
    assert memory.has(move)
    memory.words[5] = POISON ^ 1
    assert not memory.has(move)


@pytest.mark.parametrize("swap", [BLOCK, BLOCK[::-1]])
def test_a_plan_of_tiles_is_the_move(swap: tuple[int, int]) -> None:
    move = scattered(MIB, 64 << 10, None, swap)
    source, memory = HostMemory(MIB), HostMemory(MIB)
    source.fill()
    memory.poison()
    plan = gpu_subjects.plan_of(move, source.address, memory.address).flat()
    near, far = source.words.view(np.uint8), memory.words.view(np.uint8)
    for src, dst, length in zip(plan.src, plan.dst, plan.length, strict=True):
        at, to = int(src) - source.address, int(dst) - memory.address
        far[to : to + int(length)] = near[at : at + int(length)]
    assert memory.has(move)


def test_addresses_fill_the_memory() -> None:
    move = scattered(MIB, 4096)
    src, dst = gpu_subjects.addresses(move, 1 << 40, 1 << 46)
    assert src.dtype == dst.dtype == np.uint64
    assert sorted(src - np.uint64(1 << 40)) == sorted(dst - np.uint64(1 << 46)) == list(range(0, MIB, 4096))
    rows = gpu_subjects.descriptors(src, 4096, 3)
    assert rows.shape == (256, 3)
    assert rows[7].tolist() == [int(src[7]), 4096, 3]


@pytest.mark.parametrize(("patience_s", "transfers"), [(0.0, None), (60.0, None), (0.1, 1)])
def test_what_takes_too_long_is_measured_once(patience_s: float, transfers: int | None) -> None:
    class Slow:
        started = 0

        def start(self, task: Task, move: object) -> object:
            def begin(slot: int):
                self.started += 1
                return lambda: time.sleep(0.02)

            return begin

        def poison(self) -> None: ...

        def has(self, move: object) -> bool:
            return True

        def cpu(self) -> float:
            return 0.0

    slow = Slow()
    task = Task("tcp", "tcp", "staged", {}, 4096, 4096, patience_s=patience_s)
    samples = measure(slow, task, MIB)["staged"]
    assert samples[0] == pytest.approx(4096 / 0.02 / 1e9, rel=0.3)
    if transfers is None:
        assert len(samples) == SAMPLES
    else:
        assert (len(samples), slow.started) == (1, transfers)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_two_transfers_are_under_way(count: int) -> None:
    under_way: list[int] = []
    most, started = 0, 0

    def start(slot: int):
        nonlocal most, started
        assert slot not in under_way
        under_way.append(slot)
        most, started = max(most, len(under_way)), started + 1
        return lambda: under_way.remove(slot)

    two_at_a_time(start, count)
    assert (under_way, most, started) == ([], min(2, count), count)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_everything_asked_for_is_in_the_schedule(host: bool, quick: bool) -> None:
    nbytes = 256 * MIB if quick else 1024 * MIB
    tasks = gpu.schedule(host, quick, nbytes)
    limit = "memcpy" if host else "peer_copy"
    once = [(t.label, t.metric, json.dumps(t.case)) for t in tasks if t.subject != limit]
    assert len(set(once)) == len(once)
    assert {t.subject for t in tasks} == set(gpu.HOST_SUBJECTS if host else gpu.GPU_SUBJECTS)
    assert {t.metric for t in tasks} <= set(gpu.UNITS)
    for task in tasks:
        assert Task(**json.loads(json.dumps(asdict(task)))).move(nbytes).nbytes == task.nbytes
        if not task.bulk:
            assert task.nbytes % task.page == 0
    if not host:
        ways = {t.label for t in tasks if t.metric == "bandwidth"}
        assert {"cuda_ipc", "cuda_ipc/kernel", "cuda_ipc/copy_engine", "nixl", "mooncake-nvlink"} <= ways
    if not (host or quick):
        swept = {(t.case["page_bytes"], t.settings["cuda_sms"]) for t in tasks if "cuda_sms" in t.settings}
        assert swept == {(page, sms) for page in gpu.SM_PAGES for sms in gpu.SMS}


def test_a_sweep_changes_settings_of_tcp_alone() -> None:
    tasks = gpu.sweep(1024 * MIB)
    assert len({t.label for t in tasks}) == len(tasks) == len(gpu.SWEEP)
    assert {(t.subject, t.metric) for t in tasks} == {("tcp", "staged_by_setting")}
    assert tasks[0].settings == {}
    try:
        for task in tasks:
            gpu_tuning.tune(task.settings)
            gpu_subjects.Ours("tcp")._made(task.settings).close()
    finally:
        gpu_tuning.tune({})


def test_only_mooncake_gets_its_environment(tmp_path: Path) -> None:
    assert gpu.environment("mooncake-nvlink", tmp_path)["MC_INTRANODE_NVLINK"] == "1"
    assert gpu.environment("mooncake-nvlink", tmp_path)["LD_LIBRARY_PATH"].startswith(str(tmp_path))
    assert "MC_INTRANODE_NVLINK" not in gpu.environment("cuda_ipc", tmp_path)


@pytest.mark.parametrize(("reached", "word"), [(360.0, "met"), (340.0, "MISSED")])
def test_verdicts(reached: float, word: str) -> None:
    def figure(subject: str, page: int, value: float, metric: str = "bandwidth") -> report.Row:
        return report.row("gpu", subject, {"page_bytes": page}, metric, [value], "GB/s")

    rows = [figure("cuda_ipc", 32 << 10, reached), figure("peer_copy", 1 << 30, 400.0)]
    lines = gpu.verdicts(rows)
    assert [line.partition(":")[0] for line in lines] == [word, word if reached < 352 else "met"]
    rows += [figure("pinned_copy", 1 << 15, 50.0, "staged"), figure("socket", 1 << 15, 10.0, "staged")]
    rows.append(figure("tcp", 1 << 15, 7.9, "staged"))
    assert gpu.verdicts(rows)[-1].startswith("MISSED: tcp")
    assert gpu.verdicts([]) == []


class Fake:
    """A `Measuring` that does as it is told."""

    def __init__(self, answers: list[object]) -> None:
        self._answers, self.closed = list(answers), False

    def answer(self, limit_s: float) -> object:
        return self._next()

    def measure(self, task: dict, limit_s: float) -> object:
        return self._next()

    def close(self) -> None:
        self.closed = True

    def _next(self) -> object:
        said = self._answers.pop(0)
        if isinstance(said, Exception):
            raise said
        return said


def test_who_fails_stops_nobody_else() -> None:
    tasks = [Task(s, s, "bandwidth", {"page_bytes": n}, n, n) for s in ("a", "b", "c") for n in (4096, 8192)]
    figures = {"bandwidth": [1.0]}
    fakes = {
        "a": Fake([{"ready": True}, figures, Failed("wrong bytes", fatal=False)]),
        "b": Fake([Failed("it can't", fatal=False)]),
        "c": Fake([{"ready": True}, Failed("it died", fatal=True)]),
    }
    told = []
    gpu.run(tasks, fakes.__getitem__, 60.0, lambda task, outcome: told.append((task.subject, outcome)))
    assert told == [
        ("a", figures),
        ("a", "wrong bytes"),
        ("b", "it can't"),
        ("b", "it can't"),
        ("c", "it died"),
        ("c", "it died"),
    ]
    assert all(fake.closed for fake in fakes.values())


def measuring(code: str, logs: Path) -> Measuring:
    return Measuring("it", [sys.executable, "-c", code], {}, logs)


def test_processes_that_hang_or_die_are_reported_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    hanging = measuring(
        "import sys, time; print('so far', file=sys.stderr, flush=True); time.sleep(60)", tmp_path
    )
    with pytest.raises(Failed, match=r"said nothing for 1 s; its log ends: .*so far") as silent:
        hanging.answer(1.0)
    assert silent.value.fatal
    hanging.close()
    dead = measuring("raise SystemExit('no such GPU')", tmp_path)
    with pytest.raises(Failed, match="ended; its log ends: no such GPU"):
        dead.answer(20.0)
    with pytest.raises(Failed, match="no time is left"):
        dead.measure({}, -1.0)
    dead.close()
    absent = Measuring("it", [str(tmp_path / "python")], {}, tmp_path)
    with pytest.raises(Failed, match="No such file"):
        absent.answer(1.0)
    absent.close()
    assert time.monotonic() - began < 30


def test_it_runs_with_host_memory(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    ours = ["process_vm", "tcp", "socket", "memcpy"]
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--host",
        "--quick",
        "--mib",
        "4",
        "--json",
        str(file),
    ]
    ran = subprocess.run(
        [*command, "--only", *ours], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["subject"] for row in rows} == set(ours)
    assert all(row["value"] > 0 for row in rows)
    assert {row["metric"] for row in rows} == {"bandwidth", "latency", "layouts", "staged", "cpu"}
