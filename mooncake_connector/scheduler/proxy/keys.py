"""API keys, of which only the SHA-256 is known here, and who has one."""

import hashlib
import secrets
from collections.abc import Mapping

import msgspec
from aiohttp import web

from mooncake_connector.scheduler.proxy.settings import ServiceClass

API_KEY = "x-api-key"
# A copy is quicker than to have OpenSSL look for the algorithm again.
_sha256 = hashlib.sha256()


def key_of(headers: Mapping[str, str]) -> str:
    """The API key in a request's headers: of ``Authorization: Bearer`` or ``x-api-key``; empty if none."""
    scheme, _, key = headers.get("Authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get(API_KEY, "").strip()


def hashed(key: str) -> str:
    """SHA-256 of a key, in hexadecimal; of none none."""
    if not key:
        return ""
    digest = _sha256.copy()
    digest.update(key.encode(errors="surrogateescape"))
    return digest.hexdigest()


class KeyRing:
    """Names of keys, such as their service classes.

    How long a look-up takes tells nothing of the hashes in here: what is compared are their keyed BLAKE2s
    (RFC 7693) under a secret of this process, which nobody can choose.

    Args:
        names: by the key's SHA-256, hexadecimal.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._secret = secrets.token_bytes(32)
        self._names = {self._blinded(hash): name for hash, name in names.items()}

    def find(self, hash: str) -> str | None:
        """The name of the key with that hash; None if it is none of them."""
        return self._names.get(self._blinded(hash)) if self._names else None

    def _blinded(self, hash: str) -> bytes:
        return hashlib.blake2s(hash.encode(), key=self._secret).digest()


class Caller(msgspec.Struct, frozen=True):
    """A client.

    Attributes:
        tenant: what turns are shared fairly between: the SHA-256 of its API key, or what the gateway says.
        shown: in logs: the first digits of that hash, or of the hash of what the gateway says.
        name: of its service class; empty if it has none.
        service: that class.
        engine_key: sent to engines in place of the client's key, none if empty; None: the client's goes on.
    """

    tenant: str = ""
    shown: str = ""
    name: str = ""
    service: ServiceClass = ServiceClass()
    engine_key: str | None = None


CALLER = web.RequestKey("caller", Caller)
