"""HTTPS for clients: certificates, their replacement, and who stalls in the handshake."""

import asyncio
import ssl
import time
from pathlib import Path

import aiohttp
import pytest

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.proxy.settings import ProxySettings
from mooncake_connector.scheduler.proxy.tls import Certificate
from tests.proxy.certificates import make, trusting
from tests.proxy.conftest import Setting, Start
from tests.proxy.fakes import MODEL, WITHIN, events

STREAM = {"model": MODEL, "prompt": "a", "stream": True}


def https(setting: Setting) -> str:
    return setting.url.replace("http:", "https:")


async def subject(setting: Setting, context: ssl.SSLContext) -> str:
    """Who the certificate that a new connection gets is for."""
    port = int(setting.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert()["subject"]
    writer.close()
    return str(found[0][0][1])


async def test_clients_speak_https_and_a_new_certificate_cuts_no_stream(start: Start, tmp_path: Path):
    old, new = make(tmp_path, "old"), make(tmp_path, "new")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(old[0].read_bytes())
    key.write_bytes(old[1].read_bytes())
    setting = await start(tls_cert=str(cert), tls_key=str(key))
    setting.decode[0].stream, setting.decode[0].gap = events(20), 0.02
    trust = trusting(old[0], new[0])
    async with aiohttp.ClientSession(https(setting), connector=aiohttp.TCPConnector(ssl=trust)) as http:
        async with http.post("/v1/completions", json=STREAM) as reply:
            got = await reply.content.readany()
            assert await subject(setting, trust) == "old"
            cert.write_bytes(new[0].read_bytes())
            with pytest.raises(ConfigError, match=r"can.t be used"):
                setting.reload()  # the key is still the old one's
            assert await subject(setting, trust) == "old"
            key.write_bytes(new[1].read_bytes())
            setting.reload()
            assert await subject(setting, trust) == "new"
            got += await reply.content.read()
        assert got == b"".join(events(20))
    with pytest.raises(aiohttp.ClientError):
        await setting.http.get("/health")


async def test_who_stalls_in_the_handshake_is_dropped(start: Start, tmp_path: Path):
    cert, key = make(tmp_path, "proxy")
    setting = await start(tls_cert=str(cert), tls_key=str(key), header_seconds=0.2)
    for sent in (b"", b"\x16\x03\x01\x02\x00"):
        port = int(setting.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        writer.write(sent)
        async with asyncio.timeout(WITHIN):
            try:
                await reader.read()
            except ConnectionError:
                pass
        assert 0.15 < time.monotonic() - began < WITHIN
        writer.close()


def test_files_that_can_not_be_used_are_named(tmp_path: Path):
    cert, key = make(tmp_path, "a")
    other, _ = make(tmp_path, "b")
    for pair, mend in [
        ((cert, tmp_path / "none"), "can't be read: No such file"),
        ((other, key), "can't be used"),
        ((key, cert), "can't be used"),
    ]:
        with pytest.raises(ConfigError, match=r"--tls-cert \(MOONCAKE_PROXY_TLS_CERT\).*" + mend):
            Certificate(str(pair[0]), str(pair[1]))


def test_one_file_without_the_other():
    with pytest.raises(ConfigError, match=r"--tls-key .* is missing: --tls-cert .* needs it"):
        ProxySettings(prefill=("http://p:1",), decode=("http://d:1",), tls_cert="a")
