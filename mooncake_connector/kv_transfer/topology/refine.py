"""What NVML and verbs add to sysfs, where they are installed."""

import importlib
from typing import Any

import msgspec

from mooncake_connector.kv_transfer.topology.model import Gpu, Topology


def refine(topology: Topology) -> Topology:
    """GPUs as NVML sees them (a container may hide some), and notes on RDMA devices that verbs can't open."""
    gpus, notes = _by_nvml(topology.gpus)
    if any(nic.kind == "rdma" for nic in topology.nics):
        notes += _by_verbs({nic.device for nic in topology.nics if nic.kind == "rdma"})
    return msgspec.structs.replace(topology, gpus=gpus, notes=tuple(notes))


def _by_nvml(known: tuple[Gpu, ...]) -> tuple[tuple[Gpu, ...], list[str]]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        missing = "GPUs are numbered in PCI order, hidden ones counted: install nvidia-ml-py to have NVML's"
        return known, [missing] if known else []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return known, [f"NVML does not work: {error}"] if known else []
    try:
        by_address = {gpu.address: gpu for gpu in known}
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            address = _sysfs_address(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
            gpu = by_address.get(address, Gpu(index, address))
            name = _text(nvml.nvmlDeviceGetName(handle))
            found.append(msgspec.structs.replace(gpu, index=index, name=name))
        return tuple(found), []
    except nvml.NVMLError as error:
        return known, [f"NVML does not work: {error}"]
    finally:
        nvml.nvmlShutdown()


def _by_verbs(devices: set[str]) -> list[str]:
    try:
        verbs: Any = importlib.import_module("pyverbs.device")
        visible = {_text(device.name) for device in verbs.get_device_list()}
    except ImportError as error:
        return [
            f"rdma can't be used: pyverbs does not load ({error}): pip install 'mooncake-connector[rdma]'"
        ]
    except Exception as error:
        # pyverbs' own exceptions, which differ between versions.
        return [f"rdma can't be used: {error}: load the driver, and give a container /dev/infiniband"]
    return [
        f"verbs does not show {name}: install its rdma-core provider, or give the container /dev/infiniband"
        for name in sorted(devices - visible)
    ]


def _sysfs_address(bus_id: str) -> str:
    """NVML writes eight digits for the domain, in capitals; sysfs four."""
    domain, rest = bus_id.lower().split(":", 1)
    return f"{int(domain, 16):04x}:{rest}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
