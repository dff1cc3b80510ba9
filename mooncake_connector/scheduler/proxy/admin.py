"""The admin API: engines come, are drained and go; settings are read again, and shown."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web

from mooncake_connector import __version__
from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.engines.pool import Instance, InstanceReport, Pool, PoolError, Side
from mooncake_connector.scheduler.proxy.access import AccessLog
from mooncake_connector.scheduler.proxy.body import IN_FORCE, read_body
from mooncake_connector.scheduler.proxy.callers import HASH_SHOWN, unauthorized
from mooncake_connector.scheduler.proxy.errors import Handler, error_answer, openai_errors
from mooncake_connector.scheduler.proxy.keys import KeyRing, hashed, key_of
from mooncake_connector.scheduler.proxy.membership import Membership
from mooncake_connector.scheduler.proxy.openapi import Answer, Operation, describe
from mooncake_connector.scheduler.proxy.reload import Reloader
from mooncake_connector.scheduler.proxy.settings import DERIVED, InForce, ProxySettings, check_url

ABOUT = "Engines of a running proxy, and its settings. What changes here is not written to any file."
EngineUrl = Annotated[str, msgspec.Meta(pattern="^https?://", description="the engine's base URL")]
T = TypeVar("T", bound=msgspec.Struct)


class EngineName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names one engine.

    Attributes:
        url: its base URL.
    """

    url: EngineUrl


