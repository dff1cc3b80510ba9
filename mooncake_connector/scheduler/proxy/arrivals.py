"""A client's request as the policy sees it: length, keys, who asks, how urgent it is, what is promised."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from multidict import CIMultiDict

from mooncake_connector.scheduler.policy.base import Arrival, Slo
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from mooncake_connector.scheduler.prompts.conversation import conversation_key, salt
from mooncake_connector.scheduler.prompts.tokens import Tokens
from mooncake_connector.scheduler.proxy.keys import Caller
from mooncake_connector.scheduler.proxy.openai import BadRequest, ClientRequest
from mooncake_connector.scheduler.proxy.progress import MOST_TOKENS
from mooncake_connector.scheduler.proxy.settings import ServiceClass

PRIORITY = "x-priority"
PRIORITIES = range(-1000, 1001)
NO_IDS: npt.NDArray[np.uint32] = np.empty(0, np.uint32)


class Asked(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        request: as it came.
        headers: for the engines.
        arrival: for the conductor; its `id`, `alone` and `avoid` are an attempt's.
        ids: the prompt's token ids; none if the proxy can't tell them.
        avoid: engines that can't serve it.
    """

    request: ClientRequest
    headers: Mapping[str, str]
    arrival: Arrival
    ids: npt.NDArray[np.uint32]
    avoid: frozenset[str] = frozenset()


class Arrivals:
    """Describes requests.

    Args:
        index: whose keys are to be used.
        tokens: the tokenizer.
        promise: the SLO of a model and a class's name, for a prompt of so many tokens.
        adapters: names that stand for a LoRA adapter.
    """

    def __init__(
        self,
        index: PrefixIndex,
        tokens: Tokens,
        promise: Callable[[str, str, int], Slo],
        adapters: Callable[[], Collection[str]],
    ) -> None:
        self._index = index
        self._tokens = tokens
        self._promise = promise
        self._adapters = adapters

    async def describe(self, request: ClientRequest, headers: CIMultiDict[str], caller: Caller) -> Asked:
        """What the conductor is told of it.

        Raises:
            BadRequest: ``x-priority`` is not a number that it may be.
        """
        priority = _priority(headers, caller.service)
        prompt = await self._tokens.ids(request)
        ids = prompt.ids if prompt else NO_IDS
        keys = self._index.keys(ids, salt(request, self._adapters())) if len(ids) else ()
        tokens = len(ids) if prompt and prompt.exact else max(len(ids), request.prompt_tokens)
        model = _text(request.get("model"))
        arrival = Arrival(
            id="",
            tokens=tokens,
            keys=keys,
            max_tokens=_max_tokens(request),
            model=model,
            endpoint=request.path,
            tenant=caller.tenant,
            conversation=conversation_key(request),
            priority=priority,
            slo=self._promise(model, caller.name, tokens),
        )
        return Asked(request, headers, arrival, ids)


def _priority(headers: CIMultiDict[str], allowed: ServiceClass) -> int:
    said = headers.get(PRIORITY, "").strip()
    if not said:
        return allowed.priority
    try:
        priority = int(said)
    except ValueError:
        priority = PRIORITIES.stop
    if priority not in PRIORITIES:
        raise BadRequest(
            f"{PRIORITY} is {said!r}: it must be a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}",
            PRIORITY,
        )
    return priority if allowed.max_priority is None else min(priority, allowed.max_priority)


def _max_tokens(request: ClientRequest) -> int:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if type(limit := request.get(name)) is int and limit > 0:
            return min(limit, MOST_TOKENS)
    return 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
