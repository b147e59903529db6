# SPDX-License-Identifier: Apache-2.0
"""Windows, fixed and adaptive: how much one fault maps, maps ahead and loads ahead. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cowshed.cache._core import ffi, lib

EXTENT_PAGES = 16


@dataclass(frozen=True)
class Plan:
    first_page: int
    nr_pages: int
    ahead_extent: int
    nr_ahead: int
    prefetch_extent: int
    nr_prefetch: int


class Windows:
    """A guest's window state over an image of nr_pages; granted is the test's to fill."""

    def __init__(
        self, nr_pages: int = 16384, fixed_pages: int = 0, extent_pages: int = EXTENT_PAGES
    ) -> None:
        self.state = ffi.new("struct window_state *")
        self.nr_extents = -(-nr_pages // extent_pages)
        self.shape = ffi.new(
            "struct window_shape *",
            {
                "nr_pages": nr_pages,
                "nr_extents": self.nr_extents,
                "extent_pages": extent_pages,
                "fixed_pages": fixed_pages,
            },
        )
        self.granted = ffi.new("uint64_t[]", self.nr_extents // 64 + 1)
        self.charged = ffi.new("uint64_t[]", nr_pages // 64 + 1)

    def grant(self, *extents: int) -> None:
        for extent in extents:
            self.granted[extent // 64] |= 1 << extent % 64

    def fault(self, page: int) -> Plan:
        plan: Any = ffi.new("struct window_plan *")
        lib.window_plan_fault(self.state, self.shape, self.granted, page, plan)
        return Plan(*(getattr(plan, name) for name in Plan.__dataclass_fields__))

    def charge(self, *pages: int) -> None:
        for page in pages:
            self.charged[page // 64] |= 1 << page % 64

    def write(self, page: int) -> range:
        first, nr = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.window_plan_write(self.state, self.shape, self.charged, page, first, nr)
        return range(first[0], first[0] + nr[0])


def end_of(plan: Plan) -> int:
    """The page behind all that a plan maps, now and ahead."""
    return max(plan.first_page + plan.nr_pages, (plan.ahead_extent + plan.nr_ahead) * EXTENT_PAGES)


def test_a_lone_fault_maps_its_extent_and_the_other_of_its_pair_ahead() -> None:
    assert Windows().fault(100) == Plan(96, 16, 6, 2, 0, 0)


def test_a_stream_grows_its_window_fourfold_up_to_the_most() -> None:
    windows = Windows(nr_pages=1 << 20)
    page, sizes = 16, []
    for _ in range(7):
        end = end_of(windows.fault(page))
        sizes.append((end - page) // 16)
        page = end
    assert sizes == [1, 4, 16, 64, 256, 256, 256]
    assert lib.WINDOW_MAX_PAGES == 256 * 16


def test_a_stream_maps_a_little_at_once_and_the_rest_ahead_and_loads_further() -> None:
    windows = Windows()
    page = 0
    for _ in range(4):
        plan = windows.fault(page)
        page = end_of(plan)
    assert plan.nr_pages == lib.WINDOW_NOW_PAGES
    assert plan.ahead_extent == (plan.first_page + plan.nr_pages) // 16
    assert plan.nr_ahead == 64 - 32
    assert (plan.prefetch_extent, plan.nr_prefetch) == (plan.first_page // 16 + 1, 64)


def test_another_fault_on_the_same_extent_neither_grows_a_stream_nor_begins_one() -> None:
    windows = Windows()
    assert [windows.fault(page).nr_prefetch for page in (0, 1, 2, 16, 17, 18)] == [0] * 3 + [4] * 3


def test_a_walk_through_resident_extents_is_a_stream_although_the_pairs_are_mapped_ahead() -> None:
    windows = Windows(nr_pages=4096 * 16)
    page, nr_faults = 0, 0
    while page < 4096 * 16:
        plan = windows.fault(page)
        nr_faults += 1
        page = end_of(plan)
        windows.grant(*range(plan.first_page // 16, page // 16))
    assert nr_faults < 30


def test_random_faults_in_a_dense_block_are_no_streams() -> None:
    windows = Windows()
    windows.grant(*range(0, 256, 2))
    assert windows.fault(11 * 16).nr_ahead == 256
    assert [windows.fault(extent * 16).nr_prefetch for extent in (51, 101, 151, 201)] == [0] * 4


def test_streams_side_by_side_do_not_break_each_other() -> None:
    windows = Windows(nr_pages=1 << 20)
    places = [0, 100_000, 200_000, 300_000]
    for _ in range(4):
        plans = [windows.fault(place) for place in places]
        places = [end_of(plan) for plan in plans]
    assert [plan.nr_prefetch for plan in plans] == [64, 64, 64, 64]


def test_a_walk_backwards_is_no_stream() -> None:
    windows = Windows()
    for extent in range(100, 80, -1):
        assert windows.fault(extent * 16).nr_prefetch == 0


def test_faults_far_apart_never_grow_a_window() -> None:
    windows = Windows(nr_pages=1 << 20)
    for i in range(50):
        plan = windows.fault(i * 10_007 * 16 % (1 << 20))
        assert (plan.nr_pages, plan.nr_ahead, plan.nr_prefetch) == (16, 2, 0)


def test_half_a_granted_block_has_the_rest_of_it_mapped_ahead() -> None:
    windows = Windows()
    windows.grant(104, 107, 109)
    plan = windows.fault(105 * 16)
    assert (plan.ahead_extent, plan.nr_ahead) == (104, 8)
    assert plan.first_page == 105 * 16
    assert plan.nr_prefetch == 0  # dense or not, nothing is loaded that nobody asked for


def test_a_block_a_quarter_granted_is_left_alone_above_its_dense_part() -> None:
    windows = Windows()
    windows.grant(64, 65)
    plan = windows.fault(66 * 16)
    assert (plan.ahead_extent, plan.nr_ahead) == (64, 4)  # of 8 they would be 3: too few


def test_a_fixed_window_is_its_aligned_self_and_never_grows() -> None:
    windows = Windows(fixed_pages=64)
    for page in (0, 64, 128, 130, 191):
        plan = windows.fault(page)
        assert (plan.first_page, plan.nr_pages, plan.nr_ahead) == (page // 64 * 64, 64, 0)


def test_a_fixed_window_of_one_page_is_that_page() -> None:
    plan = Windows(fixed_pages=1).fault(77)
    assert (plan.first_page, plan.nr_pages, plan.nr_ahead) == (77, 1, 0)


def test_windows_end_where_the_image_does() -> None:
    fixed = Windows(nr_pages=100, fixed_pages=64).fault(99)
    assert (fixed.first_page, fixed.nr_pages, fixed.nr_ahead) == (64, 36, 0)
    adaptive = Windows(nr_pages=100).fault(99)
    assert (adaptive.nr_pages, adaptive.ahead_extent, adaptive.nr_ahead) == (4, 6, 1)


def test_a_run_of_writes_doubles_what_is_opened() -> None:
    windows = Windows()
    page, opened = 10, []
    for _ in range(9):
        pages = windows.write(page)
        assert pages.start == page
        opened.append(len(pages))
        page = pages.stop
    assert opened == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert windows.write(5) == range(5, 6)


def test_scattered_writes_open_one_page_each_and_a_fixed_window_its_width() -> None:
    windows = Windows()
    assert [len(windows.write(page)) for page in (5, 7, 6, 100, 50)] == [1] * 5
    fixed = Windows(nr_pages=100, fixed_pages=8)
    assert [len(fixed.write(page)) for page in (0, 50, 97)] == [8, 8, 3]


def test_a_write_among_half_a_block_of_charged_pages_opens_the_block() -> None:
    windows = Windows()
    windows.charge(*range(33, 47, 2))
    assert windows.write(38) == range(32, 48)  # with 38 they are 8 of 16
    windows.charge(*range(32, 48))
    assert windows.write(50) == range(50, 51)  # its own 16 are judged first
    windows.charge(*range(48, 56))
    assert windows.write(57) == range(32, 64)  # 25 of 32, but of 64 too few


@settings(max_examples=150)
@given(
    nr_pages=st.integers(1, 5000),
    fixed=st.sampled_from([0, 0, 1, 2, 16, 64, 4096]),
    extent_pages=st.sampled_from([1, 2, 16, 512]),
    places=st.lists(st.floats(0, 0.9999), min_size=1, max_size=40),
    run=st.booleans(),
)
def test_every_plan_lies_in_the_image_and_covers_its_fault(
    nr_pages: int, fixed: int, extent_pages: int, places: list[float], run: bool
) -> None:
    windows = Windows(nr_pages, fixed, extent_pages)
    for i, place in enumerate(places):
        page = (
            (int(places[0] * nr_pages) + i * extent_pages) % nr_pages
            if run
            else int(place * nr_pages)
        )
        plan = windows.fault(page)
        assert plan.first_page <= page < plan.first_page + plan.nr_pages <= nr_pages
        assert plan.ahead_extent + plan.nr_ahead <= windows.nr_extents
        assert plan.prefetch_extent + plan.nr_prefetch <= windows.nr_extents
        assert plan.nr_prefetch * extent_pages <= max(lib.WINDOW_PREFETCH_MAX_PAGES, extent_pages)
        assert plan.nr_ahead * extent_pages <= max(lib.WINDOW_MAX_PAGES, extent_pages)
        windows.grant(page // extent_pages)
        pages = windows.write(page)
        assert page in pages
        assert pages.stop <= nr_pages
        assert len(pages) <= max(lib.WINDOW_WRITE_MAX_PAGES, fixed)
        windows.charge(*pages)
