# SPDX-License-Identifier: Apache-2.0
"""Reports of faults that were answered, and more, while the fault thread had them in hand."""

from stage import PAGE, MakeStage, let_go, private_pages, stop_at, until, wait_at

from cowshed.cache._core import lib


def test_an_old_report_of_a_read_does_not_uncharge_a_page_opened_since(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(extent_pages=1, nr_pages=64)
    guest = stage.guest(window=1, write_window=4)
    for page in (4, 5, 7):
        guest.read(page)
    stage.load()  # some of them may still be on their way, asked for ahead
    stage.evict(6, 20)
    stop_at(lib.POINT_LOAD_READ, 0)
    loading = guest.start("read", offset=6 * PAGE, length=8)
    wait_at(lib.POINT_LOAD_READ)
    stop_at(lib.POINT_FAULT_READ)
    other = guest.start("read", offset=20 * PAGE, length=8)
    wait_at(lib.POINT_FAULT_READ)
    write = guest.start("write", offset=4 * PAGE, given_hex="07")
    guest.wait_stuck(write)
    old = guest.start("read", offset=6 * PAGE, length=8)
    guest.wait_stuck(old)
    stop_at(lib.POINT_FAULT_READ)  # lets go of the one, and stops with these two in hand
    wait_at(lib.POINT_FAULT_READ)
    let_go(lib.POINT_LOAD_READ)
    guest.finish(loading)  # page 6 is mapped; the write opens it; then the old report comes
    let_go(lib.POINT_FAULT_READ)
    for ticket in (write, old, other):
        guest.finish(ticket)
    guest.call("write", offset=6 * PAGE, given_hex="09")
    assert stage.audit().mismatches == []
    assert private_pages(guest) == 2


def test_a_discard_in_hand_does_not_uncharge_a_page_that_a_write_window_opens(
    make_stage: MakeStage,
) -> None:
    stage = make_stage()
    stage.load()
    guest = stage.guest(window=1, write_window=4)
    guest.read(15)
    guest.call("write", offset=17 * PAGE, given_hex="01")
    stage.evict(1)
    stop_at(lib.POINT_LOAD_READ)
    loading = guest.start("read", offset=20 * PAGE, length=8)  # its answer maps what 17 is in
    wait_at(lib.POINT_LOAD_READ)
    stop_at(lib.POINT_FAULT_READ)
    other = guest.start("read", offset=40 * PAGE, length=8)
    wait_at(lib.POINT_FAULT_READ)
    write = guest.start("write", offset=15 * PAGE, given_hex="07")
    guest.wait_stuck(write)
    discard = guest.start("discard", page=17, nr_pages=1)
    until(lambda: "userfault" in guest.where(discard), "the discard waits to be heard of")
    stop_at(lib.POINT_FAULT_READ)  # lets go of the one, and stops with these two in hand
    wait_at(lib.POINT_FAULT_READ)
    guest.finish(discard)
    let_go(lib.POINT_LOAD_READ)
    guest.finish(loading)
    let_go(lib.POINT_FAULT_READ)
    for ticket in (write, other):
        guest.finish(ticket)
    guest.call("write", offset=17 * PAGE, given_hex="09")
    assert stage.audit().mismatches == []
    assert private_pages(guest) == 2
