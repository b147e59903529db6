# SPDX-License-Identifier: Apache-2.0
"""The way in for guests from elsewhere: who is let in, who is dropped, what is kept for whom."""

import contextlib
import re
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from certificates import Authority
from domains import (
    Daemon,
    MakeImage,
    StartDaemon,
    cowshed,
    new_run_dir,
    until,
    write_image,
)

from cowshed.cache.errors import CowshedError, PeerError, UsageError
from cowshed.transport import ByteDisk, connect
from cowshed.transport.channels.exchange import ask, greet
from cowshed.transport.links.stream import StreamConnection
from cowshed.transport.messages.protocol import HEADER, encode

SIZE = 1 << 20
PAGE = 4096


def listening(daemon: Daemon, no: int = 0) -> str:
    """The URI of a daemon's listener, by number."""
    return re.findall(r"event=listening uri=\"?([^\"\s]+)", daemon.log())[no]


@pytest.fixture(scope="module")
def module_tcp() -> Iterator[Daemon]:
    with new_run_dir() as run_dir:
        image = write_image(run_dir / "image.raw", SIZE)
        terms = ["--listen=tcp://127.0.0.1:0", "--no-keeper", "--verbose"]
        daemon = Daemon(run_dir, [f"--image=disk={image}", f"--image=two={image}", *terms])
        daemon.wait_ready()
        try:
            yield daemon
        finally:
            daemon.kill()


@pytest.fixture
def tcp(module_tcp: Daemon) -> Iterator[Daemon]:
    """A daemon that has no guests before and after."""
    yield module_tcp

    def guests() -> list[dict[str, Any]]:
        return list(module_tcp.status()["guests"])

    # Some go by themselves once their end is noticed; the others are away then.
    until(lambda: all(guest["state"] == "away" for guest in guests()))
    for guest in guests():
        module_tcp.request("discard", overlay=f"{guest['image']}@{guest['name']}")


def raw(uri: str) -> socket.socket:
    host, port = uri.rpartition("//")[2].split(":")
    return socket.create_connection((host, int(port)), 60)


def say(op: str, **fields: object) -> bytes:
    return b"".join(encode(1, {"op": op, **fields}))


HELLO = say("hello", version=1, features=[])
OPEN = say("open", image="disk", guest="x", token="t")


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        HEADER.pack(0x44485343, 1, 1, 1, 0, 0, 1 << 20, 0xFFFF),
        OPEN,
        HELLO + HELLO,
        HELLO + say("data"),
        HELLO + OPEN + OPEN,
        HELLO + say("open", image="disk", guest="x"),
        HELLO + say("open", image="disk", guest=7, token="t"),
        HELLO + say("open", image="disk", guest="x", token="t", quota_bytes=-1),
        HELLO + say("hello", version=[]),
        HELLO[:20],
        HELLO + OPEN + say("data") + b"more before the answer",
    ],
)
def test_who_makes_no_sense_is_dropped_alone(tcp: Daemon, said: bytes) -> None:
    uri = listening(tcp)
    with connect(uri) as backend, backend.open("disk") as disk:
        with raw(uri) as rude:
            rude.sendall(said)
            rude.shutdown(socket.SHUT_WR)
            while rude.recv(65536):
                pass
        assert len(disk.read(0, SIZE)) == SIZE
    until(lambda: tcp.status()["guests"] == [])


def test_what_cannot_be_met_is_refused_and_the_talk_goes_on(tcp: Daemon) -> None:
    connection = greet(listening(tcp))
    with connection:
        for op, fields, words in (
            ("status", {}, "not for the network"),
            ("shutdown", {}, "not for the network"),
            ("describe", {"image": "none"}, "no image 'none'"),
            (
                "open",
                {"image": "disk", "guest": "x", "token": "t", "quota_bytes": 1},
                "less than a page",
            ),
        ):
            with pytest.raises(CowshedError, match=words):
                ask(connection, op, fields)
        assert ask(connection, "describe", {"image": "disk"})["size_bytes"] == SIZE
        assert ask(connection, "close", {})["ok"]


