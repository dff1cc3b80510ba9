"""What is read from recorded machines, how far apart things are; a recording reads like its original."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.kv_transfer.topology import Distance, Gpu, Nic, Node, Topology, discover, record
from mooncake_connector.kv_transfer.topology.discovery import glance
from mooncake_connector.kv_transfer.topology.refine import refine
from tests.unit.sysfs_trees import (
    DGX_COMPUTE,
    SHAPES,
    Tree,
    cloud_vm,
    dgx_h100,
    no_nic,
    soft_roce,
    two_sockets,
)

Shape = Callable[[Path], None]


def nics_of(topology: Topology) -> dict[str, Nic]:
    return {nic.name: nic for nic in topology.nics}


def test_dgx_h100(tmp_path: Path) -> None:
    dgx_h100(tmp_path)
    found = discover(tmp_path)
    assert found.nodes == (Node(0, "0-55,112-167"), Node(1, "56-111,168-223"))
    assert [(gpu.location, gpu.address, gpu.numa) for gpu in found.gpus[3:5]] == [
        ("cuda:3", "0000:5c:00.0", 0),
        ("cuda:4", "0000:9a:00.0", 1),
    ]
    nics = nics_of(found)
    # The interfaces of RDMA devices are shown as part of these; mlx5_10 comes after mlx5_9.
    assert list(nics) == ["eno3", "mlx5_0", "mlx5_1", *DGX_COMPUTE[1:5], "mlx5_7", *DGX_COMPUTE[5:]]
    nic = nics["mlx5_0"]
    assert (nic.kind, nic.port, nic.state, nic.numa) == ("rdma", 1, "ACTIVE", 0)
    assert (nic.link_layer, nic.netdev, nic.guid) == ("InfiniBand", "ib0", "a088:c203:0012:3456")
    assert nic.speed == 50e9
    assert nic.pcie == pytest.approx(63.0e9, rel=1e-3)
    assert [(gid.index, gid.type) for gid in nic.gids] == [(0, "IB")]
    assert nics["mlx5_1"].pcie == pytest.approx(31.5e9, rel=1e-3)
    for gpu, own in zip(found.gpus, DGX_COMPUTE, strict=True):
        distances = {name: found.distance(gpu.location, nic) for name, nic in nics.items()}
        assert [name for name, distance in distances.items() if distance == Distance.PIX] == [own]
        near = {name for name, distance in distances.items() if distance == Distance.NODE}
        assert near == {name for name, nic in nics.items() if nic.numa == gpu.numa} - {own}


def test_a_device_that_is_being_removed_counts_no_more(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    before = discover(tmp_path)
    for number in range(4):
        verbs = tmp_path / f"class/infiniband_verbs/uverbs{number}"
        verbs.mkdir(parents=True)
        (verbs / "ibdev").write_text(f"mlx5_{number}\n")
    assert discover(tmp_path) == before
    seen = glance(tmp_path)
    shutil.rmtree(tmp_path / "class/infiniband_verbs/uverbs2")
    assert glance(tmp_path) != seen
    assert set(nics_of(before)) - set(nics_of(discover(tmp_path))) == {"mlx5_2"}


def test_two_sockets(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    found = discover(tmp_path)
    nics = nics_of(found)
    assert [(nic.state, nic.speed, nic.numa) for nic in nics.values()] == [
        ("ACTIVE", 12.5e9, 0),
        ("ACTIVE", 12.5e9, 0),
        ("ACTIVE", 12.5e9, 1),
        ("DOWN", 5e9, 1),
    ]
    assert [(g.index, g.type, str(g.ip), g.netdev) for g in nics["mlx5_2"].gids[2:]] == [
        (2, "RoCE v1", "10.0.2.7", "ens2np0"),
        (3, "RoCE v2", "10.0.2.7", "ens2np0"),
    ]
    assert [found.distance(cpu, nics["mlx5_2"]) for cpu in ("cpu:0", "cpu:1", "cpu:2")] == [
        Distance.SYS,
        Distance.NODE,
        None,
    ]


def test_cloud_vm_has_one_plain_nic(tmp_path: Path) -> None:
    cloud_vm(tmp_path)
    found = discover(tmp_path)
    (nic,) = found.nics
    assert (nic.name, nic.kind, nic.state, nic.speed, nic.numa) == ("ens5", "tcp", "ACTIVE", 0.0, -1)
    assert found.distance("cuda:0", nic) == Distance.PHB
    # The only node is where everything is, said or not.
    assert found.distance("cpu:0", nic) == Distance.NODE


def test_no_nic(tmp_path: Path) -> None:
    no_nic(tmp_path)
    assert discover(tmp_path) == Topology(nodes=(Node(0, "0-15"),))


def test_nothing_at_all(tmp_path: Path) -> None:
    assert discover(tmp_path / "missing") == Topology()


def test_soft_roce_sits_where_its_interface_does(tmp_path: Path) -> None:
    soft_roce(tmp_path)
    nics = nics_of(discover(tmp_path))
    assert list(nics) == ["rxe0", "rxe1"]
    assert (nics["rxe0"].netdev, nics["rxe0"].numa, nics["rxe0"].pci) == ("roce0", -1, ())
    assert (nics["rxe1"].netdev, nics["rxe1"].numa) == ("eth1", 0)
    assert nics["rxe1"].pci == ("pci0000:00", "0000:00:04.0")


def test_each_port_of_a_card_is_a_nic(tmp_path: Path) -> None:
    Tree(tmp_path).rdma("mlx4_0", "pci0000:00/0000:00:02.0", ports=2)
    found = discover(tmp_path)
    assert [(nic.name, nic.device, nic.port) for nic in found.nics] == [
        ("mlx4_0:1", "mlx4_0", 1),
        ("mlx4_0:2", "mlx4_0", 2),
    ]


def test_a_bond_stands_for_its_parts(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    bond = tree.interface("bond0", "", megabits=50000)
    tree.write(f"{bond}/bonding/mode", "802.3ad 4")
    for name, bus in (("eth0", "01"), ("eth1", "02")):
        part = tree.interface(name, f"pci0000:00/0000:00:{bus}.0/0000:{bus}:00.0", megabits=25000)
        tree.link(f"{part}/master", bond)
    assert [(nic.name, nic.speed) for nic in discover(tmp_path).nics] == [("bond0", 6.25e9)]
    record(tmp_path / "copy", tmp_path)
    assert discover(tmp_path / "copy") == discover(tmp_path)


@pytest.mark.parametrize(
    ("gpu", "nic", "distance"),
    [
        ("a/b/c/d/gpu", "a/b/c/e/nic", Distance.PIX),  # one switch
        ("a/b/card.0", "a/b/card.1", Distance.PIX),  # one card
        ("a/b/c/d/gpu", "a/b/nic", Distance.PXB),  # a switch, and a port above it
        ("a/b/c/d/e/f/gpu", "a/b/c/g/h/i/nic", Distance.PXB),  # two switches below a third
        ("a/b/gpu", "a/c/nic", Distance.PHB),
        ("a/gpu", "a/nic", Distance.PHB),  # as virtual machines have them
        ("a/b/gpu", "z/b/nic", Distance.NODE),
        ("", "", Distance.NODE),
    ],
)
def test_distances_within_a_node(gpu: str, nic: str, distance: Distance) -> None:
    def path(text: str) -> tuple[str, ...]:
        return tuple(text.split("/")) if text else ()

    host = Topology(nodes=(Node(0), Node(1)), gpus=(Gpu(0, "gpu", 1, path(gpu)),))
    assert host.distance("cuda:0", Nic(name="n", kind="rdma", device="n", numa=1, pci=path(nic))) == distance
    if distance == Distance.NODE:
        for numa in (0, -1):
            elsewhere = Nic(name="n", kind="rdma", device="n", numa=numa, pci=path(nic))
            assert host.distance("cuda:0", elsewhere) == Distance.SYS


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recording_reads_like_its_original(shape: Shape, tmp_path: Path) -> None:
    shape(tmp_path / "sys")
    files = record(tmp_path / "copy", tmp_path / "sys")
    assert files == sum(path.is_file() and not path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    shutil.rmtree(tmp_path / "sys")
    shape(tmp_path / "again")
    assert discover(tmp_path / "copy") == discover(tmp_path / "again")


def test_a_recording_cannot_lead_out_of_itself(tmp_path: Path) -> None:
    two_sockets(tmp_path / "host")
    inside = tmp_path / "recorded"
    no_nic(inside)
    (inside / "class/infiniband").mkdir()
    (inside / "class/infiniband/mlx5_0").symlink_to(tmp_path / "host/class/infiniband/mlx5_0")
    assert discover(inside).nics == ()


@pytest.fixture(scope="module")
def hostile() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp())
    soft_roce(root)
    yield root
    shutil.rmtree(root)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_reading_never_fails(hostile: Path, data: st.DataObject) -> None:
    files = sorted(path for path in hostile.rglob("*") if path.is_file() and not path.is_symlink())
    file = data.draw(st.sampled_from(files))
    was = file.read_bytes()
    try:
        file.write_bytes(
            data.draw(
                st.one_of(
                    st.binary(max_size=60), st.sampled_from([b"\xc2\xb2", b"-1", b"4: ", b"a\0b", b"x" * 300])
                )
            )
        )
        found = discover(hostile)
        assert {nic.device for nic in found.nics} >= {"rxe0", "rxe1"}
        assert all(str(gid.ip) for nic in found.nics for gid in nic.gids)
    finally:
        file.write_bytes(was)


class NvmlError(Exception):
    pass


def test_nvml_numbers_and_names_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may use one GPU of the four that sysfs shows: it is number 0 there."""
    fake = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetPciInfo=lambda handle: SimpleNamespace(busId=b"00000000:9A:00.0"),
        nvmlDeviceGetName=lambda handle: "NVIDIA H100 80GB HBM3",
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    seen = tuple(Gpu(n, f"0000:{bus}:00.0", 1, ("pci",)) for n, bus in enumerate(("18", "3a", "9a", "ba")))
    refined = refine(Topology(gpus=seen))
    assert refined.gpus == (Gpu(0, "0000:9a:00.0", 1, ("pci",), "NVIDIA H100 80GB HBM3"),)
    assert refined.notes == ()


