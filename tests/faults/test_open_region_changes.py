# SPDX-License-Identifier: Apache-2.0
"""What a guest does to its memory inside an open region, and in the instant when nothing tells."""

import errno
import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from regions import (
    NO_LIMIT,
    REGION,
    begin_opening,
    charged,
    check_books,
    check_bytes,
    close,
    collapse,
    faults,
    open_region,
    pool,
    two,
)
from stage import (
    ANSWER_SECONDS,
    PAGE,
    MakeStage,
    MappedGuest,
    Stage,
    content,
    let_go,
    read_faults,
    stop_at,
    until,
    wait_at,
)

from cowshed.cache._core import lib

__all__ = ["pool", "two"]

READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE


def opened(two: Stage, quota: int | None = None) -> MappedGuest:
    """Return a guest with region 0 open, of which it has written pages 10 to 19."""
    guest = two.guest(quota=quota, write_window=1)
    assert open_region(guest) == 0
    guest.call("fill", page=10, nr_pages=10, byte=1)
    assert charged(guest) == (10, REGION - 10)
    return guest


def at_the_bare_moment(two: Stage, pool: ThreadPoolExecutor) -> tuple[MappedGuest, Future[int]]:
    """Return a guest that wrote pages 10 to 19, and an opening that stands between its ioctls."""
    guest = two.guest(write_window=1)
    guest.call("fill", page=10, nr_pages=10, byte=1)
    charged(guest)
    stop_at(lib.POINT_OPEN_BARE)
    opening = begin_opening(pool, guest)
    wait_at(lib.POINT_OPEN_BARE)
    return guest, opening


def go_on(opening: Future[int]) -> int:
    let_go(lib.POINT_OPEN_BARE)
    return opening.result(ANSWER_SECONDS)


def test_a_discard_gives_back_the_copies_and_keeps_the_reservation(two: Stage) -> None:
    guest = opened(two, quota=REGION)
    guest.call("discard", page=8, nr_pages=8)
    until(lambda: charged(guest) == (4, REGION - 4), "the discard is handled")
    assert guest.read(8, 8) == content(8, 8)
    assert guest.account.status().counters.discarded_pages == 6
    guest.call("fill", page=9, nr_pages=3, byte=2)  # again, without a fault
    assert charged(guest) == (7, REGION - 7)
    assert faults(guest) == 0
    check_books(two)
    close(guest)
    assert charged(guest) == (7, 0)
    check_bytes(guest, dict.fromkeys(range(9, 12), 2) | dict.fromkeys(range(16, 20), 1))
    check_books(two)


def test_what_is_unmapped_is_given_back(two: Stage) -> None:
    guest = opened(two, quota=REGION)
    guest.call("unmap", page=8, nr_pages=8)
    until(lambda: charged(guest) == (4, REGION - 12), "the event is handled")
    guest.call("fill", page=100, nr_pages=1, byte=2)
    assert close(guest) == 1
    assert charged(guest) == (5, 0)
    assert guest.read(96, 4) == content(96, 4)
    check_books(two)


def test_a_region_that_is_unmapped_whole_is_closed_without_more(two: Stage) -> None:
    guest = opened(two, quota=REGION)
    guest.call("unmap", page=0, nr_pages=REGION)
    until(lambda: charged(guest) == (0, 0), "the event is handled")
    close(guest)
    assert two.store.counters().pinned_extents == 0
    assert len(two.evict(*range(32))) == 32


def test_memory_of_its_own_in_an_unmapped_place_is_left_alone(two: Stage) -> None:
    guest = opened(two)
    guest.call("occupy", page=8, nr_pages=8)  # unmaps the image there
    until(lambda: charged(guest)[0] == 4, "the event is handled")
    close(guest)
    guest.call("poke", page=9, byte=5)
    assert guest.call("touch", page=9) == 5
    assert charged(guest) == (4, 0)
    assert two.store.counters().pinned_extents == 0


