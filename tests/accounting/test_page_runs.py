# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.accounting.page_runs import (
    PackedRuns,
    packed_runs,
    page_bitmap,
    page_runs,
    split_runs,
)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200)), max_size=8))
def test_runs_are_the_bits_and_as_long_as_they_can_be(spans: list[tuple[int, int]]) -> None:
    pages = {page for first, nr in spans for page in range(first, first + nr)}
    bitmap = sum(1 << page for page in pages)
    runs = list(page_runs(bitmap))
    assert [page for first, nr in runs for page in range(first, first + nr)] == sorted(pages)
    assert all(a + nr < b for (a, nr), (b, _) in itertools.pairwise(runs))
    batches = list(split_runs(bitmap, 7))
    assert [page for batch in batches for a, nr in batch for page in range(a, a + nr)] == sorted(
        pages
    )
    assert all(sum(nr for _, nr in batch) == 7 for batch in batches[:-1])


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200)), max_size=8), st.integers(1, 300)
)
def test_packed_runs_are_the_same_runs(spans: list[tuple[int, int]], max_pages: int) -> None:
    bitmap = page_bitmap(page for first, nr in spans for page in range(first, first + nr))
    packed = list(packed_runs(bitmap, max_pages))
    assert packed == [tuple(batch) for batch in split_runs(bitmap, max_pages)]
    assert all(runs.check(bitmap.bit_length()) == sum(nr for _, nr in runs) for runs in packed)
    assert [PackedRuns.of(tuple(runs)).raw for runs in packed] == [runs.raw for runs in packed]


@pytest.mark.parametrize(
    "runs",
    [((0, 0),), ((3, 2), (4, 1)), ((8, 3),), ((11, 1),), ((1 << 63, 1),)],
)
def test_runs_that_overlap_or_leave_the_image_are_refused(
    runs: tuple[tuple[int, int], ...],
) -> None:
    with pytest.raises(ValueError, match="out of order or outside"):
        PackedRuns.of(runs).check(10)
