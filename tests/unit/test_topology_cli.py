"""The command: a tree for people, JSON for programs, recordings for us."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mooncake_connector.cli import main
from tests.unit.sysfs_trees import SHAPES, cloud_vm, dgx_h100, no_nic, two_sockets


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["topology", *arguments]) == 0
    return capsys.readouterr().out


def test_tree_of_a_dgx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dgx_h100(tmp_path)
    lines = run(capsys, "--sysfs", str(tmp_path), "--deny", "mlx5_1", "mlx5_7").splitlines()
    assert "├─ cuda:0: NVIDIA GPU, 0000:18:00.0, PIX to mlx5_0" in lines
    assert (
        "├─ mlx5_1: rdma, ACTIVE, Ethernet, 200 Gb/s, PCIe 252.1 Gb/s, over enp39s0, GID 3 RoCE v2 10.1.0.1"
        in lines
    )
    row = "  cuda:5  mlx5_9 | x2: mlx5_6 mlx5_10 mlx5_11 | x4: mlx5_0 mlx5_3 mlx5_4 mlx5_5"
    assert row in lines
    assert "  not used: mlx5_1 (allow or deny list)" in lines
    assert lines.index("NUMA node 1: CPUs 56-111,168-223") < lines.index(
        "└─ mlx5_11: rdma, ACTIVE, InfiniBand, 400 Gb/s, PCIe 504.1 Gb/s, over ib7, "
        "GID 0 IB fe80::a088:c203:12:3456"
    )


def test_tree_of_small_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cloud_vm(tmp_path / "vm")
    assert run(capsys, "--sysfs", str(tmp_path / "vm")).splitlines() == [
        "NUMA node 0: CPUs 0-7",
        "├─ cuda:0: NVIDIA GPU, 0000:00:1e.0, PHB to ens5",
        "└─ ens5: tcp, ACTIVE, Ethernet, speed unknown",
        "",
        "Matrix of tcp NICs, preferred first (xN: a byte is taken to need N times as long)",
        "  cpu:0   ens5",
        "  cuda:0  ens5",
        "  *       ens5",
    ]
    no_nic(tmp_path / "none")
    assert "no NIC found" in run(capsys, "--sysfs", str(tmp_path / "none")).splitlines()
    two_sockets(tmp_path / "two")
    assert "  not used: mlx5_3 (DOWN)" in run(capsys, "--sysfs", str(tmp_path / "two")).splitlines()


def test_json_and_override(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_sockets(tmp_path / "sys")
    found = json.loads(run(capsys, "--sysfs", str(tmp_path / "sys"), "--json"))
    assert found["matrix"]["cpu:1"] == [["mlx5_2"], ["mlx5_0", "mlx5_1"]]
    assert found["distances"]["cpu:1"]["mlx5_0"] == "SYS"
    assert found["gids"]["mlx5_0"] == 3
    assert found["topology"]["nics"][0]["gids"][3]["type"] == "RoCE v2"
    file = tmp_path / "matrix.json"
    file.write_text(json.dumps(found["matrix"] | {"cpu:1": [["mlx5_0"], []]}))
    found = json.loads(run(capsys, "--sysfs", str(tmp_path / "sys"), "--json", "--override", str(file)))
    assert found["matrix"]["cpu:1"] == [["mlx5_0"], []]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recording_shows_the_same(
    shape: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape(tmp_path / "sys")
    run(capsys, "--sysfs", str(tmp_path / "sys"), "--record", str(tmp_path / "copy"))
    for options in ((), ("--json",)):
        shown = [run(capsys, "--sysfs", str(tmp_path / root), *options) for root in ("sys", "copy")]
        assert shown[0] == shown[1]


def test_this_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys).startswith("NUMA node ")
    copied = run(capsys, "--record", str(tmp_path / "copy"))
    assert "files of /sys are now in" in copied
    live, recorded = (
        json.loads(run(capsys, "--json", *options)) for options in ((), ("--sysfs", str(tmp_path / "copy")))
    )
    assert live["topology"]["nics"] == recorded["topology"]["nics"]
    assert live["topology"]["nodes"] == recorded["topology"]["nodes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sysfs", "{root}/missing"], "is no directory"),
        (["--sysfs", "{root}", "--deny", "mlx9_0"], "deny list names 'mlx9_0'"),
        (["--sysfs", "{root}", "--override", "{root}/none.json"], "can't be read"),
        (["--sysfs", "{root}", "--record", "{root}"], "not empty: name a new directory"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    two_sockets(tmp_path)
    assert main(["topology", *(argument.format(root=tmp_path) for argument in arguments)]) == 2
    assert says in capsys.readouterr().err
