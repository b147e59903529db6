# SPDX-License-Identifier: Apache-2.0
"""What a load brings: the source's bytes exactly, or nothing; and what it leaves behind."""

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os
from pathlib import Path

import pytest
from stage import PAGE, MakeStage, Stage, content

from cowshed.cache import ExtentState, FileSource, PageStore, SourceError

libc = ctypes.CDLL(None, use_errno=True)


def cached_pages(path: Path) -> int:
    """How many pages of a file the kernel's page cache holds."""
    length = path.stat().st_size
    nr_pages = -(-length // PAGE)
    vector = (ctypes.c_ubyte * nr_pages)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), length) as mapping:
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), vector) == 0
    return sum(entry & 1 for entry in vector)


def nr_open_below(folder: Path) -> int:
    """How many descriptors of this process lead there; others come and go meanwhile."""
    nr = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            nr += Path(os.readlink(fd)).is_relative_to(folder)
    return nr


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("cut_bytes", [0, 1, 100, 4095])
@pytest.mark.parametrize("nr_pages", [1, 16, 17, 33])
def test_the_last_page_and_the_last_extent_may_be_partial(
    tmp_path: Path, nr_pages: int, cut_bytes: int, direct: bool
) -> None:
    path = tmp_path / "image.raw"
    size_bytes = nr_pages * PAGE - cut_bytes
    path.write_bytes(content(0, nr_pages)[:size_bytes])
    source = FileSource.open(path)
    if not direct:
        if source.direct_fd >= 0:
            os.close(source.direct_fd)
        source = dataclasses.replace(source, direct_fd=-1)
    with PageStore(64 * PAGE) as store:
        image = store.open_image("disk", source)
        assert (image.size_bytes, image.map_bytes) == (size_bytes, nr_pages * PAGE)
        assert image.prefetch(0, image.nr_extents) + image.prefetch(0, image.nr_extents) >= 1
        while ExtentState.ABSENT in image.states():
            image.wait_loaded(0, image.nr_extents, 60_000)
            image.prefetch(0, image.nr_extents)
        assert image.wait_loaded(0, image.nr_extents, 60_000)
        found = os.pread(image.frames_fd, image.map_bytes, 0)
        assert found == content(0, nr_pages)[:size_bytes] + bytes(cut_bytes)
        assert image.resident_bytes == image.map_bytes
        assert os.fstat(image.frames_fd).st_blocks * 512 == image.map_bytes
        assert image.counters().load_bytes == size_bytes


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_a_load_leaves_no_second_copy_in_the_page_cache(tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(content(0, 64))
    drop_cache(path)
    assert cached_pages(path) == 0
    source = FileSource.open(path)
    if direct and source.direct_fd < 0:
        pytest.skip(f"the file system of {tmp_path} has no O_DIRECT")
    if not direct and source.direct_fd >= 0:
        os.close(source.direct_fd)
        source = dataclasses.replace(source, direct_fd=-1)
    with PageStore(64 * PAGE) as store:
        image = store.open_image("disk", source)
        image.prefetch(1, 1)
        assert image.wait_loaded(0, 4, 60_000)
        assert os.pread(image.frames_fd, PAGE, 16 * PAGE) == content(16)
        assert cached_pages(path) == 0


def test_a_file_system_that_refuses_a_direct_read_gets_a_buffered_one(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(content(0, 16))
    source = FileSource.open(path)
    if source.direct_fd >= 0:
        os.close(source.direct_fd)
    refusing = os.open("/dev/userfaultfd", os.O_RDONLY)  # a file without reads: EINVAL
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        os.pread(refusing, PAGE, 0)
    with PageStore(64 * PAGE) as store:
        image = store.open_image("disk", dataclasses.replace(source, direct_fd=refusing))
        image.prefetch(0, 1)
        assert image.wait_loaded(0, 1, 60_000)
        assert os.pread(image.frames_fd, PAGE, 0) == content(0)


def test_a_source_that_shrank_fails_past_its_new_end_and_nowhere_else(stage: Stage) -> None:
    stage.load(0, 1)
    os.truncate(stage.path, 3 * 16 * PAGE + 100)
    for extent in (1, 2, 3, 5):
        stage.image.prefetch(extent, 1)
        assert stage.image.wait_loaded(0, 8, 60_000)
    states = [ExtentState(state).name for state in stage.image.states()]
    assert states == ["RESIDENT"] * 3 + ["ABSENT"] * 5
    assert stage.image.counters().load_errors == 2
    assert stage.image.counters().load_retries == 0  # it is no passing error
    assert stage.frame(48) == bytes(PAGE)  # not even the 100 bytes that are there
    assert stage.frame(47) == content(47)


def test_one_bad_place_does_not_fail_its_neighbours_in_one_read(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=16 * 16, capacity=160)
    os.truncate(stage.path, 10 * 16 * PAGE)
    stage.image.prefetch(0, 16)
    assert stage.image.wait_loaded(0, 16, 60_000)
    assert list(stage.image.states()) == [ExtentState.RESIDENT] * 10 + [ExtentState.ABSENT] * 6
    assert stage.image.counters().load_errors == 6
    assert stage.audit().mismatches == []


def test_a_changed_source_is_told_once(stage: Stage) -> None:
    assert stage.image.look_at_source() is None
    with stage.path.open("ab") as file:
        file.write(b"more")
    message = stage.image.look_at_source()
    assert message == f"size was {stage.size_bytes} bytes and is {stage.size_bytes + 4}"
    assert stage.image.look_at_source() is None
    assert stage.image.source_change == message


def test_a_source_whose_times_alone_changed_is_the_same(stage: Stage) -> None:
    stage.load(0, 4)
    os.utime(stage.path, ns=(1, 1))
    assert stage.image.look_at_source() is None
    assert stage.image.source.written_ns() == 1 != stage.image.source.identity.mtime_ns
    assert stage.image.content_change(lambda _: "") is None
    stage.image.digest = "sha256:1"
    assert stage.image.content_change(lambda _: "sha256:1") is None


def test_a_source_written_in_place_is_told_by_its_bytes(stage: Stage) -> None:
    stage.load(0, 4)
    with stage.path.open("r+b") as file:
        file.seek(3 * 65536 + 100)
        file.write(b"other")
    assert stage.image.look_at_source() is None
    assert stage.image.content_change(lambda _: "") == "it was written to"
    stage.image.digest = "sha256:1"
    assert stage.image.content_change(lambda _: "sha256:2") == "it was written to"
    assert stage.image.content_change(lambda _: "") is None  # it was stopped


def test_what_cannot_be_an_image_is_refused_in_one_line(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty", tmp_path / "pipe"
    empty.touch()
    os.mkfifo(pipe)
    for path, words in (
        (tmp_path / "none", "name a file that the backend can read"),
        (tmp_path, "neither a file nor a block device"),
        (pipe, "neither a file nor a block device"),
        (empty, "has 0 bytes"),
    ):
        with pytest.raises(SourceError, match=words) as raised:
            FileSource.open(path)
        assert "\n" not in str(raised.value)
        assert str(path) in str(raised.value)
    assert nr_open_below(tmp_path) == 0
