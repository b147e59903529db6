# SPDX-License-Identifier: Apache-2.0
"""Kernel behaviour that would lose wake-ups, charges or descriptors, and what prevents it.

One test for each way to fall in; docs/traps.md tells how each fails without its cure.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import subprocess
from pathlib import Path

import pytest
from domains import NOBODY, MakeImage, StartDaemon, StartGuest, in_thread
from stage import (
    ANSWER_SECONDS,
    PAGE,
    MappedGuest,
    Stage,
    content,
    let_go,
    private_pages,
    read_faults,
    stop_at,
    until,
    wait_at,
    write_faults,
)

from cowshed.cache._core import lib


def test_trap_04_a_userfaultfd_that_comes_blocking_is_served(stage: Stage) -> None:
    guest = stage.guest(blocking=True, window=1)
    assert guest.read(0) == content(0)
    assert guest.read(40) == content(40)
    assert guest.account.status().broken == 0


def test_trap_04_a_guest_that_makes_it_blocking_breaks_only_itself(stage: Stage) -> None:
    stage.load()
    hostile, other = stage.guest(window=1), stage.guest(window=1)
    stop_at(lib.POINT_FAULT_HELD)
    ticket = hostile.start("read", offset=40 * PAGE, length=1)
    wait_at(lib.POINT_FAULT_HELD)
    hostile.call("make_blocking")
    let_go(lib.POINT_FAULT_HELD)
    hostile.finish(ticket)  # the handler is about to look for more, and there is no more
    assert other.read(40) == content(40)
    leaving = in_thread(lambda: stage.detach(hostile))
    leaving.join(ANSWER_SECONDS)
    assert not leaving.is_alive(), "the fault thread waits for the guest in read()"
    assert other.read(60) == content(60)


def continue_without_waking(guest: MappedGuest, page: int) -> None:
    """Map a resident page behind the handler's back, leaving whoever waits there asleep."""
    address = guest.base + page * PAGE
    fcntl.ioctl(guest.fds[0], 0xC020AA07, struct.pack("QQQq", address, PAGE, 1 | 2, 0))


