"""No block is written after its release: loads aborted, lost, timed out, their prefill killed or stopped."""

import random
import signal
import time

import pytest

from tests.gpu.audit import DecodeSide, PrefillSide, jobs
from tests.gpu.processes import Processes
from tests.gpu.test_cuda_ipc import ONE, PLACES, Where

ROUND = 60


def sizes(where: Where) -> dict[str, int]:
    """Blocks, and heads that make a page 32 KiB on the host and 256 KiB on a GPU."""
    return {"blocks": 257, "heads": 8} if where.path == "tcp" else {"blocks": 513, "heads": 64}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("where", PLACES)
def test_no_block_changes_after_its_release(processes: Processes, where: Where) -> None:
    """Rounds with one decode side: undisturbed, prefill killed twice, stopped, undisturbed."""
    events = ("kill", "") if where is ONE else ("", "kill", "kill", "stop", "")
    rng = random.Random(50)
    most = sizes(where)["blocks"] // 8
    decode = processes.take()
    decode.new(DecodeSide, device=where.target, path=where.path, seed=1, **sizes(where))
    prefills = [processes.take() for _ in range(events.count("kill") + 1)]
    for n, one in enumerate(prefills):
        one.new(PrefillSide, device=where.initiator, path=where.path, seed=10 + n, **sizes(where))
    began, total = time.monotonic(), 0
    troubles: list[str] = []
    for round, event in enumerate(events):
        prefill = prefills[0]
        todo = jobs(rng, 1 + 1000 * round, ROUND, most)
        address = prefill.call("address")
        prefill.call("begin", todo=todo)
        decode.call("begin", todo=todo, prefill=address, linger=0.5 if event else 0.2)
        time.sleep(0.5 + 0.4 * rng.random())
        if event == "kill":
            prefill.kill()
            prefills.pop(0)
        elif event == "stop":
            prefill.signal(signal.SIGSTOP)
            time.sleep(6)  # longer than a load may take
            prefill.signal(signal.SIGCONT)
        counts, wrong = decode.call("end", seconds=40, wait=50)
        print(f"round {round + 1}, {event or 'undisturbed'}: {counts}")
        if event != "kill":
            done, trouble = prefill.call("end", seconds=20, wait=30)
            print(f"    prefill: {done}")
            troubles += [f"prefill: {one}" for one in trouble]
        total += ROUND
    print(f"{total} loads in {time.monotonic() - began:.1f} s; {counts['pages audited']} pages audited")
    troubles += wrong
    assert not troubles, "\n".join(troubles[:10])
    ended = counts.get("loaded", 0), counts.get("aborted", 0), counts.get("failed", 0)
    assert sum(ended) == total, f"{ended} of {total} loads were reported"
    assert min(ended) > total // 30, f"loaded, aborted, failed: {ended}: too few of a kind to show anything"
