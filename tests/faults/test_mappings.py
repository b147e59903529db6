# SPDX-License-Identifier: Apache-2.0
"""A guest's mapping moved, unmapped, protected, replaced: it is served where it can be."""

import mmap

from stage import PAGE, Stage, content, private_pages, until


def test_a_mapping_that_moves_as_a_whole_is_served_where_it_is(stage: Stage) -> None:
    guest = stage.guest(window=1)
    guest.call("fill", page=3, nr_pages=1, byte=7)
    guest.read(4)
    for _ in range(2):
        guest.call("move")
        assert guest.read(3) == b"\7" * PAGE
        assert guest.read(4) == content(4)
        assert guest.read(40) == content(40)
        guest.call("poke", page=50, byte=1)
    stage.evict_all()
    assert guest.read(60) == content(60)
    assert guest.account.status().broken == 0
    assert private_pages(guest) == 2
    assert stage.audit().mismatches == []


def test_pages_unmapped_are_credited_and_the_rest_is_served(stage: Stage) -> None:
    guest = stage.guest(quota=4)
    guest.call("fill", page=20, nr_pages=4, byte=7)
    assert guest.call("unmap", page=18, nr_pages=4) == 0
    until(lambda: guest.account.status().private_pages == 2, "two are credited")
    assert guest.read(22, 2) == b"\7" * 2 * PAGE
    assert guest.read(16, 2) == content(16, 2)  # its extent is one mapping no more
    assert guest.read(24, 8) == content(24, 8)
    stage.evict_all()
    assert guest.read(16, 2) == content(16, 2)
    assert guest.read(24, 8) == content(24, 8)
    guest.call("fill", page=30, nr_pages=2, byte=8)
    assert private_pages(guest) == 4
    assert guest.account.status().broken == 0
    assert stage.audit().mismatches == []


def test_a_mapping_split_by_mprotect_is_served_on_both_sides(stage: Stage) -> None:
    guest = stage.guest(write_window=4)
    assert guest.call("protect", page=5, nr_pages=3, prot=mmap.PROT_READ) == 0
    assert guest.read(0, 16) == content(0, 16)
    guest.call("fill", page=8, nr_pages=2, byte=7)
    assert guest.call("protect", page=5, nr_pages=3, prot=mmap.PROT_READ | mmap.PROT_WRITE) == 0
    guest.call("poke", page=6, byte=1)
    stage.evict_all()
    assert guest.read(5) == content(5)
    assert guest.read(6) == b"\1" + content(6)[1:]
    assert private_pages(guest) == 3
    assert guest.account.status().broken == 0
    assert stage.audit().mismatches == []


def test_a_window_that_reaches_over_a_hole_still_serves_its_fault(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(window=64, write_window=16)
    guest.call("unmap", page=34, nr_pages=1)
    assert guest.read(32, 2) == content(32, 2)
    assert guest.read(35, 16) == content(35, 16)
    guest.call("poke", page=33, byte=1)
    assert guest.read(33)[:1] == b"\1"
    assert guest.account.status().broken == 0


def test_memory_put_where_the_image_was_is_not_counted_as_private(stage: Stage) -> None:
    guest = stage.guest(quota=4)
    guest.call("fill", page=20, nr_pages=2, byte=7)
    guest.call("occupy", page=20, nr_pages=3)
    until(lambda: guest.account.status().private_pages == 0, "the pages are credited")
    assert guest.read(23) == content(23)
    assert private_pages(guest) == 0
    assert stage.audit().mismatches == []


def test_a_guest_that_unmaps_everything_is_credited_and_breaks_nobody(stage: Stage) -> None:
    guest, other = stage.guest(), stage.guest()
    guest.call("fill", page=0, nr_pages=4, byte=7)
    guest.call("unmap", page=0, nr_pages=stage.image.nr_pages)
    until(lambda: guest.account.status().private_pages == 0, "all is credited")
    assert other.read(0) == content(0)
    stage.evict_all()
    assert stage.audit().mismatches == []
