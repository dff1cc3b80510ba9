"""Which transports a link between two processes may use."""

import logging
from collections.abc import Sequence

from mooncake_connector.config import TransferConfig

logger = logging.getLogger(__name__)


def choose_paths(
    config: TransferConfig, ours: Sequence[str], theirs: Sequence[str], unreadable: str | None
) -> tuple[tuple[str, ...], str]:
    """(transports, the preferred first; why) for a link from an initiator to us.

    Args:
        config: of the target, whose memory it is.
        ours: what this process has, the preferred first.
        theirs: what the initiator has.
        unreadable: why its memory can't be read from here, if it can't.
    """
    lacks = {}
    for path in config.paths:
        if path == "process_vm" and unreadable:
            lacks[path] = unreadable
        elif path not in ours:
            lacks[path] = f"{path}: not available here"
        elif path not in theirs:
            lacks[path] = f"{path}: not available at the peer"
    paths = tuple(path for path in config.paths if path not in lacks)
    why = "; ".join(lacks.values())
    if config.path != "auto":
        for reason in lacks.values():
            logger.warning("path=%s can't be had as set: %s", config.path, reason)
        why = why or f"path={config.path}"
    if not paths:
        return ("tcp",), why
    return paths, why or "every way is open"
