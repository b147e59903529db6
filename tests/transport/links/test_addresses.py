# SPDX-License-Identifier: Apache-2.0
"""URIs: what is read from them, and what is said of those that cannot be used."""

import pytest

from cowshed.cache.errors import UsageError
from cowshed.transport.links.addresses import parse_stream_uri
from cowshed.transport.links.schemes import connect_raw, listen


@pytest.mark.parametrize(
    ("uri", "host", "port"),
    [
        ("tcp://h:1", "h", 1),
        ("tcp://127.0.0.1:65535/", "127.0.0.1", 65535),
        ("tls://[::1]:7", "::1", 7),
        ("vsock://2:4294967295", "2", 4294967295),
        ("vsock://any:70000", "any", 70000),
    ],
)
def test_a_uri_says_where(uri: str, host: str, port: int) -> None:
    address = parse_stream_uri(uri)
    assert (address.host, address.port) == (host, port)


def test_options_come_from_the_query_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWSHED_TLS_CERT", "/env.pem")
    monkeypatch.setenv("COWSHED_TLS_KEY", "/env.key")
    address = parse_stream_uri("tls://h:1?cert=%2Fmine.pem&server_name=b.example")
    assert address.options == {
        "cert": "/mine.pem",
        "key": "/env.key",
        "server_name": "b.example",
    }
    assert address.without_options == "tls://h:1"
    assert parse_stream_uri("tcp://h:1").options == {}


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("tcp://h", "names no port"),
        ("tcp://h:99999", "Port out of range"),
        ("tcp://h:x", "write tcp://host:port"),
        ("tcp://:1", "write tcp://host:port"),
        ("tcp://h:1/path", "write tcp://host:port"),
        ("tcp://me@h:1", "write tcp://host:port"),
        ("tcp://h:1?cert=x", "unknown option 'cert'; tcp knows none"),
        ("tls://h:1?certs=x", "unknown option 'certs'; tls knows cert, key, ca, server_name"),
        ("tls://h:1?cert=", "'cert' is empty"),
        ("tls://h:1?cert", "cannot use"),
        ("vsock://h:1", "no context id"),
        ("vsock://2:4294967296", "no vsock port"),
        ("vsock://2", "names no port"),
        ("http://h:1", "no scheme 'http:'; there are unix:, tcp:, tls:, vsock:"),
        ("h:1", "no scheme 'h:'"),
        ("/run/x", "is no URI"),
        ("", "is no URI"),
    ],
)
def test_a_uri_that_cannot_be_used_is_told_why(uri: str, words: str) -> None:
    for call in (connect_raw, listen):
        with pytest.raises(UsageError) as caught:
            call(uri)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_tls_without_its_files_says_which(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CERT", "KEY", "CA"):
        monkeypatch.delenv(f"COWSHED_TLS_{variable}", raising=False)
    with pytest.raises(UsageError, match="lacks key, ca: add"):
        listen("tls://localhost:0?cert=/x")
    with pytest.raises(UsageError, match="cannot use ca '/none': No such file"):
        listen("tls://localhost:0?cert=/x&key=/y&ca=/none")


def test_a_port_that_is_taken_and_a_name_nobody_has() -> None:
    with listen("tcp://127.0.0.1:0") as taken:
        with pytest.raises(UsageError, match=r"cannot listen at tcp://127.*in use"):
            listen(taken.uri)
        with pytest.raises(UsageError, match="cannot listen"):
            listen("tcp://192.0.2.1:0")
