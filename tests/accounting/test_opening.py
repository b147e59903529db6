# SPDX-License-Identifier: Apache-2.0
"""Which regions are worth opening, and in which order they are closed again."""

import random

import pytest

from cowshed.accounting import OpeningPolicy

A, B, C = (0, 1), (0, 2), (1, 1)


@pytest.fixture
def policy() -> OpeningPolicy:
    return OpeningPolicy()


def test_a_huge_page_is_worth_making_for_two_guests_or_for_one_that_asks_twice(
    policy: OpeningPolicy,
) -> None:
    assert policy.name(A, 7, 0.0, is_collapsed=False) == set()
    assert policy.name(A, 8, 0.0, is_collapsed=False) == {7, 8}
    assert policy.name(B, 7, 0.0, is_collapsed=False) == set()
    assert policy.name(B, 7, 0.0, is_collapsed=False) == {7}
    assert policy.name(B, 7, 0.0, is_collapsed=False) == set()  # forgotten since


def test_where_there_is_one_each_guest_has_it_at_once(policy: OpeningPolicy) -> None:
    assert policy.name(A, 7, 0.0, is_collapsed=True) == {7}
    assert policy.name(A, 8, 0.0, is_collapsed=True) == {8}


def test_a_refused_region_is_left_alone_for_a_minute(policy: OpeningPolicy) -> None:
    policy.note_refused(A, 100.0)
    for account in range(5):
        assert policy.name(A, account, 159.9, is_collapsed=False) == set()
    assert policy.name(A, 1, 160.0, is_collapsed=False) == set()
    assert policy.name(A, 2, 160.0, is_collapsed=False) == {1, 2}


def test_a_busy_region_is_left_alone_for_a_second(policy: OpeningPolicy) -> None:
    policy.note_refused(A, 100.0, is_busy=True)
    assert policy.name(A, 1, 100.9, is_collapsed=False) == set()
    assert policy.name(A, 1, 101.0, is_collapsed=False) == set()
    assert policy.name(A, 2, 101.0, is_collapsed=False) == {1, 2}


def test_a_region_that_stays_busy_is_left_alone_for_longer(policy: OpeningPolicy) -> None:
    now = 100.0
    for seconds in (1, 2, 4, 8, 8, 8):
        policy.note_refused(A, now, is_busy=True)
        assert policy.name(A, 1, now + seconds - 0.1, is_collapsed=True) == set()
        now += seconds
        assert policy.name(A, 1, now, is_collapsed=True) == {1}
    policy.note_opened(A, now)
    policy.note_refused(A, now, is_busy=True)
    assert policy.name(A, 1, now + 1, is_collapsed=True) == {1}


def test_the_region_opened_longest_ago_is_closed_to_learn_whether_it_is_used(
    policy: OpeningPolicy,
) -> None:
    assert policy.choose_sample(1000.0) is None
    policy.note_opened(A, 0.0)
    policy.note_opened(B, 5.0)
    assert policy.choose_sample(9.0) is None
    assert policy.choose_sample(10.0) == A
    policy.note_opened(A, 11.0)
    assert policy.choose_sample(14.0) is None
    assert policy.choose_sample(15.0) == B
    policy.note_closed(B)
    assert A in policy
    assert B not in policy


def test_of_what_is_evicted_open_regions_give_their_share(policy: OpeningPolicy) -> None:
    for no in range(8):
        policy.note_opened((0, no), float(no))
    closed = []
    for _ in range(100):  # 8 regions of 32 extents, a quarter of what is resident
        keys = policy.choose_for_room(16, 256, 1024)
        closed += keys
        for key in keys:
            policy.note_closed(key)
            policy.note_opened(key, 100.0)
    assert len(closed) == pytest.approx(100 * 16 / 4 / 32, abs=1)
    assert closed[:8] == [(0, no) for no in range(8)]


def test_where_all_is_open_as_much_is_closed_as_is_wanted(policy: OpeningPolicy) -> None:
    for no in range(8):
        policy.note_opened((0, no), 0.0)
    assert policy.choose_for_room(64, 256, 256) == [(0, 0), (0, 1)]
    assert policy.choose_all_for(33, 256) == [(0, 0), (0, 1)]
    assert len(policy.choose_all_for(10_000, 256)) == 8


def test_what_operators_have_pinned_is_not_closed_for_room(policy: OpeningPolicy) -> None:
    for no in range(8):
        policy.note_opened((0, no), 0.0)
    pinned = {(0, no) for no in range(6)} | {(1, 0)}
    assert policy.choose_for_room(128, 256, 256, pinned) == [(0, 6)]
    assert policy.choose_all_for(10_000, 256, pinned) == [(0, 6), (0, 7)]
    assert policy.choose_for_room(64, 256, 256, {(0, no) for no in range(8)}) == []


def test_without_an_open_region_none_is_chosen(policy: OpeningPolicy) -> None:
    assert policy.choose_for_room(64, 0, 256) == []
    assert policy.choose_all_for(64, 0) == []


def test_what_it_remembers_is_bounded(policy: OpeningPolicy) -> None:
    rng = random.Random(3)
    for no in range(70_000):
        policy.name((0, no), rng.randrange(4), 0.0, is_collapsed=False)
    assert policy.name((0, 0), 9, 0.0, is_collapsed=False) == set()  # was forgotten
    assert policy.name((0, 69_999), 9, 0.0, is_collapsed=False) != set()
