# SPDX-License-Identifier: Apache-2.0
"""Private pages that a guest brings with it: charged at once, copied when touched or when idle."""

import os
import time
from collections.abc import Iterable, Iterator

import pytest
from stage import PAGE, MappedGuest, Stage, content, fail_at, let_go, private_pages, until

from cowshed.cache._core import lib

PUSH_AFTER_SECONDS = 0.05  # PRELOAD_AFTER_NS


def own(page: int) -> bytes:
    return bytes([page % 251 + 1]) * PAGE


def bitmap_of(pages: Iterable[int]) -> bytes:
    number = sum(1 << page for page in pages)
    return number.to_bytes((number.bit_length() + 7) // 8, "little")


@pytest.fixture
def source(stage: Stage) -> Iterator[int]:
    """What an overlay would hold: every page, recognisably."""
    fd = os.memfd_create("preload")
    os.ftruncate(fd, stage.image.map_bytes)
    for page in range(stage.image.nr_pages):
        os.pwrite(fd, own(page), page * PAGE)
    yield fd
    os.close(fd)


def preloaded(guest: MappedGuest) -> int:
    return guest.account.status().preloaded_pages


def test_preloaded_pages_are_charged_at_once_and_pushed_in_idle_time(
    stage: Stage, source: int
) -> None:
    pages = [0, 1, 2, 17, 40, 127]
    guest = stage.guest(quota=3, preload=(source, bitmap_of(pages)))
    assert guest.account.status().private_pages == len(pages)
    until(lambda: preloaded(guest) == 0, "all are pushed")
    assert guest.account.copy_preload_fd() == -1
    stage.load()
    for page in range(stage.image.nr_pages):
        assert guest.read(page) == (own(page) if page in pages else content(page))
    assert private_pages(guest) == len(pages)
    assert stage.audit().mismatches == []


def test_pages_are_not_copied_ahead_as_long_as_others_may_have_to_be_attached(
    stage: Stage, source: int
) -> None:
    began = time.monotonic()
    guest = stage.guest(preload=(source, bitmap_of([3])))
    stage.load()
    assert guest.read(4) == content(4)  # its thread has been idle since
    until(lambda: preloaded(guest) == 0, "it is pushed")
    assert time.monotonic() - began >= PUSH_AFTER_SECONDS


@pytest.fixture
def unpushed() -> Iterator[None]:
    """Preloaded pages wait for a fault, until they are let go."""
    fail_at(lib.POINT_PRELOAD_PUSH, 11)
    yield
    let_go(lib.POINT_PRELOAD_PUSH)


def test_a_copy_of_the_preload_descriptor_outlives_the_accounts_own(
    stage: Stage, source: int
) -> None:
    """Whoever has the pages held for a successor copies it while the fault thread may close it."""
    fail_at(lib.POINT_PRELOAD_PUSH, 11)
    guest = stage.guest(preload=(source, bitmap_of([3])))
    copy = guest.account.copy_preload_fd()
    let_go(lib.POINT_PRELOAD_PUSH)
    until(lambda: preloaded(guest) == 0, "it is pushed")
    assert guest.account.copy_preload_fd() == -1
    assert os.pread(copy, PAGE, 3 * PAGE) == own(3)
    os.close(copy)


@pytest.mark.usefixtures("unpushed")
def test_a_fault_on_a_preloaded_page_is_answered_from_the_source(stage: Stage, source: int) -> None:
    guest = stage.guest(preload=(source, bitmap_of([3, 5, 20])), window=16)
    stage.load()
    assert guest.read(4) == content(4)  # maps the window round it, and neither 3 nor 5
    assert guest.read(3) == own(3)
    guest.call("write", offset=5 * PAGE, given_hex="07")
    assert guest.read(5) == b"\7" + own(5)[1:]
    until(lambda: preloaded(guest) == 1, "they are counted after the answer")
    assert stage.audit().mismatches == []
    guest.call("discard", page=20, nr_pages=1)
    assert guest.read(20) == content(20)
    assert preloaded(guest) == 0
    assert private_pages(guest) == 2
    assert stage.audit().mismatches == []