def test_a_protocol_error_in_the_data_costs_that_guest_only(tcp: Daemon) -> None:
    with connect(listening(tcp)) as backend, backend.open("disk", guest="good") as disk:
        connection = greet(listening(tcp))
        assert isinstance(connection, StreamConnection)
        ask(connection, "open", {"image": "disk", "guest": "bad", "token": "t"})
        ask(connection, "data", {})
        sock, _ = connection.take_stream()
        with sock:
            sock.settimeout(60)
            sock.sendall(b"\xff" * 64)
            assert sock.recv(100) == b""
        assert len(disk.read(0, SIZE)) == SIZE
    until(lambda: tcp.guest_status("bad")["state"] == "away")


def test_a_write_past_the_end_is_refused_by_the_backend_too(tcp: Daemon) -> None:
    connection = greet(listening(tcp))
    assert isinstance(connection, StreamConnection)
    ask(connection, "open", {"image": "disk", "guest": "bad", "token": "t"})
    ask(connection, "data", {})
    sock, _ = connection.take_stream()
    with sock:
        sock.settimeout(60)
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 9, SIZE - 1, 2) + b"ab")
        reply = sock.recv(100)
        magic, _, kind, cookie, _ = struct.unpack_from(">IHHQI", reply)
        assert (magic, kind & 0x8000, cookie) == (0x668E33EF, 0x8000, 9)


def lose(disk: object) -> None:
    """Break a disk's connection as a network would: without a good-bye."""
    assert isinstance(disk, ByteDisk)
    assert disk._pump is not None
    disk._pump.close()


def test_a_guest_whose_connection_breaks_is_away_and_keeps_its_pages(tcp: Daemon) -> None:
    with connect(listening(tcp)) as backend, backend.open("disk", guest="g") as disk:
        disk.write(5, b"mine")
        lose(disk)
        until(lambda: tcp.guest_status("g")["state"] == "away")
        assert tcp.guest_status("g")["private_bytes"] == PAGE
        with pytest.raises(UsageError, match="taken"):
            backend.open("disk", guest="g")  # by somebody else, who has another token
        assert disk.read(5, 4) == b"mine"
        assert tcp.guest_status("g")["state"] == "running"
    until(lambda: tcp.status()["guests"] == [])


def test_by_its_token_a_guest_finds_its_pages_again(tcp: Daemon) -> None:
    with connect(listening(tcp)) as backend:
        with backend.open("disk", guest="g", token="secret") as disk:
            disk.write(5, b"mine")
        until(lambda: tcp.guest_status("g")["state"] == "away")
        for token in ("other", None):
            with pytest.raises(UsageError, match="taken"):
                backend.open("disk", guest="g", token=token)
        with pytest.raises(UsageError, match="taken"):
            backend.open("two", guest="g", token="secret")
        with backend.open("disk", guest="g", token="secret") as disk:
            assert disk.read(5, 4) == b"mine"
    until(lambda: tcp.guest_status("g")["state"] == "away")
    assert cowshed("discard", "disk@g", "--run-dir", tcp.run_dir).returncode == 0
    assert tcp.status()["guests"] == []


def test_who_comes_back_takes_the_place_of_its_old_connection(tcp: Daemon) -> None:
    terms = {"guest": "g", "token": "secret"}
    nr_before = tcp.log().count("end=detached")  # the daemon is other tests' too
    with connect(listening(tcp)) as backend, backend.open("disk", **terms) as old:
        old.write(5, b"old")
        with backend.open("disk", **terms) as new:
            assert new.read(5, 3) == b"old"
            new.write(5, b"new")
            until(lambda: tcp.log().count("end=detached") == nr_before + 1)


def test_many_who_say_nothing_hold_nobody_up(tcp: Daemon) -> None:
    nr_threads = tcp.nr_threads()
    nr_fds = tcp.nr_fds_now()
    idle = [raw(listening(tcp)) for _ in range(300)]
    try:
        with connect(listening(tcp)) as backend, backend.open("disk") as disk:
            assert len(disk.read(0, SIZE)) == SIZE
        assert tcp.nr_threads() - nr_threads < 10  # of the daemon's own: none for each of them
    finally:
        for one in idle:
            one.close()
    until(lambda: tcp.nr_fds_now() <= nr_fds)


