# SPDX-License-Identifier: Apache-2.0
"""The client that reads and writes by bytes, against nbdkit: a server that nobody here wrote."""

import contextlib
import errno
import os
import random
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from block_peers import nbd_dial, nbdkit
from domains import until

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.guest.byte_disk import ByteDisk, Dialled
from cowshed.transport.nbd.block_link import BlockOp, Kind
from cowshed.transport.nbd.block_pump import BlockPump

SIZE = 8 << 20
SECONDS = 60.0
# Of one call that is to fail for it, and of nothing that a slow server is to answer.
SHORT_SECONDS = 0.3


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cs-") as folder:
        yield Path(folder) / "nbd"


@pytest.fixture
def content(rng: random.Random) -> bytes:
    return rng.randbytes(SIZE)


@pytest.fixture
def file(path: Path, content: bytes) -> Path:
    file = path.parent / "disk"
    file.write_bytes(content)
    return file


def open_disk(path: Path, **options: float) -> ByteDisk:
    structured = bool(options.pop("structured", True))
    return ByteDisk(
        lambda timeout: _dial(path, timeout, structured),
        "disk",
        "g",
        timeout=options.pop("timeout", SECONDS),
        readahead_bytes=int(options.pop("readahead_bytes", 4 << 20)),
    )


def _dial(path: Path, timeout: float, structured: bool) -> Dialled:
    try:
        return nbd_dial(path, timeout, structured=structured)
    except OSError as error:
        raise PeerError(str(error)) from error


@pytest.mark.parametrize("structured", [True, False])
def test_reads_and_writes_are_a_files(
    path: Path, file: Path, content: bytes, rng: random.Random, structured: bool
) -> None:
    model = bytearray(content)
    with nbdkit(path, "file", str(file)), open_disk(path, structured=structured) as disk:
        assert (disk.mapped, disk.alive, disk.size_bytes) == (False, True, SIZE)
        for _ in range(300):
            offset = rng.randrange(SIZE)
            length = min(SIZE - offset, int(4 ** rng.uniform(0, 11)))
            if rng.random() < 0.5:
                assert disk.read(offset, length) == model[offset : offset + length]
            else:
                data = rng.randbytes(length)
                assert disk.write(offset, data) == length
                model[offset : offset + length] = data
        assert disk.read(0, SIZE) == model
        disk.flush()
        disk.discard(0, 4096)  # for nbdkit, zeros
    assert file.read_bytes() == bytes(4096) + model[4096:]


def test_sequential_reads_mixed_with_writes_are_never_stale(
    path: Path, file: Path, content: bytes, rng: random.Random
) -> None:
    model = bytearray(content)
    with nbdkit(path, "file", str(file)), open_disk(path) as disk:
        for _ in range(3):
            at = 0
            while at < SIZE:
                length = min(SIZE - at, rng.randrange(1, 200_000))
                assert disk.read(at, length) == model[at : at + length]
                at += length
                if rng.random() < 0.3:
                    ahead = min(SIZE - 1, at + rng.randrange(1 << 20))
                    data = rng.randbytes(min(5000, SIZE - ahead))
                    disk.write(ahead, data)
                    model[ahead : ahead + len(data)] = data
        assert disk.read(0, SIZE) == model


