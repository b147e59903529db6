# SPDX-License-Identifier: Apache-2.0
"""A quota that several accounts share: never exceeded, and given back by each."""

import os
import random
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from domains import paused
from stage import (
    ANSWER_SECONDS,
    NO_QUOTA,
    PAGE,
    MakeStage,
    MappedGuest,
    Stage,
    content,
    let_go,
    private_pages,
    stop_at,
    until,
    wait_at,
)

from cowshed.accounting import Account, Quota, QuotaPolicy
from cowshed.cache import UsageError
from cowshed.cache._core import lib


def stopped(guest: MappedGuest) -> bool:
    return guest.account.status().stopped_since_ns != 0


def used(guest: MappedGuest) -> int:
    return guest.quota.status().used_pages


def charges(guests: Sequence[MappedGuest]) -> list[tuple[int, int]]:
    """Of each account its private pages, and how many it was ever charged for."""
    seen = [guest.account.status() for guest in guests]
    return [(status.private_pages, status.counters.charged_pages) for status in seen]


def raise_by_one(guest: MappedGuest) -> None:
    """Let a stopped guest go on, with a page more for all that share its quota."""
    guest.quota.set_quota((guest.quota.status().used_pages + 1) * PAGE, QuotaPolicy.STOP)
    guest.handler.resume()


def test_a_quota_lives_in_a_file_that_says_what_it_is(stage: Stage) -> None:
    guest = stage.guest(quota=9)
    guest.call("fill", page=0, nr_pages=3, byte=7)
    magic, layout, policy, quota, spent = struct.unpack("<8sIIQQ", os.pread(guest.quota.fd, 32, 0))
    assert (magic, layout, policy, quota, spent) == (b"CWPURSE1", 1, QuotaPolicy.STOP, 9, 3)


def test_a_quota_stays_for_the_accounts_that_were_opened_with_it(stage: Stage) -> None:
    quota = Quota(NO_QUOTA, QuotaPolicy.STOP)
    one, two = Account(stage.image, quota), Account(stage.image, quota)
    assert quota.status().nr_accounts == 2
    one.close()
    quota.close()
    quota.close()  # harmless
    assert two.count_quota() == (0, 0)
    two.close()


def test_two_accounts_have_one_quota_and_each_gives_back_what_it_took(stage: Stage) -> None:
    one = stage.guest(quota=6)
    two = stage.guest(quota=one.quota)
    one.call("fill", page=0, nr_pages=4, byte=1)
    two.call("fill", page=0, nr_pages=2, byte=2)
    assert (private_pages(one), private_pages(two), used(one)) == (4, 2, 6)
    stuck = two.start("write", offset=9 * PAGE, given_hex="02")
    until(lambda: stopped(two), "it stops at their quota")
    assert not stopped(one)
    one.call("discard", page=3, nr_pages=1)  # nobody tells the other: it looks by itself
    two.finish(stuck)
    assert (private_pages(one), private_pages(two), used(one)) == (3, 3, 6)
    assert one.read(2) == b"\1" * PAGE
    assert two.read(2) == content(2)
    assert stage.audit().mismatches == []
    stage.detach(one)
    assert used(two) == 3
    two.call("fill", page=20, nr_pages=3, byte=3)
    assert used(two) == 6
    assert stage.audit().mismatches == []


def test_charges_of_nothing_in_another_account_are_room_for_who_is_at_the_quota(
    stage: Stage,
) -> None:
    one = stage.guest(quota=8, write_window=8)
    two = stage.guest(quota=one.quota)
    one.read(0, 16)
    one.call("poke", page=0, byte=1)  # seven more are open, and never written
    # Counted once its account's lock, which is only tried for another's sake, is free again.
    until(lambda: one.account.status().counters.write_copied == 1, "the answer has ended")
    assert used(one) == 8
    two.call("fill", page=0, nr_pages=7, byte=2)
    assert two.account.status().counters.quota_stops == 0
    assert (private_pages(one), private_pages(two), used(one)) == (1, 7, 8)
    assert stage.audit().mismatches == []