# TLS: who is who.


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Iterator[Callable[[str], str]]:
    """A daemon with an image of tenant a, one of everybody and one of alice; gives URIs by name."""
    files = authority.issue("server", "IP:127.0.0.1")
    names = {name: authority.issue(name, f"DNS:{name}.example") for name in NAMES}
    with new_run_dir() as run_dir:
        image = write_image(run_dir / "image.raw", SIZE)
        (run_dir / "c.toml").write_text(TLS_CONFIG.format(image=image, **files))
        daemon = Daemon(run_dir, [f"--config={run_dir}/c.toml", "--no-keeper", "--verbose"])
        daemon.wait_ready()
        try:
            yield (
                lambda name, **changes: (
                    f"{listening(daemon)}?{urlencode({**names[name], **changes})}"
                )
            )
        finally:
            daemon.kill()


NAMES = ("alice", "bob", "carol")
TLS_CONFIG = """
listen = ["tls://127.0.0.1:0"]
[tls]
cert = "{cert}"
key = "{key}"
ca = "{ca}"
[images]
all = "{image}"
[[image]]
name = "hers"
source = "{image}"
clients = ["alice.example"]
[[image]]
name = "secret"
source = "{image}"
domain = "a"
[domains.a]
clients = ["bob.example"]
"""


def test_the_name_in_a_certificate_says_which_images_there_are(tls: Callable[[str], str]) -> None:
    seen = {}
    for name in NAMES:
        with connect(tls(name)) as backend, pytest.raises(UsageError) as caught:
            backend.open("none")
        seen[name] = str(caught.value).partition("there is ")[2]
    assert seen == {"alice": "all, hers", "bob": "secret", "carol": "all"}
    with connect(tls("bob")) as backend, backend.open("secret") as disk:
        assert len(disk.read(0, SIZE)) == SIZE


def test_a_token_is_worth_nothing_with_another_certificate(tls: Callable[[str], str]) -> None:
    with connect(tls("alice")) as backend:
        backend.open("all", guest="g", token="t").close()
    with connect(tls("carol")) as backend, pytest.raises(UsageError, match="taken"):
        backend.open("all", guest="g", token="t")
    with connect(tls("alice")) as backend:
        backend.open("all", guest="g", token="t").close()


def test_strangers_are_turned_away_in_both_directions(
    tls: Callable[..., str], authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "other", "other authority").issue("alice", "DNS:alice.example")
    with pytest.raises(PeerError, match="TLS"):
        connect(tls("alice", cert=stranger["cert"], key=stranger["key"]))
    with pytest.raises(PeerError, match="certificate is not valid: "):
        connect(tls("alice", ca=stranger["ca"]))
    with pytest.raises(PeerError, match=r"certificate is not valid: .*mismatch"):
        connect(tls("alice", server_name="elsewhere.example"))
    # Without any certificate; and without TLS.
    where = tls("alice").partition("?")[0]
    context = ssl.create_default_context(cafile=str(authority.ca))
    with (
        contextlib.suppress(ssl.SSLError, ConnectionError),
        raw(where) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as bare,
    ):
        bare.sendall(HELLO)
        assert bare.recv(100) == b""
    with pytest.raises(PeerError):
        connect(where.replace("tls:", "tcp:"))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("unix:///tmp/x", "use tcp://, tls:// or vsock://"),
        ("tcp://127.0.0.1", "names no port"),
        ("tls://127.0.0.1:0", "lacks cert, key, ca"),
        ("tcp://127.0.0.1:0?x=1", "unknown option 'x'"),
    ],
)
def test_a_place_that_cannot_be_listened_at_is_told_in_one_line(
    uri: str, words: str, run_dir: Path, make_image: MakeImage
) -> None:
    image = f"disk={make_image(SIZE)}"
    done = cowshed("serve", "--run-dir", run_dir, "--image", image, "--no-keeper", "--listen", uri)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]


def test_plain_tcp_for_everybody_is_warned_of(
    start_daemon: StartDaemon, make_image: MakeImage
) -> None:
    image = make_image(SIZE)
    daemon = start_daemon(f"--image=disk={image}", "--listen=tcp://0.0.0.0:0", "--no-keeper")
    daemon.wait_logged("event=listening-open")