def test_without_nvml_sysfs_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    seen = Topology(gpus=(Gpu(0, "0000:18:00.0"),))
    refined = refine(seen)
    assert refined.gpus == seen.gpus
    assert "install nvidia-ml-py" in refined.notes[0]
    assert refine(Topology()) == Topology()

    def broken() -> None:
        raise NvmlError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NvmlError, nvmlInit=broken))
    assert refine(seen).gpus == seen.gpus
    assert refine(seen).notes == ("NVML does not work: Driver Not Loaded",)


def test_verbs_says_which_device_it_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    seen = Topology(nics=tuple(Nic(name=name, kind="rdma", device=name) for name in ("mlx5_0", "mlx5_1")))
    monkeypatch.setitem(sys.modules, "pyverbs.device", None)
    assert "mooncake-connector[rdma]" in refine(seen).notes[0]
    shown = SimpleNamespace(get_device_list=lambda: [SimpleNamespace(name=b"mlx5_0")])
    monkeypatch.setitem(sys.modules, "pyverbs.device", shown)
    (note,) = refine(seen).notes
    assert "does not show mlx5_1" in note

    def nothing() -> None:
        raise RuntimeError("Failed to get devices list")

    monkeypatch.setitem(sys.modules, "pyverbs.device", SimpleNamespace(get_device_list=nothing))
    assert "Failed to get devices list" in refine(seen).notes[0]
