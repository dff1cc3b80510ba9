"""The process's log, on standard error: lines of text, or a JSON object a line."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

from mooncake_connector.scheduler.proxy import identity
from mooncake_connector.scheduler.proxy.access import AccessLine
from mooncake_connector.scheduler.proxy.settings import ProxySettings


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, and which request it is about."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        # What an engine or a client says must not look like another line.
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        named = " ".join(f"{name}={value}" for name, value in _request().items())
        return super().formatMessage(record) + (f" [{named}]" if named else "")


class JsonFormatter(logging.Formatter):
    """``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, and which request it is about."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **_request(),
        }
        if isinstance(record.msg, AccessLine):
            found |= {"message": "request"} | record.msg.fields
        else:
            found["message"] = record.getMessage()
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(found).decode()


def configure(settings: ProxySettings) -> None:
    """Have this process log as these settings say from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    # What no line of ours shows need not be found out for each (Python's logging HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _request() -> dict[str, str]:
    """The names of the request that the running task serves."""
    found = identity.current.get()
    if found is None:
        return {}
    return {"request_id": found.request_id} | ({"trace_id": found.trace_id} if found.trace_id else {})
