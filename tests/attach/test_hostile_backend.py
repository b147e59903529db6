# SPDX-License-Identifier: Apache-2.0
"""A backend that answers wrongly costs a program that mapping, said in a line, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import ANSWER_SECONDS, plain_environment

from cowshed.faults import uffd_features
from cowshed.transport.guest import preloading
from cowshed.transport.messages.protocol import HEADER, MAGIC

pytestmark = pytest.mark.slow

PAGE = 4096
MAX_FDS = 4
UFFDIO_UNREGISTER = 0x8010AA01
NR_BYTES = 16 * PAGE
HELLO = {"ok": True, "version": 1}
OPENED = {
    "ok": True,
    "size_bytes": NR_BYTES,
    "map_bytes": NR_BYTES,
    "extent_bytes": PAGE,
    "uffd_features": uffd_features(),
    "digest": None,
    "guest": "g",
}
# Maps, is refused, and reads the file instead, as a careful program would.
PROGRAM = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    try:
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        print("refused")
    print(file.read() == open(sys.argv[2], "rb").read())
"""
# Given the connection and what was asked there.
Answer = Callable[[socket.socket, bytes], None]
TAG_ASKED = 0xA5A5A5A5  # in a packet: the tag of what was asked


def packet(body: object, nr_fds: int = 0, **changes: int) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {
        "magic": MAGIC,
        "version": 1,
        "flags": 0,
        "tag": TAG_ASKED,
        "nr_fds": nr_fds,
        "reserved": 0,
        "total_length": len(text),
        "piece_length": len(text),
        **changes,
    }
    return HEADER.pack(*fields.values()) + text


def saying(given: bytes, fds: tuple[int, ...] = ()) -> Answer:
    def say(peer: socket.socket, asked: bytes) -> None:
        tag = HEADER.unpack_from(asked)[3]
        answer = given.replace(struct.pack("=I", TAG_ASKED), struct.pack("=I", tag))
        socket.send_fds(peer, [answer], fds)

    return say


def hanging_up(peer: socket.socket, _: bytes) -> None:
    peer.close()


class Backend:
    """Answers a connection's requests with one thing each, then hangs up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[Answer] = []
        self.asked = b""
        self.fds: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                for answer in self.answers:
                    if peer.fileno() < 0:
                        break
                    self.asked, fds, _, _ = socket.recv_fds(peer, 1 << 16, MAX_FDS)
                    self.fds += fds
                    if not self.asked:
                        break
                    answer(peer, self.asked)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def backend(run_dir: Path) -> Iterator[Backend]:
    backend = Backend(run_dir / "socket")
    yield backend
    backend.close()


def config_for(path: Path, source: Path) -> dict[str, str]:
    return preloading.environment(
        plain_environment(),
        preloading.library_path(),
        path,
        preloading.Source(-1, NR_BYTES),
        str(source),
        {"image": "disk", "guest": "g"},
    )


def run(path: Path, source: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["python3", "-Wignore", "-c", PROGRAM, source, source],
        env=config_for(path, source),
        capture_output=True,
        text=True,
        timeout=ANSWER_SECONDS,
        check=False,
    )


def check_refused(ended: subprocess.CompletedProcess[str]) -> None:
    assert (ended.returncode, ended.stdout) == (0, "refused\nTrue\n"), ended
    assert ended.stderr.startswith("cowshed: attach: no mapping of the image: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.strip().isprintable()


@pytest.fixture
def source(run_dir: Path) -> Path:
    path = run_dir / "image.raw"
    path.write_bytes(random.randbytes(NR_BYTES))
    return path


@pytest.fixture
def frames() -> Iterator[int]:
    fd = os.memfd_create("frames")
    os.ftruncate(fd, NR_BYTES)
    yield fd
    os.close(fd)


REFUSED = {"ok": False, "error": {"kind": "usage", "message": "no \x1b[2J\n\u2603 today"}}


@pytest.mark.parametrize(
    "answer",
    [
        hanging_up,
        saying(b"x"),
        saying(packet(HELLO)[:-1]),
        saying(packet(HELLO, magic=1)),
        saying(packet(HELLO, version=2)),
        saying(packet(HELLO, flags=1)),
        saying(packet(HELLO, tag=2)),
        saying(packet(HELLO, nr_fds=1)),
        saying(packet(HELLO, total_length=1 << 31)),
        saying(packet(b"x" * 40000)),
        saying(packet(b"{" * 1000)),
        saying(packet({})),
        saying(packet({"ok": False})),
        saying(packet({"ok": False, "error": "no"})),
        saying(packet(REFUSED)),
    ],
)
def test_a_wrong_greeting(backend: Backend, source: Path, answer: Answer) -> None:
    backend.answers = [answer]
    check_refused(run(backend.path, source))


@pytest.mark.parametrize(
    "change",
    [
        {"map_bytes": 1 << 62},
        {"map_bytes": "many"},
        {"uffd_features": None},
        {"uffd_features": (1 << 63) - 1},
        {"ok": "true"},
    ],
)
def test_a_wrong_opening(
    backend: Backend, source: Path, frames: int, change: dict[str, object]
) -> None:
    backend.answers = [saying(packet(HELLO)), saying(packet({**OPENED, **change}, 1), (frames,))]
    check_refused(run(backend.path, source))


@pytest.mark.parametrize("nr_fds", [0, 3, 4, 8])
def test_an_opening_with_a_wrong_number_of_descriptors(
    backend: Backend, source: Path, frames: int, nr_fds: int
) -> None:
    backend.answers = [
        saying(packet(HELLO)),
        saying(packet(OPENED, nr_fds), (frames,) * nr_fds),
    ]
    check_refused(run(backend.path, source))


def test_frames_that_are_shorter_than_the_image(
    backend: Backend, source: Path, frames: int
) -> None:
    os.ftruncate(frames, PAGE)
    backend.answers = [saying(packet(HELLO)), saying(packet(OPENED, 1), (frames,))]
    check_refused(run(backend.path, source))


@pytest.mark.parametrize("answer", [hanging_up, saying(packet({"ok": 1})), saying(packet(REFUSED))])
def test_a_region_that_is_not_taken_on(
    backend: Backend, source: Path, frames: int, answer: Answer
) -> None:
    backend.answers = [saying(packet(HELLO)), saying(packet(OPENED, 1), (frames,)), answer]
    check_refused(run(backend.path, source))
    assert os.fstat(frames).st_blocks == 0  # nobody touched them


def test_random_answers(backend: Backend, source: Path, frames: int, rng: random.Random) -> None:
    for _ in range(8):
        wrong = bytearray(packet(rng.choice([HELLO, OPENED]), 0))
        for _ in range(rng.randrange(1, 4)):
            wrong[rng.randrange(len(wrong))] = rng.randrange(256)
        backend.answers = [
            *([saying(packet(HELLO))] if rng.random() < 0.5 else []),
            saying(bytes(wrong)),
        ]
        check_refused(run(backend.path, source))


# A second thread looks at a mapping once its end has been said, and before munmap returns.
LATE_READER = """
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
fd = os.open(sys.argv[1], os.O_RDONLY)
at = libc.mmap(None, ctypes.c_size_t(65536), mmap.PROT_READ, mmap.MAP_PRIVATE, fd, ctypes.c_long(0))
def look():
    os.read(0, 1)
    print(ctypes.string_at(at + 8192, 1), flush=True)
