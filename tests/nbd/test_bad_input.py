# SPDX-License-Identifier: Apache-2.0
"""Clients that break the protocol, are silent, read nothing or come in floods: it is their loss."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import until
from nbd_site import MIB, SIZE, Site, run

from cowshed.transport.nbd.wire import OPTION_HEADER, OPTION_MAGIC, NbdOption

pytestmark = pytest.mark.slow

REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
READ, WRITE, DISC = 0, 1, 2
SECONDS = 60.0


class Client:
    """A client made by hand; go() leaves it in the transmission phase, with simple replies."""

    def __init__(self, site: Site, *, tcp: bool = False) -> None:
        if tcp:
            self.sock = socket.create_connection(site.address)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(str(site.socket))
        self.sock.settimeout(SECONDS)

    def greet(self) -> Client:
        assert self.receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.sock.sendall(b"\0\0\0\3")
        return self

    def go(self, export: str = "d") -> Client:
        self.greet()
        name = export.encode()
        self.sock.sendall(OPTION_HEADER.pack(OPTION_MAGIC, NbdOption.EXPORT_NAME, len(name)) + name)
        assert struct.unpack(">QH", self.receive(10))[0] == SIZE
        return self

    def ask(self, kind: int, offset: int, length: int, magic: int = REQUEST_MAGIC) -> None:
        self.sock.sendall(REQUEST.pack(magic, 0, kind, 77, offset, length))

    def error(self) -> int:
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert (magic, cookie) == (0x67446698, 77)
        return int(error)

    def receive(self, nr_bytes: int) -> bytes:
        parts = []
        while nr_bytes:
            part = self.sock.recv(min(nr_bytes, 1 << 20))
            assert part, "the server closed"
            parts.append(part)
            nr_bytes -= len(part)
        return b"".join(parts)

    def is_closed(self) -> bool:
        """Whether the server ends the connection, now or soon; what it still says is dropped."""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while self.sock.recv(1 << 16):
                pass
        return True

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@pytest.fixture
def neighbour(site: Site) -> Iterator[Client]:
    """A client that behaves, and must not notice anything."""
    with Client(site).go("d@neighbour") as client:
        client.sock.sendall(REQUEST.pack(REQUEST_MAGIC, 0, WRITE, 77, 4096, 5) + b"hello")
        assert client.error() == 0
        yield client
        client.ask(READ, 4096, 5)
        assert client.error() == 0
        assert client.receive(5) == b"hello"
    assert "raceback" not in site.daemon.log()
    assert site.daemon.mismatches() == []
    assert site.daemon.stop() == 0


def test_broken_handshakes_end_and_are_counted(site: Site, neighbour: Client) -> None:
    for opening in (
        b"\xff\xff\xff\xff",
        b"\0\0\0\3" + b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\3" + OPTION_HEADER.pack(OPTION_MAGIC, NbdOption.EXPORT_NAME, 0xFFFFFFFF),
        b"\0\0\0\3" + OPTION_HEADER.pack(OPTION_MAGIC, NbdOption.EXPORT_NAME, 6) + b"absent",
        b"\0\0\0\2" + OPTION_HEADER.pack(OPTION_MAGIC, NbdOption.LIST, 0),
    ):
        with Client(site) as client:
            client.receive(18)
            client.sock.sendall(opening)
            assert client.is_closed()
    until(lambda: site.daemon.log().count("event=dropped") == 5)


def test_junk_after_the_handshake_ends_that_client(
    site: Site, neighbour: Client, rng: random.Random
) -> None:
    for _ in range(20):
        with Client(site).go(rng.choice(["d", "d@junk"])) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sock.sendall(rng.randbytes(rng.randrange(28, 5000)))
            client.sock.shutdown(socket.SHUT_WR)
            assert client.is_closed()


def test_requests_that_cannot_be_met_are_refused_one_by_one(site: Site, neighbour: Client) -> None:
    with Client(site).go("d@g") as client:
        for kind, offset, length in (
            (READ, SIZE, 1),
            (READ, SIZE - 1, 2),
            (READ, (1 << 64) - 1, 2),
            (READ, 0, 33 * MIB),
            (99, 0, 1),
        ):
            client.ask(kind, offset, length)
            assert client.error() != 0, (kind, offset, length)
        client.sock.sendall(REQUEST.pack(REQUEST_MAGIC, 0, WRITE, 77, SIZE, 512) + bytes(512))
        assert client.error() != 0
        client.ask(READ, 0, 512)
        assert client.error() == 0
        assert client.receive(512) == site.content()[:512]


def test_a_write_too_long_to_take_ends_that_client(site: Site, neighbour: Client) -> None:
    with Client(site).go("d@g") as client:
        client.ask(WRITE, 0, 0xFFFFFFFF)
        assert client.is_closed()


def test_a_client_that_reads_nothing_costs_little_and_holds_up_nobody(
    site: Site, neighbour: Client
) -> None:
    before = site.daemon.resident_set_bytes()
    with Client(site).go() as client:
        client.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(100_000):
                client.ask(READ, 0, MIB)
        for _ in range(20):
            neighbour.ask(READ, 4096, 5)
            assert neighbour.error() == 0
            assert neighbour.receive(5) == b"hello"
        assert site.daemon.resident_set_bytes() - before < 64 * MIB


def test_a_thousand_idle_clients_are_no_burden(site: Site, neighbour: Client) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"needs a limit of 4,096 open files, has {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    threads = site.daemon.nr_threads()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Client(site, tcp=bool(no % 2)).go()) for no in range(1000)]
        neighbour.ask(READ, 4096, 5)
        assert neighbour.error() == 0
        assert neighbour.receive(5) == b"hello"
        assert site.daemon.nr_threads() - threads < 10  # none for each of them
        assert "identical" in run("qemu-img", "compare", str(site.path), site.uri())
        for client in idle[::100]:
            client.ask(READ, 0, 16)
            assert client.error() == 0
            assert client.receive(16) == site.content()[:16]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fds = site.daemon.nr_fds_now
    until(lambda: fds() < 100)


FLOOD = """
import socket, struct, sys
path, held = sys.argv[1], []
name = struct.pack(">IQII", 3, 0x49484156454F5054, 1, 1) + b"d"
for _ in range(2000):
    one = socket.socket(socket.AF_UNIX)
    one.connect(path)
    one.settimeout(60)
    one.recv(18)
    # Who is turned away is hung up on; who is let in has no deadline from now on.
    try:
        one.sendall(name)
        is_in = bool(one.recv(10))
    except (ConnectionResetError, BrokenPipeError):
        is_in = False
    held += [one] * is_in
