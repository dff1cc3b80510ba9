"""vLLM's OpenAI server, with MooncakePushConnector loaded."""

import asyncio
import re
from contextlib import closing
from typing import Any

import msgspec

from mooncake_connector.scheduler.engines.base import EngineInfo, EngineUnready, told
from mooncake_connector.scheduler.engines.client import EngineClient
from mooncake_connector.scheduler.engines.response import Broken, Unreachable
from mooncake_connector.scheduler.proxy.openai import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    UNREADABLE,
    ClientRequest,
    error_body,
)

# They shape the answer, not the prompt: prefill's one token is dropped, so it need not compute them.
# response_format is not among them: some chat templates render it.
ANSWER_ONLY = frozenset(
    {
        "stream",
        "stream_options",
        "stream_interval",
        "n",
        "best_of",
        "min_tokens",
        "logprobs",
        "top_logprobs",
        "logprob_token_ids",
        "prompt_logprobs",
        "echo",
        "structured_outputs",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "return_prompt_text",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "include",
        "store",
        "kv_transfer_params",
    }
)
# ... unless its token is the client's first.
SHAPES_FIRST = frozenset({"min_tokens", "structured_outputs", "stream_options"})
# How an endpoint spells the limit to the answer's tokens.
LIMITS = {
    COMPLETIONS: ("max_tokens",),
    CHAT: ("max_tokens", "max_completion_tokens"),
    RESPONSES: ("max_output_tokens",),
    MESSAGES: ("max_tokens",),
}
# Tools that the client runs; others vLLM runs itself and goes on with a prompt that prefill never saw.
CLIENTS_TOOLS = frozenset({"function", "custom", "namespace"})
CONNECTOR_MEND = (
    "start it with --kv-transfer-config "
    '\'{"kv_connector":"MooncakePushConnector","kv_connector_module_path":"mooncake_connector.kv_transfer.vllm",'
    '"kv_role":"kv_both","kv_load_failure_policy":"recompute"}\''
)
PREAMBLE = frozenset({b"response.created", b"response.queued", b"response.in_progress"})
_event_name = re.compile(rb"^event: (\S+)$", re.MULTILINE)
# The error itself, or one of those that have a name.
_error_event = re.compile(rb'(?:\A\s*|\n\n)(?:event: error\ndata: (\{.*)|data:\s*(\{\s*"error".*))')
_error_code = re.compile(rb'"code"\s*:\s*"?(\d{3})')


