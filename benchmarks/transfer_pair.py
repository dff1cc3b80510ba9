"""One subject's turn in transfer.py: bytes from one process's memory into another's.

Runs in the subject's own environment (numpy is all that the peers' one has) and prints a line of JSON for
each figure: {"subject", "metric", "case", "samples": [...]}, in the units of `UNITS`.

- Pages: memory to memory, the target's pages scattered at random. `cpu` is of both processes with all their
  threads, user and system time.
- Latency: one write of 4 KiB after the other, prepared beforehand; quantiles of one turn are one sample.
- Messages: small writes from one thread, thousands under way; /urgent ones are sent without aggregation.

Before anything is timed, the same is done once into zeroed memory, all of which the target then compares with
what it should hold; messages are compared afterwards as well.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
from subjects import SUBJECTS, Array, Ours, Subject, memory_of

UNITS = {"bandwidth": "GB/s", "cpu": "s/GiB", "latency": "us", "latency_p99": "us", "messages": "1/s"}
SEED = 11
WRITE_BYTES = 4096
WARM_UP = 100
MESSAGE_BYTES = (1 << 10, 4 << 10, 16 << 10, 64 << 10)
OUTSTANDING = 2048
STORM_SLOTS = 4096


def content(nbytes: int) -> Array:
    """What the source holds: uint8 [nbytes]."""
    return np.random.default_rng(SEED).integers(1, 2**63, nbytes // 8, np.uint64).view(np.uint8)


def scatter(nbytes: int, page: int, bulk: bool) -> Array:
    """Which page of the target each page of the source goes to."""
    count = nbytes // page
    return np.arange(count) if bulk else np.random.default_rng(page).permutation(count)


def say(subject: str, metric: str, case: dict[str, int], samples: list[float]) -> None:
    print(json.dumps({"subject": subject, "metric": metric, "case": case, "samples": samples}), flush=True)


def timed(work: Callable[[], None]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Far:
    """The target's process, as the measuring one commands it."""

    def __init__(self, subject: str, nbytes: int) -> None:
        self._pipe, far = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=far_end, args=(subject, nbytes, far), daemon=True).start()
        self.offer, self.base = self._pipe.recv()

    def zero(self) -> None:
        """Zero its memory."""
        self._ask("zero")

    def verify(self, nbytes: int, page: int) -> None:
        """Exit if its first `nbytes` bytes are not the source's, in scattered pages."""
        if not self._ask("verify", nbytes, page):
            raise SystemExit("what arrived differs from what was sent")

    def cpu(self) -> float:
        """CPU seconds that it has used so far."""
        return self._ask("cpu")

    def _ask(self, *question: object) -> float:
        self._pipe.send(question)
        answer: float = self._pipe.recv()
        return answer


