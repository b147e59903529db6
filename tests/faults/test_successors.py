# SPDX-License-Identifier: Apache-2.0
"""A backend dies at a named point and its successor goes on: no wrong byte, nobody left waiting."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage import EXTENT_PAGES, PAGE, content, until
from succession import MINE, NR_PAGES, Succession

from cowshed.accounting import Account, Quota
from cowshed.cache import InvariantError
from cowshed.cache._core import lib


@pytest.fixture
def succession(tmp_path: Path) -> Iterator[Succession]:
    made = Succession(tmp_path)
    yield made
    made.close()


def use(made: Succession) -> set[int]:
    """Read and write a little, so that there is something to inherit; the pages written."""
    assert made.guest.read(0, EXTENT_PAGES) == content(0, EXTENT_PAGES)
    for page in (1, 3, 40):
        made.guest.call("write", offset=page * PAGE, given_hex=MINE.hex())
    return {1, 3, 40}


READ_POINTS = ("LOAD_READ", "LOAD_FILL", "LOAD_PUBLISH", "LOAD_ANSWER", "FAULT_READ")


@pytest.mark.parametrize("point", READ_POINTS)
def test_a_read_outlives_a_backend_that_dies_in_answering_it(
    succession: Succession, point: str
) -> None:
    mine = use(succession)
    succession.order(arm=getattr(lib, f"POINT_{point}"))
    read = succession.guest.start("read", offset=100 * PAGE, length=PAGE)
    succession.die()
    assert not succession.guest.answered(read)
    succession.succeed()
    assert bytes.fromhex(succession.guest.finish(read)) == content(100)
    succession.check(mine)


def test_a_read_of_a_resident_page_outlives_it(succession: Succession) -> None:
    mine = use(succession)
    succession.order(released=0)
    succession.order(evict=[2])
    succession.guest.read(47)
    succession.order(arm=lib.POINT_FAULT_HELD)
    # In a resident extent that was not granted, after its own extent's next was mapped along.
    tickets = [
        succession.guest.start("read", offset=page * PAGE, length=PAGE) for page in (70, 90, 126)
    ]
    until(lambda: succession.backend.poll() is not None or all_done(succession, tickets), "an end")
    succession.kill()
    succession.succeed()
    for ticket, page in zip(tickets, (70, 90, 126), strict=True):
        assert bytes.fromhex(succession.guest.finish(ticket)) == content(page)
    succession.check(mine)


def all_done(made: Succession, tickets: list[int]) -> bool:
    return all(made.guest.answered(ticket) for ticket in tickets)


@pytest.mark.parametrize("page", [5, 100], ids=["of a shared page", "of a page never mapped"])
def test_a_write_outlives_a_backend_that_dies_after_charging_it(
    succession: Succession, page: int
) -> None:
    mine = use(succession)
    succession.order(arm=lib.POINT_WRITE_CHARGED if page == 5 else lib.POINT_LOAD_ANSWER)
    write = succession.guest.start("write", offset=page * PAGE, given_hex=MINE.hex())
    succession.die()
    succession.succeed()
    succession.guest.finish(write)
    succession.check(mine | {page})


@pytest.mark.parametrize("point", ["EVICT_PUNCH", "EVICT_REVOKE"])
def test_an_eviction_cut_short_is_finished_under_the_guest(
    succession: Succession, point: str
) -> None:
    mine = use(succession)
    succession.guest.read(20)
    succession.order(released=0)
    succession.order(arm=getattr(lib, f"POINT_{point}"))
    succession.order(evict=[0, 1])
    succession.die()
    succession.succeed()
    assert list(succession.image.states())[:2] == [0, 0]
    assert list(succession.image.refs())[:2] == [0, 0]
    succession.check(mine)


def test_a_settle_cut_short_leaves_writes_as_they_are(succession: Succession) -> None:
    mine = use(succession)
    succession.order(arm=lib.POINT_SETTLE_PROTECTED)
    succession.order(settle=0)
    if succession.backend.poll() is None:
        succession.kill()  # there was no open page to protect
    succession.succeed()
    succession.guest.call("write", offset=3 * PAGE, given_hex=MINE.hex())
    succession.check(mine)


def test_a_discard_that_nobody_saw_to_is_credited(succession: Succession) -> None:
    mine = use(succession)
    succession.order(arm=lib.POINT_FAULT_READ)
    discard = succession.guest.start("discard", page=3, nr_pages=1)
    succession.die()  # the event was read, and went with its reader
    succession.succeed()
    succession.guest.finish(discard)
    assert succession.guest.read(3) == content(3)
    succession.check(mine - {3})


def test_a_move_that_nobody_saw_to_is_served_where_it_went(succession: Succession) -> None:
    use(succession)
    succession.order(arm=lib.POINT_FAULT_READ)
    move = succession.guest.start("move_part", page=36, nr_pages=24)
    succession.die()  # the event was read, and is in the ledger
    succession.succeed()
    moved = succession.guest.finish(move)
    got = bytes.fromhex(succession.guest.call("read_at", address=moved, length=24 * PAGE))
    assert got == content(36, 4) + MINE + content(41, 19)
    assert succession.guest.read(60, 4) == content(60, 4)
    assert [(r.offset // PAGE, r.length // PAGE) for r in succession.account.regions()] == [
        (0, 36),
        (36, 24),
        (60, NR_PAGES - 60),
    ]


def test_a_guest_stopped_at_its_quota_is_stopped_still_and_goes_on_when_it_is_raised(
    tmp_path: Path,
) -> None:
    made = Succession(tmp_path, quota_pages=3)
    try:
        mine = use(made)
        write = made.guest.start("write", offset=7 * PAGE, given_hex=MINE.hex())
        made.guest.wait_stuck(write)
        made.kill()
        made.succeed()
        until(lambda: made.account.status().stopped_since_ns > 0, "it is stopped again")
        assert not made.guest.answered(write)
        made.quota.set_quota(4 * PAGE, made.quota.status().policy)
        made.handler.resume()
        made.guest.finish(write)
        made.check(mine | {7})
    finally:
        made.close()


def test_counters_go_on(succession: Succession) -> None:
    mine = use(succession)
    succession.order(settle=0)
    succession.order(counted=2)
    succession.kill()
    succession.succeed()
    before = succession.account.status().counters
    assert before.charged_pages >= 3
    assert before.missing_loaded + before.minor_loaded + before.hits >= 2
    assert succession.image.counters().loads >= 2  # what was asked for ahead may be late
    succession.check(mine)
    assert succession.account.status().counters.hits >= before.hits


def test_what_is_no_account_and_no_quota_is_refused(succession: Succession) -> None:
    use(succession)
    succession.kill()
    quota, ledger = succession.left[3], succession.left[4]
    with pytest.raises(InvariantError, match="not a quota"):
        Quota.adopt(ledger)
    succession.succeed()
    with pytest.raises(InvariantError, match="not an account"):
        Account(succession.image, succession.quota, quota)
