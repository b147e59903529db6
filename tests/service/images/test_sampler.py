# SPDX-License-Identifier: Apache-2.0
"""Probes begin, end by a touch or by their time, and tell what guests use."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass

import pytest
from stage import EXTENT_PAGES, MakeStage, Stage, content, fail_at, make_stage, until

from cowshed.accounting import WINDOWS_SECONDS, EvictReason, evict
from cowshed.cache import ExtentState, probe_huge_frames
from cowshed.cache._core import lib
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.sampler import Sampler

__all__ = ["make_stage"]

NR_EXTENTS = 256
MOST_OUT = 8
MOST_PER_TICK = 3


@dataclass
class Sampled:
    """A store, its sampler, and a clock that the test moves."""

    stage: Stage
    sampler: Sampler
    evictor: Evictor
    seconds: float = 0.0

    def tick(self, seconds: float = 0.1) -> None:
        """Let time pass, and the sampler look."""
        self.seconds += seconds
        self.sampler.tick()

    def are_back(self) -> bool:
        """Whether all probes that ended are in the frames again."""
        counters = self.stage.store.counters()
        return not counters.loading_extents and not counters.queued_loads

    def out(self) -> list[int]:
        """The extents that are in the standby list."""
        states = self.stage.image.states()
        return [extent for extent, state in enumerate(states) if state == ExtentState.ABSENT]


@pytest.fixture
def sampled(make_stage: MakeStage) -> Sampled:
    stage = make_stage(nr_pages=NR_EXTENTS * EXTENT_PAGES, capacity=320, standby=24)
    evictor = Evictor(stage.store, 20)
    sampled = Sampled(stage, Sampler(stage.store, evictor, lambda: sampled.seconds), evictor)
    stage.load()
    fail_at(lib.POINT_LOAD_READ, errno.EIO)  # from here on nothing may be read
    return sampled


def test_a_few_probes_are_out_at_once_and_come_back_without_a_read(sampled: Sampled) -> None:
    loads = sampled.stage.image.counters().loads
    seen = set()
    for _ in range(100):
        sampled.tick(1.1)
        assert len(sampled.out()) <= MOST_OUT
        seen.update(sampled.out())
        until(sampled.are_back, "those that ended are in the frames again")
    assert len(seen) > NR_EXTENTS // 2
    counters = sampled.stage.image.counters()
    assert (counters.loads, counters.sample_hits) == (loads, 0)
    assert counters.standby_samples > 60
    for use in [*sampled.sampler.use(), *sampled.sampler.use(sampled.stage.image)]:
        assert use.hit_rate is None, "nobody uses anything: there is no rate"
    sampled.evictor.check()
    sampled.stage.store.check()


def test_touched_probes_are_uses_that_found_their_extent_in_memory(sampled: Sampled) -> None:
    guest = sampled.stage.guest()
    for _ in range(40):
        sampled.tick()
        for extent in sampled.out():
            assert guest.read(extent * EXTENT_PAGES) == content(extent * EXTENT_PAGES)
    sampled.tick()
    counters = sampled.stage.image.counters()
    assert counters.sample_hits == counters.soft_hits > 0.8 * counters.standby_samples
    for use in sampled.sampler.use():
        assert use.hit_rate is not None
        assert use.hit_rate.value == use.hit_rate.low == use.hit_rate.high == 1
        assert use.hit_rate_at is not None
        assert use.hit_rate_at[1] == use.hit_rate_at[2] == 1
        assert use.working_set_bytes is not None
        assert use.working_set_bytes.value > 0.9 * sampled.stage.size_bytes
    assert [use.hit_rate_at for use in sampled.sampler.use(sampled.stage.image)] == [None] * 3
    sampled.stage.store.check()


def test_extents_that_are_touched_are_probed_again_at_the_same_pace(sampled: Sampled) -> None:
    guest = sampled.stage.guest()
    begun, seen = 0, Counter[int]()
    for _ in range(60):
        sampled.tick()
        out = sampled.out()
        counted = sampled.stage.image.counters().standby_samples
        assert counted - begun <= MOST_PER_TICK
        assert len(out) <= MOST_OUT
        begun = counted
        seen.update(out)
        for extent in out:
            guest.read(extent * EXTENT_PAGES)
    assert max(seen.values()) > 1


def test_no_more_are_out_than_half_of_what_the_standby_list_holds(sampled: Sampled) -> None:
    sampled.stage.store.set_standby(6, 1)
    for _ in range(10):
        sampled.tick()
        assert len(sampled.out()) <= 3


def test_a_probe_whose_room_is_needed_makes_room_for_another(sampled: Sampled) -> None:
    for _ in range(MOST_OUT):
        sampled.tick(0.01)
    first = sampled.out()
    assert len(first) == MOST_OUT
    sampled.stage.store.set_standby(0, 1)
    assert sampled.stage.store.counters().standby_extents == 0
    sampled.stage.store.set_standby(24, 1)
    sampled.tick(0.01)
    assert len(sampled.out()) == MOST_OUT + MOST_PER_TICK, "the first ones are absent now"
    sampled.evictor.check()


def test_an_image_that_is_closed_is_forgotten(sampled: Sampled) -> None:
    sampled.tick()
    sampled.stage.store.close_image(sampled.stage.image)
    sampled.tick(WINDOWS_SECONDS[-1])
    assert sampled.sampler.use(sampled.stage.image)[0].hit_rate is None


def test_evicted_extents_are_no_probes(sampled: Sampled) -> None:
    gone = evict(sampled.stage.image, list(range(NR_EXTENTS)), EvictReason.REQUEST)
    assert len(gone) == NR_EXTENTS
    for _ in range(5):
        sampled.tick()
    assert sampled.stage.store.counters().standby_extents == 0


@pytest.mark.skipif(probe_huge_frames() is not None, reason="needs to mount a tmpfs: run as root")
def test_extents_that_the_list_does_not_take_are_not_probed(make_stage: MakeStage) -> None:
    """A probe of one would evict it."""
    stage = make_stage(nr_pages=8 * 512, capacity=320, image_extent_pages=512, standby=24)
    evictor = Evictor(stage.store, 20, 32)
    sampler = Sampler(stage.store, evictor)
    stage.load()
    for _ in range(20):
        sampler.tick()
    assert evictor.sample([(stage.image.image_no, 0)]) == []
    assert set(stage.image.states()) == {ExtentState.RESIDENT}
    assert [use.hit_rate for use in sampler.use()] == [None] * len(WINDOWS_SECONDS)
    assert "no extents of this size" in sampler.why_unknown()
