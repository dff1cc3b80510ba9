"""The certificate that clients see, which can be replaced while connections are open."""

import ssl

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.proxy.settings import spelled


class Certificate:
    """A server's side of TLS, 1.2 and later.

    Attributes:
        context: what a listening socket is given; connections made after `replace` get the new certificate.

    Args:
        cert: file of the certificate chain, PEM.
        key: file of its private key, PEM, not encrypted.

    Raises:
        ConfigError: a file can't be read, or they do not belong together.
    """

    def __init__(self, cert: str, key: str) -> None:
        self.context = _context(cert, key)

    def replace(self, cert: str, key: str) -> None:
        """Take other files, or the same ones' new contents. Check them first: see `check`."""
        self.context.load_cert_chain(cert, key, _no_password)


def check(cert: str, key: str) -> None:
    """Whether a server could start with them.

    Raises:
        ConfigError: a file can't be read, or they do not belong together.
    """
    _context(cert, key)


def _context(cert: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, _no_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{spelled('tls_cert')} {cert} and {spelled('tls_key')} {key} can't be used "
            f"({error.reason or error}): give a certificate chain and its key, unencrypted, both as PEM"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{spelled('tls_cert')} {cert} or {spelled('tls_key')} {key} can't be read: {error.strerror}"
        ) from None
    return context


def _no_password() -> str:
    # Without this OpenSSL asks for one on the terminal, and waits.
    return ""
