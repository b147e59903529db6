# SPDX-License-Identifier: Apache-2.0
"""Writes: charged before they are allowed, bounded by the quota, credited if they were not made."""

import select
import signal

import pytest
from stage import (
    ANSWER_SECONDS,
    PAGE,
    SIGBUS_DEATH,
    Stage,
    content,
    private_pages,
    until,
    write_faults,
)

from cowshed.accounting import QuotaPolicy
from cowshed.cache import UsageError
from cowshed.cache._core import lib

SHARED, OPEN, PRIVATE = lib.PAGE_LOOK_SHARED, lib.PAGE_LOOK_OPEN, lib.PAGE_LOOK_PRIVATE


def test_a_write_is_the_guests_own_and_nobody_elses(stage: Stage) -> None:
    writer, reader = stage.guest(), stage.guest()
    reader.read(0)
    writer.call("write", offset=100, given_hex="abcdef")
    assert writer.read(0) == content(0)[:100] + b"\xab\xcd\xef" + content(0)[103:]
    assert reader.read(0) == stage.frame(0) == content(0)
    assert (private_pages(writer), private_pages(reader)) == (1, 0)


def test_a_first_write_costs_one_event(stage: Stage) -> None:
    stage.load()
    guest = stage.guest()
    guest.call("poke", page=20, byte=1)
    until(lambda: guest.account.status().counters.hits == 1, "it is counted after the answer")
    assert write_faults(guest) == 0
    assert guest.read(20) == b"\1" + content(20)[1:]
    assert private_pages(guest) == 1


