# SPDX-License-Identifier: Apache-2.0
"""A backend dies in opening or closing a region: its successor leaves no page unaccounted for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from regions import NO_LIMIT, REGION, collapse_region
from stage import PAGE, content
from succession import MINE, Succession

from cowshed.accounting import CloseReason, evict
from cowshed.cache._core import lib

NR_EXTENTS = 36  # a region, and a bit


@pytest.fixture
def succession(tmp_path: Path) -> Iterator[Succession]:
    made = Succession(tmp_path, nr_extents=NR_EXTENTS)
    yield made
    made.close()


def write(made: Succession, *pages: int) -> set[int]:
    for page in pages:
        made.guest.call("write", offset=page * PAGE, given_hex=MINE.hex())
    return set(pages)


def test_a_successor_keeps_regions_open(succession: Succession) -> None:
    mine = write(succession, 3)
    succession.order(open=0)
    mine |= write(succession, 7, 8)
    succession.kill()
    mine |= write(succession, 9)  # nobody is needed for that
    assert succession.guest.read(100) == content(100)
    succession.succeed()
    assert succession.account.status().open_regions == 1
    assert evict(succession.image, list(range(32))) == []
    succession.check(mine)
    mine |= write(succession, 10)
    assert succession.account.close_regions(CloseReason.REQUEST) == 1
    assert succession.account.status().reserved_pages == 0
    succession.check(mine)
    assert len(evict(succession.image, list(range(32)))) == 32
    succession.check(mine)


def test_regions_stay_open_though_the_successor_has_less_room(succession: Succession) -> None:
    mine = write(succession, 3)
    succession.order(open=0)
    succession.kill()
    succession.succeed(nr_extents=8)
    assert succession.account.status().open_regions == 1
    for page in range(0, REGION, 16):
        assert succession.guest.read(page) == (MINE if page in mine else content(page))
    assert succession.account.close_regions(CloseReason.PRESSURE) == 1
    assert len(evict(succession.image, list(range(NR_EXTENTS)))) == 32
    assert succession.guest.read(100) == content(100)
    assert succession.guest.read(3) == MINE
    assert succession.account.status().private_pages == len(mine)


@pytest.mark.parametrize("point", ["OPEN_CHARGED", "OPEN_BARE", "OPEN_DONE"])
def test_an_opening_cut_short_is_finished_or_undone(succession: Succession, point: str) -> None:
    mine = write(succession, 3, 20)
    succession.order(arm=getattr(lib, f"POINT_{point}"))
    succession.order(open=0)
    succession.die()
    succession.succeed()
    assert succession.guest.read(100) == content(100)
    mine |= write(succession, 21)
    succession.check(mine)
    succession.account.close_regions(CloseReason.REQUEST)
    assert succession.account.status().reserved_pages == 0
    assert len(evict(succession.image, list(range(32)))) == 32
    succession.check(mine)
    assert succession.store.counters().pinned_extents == 0


def test_what_was_moved_away_while_nobody_was_there_never_reads_zeros(
    succession: Succession,
) -> None:
    write(succession, 3, 20)
    succession.order(arm=lib.POINT_OPEN_BARE)
    succession.order(open=0)
    succession.die()
    new = succession.guest.call("move_part", page=100, nr_pages=8)
    succession.succeed()
    assert succession.account.status().lost_regions == 1
    assert evict(succession.image, list(range(32))) == []
    moved = bytes.fromhex(succession.guest.call("read_at", address=new, length=8 * PAGE))
    assert moved == content(100, 8)
    assert succession.guest.read(3) == MINE


@pytest.mark.parametrize("point", ["CLOSE_GUARDED", "CLOSE_PROTECTED"])
def test_a_closing_cut_short_is_finished_with_the_next_fault(
    succession: Succession, point: str
) -> None:
    mine = write(succession, 3)
    succession.order(open=0)
    mine |= write(succession, 20, 21)
    succession.order(arm=getattr(lib, f"POINT_{point}"))
    succession.order(close=0)
    succession.die()
    late = succession.guest.start("write", offset=22 * PAGE, given_hex=MINE.hex())
    read = succession.guest.start("read", offset=200 * PAGE, length=8)
    succession.succeed()
    succession.guest.finish(late)
    assert bytes.fromhex(succession.guest.finish(read)) == content(200)[:8]
    mine |= {22}
    succession.check(mine)
    assert succession.account.status().open_regions == 0
    assert succession.store.counters().pinned_extents == 0
    assert succession.account.open_region(0, 0, NO_LIMIT) == 0
    mine |= write(succession, 23)
    succession.check(mine)


def test_a_ledger_of_a_release_without_open_regions_is_adopted(succession: Succession) -> None:
    mine = write(succession, 3)
    succession.kill()
    succession.shorten_ledger()
    succession.succeed()
    succession.check(mine)
    for page in range(0, NR_EXTENTS * 16, 16):
        succession.guest.read(page)
    collapse_region(succession.image, 0)
    assert succession.account.open_region(0, 0, NO_LIMIT) == 0
    mine |= write(succession, 5)
    succession.check(mine)


@pytest.mark.parametrize("capacity", [NR_EXTENTS, 8])
def test_a_huge_page_is_never_punched_in_part_by_a_successor(
    succession: Succession, capacity: int
) -> None:
    mine = write(succession, 3)
    succession.order(open=0)
    succession.order(close=0)
    assert succession.guest.read(5 * 16 + 3) == content(5 * 16 + 3)
    succession.guest.call("splice", page=5 * 16 + 3)
    succession.order(arm=lib.POINT_DISSOLVE)
    succession.order(evict=[7])
    succession.die()
    succession.succeed(nr_extents=capacity)
    assert bytes.fromhex(succession.guest.call("spliced")) == content(5 * 16 + 3)
    assert succession.image.states()[:32] == bytes(32)
    assert succession.guest.read(100) == content(100)
    assert succession.guest.read(3) == MINE
    succession.account.check()
    if capacity == NR_EXTENTS:
        succession.check(mine)


@pytest.mark.parametrize("point", [lib.POINT_COLLAPSED, lib.POINT_PUNCHED])
def test_a_huge_page_whose_making_or_end_was_cut_short_is_known(
    succession: Succession, point: int
) -> None:
    mine = write(succession, 3)
    assert succession.guest.read(5 * 16 + 3) == content(5 * 16 + 3)
    if point == lib.POINT_PUNCHED:
        succession.order(open=0)
        succession.order(close=0)
        assert succession.guest.read(5 * 16 + 3) == content(5 * 16 + 3)
        succession.guest.call("splice", page=5 * 16 + 3)
    succession.order(arm=point)
    succession.order(**({"evict": [7]} if point == lib.POINT_PUNCHED else {"open": 0}))
    succession.die()
    succession.succeed()
    if point == lib.POINT_COLLAPSED:
        assert succession.image.is_collapsed(0)
        assert succession.guest.read(5 * 16 + 3) == content(5 * 16 + 3)
        succession.guest.call("splice", page=5 * 16 + 3)
        assert evict(succession.image, [5]) == [5]
    assert bytes.fromhex(succession.guest.call("spliced")) == content(5 * 16 + 3)
    succession.check(mine)
    succession.account.check()


def test_what_does_not_fit_is_dropped_a_huge_page_at_a_time(succession: Succession) -> None:
    write(succession, 3)
    succession.order(open=0)
    succession.order(close=0)
    succession.guest.call("splice", page=5 * 16 + 3)
    succession.kill()
    succession.succeed(nr_extents=20)
    assert bytes.fromhex(succession.guest.call("spliced")) == content(5 * 16 + 3)
    assert succession.image.states()[:32] == bytes(32)
    assert succession.guest.read(100) == content(100)
