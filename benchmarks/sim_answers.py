"""What simulated engines read of a request, and the answers that they write."""

from typing import Any

import msgspec

from benchmarks.sim_http import Http, json_answer

MODEL = "sim"


class Body(msgspec.Struct):
    """What matters of a request."""

    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None


class Stream:
    """One answer.

    Attributes:
        ready: when its KV was complete here, seconds.
        computed: seconds that its prompt took to compute.
        left: tokens to come.
    """

    __slots__ = ("chat", "computed", "context", "http", "left", "made", "ready", "streamed", "usage")

    def __init__(self, http: Http, body: Body, chat: bool, context: int) -> None:
        self.http = http
        self.chat = chat
        self.streamed = bool(body.stream)
        self.usage = bool((body.stream_options or {}).get("include_usage"))
        self.left = body.max_completion_tokens or body.max_tokens or 16
        self.made = 0
        self.context = context
        self.ready = 0.0
        self.computed = 0.0


def event(chat: bool, text: str, first: bool = False) -> bytes:
    """A streamed answer's event of one token, as JSON."""
    if chat:
        delta = f'{{"role":"assistant","content":"{text}"}}' if first else f'{{"content":"{text}"}}'
        kind, choice = "chat.completion.chunk", f'"delta":{delta}'
    else:
        kind, choice = "text_completion", f'"text":"{text}"'
    return (
        f'{{"id":"cmpl-sim","object":"{kind}","created":0,"model":"{MODEL}","choices":[{{"index":0,{choice},'
        '"logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}'
    ).encode()


def usage(stream: Stream) -> bytes:
    """The event that tells what a streamed answer took."""
    found = {"prompt_tokens": stream.context, "completion_tokens": stream.made}
    return msgspec.json.encode({"id": "cmpl-sim", "choices": [], "usage": found})


def whole(stream: Stream, now: float) -> bytes:
    """An answer in one piece, HTTP head included."""
    engines = int((stream.computed + now - stream.ready) * 1e6)
    text = f" t={int(now * 1e6)} e={engines}" + " w" * (stream.made - 1)
    choice = {"message": {"role": "assistant", "content": text}} if stream.chat else {"text": text}
    choices = [{"index": 0, **choice, "logprobs": None, "finish_reason": "length"}]
    usage = {"prompt_tokens": stream.context, "completion_tokens": stream.made}
    return json_answer({"id": "cmpl-sim", "model": MODEL, "choices": choices, "usage": usage})