print(len(held), flush=True)
sys.stdin.read()
"""


def test_a_flood_is_turned_away_and_operators_come_in(
    make_site: Callable[..., Site], nobody: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    site = make_site(before=["prlimit", "--nofile=1024:1024"])
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", FLOOD, str(site.socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user=nobody,
        group=nobody,
        extra_groups=[],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard)),
    ) as flood:
        assert flood.stdout is not None
        nr_held = int(flood.stdout.readline())
        assert 100 < nr_held < 600
        site.daemon.wait_logged("connections open")
        # The same user has no place left; others have, and operators.
        run("nbdinfo", site.uri(), uid=nobody, status=1)
        run("nbdinfo", site.uri(), uid=nobody + 1)
        run("nbdinfo", site.uri("d@root"))
        assert site.daemon.status()["pid"] == site.daemon.pid
        flood.communicate("")
    until(lambda: not _refused(site, nobody))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _refused(site: Site, uid: int) -> bool:
    done = subprocess.run(
        ["nbdinfo", site.uri()], user=uid, group=uid, extra_groups=[], capture_output=True
    )
    return done.returncode != 0


def test_half_open_clients_leave_nothing_behind(site: Site, neighbour: Client) -> None:
    threads = site.daemon.nr_threads()
    for stage in range(3):
        for _ in range(30):
            with Client(site, tcp=True) as client:
                if stage:
                    client.greet()
                if stage == 2:
                    client.sock.sendall(OPTION_HEADER.pack(OPTION_MAGIC, NbdOption.GO, 100)[:10])
                # A reset instead of an orderly end.
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sockets = Path(f"/proc/{site.daemon.pid}/fd")

    def alone() -> bool:
        links = []
        for fd in sockets.iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(fd))
        return sum(link.startswith("socket:") for link in links) <= 5

    until(alone)
    site.daemon.until_threads_end(threads)
