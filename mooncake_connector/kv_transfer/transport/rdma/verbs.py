"""pyverbs 44 to 59 under one face, and the reasons why there may be no RDMA here.

Everything is reached as an attribute of this module (``verbs.QP``), so that importing it needs no pyverbs.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

SYSFS_DEVICES = Path("/sys/class/infiniband")

_import_error: ImportError | None = None
try:
    from pyverbs.addr import GID, AHAttr, GlobalRoute
    from pyverbs.cq import CQ, CompChannel
    from pyverbs.device import Context, get_device_list
    from pyverbs.mr import MR, DmaBufMR
    from pyverbs.pd import PD
    from pyverbs.pyverbs_error import PyverbsError
    from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
    from pyverbs.wr import SGE, RecvWR, SendWR

    try:
        import pyverbs.enums as _enums
    except ModuleNotFoundError:
        import pyverbs.libibverbs_enums as _enums
except ImportError as missing:
    _import_error = missing

    class PyverbsError(Exception):  # type: ignore[no-redef]
        """For ``except`` clauses."""


__all__ = [
    "CQ",
    "GID",
    "MR",
    "PD",
    "QP",
    "SGE",
    "AHAttr",
    "CompChannel",
    "Context",
    "DmaBufMR",
    "GlobalRoute",
    "PyverbsError",
    "QPAttr",
    "QPCap",
    "QPInitAttr",
    "RecvWR",
    "SendWR",
    "device_names",
    "e",
    "event_fd",
    "unavailable",
]

T = TypeVar("T")
_making = threading.Lock()


def _flat(enums: ModuleType) -> SimpleNamespace:
    """``IBV_*`` -> int, from flat names (44) or from one Python enum for each C enum (59)."""
    names = {k: int(v) for k, v in vars(enums).items() if k.startswith("IBV_") and isinstance(v, int)}
    for value in vars(enums).values():
        for name, member in getattr(value, "__members__", {}).items():
            names.setdefault(name, int(member))
    return SimpleNamespace(**names)


e: Any = SimpleNamespace() if _import_error else _flat(_enums)
"""The enums of verbs, each ``IBV_*`` an int."""


def device_names() -> list[str]:
    """Names of the devices that libibverbs can open."""
    try:
        return sorted(device.name.decode() for device in get_device_list())
    except PyverbsError:  # what 44 says of an empty list
        return []


def unavailable() -> str | None:
    """None if there is some RDMA device, be its ports up or not; else why there is none, with the mend."""
    if (reason := import_problem(_import_error)) is not None:
        return reason
    return None if device_names() else no_device_problem(sorted(p.name for p in SYSFS_DEVICES.glob("*")))


def import_problem(error: ImportError | None) -> str | None:
    """What a failed import of pyverbs means, with the mend; None if it did not fail."""
    if error is None:
        return None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "pyverbs":
        return (
            "rdma: pyverbs is not installed (mend: the distribution's python3-pyverbs on PYTHONPATH, "
            "or pip install 'mooncake-connector[rdma]')"
        )
    return (
        f"rdma: pyverbs and libibverbs don't fit together: {error} (mend: pyverbs of the version that "
        "rdma-core has here, such as the distribution's python3-pyverbs)"
    )


def no_device_problem(in_kernel: list[str]) -> str:
    """Why libibverbs finds no device, given the names that the kernel lists."""
    if in_kernel:
        return (
            f"rdma: the kernel has {', '.join(in_kernel)}, but libibverbs can't open any (mend: install "
            "ibverbs-providers; in a container also --device=/dev/infiniband)"
        )
    return "rdma: this host has no RDMA device (mend: none needed; tcp and process_vm work without)"


def event_fd(make: Callable[[], T]) -> tuple[T, int | None]:
    """What `make` makes, and the descriptor of the event channel that this opened.

    pyverbs 44 does not show a completion channel's, no version shows a context's: it is then the one that
    appeared. None if that can't be told, as another library made one at the same moment.
    """
    with _making:
        before = _event_fds()
        made = make()
        new = _event_fds() - before
    fd: int | None = getattr(made, "fd", None)
    if fd is None:
        if len(new) != 1:
            return made, None
        fd = new.pop()
    # Reading an event holds the GIL, so it must never wait.
    os.set_blocking(fd, False)
    return made, fd


def _event_fds() -> set[int]:
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            if os.readlink(entry.path) == "anon_inode:[infinibandevent]":  # noqa: PTH115 - of thousands
                found.add(int(entry.name))
        except OSError:
            continue  # it was the listing's own
    return found
