"""The client gets its first token from prefill, and decode's stream goes on after it.

Prefill streams one token through the same parsers as decode does, so the client gets from it what decode
would have sent first. Decode is made to sample that very token, and what it sends of it is left out.
"""

from typing import Any

import msgspec

from mooncake_connector.errors import MooncakeError
from mooncake_connector.scheduler.proxy.openai import CHAT, COMPLETIONS, UNREADABLE, ClientRequest
from mooncake_connector.scheduler.proxy.sse import DONE, END, Events

_DATA = b"data: "
_TEXTS = ("text", "content", "reasoning", "reasoning_content")
# What prefill's one token can't answer in decode's place, or what holds text back that came already.
_NEEDS_DECODE = (
    "echo",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "prompt_logprobs",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "return_prompt_text",
    "stop",
    "tools",
    "use_beam_search",
)


class Mismatch(MooncakeError):
    """Decode's stream does not go on from what the client has got from prefill."""


def eligible(request: ClientRequest) -> bool:
    """Whether prefill's first token can be the client's; else decode sends its own."""
    if request.path not in (CHAT, COMPLETIONS) or not request.stream:
        return False
    if any(_wished(request.get(name)) for name in _NEEDS_DECODE):
        return False
    if any(request.get(name) not in (None, 1) for name in ("n", "best_of", "stream_interval")):
        return False
    if any(request.get(name) == 0 for name in ("max_tokens", "max_completion_tokens")):
        return False
    # Several prompts have several first tokens.
    prompt = bytes(request.fields.get("prompt", b'"')).lstrip()
    return request.path == CHAT or prompt[:1] == b'"' or prompt[1:].lstrip()[:1].isdigit()


def _wished(value: object) -> bool:
    # Zero is a wish, too: a completion's `logprobs` 0 asks for those of the sampled tokens.
    return value is not None and value is not False and value not in ("", [])


class Early(msgspec.Struct, frozen=True):
    """What prefill's stream says of the first token.

    Attributes:
        events: what the client gets of it.
        field: where its text is: ``text``, ``content``, ``reasoning``.
        created: when prefill's answer was; the client's whole stream carries this time.
    """

    events: bytes
    field: str
    text: str
    created: int


class EarlyReader:
    """Reads prefill's stream of one token."""

    def __init__(self) -> None:
        self._role = b""

    def feed(self, event: bytes) -> Early | None:
        """The token, if this event carries it and the client may have it already."""
        found = _parse(event)
        if not (choice := _choice(found)):
            return None
        said = _said(choice)
        texts = [name for name in _TEXTS if _text(said, name)]
        if not texts and said.get("role"):
            self._role = event
            return None
        # A token that ends the answer, or is no text by itself, is decode's to send.
        if choice.get("finish_reason") != "length" or len(texts) != 1 or said.get("tool_calls"):
            return None
        # Parsers may swallow white space if it comes together with what follows it.
        if not said[texts[0]].strip():
            return None
        choice["finish_reason"] = None
        choice.pop("stop_reason", None)
        found.pop("system_fingerprint", None)
        return Early(self._role + _event(found), texts[0], said[texts[0]], _created(found))


class Splice:
    """Decode's stream without what the client has of it already."""

    def __init__(self, early: Early) -> None:
        self._early = early
        self._due = early.text
        self._relabel: tuple[bytes, bytes] | None = None
        self._events = Events()

    def feed(self, chunk: bytes) -> bytes:
        """What the client is sent of `chunk`.

        Raises:
            Mismatch: the two streams do not fit together.
        """
        if not self._due and not self._relabel:
            return self._events.rest() + chunk
        return b"".join([self._next(event) for event in self._events.feed(chunk)])

    @property
    def begun(self) -> bool:
        """Whether decode's stream has come to where prefill's left off."""
        return not self._due

    def end(self) -> bytes:
        """What is left when decode's stream has ended.

        Raises:
            Mismatch: it ended before it came to where prefill's left off.
        """
        if self._due:
            raise Mismatch(f"decode's stream ended before prefill's first token, {self._due!r}")
        return self._events.rest()

    def _next(self, event: bytes) -> bytes:
        if not self._due:
            return event.replace(*self._relabel, 1) if self._relabel else event
        if event.startswith(DONE):
            self.end()
        found = _parse(event)
        if error := found.get("error"):
            raise Mismatch(f"decode failed: {error.get('message') if isinstance(error, dict) else error}")
        if not (choice := _choice(found)):
            return event
        if (created := _created(found)) != self._early.created:
            self._relabel = (b'"created":%d,' % created, b'"created":%d,' % self._early.created)
            found["created"] = self._early.created
        said = _said(choice)
        for name in _TEXTS:
            if text := _text(said, name):
                said[name] = self._drop(name, text)
        ends = choice.get("finish_reason") is not None
        if ends and self._due:
            self.end()
        return _event(found) if ends or said.get("tool_calls") or any(map(said.get, _TEXTS)) else b""

    def _drop(self, name: str, text: str) -> str:
        due = self._due
        if not due:
            return text
        if name != self._early.field or not (text.startswith(due) or due.startswith(text)):
            raise Mismatch(
                f"decode begins with {name} {text!r}, prefill's first token is {self._early.field} {due!r}"
            )
        self._due = due[len(text) :]
        return text[len(due) :]


def _choice(found: dict[str, Any]) -> dict[str, Any]:
    """An event's first choice, empty if it has none."""
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) else {}


def _text(said: dict[str, Any], name: str) -> str:
    text = said.get(name)
    return text if isinstance(text, str) else ""


def _created(found: dict[str, Any]) -> int:
    created = found.get("created")
    return created if type(created) is int else 0


def _said(choice: dict[str, Any]) -> dict[str, Any]:
    """Where a choice's text is: a completion has it in itself."""
    delta = choice.get("delta")
    return delta if isinstance(delta, dict) else choice


def _parse(event: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(event.removeprefix(_DATA))
    except UNREADABLE:
        return {}
    return found if isinstance(found, dict) else {}


def _event(found: dict[str, Any]) -> bytes:
    return _DATA + msgspec.json.encode(found) + END