def test_two_accounts_that_ask_for_the_last_page_at_once_get_it_once(
    stage: Stage,
) -> None:
    """Either may: a charge that is no copy yet is given to another who asks."""
    stage.load()
    one = stage.guest(quota=3)
    two = stage.guest(quota=one.quota)
    one.call("fill", page=0, nr_pages=2, byte=1)
    two.read(0)
    one.read(32)
    stop_at(lib.POINT_WRITE_TAKEN, 0)
    first = one.start("write", offset=32 * PAGE, given_hex="01")
    wait_at(lib.POINT_WRITE_TAKEN)  # it has the page, and it is charged to nobody yet
    second = two.start("write", offset=0, given_hex="02")
    two.wait_stuck(second)
    assert (used(one), one.account.status().private_pages) == (3, 2)
    let_go(lib.POINT_WRITE_TAKEN)
    until(lambda: one.answered(first) or two.answered(second), "one of them gets it")
    (loser, left), had = ((two, second), (3, 0)) if one.answered(first) else ((one, first), (2, 1))
    until(lambda: stopped(loser), "the other finds none left")
    assert (private_pages(one), private_pages(two), used(one)) == (*had, 3)
    assert not loser.answered(left)
    raise_by_one(loser)
    one.finish(first)
    two.finish(second)
    assert used(one) == 4
    assert stage.audit().mismatches == []


def test_a_charge_whose_copy_is_late_is_given_to_another_account_that_asks(stage: Stage) -> None:
    stage.load()
    one = stage.guest(quota=3)
    two = stage.guest(quota=one.quota)
    one.call("fill", page=0, nr_pages=2, byte=1)
    two.read(0)
    one.read(32)
    stop_at(lib.POINT_WRITE_TAKEN, 0)
    first = one.start("poke", page=32, byte=1)
    wait_at(lib.POINT_WRITE_TAKEN)
    with paused(one.pid):  # a store makes no copy then when its page is opened
        let_go(lib.POINT_WRITE_TAKEN)
        until(lambda: one.account.status().private_pages == 3, "the page is charged")
        two.call("write", offset=0, given_hex="02")
        assert (private_pages(two), used(one)) == (1, 3)
    until(lambda: stopped(one), "its write is tried again, and nothing is left")
    assert (private_pages(one), not one.answered(first)) == (2, True)
    raise_by_one(one)
    one.finish(first)
    assert (private_pages(one), used(one)) == (3, 4)
    assert stage.audit().mismatches == []


@pytest.mark.parametrize("policy", [QuotaPolicy.STOP, QuotaPolicy.ALLOW])
def test_accounts_that_write_at_random_never_take_more_than_there_is(
    make_stage: MakeStage, rng: random.Random, policy: QuotaPolicy
) -> None:
    """Whoever watches the sum, at any moment, sees no more than the quota; in the end all is as
    the kernel has it."""
    quota = 24
    stage = make_stage(nr_pages=256)
    first = stage.guest(quota=quota, policy=policy, write_window=rng.choice([0, 1, 8]))
    guests = [first, *(stage.guest(quota=first.quota, write_window=8) for _ in range(3))]
    done = threading.Event()
    most = 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, used(first))
            before = charges(guests)
            # Else a page that went from one to another in between would be counted twice.
            if charges(guests) == before:
                most = max(most, sum(private for private, _ in before))

    def write(guest: MappedGuest, seed: int) -> None:
        own = random.Random(seed)
        for _ in range(40):
            page = own.randrange(250)
            if own.random() < 0.7:
                guest.start("write", offset=page * PAGE, given_hex="aa")
            else:
                guest.call("discard", page=page, nr_pages=own.randrange(1, 6))
            guest.read(own.randrange(250))

    with ThreadPoolExecutor() as pool:
        watching = pool.submit(watch)
        try:
            for each in [pool.submit(write, guest, rng.randrange(1 << 30)) for guest in guests]:
                each.result(ANSWER_SECONDS)
        finally:
            done.set()
        watching.result(ANSWER_SECONDS)
    if policy is QuotaPolicy.STOP:
        assert most <= quota
    assert stage.audit().mismatches == []

    def all_agree() -> bool:
        counted, spent = first.account.count_quota()
        return counted == spent == sum(g.account.status().private_pages for g in guests)

    # Writes that were stopped go on with what the audit's settling gave back.
    until(all_agree, "the quota and its accounts agree")


def test_an_audit_finds_a_quota_that_is_not_what_its_accounts_are_charged_for(
    stage: Stage,
) -> None:
    guest = stage.guest(quota=9)
    guest.call("fill", page=0, nr_pages=3, byte=7)
    os.pwrite(guest.quota.fd, struct.pack("<Q", 5), 24)
    (found,) = stage.audit().mismatches
    assert (found.check, found.place, found.expected, found.found) == ("private", "purse", 3, 5)
    os.pwrite(guest.quota.fd, struct.pack("<Q", 3), 24)
    assert stage.audit().mismatches == []


def test_a_quota_below_a_page_is_refused_on_change_too() -> None:
    quota = Quota(PAGE, QuotaPolicy.STOP)
    with pytest.raises(UsageError, match="give at least 4096"):
        quota.set_quota(PAGE - 1, QuotaPolicy.STOP)
    assert quota.status().quota_pages == 1
    quota.close()