def far_end(subject: str, nbytes: int, pipe: Connection) -> None:
    side = SUBJECTS[subject]()
    memory = memory_of(nbytes)
    pipe.send((side.target(memory), memory.ctypes.data))
    source = content(nbytes)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            # Peers' libraries have threads that do not always end by themselves.
            os._exit(0)
        match question:
            case ("zero",):
                memory[:] = 0
                pipe.send(0)
            case ("verify", size, page):
                expected = np.empty((size // page, page), np.uint8)
                expected[scatter(size, page, side.bulk)] = source[:size].reshape(-1, page)
                pipe.send(bool(np.array_equal(memory[:size], expected.reshape(-1))))
            case ("cpu",):
                pipe.send(time.process_time())


class Pair:
    """Two processes and a subject between them."""

    def __init__(self, subject: str, nbytes: int) -> None:
        self._subject, self._nbytes = subject, nbytes
        self._far = Far(subject, nbytes)
        self._memory = memory_of(nbytes)
        self._memory[:] = content(nbytes)
        self._side: Subject = SUBJECTS[subject]()
        self._side.initiator(self._memory, self._far.offer)

    def pages(self, page: int, iterations: int) -> None:
        """Bandwidth, and what it costs."""
        src, dst = self._scattered(self._nbytes, page)
        self._far.zero()
        self._side.copy(src, dst, page)
        self._far.verify(self._nbytes, page)
        before = time.process_time() + self._far.cpu()
        seconds = [timed(lambda: self._side.copy(src, dst, page)) for _ in range(iterations)]
        used = time.process_time() + self._far.cpu() - before
        case = {"page_bytes": page}
        say(self._subject, "bandwidth", case, [self._nbytes / taken / 1e9 for taken in seconds])
        say(self._subject, "cpu", case, [used / iterations / (self._nbytes / 2**30)])

    def latency(self, writes: int) -> None:
        """Of one write after the other."""
        src, dst = self._scattered(WRITE_BYTES, WRITE_BYTES)
        self._far.zero()
        write = self._side.prepared(src, dst, WRITE_BYTES)
        write()
        self._far.verify(WRITE_BYTES, WRITE_BYTES)
        for _ in range(WARM_UP):
            write()
        micro = [1e6 * timed(write) for _ in range(writes)]
        half, most = np.quantile(micro, (0.5, 0.99)).tolist()
        say(self._subject, "latency", {"page_bytes": WRITE_BYTES}, [half])
        say(self._subject, "latency_p99", {"page_bytes": WRITE_BYTES}, [most])

    def messages(self, nbytes: int, rounds: int) -> None:
        """Small writes per second, with aggregation and without."""
        assert isinstance(self._side, Ours)
        slots = min(STORM_SLOTS, self._nbytes // nbytes)
        src, dst = self._scattered(slots * nbytes, nbytes)
        # Two writes to the same bytes are never under way at once: they would not travel together.
        outstanding = min(OUTSTANDING, slots // 2)
        for urgent in (False, True):
            self._far.zero()
            self._side.storm(src, dst, nbytes, outstanding, urgent)
            self._far.verify(slots * nbytes, nbytes)
            self._far.zero()
            many = (np.tile(side, rounds) for side in (src, dst))
            seconds = self._side.storm(*many, nbytes, outstanding, urgent)
            self._far.verify(slots * nbytes, nbytes)
            subject = f"{self._subject}/urgent" if urgent else self._subject
            say(subject, "messages", {"message_bytes": nbytes}, [slots * rounds / seconds])

    def _scattered(self, nbytes: int, page: int) -> tuple[Array, Array]:
        """Addresses of pages here and there."""
        src = self._memory.ctypes.data + np.arange(nbytes // page) * page
        return src, self._far.base + scatter(nbytes, page, self._side.bulk) * page


def measure_memcpy(nbytes: int, pages: list[int], iterations: int) -> None:
    """A limit: one thread of one process copies the same pages to the same places."""
    source, memory = memory_of(nbytes), memory_of(nbytes)
    source[:] = content(nbytes)
    for page in pages:
        # take() copies whole pages by memcpy; gathering instead of scattering moves the same bytes.
        rows, place, order = source.reshape(-1, page), memory.reshape(-1, page), scatter(nbytes, page, False)

        def copy() -> None:
            np.take(rows, order, axis=0, out=place, mode="clip")  # noqa: B023

        copy()
        if not np.array_equal(place, rows[order]):
            raise SystemExit("what arrived differs from what was sent")
        before = time.process_time()
        seconds = [timed(copy) for _ in range(iterations)]
        used = time.process_time() - before
        say("memcpy", "bandwidth", {"page_bytes": page}, [nbytes / taken / 1e9 for taken in seconds])
        say("memcpy", "cpu", {"page_bytes": page}, [used / iterations / (nbytes / 2**30)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=[*SUBJECTS, "memcpy"])
    parser.add_argument("--nbytes", type=int, default=256 << 20)
    parser.add_argument("--pages", type=int, nargs="*", default=[64 << 10])
    parser.add_argument("--iterations", type=int, default=4, help="for each page size")
    parser.add_argument("--latency", type=int, default=0, metavar="WRITES", help="0: not measured")
    parser.add_argument("--messages", type=int, default=0, metavar="ROUNDS", help="0: not measured")
    options = parser.parse_args()
    if options.subject == "memcpy":
        measure_memcpy(options.nbytes, options.pages, options.iterations)
        return
    pair = Pair(options.subject, options.nbytes)
    if options.latency:
        pair.latency(options.latency)
    for page in options.pages:
        pair.pages(page, options.iterations)
    if options.messages:
        for nbytes in MESSAGE_BYTES:
            pair.messages(nbytes, options.messages)
    os._exit(0)  # as the other process does when it finds this one gone


if __name__ == "__main__":
    main()