def test_a_write_to_an_absent_extent_loads_it_first(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("poke", page=20, byte=1)
    assert guest.read(20) == b"\1" + content(20)[1:]
    assert private_pages(guest) == 1
    assert stage.audit().mismatches == []


def test_at_its_quota_a_writer_stops_and_a_raise_lets_it_go_on(stage: Stage) -> None:
    guest = stage.guest(quota=3)
    ticket = guest.start("fill", page=0, nr_pages=8, byte=5)
    assert select.select([stage.store.notice_fd], [], [], ANSWER_SECONDS)[0]
    guest.wait_stuck(ticket)
    status = guest.account.status()
    assert status.stopped_since_ns > 0
    assert (status.private_pages, status.counters.quota_stops) == (3, 1)
    assert guest.account.looks().count(PRIVATE) == 3
    guest.quota.set_quota(8 * PAGE, QuotaPolicy.STOP)
    guest.handler.resume()
    guest.finish(ticket)
    assert guest.read(0, 8) == b"\5" * 8 * PAGE
    assert (private_pages(guest), guest.account.status().stopped_since_ns) == (8, 0)


def test_a_stopped_writer_does_not_stop_its_readers_or_others(stage: Stage) -> None:
    guest, other = stage.guest(quota=1), stage.guest(quota=1)
    guest.call("poke", page=0, byte=1)
    ticket = guest.start("write", offset=PAGE, given_hex="01")
    until(lambda: guest.account.status().stopped_since_ns, "it stops")
    assert guest.read(40) == content(40)
    assert guest.read(0)[:1] == b"\1"
    other.call("poke", page=1, byte=2)
    assert not guest.answered(ticket)
    assert private_pages(guest) == 1


def test_a_stopped_writer_goes_on_when_its_guest_gives_pages_back(stage: Stage) -> None:
    guest = stage.guest(quota=2)
    guest.call("fill", page=0, nr_pages=2, byte=1)
    ticket = guest.start("write", offset=5 * PAGE, given_hex="01")
    until(lambda: guest.account.status().stopped_since_ns, "it stops")
    guest.call("discard", page=0, nr_pages=1)
    guest.finish(ticket)
    assert private_pages(guest) == 2


def test_a_quota_lowered_below_what_is_used_takes_nothing_and_allows_nothing(stage: Stage) -> None:
    guest = stage.guest(quota=4)
    guest.call("fill", page=0, nr_pages=4, byte=1)
    guest.quota.set_quota(PAGE, QuotaPolicy.STOP)
    guest.call("fill", page=0, nr_pages=4, byte=2)  # its own already
    ticket = guest.start("write", offset=5 * PAGE, given_hex="01")
    until(lambda: guest.account.status().stopped_since_ns, "it stops")
    assert private_pages(guest) == 4
    assert not guest.answered(ticket)
    with pytest.raises(UsageError, match="holds no page"):
        guest.quota.set_quota(PAGE - 1, QuotaPolicy.STOP)


def test_allow_counts_and_never_stops(stage: Stage) -> None:
    guest = stage.guest(quota=1, policy=QuotaPolicy.ALLOW)
    guest.call("fill", page=0, nr_pages=10, byte=1)
    assert private_pages(guest) == 10
    assert guest.account.status().counters.quota_stops == 0


@pytest.mark.parametrize("mapped", [False, True], ids=["first touch", "mapped before"])
def test_kill_is_sigbus_at_the_quota(stage: Stage, mapped: bool) -> None:
    guest, other = stage.guest(quota=1, policy=QuotaPolicy.KILL), stage.guest()
    guest.call("poke", page=0, byte=1)
    if mapped:
        guest.read(5)
    guest.start("poke", page=5, byte=1)
    assert guest.ended() == SIGBUS_DEATH == -signal.SIGBUS
    assert guest.account.status().private_pages == 1
    assert other.read(5) == content(5)


def test_a_page_refused_by_kill_is_not_taken_for_a_private_one(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(quota=1, policy=QuotaPolicy.KILL)
    guest.call("poke", page=0, byte=1)
    with pytest.raises(OSError, match="Input/output"):
        guest.call("write", offset=5 * PAGE, given_hex="01")  # a system call: EFAULT and no signal
    assert private_pages(guest) == 1
    assert stage.audit().mismatches == []


def test_a_write_window_charges_what_it_opens_and_gives_back_what_was_not_written(
    stage: Stage,
) -> None:
    guest = stage.guest(write_window=8)
    guest.read(0, 16)
    guest.call("poke", page=4, byte=1)
    assert guest.account.status().private_pages == 8
    looks = guest.account.looks()
    assert looks[:16] == bytes([SHARED] * 4 + [PRIVATE] + [OPEN] * 7 + [SHARED] * 4)
    assert private_pages(guest) == 1  # settled
    assert guest.account.looks()[:16] == bytes([SHARED] * 4 + [PRIVATE] + [SHARED] * 11)
    assert guest.account.status().counters.uncharged_pages == 7
    guest.call("poke", page=5, byte=1)
    assert write_faults(guest) == 2
    assert private_pages(guest) == 2


def test_a_run_of_writes_costs_few_events(stage: Stage) -> None:
    guest = stage.guest(write_window=0)
    for extent in range(4):
        guest.read(extent * 16, 16)
    guest.call("fill", page=0, nr_pages=16, byte=1)
    guest.call("fill", page=16, nr_pages=16, byte=1)
    guest.call("fill", page=32, nr_pages=16, byte=1)
    assert write_faults(guest) <= 8
    assert private_pages(guest) == 48
    assert stage.audit().mismatches == []


def test_a_window_never_opens_more_than_the_quota_has_left(stage: Stage) -> None:
    guest = stage.guest(quota=3, write_window=8)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=1)
    assert guest.account.looks()[:8] == bytes([PRIVATE, OPEN, OPEN] + [SHARED] * 5)
    assert guest.account.status().private_pages == 3


def test_at_the_quota_charges_that_never_became_copies_are_found_first(stage: Stage) -> None:
    guest = stage.guest(quota=8, write_window=8)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=1)
    assert guest.account.status().private_pages == 8
    guest.call("poke", page=12, byte=1)
    assert guest.account.status().counters.quota_stops == 0
    for page in (1, 2, 3, 4, 5, 6):
        guest.call("poke", page=page, byte=1)
    assert private_pages(guest) == 8
    ticket = guest.start("write", offset=15 * PAGE, given_hex="01")
    until(lambda: guest.account.status().stopped_since_ns, "now it is really at its quota")
    guest.wait_stuck(ticket)
    assert guest.account.looks().count(PRIVATE) == 8


def test_private_pages_survive_evictions_and_pages_opened_in_vain_are_credited(
    stage: Stage,
) -> None:
    guest = stage.guest(write_window=4)
    guest.read(0, 16)
    guest.call("poke", page=0, byte=9)
    assert guest.account.status().private_pages == 4
    assert stage.evict(0) == [0]
    assert guest.account.status().private_pages == 1  # no settle asked for
    assert guest.read(0) == b"\x09" + content(0)[1:]
    assert guest.read(1) == content(1)
    guest.call("poke", page=1, byte=9)
    assert private_pages(guest) == 2 or guest.account.status().counters.charged_pages > 4
    assert stage.audit().mismatches == []


def test_a_closed_account_returns_everything(stage: Stage) -> None:
    guest, other = stage.guest(), stage.guest()
    guest.call("fill", page=0, nr_pages=3, byte=1)
    other.read(0)
    assert stage.image.refs()[0] == 2
    stage.detach(guest)
    assert stage.image.refs()[0] == 1
    assert stage.evict(0) == [0]
    assert stage.audit().mismatches == []
