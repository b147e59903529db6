# SPDX-License-Identifier: Apache-2.0
"""What a dead store leaves is another's: resident extents stay, half-done things are undone."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from domains import plain_environment
from stage import EXTENT_PAGES, PAGE, content, loaded

from cowshed.accounting import evict
from cowshed.cache import (
    HUGE_EXTENT_BYTES,
    ExtentState,
    FileSource,
    Image,
    InheritedImage,
    PageStore,
    UsageError,
    probe_huge_frames,
)
from cowshed.cache._core import lib

SCRIPT = Path(__file__).parents[1] / "support" / "doomed_store.py"
EXTENT = EXTENT_PAGES * PAGE
NR_EXTENTS = 8
# The last extent is short, and so is its last page.
SIZE = (NR_EXTENTS - 1) * EXTENT + 3 * PAGE + 100


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(content(0, NR_EXTENTS * EXTENT_PAGES)[:SIZE])
    return path


def image_left_by(
    source: Path,
    point: int = -1,
    end: str = "load",
    capacity: int = 8,
    extent_bytes: int = EXTENT,
) -> InheritedImage:
    """Let a store live and die; give what it left."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arguments = [str(theirs.fileno()), str(source), str(capacity), str(point), end]
    arguments.append(str(extent_bytes))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=plain_environment(),
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    with ours:
        _, fds, _, _ = socket.recv_fds(ours, 16, 3)
        said = ours.recv(16)
    assert process.wait() == -signal.SIGKILL
    assert said == (b"" if point >= 0 else b"done")
    return InheritedImage(*fds)


@contextmanager
def adopted(source: Path, inherited: InheritedImage, capacity: int = 8) -> Iterator[Image]:
    with PageStore(capacity * EXTENT) as store:
        yield store.adopt_image("image", FileSource.open(source), inherited)


def resident(image: Image) -> list[int]:
    return [no for no, state in enumerate(image.states()) if state == ExtentState.RESIDENT]


def check_whole(image: Image, source: Path) -> None:
    """Frames are what the source has, or there are none; and the store can load the rest."""
    expected = source.read_bytes() + bytes(-SIZE % PAGE)
    for no, state in enumerate(image.states()):
        at = no * EXTENT
        frames = os.pread(image.frames_fd, EXTENT, at)
        if state == ExtentState.RESIDENT:
            assert frames == expected[at : at + EXTENT]
        else:
            assert state == ExtentState.ABSENT
            assert not any(frames)
    assert os.fstat(image.frames_fd).st_blocks * 512 == image.resident_bytes
    counters = image.store.counters()
    assert counters.reserved_extents == len(resident(image))
    assert counters.loading_extents == 0


def test_resident_extents_pins_and_totals_outlive_their_process(source: Path) -> None:
    with adopted(source, image_left_by(source)) as image:
        assert resident(image) == [0, 1, 2, 3, 5, 6]
        check_whole(image, source)
        assert list(image.pins()) == [0, 0, 0, 0, 0, 1, 0, 0]
        assert image.store.counters().pinned_extents == 1
        totals = image.counters()
        assert (totals.loads, totals.evictions_request, totals.reloads) == (7, 1, 2)
        assert sorted(image.store.take_events() or []) == loaded(*resident(image))
        for no in (4, 7):
            image.prefetch(no, 1)
            assert image.wait_loaded(no, 1, 60_000)
        assert resident(image) == list(range(NR_EXTENTS))
        check_whole(image, source)
        assert image.counters().loads == 9


@pytest.mark.parametrize("point", ["LOAD_READ", "LOAD_FILL", "LOAD_PUBLISH"])
def test_a_load_cut_short_leaves_no_frame(source: Path, point: str) -> None:
    with adopted(source, image_left_by(source, getattr(lib, f"POINT_{point}"))) as image:
        assert resident(image) == [0, 1, 2, 3, 5]
        check_whole(image, source)


def test_a_load_cut_short_after_it_was_published_is_whole(source: Path) -> None:
    with adopted(source, image_left_by(source, lib.POINT_LOAD_ANSWER)) as image:
        assert resident(image) == [0, 1, 2, 3, 5, 6]
        check_whole(image, source)


@pytest.mark.parametrize("point", ["EVICT_PUNCH", "EVICT_REVOKE"])
def test_an_eviction_cut_short_is_finished(source: Path, point: str) -> None:
    inherited = image_left_by(source, getattr(lib, f"POINT_{point}"), "evict")
    with adopted(source, inherited) as image:
        assert resident(image) == [0, 3, 5]
        check_whole(image, source)


def test_a_smaller_store_takes_as_much_as_it_has_room_for(source: Path) -> None:
    with adopted(source, image_left_by(source), capacity=3) as image:
        assert resident(image) == [0, 1, 2]
        check_whole(image, source)


def test_descriptors_of_another_shape_are_refused_and_stay_the_callers(
    source: Path, tmp_path: Path
) -> None:
    inherited = image_left_by(source)
    longer = tmp_path / "longer"
    longer.write_bytes(bytes(SIZE + EXTENT))
    with PageStore(8 * EXTENT, extent_bytes=2 * EXTENT) as store:
        opened = FileSource.open(source)
        with pytest.raises(UsageError, match="serve it as before"):
            store.adopt_image("image", opened, inherited)
        opened.close()
    with PageStore(8 * EXTENT) as store:
        opened = FileSource.open(longer)
        with pytest.raises(UsageError, match="serve it as before"):
            store.adopt_image("image", opened, inherited)
        opened.close()
        opened = FileSource.open(source)
        swapped = InheritedImage(inherited.arrays_fd, inherited.guest_fd, inherited.frames_fd)
        with pytest.raises(UsageError, match="serve it as before"):
            store.adopt_image("image", opened, swapped)
        opened.close()
    with adopted(source, inherited) as image:
        check_whole(image, source)


@pytest.mark.skipif(probe_huge_frames() is not None, reason="needs to mount a tmpfs: run as root")
def test_extents_of_2_mib_are_adopted_as_far_as_there_is_room_and_with_their_size_only(
    tmp_path: Path,
) -> None:
    source, tail_pages, room = tmp_path / "source", 35, HUGE_EXTENT_BYTES // EXTENT
    size_bytes = 6 * HUGE_EXTENT_BYTES + tail_pages * PAGE
    source.write_bytes(content(0, size_bytes // PAGE))
    left = image_left_by(source, capacity=8 * room, extent_bytes=HUGE_EXTENT_BYTES)
    with PageStore((3 * room + 5) * EXTENT) as store:
        with (
            closing(FileSource.open(source)) as opened,
            pytest.raises(UsageError, match="in extents of 65536"),
        ):
            store.adopt_image("image", opened, left)
        image = store.adopt_image(
            "image", FileSource.open(source), left, extent_bytes=HUGE_EXTENT_BYTES
        )
        # The others were resident, too, but for number 4; the last needs less room.
        assert resident(image) == [0, 1, 2, 6]
        assert store.counters().reserved_extents == 3 * room + 3
        assert os.fstat(image.frames_fd).st_blocks * 512 == image.resident_bytes
        assert image.resident_bytes == 3 * HUGE_EXTENT_BYTES + tail_pages * PAGE
        assert store.counters().pinned_extents == room
        store.check()
        for no in resident(image):
            frames = os.pread(image.frames_fd, HUGE_EXTENT_BYTES, no * HUGE_EXTENT_BYTES)
            assert frames == content(no * 512, len(frames) // PAGE)
        assert evict(image, [0]) == [0]
        assert image.prefetch(3, 1) == 1
        assert image.wait_loaded(3, 1, 60_000)
