"""The watcher reports what changed, once, by polling or by the kernel's events, and ends when told."""

import queue
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mooncake_connector.kv_transfer.topology.watcher as watcher_module
from mooncake_connector.kv_transfer.topology import Change, Topology, Watcher, discover
from tests.unit.sysfs_trees import Tree, ipv4_gid, two_sockets

Seen = queue.Queue[tuple[tuple[Change, ...], Topology]]


@contextmanager
def watching(root: Path, listener: Callable[[tuple[Change, ...], Topology], None]) -> Iterator[Watcher]:
    watcher = Watcher(discover(root), listener, sysfs=root, poll_s=0.02)
    try:
        yield watcher
    finally:
        watcher.close()
    assert not watcher._thread.is_alive()


def port_file(root: Path, nic: str, name: str) -> Path:
    return root / "class/infiniband" / nic / "ports/1" / name


def test_a_change_between_two_readings_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_sockets(tmp_path)
    seen: Seen = queue.Queue()
    state = port_file(tmp_path, "mlx5_0", "state")

    read = watcher_module.discover_nics

    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        state.write_text("1: DOWN\n")
        found = read(*args)
        state.write_text("4: ACTIVE\n")
        return found

    topology = discover(tmp_path)
    monkeypatch.setattr(watcher_module, "discover_nics", interrupted)
    watcher = Watcher(topology, lambda *told: seen.put(told), sysfs=tmp_path, poll_s=0.02)
    try:
        kinds = [seen.get(timeout=5)[0][0].kind for _ in range(2)]
    finally:
        watcher.close()
    assert kinds == ["down", "up"]


def test_each_kind_of_change(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    seen: Seen = queue.Queue()

    def next_change() -> tuple[str, str]:
        changes, topology = seen.get(timeout=5)
        (change,) = changes
        assert (change.nic in topology.nics) == (change.kind != "removed")
        return change.kind, change.nic.name

    with watching(tmp_path, lambda changes, topology: seen.put((changes, topology))) as watcher:
        port_file(tmp_path, "mlx5_0", "state").write_text("1: DOWN\n")
        assert next_change() == ("down", "mlx5_0")
        port_file(tmp_path, "mlx5_0", "state").write_text("4: ACTIVE\n")
        assert next_change() == ("up", "mlx5_0")
        (tmp_path / "class/net/ens1np0").unlink()
        (tmp_path / "class/infiniband/mlx5_1").unlink()
        assert next_change() == ("removed", "mlx5_1")
        Tree(tmp_path / "other").interface("eth9", "pci0000:00/0000:00:09.0")
        shutil.copytree(tmp_path / "other/devices", tmp_path / "devices", dirs_exist_ok=True)
        at = "devices/pci0000:00/0000:00:09.0/net/eth9"
        (tmp_path / "class/net/eth9").symlink_to(tmp_path / at)
        assert next_change() == ("added", "eth9")
        assert [nic.name for nic in watcher.topology.nics] == ["eth9", "mlx5_0", "mlx5_2", "mlx5_3"]
    assert seen.empty()


def test_a_failing_listener_does_not_end_it(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    calls: queue.Queue[str] = queue.Queue()

    def listener(changes: tuple[Change, ...], _: Topology) -> None:
        calls.put(changes[0].kind)
        raise RuntimeError("listener")

    with watching(tmp_path, listener):
        for state, kind in (("1: DOWN", "down"), ("4: ACTIVE", "up")):
            port_file(tmp_path, "mlx5_0", "state").write_text(state)
            assert calls.get(timeout=5) == kind


def test_it_can_be_closed_by_its_listener_and_twice(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    called = threading.Event()

    def listener(changes: tuple[Change, ...], topology: Topology) -> None:
        watcher.close()
        called.set()

    before = len(list(Path("/proc/self/fd").iterdir()))
    with watching(tmp_path, listener) as watcher:
        port_file(tmp_path, "mlx5_0", "state").write_text("1: DOWN\n")
        assert called.wait(5)
        watcher._thread.join(5)
        watcher.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


IN_A_NETWORK_NAMESPACE = """
    import queue, subprocess, sys
    from pathlib import Path
    from mooncake_connector.kv_transfer.topology import Watcher, discover

    root, state, gid = map(Path, sys.argv[1:4])
    seen = queue.Queue()
    watcher = Watcher(discover(root), lambda changes, _: seen.put(changes), sysfs=root, poll_s=3600)
    for file, text, command in (
        (state, "1: DOWN", "ip link set lo up"),
        (gid, sys.argv[4], "ip address add 10.7.0.1/24 dev lo"),
    ):
        file.write_text(text)
        subprocess.run(command.split(), check=True)
        (change,) = seen.get(timeout=10)
        print(change.kind, change.nic.name)
    watcher.close()
"""


def test_the_kernels_events_come_at_once(tmp_path: Path) -> None:
    """Without an event the next look would be in an hour."""
    namespace = ["unshare", "--user", "--map-root-user", "--net"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*namespace, "ip", "link"], capture_output=True).returncode
    ):
        pytest.skip("network namespaces are not allowed here")
    two_sockets(tmp_path)
    state, gid = port_file(tmp_path, "mlx5_0", "state"), port_file(tmp_path, "mlx5_1", "gids/3")
    done = subprocess.run(
        [
            *namespace,
            *(sys.executable, "-c", textwrap.dedent(IN_A_NETWORK_NAMESPACE)),
            *(str(tmp_path), str(state), str(gid), ipv4_gid("10.7.0.1")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["down mlx5_0", "changed mlx5_1"], done.stderr
