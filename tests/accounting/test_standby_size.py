# SPDX-License-Identifier: Apache-2.0
"""The length of the standby list follows what its copies cost beside the misses."""

import pytest

from cowshed.accounting.policy.standby_size import (
    COST_LEAST,
    COST_MOST,
    LEAST_EXTENTS,
    LEAST_SHARE,
    LOADS_PER_STEP,
    STEP,
    StandbySize,
)

LONGEST = 1000
READ_NS = 1_000_000


def after(cost: float, steps: int, size: StandbySize | None = None) -> StandbySize:
    size = size or StandbySize(LONGEST)
    for _ in range(steps):
        size.note(LOADS_PER_STEP, READ_NS, int(READ_NS * cost))
    return size


def test_it_begins_with_the_longest_and_stays_there_while_copies_are_cheap() -> None:
    assert StandbySize(LONGEST).extents == LONGEST
    assert after(COST_LEAST / 2, 50).extents == LONGEST


def test_it_shrinks_while_copies_cost_too_much_and_grows_again() -> None:
    size = after(COST_MOST * 2, 3)
    assert size.extents == pytest.approx(LONGEST / STEP**3)
    assert after((COST_LEAST + COST_MOST) / 2, 9, size).extents == pytest.approx(LONGEST / STEP**3)
    assert after(0, 2, size).extents == pytest.approx(LONGEST / STEP)
    assert after(9, 1000).extents == LONGEST / LEAST_SHARE
    assert after(9, 1000, StandbySize(50)).extents == LEAST_EXTENTS
    assert after(9, 1000, StandbySize(20)).extents == 20


def test_a_step_is_decided_on_enough_loads() -> None:
    size = StandbySize(LONGEST)
    for _ in range(LOADS_PER_STEP - 1):
        size.note(1, 1, 100)
    assert size.extents == LONGEST
    size.note(1, 1, 100)
    assert size.extents < LONGEST
    size.note(LOADS_PER_STEP, 0, 0)  # loads without a measured time
    assert size.extents == LONGEST


def test_without_a_list_nothing_grows() -> None:
    assert after(0, 10, StandbySize(0)).extents == 0