threading.Thread(target=look, daemon=True).start()
libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(65536))
"""


def test_nobody_sees_pages_that_the_backend_has_let_go_of(
    backend: Backend, source: Path, frames: int
) -> None:
    woken, waking = os.pipe()

    def take_region(peer: socket.socket, asked: bytes) -> None:
        region.update(json.loads(asked[HEADER.size :]))
        saying(packet({"ok": True}))(peer, asked)

    def let_go(peer: socket.socket, _: bytes) -> None:
        uffd = backend.fds[0]
        fcntl.ioctl(uffd, UFFDIO_UNREGISTER, struct.pack("QQ", region["address"], NR_BYTES))
        os.write(waking, b"!")
        peer.recv(1)

    region: dict[str, int] = {}
    backend.answers = [
        saying(packet(HELLO)),
        saying(packet(OPENED, 1), (frames,)),
        take_region,
        let_go,
    ]
    ended = subprocess.run(
        ["python3", "-c", LATE_READER, source],
        env=config_for(backend.path, source),
        stdin=woken,
        capture_output=True,
        timeout=ANSWER_SECONDS,
        check=False,
    )
    os.close(woken)
    os.close(waking)
    assert (ended.returncode, ended.stdout) == (-signal.SIGSEGV, b""), ended


@pytest.mark.parametrize("tag", [0, 1])
def test_what_a_backend_said_before_it_hung_up_unasked_is_the_reason(
    run_dir: Path, source: Path, tag: int
) -> None:
    """It has no room, and reads nothing of what is sent to it."""
    full = {"ok": False, "error": {"kind": "capacity", "message": "no room for another guest: x"}}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(run_dir / "full"))
        listener.listen()

        def turn_away() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.send(packet(full, tag=tag))
                if tag:  # once with its request unread, once perhaps before it is sent
                    select.select([peer], [], [])

        thread = threading.Thread(target=turn_away, daemon=True)
        thread.start()
        ended = run(run_dir / "full", source)
        thread.join()
    check_refused(ended)
    assert "the backend refused it: no room for another guest: x" in ended.stderr
