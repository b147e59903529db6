# SPDX-License-Identifier: Apache-2.0
"""Open regions of a stage's guests."""

import errno
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from stage import (
    MakeStage,
    MappedGuest,
    Stage,
    content,
    let_go,
    read_faults,
    until,
    write_faults,
)

from cowshed.accounting import OPEN_PAGES, CloseReason
from cowshed.cache import Image
from cowshed.cache._core import lib

REGION = OPEN_PAGES
NO_LIMIT = 1 << 40


@pytest.fixture
def two(make_stage: MakeStage) -> Stage:
    """A stage with an image of two regions and a part of a third, all resident."""
    stage = make_stage(nr_pages=2 * REGION + 64)
    stage.load()
    return stage


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool
        for point in range(lib.POINT_NR):
            let_go(point)


def collapse_region(image: Image, region: int) -> None:
    """Collapse a region, once the kernel uses none of its frames: a CPU may have one at hand."""

    def is_collapsed() -> bool:
        err = -image.collapse(region, NO_LIMIT)
        assert err in (0, errno.EAGAIN, errno.EBUSY), errno.errorcode[err]
        return err == 0

    until(is_collapsed, "no frame is in use")


def collapse(stage: Stage, *regions: int) -> None:
    for region in regions:
        collapse_region(stage.image, region)


def open_region(guest: MappedGuest, region: int = 0) -> int:
    """Collapse and open a region; return 0, or the errno why it is not open."""
    collapse_region(guest.account.image, region)
    return -guest.account.open_region(region, 0, NO_LIMIT)


def close(guest: MappedGuest, reason: CloseReason = CloseReason.REQUEST) -> int:
    return guest.account.close_regions(reason)


def begin_opening(pool: ThreadPoolExecutor, guest: MappedGuest) -> Future[int]:
    return pool.submit(open_region, guest)


def charged(guest: MappedGuest) -> tuple[int, int]:
    """Return the private and the reserved pages, after a settle."""
    guest.account.settle()
    before = guest.quota.status().used_pages  # an event may be handled between two looks
    status = guest.account.status()
    used = max(before, guest.quota.status().used_pages)
    assert used >= status.private_pages + status.reserved_pages
    return status.private_pages, status.reserved_pages


def faults(guest: MappedGuest) -> int:
    return read_faults(guest) + write_faults(guest)


def check_bytes(guest: MappedGuest, mine: dict[int, int], nr_pages: int = 2 * REGION + 64) -> None:
    """Every page is the image's, or filled with the byte that the guest wrote."""
    for page in range(0, nr_pages, 16):
        got = guest.read(page, 16)
        for i in range(16):
            byte = mine.get(page + i)
            expected = content(page + i) if byte is None else bytes([byte]) * 4096
            assert got[i * 4096 : (i + 1) * 4096] == expected, f"page {page + i}"


def check_books(stage: Stage) -> None:
    for guest in stage.guests:
        guest.account.check()
    stage.store.check()
    assert stage.audit().mismatches == []
