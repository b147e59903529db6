# SPDX-License-Identifier: Apache-2.0
"""Supplied memory: discards, loads and departures that come between, each held at its point."""

import os

import pytest
from stage import (
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

from cowshed.accounting import QuotaPolicy
from cowshed.cache import ExtentState
from cowshed.cache._core import lib

ZEROS = bytes(8).hex()
PRIVATE = lib.PAGE_LOOK_PRIVATE


def first_bytes(page: int) -> str:
    return content(page)[:8].hex()


def wait_removing(guest: MappedGuest, order: int) -> None:
    """Wait until a thread's madvise waits for its REMOVE event to be read."""
    until(lambda: "userfaultfd_event" in guest.where(order), "the event waits to be read")


def read_page(guest: MappedGuest, page: int) -> int:
    return guest.start("read", offset=page * PAGE, length=8)


def test_a_fault_read_before_the_discard_that_precedes_it_finds_zeros(stage: Stage) -> None:
    """The kernel tells of faults first: this one was read, and the discard was not."""
    stage.load()
    machine = stage.machine()
    stop_at(lib.POINT_FAULT_READ)
    read = read_page(machine, 5)
    wait_at(lib.POINT_FAULT_READ)
    discard = machine.start("discard", page=4, nr_pages=4)
    wait_removing(machine, discard)
    let_go(lib.POINT_FAULT_READ)
    machine.finish(discard)
    assert machine.finish(read) == ZEROS
    assert machine.account.status().counters.retries > 0
    assert machine.finish(read_page(machine, 3)) == first_bytes(3)
    assert stage.audit().mismatches == []


def test_a_fault_read_together_with_its_discard_finds_zeros(stage: Stage) -> None:
    stage.load()
    machine = stage.machine()
    stop_at(lib.POINT_FAULT_READ)
    other = read_page(machine, 100)
    wait_at(lib.POINT_FAULT_READ)
    discard = machine.start("discard", page=5, nr_pages=1)
    wait_removing(machine, discard)
    read = read_page(machine, 5)
    let_go(lib.POINT_FAULT_READ)
    machine.finish(discard)
    assert machine.finish(read) == ZEROS
    assert machine.finish(other) == first_bytes(100)


def test_a_load_that_ends_after_a_discard_does_not_undo_it(stage: Stage) -> None:
    machine = stage.machine()
    stop_at(lib.POINT_LOAD_PUBLISH)
    read = read_page(machine, 5)
    wait_at(lib.POINT_LOAD_PUBLISH)
    machine.finish(machine.start("discard", page=5, nr_pages=1))
    let_go(lib.POINT_LOAD_PUBLISH)
    assert machine.finish(read) == ZEROS
    assert machine.finish(read_page(machine, 6)) == first_bytes(6)
    assert stage.audit().mismatches == []


def test_a_loaded_extent_waits_held_for_a_thread_that_is_busy(stage: Stage) -> None:
    """An eviction between the load and the answer would send the fault round again, for ever."""
    machine = stage.machine(window=1)
    stop_at(lib.POINT_LOAD_READ)
    read = read_page(machine, 5)
    wait_at(lib.POINT_LOAD_READ)
    stop_at(lib.POINT_FAULT_READ)
    other = read_page(machine, 120)
    wait_at(lib.POINT_FAULT_READ)
    let_go(lib.POINT_LOAD_READ)
    until(lambda: stage.state(0) is ExtentState.RESIDENT, "the load ended")
    assert stage.evict(0, at_once=True) == []
    let_go(lib.POINT_FAULT_READ)
    assert machine.finish(read) == first_bytes(5)
    assert machine.finish(other) == first_bytes(120)
    assert stage.evict(0) == [0]


@pytest.mark.parametrize("status", ["loaded", "failed"])
def test_a_machine_that_leaves_while_it_waits_leaves_nothing(stage: Stage, status: str) -> None:
    machine = stage.machine()
    stop_at(lib.POINT_LOAD_READ)
    read_page(machine, 5)
    wait_at(lib.POINT_LOAD_READ)
    stage.detach(machine)
    if status == "failed":
        os.truncate(stage.path, PAGE)
    let_go(lib.POINT_LOAD_READ)
    assert stage.image.wait_loaded(0, 1, 60_000)
    assert stage.evict(0) == ([0] if status == "loaded" else [])
    assert stage.audit().mismatches == []


def test_a_charge_is_given_back_when_the_page_was_not_supplied(stage: Stage) -> None:
    """Between the charge and the copy comes a discard: the kernel refuses the copy."""
    stage.load()
    machine = stage.machine(window=1)
    stop_at(lib.POINT_WRITE_CHARGED)
    read = read_page(machine, 5)
    wait_at(lib.POINT_WRITE_CHARGED)
    discard = machine.start("discard", page=0, nr_pages=64)
    wait_removing(machine, discard)
    let_go(lib.POINT_WRITE_CHARGED)
    machine.finish(discard)
    assert machine.finish(read) == ZEROS
    assert private_pages(machine) == machine.account.looks().count(PRIVATE)
    assert stage.audit().mismatches == []


def test_a_late_zap_costs_nothing_and_the_page_comes_again(stage: Stage) -> None:
    """REMOVE is told before the pages go: a copy made in between goes too, and its charge stays."""
    stage.load()
    machine = stage.machine(window=1)
    for no in range(200):
        discard = machine.start("discard", page=8, nr_pages=8)
        read = read_page(machine, 8 + no % 8)
        machine.finish(discard)
        assert machine.finish(read) == ZEROS or no == 0  # the first may have come before
    assert [machine.finish(read_page(machine, page)) for page in range(8, 16)] == [ZEROS] * 8
    assert private_pages(machine) == machine.account.looks().count(PRIVATE)
    assert stage.audit().mismatches == []


def test_writes_need_no_second_fault_and_stay(stage: Stage) -> None:
    stage.load()
    machine = stage.machine(window=1)
    machine.call("write", offset=3 * PAGE, given_hex="aabb")
    assert machine.call("read", offset=3 * PAGE, length=4)[:4] == "aabb"
    assert machine.account.status().counters.faults_missing == 1
    assert private_pages(machine) == 1
    stage.evict_all()
    assert machine.call("read", offset=3 * PAGE, length=2) == "aabb"


def test_quotas_are_exact(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.load()
    machine = stage.machine(quota=40)
    reads = [read_page(machine, page) for page in (0, 16, 32, 48, 64)]
    until(lambda: machine.account.status().stopped_since_ns > 0, "it stopped")
    assert private_pages(machine) == 40
    assert machine.account.looks().count(PRIVATE) == 40
    machine.quota.set_quota(1000 * PAGE, machine.quota.status().policy)
    machine.handler.resume()
    for read, page in zip(reads, (0, 16, 32, 48, 64), strict=True):
        assert machine.finish(read) == first_bytes(page)


def test_a_machine_killed_at_its_quota_dies_alone(make_stage: MakeStage) -> None:
    stage = make_stage()
    stage.load()
    machine = stage.machine(quota=16, policy=QuotaPolicy.KILL)
    other = stage.machine()
    assert machine.call("touch", page=0) == content(0)[0]
    machine.start("touch", page=100)
    assert machine.ended() == -7
    assert other.call("touch", page=100) == content(100)[0]
