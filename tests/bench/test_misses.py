# SPDX-License-Identifier: Apache-2.0
"""The eviction policy against others, on drawn accesses: what the design promises of its misses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from bench_modules import bench_module

draws, replay = bench_module("draws"), bench_module("replay")

CAPACITIES = (256, 512, 768)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_on_zipf_accesses_it_misses_at_most_a_twentieth_more_than_lru(capacity: int) -> None:
    accesses = draws.zipf(Path(), random.Random(1))
    assert replay.ours(accesses, capacity) <= 1.05 * replay.lru(accesses, capacity)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_with_scans_between_it_misses_no_more_than_lru(capacity: int) -> None:
    accesses = draws.zipf_with_scans(Path(), random.Random(1))
    assert replay.ours(accesses, capacity) <= replay.lru(accesses, capacity)


def test_what_other_policies_miss_is_known_of_short_sequences() -> None:
    accesses = [1, 2, 1, 3, 1, 2]
    assert replay.fifo(accesses, 2) == 5
    assert replay.lru(accesses, 2) == 4
    assert replay.belady(accesses, 2) == 4
    # 1 was used twice before 3 came, and is kept.
    assert replay.s3_fifo([1, 1, 1, 2, 3, 1], 2) == 3


def test_nobody_misses_less_than_belady_or_more_than_all() -> None:
    rng = random.Random(7)
    for _ in range(20):
        nr = rng.randrange(20, 200)
        accesses = [int(rng.paretovariate(1)) % nr for _ in range(2000)]
        capacity = rng.randrange(16, nr + 1) if nr > 16 else 16
        misses = {name: count(accesses, capacity) for name, count in replay.POLICIES.items()}
        least, most = len(set(accesses)), len(accesses)
        assert least <= misses["Belady"] == min(misses.values()), misses
        assert max(misses.values()) <= most


def test_guests_are_merged_without_loss_and_each_in_its_order() -> None:
    guests = [[guest * 100 + no for no in range(50)] for guest in range(4)]
    for stagger in (0, 20):
        merged = list(draws.interleave(guests, random.Random(1), stagger))
        for guest, accesses in enumerate(guests):
            assert [extent for extent in merged if extent // 100 == guest] == accesses
    assert merged[:20] == list(range(20)), "the first is alone until the second begins"
