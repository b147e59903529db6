# SPDX-License-Identifier: Apache-2.0
"""From freeze to thaw no private byte of a guest changes, and nothing of what waited is lost."""

import random
from concurrent.futures import ThreadPoolExecutor

from followed import dirty, freeze, memory, private
from stage import (
    ANSWER_SECONDS,
    PAGE,
    MappedGuest,
    Stage,
    content,
    let_go,
    private_pages,
    stop_at,
    until,
    wait_at,
    write_faults,
)

from cowshed.cache._core import lib


def picture(guest: MappedGuest) -> dict[int, bytes | None]:
    return {page: memory(guest, page) for page in private(guest)}


def test_frozen_writes_and_discards_wait_and_reads_do_not(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=1, byte=1)
    freeze(guest)
    assert guest.account.status().frozen
    write = guest.start("write", offset=PAGE, given_hex="07")
    first = guest.start("write", offset=20 * PAGE, given_hex="07")
    guest.wait_stuck(write)
    guest.wait_stuck(first)
    assert guest.read(1) == b"\1" * PAGE
    assert guest.read(50) == content(50)
    discard = guest.start("discard", page=1, nr_pages=1)
    until(lambda: guest.where(discard) == "userfaultfd_event_wait_completion", "it is held back")
    assert memory(guest, 1) == b"\1" * PAGE
    assert stage.audit().mismatches == []
    guest.handler.thaw()
    guest.finish(discard)
    guest.finish(write)
    guest.finish(first)
    assert not guest.account.status().frozen
    assert stage.audit().mismatches == []


def test_a_write_being_answered_is_before_the_freeze_or_waits(stage: Stage) -> None:
    guest = stage.guest()
    guest.read(0, 16)
    stop_at(lib.POINT_WRITE_CHARGED)
    write = guest.start("write", offset=0, given_hex="07")
    wait_at(lib.POINT_WRITE_CHARGED)
    with ThreadPoolExecutor() as pool:
        freezing = pool.submit(freeze, guest)
        let_go(lib.POINT_WRITE_CHARGED)
        freezing.result(ANSWER_SECONDS)
    before = picture(guest)
    assert private_pages(guest) == len(before) == stage.looks(guest, 0, 16).count(3)
    guest.handler.thaw()
    guest.finish(write)
    assert guest.read(0) == b"\7" + content(0)[1:]


def test_a_discard_that_was_read_ends_before_the_freeze_does(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=2, byte=1)
    stop_at(lib.POINT_FAULT_READ)
    discard = guest.start("discard", page=1, nr_pages=1)
    wait_at(lib.POINT_FAULT_READ)
    guest.finish(discard)  # read is as good as done, for the kernel
    with ThreadPoolExecutor() as pool:
        freezing = pool.submit(freeze, guest)
        assert not freezing.done()
        let_go(lib.POINT_FAULT_READ)
        freezing.result(ANSWER_SECONDS)
    assert private(guest) == {2}
    assert stage.audit().mismatches == []


def test_what_was_not_followed_is_open_again_after_the_thaw(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=4, byte=1)
    freeze(guest)
    freeze(guest)
    guest.handler.thaw()
    guest.handler.thaw()
    faults = write_faults(guest)
    guest.call("fill", page=1, nr_pages=4, byte=2)
    assert write_faults(guest) == faults


def test_no_longer_following_waits_for_the_thaw(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=1, byte=1)
    guest.handler.track(True)
    freeze(guest)
    guest.handler.track(False)
    write = guest.start("write", offset=PAGE, given_hex="07")
    guest.wait_stuck(write)
    guest.handler.thaw()
    guest.finish(write)
    assert dirty_is_refused(guest)


def dirty_is_refused(guest: MappedGuest) -> bool:
    try:
        dirty(guest)
    except Exception as error:
        return "not tracked" in str(error)
    return False


def test_a_frozen_guest_may_leave(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=1, byte=1)
    freeze(guest)
    guest.start("write", offset=PAGE, given_hex="07")
    stage.detach(guest)


def test_nothing_changes_under_guests_that_never_rest(stage: Stage, rng: random.Random) -> None:
    guests = [stage.guest(write_window=0) for _ in range(3)]
    hammers = [
        (guest, guest.start("hammer", seed=rng.randrange(1 << 30), nr_pages=128, nr_writes=2000))
        for guest in guests
        for _ in range(2)
    ]
    for _ in range(6):
        for guest in guests:
            freeze(guest)
        before = [picture(guest) for guest in guests]
        stage.evict(*range(8), at_once=True)
        for guest in guests:
            guest.account.settle()
        assert stage.audit().mismatches == []
        assert [picture(guest) for guest in guests] == before
        for guest in guests:
            guest.handler.thaw()
    for guest, hammer in hammers:
        guest.finish(hammer, 60)
    assert stage.audit().mismatches == []