def test_a_part_that_is_moved_stays_guarded_at_its_new_place(two: Stage) -> None:
    guest = opened(two)
    new = guest.call("move_part", page=8, nr_pages=8)
    until(lambda: len(guest.account.regions()) == 3, "the event is handled")
    assert bytes.fromhex(guest.call("read_at", address=new, length=2 * PAGE)) == content(8, 2)
    assert close(guest) == 1
    assert charged(guest) == (10, 0)
    assert len(two.evict(*range(32))) == 32
    got = bytes.fromhex(guest.call("read_at", address=new, length=4 * PAGE))
    assert got == content(8, 2) + b"\1" * 2 * PAGE
    before = read_faults(guest)
    assert guest.read(100) == content(100)
    assert read_faults(guest) > before
    check_books(two)


def test_a_mapping_that_is_moved_whole_is_guarded_at_its_new_place(two: Stage) -> None:
    guest = opened(two)
    # The kernel moves a guarded mapping only in one piece, which it is once it is guarded alike.
    with pytest.raises(OSError, match="mremap"):
        guest.call("move")
    guest.call("guard")
    guest.base = guest.call("move")
    until(lambda: guest.account.regions()[0].address == guest.base, "the event is handled")
    guest.call("fill", page=30, nr_pages=1, byte=1)
    assert charged(guest) == (11, 0)  # the fault has closed it
    assert len(two.evict(*range(32))) == 32
    check_bytes(guest, dict.fromkeys([*range(10, 20), 30], 1))
    check_books(two)


def test_protections_of_its_own_change_nothing(two: Stage) -> None:
    guest = opened(two)
    guest.call("protect", page=12, nr_pages=4, prot=READ)
    guest.call("protect", page=40, nr_pages=4, prot=0)
    with pytest.raises(OSError, match="Errno"):
        guest.call("fill", page=13, nr_pages=1, byte=2)
    guest.call("protect", page=40, nr_pages=4, prot=READ | WRITE)
    assert close(guest) == 1
    assert charged(guest) == (10, 0)
    assert two.evict(0, 1, 2) == [0, 1, 2]
    assert guest.read(40, 4) == content(40, 4)
    check_books(two)


def test_a_mapping_that_is_cut_up_is_opened_all_the_same(two: Stage) -> None:
    guest = two.guest()
    guest.call("protect", page=12, nr_pages=4, prot=READ)
    assert open_region(guest) == 0
    check_bytes(guest, {})
    assert close(guest) == 1
    assert two.evict(0) == [0]
    check_bytes(guest, {})
    check_books(two)


def test_a_forked_child_does_not_have_it(two: Stage) -> None:
    guest = opened(two)
    assert guest.call("fork_touch", page=3) == 11  # SIGSEGV: MADV_DONTFORK
    close(guest)
    check_books(two)


