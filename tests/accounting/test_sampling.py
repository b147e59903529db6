# SPDX-License-Identifier: Apache-2.0
"""The estimates from probes against loads whose truth is known, over a thousand seeds."""

import math
import random
import statistics
from collections import OrderedDict

import pytest

from cowshed.accounting.policy.sampling import (
    MOST_TOUCHES,
    Estimate,
    Exposure,
    Load,
    Probe,
    hit_rate_with,
    touch_rate,
    touched_share,
)

NR_SEEDS = 1000


def zipf_rates(nr_extents: int, nr_resident: int, total: float) -> list[float]:
    """Touches per second of the most popular extents, of a load with so many in all."""
    weights = [(rank + 1) ** -0.9 for rank in range(nr_extents)]
    return [total * weight / sum(weights) for weight in weights[:nr_resident]]


def probes(rates: list[float], nr: int, seconds: float, rng: random.Random) -> list[Probe]:
    """Probe random extents, each touched at its rate; all end after so many seconds."""
    found = []
    for _ in range(nr):
        rate = rng.choice(rates)
        after = rng.expovariate(rate) if rate else math.inf
        found.append(Probe(min(after, seconds), after <= seconds))
    return found


def exposures(rates: list[float], nr: int, seconds: float, rng: random.Random) -> list[Exposure]:
    """Expose extents in a random order, each for so many seconds or MOST_TOUCHES touches."""
    found = []
    order: list[int] = []
    for _ in range(nr):
        order = order or rng.sample(range(len(rates)), len(rates))
        extent, touches, after = order.pop(), [], 0.0
        while len(touches) < MOST_TOUCHES:
            after += rng.expovariate(rates[extent]) if rates[extent] else math.inf
            if after > seconds:
                break
            touches.append(after)
        lasted = min(after, seconds)
        found.append(Exposure(extent, lasted, tuple(touches)))
    return found


def coverage(estimates: list[Estimate], truth: float) -> float:
    return sum(each.low <= truth <= each.high for each in estimates) / len(estimates)


@pytest.mark.parametrize("nr_probes", [30, 200])
@pytest.mark.parametrize("within", [10, 60])
def test_the_share_is_unbiased_and_its_interval_holds_the_truth(
    within: float, nr_probes: int
) -> None:
    rates = [0.01] * 400 + [1.0] * 100 + [0.0] * 100
    truth = statistics.mean(1 - math.exp(-rate * within) for rate in rates)
    found = [
        touched_share(probes(rates, nr_probes, within * 1.5, random.Random(seed)), within)
        for seed in range(NR_SEEDS)
    ]
    estimates = [each for each in found if each is not None]
    assert len(estimates) == NR_SEEDS
    assert abs(statistics.mean(each.value for each in estimates) - truth) < 0.01
    assert coverage(estimates, truth) > 0.93


def test_probes_that_ended_early_count_for_as_long_as_they_lasted() -> None:
    rates = [0.02] * 100 + [0.0] * 100
    truth = statistics.mean(1 - math.exp(-rate * 30) for rate in rates)
    estimates = []
    for seed in range(NR_SEEDS):
        rng = random.Random(seed)
        short, long = probes(rates, 200, 5, rng), probes(rates, 60, 40, rng)
        estimate = touched_share([*short, *long], 30)
        assert estimate is not None
        estimates.append(estimate)
    assert abs(statistics.mean(each.value for each in estimates) - truth) < 0.01
    assert coverage(estimates, truth) > 0.93


def test_what_no_probe_lasted_for_is_unknown() -> None:
    assert touched_share([], 10) is None
    assert touched_share([Probe(5, False), Probe(1, True)], 10) is None
    all_touched = touched_share([Probe(5, True), Probe(1, True)], 10)
    assert all_touched == Estimate(1, pytest.approx(0.224, abs=0.001), 1)
    assert touch_rate([], 100) is None


def test_nothing_touched_is_zero_with_the_rule_of_three_above_it() -> None:
    estimate = touched_share([Probe(20, False)] * 100, 10)
    assert estimate is not None
    assert (estimate.value, estimate.low) == (0, 0)
    assert estimate.high == pytest.approx(0.03, abs=0.001)
    rate = touch_rate([Exposure(0, 20, ())] * 100, 100)
    assert rate is not None
    assert (rate.value, rate.low) == (0, 0)
    assert rate.high == pytest.approx(3 / (100 * 20), rel=0.01)


@pytest.mark.parametrize("nr_resident", [205, 410, 614])
def test_the_hit_rate_of_zipf_reads_is_near_the_truth_and_its_interval_holds_it(
    nr_resident: int,
) -> None:
    total, nr = 2000.0, 280  # exposures, as a minute has
    rates = zipf_rates(1024, nr_resident, total)
    missed = total - sum(rates)
    estimates = []
    for seed in range(NR_SEEDS):
        found = exposures(rates, nr, nr_resident / sum(rates), random.Random(seed))
        rate = touch_rate(found, nr_resident)
        assert rate is not None
        uses = (rate.times(nr_resident).value, rate.low * nr_resident, rate.high * nr_resident)
        estimates.append(Estimate(*(each / (each + missed) for each in uses)))
    truth = sum(rates) / total
    assert abs(statistics.mean(each.value for each in estimates) - truth) < 0.005
    assert sum(abs(each.value - truth) < 0.05 for each in estimates) > 0.95 * NR_SEEDS
    assert coverage(estimates, truth) > 0.93


