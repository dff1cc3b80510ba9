"""The matrix: near and fast NICs first, all of them exactly once, and what a user says wins."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.topology import (
    Choice,
    Gpu,
    Matrix,
    Nic,
    NicRules,
    Node,
    Topology,
    differences,
    discover,
)
from tests.unit.sysfs_trees import DGX_COMPUTE, cloud_vm, dgx_h100, no_nic, two_sockets


def rdma(name: str, gbits: float, numa: int, pci: str = "", **more: Any) -> Nic:
    values = {"state": "ACTIVE", "kind": "rdma", "device": name} | more
    return Nic(name=name, speed=gbits * 125e6, numa=numa, pci=tuple(pci.split("/")) if pci else (), **values)


@pytest.fixture(scope="module")
def dgx(tmp_path_factory: pytest.TempPathFactory) -> Topology:
    root = tmp_path_factory.mktemp("dgx")
    dgx_h100(root)
    return discover(root)


def test_dgx_gpus_prefer_the_nic_beside_them(dgx: Topology) -> None:
    matrix = Matrix.of(dgx)
    assert list(matrix.choices) == [*(f"cpu:{n}" for n in range(2)), *(f"cuda:{n}" for n in range(8)), "*"]
    for gpu, nic in enumerate(DGX_COMPUTE):
        assert matrix.choice(f"cuda:{gpu}").preferred == (nic,)
    assert matrix.choice("cuda:0").secondary[:4] == (*DGX_COMPUTE[1:4], "mlx5_1")
    # mlx5_1 and mlx5_7 are half as fast: for host memory still worth using, after the others.
    assert matrix.choice("cpu:0").preferred == (*DGX_COMPUTE[:4], "mlx5_1")
    assert matrix.choice("cpu:1").secondary == (*DGX_COMPUTE[:4], "mlx5_1")
    penalties = [matrix.penalty("cuda:4", nic) for nic in ("mlx5_6", "mlx5_9", "mlx5_7", "mlx5_0")]
    assert penalties == [1, 2, 2, 4]
    assert matrix.penalty("cpu:0", "mlx5_6") == 2
    assert matrix.penalty("cpu:0", "eno3") == math.inf


def test_a_nic_that_is_down_is_left_out(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    matrix = Matrix.of(discover(tmp_path))
    assert matrix.choice("cpu:0") == Choice(("mlx5_0", "mlx5_1"), ("mlx5_2",))
    assert matrix.choice("cpu:1") == Choice(("mlx5_2",), ("mlx5_0", "mlx5_1"))
    assert matrix.penalty("cpu:1", "mlx5_3") == math.inf


def test_plain_nics_count_where_there_is_no_rdma(tmp_path: Path, dgx: Topology) -> None:
    cloud_vm(tmp_path / "vm")
    matrix = Matrix.of(discover(tmp_path / "vm"))
    assert matrix.choices == dict.fromkeys(("cpu:0", "cuda:0", "*"), Choice(("ens5",)))
    assert Matrix.of(dgx, kind="tcp").choice("cpu:1") == Choice(("eno3",))


def test_no_nic_no_choice(tmp_path: Path) -> None:
    no_nic(tmp_path)
    matrix = Matrix.of(discover(tmp_path))
    assert matrix.choices == {"cpu:0": Choice(), "*": Choice()}
    assert matrix.penalty("cpu:0", "eth0") == math.inf


def test_a_slow_nic_is_not_preferred_for_being_near() -> None:
    host = Topology(
        nodes=(Node(0), Node(1)),
        nics=(rdma("management", 25, 0), rdma("fast", 400, 1), rdma("spare", 100, 1)),
    )
    matrix = Matrix.of(host)
    assert matrix.choice("cpu:0") == Choice(("fast",), ("spare", "management"))
    assert matrix.choice("cpu:1") == Choice(("fast",), ("spare", "management"))
    assert matrix.penalty("cpu:0", "management") == 1
    assert matrix.penalty("cpu:1", "spare") == 1
    assert matrix.penalty("cpu:1", "management") == 2


def test_a_narrow_slot_makes_a_nic_slow() -> None:
    host = Topology(nics=(rdma("narrow", 400, 0, pcie=8e9), rdma("wide", 400, 0, pcie=63e9)))
    assert Matrix.of(host).choice("cpu:0") == Choice(("wide",), ("narrow",))


def test_locations_that_are_not_there_get_any_nic(dgx: Topology) -> None:
    matrix = Matrix.of(dgx)
    assert set(matrix.choice("cuda:17").preferred) == {*DGX_COMPUTE, "mlx5_1", "mlx5_7"}
    assert matrix.penalty("cuda:17", "mlx5_9") == 1


def test_lists_and_patterns(dgx: Topology) -> None:
    rules = NicRules.of(allow=["mlx5_1*"], deny=["mlx5_10"])
    rules.check(dgx)
    assert Matrix.of(dgx, rules).choice("cpu:1") == Choice(("mlx5_11",), ("mlx5_1",))


def test_a_port_is_named_by_its_card_as_well() -> None:
    ports = tuple(rdma(f"mlx4_0:{n}", 40, 0, device="mlx4_0", port=n) for n in (1, 2))
    host = Topology(nics=ports)
    for allow, names in ((["mlx4_0"], ("mlx4_0:1", "mlx4_0:2")), (["mlx4_0:2"], ("mlx4_0:2",))):
        NicRules.of(allow).check(host)
        assert Matrix.of(host, NicRules.of(allow)).choice("cpu:0").preferred == names


def test_override_wins_and_follows_what_is_up(tmp_path: Path, dgx: Topology) -> None:
    file = tmp_path / "matrix.json"
    file.write_text(json.dumps({"cuda:0": [["mlx5_1"], ["mlx5_7"]], "cuda:20": [[], ["mlx5_0"]]}))
    for source in (file, str(file), json.loads(file.read_text())):
        rules = NicRules.of(override=source)
        rules.check(dgx)
        matrix = Matrix.of(dgx, rules)
        assert matrix.choice("cuda:0") == Choice(("mlx5_1",), ("mlx5_7",))
        assert matrix.choice("cuda:20") == Choice((), ("mlx5_0",))
        assert [matrix.penalty("cuda:0", nic) for nic in ("mlx5_1", "mlx5_7", "mlx5_0")] == [1, 2, math.inf]
        assert matrix.choice("cuda:1") == Matrix.of(dgx).choice("cuda:1")
    down = [msgspec.structs.replace(nic, state="DOWN") if nic.name == "mlx5_1" else nic for nic in dgx.nics]
    now = msgspec.structs.replace(dgx, nics=tuple(down))
    assert Matrix.of(now, rules).choice("cuda:0") == Choice((), ("mlx5_7",))
    gone = msgspec.structs.replace(dgx, nics=())
    assert Matrix.of(gone, rules).choice("cuda:0") == Choice()


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"allow": ["mlx5_77"]}, "allow list names 'mlx5_77'.*mlx5_0, mlx5_1"),
        ({"deny": ["mlx9"]}, "deny list names 'mlx9'"),
        ({"allow": ["efa*"]}, r"allow list efa\* matches none"),
        ({"allow": ["eno3"]}, "names 'eno3'"),
        ({"override": {"cpu:0": [["mlx5_77"], []]}}, "names 'mlx5_77' for cpu:0"),
        ({"override": {"cpu:0": [["mlx5_0"], []]}, "deny": ["mlx5_0"]}, "allow or deny list"),
        ({"override": {"cpu:0": ["mlx5_0"]}}, r"Expected `array`.*expected is \{\"cpu:0\""),
        ({"override": {"cpu:0": [["mlx5_0"]]}}, "length 2"),
        ({"override": {"cpu:0": [["mlx5_0"], ["mlx5_0"]]}}, "'mlx5_0' twice"),
        ({"override": {"gpu0": [["mlx5_0"], []]}}, "location 'gpu0' must be cpu:N"),
        ({"override": "no/such/file.json"}, "no/such/file.json can't be read: No such file"),
    ],
)
def test_bad_rules_name_themselves(dgx: Topology, rules: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        NicRules.of(**rules).check(dgx)


def test_malformed_json_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "matrix.json"
    file.write_text('{"cpu:0": [["mlx5_0"], ')
    with pytest.raises(ConfigError, match=r"matrix\.json: Input data was truncated"):
        NicRules.of(override=file)


BRIDGES = ("", "a/x", "a/b/x", "a/b/c/d/x", "a/b/c/e/y", "a/f/y", "z/b/y")
hosts = st.builds(
    lambda nodes, gpus, nics: Topology(
        nodes=tuple(map(Node, range(nodes))),
        gpus=tuple(
            Gpu(n, str(n), numa, tuple(path.split("/")) if path else ())
            for n, (numa, path) in enumerate(gpus)
        ),
        nics=tuple(
            rdma(f"mlx5_{n}", gbits, numa, path, state=state)
            for n, (gbits, numa, path, state) in enumerate(nics)
        ),
    ),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(-1, 2), st.sampled_from(BRIDGES)), max_size=4),
    st.lists(
        st.tuples(
            st.sampled_from((0, 10, 100, 200, 400)),
            st.integers(-1, 2),
            st.sampled_from(BRIDGES),
            st.sampled_from(("ACTIVE", "ACTIVE", "DOWN")),
        ),
        max_size=6,
    ),
)
names = st.sampled_from([f"mlx5_{n}" for n in range(6)])


@given(hosts, st.frozensets(names), st.frozensets(names, max_size=2))
def test_every_active_allowed_nic_is_there_once(
    host: Topology, allow: frozenset[str], deny: frozenset[str]
) -> None:
    matrix = Matrix.of(host, NicRules.of(allow, deny))
    wanted = {nic.name for nic in host.nics if nic.active and (not allow or nic.name in allow)} - deny
    for location in (*host.locations, "cuda:99"):
        choice = matrix.choice(location)
        assert sorted(choice.names) == sorted(wanted)
        assert bool(choice.preferred) == bool(wanted)
        assert all(matrix.penalty(location, name) == 1 for name in choice.preferred)
        assert all(1 <= matrix.penalty(location, name) <= 4 for name in choice.names)
        assert all(
            matrix.penalty(location, nic.name) == math.inf for nic in host.nics if nic.name not in wanted
        )


@given(
    hosts, st.dictionaries(st.sampled_from(("cpu:0", "cuda:1", "*")), st.permutations(range(6)), max_size=3)
)
def test_override_wins(host: Topology, override: dict[str, list[int]]) -> None:
    given = {at: [[f"mlx5_{n}" for n in part] for part in (o[:2], o[2:4])] for at, o in override.items()}
    active = {nic.name for nic in host.nics if nic.active}
    matrix, computed = Matrix.of(host, NicRules.of(override=given)), Matrix.of(host)
    for location, (preferred, secondary) in given.items():
        kept = Choice(*(tuple(n for n in part if n in active) for part in (preferred, secondary)))
        assert matrix.choice(location) == kept
    for location in set(host.locations) - set(given):
        assert matrix.choice(location) == computed.choice(location)


@given(hosts)
def test_a_printed_matrix_is_an_override(host: Topology) -> None:
    matrix = Matrix.of(host)
    again = Matrix.of(host, NicRules.of(override=msgspec.json.decode(msgspec.json.encode(matrix.choices))))
    assert again.choices == matrix.choices


@given(hosts, hosts)
def test_differences_lead_from_one_moment_to_the_next(old: Topology, new: Topology) -> None:
    replayed = {nic.name: nic for nic in old.nics}
    for change in differences(old.nics, new.nics):
        assert change.nic != replayed.get(change.nic.name) or change.kind == "removed"
        if change.kind == "removed":
            del replayed[change.nic.name]
            continue
        assert (change.kind == "added") == (change.nic.name not in replayed)
        if change.kind in ("up", "down"):
            assert (change.kind == "up") == change.nic.active != replayed[change.nic.name].active
        replayed[change.nic.name] = change.nic
    assert replayed == {nic.name: nic for nic in new.nics}