class _Prefilled(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None


_prefilled = msgspec.json.Decoder(_Prefilled)


class VllmEngine:
    """Driver for vLLM 0.26 to 0.33.

    Args:
        api_key: for the proxy's own probes; clients' requests carry the client's.
        check_timeout: seconds for ``GET /health``.
        probe_timeout: seconds for the probe.
    """

    def __init__(self, *, api_key: str = "", check_timeout: float = 5.0, probe_timeout: float = 30.0) -> None:
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._check_timeout = check_timeout
        self._probe_timeout = probe_timeout

    async def health(self, client: EngineClient, url: str) -> None:
        await self._call(client, "GET", url, "/health", self._check_timeout)

    async def probe(self, client: EngineClient, url: str) -> EngineInfo:
        await self._call(client, "GET", url, "/health", self._check_timeout)
        try:
            models = msgspec.json.decode(
                await self._call(client, "GET", url, "/v1/models", self._probe_timeout)
            )
            model = models["data"][0]["id"]
            adapters = tuple(each["id"] for each in models["data"] if each.get("parent"))
        except (*UNREADABLE, LookupError, TypeError, AttributeError):
            raise EngineUnready(f"{url}/v1/models names no model: is this a vLLM server?") from None
        body = {"model": model, "prompt": [0], "max_tokens": 1, "kv_transfer_params": {"probe": True}}
        answer = await self._call(client, "POST", url, COMPLETIONS, self._probe_timeout, body)
        found = self.prefill_params(answer)
        if found is None:
            raise EngineUnready(f"no mooncake connector is loaded: {CONNECTOR_MEND}")
        try:
            return msgspec.convert(found | {"adapters": adapters}, EngineInfo)
        except msgspec.ValidationError as error:
            raise EngineUnready(
                f"the connector's probe answer is not understood ({error}): "
                "install the same mooncake-connector version on engines and proxy"
            ) from None

    def alone(self, request: ClientRequest) -> str:
        if request.path not in LIMITS:
            return "endpoint"
        if request.path == RESPONSES and (reason := _alone_as_response(request)):
            return reason
        if request.get("use_beam_search"):
            return "beam_search"
        if request.get("prompt_embeds") is not None:
            return "prompt_embeds"
        # Log-probabilities of the prompt exist only where the prompt is computed.
        echo = request.get("echo")
        asked = request.path == CHAT or request.get("logprobs") is not None
        if request.get("prompt_logprobs") is not None or (echo and asked):
            return "prompt_logprobs"
        # Negative means "what fits", and what fits depends on max_tokens, which differs on prefill.
        limit = request.get("truncate_prompt_tokens")
        if isinstance(limit, int) and limit < 0:
            return "truncation"
        return ""

    def prefill_body(self, request: ClientRequest, transfer_id: str, *, first_token: bool = False) -> bytes:
        dropped = ANSWER_ONLY - SHAPES_FIRST if first_token else ANSWER_ONLY
        fields: dict[str, Any] = {k: v for k, v in request.fields.items() if k not in dropped}
        params = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
        if first_token:
            params["first_token"] = True
            if request.get("min_tokens"):
                fields["min_tokens"] = 1
        elif request.path == COMPLETIONS:
            fields.pop("response_format", None)
        fields |= dict.fromkeys(LIMITS[request.path], 1)
        fields |= {"stream": first_token, "kv_transfer_params": params}
        if request.path == RESPONSES:
            fields["store"] = False
        return msgspec.json.encode(fields)

    def release_body(self, request: ClientRequest, transfer_id: str) -> bytes:
        return _aside(request, {"release": transfer_id})

    def timeline_body(self, request: ClientRequest, transfer_id: str) -> bytes:
        return _aside(request, {"timeline": transfer_id})

    def decode_params(
        self, prefill: EngineInfo, transfer_id: str, *, first_token: bool = False
    ) -> dict[str, Any]:
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_engine_id": prefill.engine_id,
            "remote_host": prefill.host,
            "remote_port": prefill.port,
            "tp_size": prefill.tp_size,
        }
        return params | {"first_token": True} if first_token else params

    def decode_body(self, request: ClientRequest, params: dict[str, Any]) -> bytes:
        # Spliced in, so that every other byte is the client's; of two equal keys JSON's last one counts.
        head = memoryview(request.raw.rstrip())[:-1]
        comma = b"," if request.fields else b""
        return b"".join((head, comma, b'"kv_transfer_params":', msgspec.json.encode(params), b"}"))

    def prefill_params(self, answer: bytes) -> dict[str, Any] | None:
        try:
            return _prefilled.decode(answer).kv_transfer_params or None
        except UNREADABLE:
            return None

    def preamble(self, first: bytes) -> bool:
        # vLLM sends these before it asks its engine for anything.
        names = _event_name.findall(first)
        return bool(names) and PREAMBLE.issuperset(names)

    def stream_failure(self, first: bytes) -> tuple[int, bytes] | None:
        # vLLM sends status 200 before the first token exists, so a failed request is an event.
        event = _error_event.search(first)
        if not event:
            return None
        said: bytes = event[1] or event[2]
        found = _error_code.search(said)
        code = int(found[1]) if found and found[1][:1] in b"45" else 500
        try:
            msgspec.json.decode(said)
        except UNREADABLE:
            # It came in pieces, or is none.
            return code, error_body(said.decode(errors="replace"), "EngineError", code)
        return code, said

    async def _call(
        self,
        client: EngineClient,
        method: str,
        url: str,
        path: str,
        seconds: float,
        body: dict[str, Any] | None = None,
    ) -> bytes:
        headers = self._headers if body is None else self._headers | {"Content-Type": "application/json"}
        sent = b"" if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(seconds):
                with closing(await client.request(method, url, path, sent, headers)) as reply:
                    answer = await reply.read()
        except TimeoutError:
            raise EngineUnready(f"{url}{path} did not answer within {seconds:g} s", late=True) from None
        except Broken as error:
            raise EngineUnready(f"{url}{path}: {told(error)}", gone=isinstance(error, Unreachable)) from None
        if reply.status == 401:
            raise EngineUnready(
                f"{url}{path} wants an API key: set MOONCAKE_PROXY_ENGINE_API_KEY to the engine's --api-key"
            )
        if reply.status != 200:
            raise EngineUnready(
                f"{url}{path} answered {reply.status}: {answer[:200].decode(errors='replace')}"
            )
        return answer


def _alone_as_response(request: ClientRequest) -> str:
    """Why decode alone can make this response; empty if prefill can help."""
    if request.get("previous_response_id") is not None:
        return "stored"
    if request.get("background"):
        return "background"
    tools = request.get("tools")
    for tool in tools if isinstance(tools, list) else []:
        if not isinstance(tool, dict) or tool.get("type") not in CLIENTS_TOOLS:
            return "server_tools"
    # "auto" is "what fits", and so is null.
    if "truncation" in request.fields and request.get("truncation") != "disabled":
        return "truncation"
    return ""


def _aside(request: ClientRequest, params: dict[str, Any]) -> bytes:
    """A completion that is only there for what the connector does with its parameters."""
    fields: dict[str, Any] = {"prompt": [0], "max_tokens": 1, "kv_transfer_params": params}
    if (model := request.get("model")) is not None:
        fields["model"] = model
    return msgspec.json.encode(fields)
