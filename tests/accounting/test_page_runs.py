# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cowshed.accounting.page_runs import page_runs, split_runs


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
