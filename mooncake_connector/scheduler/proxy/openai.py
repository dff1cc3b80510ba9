"""A client's request as the proxy needs it, and errors in OpenAI's form. Nothing here does I/O."""

from collections.abc import Sequence
from typing import Any

import msgspec

from mooncake_connector.errors import MooncakeError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
CHARS_PER_TOKEN = 4
LONGEST_KIND = 64

# What reading JSON may raise that somebody else wrote.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
TRANSFER = "kv_transfer_params"
XARGS = "vllm_xargs"
_NULL = msgspec.Raw(b"null")
_ABSENT = msgspec.Raw(b"")

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str)


class BadRequest(MooncakeError):
    """The client's request can't be served as it is; `param` names the field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Message(msgspec.Struct, frozen=True):
    """One of a chat's messages, or a part of one; its fields are still encoded, empty if absent."""

    role: msgspec.Raw = _ABSENT
    content: msgspec.Raw = _ABSENT
    text: msgspec.Raw = _ABSENT


# What a list may hold where messages should be.
Item = Message | str | float | bool | list[msgspec.Raw] | None
_items = msgspec.json.Decoder(list[Item])


class ClientRequest(msgspec.Struct, frozen=True):
    """One request for a generated answer.

    Attributes:
        path: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/responses``, ``/v1/messages``, ...
        raw: the body exactly as the client sent it, a JSON object.
        fields: its top-level fields, each still encoded.
        stream: whether the client asked for server-sent events.
        messages: a chat's; what is none there is left as it is.
    """

    path: str
    raw: bytes
    fields: dict[str, msgspec.Raw]
    stream: bool = False
    messages: Sequence[Item] = ()

    @classmethod
    def parse(cls, path: str, raw: bytes) -> "ClientRequest":
        """Read a body.

        Raises:
            BadRequest: not a JSON object, or it sets ``kv_transfer_params``.
        """
        fields = read_fields(raw)
        stream = bytes(fields.get("stream", _NULL)) == b"true"
        return cls(
            path, raw, fields, stream, _read_items(fields.get("messages", _NULL)) if path == CHAT else ()
        )

    @property
    def prompt_tokens(self) -> int:
        """Estimate; exact only for prompts given as token ids."""
        if self.path == COMPLETIONS:
            return _prompt_tokens(self.fields.get("prompt", _NULL))
        if self.path == CHAT:
            return _chat_tokens(self.messages)
        # The instructions stand beside what is said.
        said, told = ("input", "instructions") if self.path == RESPONSES else ("messages", "system")
        return sum(_either_tokens(self.fields[name]) for name in (said, told) if name in self.fields) or 1

    def get(self, name: str) -> Any:
        """The decoded value of a field, None if absent (or beyond what JSON allows)."""
        try:
            return msgspec.json.decode(self.fields[name]) if name in self.fields else None
        except UNREADABLE:
            return None


def read_fields(raw: bytes) -> dict[str, msgspec.Raw]:
    """A body's top-level fields, each still encoded.

    Raises:
        BadRequest: not a JSON object, or it sets ``kv_transfer_params``: its ids could name another request's
            transfer.
    """
    try:
        if not raw.isascii():
            raw.decode()  # strings that stay encoded are not looked into otherwise
        fields = _fields.decode(raw)
    except UNREADABLE as error:
        raise BadRequest(f"the request body is not a JSON object: {error}") from None
    # Looked at encoded: what the proxy's decoder refuses, a number too large, the engine's may take.
    if bytes(fields.get(TRANSFER, _NULL)) != b"null":
        raise BadRequest(f"{TRANSFER} is set by the proxy for each request; leave it out", TRANSFER)
    if XARGS in fields:
        # vLLM merges these into the very dictionary that it puts the transfer's parameters in.
        try:
            inner = _fields.decode(fields[XARGS])
        except msgspec.DecodeError:
            inner = {}  # no object: the engine refuses it
        if TRANSFER in inner:
            raise BadRequest(f"{TRANSFER} is set by the proxy for each request; leave it out", XARGS)
    return fields


def answered(status: int, body: bytes) -> str:
    """What an engine answered, for logs: the status, and the ``type`` of the error if it says one.

    The rest of its body may repeat what it refuses: a prompt.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    error = found.get("error", found) if isinstance(found, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    named = isinstance(kind, str) and kind.isidentifier() and len(kind) <= LONGEST_KIND
    return f"answered {status} ({kind})" if named else f"answered {status}"


def error_body(message: str, kind: str, code: int, param: str | None = None) -> bytes:
    """An error as OpenAI's API spells it, JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def broken_event(path: str, message: str) -> bytes:
    """The event that says to a client of this endpoint that its stream broke off."""
    if path in (RESPONSES, MESSAGES):
        # Their clients go by the event's name and type.
        said = {"message": message, "type": "api_error", "param": None, "code": 502}
        return b"event: error\ndata: " + msgspec.json.encode({"type": "error", "error": said}) + b"\n\n"
    return b"data: " + error_body(message, "BadGatewayError", 502) + b"\n\n"


def _read_items(messages: msgspec.Raw) -> list[Item]:
    """None if it is no list, or breaks JSON."""
    try:
        return _items.decode(messages)
    except UNREADABLE:
        return []


def _either_tokens(said: msgspec.Raw) -> int:
    """Of a text, or of messages or the parts of one."""
    return _prompt_tokens(said) if _begins(said, b'"') else _chat_tokens(_read_items(said))


def _prompt_tokens(prompt: msgspec.Raw) -> int:
    # Token ids are counted by their commas: a million-token prompt needs no million Python integers.
    if _begins(prompt, b"["):
        text = bytes(prompt)
        if text[1:].lstrip(b" \t\r\n[")[:1].isdigit():
            return text.count(b",") + 1
    return max(1, len(memoryview(prompt)) // CHARS_PER_TOKEN)


def _chat_tokens(messages: Sequence[Item]) -> int:
    # Only text counts: an image sent inline as base64 would look like a prompt of a million tokens.
    total = 0
    try:
        for item in messages:
            if not isinstance(item, Message):
                continue
            # A part of a message stands where a message would: Anthropic's `system`.
            content = bytes(item.content)
            total += _length(content) + _length(bytes(item.text))
            for part in _items.decode(content) if content.startswith(b"[") else ():
                total += _length(bytes(part.text)) if isinstance(part, Message) else 0
    except UNREADABLE:
        return 1
    return max(1, total // CHARS_PER_TOKEN)


def _length(text: bytes) -> int:
    """Characters of a string, which is still encoded; of anything else none."""
    if not text.startswith(b'"'):
        return 0
    return len(text) - 2 if text.isascii() and b"\\" not in text else len(_string.decode(text))


def _begins(value: msgspec.Raw, mark: bytes) -> bool:
    return memoryview(value)[:1] == mark
