# SPDX-License-Identifier: Apache-2.0
"""The table of regions: what may be in it, and what moves make of it."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage import PAGE, Stage

from cowshed.accounting import MAX_REGIONS, Account, Region
from cowshed.cache import UsageError
from cowshed.cache._core import ffi, lib

NR_PAGES = 64
PLACES = 256  # addresses in the model, in pages


def table_of(*regions: tuple[int, int, int]) -> object:
    """A table of (address, first page, number of pages), addresses in pages; the error if none."""
    table = ffi.new("struct region_table *")
    given = ffi.new("struct account_region[]", max(1, len(regions)))
    for place, (at, first, nr) in zip(given, regions, strict=False):
        place.address, place.first_page, place.nr_pages = at * PAGE, first, nr
    err = lib.regions_make(given, len(regions), NR_PAGES, table)
    return table if err == 0 else err


def rows(table: object) -> list[tuple[int, int, int]]:
    rows = table.regions[0 : table.nr]  # type: ignore[attr-defined]
    return [(row.address // PAGE, row.first_page, row.nr_pages) for row in rows]


def test_regions_are_kept_in_the_order_of_pages_and_neighbours_become_one() -> None:
    assert rows(table_of((90, 40, 8), (10, 0, 8), (18, 8, 4))) == [(10, 0, 12), (90, 40, 8)]


@pytest.mark.parametrize(
    "regions",
    [
        [(10, 0, 0)],
        [(0, 0, 4)],
        [(10, 60, 5)],
        [(10, 64, 1)],
        [(10, 1 << 62, 8)],
        [(10, 8, 1 << 60)],
        [((1 << 45) - 2, 0, 4)],
        [(10, 0, 8), (30, 7, 2)],
        [(10, 0, 8), (17, 20, 2)],
        [(10, 0, 8), (10, 0, 8)],
    ],
    ids=str,
)
def test_regions_that_make_no_sense_are_refused(regions: list[tuple[int, int, int]]) -> None:
    assert table_of(*regions) == -errno.EINVAL


def test_regions_that_are_too_many_are_refused_and_leave_the_table_alone() -> None:
    assert table_of(*((100 * no + 1, no, 1) for no in range(MAX_REGIONS + 1))) == -errno.E2BIG
    table = table_of((1000, 0, NR_PAGES))
    for page in range(1, 31, 2):
        assert lib.regions_move(table, (1000 + page) * PAGE, (5000 + 2 * page) * PAGE, PAGE) == 0
    before = rows(table)
    assert len(before) == 31
    assert lib.regions_move(table, 1050 * PAGE, 9000 * PAGE, PAGE) == -errno.E2BIG
    assert rows(table) == before


@given(
    st.lists(
        st.tuples(st.integers(1, PLACES), st.integers(1, PLACES), st.integers(1, NR_PAGES)),
        max_size=12,
    )
)
def test_moves_do_what_they_do_page_by_page(moves: list[tuple[int, int, int]]) -> None:
    """Model: which page is at which address; what a move lands on is gone."""
    table = table_of((1, 0, NR_PAGES))
    model = {1 + page: page for page in range(NR_PAGES)}
    for start, to, nr in moves:
        if abs(start - to) < nr:
            continue  # the kernel refuses it
        after = {at: page for at, page in model.items() if not 0 <= at - start < nr}
        after = {at: page for at, page in after.items() if not 0 <= at - to < nr}
        after |= {to + at - start: page for at, page in model.items() if 0 <= at - start < nr}
        err = lib.regions_move(table, start * PAGE, to * PAGE, nr * PAGE)
        if err:
            assert err == -errno.E2BIG
            continue
        model = after
        found = {at + i: first + i for at, first, nr in rows(table) for i in range(nr)}
        assert found == model
        pages = [first for _, first, _ in rows(table)]
        assert pages == sorted(pages)


def test_an_account_says_where_it_is_and_why_it_cannot_be_there(stage: Stage) -> None:
    account = Account(stage.image, stage.quota())
    try:
        assert account.regions() == []
        two = [Region(0x10000, 0, 4 * PAGE), Region(0x20000, 8 * PAGE, 4 * PAGE)]
        account.place(-1, -1, two)
        assert account.regions() == two
        for regions, words in (
            ([Region(0x10001, 0, PAGE)], "whole pages"),
            ([Region(-PAGE, 0, PAGE)], "out of the range"),
            ([Region(1 << 63, 0, PAGE)], "out of the range"),
            ([Region(0x10000, 0, stage.image.map_bytes + PAGE)], "reach beyond"),
            ([Region(0x10000, 0, PAGE), Region(0x10000, PAGE, PAGE)], "overlap"),
            ([Region(0x10000 + i * 2 * PAGE, i * PAGE, PAGE) for i in range(33)], "32 at most"),
        ):
            with pytest.raises(UsageError, match=words):
                account.place(-1, -1, regions)
        assert account.regions() == two
    finally:
        account.close()
