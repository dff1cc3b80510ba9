"""What of tcp's insides gpu.py can give other values, and which it tries with ``--sweep``."""

from functools import partial
from typing import Any

MIB = 1 << 20

SWEEP: tuple[dict[str, float], ...] = (
    {},
    {"connections": 4},
    {"UNLOAD_BYTES": 8 * MIB},
    {"connections": 4, "UNLOAD_BYTES": 8 * MIB},
    {"slice_time_s": 1e-3},
    {"max_bytes": 32 * MIB, "slice_time_s": 16e-3},
    *({"connections": n} for n in (1, 3, 6, 8)),
    *({"UNLOAD_BYTES": n * MIB} for n in (1, 4)),
    *({"KERNEL_BLOCKS": n} for n in (2, 8, 16)),
    {"KERNEL_RANGES": 1 << 20},
    {"LOADS": 3},
    {"LOAD_BYTES": 4 * MIB},
    {"SEND_BUFFER_BYTES": 0, "RECEIVE_BUFFER_BYTES": 0},
    {"SEND_BUFFER_BYTES": MIB, "RECEIVE_BUFFER_BYTES": MIB},
    {"UNLOADS": 2},
    {"UNLOADS": 5},
    {"slice_time_s": 2e-3},
    {"max_bytes": 16 * MIB, "slice_time_s": 8e-3},
)
"""Of tcp with GPU memory; what tells most comes first. Names in capitals are constants of its code, others of
`SlicePolicy`. Sockets' buffers: 0 leaves them to the system. With so many KERNEL_RANGES all go by copy
engines."""

SLICING = ("slice_time_s", "max_bytes")
"""Of `SlicePolicy`."""

_TUNED: dict[tuple[Any, str], Any] = {}


def tuned(name: str) -> bool:
    """Whether `tune` takes this setting."""
    return name.isupper() or name in SLICING


def tune(settings: dict[str, Any]) -> None:
    """Give constants of the transports (names in capitals) other values, and all others their own again.

    Links that are made from now on cut their slices by what is named of `SLICING`.

    Raises:
        ValueError: There is no such constant.
    """
    from mooncake_connector.kv_transfer import dispatcher
    from mooncake_connector.kv_transfer.slicing import SlicePolicy
    from mooncake_connector.kv_transfer.transport import lane, receiver, staging, stream

    for (module, name), value in _TUNED.items():
        setattr(module, name, value)
    _TUNED.setdefault((dispatcher, "SlicePolicy"), SlicePolicy)
    cut = {name: value for name, value in settings.items() if name in SLICING}
    if cut:
        dispatcher.SlicePolicy = partial(SlicePolicy, **cut)  # type: ignore[assignment,misc]
    for name, value in settings.items():
        places = [module for module in (lane, receiver, staging, stream) if hasattr(module, name)]
        if name.isupper() and not places:
            raise ValueError(f"no transport has a constant {name}")
        for module in places:
            _TUNED.setdefault((module, name), getattr(module, name))
            setattr(module, name, value)