class NewEngine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine and its pool.

    Attributes:
        url: its base URL, without ``/v1``.
        side: the pool that it is to be in.
    """

    url: EngineUrl
    side: Side


class Engines(msgspec.Struct, frozen=True):
    """Both pools.

    Attributes:
        prefill, decode: the engines of each pool.
        mismatches: pairs that are up but can't exchange KV, with both sides' values.
    """

    prefill: list[InstanceReport]
    decode: list[InstanceReport]
    mismatches: list[str]


class Reloaded(msgspec.Struct, frozen=True):
    """What a reload did.

    Attributes:
        changed: names of the settings that are others now.
    """

    changed: list[str]


class Error(msgspec.Struct, frozen=True):
    """What is wrong, as in OpenAI's API.

    Attributes:
        message: what it is, and the mend.
        type: its kind.
        param: the field that is to blame, if one is.
        code: the answer's status.
    """

    message: str
    type: str
    param: str | None
    code: int


class Failure(msgspec.Struct, frozen=True):
    """The body of an answer that is an error.

    Attributes:
        error: which.
    """

    error: Error


class Admin:
    """The admin API of one proxy.

    Args:
        reloader: reads the settings again.
    """

    def __init__(self, in_force: InForce, pool: Pool, membership: Membership, reloader: Reloader) -> None:
        self._in_force = in_force
        self._pool = pool
        self._membership = membership
        self._reloader = reloader
        self.configure(in_force.settings)
        self.operations = self._operations()
        self._description = msgspec.json.encode(
            describe("mooncake-connector proxy", __version__, ABOUT, self.operations)
        )

    def configure(self, settings: ProxySettings) -> None:
        """Take these settings from now on."""
        self._ring = KeyRing(dict.fromkeys(settings.admin_keys, "admin"))

    def application(self) -> web.Application:
        """What listens on the admin port."""
        log = AccessLog(self._in_force)
        app = web.Application(client_max_size=0, middlewares=[openai_errors, log.written, self._known])
        app[IN_FORCE] = self._in_force
        for each in self.operations:
            app.router.add_route(each.method, each.path, each.handler)
        return app

    def _operations(self) -> list[Operation]:
        refused = {401: Answer("The key is missing or wrong.", Failure)}
        unread = {
            400: Answer("The body is not as described.", Failure),
            415: Answer("The body is not application/json.", Failure),
        }
        unknown = {404: Answer("No pool has that engine.", Failure)}
        report = Answer("The engine as it is now.", InstanceReport)

        def change(name: str, summary: str, status: int, change: Callable[[str], Instance]) -> Operation:
            async def handler(http: web.Request) -> web.Response:
                url = (await _read(http, EngineName)).url.rstrip("/")
                return _said(change(url).report(), status)

            answers = {status: report, **unread, **refused, **unknown}
            return Operation("POST", f"/engines/{name}", name, summary, handler, answers, EngineName)

        return [
            Operation(
                "GET",
                "/engines",
                "engines",
                "Both pools.",
                self._engines,
                {200: Answer("Each engine's state.", Engines), **refused},
            ),
            Operation(
                "POST",
                "/engines/add",
                "add",
                "Put an engine into a pool. It gets requests once it answers its probe.",
                self._add,
                {201: report, **unread, **refused, 409: Answer("It is in a pool already.", Failure)},
                NewEngine,
            ),
            change(
                "drain", "Send an engine no more requests; it ends those it has.", 200, self._membership.drain
            ),
            change("undrain", "Send an engine requests again.", 200, self._membership.undrain),
            change(
                "remove",
                "Drain an engine, and take it out of its pool once it has no request.",
                202,
                self._membership.remove,
            ),
            Operation(
                "POST",
                "/reload",
                "reload",
                "Read the settings again, as SIGHUP does.",
                self._reload,
                {
                    200: Answer("They are in force.", Reloaded),
                    **refused,
                    409: Answer("They are wrong, or can't change at run time: nothing changed.", Failure),
                },
            ),
            Operation(
                "GET",
                "/configuration",
                "configuration",
                "The settings in force, without secrets: of keys' hashes the first digits.",
                self._configuration,
                {200: Answer("As in the settings file."), **refused},
            ),
            Operation(
                "GET",
                "/openapi.json",
                "description",
                "This description.",
                self._describe,
                {200: Answer("OpenAPI 3.1."), **refused},
            ),
        ]

    @web.middleware
    async def _known(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        key = key_of(request.headers)
        if self._ring.find(hashed(key)) is None:
            return unauthorized("admin key" if not key else "valid admin key")
        try:
            return await handler(request)
        except PoolError as error:
            return error_answer(404, str(error), "NotFoundError")

    async def _engines(self, _: web.Request) -> web.Response:
        prefill, decode = (
            [instance.report() for instance in side] for side in (self._pool.prefill, self._pool.decode)
        )
        return _said(Engines(prefill, decode, self._pool.mismatches()))

    async def _add(self, http: web.Request) -> web.Response:
        found = await _read(http, NewEngine)
        url = found.url.rstrip("/")
        try:
            check_url("url", url)
            return _said(self._membership.add(url, found.side).report(), 201)
        except ConfigError as error:
            return error_answer(400, str(error), "BadRequestError", "url")
        except PoolError as error:
            return error_answer(409, str(error), "ConflictError", "url")

    async def _reload(self, _: web.Request) -> web.Response:
        try:
            return _said(Reloaded(self._reloader.reload()))
        except ConfigError as error:
            return error_answer(409, str(error), "ConflictError")

    async def _configuration(self, _: web.Request) -> web.Response:
        return _said(shown(self._in_force.settings))

    async def _describe(self, _: web.Request) -> web.Response:
        return web.Response(body=self._description, content_type="application/json")


def shown(settings: ProxySettings) -> dict[str, Any]:
    """Settings as in their file, without what opens anything."""
    found: dict[str, Any] = msgspec.to_builtins(settings)
    for name in DERIVED:
        del found[name]
    found["engine_api_key"] = "..." if settings.engine_api_key else ""
    found["admin_keys"] = _first_digits(settings.admin_keys)
    for name, service in settings.classes.items():
        found["classes"][name]["api_keys"] = _first_digits(service.api_keys)
    return found


def _first_digits(hashes: tuple[str, ...]) -> list[str]:
    return [f"{each[:HASH_SHOWN]}..." for each in hashes]


async def _read(http: web.Request, kind: type[T]) -> T:
    if http.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send the body as application/json")
    try:
        return msgspec.json.decode(await read_body(http), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise web.HTTPBadRequest(text=f"the body is not as described: {error}") from None


def _said(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