def test_threads_share_one_connection(
    path: Path, file: Path, content: bytes, rng: random.Random
) -> None:
    wrong: list[object] = []
    seeds = [rng.random() for _ in range(8)]

    def work(disk: ByteDisk, no: int) -> None:
        mine = random.Random(seeds[no])
        base, model = no << 20, bytearray(content[no << 20 : (no + 1) << 20])
        try:
            for _ in range(60):
                at = mine.randrange(1 << 20)
                length = min((1 << 20) - at, mine.randrange(1, 50_000))
                if mine.random() < 0.5:
                    assert disk.read(base + at, length) == model[at : at + length]
                else:
                    data = mine.randbytes(length)
                    disk.write(base + at, data)
                    model[at : at + length] = data
        except BaseException as error:
            wrong.append(error)

    slow = ("--filter=delay", "file", str(file), "delay-read=1ms")
    with nbdkit(path, *slow), open_disk(path) as disk:
        threads = [threading.Thread(target=work, args=[disk, no]) for no in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert not wrong


def test_pieces_are_kept_in_flight(path: Path, file: Path, content: bytes) -> None:
    log = path.parent / "log"
    paused = ("--filter=log", "--filter=pause", "file", str(file))
    options = (f"logfile={log}", f"pause-control={path}.ctl")
    got: list[bytes] = []
    with (
        nbdkit(path, *paused, *options),
        open_disk(path) as disk,
        socket.socket(socket.AF_UNIX) as control,
    ):
        control.connect(f"{path}.ctl")
        control.sendall(b"p")
        assert control.recv(1) == b"P"
        reader = threading.Thread(target=lambda: got.append(disk.read(0, SIZE)))
        reader.start()
        # None is answered, so whatever was begun is under way.
        until(lambda: log.read_text().count(" Read ") >= SIZE // (512 << 10) // 2)
        control.sendall(b"r")
        assert control.recv(1) == b"R"
        reader.join()
    assert got == [content]


def test_sequential_reads_are_asked_for_ahead(path: Path, file: Path, content: bytes) -> None:
    log = path.parent / "log"
    sequential = range(0, 1 << 20, 4096)
    backwards = range(SIZE - 4096, SIZE - (256 << 10), -8192)
    logged = ("--filter=log", "file", str(file), f"logfile={log}")
    with nbdkit(path, *logged), open_disk(path) as disk:
        for at in (*sequential, *backwards):
            assert disk.read(at, 4096) == content[at : at + 4096]
    # Told apart by their offsets: what was asked for ahead may be read at any time until now.
    reads = re.findall(r" Read .*?offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", log.read_text())
    places = [(int(at, 16), int(length, 16)) for at, length in reads]
    by_place = [place for place in places if place[0] >= backwards[-1]]
    assert len(places) - len(by_place) < 40  # instead of 256
    assert by_place == [(at, 4096) for at in backwards]


def test_errors_name_the_place_and_leave_the_disk_usable(path: Path, file: Path) -> None:
    trigger = path.parent / "trigger"
    options = ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    with nbdkit(path, "--filter=error", "file", str(file), *options), open_disk(path) as disk:
        trigger.touch()
        with pytest.raises(OSError, match="read of 10 bytes at 4096 of image 'disk'") as caught:
            disk.read(4096, 10)
        assert caught.value.errno == errno.EIO
        trigger.unlink()
        assert len(disk.read(4096, 10)) == 10


def test_no_space_is_enospc(path: Path, file: Path) -> None:
    options = ["error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    with nbdkit(path, "--filter=error", "file", str(file), *options), open_disk(path) as disk:
        with pytest.raises(OSError, match="write") as caught:
            disk.write(0, b"x")
        assert caught.value.errno == errno.ENOSPC


def test_ranges_are_checked_here(path: Path, file: Path) -> None:
    with nbdkit(path, "file", str(file)), open_disk(path) as disk:
        calls: list[Callable[[], object]] = [
            lambda: disk.read(SIZE, 1),
            lambda: disk.read(-1, 1),
            lambda: disk.write(SIZE - 1, b"ab"),
            lambda: disk.discard(0, SIZE + 4096),
        ]
        for call in calls:
            with pytest.raises(UsageError, match="outside image 'disk'"):
                call()
        with pytest.raises(UsageError, match="whole 4096-byte pages"):
            disk.discard(1, 4096)
        with pytest.raises(UsageError, match="no view"):
            _ = disk.view
        assert (disk.read(SIZE, 0), disk.write(0, b"")) == (b"", 0)
    with pytest.raises(UsageError, match="closed"):
        disk.read(0, 1)


def test_a_server_that_comes_back_is_found_again(
    path: Path, file: Path, content: bytes, rng: random.Random
) -> None:
    data = rng.randbytes(100_000)
    results: list[object] = []
    with nbdkit(path, "file", str(file)):
        disk = open_disk(path)
        disk.write(5000, data)
    with disk:
        for _ in range(3):
            with nbdkit(path, "file", str(file)):
                assert disk.read(0, 200_000) == content[:5000] + data + content[105_000:200_000]
                reader = threading.Thread(target=lambda: results.append(disk.read(0, SIZE)))
                reader.start()
            # Killed under the reader, or just after it; then there is none until the next round.
            with nbdkit(path, "file", str(file)):
                reader.join()
        assert [len(one) for one in results if isinstance(one, bytes)] == [SIZE] * 3


def test_a_server_that_stays_away_is_an_error_in_time(path: Path, file: Path) -> None:
    with nbdkit(path, "file", str(file)):
        disk = open_disk(path)
    with disk:
        with short_of_time(disk), pytest.raises(PeerError, match=r"is gone .*tried for 0\.3 s"):
            disk.read(0, 10)
        assert not disk.alive
        with nbdkit(path, "file", str(file)):
            assert len(disk.read(0, 10)) == 10


def test_a_server_that_falls_silent_is_an_error_in_time(path: Path, file: Path) -> None:
    with (
        nbdkit(path, "--filter=pause", "file", str(file), f"pause-control={path}.ctl"),
        open_disk(path) as disk,
        socket.socket(socket.AF_UNIX) as control,
    ):
        control.connect(f"{path}.ctl")
        control.sendall(b"p")
        assert control.recv(1) == b"P"
        with short_of_time(disk), pytest.raises(PeerError, match=r"no answer in 0\.3 s"):
            disk.read(0, 10)
        control.sendall(b"r")
        assert control.recv(1) == b"R"
        assert len(disk.read(0, 10)) == 10


@contextlib.contextmanager
def short_of_time(disk: ByteDisk) -> Iterator[None]:
    """Have calls inside `with` give up soon."""
    disk._timeout = SHORT_SECONDS
    yield
    disk._timeout = SECONDS


def test_a_changed_image_or_lost_writes_are_never_taken_up(path: Path, file: Path) -> None:
    overlay, generation = "first", "1"

    def dial(timeout: float) -> Dialled:
        made = nbd_dial(path, timeout)
        return Dialled(made.sock, made.size_bytes, generation=generation, overlay=overlay)

    def lose_connection(disk: ByteDisk) -> None:
        assert disk._pump is not None
        disk._pump.close()

    with nbdkit(path, "file", str(file)):
        with ByteDisk(dial, "disk", "g", timeout=SECONDS) as disk:
            overlay = "second"
            lose_connection(disk)
            assert len(disk.read(0, 10)) == 10  # nothing was written: nothing is lost
            disk.write(0, b"mine")
            overlay = "third"
            lose_connection(disk)
            for _ in range(2):
                with pytest.raises(PeerError, match="lost what guest 'g' wrote"):
                    disk.read(0, 10)
        with ByteDisk(dial, "disk", "g", timeout=SECONDS) as disk:
            generation = "2"
            lose_connection(disk)
            with pytest.raises(PeerError, match="was replaced"):
                disk.read(0, 10)


def test_a_forked_child_refuses_and_the_parent_goes_on(path: Path, file: Path) -> None:
    with nbdkit(path, "file", str(file)), open_disk(path) as disk:
        disk.read(0, 10)
        if (child := os.fork()) == 0:
            try:
                disk.read(0, 10)
            except UsageError as error:
                os._exit(7 if "fork" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert len(disk.read(0, 10)) == 10


def test_closing_ends_the_calls_of_other_threads(path: Path, file: Path) -> None:
    with nbdkit(path, "--filter=delay", "file", str(file), "delay-read=600"):
        disk = open_disk(path)
        caught: list[BaseException] = []

        def read() -> None:
            try:
                disk.read(0, 10)
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        pump = disk._pump
        assert pump is not None
        until(lambda: pump._link.nr_flying > 0)
        disk.close()
        thread.join()
        assert isinstance(caught[0], UsageError)


def test_a_pump_bounds_what_flies(path: Path, file: Path) -> None:
    with nbdkit(path, "file", str(file)):
        pump = BlockPump(nbd_dial(path, SECONDS).sock)
        ops = [
            BlockOp(Kind.READ, 0, SIZE // 2, memoryview(bytearray(SIZE // 2))) for _ in range(20)
        ]
        pump.queue(ops)
        assert pump._flying_bytes <= 16 << 20
        pump.run(ops, SECONDS)
        assert (pump._flying_bytes, pump._link.nr_flying) == (0, 0)
        pump.close(politely=True)
