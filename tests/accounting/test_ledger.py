# SPDX-License-Identifier: Apache-2.0
"""The ledger's arithmetic: grants, charges, quotas, latencies; closing returns everything."""

import random
from array import array
from itertools import pairwise

import pytest
from stage import PAGE, MakeStage, Stage, content, private_pages, until

from cowshed.accounting import Account, Latency, LatencyKind, Quota, QuotaPolicy, read_latency
from cowshed.cache import UsageError
from cowshed.cache._core import lib


def bits(words: bytes) -> set[int]:
    number = int.from_bytes(words, "little")
    return {i for i in range(number.bit_length()) if number >> i & 1}


def test_a_new_account_is_all_zero_and_has_its_quota(stage: Stage) -> None:
    quota = Quota(5 * PAGE + 1, QuotaPolicy.KILL)
    account = Account(stage.image, quota)
    quota.close()  # the account keeps it
    try:
        status = account.status()
        assert (status.quota_pages, status.policy) == (5, QuotaPolicy.KILL)
        assert (status.granted_extents, status.private_pages, status.broken) == (0, 0, 0)
        assert not any(vars(status.counters).values())
        assert not any(account.private_bitmap())
        assert len(account.private_bitmap()) == stage.image.nr_pages // 8
    finally:
        account.close()
    account.close()  # harmless


def test_an_image_with_an_account_is_not_closed(stage: Stage) -> None:
    account = Account(stage.image, stage.quota())
    with pytest.raises(UsageError, match="closing image 'disk'"):
        stage.store.close_image(stage.image)
    account.close()


def test_a_quota_below_a_page_is_refused_with_the_least(stage: Stage) -> None:
    with pytest.raises(UsageError, match="4095 bytes holds no page; give at least 4096"):
        Quota(4095, QuotaPolicy.STOP)


def test_refs_are_the_sum_of_grants_and_private_bits_the_charges(
    stage: Stage, rng: random.Random
) -> None:
    guests = [stage.guest(window=1, write_window=rng.choice([1, 4])) for _ in range(3)]
    for _ in range(60):
        guest, page = rng.choice(guests), rng.randrange(stage.image.nr_pages)
        match rng.randrange(5):
            case 0:
                guest.call("write", offset=page * PAGE, given_hex="aa")
            case 1:
                guest.call("discard", page=page, nr_pages=1)
            case 2:
                stage.evict(page // 16)
            case _:
                guest.read(page)
    grants = array("I", bytes(4 * stage.image.nr_extents))
    for guest in guests:
        before = array("I", grants)
        guest.account.add_grants(grants)
        added = sum(grants) - sum(before)
        assert added == guest.account.status().granted_extents

        def agrees(account: Account = guest.account) -> bool:
            charged = bits(account.private_bitmap())
            counted = account.status().private_pages
            return counted == len(charged) and bits(account.unsettled_bitmap()) <= charged

        until(agrees, "count and bits agree")  # after the last discard, say
    assert grants == stage.image.refs()
    assert stage.audit().mismatches == []


def test_closing_an_account_returns_its_grants_alone(stage: Stage) -> None:
    leaver, stayer = stage.guest(window=1), stage.guest(window=1)
    for extent in range(4):
        leaver.read(extent * 16)
    stayer.read(0)
    stage.detach(leaver)
    assert list(stage.image.refs()) == [1, 0, 0, 0, 0, 0, 0, 0]
    assert stage.audit().mismatches == []


def test_private_pages_are_the_bits_of_the_pages_written(stage: Stage) -> None:
    guest = stage.guest()
    for page in (0, 63, 64, 127):
        guest.call("write", offset=page * PAGE, given_hex="aa")
    guest.account.settle()
    assert bits(guest.account.private_bitmap()) == {0, 63, 64, 127}
    assert not any(guest.account.unsettled_bitmap())
    assert guest.account.status().counters.cow_breaks == 4


def test_a_page_written_twice_or_given_back_and_written_is_charged_once(stage: Stage) -> None:
    guest = stage.guest()
    for _ in range(3):
        guest.call("write", offset=0, given_hex="aa")
    guest.call("discard", page=0, nr_pages=1)
    guest.call("write", offset=0, given_hex="bb")
    assert private_pages(guest) == 1
    counters = guest.account.status().counters
    assert (counters.charged_pages, counters.discarded_pages) == (2, 1)
    assert guest.read(0) == b"\xbb" + content(0)[1:]


def test_an_image_of_one_page_has_a_ledger_too(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=1, cut_bytes=4095)
    guest = stage.guest(quota=1)
    assert guest.read(0) == content(0)[:1] + bytes(4095)
    guest.call("write", offset=0, given_hex="aa")
    assert private_pages(guest) == 1
    assert stage.audit().mismatches == []


def test_bucket_bounds_rise_by_a_quarter_at_most() -> None:
    bounds = [lib.bucket_bound_ns(i) for i in range(lib.LATENCY_BUCKETS)]
    assert bounds == sorted(set(bounds))
    assert bounds[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert all(after <= before * 1.25 for before, after in pairwise(bounds[4:]))
    assert bounds[-1] > 300 * 10**9


def test_every_fault_leaves_its_latency_in_one_kind(stage: Stage) -> None:
    guest = stage.guest(window=1)
    guest.read(0)
    guest.read(100)
    guest.call("poke", page=0, byte=1)
    stage.load()
    guest.read(60)

    def counts() -> list[int]:
        return [read_latency([guest.account], kind).count for kind in LatencyKind]

    until(lambda: counts() == [1, 2, 1], "one hit, two misses, one write are noted")
    latency = read_latency([guest.account, guest.account], LatencyKind.MISS)
    assert latency.count == 4
    assert 0 < latency.percentile_ns(50) <= latency.percentile_ns(100)


def test_percentiles_are_upper_bounds_of_buckets() -> None:
    counts = [0] * lib.LATENCY_BUCKETS
    counts[10], counts[20] = 90, 10
    latency = Latency(counts, 12345)
    assert latency.percentile_ns(50) == latency.percentile_ns(90) == lib.bucket_bound_ns(10)
    assert latency.percentile_ns(99) == lib.bucket_bound_ns(20)
    assert Latency([0] * lib.LATENCY_BUCKETS, 0).percentile_ns(99) == 0
    assert (latency + latency).count == 200
