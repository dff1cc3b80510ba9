"""A client's request as the proxy needs it, and errors in OpenAI's form. Nothing here does I/O."""

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

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BadRequest(MooncakeError):
    """The client's request can't be served as it is; `param` names the field, if one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ClientRequest(msgspec.Struct, frozen=True):
    """One request for a generated answer.

    Attributes:
        path: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/responses``, ``/v1/messages``, ...
        raw: the body exactly as the client sent it, a JSON object.
        fields: its top-level fields, each still encoded.
        stream: whether the client asked for server-sent events.
        prompt_tokens: estimate; exact only for prompts given as token ids.
    """

    path: str
    raw: bytes
    fields: dict[str, msgspec.Raw]
    stream: bool
    prompt_tokens: int

    @classmethod
    def parse(cls, path: str, raw: bytes) -> "ClientRequest":
        """Read a body.

        Raises:
            BadRequest: not a JSON object, or it sets ``kv_transfer_params``.
        """
        fields = read_fields(raw)
        request = cls(path, raw, fields, False, 0)
        return cls(path, raw, fields, request.get("stream") is True, _tokens(path, fields))

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


def _tokens(path: str, fields: dict[str, msgspec.Raw]) -> int:
    if path == COMPLETIONS:
        return _prompt_tokens(fields.get("prompt", _NULL))
    if path == CHAT:
        return _chat_tokens(fields.get("messages", _NULL))
    # The instructions stand beside what is said.
    said, told = ("input", "instructions") if path == RESPONSES else ("messages", "system")
    return sum(_either_tokens(fields[name]) for name in (said, told) if name in fields) or 1


def _either_tokens(said: msgspec.Raw) -> int:
    """Of a text, or of messages or the parts of one."""
    return _prompt_tokens(said) if bytes(said).startswith(b'"') else _chat_tokens(said)


def _prompt_tokens(prompt: msgspec.Raw) -> int:
    text = bytes(prompt)
    # Token ids are counted by their commas: a million-token prompt needs no million Python integers.
    if text.startswith(b"[") and text[1:].lstrip(b" \t\r\n[")[:1].isdigit():
        return text.count(b",") + 1
    return max(1, len(text) // CHARS_PER_TOKEN)


def _chat_tokens(messages: msgspec.Raw) -> int:
    try:
        found: Any = msgspec.json.decode(messages)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 1
    return max(1, _text_length(found) // CHARS_PER_TOKEN)


def _text_length(messages: Any) -> int:
    # Only text counts: an image sent inline as base64 would look like a prompt of a million tokens.
    total = 0
    for message in messages if isinstance(messages, list) else []:
        # A part of a message stands where a message would: Anthropic's `system`.
        part = message.get("text") if isinstance(message, dict) else None
        total += len(part) if isinstance(part, str) else 0
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            total += len(content)
        for part in content if isinstance(content, list) else []:
            text = part.get("text") if isinstance(part, dict) else None
            total += len(text) if isinstance(text, str) else 0
    return total
