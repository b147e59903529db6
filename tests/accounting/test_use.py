# SPDX-License-Identifier: Apache-2.0
"""Use over a window, from counters and probes that a known course of events would leave."""

import pytest

from cowshed.accounting import Counts, Exposure, Observed, estimate_use
from cowshed.accounting.policy.sampling import Probe

EXTENT_BYTES = 65536
NR_EXTENTS = 4096
WINDOW = 60


def observed(
    *,
    demanded: int = 0,
    prefetched: int = 0,
    soft: int = 0,
    reloads: int = 0,
    unmaps: int = 0,
    resident: tuple[int, int] = (500, 500),
    touched: float = 0.5,
) -> Observed:
    """An image whose counters grew by so much, evenly, in a minute; resident: first and last."""
    image = Observed(size_bytes=NR_EXTENTS * EXTENT_BYTES)
    for second in range(WINDOW + 1):
        part = second / WINDOW
        grown = [round(nr * part) for nr in (demanded, prefetched, soft, reloads, unmaps)]
        now_resident = round(resident[0] + (resident[1] - resident[0]) * part)
        image.counts.append(Counts(second, *grown, now_resident * EXTENT_BYTES))
    nr = 200
    for no in range(nr):
        is_touched = no < touched * nr
        touches = (0.5,) if is_touched else ()
        image.exposures.append((WINDOW, Exposure(no, 1.0, touches)))
        image.probes.append((WINDOW, Probe(0.5, True) if is_touched else Probe(61.0, False)))
    return image


def working_set(image: Observed) -> float:
    use = estimate_use([image], [], WINDOW, WINDOW, EXTENT_BYTES, None)
    assert use.working_set_bytes is not None
    assert use.working_set_bytes.low <= use.working_set_bytes.value <= use.working_set_bytes.high
    return use.working_set_bytes.value / EXTENT_BYTES


def test_without_loads_the_working_set_is_the_touched_part_of_what_is_resident() -> None:
    assert working_set(observed()) == pytest.approx(250, rel=0.05)


def test_what_was_loaded_in_the_window_and_is_resident_counts_once() -> None:
    started = observed(demanded=500, resident=(0, 500), touched=1)
    assert working_set(started) == pytest.approx(500, rel=0.01)


def test_what_was_loaded_and_is_gone_counts_beside_what_is_resident() -> None:
    assert working_set(observed(demanded=1000, unmaps=1000)) == pytest.approx(1250, rel=0.05)
    assert working_set(observed(prefetched=1000, unmaps=1000)) == pytest.approx(1250, rel=0.05)


def test_what_is_loaded_ahead_and_stays_counts_as_far_as_it_is_touched() -> None:
    assert working_set(observed(prefetched=500)) == pytest.approx(250, rel=0.05)


def test_a_reload_is_no_new_part_of_the_working_set() -> None:
    again = observed(demanded=1000, unmaps=1000, reloads=800)
    assert working_set(again) == pytest.approx(450, rel=0.05)


def test_the_working_set_is_no_more_than_the_image() -> None:
    assert working_set(observed(demanded=9999, unmaps=9999)) == NR_EXTENTS


def test_soft_hits_are_hits_and_demand_loads_are_misses() -> None:
    image = observed(demanded=600, prefetched=600, soft=300, unmaps=300, touched=0)
    use = estimate_use([image], [], WINDOW, WINDOW, EXTENT_BYTES, None)
    assert use.hit_rate is not None
    assert use.hit_rate.value == pytest.approx(1 / 3)


def test_reloads_of_demand_loads_would_be_hits_with_twice_the_memory() -> None:
    image = observed(demanded=600, prefetched=600, reloads=600, unmaps=600, touched=0.1)
    use = estimate_use([image], [], WINDOW, WINDOW, EXTENT_BYTES, 500)
    assert use.hit_rate is not None
    assert use.hit_rate_at is not None
    misses = 1 - use.hit_rate.value
    assert use.hit_rate_at[1] == use.hit_rate.value
    assert use.hit_rate_at[2] == pytest.approx(1 - misses / 2)


def test_probes_under_way_are_untouched_so_far() -> None:
    image = observed(touched=1)
    image.exposures.clear()
    out = [Probe(100.0, False)] * 200
    use = estimate_use([image], out, WINDOW, WINDOW, EXTENT_BYTES, None)
    assert use.working_set_bytes is not None
    assert use.working_set_bytes.value == pytest.approx(250 * EXTENT_BYTES)


def test_nothing_resident_is_unknown() -> None:
    gone = observed(unmaps=500, resident=(0, 0))
    use = estimate_use([gone], [], WINDOW, WINDOW, EXTENT_BYTES, 500)
    assert (use.hit_rate, use.working_set_bytes, use.hit_rate_at) == (None, None, None)
