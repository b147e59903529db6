# SPDX-License-Identifier: Apache-2.0
"""Descriptors that a peer chose: whatever looking at one or closing it takes, nobody else waits."""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, paused, until

from cowshed.cache import PeerError
from cowshed.faults import uffd_features
from cowshed.service.frontends.vmm.handshake_peer import HandshakePeer
from cowshed.service.guests.admission import Admission
from cowshed.service.guests.userfaultfd import open_device
from cowshed.transport.links import foreign_fds
from cowshed.transport.links.foreign_fds import close_foreign, device_and_inode
from cowshed.transport.links.unix import connect, listen

MIB = 1 << 20
LINGER_SECONDS = 3600


@pytest.fixture
def daemon(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    return start_daemon("--image", f"d={make_image(MIB)}")


def lingering_pair() -> tuple[socket.socket, socket.socket]:
    """A socket whose last close waits for an hour, and the reader that takes nothing from it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        reader, _ = server.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_SECONDS))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(MIB))
    return sock, reader


@pytest.fixture
def lingering() -> Iterator[socket.socket]:
    """A socket whose last close waits for an hour."""
    sock, reader = lingering_pair()
    with reader:
        yield sock
        sock.close()


def test_a_descriptor_whose_close_waits_holds_up_nobody(
    daemon: Daemon, lingering: socket.socket
) -> None:
    with connect(daemon.uri) as connection:
        with paused(daemon.pid):  # so that the last close is the daemon's
            connection.send({"op": "hello", "version": 1}, [lingering.fileno()])
            lingering.close()
        assert connection.recv(timeout=60)[0]["ok"]
    assert daemon.status()["guests"] == []


def test_a_descriptor_whose_close_waits_holds_up_no_images_socket(
    daemon: Daemon, lingering: socket.socket
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.run_dir / "images" / "d.sock"))
        with paused(daemon.pid):  # so that the last close is the daemon's
            socket.send_fds(sock, [b"{}"], [lingering.fileno()])
            lingering.close()
        assert sock.recv(1) == b""
    assert daemon.status()["guests"] == []


@pytest.fixture
def silent_file(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a FUSE file system that answers nothing, not even what its files are."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"needs the right to mount: {error.strerror}")
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"silent", bytes(tmp_path), b"fuse", 0, options) < 0:
        os.close(device)
        pytest.skip(f"needs the right to mount: {os.strerror(ctypes.get_errno())}")
    fd = os.open(tmp_path, os.O_PATH | os.O_CLOEXEC)
    yield fd
    os.close(device)  # whoever waits for an answer gets an error now
    os.close(fd)
    libc.umount2(bytes(tmp_path), 2)


def test_a_descriptor_that_says_nothing_of_itself_holds_up_nobody(
    daemon: Daemon, silent_file: int
) -> None:
    uffd = open_uffd()
    with connect(daemon.uri) as connection:
        for body in (
            {"op": "hello", "version": 1},
            {"op": "open", "image": "d", "guest": "bad"},
            {"op": "region", "address": 1 << 30, "length": MIB},
        ):
            fds = [uffd, silent_file, silent_file] if body["op"] == "region" else []
            connection.send(body, fds)
            reply, received, _ = connection.recv(timeout=60)
            close_foreign(received)
        assert not reply["ok"]
        assert "own /proc/self/pagemap" in reply["error"]["message"]
    os.close(uffd)
    assert daemon.status()["guests"] == []


def test_what_a_file_is_can_be_told_without_asking_its_server(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/proc/self/pagemap"), Path("/dev/null")):
        fd = os.open(path, os.O_RDONLY)
        about = os.fstat(fd)
        assert device_and_inode(fd) == (about.st_dev, about.st_ino)
        os.close(fd)


@contextlib.contextmanager
def closers_full(monkeypatch: pytest.MonkeyPatch, nr: int) -> Iterator[None]:
    """Have as many descriptors wait to be closed as may, nr of them."""
    monkeypatch.setattr(foreign_fds, "_MAX_WAITING", 1)
    until(lambda: not foreign_fds.is_full())  # what others gave is closed
    monkeypatch.setattr(foreign_fds, "_MAX_WAITING", nr)
    with contextlib.ExitStack() as stack:
        for _ in range(nr):
            assert not foreign_fds.is_full()
            sock, reader = lingering_pair()
            stack.callback(reader.close)  # which ends the wait
            close_foreign([sock.detach()])
        assert foreign_fds.is_full()
        yield
    until(lambda: not foreign_fds.is_full())


def test_a_peer_that_sends_descriptors_while_many_wait_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = f"unix://{tmp_path}/sock"
    with listen(uri) as listener, connect(uri) as peer, connect(uri) as other:
        theirs = [each for each in (listener.accept(), listener.accept()) if each is not None]
        with closers_full(monkeypatch, 3):
            with open(os.devnull) as file:
                peer.send({"op": "hello"}, [file.fileno()])
            with pytest.raises(PeerError, match="wait to be closed"):
                theirs[0].recv(timeout=20)
            other.send({"op": "hello"})
            assert theirs[1].recv(timeout=20)[0] == {"op": "hello"}
            admission = Admission(4096)
            assert "wait to be closed" in admission.enter(1000)
            assert admission.enter(0) == ""
        assert Admission(4096).enter(1000) == ""
        for each in theirs:
            each.close()


def test_a_handshake_with_descriptors_is_refused_while_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    peer = HandshakePeer(ours)
    with theirs, closers_full(monkeypatch, 2), open(os.devnull) as file:
        socket.send_fds(theirs, [b"[]"], [file.fileno()])
        with pytest.raises(PeerError, match="wait to be closed"):
            peer.receive()
    peer.close()


def open_uffd() -> int:
    """A userfaultfd as guests are told to make it."""
    device = open_device()
    assert device is not None
    uffd = fcntl.ioctl(device, 0xAA00, os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(device)
    fcntl.ioctl(uffd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, uffd_features(), 0)))
    return uffd
