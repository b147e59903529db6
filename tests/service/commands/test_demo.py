# SPDX-License-Identifier: Apache-2.0
"""`make demo`: what it shows when all is right, and that it says so when something is not."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from domains import NOBODY, MakeImage

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))

from demo import wrong_answers
from demo_crowd import Backend, Crowd
from demo_guest import (
    ORDERS,
    PIECE_BYTES,
    SLOT_BYTES,
    Checker,
    Writes,
    count_wrong,
    visiting_order,
)
from demo_image import make_image as make_ext4_image
from demo_stage import DemoError

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[3] / "bench"
MIB = 1 << 20
SMALL = ["--guests", "4", "--size", "32M", "--capacity", "12M"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it runs guests as nobody")


def start_demo(
    folder: Path, *arguments: str, stdout: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(BENCH / "demo.py"), *arguments],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_root
def test_a_small_demo_finds_no_wrong_byte_and_leaves_nothing_behind(run_dir: Path) -> None:
    with start_demo(run_dir, *SMALL) as demo:
        output, errors = demo.communicate()
    assert demo.returncode == 0, output + errors
    assert "All is right: wrong bytes: 0." in output
    assert errors == ""
    assert max(map(len, output.splitlines())) <= 80
    assert list(run_dir.iterdir()) == []


@needs_root
def test_an_interrupted_demo_leaves_no_file_and_no_process(run_dir: Path) -> None:
    # A pipe with room for one write: the demo waits in its next line but one for its reader.
    reader, writer = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    with (
        start_demo(run_dir, *SMALL, stdout=writer) as demo,
        os.fdopen(reader, closefd=True) as lines,
    ):
        os.close(writer)
        pid = next(
            int(line.split("process ")[1].split(",")[0]) for line in lines if "-> process" in line
        )
        backend = os.pidfd_open(pid)
        demo.send_signal(signal.SIGINT)
        lines.read()
        _, errors = demo.communicate()
    assert demo.returncode == 128 + signal.SIGINT
    assert errors == "demo: interrupted; what it made is removed\n"
    assert list(run_dir.iterdir()) == []
    assert select.select([backend], [], [], 0)[0], "the backend outlived the demo"
    os.close(backend)


def test_arguments_that_cannot_work_are_one_line_and_a_failure(run_dir: Path) -> None:
    with start_demo(run_dir, "--size", "1M") as demo:
        output, errors = demo.communicate()
    assert (demo.returncode, output) == (1, "")
    assert errors.startswith("demo: ")
    assert errors.count("\n") == 1


def test_the_image_is_sound_ext4_of_the_size_asked_for_and_mostly_full(tmp_path: Path) -> None:
    made = make_ext4_image(tmp_path, 16 * MIB)
    assert made.path.stat().st_size == made.size_bytes == 16 * MIB
    assert made.path.read_bytes()[1024 + 56 : 1024 + 58] == b"\x53\xef"
    assert made.content_bytes > 14 * MIB
    assert list(tmp_path.iterdir()) == [made.path]
    check = subprocess.run(["/sbin/e2fsck", "-f", "-n", made.path], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.fixture
def image_fd(make_image: MakeImage) -> Iterator[int]:
    fd = os.open(make_image(2 * MIB), os.O_RDONLY)
    yield fd
    os.close(fd)


def test_one_corrupted_byte_is_counted_and_found(image_fd: int) -> None:
    def read(offset: int, length: int) -> bytes:
        data = bytearray(os.pread(image_fd, length, offset))
        if offset <= MIB + 77 < offset + length:
            data[MIB + 77 - offset] ^= 1
        return bytes(data)

    checker = Checker(read, image_fd)
    checker.check(0, MIB)
    assert (checker.wrong_bytes, checker.first_wrong) == (0, None)
    checker.check(MIB, MIB)
    assert (checker.wrong_bytes, checker.first_wrong) == (1, MIB + 77)
    answers = [{"wrong_bytes": 0, "first_wrong": None}, {"wrong_bytes": 1, "first_wrong": 77}]
    assert wrong_answers(answers) == ["guest 2 found 1 wrong bytes, the first at 77"]


def test_bytes_that_are_missing_are_wrong() -> None:
    assert count_wrong(b"abc", bytearray(b"abcd")) == 1


def test_a_guest_wants_its_own_bytes_where_it_wrote_and_the_files_elsewhere(
    image_fd: int, rng: random.Random
) -> None:
    writes = Writes(rng.randrange(1000), 3, 2 * MIB, MIB // 2)
    whole = bytearray(os.pread(image_fd, 2 * MIB, 0))
    for slot, at in writes.pieces.items():
        assert slot * SLOT_BYTES <= at <= (slot + 1) * SLOT_BYTES - PIECE_BYTES
        whole[at : at + PIECE_BYTES] = writes.content(slot)
    checker = Checker(lambda *_: b"", image_fd)
    checker.writes = writes
    for _ in range(50):
        offset = rng.randrange(2 * MIB)
        length = rng.randrange(2 * MIB - offset)
        assert checker.wanted(offset, length) == whole[offset : offset + length]


def test_guests_write_different_bytes_partly_to_the_same_slots() -> None:
    one, other = (Writes(5, number, 64 * MIB, 4 * MIB) for number in (0, 1))
    shared = one.pieces.keys() & other.pieces.keys()
    assert len(shared) >= len(one.pieces) // 4
    assert all(one.content(slot) != other.content(slot) for slot in shared)


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_visits_each_byte_once(name: str, rng: random.Random) -> None:
    size_bytes = 5 * MIB + 4096
    orders = [list(visiting_order(name, size_bytes, rng)) for _ in range(10)]
    assert any(chunks != sorted(chunks) for chunks in orders)  # forward may begin at the front
    for chunks in orders:
        at = 0
        for offset, length in sorted(chunks):
            assert offset == at
            at += length
        assert at == size_bytes


@pytest.fixture
def crowd(run_dir: Path, make_image: MakeImage) -> Iterator[Crowd]:
    """Two guests of an image, attached; the file they compare with has one other byte."""
    image = make_image(4 * MIB)
    other = make_image(4 * MIB, "other.raw")
    with other.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"\xff")
    with ExitStack() as stack:
        backend = stack.enter_context(Backend(image, 2 * MIB, run_dir))
        backend.wait_ready()
        crowd = stack.enter_context(Crowd(backend, run_dir / "guests.log"))
        terms = {"uri": backend.uri, "image": "demo", "uid": NOBODY, "seed": 1, "write_bytes": MIB}
        with other.open("rb") as file:
            crowd.start(2, terms, file.fileno())
        crowd.gather()
        yield crowd


@needs_root
def test_guests_find_the_one_byte_that_differs_from_the_file(crowd: Crowd) -> None:
    crowd.order("check")
    assert crowd.gather() == [{"wrong_bytes": 1, "first_wrong": 3 * MIB}] * 2
    crowd.order("end")
    assert crowd.gather() == [{}, {}]


@needs_root
def test_a_guest_that_dies_is_named(crowd: Crowd) -> None:
    os.kill(crowd.pids[1], signal.SIGKILL)
    crowd.order("check")
    with pytest.raises(DemoError, match="guest 2 ended by SIGKILL"):
        crowd.gather()


@needs_root
def test_a_guest_that_fails_says_why(crowd: Crowd, run_dir: Path) -> None:
    os.truncate(run_dir / "other.raw", MIB)
    crowd.order("check")
    with pytest.raises(DemoError, match=r"guest .: EOFError: the image file ends at"):
        crowd.gather()
