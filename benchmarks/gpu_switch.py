"""Other settings for a connector that is running, so that many are compared on one engine, in turns.

The worker's half is for vLLM's ``--worker-extension-cls``; the other asks it over the server's
``/collective_rpc`` (VLLM_SERVER_DEV_MODE=1). It reaches into the connector, as no user should.
"""

import argparse
import functools
import json
import weakref
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from mooncake_connector.kv_transfer.transport.cuda import kernel
from mooncake_connector.kv_transfer.transport.cuda.driver import Stream
from mooncake_connector.kv_transfer.transport.cuda.rail import CopyPolicy

CONNECTOR = ("cuda_copy", "cuda_sms", "push_bytes")
"""Settings of the connector that can be switched."""
KERNEL = {"priority": "high", "threads": 1024}
"""What else can be: the priority of the rail's stream (``high``, ``low``), and the kernel's block."""


def label(settings: Mapping[str, Any]) -> str:
    """How settings are called in results."""
    return " ".join(f"{name}={value}" for name, value in settings.items()) or "as it comes"


def parse(text: str) -> list[dict[str, Any]]:
    """A JSON list of settings.

    Raises:
        argparse.ArgumentTypeError: it is none, or names something that can't be switched.
    """
    try:
        settings = json.loads(text)
    except ValueError as malformed:
        raise argparse.ArgumentTypeError(f"no JSON: {malformed}") from malformed
    known = {*CONNECTOR, *KERNEL}
    if not isinstance(settings, list) or not all(isinstance(each, dict) for each in settings):
        raise argparse.ArgumentTypeError("a list of objects is expected")
    if unknown := {name for each in settings for name in each} - known:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}"
        )
    return settings


async def switch(session: aiohttp.ClientSession, url: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """Have an engine's connector use `settings`, and what it came with for all else.

    Returns:
        How many rails and prefill sides were switched.

    Raises:
        RuntimeError: the engine refused.
    """
    asked = {"method": "switch_connector", "args": [json.dumps(settings)]}
    async with session.post(f"{url}/collective_rpc", json=asked) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url} can't switch to {settings}: {(await answer.text())[:300]}")
        results = (await answer.json())["results"]
    return {name: sum(each[name] for each in results) for name in results[0]}


class Kept:
    """The live objects of some classes, with what they had as ``_config`` or ``_policy`` when first asked."""

    def __init__(self, *kinds: type) -> None:
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._first: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        for kind in kinds:
            self._watch(kind)

    def _watch(self, kind: Any) -> None:
        made = kind.__init__

        @functools.wraps(made)
        def remembered(this: Any, *args: Any, **kwargs: Any) -> None:
            made(this, *args, **kwargs)
            self._alive.add(this)

        kind.__init__ = remembered

    def having(self, name: str) -> list[Any]:
        """Those that have such an attribute."""
        return [each for each in self._alive if hasattr(each, name)]

    def first(self, one: Any, name: str) -> Any:
        return self._first.setdefault(one, getattr(one, name))


def use(kept: Kept, settings: Mapping[str, Any]) -> dict[str, int]:
    """Switch all of this process; nothing may be under way. See `switch`."""
    own = {name: value for name, value in settings.items() if name in CONNECTOR}
    other = KERNEL | {name: value for name, value in settings.items() if name in KERNEL}
    kernel.THREADS = other["threads"]
    ends = kept.having("_config")
    for end in ends:
        end._config = msgspec.structs.replace(kept.first(end, "_config"), **own)
    rails = [rail for rail in kept.having("_policy") if rail._down is None]
    for rail in rails:
        first: CopyPolicy = kept.first(rail, "_policy")
        rail._policy = CopyPolicy(own.get("cuda_copy", first.copy), own.get("cuda_sms", first.blocks))
        with rail._lock:
            rail._stream.synchronize()
            streams = rail.__dict__.setdefault("_switched", {"high": rail._stream})
            if other["priority"] not in streams:
                streams[other["priority"]] = Stream(rail._context, urgent=False)
            rail._stream = streams[other["priority"]]
    return {"rails": len(rails), "ends": len(ends)}
