"""Which of a port's addresses a queue pair uses. Pure."""

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.topology.model import Gid, Nic


def choose_gid(nic: Nic, wanted: int | None = None) -> Gid:
    """The GID to connect with.

    On Ethernet only RoCE v2 will do (v1 does not leave its subnet): of IPv4 first, then of a routable IPv6
    address, then link-local; the interface of the port itself before its VLANs, then the lowest index. On
    InfiniBand the lowest index.

    Args:
        nic: an RDMA port.
        wanted: the setting ``rdma_gid_index``; None chooses.

    Raises:
        ConfigError: The wanted index does not exist or is no RoCE v2, or the port has nothing that would do.
    """
    usable = [gid for gid in nic.gids if nic.link_layer != "Ethernet" or gid.type == "RoCE v2"]
    if wanted is not None:
        for gid in usable:
            if gid.index == wanted:
                return gid
        found = next((f"is {gid.type}" for gid in nic.gids if gid.index == wanted), "does not exist")
        raise ConfigError(
            f"rdma_gid_index={wanted}: on {nic.name} that index {found}; usable there: {_list(usable)}. "
            "Take one of these, or leave the setting out to have one chosen"
        )
    if not usable:
        raise ConfigError(
            f"{nic.name} has no RoCE v2 address (it has: {_list(nic.gids)}): give its interface "
            f"{nic.netdev or '(none found)'} an IP address and bring it up, or take the NIC off the list"
        )
    return min(usable, key=lambda gid: _rank(nic, gid))


def _rank(nic: Nic, gid: Gid) -> tuple[int, bool, int]:
    if nic.link_layer != "Ethernet":
        return 0, False, gid.index
    family = 2 if gid.ip.is_link_local and gid.ip.version == 6 else 0 if gid.ip.version == 4 else 1
    return family, gid.netdev != nic.netdev, gid.index


def _list(gids: tuple[Gid, ...] | list[Gid]) -> str:
    return ", ".join(f"{gid.index} ({gid.type} {gid.ip})" for gid in gids) or "none"
