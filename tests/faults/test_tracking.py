# SPDX-License-Identifier: Apache-2.0
"""What a guest writes to its private pages is followed, and no byte of it is missed."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from followed import Copy, dirty, freeze, memory
from stage import (
    ANSWER_SECONDS,
    PAGE,
    MakeStage,
    Stage,
    content,
    let_go,
    private_pages,
    stop_at,
    until,
    wait_at,
    write_faults,
)

from cowshed.cache import UsageError
from cowshed.cache._core import lib


def test_at_first_all_private_pages_are_dirty_and_then_what_is_written(stage: Stage) -> None:
    guest = stage.guest()
    for page in (1, 2, 9):
        guest.call("fill", page=page, nr_pages=1, byte=page)
    guest.handler.track(True)
    assert dirty(guest) == [1, 2, 9]
    assert dirty(guest) == []
    guest.call("poke", page=2, byte=77)
    guest.call("poke", page=2, byte=78)
    guest.call("poke", page=40, byte=5)
    assert private_pages(guest) == 4
    assert dirty(guest) == [2, 40]
    guest.call("discard", page=9, nr_pages=1)
    until(lambda: guest.account.status().private_pages == 3, "the discard is seen to")
    assert dirty(guest) == [9]
    assert guest.read(9) == content(9)
    assert dirty(guest) == []
    assert private_pages(guest) == 3
    assert stage.audit().mismatches == []


def test_a_second_write_to_a_page_is_charged_no_second_time(stage: Stage) -> None:
    guest = stage.guest(quota=1)
    guest.call("fill", page=1, nr_pages=1, byte=1)
    guest.handler.track(True)
    dirty(guest)
    guest.call("poke", page=1, byte=2)  # at the quota: it is its own all the same
    assert dirty(guest) == [1]
    assert guest.account.status().counters.charged_pages == 1


def test_once_no_longer_followed_pages_are_written_without_a_fault(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=4, byte=1)
    guest.handler.track(True)
    dirty(guest)
    guest.handler.track(False)
    faults = write_faults(guest)
    guest.call("fill", page=1, nr_pages=4, byte=2)
    assert write_faults(guest) == faults
    assert stage.audit().mismatches == []


def test_pages_that_are_not_followed_are_not_taken(stage: Stage) -> None:
    guest = stage.guest()
    with pytest.raises(UsageError, match="not tracked"):
        guest.account.take_dirty()


def test_supplied_memory_cannot_be_followed_nor_frozen(stage: Stage) -> None:
    machine = stage.machine()
    for order in (lambda: machine.handler.track(True), machine.handler.freeze):
        with pytest.raises(UsageError, match="is populated"):
            order()


def test_a_write_between_clearing_and_protecting_is_in_the_bytes_read_after(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=1, byte=1)
    guest.handler.track(True)
    stop_at(lib.POINT_TRACK_CLEARED)
    with ThreadPoolExecutor() as pool:
        taking = pool.submit(dirty, guest)
        wait_at(lib.POINT_TRACK_CLEARED)
        guest.call("poke", page=1, byte=2)  # it is open: nobody is asked
        let_go(lib.POINT_TRACK_CLEARED)
        assert taking.result(ANSWER_SECONDS) == [1]
    assert memory(guest, 1) == b"\2" + b"\1" * (PAGE - 1)


def test_a_write_that_waits_while_pages_are_taken_is_dirty_afterwards(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=2, byte=1)
    guest.handler.track(True)
    private_pages(guest)
    dirty(guest)
    guest.call("poke", page=2, byte=3)
    stop_at(lib.POINT_TRACK_CLEARED)
    with ThreadPoolExecutor() as pool:
        taking = pool.submit(dirty, guest)
        wait_at(lib.POINT_TRACK_CLEARED)
        write = guest.start("write", offset=PAGE, given_hex="09")
        guest.wait_stuck(write)
        let_go(lib.POINT_TRACK_CLEARED)
        assert taking.result(ANSWER_SECONDS) == [2]
    guest.finish(write)
    assert dirty(guest) == [1]


def test_a_page_opened_and_never_written_is_dirty_and_then_given_back(stage: Stage) -> None:
    guest = stage.guest(write_window=4)
    guest.read(0, 16)
    guest.handler.track(True)
    guest.call("poke", page=0, byte=1)
    assert dirty(guest) == [0, 1, 2, 3]
    assert private_pages(guest) == 1
    assert dirty(guest) == [1, 2, 3]  # private no more
    guest.call("poke", page=2, byte=1)
    assert 2 in dirty(guest)
    assert stage.audit().mismatches == []


def test_followed_pages_survive_evictions_and_moves(stage: Stage) -> None:
    guest = stage.guest()
    copy = Copy()
    guest.call("fill", page=0, nr_pages=20, byte=1)
    guest.handler.track(True)
    copy.update(guest)
    stage.evict_all()
    guest.base = guest.call("move")
    guest.call("fill", page=3, nr_pages=1, byte=2)
    assert 3 in copy.update(guest)
    freeze(guest)
    copy.update(guest)
    assert copy.differs(guest) == []
    assert stage.audit().mismatches == []


@pytest.mark.parametrize("write_window", [1, 0])
def test_what_was_taken_is_the_guests_memory_once_it_is_frozen(
    make_stage: MakeStage, rng: random.Random, write_window: int
) -> None:
    stage = make_stage(nr_pages=256)
    guest = stage.guest(write_window=write_window, quota=200)
    copy = Copy()
    for _ in range(3):
        hammers = [
            guest.start("hammer", seed=rng.randrange(1 << 30), nr_pages=128, nr_writes=1500)
            for _ in range(3)
        ]
        guest.handler.track(True)
        for _ in range(rng.randrange(5, 25)):
            copy.update(guest)
            if rng.random() < 0.2:
                stage.evict(*range(16), at_once=True)
            if rng.random() < 0.2:
                guest.account.settle()
        freeze(guest)
        copy.update(guest)
        assert copy.differs(guest) == []
        assert dirty(guest) == []
        assert stage.audit().mismatches == []
        guest.handler.thaw()
        if rng.random() < 0.5:
            guest.handler.track(False)
            copy.pages.clear()
        for hammer in hammers:
            guest.finish(hammer, 60)
    assert stage.audit().mismatches == []


def test_a_write_that_waits_for_a_later_page_is_not_missed_on_the_pages_before_it(
    stage: Stage,
) -> None:
    """The kernel pins the pages of a write before it copies, and then needs nobody's leave."""
    guest = stage.guest(window=1)
    guest.call("fill", page=14, nr_pages=2, byte=1)
    guest.handler.track(True)
    copy = Copy()
    copy.update(guest)
    guest.call("fill", page=14, nr_pages=2, byte=2)
    stop_at(lib.POINT_LOAD_READ)
    ticket = guest.start("fill", page=14, nr_pages=3, byte=3)  # the third page is to be loaded
    wait_at(lib.POINT_LOAD_READ)
    assert copy.update(guest)[:2] == [14, 15]
    assert copy.pages[14] == b"\2" * PAGE
    let_go(lib.POINT_LOAD_READ)
    guest.finish(ticket)
    copy.update(guest)
    freeze(guest)
    assert copy.differs(guest) == []
    guest.handler.thaw()