def test_a_page_discarded_at_the_bare_moment_is_not_charged_for_ever(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest, opening = at_the_bare_moment(two, pool)
    guest.call("discard", page=10, nr_pages=4)
    assert go_on(opening) == 0
    assert charged(guest) == (6, REGION - 6)
    close(guest)
    assert charged(guest) == (6, 0)
    check_bytes(guest, dict.fromkeys(range(14, 20), 1))
    check_books(two)


def test_a_write_at_the_bare_moment_is_charged(two: Stage, pool: ThreadPoolExecutor) -> None:
    guest, opening = at_the_bare_moment(two, pool)
    guest.call("fill", page=100, nr_pages=3, byte=1)
    assert guest.read(200, 2) == content(200, 2)
    assert go_on(opening) == 0
    assert charged(guest) == (13, REGION - 13)
    close(guest)
    check_books(two)


def test_a_protection_at_the_bare_moment_changes_nothing(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest, opening = at_the_bare_moment(two, pool)
    guest.call("protect", page=12, nr_pages=4, prot=READ)
    assert go_on(opening) == 0
    assert guest.account.status().open_regions == 1
    check_bytes(guest, dict.fromkeys(range(10, 20), 1))
    close(guest)
    check_books(two)


def test_a_child_forked_at_the_bare_moment_does_not_have_it(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest, opening = at_the_bare_moment(two, pool)
    assert guest.call("fork_touch", page=3) == 11
    assert go_on(opening) == 0
    close(guest)
    check_books(two)


def test_what_is_moved_away_at_the_bare_moment_never_reads_zeros(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest, opening = at_the_bare_moment(two, pool)
    new = guest.call("move_part", page=100, nr_pages=8)
    assert go_on(opening) == errno.ENOENT
    status = guest.account.status()
    assert (status.open_regions, status.lost_regions) == (0, 1)
    # Nothing guards it there: its frames stay until the guest ends.
    assert two.evict(*range(32), at_once=True) == []
    assert bytes.fromhex(guest.call("read_at", address=new, length=8 * PAGE)) == content(100, 8)
    assert guest.read(0, 10) == content(0, 10)
    assert guest.read(200, 8) == content(200, 8)
    assert charged(guest) == (10, 0)
    assert open_region(guest) == errno.EBUSY
    guest.account.check()
    two.detach(guest)
    assert len(two.evict(*range(32))) == 32


def test_what_is_unmapped_at_the_bare_moment_is_given_back(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest, opening = at_the_bare_moment(two, pool)
    guest.call("unmap", page=12, nr_pages=4)
    assert go_on(opening) == errno.ENOENT
    assert charged(guest) == (6, 0)
    assert guest.read(0, 10) == content(0, 10)
    guest.call("fill", page=40, nr_pages=1, byte=4)
    assert charged(guest) == (7, 0)


def test_memory_put_there_at_the_bare_moment_is_the_guests(
    two: Stage, pool: ThreadPoolExecutor
) -> None:
    guest, opening = at_the_bare_moment(two, pool)
    guest.call("occupy", page=0, nr_pages=REGION)
    go_on(opening)
    assert guest.call("touch", page=9) == 1
    guest.call("discard_at", address=guest.base + 9 * PAGE, nr_pages=1)
    assert guest.call("touch", page=9) == 0  # its own memory: zeros, and nobody waits
    assert guest.account.status().broken == 0
    assert guest.read(REGION, 16) == content(REGION, 16)


def test_a_guest_that_unregisters_by_itself_keeps_its_frames_to_its_end(two: Stage) -> None:
    hostile, other = two.guest(quota=REGION), two.guest()
    for guest in (hostile, other):
        assert open_region(guest) == 0
    hostile.call("steal", page=0, nr_pages=REGION)
    assert close(hostile) == 1
    assert hostile.account.status().lost_regions == 1
    assert charged(hostile) == (0, 0)
    assert close(other) == 1
    assert two.evict(*range(32), at_once=True) == []
    check_bytes(other, {})
    other.account.check()
    hostile.account.check()
    two.detach(hostile)
    assert len(two.evict(*range(32))) == 32
    check_bytes(other, {})
    check_books(two)


def test_a_guest_that_unregisters_alone_is_guarded_again_by_the_closing(two: Stage) -> None:
    guest = opened(two)
    guest.call("unregister", page=0, nr_pages=REGION)
    assert close(guest) == 1
    assert two.evict(0) == [0]
    check_bytes(guest, dict.fromkeys(range(10, 20), 1))
    check_books(two)


def test_a_closing_goes_on_once_the_event_is_read(two: Stage, pool: ThreadPoolExecutor) -> None:
    guest = opened(two)
    stop_at(lib.POINT_FAULT_READ)
    other = guest.start("read", offset=REGION * PAGE, length=8)
    wait_at(lib.POINT_FAULT_READ)
    discard = guest.start("discard", page=10, nr_pages=2)
    until(lambda: "userfault" in guest.where(discard), "the discard waits to be heard of")
    assert guest.account.status().open_regions == 1
    assert lib.account_close_region(guest.account.cdata, 0, lib.CLOSE_REQUEST) == -errno.EAGAIN
    assert guest.account.status().open_regions == 1
    guest.account.check()
    closing = pool.submit(close, guest)
    let_go(lib.POINT_FAULT_READ)
    assert closing.result(ANSWER_SECONDS) == 1
    for ticket in (other, discard):
        guest.finish(ticket)
    until(lambda: charged(guest) == (8, 0), "the discard is handled")
    check_bytes(guest, dict.fromkeys(range(12, 20), 1))
    check_books(two)


def test_an_opening_waits_until_it_can_be_checked(two: Stage, pool: ThreadPoolExecutor) -> None:
    guest = two.guest(window=1, write_window=1)
    guest.call("fill", page=10, nr_pages=10, byte=1)
    collapse(two, 0)
    stop_at(lib.POINT_FAULT_READ)
    other = guest.start("read", offset=REGION * PAGE, length=8)
    wait_at(lib.POINT_FAULT_READ)
    discard = guest.start("discard", page=10, nr_pages=2)
    until(lambda: "userfault" in guest.where(discard), "the discard waits to be heard of")
    opening = begin_opening(pool, guest)
    until(lambda: guest.account.status().open_regions == 1, "it is opened, and not checked")
    assert two.evict(0, at_once=True) == []
    let_go(lib.POINT_FAULT_READ)
    assert opening.result(ANSWER_SECONDS) == 0
    for ticket in (other, discard):
        guest.finish(ticket)
    until(lambda: charged(guest) == (8, REGION - 8), "the discard is handled")
    assert close(guest) == 1
    assert two.evict(0) == [0]
    check_bytes(guest, dict.fromkeys(range(12, 20), 1))
    check_books(two)


def test_a_guest_that_may_have_no_more_mappings_keeps_none_of_the_frames(
    make_stage: MakeStage, tmp_path: Path
) -> None:
    stage = make_stage(nr_pages=8 * REGION)
    stage.load()
    guest = stage.guest()
    full, enough = tmp_path / "full", tmp_path / "enough"
    using = guest.start("use_up_mappings", nr_left=3, full=str(full), enough=str(enough))
    until(full.exists, "the mappings are used up")
    results = [open_region(guest, region) for region in (1, 3, 5, 7)]
    assert set(results) <= {0, errno.ENOMEM}
    assert errno.ENOMEM in results
    status = guest.account.status()
    assert (status.open_regions, status.lost_regions) == (results.count(0), 0)
    enough.touch()
    guest.finish(using)
    for region, result in zip((1, 3, 5, 7), results, strict=True):
        assert guest.read(region * REGION) == content(region * REGION)
        if result:
            extents = range(region * REGION // 16, (region + 1) * REGION // 16)
            assert stage.evict(*extents) == list(extents)
    check_books(stage)


def test_pages_are_poisoned_only_where_no_frame_can_be_mapped(two: Stage) -> None:
    guest = opened(two)
    collapse(two, 1)
    two.evict(*range(32, 68))
    guest.handler.poison_absent()
    assert guest.account.status().open_regions == 0
    assert guest.read(10) == b"\1" * PAGE
    with pytest.raises(OSError, match="Errno"):
        guest.read(REGION + 3)


def test_a_hole_is_loaded_and_never_read_as_zeros_whatever_became_of_the_pin(two: Stage) -> None:
    guest = opened(two)
    assert lib.store_end_loan(two.image.cdata, 0, 32) == 0  # as if the pins were lost
    assert two.evict(5) == [5]
    assert lib.store_lend(two.image.cdata, 0, 32, NO_LIMIT) == 0
    assert guest.read(5 * 16 + 3) == content(5 * 16 + 3)
    assert guest.account.status().open_regions == 0
    check_bytes(guest, dict.fromkeys(range(10, 20), 1))
    check_books(two)
