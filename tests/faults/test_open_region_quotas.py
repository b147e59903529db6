# SPDX-License-Identifier: Apache-2.0
"""A write at the quota, while what is reserved for open regions cannot be given back at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from regions import REGION, charged, check_books, close, open_region, pool, two
from stage import ANSWER_SECONDS, Stage, let_go, stop_at, until, wait_at

from cowshed.accounting import QuotaPolicy
from cowshed.cache._core import lib

__all__ = ["pool", "two"]

BOTH = pytest.mark.parametrize("policy", [QuotaPolicy.STOP, QuotaPolicy.KILL])


@BOTH
@pytest.mark.parametrize("change", ["discard", "move_part"])
def test_it_waits_until_an_event_is_read(two: Stage, policy: QuotaPolicy, change: str) -> None:
    guest = two.guest(quota=REGION, policy=policy, write_window=1)
    guest.read(REGION, 4)
    assert open_region(guest) == 0
    assert charged(guest) == (0, REGION)
    stop_at(lib.POINT_FAULT_READ)
    write = guest.start("fill", page=REGION, nr_pages=1, byte=7)
    wait_at(lib.POINT_FAULT_READ)
    event = guest.start(change, page=REGION + 40, nr_pages=8)
    until(lambda: "userfault" in guest.where(event), "the change waits to be heard of")
    let_go(lib.POINT_FAULT_READ)
    for ticket in (write, event):
        guest.finish(ticket)
    assert guest.account.status().counters.write_refused == 0
    assert charged(guest) == (1, 0)
    check_books(two)


@BOTH
def test_it_waits_for_another_account_that_is_busy(
    two: Stage, pool: ThreadPoolExecutor, policy: QuotaPolicy
) -> None:
    first = two.guest(quota=REGION + 1, policy=policy)
    second = two.guest(quota=first.quota)
    second.read(REGION, 4)
    assert open_region(first) == 0
    second.call("fill", page=REGION, nr_pages=1, byte=1)
    stop_at(lib.POINT_CLOSE_GUARDED)
    closing = pool.submit(close, first)
    wait_at(lib.POINT_CLOSE_GUARDED)
    write = second.start("fill", page=REGION + 1, nr_pages=1, byte=2)
    retries = second.account.status().counters.retries
    until(lambda: second.account.status().counters.retries > retries + 30, "it has asked for 30 ms")
    let_go(lib.POINT_CLOSE_GUARDED)
    assert closing.result(ANSWER_SECONDS) == 1
    second.finish(write)
    assert second.account.status().counters.write_refused == 0
    assert charged(second) == (2, 0)
    check_books(two)
