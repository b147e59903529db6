# SPDX-License-Identifier: Apache-2.0
"""The audit says nothing while all is right, and names the place when something is wrong."""

import contextlib
import fcntl
import mmap
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stage import PAGE, MappedGuest, Stage, content, let_go, stop_at, until, wait_at

from cowshed.accounting import Account, audit
from cowshed.cache import CapacityError, FileSource, Image, InvariantError, PageStore
from cowshed.cache._core import ffi, lib

# The bitmaps and the flags of open regions, at the end of a ledger of 128 pages.
OPEN_BYTES = 16 + 2 * 8 + 8


def found(stage: Stage) -> list[tuple[str, str, int, int, int]]:
    return [
        (one.check, one.guest, one.place_no, one.expected, one.found)
        for one in stage.audit().mismatches
    ]


def busy_stage(stage: Stage, write_window: int = 4) -> list[MappedGuest]:
    guests = [stage.guest(write_window=write_window) for _ in range(2)]
    for guest in guests:
        guest.read(0, 16)
        guest.read(40)
        guest.call("fill", page=3, nr_pages=2, byte=1)
    stage.evict(0)
    guests[0].read(0)
    return guests


def test_nothing_is_reported_while_all_is_right_and_everything_was_looked_at(stage: Stage) -> None:
    busy_stage(stage)
    report = stage.audit()
    assert report.mismatches == []
    assert report.checked == {
        "images": 1,
        "guests": 2,
        "overlays": 0,
        "extents": 8,
        "refs": sum(stage.image.refs()),
        "private_pages": 4,
        "resident_extents": stage.image.resident_bytes // stage.image.extent_bytes,
        "unseen_guests": 0,
    }
    assert report.checked["refs"] >= 3


