"""The RDMA devices that this machine has, and taking them down."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

DEVICES = Path("/sys/class/infiniband")
IN_GUEST = Path("/run/rdma-guest").is_dir()
guest_only = pytest.mark.skipif(
    not IN_GUEST, reason="takes NICs down: in the guest only (scripts/rdma/guest.sh)"
)


@dataclass(frozen=True)
class Nic:
    """An RDMA device's first port.

    Attributes:
        device: what verbs call it, such as ``rxe0``.
        netdev: its network interface, such as ``roce0``; empty if it has none.
    """

    device: str
    netdev: str

    def active(self) -> bool:
        """Whether the port can carry anything now."""
        return "ACTIVE" in (DEVICES / self.device / "ports/1/state").read_text()


def active_nics() -> list[Nic]:
    """Those that are up; in the guest ``rxe0`` and ``rxe1``, joined by a switch."""
    nics = [Nic(device.name, _netdev(device)) for device in sorted(DEVICES.glob("*"))]
    return [nic for nic in nics if nic.active()]


def _netdev(device: Path) -> str:
    for entry in sorted((device / "ports/1/gid_attrs/ndevs").glob("*")):
        try:
            return entry.read_text().strip()
        except OSError:  # no GID of that number
            continue
    return ""


def lack() -> str | None:
    """Why verbs can't be tested on this machine; None if they can."""
    if not active_nics():
        return "no RDMA device with an active port"
    try:
        import pyverbs.device  # noqa: F401
    except ImportError as error:
        return f"no pyverbs ({error})"
    return None


class Cables:
    """Takes NICs down and up again, as ``ip link set`` does."""

    def __init__(self) -> None:
        self._pulled: list[Nic] = []

    def pull(self, nic: Nic) -> None:
        """Take a NIC down; returns once its port is."""
        self._pulled.append(nic)
        _set(nic, "down")

    def plug(self, nic: Nic) -> None:
        """Bring a NIC up; returns once its port is active."""
        _set(nic, "up")
        self._pulled.remove(nic)

    def plug_all(self) -> None:
        """Bring up what is still down."""
        for nic in list(self._pulled):
            self.plug(nic)


def _set(nic: Nic, state: str) -> None:
    subprocess.run(["ip", "link", "set", nic.netdev, state], check=True)
    end = time.monotonic() + 10
    while nic.active() != (state == "up"):
        assert time.monotonic() < end, f"{nic.device} does not notice that {nic.netdev} is {state}"
        time.sleep(0.01)
