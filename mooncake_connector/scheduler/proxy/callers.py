"""Who sends a request: told by its API key, and turned away without one if keys are required."""

import hashlib
from collections.abc import Mapping

from aiohttp import hdrs, web

from mooncake_connector.scheduler.proxy.errors import Handler, error_answer
from mooncake_connector.scheduler.proxy.keys import CALLER, Caller, KeyRing, hashed, key_of
from mooncake_connector.scheduler.proxy.settings import ProxySettings, ServiceClass

# Load balancers and Prometheus have no key; as with vLLM's own --api-key.
OPEN = frozenset({"/health", "/ping", "/load", "/metrics"})
HASH_SHOWN = 12
STRANGER = Caller(engine_key="")
NO_CLASS = ServiceClass()


class Callers:
    """Knows clients by their keys."""

    def __init__(self, settings: ProxySettings) -> None:
        self.configure(settings)

    def configure(self, settings: ProxySettings) -> None:
        """Take these settings from now on."""
        self._classes = settings.classes
        self._ring = KeyRing(
            {key: name for name, found in settings.classes.items() for key in found.api_keys}
        )
        self._required = settings.require_key
        self._tenant_header = settings.tenant_header
        self._engine_key = settings.engine_api_key if settings.require_key else None

    def of(self, headers: Mapping[str, str]) -> Caller | None:
        """Who sends a request with these headers, whatever their names' case; None if nobody who may."""
        key = hashed(key_of(headers))
        name = self._ring.find(key)
        if name is None and self._required:
            return None
        tenant, shown = key, key
        if self._tenant_header:
            tenant = headers.get(self._tenant_header, "").strip()
            shown = hashlib.sha256(tenant.encode(errors="surrogateescape")).hexdigest() if tenant else ""
        service = self._classes[name] if name else NO_CLASS
        return Caller(tenant, shown[:HASH_SHOWN], name or "", service, self._engine_key)

    @web.middleware
    async def known(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note the caller in the request, or answer 401."""
        caller = self.of(request.headers)
        # Browsers ask for permission (CORS) before they show a key.
        if caller is None and request.path not in OPEN and request.method != hdrs.METH_OPTIONS:
            return unauthorized("API key" if not key_of(request.headers) else "valid API key")
        request[CALLER] = caller or STRANGER
        return await handler(request)


def unauthorized(lacks: str) -> web.Response:
    """401, in OpenAI's form."""
    response = error_answer(
        401, f"no {lacks} was given: send Authorization: Bearer KEY", "AuthenticationError"
    )
    response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    return response