def test_a_stray_frame_is_reported_and_gone_after_a_scrub(stage: Stage) -> None:
    stage.load(1, 1)
    with mmap.mmap(stage.image.guest_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as unguarded:
        unguarded[:1]
    assert found(stage) == [
        ("resident", "", -1, 16 * PAGE, 17 * PAGE),
        ("resident", "", 0, 0, PAGE),
    ]
    stage.image.scrub()
    assert found(stage) == []


def test_a_resident_extent_that_lost_a_frame_is_reported(stage: Stage) -> None:
    stage.load(1, 1)
    hole = 20 * PAGE
    libc_fallocate(stage.image.frames_fd, hole)
    assert ("resident", "", 1, 16 * PAGE, 15 * PAGE) in found(stage)


def libc_fallocate(fd: int, offset: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(fd, 3, ctypes.c_long(offset), ctypes.c_long(PAGE)) == 0


def test_a_private_page_that_nobody_was_charged_for_is_reported(stage: Stage) -> None:
    """The guest opens a page through its own userfaultfd, behind the handler's back."""
    guest = stage.guest()
    guest.read(0, 16)
    address = guest.base + 5 * PAGE
    fcntl.ioctl(guest.fds[0], 0xC018AA06, struct.pack("QQQ", address, PAGE, 0))
    guest.call("poke", page=5, byte=1)
    assert found(stage) == [("private", "g0", 5, 0, 1)]


def test_a_charge_without_a_copy_is_reported(stage: Stage) -> None:
    guest = stage.guest()
    last = stage.image.nr_pages - 1
    guest.call("poke", page=last, byte=1)
    guest.account.settle()
    frame = stage.frame(last)
    os.ftruncate(stage.image.frames_fd, last * PAGE)  # what no eviction ever does
    os.ftruncate(stage.image.frames_fd, stage.image.map_bytes)
    os.pwrite(stage.image.frames_fd, frame, last * PAGE)
    assert found(stage) == [("private", "g0", last, 1, 0)]


def test_a_mapped_page_of_an_extent_not_granted_is_reported(stage: Stage) -> None:
    stage.load()
    guest = stage.guest()
    address = guest.base + 35 * PAGE
    fcntl.ioctl(guest.fds[0], 0xC020AA07, struct.pack("QQQq", address, 2 * PAGE, 2, 0))
    assert found(stage) == [("granted", "g0", 2, 0, 2)]


def test_a_reference_without_its_grant_is_reported(stage: Stage) -> None:
    """An account that the audit is not shown stands for one whose grants were lost."""
    one, two = stage.guest(window=1), stage.guest(window=1)
    one.read(0)
    two.read(0)
    two.read(40)

    @contextmanager
    def some(_image: Image) -> Iterator[dict[str, Account]]:
        yield {"one": one.account}

    report = audit(lambda: [stage.image], some)
    assert [
        (each.check, each.place, each.place_no, each.expected, each.found)
        for each in report.mismatches
    ] == [("refs", "extent", 0, 1, 2), ("refs", "extent", 2, 0, 1)]
    assert report.mismatches[0].as_json() == {
        "check": "refs",
        "domain": "default",
        "image": "disk",
        "guest": "",
        "extent": 0,
        "expected": 1,
        "found": 2,
    }


@pytest.mark.parametrize(
    ("bitmap", "broken"), [("private", r"account \(2\)"), ("unsettled", r"account \(3\)")]
)
def test_what_the_bitmaps_do_not_add_up_to_is_a_broken_invariant(
    stage: Stage, bitmap: str, broken: str
) -> None:
    guest = stage.guest()
    guest.call("fill", page=0, nr_pages=2, byte=1)
    guest.account.check()
    ledger = guest.account.fd
    # The grants' bitmap, 8 bytes, is followed by six of pages.
    at = os.fstat(ledger).st_size - OPEN_BYTES - (6 if bitmap == "private" else 5) * 16
    with mmap.mmap(ledger, 0) as mapping:
        mapping[at + 15] ^= 0x80  # of the last page
        with pytest.raises(InvariantError, match=broken):
            guest.account.check()
        mapping[at + 15] ^= 0x80
    guest.account.check()


def test_every_corrupted_grant_bit_is_found(stage: Stage) -> None:
    guest = stage.guest(window=1)
    guest.read(0)
    refs = array("I", bytes(4 * 8))
    guest.account.add_grants(refs)
    assert list(refs) == [1] + [0] * 7
    ledger = guest.account.fd
    header = os.fstat(ledger).st_size - OPEN_BYTES - 8 - 6 * 16
    with mmap.mmap(ledger, 0) as mapping:
        assert mapping[header] == 1  # the bitmap of grants
        mapping[header] = 0b101
        assert [each[:3] for each in found(stage)] == [("refs", "", 2)]
        mapping[header] = 0
        assert [each[:3] for each in found(stage)] == [("granted", "g0", 0), ("refs", "", 0)]
        mapping[header] = 1
    assert found(stage) == []


def test_a_step_half_done_is_no_mismatch(stage: Stage) -> None:
    guest = stage.guest(window=1)
    guest.read(0)
    stop_at(lib.POINT_LOAD_PUBLISH)  # frames are filled, the extent is not resident yet
    ticket = guest.start("read", offset=40 * PAGE, length=8)
    wait_at(lib.POINT_LOAD_PUBLISH)
    assert found(stage) == []
    let_go(lib.POINT_LOAD_PUBLISH)
    assert bytes.fromhex(guest.finish(ticket)) == content(40)[:8]


@pytest.mark.parametrize("write_window", [4, 1], ids=["some unsettled", "all settled"])
def test_a_guest_that_died_is_no_mismatch(stage: Stage, write_window: int) -> None:
    guests = busy_stage(stage, write_window)
    guests[1].process.kill()
    guests[1].process.wait()
    until(lambda: not os.path.exists(f"/proc/{guests[1].pid}"), "it is gone")
    assert found(stage) == []
    assert ffi.sizeof("struct account_status") > 0


def test_an_audit_of_an_image_of_terabytes_ends_when_it_is_to(tmp_path: Path) -> None:
    path = tmp_path / "huge.raw"
    path.touch()
    os.truncate(path, 1 << 41)
    nr_asked = 0

    def stop() -> bool:
        nonlocal nr_asked
        nr_asked += 1
        return nr_asked == 3

    with PageStore(64 << 20, extent_bytes=2 << 20) as store:
        image = store.open_image("huge", FileSource.open(path))
        with pytest.raises(CapacityError, match="broken off"):
            audit(lambda: [image], lambda _: contextlib.nullcontext({}), stop=stop)
        assert nr_asked == 3  # in the middle of an image, not at its end
        assert audit(lambda: [image], lambda _: contextlib.nullcontext({})).mismatches == []