@pytest.mark.parametrize("nr", [40, 400])
@pytest.mark.parametrize("seconds", [0.1, 1, 10])
def test_the_rate_is_unbiased_whether_time_or_touches_end_exposures(
    seconds: float, nr: int
) -> None:
    rates = zipf_rates(1024, 300, 500.0)
    estimates = []
    for seed in range(NR_SEEDS):
        estimate = touch_rate(exposures(rates, nr, seconds, random.Random(seed)), len(rates))
        assert estimate is not None
        estimates.append(estimate)
    truth = statistics.mean(rates)
    deviation = statistics.stdev(each.value for each in estimates) / math.sqrt(NR_SEEDS)
    assert abs(statistics.mean(each.value for each in estimates) - truth) < 3.5 * deviation
    assert coverage(estimates, truth) > 0.9


def test_the_rate_of_even_touches_is_unbiased_and_its_interval_holds_the_truth() -> None:
    estimates = []
    for seed in range(NR_SEEDS):
        estimate = touch_rate(exposures([3.0] * 1000, 300, 0.3, random.Random(seed)), 1000)
        assert estimate is not None
        estimates.append(estimate)
    assert statistics.mean(each.value for each in estimates) == pytest.approx(3, rel=0.01)
    assert coverage(estimates, 3) > 0.95


def test_touches_that_come_when_the_extent_would_be_gone_do_not_count() -> None:
    late = [Exposure(0, 10, (3.0, 4.0))] * 50 + [Exposure(0, 10, ())] * 50
    rate = touch_rate(late, 1000, 1.0)
    assert rate is not None
    assert (rate.value, rate.low) == (0, 0)
    assert rate.high == pytest.approx(3 / 100, rel=0.01)
    with_early = touch_rate([*late, *[Exposure(0, 10, (0.5, 2.0))] * 10], 1000, 1.0)
    assert with_early is not None
    assert 0.03 < with_early.low < with_early.value < with_early.high < 0.3
    assert with_early.value == pytest.approx(10 / 110)


class Lru:
    """A cache that is told of every access, for its misses and for what is in it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.resident: OrderedDict[int, None] = OrderedDict()
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.misses = self.reloads = 0

    def use(self, extent: int) -> None:
        if extent in self.resident:
            self.resident.move_to_end(extent)
            return
        self.misses += 1
        self.reloads += self.ghosts.pop(extent, 0) is None
        self.resident[extent] = None
        if len(self.resident) > self.capacity:
            self.ghosts[self.resident.popitem(last=False)[0]] = None
        if len(self.ghosts) > self.capacity:
            self.ghosts.popitem(last=False)


@pytest.mark.parametrize("probe_seconds", [2, 60])
@pytest.mark.parametrize("alpha", [0.6, 0.9, 1.2])
def test_the_curve_of_miss_ratios_is_within_a_tenth_of_simulated_caches(
    alpha: float, probe_seconds: float
) -> None:
    nr_extents, capacity, total, nr_uses = 2048, 512, 1000.0, 60_000
    rng = random.Random(1)
    weights = [(rank + 1) ** -alpha for rank in range(nr_extents)]
    rates = [total * weight / sum(weights) for weight in weights]
    caches = {factor: Lru(int(capacity * factor)) for factor in (0.5, 1, 2)}
    warm, uses = nr_uses // 3, rng.choices(range(nr_extents), weights, k=nr_uses)
    for no, extent in enumerate(uses):
        for cache in caches.values():
            if no == warm:
                cache.misses = cache.reloads = 0
            cache.use(extent)
    seconds = (nr_uses - warm) / total
    now = caches[1]
    resident = [rates[extent] for extent in now.resident]
    load = Load(sum(resident), 0, now.misses / seconds, now.reloads / seconds)
    found = probes(resident, 4000, probe_seconds, rng)
    for factor, cache in caches.items():
        truth = cache.misses / (nr_uses - warm)
        hit_rate = hit_rate_with(factor, load, found, capacity, capacity, nr_extents)
        assert hit_rate is not None
        assert 1 - hit_rate == pytest.approx(truth, rel=0.1), (factor, truth, hit_rate)


def test_probes_that_were_too_short_say_nothing_of_half_the_capacity() -> None:
    load = Load(10, 0, 1, 1)
    short = [Probe(1.0, touched=False)] * 100
    assert hit_rate_with(0.5, load, short, 512, 512, 2048) is None
    assert hit_rate_with(2, load, short, 512, 512, 2048) == 1
    assert hit_rate_with(0.5, load, [], 512, 512, 2048) is None
