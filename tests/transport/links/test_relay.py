# SPDX-License-Identifier: Apache-2.0
"""The relay between TLS and a plain socket: bytes, ends, and what a bad peer costs."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certificates import Authority

from cowshed.transport.links.relay import Relay
from cowshed.transport.links.tls import TlsSession, server_context

SECONDS = 60.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


def client_context(authority: Authority, name: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if name is not None:
        files = authority.issue(name)
        context.load_cert_chain(files["cert"], files["key"])
    return context


class Rig:
    """A relay, the plain end it serves, and the raw socket of a client to be."""

    def __init__(self, authority: Authority, handshake_seconds: float = SECONDS) -> None:
        context = server_context(authority.issue("server", "DNS:server"), "test")
        self.raw, ours = socket.socketpair()
        self.raw.settimeout(SECONDS)
        self.ready = threading.Event()
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.session = TlsSession(context, server_side=True)
        self.relay = Relay(
            ours,
            self.session,
            handshake_seconds=handshake_seconds,
            on_ready=self.ready.set,
            on_end=self.ends.put,
        )
        self.plain = self.relay.inner
        self.plain.settimeout(SECONDS)

    def end(self) -> str:
        return self.ends.get(timeout=SECONDS)


@pytest.fixture
def rig(authority: Authority) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**terms: float) -> Rig:
        rigs.append(Rig(authority, **terms))
        return rigs[-1]

    yield make
    for one in rigs:
        one.raw.close()
        one.plain.close()
        one.relay.stop()
        one.relay.join()


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    return client_context(authority, "alice")


def read_exactly(sock: socket.socket, nr_bytes: int) -> bytes:
    parts = []
    while nr_bytes:
        part = sock.recv(min(nr_bytes, 1 << 20))
        assert part, f"{nr_bytes} bytes short"
        parts.append(part)
        nr_bytes -= len(part)
    return b"".join(parts)


def test_megabytes_go_both_ways_at_once(
    rig: Callable[..., Rig], context: ssl.SSLContext, rng: random.Random
) -> None:
    one = rig()
    # One thread for both would dead-lock once every buffer is full; SSLSocket cannot do with two.
    data = rng.randbytes(3 << 20)
    echo = threading.Thread(target=lambda: _echo(one.plain))
    echo.start()
    with context.wrap_socket(one.raw, server_hostname="server") as client:
        assert one.ready.wait(SECONDS)
        assert one.session.peer_name == "alice"
        for start in range(0, len(data), 100_000):
            piece = data[start : start + 100_000]
            client.sendall(piece)
            assert read_exactly(client, len(piece)) == piece
    echo.join()
    assert one.end() == ""


def _echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 20):
        sock.sendall(data)
    sock.close()


def test_a_writer_waits_for_a_reader_and_costs_no_memory(
    rig: Callable[..., Rig], context: ssl.SSLContext
) -> None:
    one = rig()
    with context.wrap_socket(one.raw, server_hostname="server") as client:
        assert one.ready.wait(SECONDS)
        one.plain.settimeout(0.3)
        nr_sent = 0
        # The kernel's buffers and a piece or two: then nobody takes more.
        with contextlib.suppress(TimeoutError):
            while nr_sent < 16 << 20:
                nr_sent += one.plain.send(bytes(1 << 16))
        assert nr_sent < 4 << 20
        one.plain.settimeout(SECONDS)
        assert read_exactly(client, nr_sent) == bytes(nr_sent)


def test_what_was_replied_before_the_plain_end_closed_arrives(
    rig: Callable[..., Rig], context: ssl.SSLContext
) -> None:
    one = rig()
    with context.wrap_socket(one.raw, server_hostname="server") as client:
        assert one.ready.wait(SECONDS)
        one.plain.sendall(b"last words")
        one.plain.close()
        assert read_exactly(client, 10) == b"last words"
        assert client.recv(1) == b""
    assert one.end() == ""


def test_a_client_that_goes_ends_the_plain_side(
    rig: Callable[..., Rig], context: ssl.SSLContext
) -> None:
    one = rig()
    client = context.wrap_socket(one.raw, server_hostname="server")
    client.sendall(b"goodbye")
    client.close()
    assert read_exactly(one.plain, 7) == b"goodbye"
    assert one.plain.recv(1) == b""
    one.plain.close()
    one.end()


@pytest.mark.parametrize("name", [None, "stranger"])
def test_who_has_no_certificate_of_ours_is_refused(
    rig: Callable[..., Rig], authority: Authority, name: str | None, tmp_path: Path
) -> None:
    one = rig()
    context = client_context(authority, None)
    if name:
        files = Authority(tmp_path / "other").issue(name)
        context.load_cert_chain(files["cert"], files["key"])
    # In TLS 1.3 the client is done before the server has seen its certificate.
    client = context.wrap_socket(one.raw, server_hostname="server")
    with client, pytest.raises(ssl.SSLError):
        client.recv(1)
    assert "TLS" in one.end()
    assert not one.ready.is_set()
    assert one.plain.recv(1) == b""


def test_junk_and_silence_end_it(rig: Callable[..., Rig]) -> None:
    junk, silent, gone = rig(), rig(handshake_seconds=0.1), rig()
    junk.raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
    gone.raw.close()
    assert "TLS" in junk.end()
    assert "timed out" in silent.end()
    assert "went away" in gone.end()


def test_it_is_broken_off_on_demand(rig: Callable[..., Rig], context: ssl.SSLContext) -> None:
    one = rig()
    client = context.wrap_socket(one.raw, server_hostname="server")
    assert one.ready.wait(SECONDS)
    one.relay.stop()
    one.end()
    with contextlib.suppress(OSError):
        assert client.recv(1) == b""
    client.close()


def test_without_a_thread_to_be_had_everything_is_closed(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_the_limit(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # as Python says it

    context = server_context(authority.issue("server", "DNS:server"), "test")
    raw, ours = socket.socketpair()
    session = TlsSession(context, server_side=True)
    monkeypatch.setattr(threading.Thread, "start", at_the_limit)
    with raw, pytest.raises(OSError, match="temporarily unavailable"):
        Relay(ours, session, handshake_seconds=SECONDS)
    assert ours.fileno() == -1
