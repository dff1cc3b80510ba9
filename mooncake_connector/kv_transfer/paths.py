"""Which transports a link between two processes may use."""

import logging
from collections.abc import Sequence

from mooncake_connector.config import TransferConfig

logger = logging.getLogger(__name__)


def choose_paths(
    config: TransferConfig,
    ours: Sequence[str],
    theirs: Sequence[str],
    unreadable: str | None,
    *,
    elsewhere: bool = False,
) -> tuple[tuple[str, ...], str]:
    """(transports, the preferred first; why) for a link from an initiator to us.

    Args:
        config: of the target, whose memory it is.
        ours: what this process has, the preferred first.
        theirs: what the initiator has.
        unreadable: why its memory can't be read from here, if it can't.
        elsewhere: the initiator runs on another host or in another pid namespace.
    """
    lacks = {}
    for path in config.paths:
        if path == "process_vm" and unreadable:
            lacks[path] = unreadable
        elif path == "cuda_ipc" and elsewhere:
            lacks[path] = "cuda_ipc: the peer runs on another host or in another pid namespace"
        elif path not in ours:
            lacks[path] = f"{path}: not available here"
        elif path not in theirs:
            lacks[path] = f"{path}: not available at the peer"
    paths = tuple(path for path in config.paths if path not in lacks)
    of_interest = {*ours, *theirs} if config.path == "auto" else set(lacks)
    why = "; ".join(reason for path, reason in lacks.items() if path in of_interest)
    if config.path != "auto":
        for reason in lacks.values():
            logger.warning("path=%s can't be had as set: %s", config.path, reason)
        why = why or f"path={config.path}"
    if not paths:
        return ("tcp",), why
    return paths, why or "every way is open"
