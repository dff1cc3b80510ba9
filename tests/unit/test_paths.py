"""Which ways two processes take, and what is said about those they don't."""

import pytest

from mooncake_connector.config import TransferConfig
from mooncake_connector.kv_transfer.paths import choose_paths

ALL = ("process_vm", "rdma", "tcp")
STREAMS = ("process_vm", "tcp")


@pytest.mark.parametrize(
    ("path", "ours", "theirs", "unreadable", "chosen", "says"),
    [
        ("auto", ALL, ALL, None, ALL, "every way is open"),
        ("auto", ALL, ALL, "another host", ("rdma", "tcp"), "another host"),
        ("auto", ALL, STREAMS, "another host", ("tcp",), "rdma: not available at the peer"),
        ("auto", STREAMS, ALL, None, STREAMS, "rdma: not available here"),
        ("tcp,rdma", ALL, ALL, None, ("tcp", "rdma"), "path=tcp,rdma"),
        ("rdma", ALL, ALL, None, ("rdma",), "path=rdma"),
        ("rdma", ALL, STREAMS, None, ("tcp",), "rdma: not available at the peer"),
        ("process_vm", ALL, ALL, "another host", ("tcp",), "another host"),
    ],
)
def test_ways(
    path: str,
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    unreadable: str | None,
    chosen: tuple[str, ...],
    says: str,
) -> None:
    paths, why = choose_paths(TransferConfig(path=path), ours, theirs, unreadable)
    assert paths == chosen
    assert says in why


def test_what_was_set_and_can_not_be_had_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    choose_paths(TransferConfig(path="rdma,tcp"), STREAMS, ALL, None)
    assert "path=rdma,tcp can't be had as set: rdma: not available here" in caplog.text
    caplog.clear()
    choose_paths(TransferConfig(), STREAMS, ALL, "another host")
    assert not caplog.text