def test_trap_05_a_page_found_mapped_wakes_who_waits_for_it(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(window=1)
    stop_at(lib.POINT_FAULT_HELD)
    ticket = guest.start("touch", page=5)
    wait_at(lib.POINT_FAULT_HELD)
    continue_without_waking(guest, 5)
    let_go(lib.POINT_FAULT_HELD)
    assert guest.finish(ticket) == content(5)[0]


def test_trap_05_a_first_write_that_finds_the_page_mapped_is_woken_and_charged_once(
    stage: Stage,
) -> None:
    stage.load()
    guest = stage.guest(window=1)
    stop_at(lib.POINT_FAULT_HELD)
    ticket = guest.start("poke", page=5, byte=9)
    wait_at(lib.POINT_FAULT_HELD)
    continue_without_waking(guest, 5)
    let_go(lib.POINT_FAULT_HELD)
    guest.finish(ticket)
    assert guest.read(5) == b"\x09" + content(5)[1:]
    assert private_pages(guest) == 1
    assert write_faults(guest) == 1


def test_trap_06_an_answer_that_meets_an_unread_event_is_given_again(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(window=1)
    guest.call("fill", page=30, nr_pages=1, byte=1)
    stop_at(lib.POINT_FAULT_HELD)
    read = guest.start("read", offset=5 * PAGE, length=1)
    wait_at(lib.POINT_FAULT_HELD)
    discard = guest.start("discard", page=30, nr_pages=1)
    # Its REMOVE is queued: mapping is EAGAIN.
    assert select.select([guest.fds[0]], [], [], ANSWER_SECONDS)[0]
    let_go(lib.POINT_FAULT_HELD)
    assert bytes.fromhex(guest.finish(read)) == content(5)[:1]
    guest.finish(discard)
    assert guest.account.status().counters.retries >= 1
    assert private_pages(guest) == 0
    assert guest.read(30) == content(30)


def test_trap_06_a_window_goes_on_behind_a_page_that_is_mapped_already(stage: Stage) -> None:
    stage.load()
    guest = stage.guest(window=16)
    guest.call("poke", page=5, byte=9)  # one page, by copy; nothing round it is mapped
    assert guest.account.status().counters.mapped_pages == 0
    assert guest.call("touch", page=0) == content(0)[0]
    until(lambda: guest.account.status().counters.mapped_pages == 15, "the window is mapped")
    faults = read_faults(guest)
    assert guest.read(6, 10) == content(6, 10)
    assert read_faults(guest) == faults


def lose_copy(stage: Stage, page: int) -> None:
    """Take the private copies of the last page away without an event, as a late zap does.

    Cutting the frames short for a moment is the one other way to lose a private page like that.
    """
    frame = stage.frame(page)
    os.ftruncate(stage.image.frames_fd, page * PAGE)
    os.ftruncate(stage.image.frames_fd, stage.image.map_bytes)
    os.pwrite(stage.image.frames_fd, frame, page * PAGE)


def test_trap_10_a_copy_lost_after_its_removal_was_reported_is_not_charged(stage: Stage) -> None:
    """REMOVE is read before the zap it announces, and a write may be answered in between."""
    last = stage.image.nr_pages - 1
    guest = stage.guest()
    guest.call("poke", page=last, byte=1)
    guest.call("discard", page=last, nr_pages=1)
    guest.call("poke", page=last, byte=2)
    assert private_pages(guest) == 1
    lose_copy(stage, last)
    assert private_pages(guest) == 0
    assert stage.audit().mismatches == []
    assert guest.read(last) == content(last)


def test_trap_10_a_fault_on_a_page_whose_copy_was_lost_gives_its_charge_back(stage: Stage) -> None:
    last = stage.image.nr_pages - 1
    guest = stage.guest(quota=1)
    guest.call("poke", page=last, byte=1)
    assert private_pages(guest) == 1
    lose_copy(stage, last)
    assert guest.read(last) == content(last)
    assert guest.account.status().private_pages == 0
    guest.call("poke", page=3, byte=1)
    assert guest.account.status().counters.quota_stops == 0


def test_trap_10_a_write_read_before_the_removal_of_its_page_is_charged_once(stage: Stage) -> None:
    guest = stage.guest(window=16)
    guest.read(0, 16)
    stop_at(lib.POINT_FAULT_READ)
    first = guest.start(
        "write", offset=PAGE, given_hex="07"
    )  # stops the handler with this one in hand
    wait_at(lib.POINT_FAULT_READ)
    write = guest.start("write", offset=0, given_hex="07")
    guest.wait_stuck(write)
    discard = guest.start("discard", page=0, nr_pages=2)
    until(lambda: guest.where(discard).startswith("userfaultfd_event"), "REMOVE is queued")
    let_go(lib.POINT_FAULT_READ)
    for ticket in (first, write, discard):
        guest.finish(ticket)
    looks = stage.looks(guest, 0, 2)
    assert private_pages(guest) == looks.count(lib.PAGE_LOOK_PRIVATE)
    assert stage.audit().mismatches == []
    guest.call("fill", page=0, nr_pages=2, byte=8)
    assert private_pages(guest) == 2


def test_trap_11_pages_given_back_are_the_image_again_and_credited(stage: Stage) -> None:
    guest = stage.guest(quota=2)
    guest.call("fill", page=0, nr_pages=2, byte=7)
    guest.call("discard", page=0, nr_pages=2)
    # madvise returns once its event was read: the credit follows.
    until(lambda: guest.account.status().private_pages == 0, "they are credited")
    assert guest.read(0, 2) == content(0, 2)
    guest.call("fill", page=3, nr_pages=2, byte=7)
    assert private_pages(guest) == 2
    assert guest.account.status().counters.quota_stops == 0


def test_trap_12_a_loader_does_not_touch_descriptors_of_a_guest_that_left(stage: Stage) -> None:
    leaver, other = stage.guest(), stage.guest()
    stop_at(lib.POINT_LOAD_PUBLISH)
    leaver.start("read", offset=0, length=1)
    wait_at(lib.POINT_LOAD_PUBLISH)
    leaver.handler.stop()
    recycled = leaver.fds[0]
    os.dup2(other.fds[0], recycled)  # the number is somebody else's userfaultfd from here on
    let_go(lib.POINT_LOAD_PUBLISH)
    assert stage.image.wait_loaded(0, 1, 60_000)
    assert other.read(40) == content(40)
    stage.load(0, 1)
    until(lambda: stage.evict(0), "nobody holds the extent any more")
    assert stage.image.first_touches() == [2]  # the leaver was granted nothing
    assert leaver.account.status().counters.mapped_pages == 0
    assert stage.audit().mismatches == []


def test_trap_12_a_guest_that_died_is_found_gone_when_it_is_answered(stage: Stage) -> None:
    stage.load()
    guest = stage.guest()
    stop_at(lib.POINT_FAULT_HELD)
    guest.start("read", offset=0, length=1)
    wait_at(lib.POINT_FAULT_HELD)
    guest.process.kill()
    guest.process.wait()
    let_go(lib.POINT_FAULT_HELD)
    until(lambda: guest.account.status().broken, "the guest counts as broken")
    assert guest.account.status().broken == -errno.ESRCH
    assert select.select([stage.store.notice_fd], [], [], ANSWER_SECONDS)[0]


def test_trap_12_a_killed_guest_returns_its_grants_and_charges(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"disk={make_image(1 << 20)}", "--capacity", "1M")
    guest, other = start_guest(daemon.uri, NOBODY), start_guest(daemon.uri, NOBODY)
    guest.call("open", image="disk", guest="g")
    other.call("open", image="disk", guest="other")
    guest.call("fill", offset=0, length=PAGE, byte=1)
    guest.kill()
    until(lambda: [one["name"] for one in daemon.status()["guests"]] == ["other"], "it is detached")
    assert daemon.mismatches() == []
    assert other.call("read", offset=0, length=8) != "01" * 8


def test_trap_14_a_userfaultfd_for_user_mode_only_is_refused_with_a_cure(
    tmp_path: Path, run_dir: Path
) -> None:
    guest = MappedGuest(NOBODY)
    memfd = os.memfd_create("image")
    os.ftruncate(memfd, PAGE)
    try:
        with pytest.raises(PermissionError, match=f"stage {lib.REGION_STAGE_UFFD}"):
            guest.call("map", fds=(memfd,), map_bytes=PAGE, features=0)
    finally:
        os.close(memfd)
        guest.close()


def test_trap_15_a_slow_load_stands_in_nobodys_way(stage: Stage) -> None:
    stage.load(0, 2)
    guest, other = stage.guest(window=1), stage.guest(window=1)
    guest.read(0)
    stop_at(lib.POINT_LOAD_READ, nr_times=0)
    waiting = [guest.start("read", offset=e * 16 * PAGE, length=1) for e in range(2, 6)]
    wait_at(lib.POINT_LOAD_READ, 4)  # every loader is busy
    guest.call("fill", page=0, nr_pages=1, byte=3)  # its own writes
    assert guest.read(17) == content(17)  # its own reads of what is resident
    assert other.read(18) == content(18)
    other.call("fill", page=19, nr_pages=1, byte=3)
    assert not any(guest.answered(ticket) for ticket in waiting)
    let_go(lib.POINT_LOAD_READ)
    for ticket in waiting:
        guest.finish(ticket)


def test_trap_15_readahead_leaves_a_loader_free_for_who_waits(stage: Stage) -> None:
    guest = stage.guest(window=1)
    # Not in the read: after a second of it, others would take the loaders' place.
    stop_at(lib.POINT_LOAD_FILL, nr_times=3)
    for nr, extent in enumerate((0, 2, 4), start=1):
        assert stage.image.prefetch(extent, 1) == 1
        wait_at(lib.POINT_LOAD_FILL, nr)
    assert stage.image.prefetch(6, 1) == 1
    assert guest.read(16) == content(16)
    assert stage.store.counters().queued_loads == 1
    let_go(lib.POINT_LOAD_FILL)


ROOT = Path(__file__).resolve().parents[2]


def compiles(prelude: str) -> bool:
    source = f'#include <linux/userfaultfd.h>\n{prelude}\n#include "cache/core/abi.h"\n'
    command = ["gcc", "-std=gnu11", "-fsyntax-only", "-I", str(ROOT), "-x", "c", "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def test_trap_16_a_header_whose_layout_is_not_the_kernels_does_not_compile() -> None:
    assert compiles("")
    poison = "struct uffdio_poison { struct uffdio_range range; __u64 mode; };"
    scan = (
        "struct page_region { __u64 start, end, categories; }; struct pm_scan_arg { __u64 size; };"
    )
    for struct_text, name in ((poison, "UFFDIO_POISON"), (scan, "PAGEMAP_SCAN")):
        assert not compiles(f"#undef {name}\n#define {name} 1\n{struct_text}"), name
