# SPDX-License-Identifier: Apache-2.0
"""The watermarks: always room for one extent to come and one to stay, and no chatter between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.accounting.policy.watermarks import MOST_EXTENTS, Watermarks
from cowshed.cache.errors import InvariantError, UsageError

capacities = st.integers(2, 1 << 24)


@given(capacities)
def test_marks_are_ordered_and_bounded(capacity: int) -> None:
    marks = Watermarks(capacity)
    assert 1 <= marks.low_free <= marks.high_free <= capacity - 1
    assert marks.high_free <= max(1, capacity // 8)
    assert marks.high_free <= MOST_EXTENTS


@given(st.integers(2, 1 << 20))
def test_marks_never_fall_as_capacity_grows(capacity: int) -> None:
    smaller, larger = Watermarks(capacity), Watermarks(capacity + 1)
    assert smaller.low_free <= larger.low_free
    assert smaller.high_free <= larger.high_free


@given(capacities, st.data())
def test_an_order_reaches_high_free_and_is_given_below_low_free_only(
    capacity: int, data: st.DataObject
) -> None:
    marks = Watermarks(capacity)
    free = data.draw(st.integers(0, capacity))
    order = marks.nr_to_evict(free)
    if free < marks.low_free:
        assert free + order == marks.high_free
    else:
        assert order == 0
    assert order <= capacity - free


@given(capacities)
def test_no_order_follows_a_finished_one(capacity: int) -> None:
    marks = Watermarks(capacity)
    assert marks.nr_to_evict(marks.nr_to_evict(0)) == 0


def test_known_marks() -> None:
    found = [(c, Watermarks(c).low_free, Watermarks(c).high_free) for c in (2, 15, 16, 64, 4096)]
    assert found == [(2, 1, 1), (15, 1, 1), (16, 1, 2), (64, 2, 4), (4096, 128, 256)]
    huge = Watermarks(1 << 24)
    assert (huge.low_free, huge.high_free) == (2048, 4096)


def test_a_batch_is_more_than_one_extent_once_there_is_room() -> None:
    marks = Watermarks(16384)
    assert marks.nr_to_evict(marks.low_free - 1) > 256
    assert marks.nr_to_evict(marks.low_free) == 0


@pytest.mark.parametrize("capacity", [-1, 0, 1])
def test_a_capacity_without_room_for_both_is_refused(capacity: int) -> None:
    with pytest.raises(UsageError, match=rf"capacity of {capacity} extents"):
        Watermarks(capacity)


@pytest.mark.parametrize("free", [-1, 65])
def test_an_impossible_count_is_our_bug(free: int) -> None:
    with pytest.raises(InvariantError, match=rf"{free} extents free of 64"):
        Watermarks(64).nr_to_evict(free)


@given(st.integers(1, 512), st.data())
def test_a_load_of_the_largest_extent_finds_room_between_the_marks(
    largest: int, data: st.DataObject
) -> None:
    capacity = data.draw(st.integers(2 * largest, 1 << 24))
    marks = Watermarks(capacity, largest)
    assert largest <= marks.low_free <= marks.high_free <= capacity - largest
    free = data.draw(st.integers(0, largest - 1))
    assert free + marks.nr_to_evict(free) >= largest


def test_a_capacity_of_one_large_extent_is_refused() -> None:
    with pytest.raises(UsageError, match="give at least 64"):
        Watermarks(63, 32)
