# SPDX-License-Identifier: Apache-2.0
"""A guest that moves parts of its mapping about: what moved is served where it is."""

import errno
import random
import select

import pytest
from stage import ANSWER_SECONDS, PAGE, MakeStage, MappedGuest, Stage, content, private_pages, until

from cowshed.accounting import Region
from cowshed.cache._core import lib


def read_at(guest: MappedGuest, address: int, nr_pages: int = 1) -> bytes:
    return bytes.fromhex(guest.call("read_at", address=address, length=nr_pages * PAGE))


def regions(guest: MappedGuest) -> list[tuple[int, int]]:
    """First page and number of pages of each."""
    return [(r.offset // PAGE, r.length // PAGE) for r in guest.account.regions()]


@pytest.mark.parametrize("window", [0, 1, 64])
def test_a_part_that_moved_is_served_where_it_is_and_so_is_the_rest(
    stage: Stage, window: int
) -> None:
    guest = stage.guest(window=window, write_window=4)
    guest.read(0)
    guest.call("fill", page=21, nr_pages=2, byte=7)
    moved = guest.call("move_part", page=20, nr_pages=24)
    assert regions(guest) == [(0, 20), (20, 24), (44, 84)]
    assert read_at(guest, moved, 4) == content(20) + b"\7" * 2 * PAGE + content(23)
    assert read_at(guest, moved + 20 * PAGE, 4) == content(40, 4)
    assert guest.read(16, 4) == content(16, 4)
    assert guest.read(44, 16) == content(44, 16)
    guest.call("write_at", address=moved + 3 * PAGE, given_hex="09")
    guest.call("fill", page=18, nr_pages=2, byte=8)
    guest.call("fill", page=44, nr_pages=2, byte=8)
    assert private_pages(guest) == 7
    stage.evict_all()
    assert read_at(guest, moved, 4) == content(20) + b"\7" * 2 * PAGE + b"\x09" + content(23)[1:]
    assert read_at(guest, moved + 16 * PAGE, 8) == content(36, 8)
    assert guest.read(60, 16) == content(60, 16)
    assert guest.account.status().broken == 0
    assert stage.audit().mismatches == []


def test_pages_given_back_in_a_moved_part_are_credited(stage: Stage) -> None:
    guest = stage.guest(quota=4)
    guest.call("fill", page=20, nr_pages=4, byte=7)
    moved = guest.call("move_part", page=16, nr_pages=16)
    guest.call("discard_at", address=moved + 4 * PAGE, nr_pages=3)
    until(lambda: private_pages(guest) == 1, "three are credited")
    assert read_at(guest, moved + 4 * PAGE, 3) == content(20, 3)
    guest.call("write_at", address=moved, given_hex="01")
    guest.call("fill", page=32, nr_pages=2, byte=8)
    assert private_pages(guest) == 4
    stuck = guest.start("write_at", address=moved + 9 * PAGE, given_hex="01")
    until(lambda: guest.account.status().stopped_since_ns, "it stops at its quota")
    guest.call("discard_at", address=moved, nr_pages=1)
    guest.finish(stuck)
    assert read_at(guest, moved + 9 * PAGE) == b"\1" + content(25)[1:]
    assert stage.audit().mismatches == []


def test_a_part_that_moved_back_makes_the_mapping_whole_again(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=17, nr_pages=1, byte=7)
    home = guest.base + 16 * PAGE
    for _ in range(3):
        moved = guest.call("move_part", page=16, nr_pages=16)
        assert read_at(guest, moved, 3) == content(16) + b"\7" * PAGE + content(18)
        guest.call("move_to", start=moved, nr_pages=16, to=home)
        assert guest.account.regions() == [Region(guest.base, 0, stage.image.map_bytes)]
        assert guest.read(16, 3) == content(16) + b"\7" * PAGE + content(18)
    assert private_pages(guest) == 1
    assert stage.audit().mismatches == []


def test_two_parts_that_change_places_are_each_served(stage: Stage) -> None:
    guest = stage.guest(window=64)
    guest.call("fill", page=1, nr_pages=1, byte=1)
    guest.call("fill", page=17, nr_pages=1, byte=2)
    aside = guest.call("move_part", page=0, nr_pages=16)
    guest.call("move_to", start=guest.base + 16 * PAGE, nr_pages=16, to=guest.base)
    guest.call("move_to", start=aside, nr_pages=16, to=guest.base + 16 * PAGE)
    assert regions(guest) == [(0, 16), (16, 16), (32, 96)]
    assert guest.read(0, 3) == content(16) + b"\2" * PAGE + content(18)
    assert guest.read(16, 3) == content(0) + b"\1" * PAGE + content(2)
    stage.evict_all()
    assert guest.read(0, 16) == content(16) + b"\2" * PAGE + content(18, 14)
    assert guest.read(16, 16) == content(0) + b"\1" * PAGE + content(2, 14)
    assert private_pages(guest) == 2
    assert stage.audit().mismatches == []


def test_a_part_moved_over_another_takes_its_place(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=34, nr_pages=2, byte=7)
    guest.call("fill", page=2, nr_pages=1, byte=8)
    guest.call("move_to", start=guest.base, nr_pages=16, to=guest.base + 32 * PAGE)
    until(lambda: private_pages(guest) == 1, "what was there is credited")
    assert regions(guest) == [(0, 16), (16, 16), (48, 80)]
    assert guest.read(32, 4) == content(0, 2) + b"\x08" * PAGE + content(3)
    assert guest.read(48, 2) == content(48, 2)
    assert stage.audit().mismatches == []


def test_a_mapping_that_grows_is_refused_what_it_grew_by(make_stage: MakeStage) -> None:
    stage = make_stage(nr_pages=64)
    guest = stage.guest(part=(16, 16))
    assert guest.read(0, 4) == content(16, 4)
    hole = guest.call("hole", nr_pages=32)
    moved = guest.call("move_to", start=guest.base, nr_pages=16, to=hole, nr_there=32)
    assert read_at(guest, moved, 16) == content(16, 16)
    with pytest.raises(OSError, match="short") as raised:
        read_at(guest, moved + 20 * PAGE)
    assert raised.value.errno == errno.EFAULT
    assert read_at(guest, moved + 8 * PAGE) == content(24)
    assert guest.account.status().broken == 0
    assert stage.audit().mismatches == []


def test_a_guest_in_too_many_pieces_is_dropped_and_waits_in_no_mremap(stage: Stage) -> None:
    guest, other = stage.guest(), stage.guest()
    for page in range(2, 32, 2):
        guest.call("move_part", page=page, nr_pages=1)
    assert len(regions(guest)) == 31
    assert guest.account.status().broken == 0
    assert guest.read(1) == content(1)
    last = guest.start("move_part", page=40, nr_pages=1)
    until(lambda: guest.account.status().broken == -errno.EXDEV, "the guest counts as broken")
    assert select.select([stage.store.notice_fd], [], [], ANSWER_SECONDS)[0]
    guest.finish(last)
    assert other.read(0) == content(0)
    assert lib.PAGE_LOOK_SHARED in stage.looks(other, 0)
    stage.detach(guest)
    assert other.read(17) == content(17)


def test_parts_moved_about_at_random_keep_their_bytes_and_charges(
    stage: Stage, rng: random.Random
) -> None:
    """Model: what each page holds, and where it is."""
    guest = stage.guest(window=rng.choice([0, 1, 16]), write_window=rng.choice([1, 4]))
    where = {page: guest.base + page * PAGE for page in range(128)}
    holds = {page: content(page) for page in range(128)}
    written: set[int] = set()
    for step in range(60):
        page = rng.randrange(128)
        match rng.randrange(6):
            case 0:
                nr = rng.choice([1, 3, 16, 40])
                run = list(range(page, min(page + nr, 128)))
                run = [p for p in run if where[p] - where[page] == (p - page) * PAGE]
                run = [p for i, p in enumerate(run) if p == page + i]
                if len(regions(guest)) > 28:
                    continue
                to = guest.call("hole", nr_pages=len(run))
                guest.call("move_to", start=where[page], nr_pages=len(run), to=to)
                where.update({p: to + (p - page) * PAGE for p in run})
            case 1 | 2:
                byte = step + 1
                guest.call("write_at", address=where[page], given_hex=bytes([byte]).hex())
                holds[page] = bytes([byte]) + holds[page][1:]
                written.add(page)
            case 3:
                guest.call("discard_at", address=where[page], nr_pages=1)
                holds[page] = content(page)
                written.discard(page)
            case 4:
                stage.evict(page // 16)
            case _:
                assert read_at(guest, where[page]) == holds[page], (step, page)
    for page, address in where.items():
        assert read_at(guest, address) == holds[page], page
    assert private_pages(guest) == len(written)
    assert stage.audit().mismatches == []
