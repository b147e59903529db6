# SPDX-License-Identifier: Apache-2.0
"""A backend dies at a named point and its successor goes on: no wrong byte, nobody left waiting."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from domains import plain_environment
from stage import EXTENT_PAGES, PAGE, MappedGuest, content, until

from cowshed.accounting import Account, Quota, audit
from cowshed.cache import FileSource, InheritedImage, InvariantError, PageStore
from cowshed.cache._core import lib
from cowshed.faults import FaultHandler, FaultOptions, uffd_features

SCRIPT = Path(__file__).parents[1] / "support" / "doomed_backend.py"
NR_EXTENTS = 8
NR_PAGES = NR_EXTENTS * EXTENT_PAGES
MINE = b"\xee" * PAGE


class Succession:
    """One guest, the backend it has first, and, after succeed(), one in this process."""

    def __init__(self, folder: Path, quota_pages: int = NR_PAGES) -> None:
        self.path = folder / "image.raw"
        self.path.write_bytes(content(0, NR_PAGES))
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = [str(NR_EXTENTS), str(quota_pages * PAGE)]
        words = [str(theirs.fileno()), str(self.path), *numbers]
        self.backend = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            env=plain_environment(),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.guest = MappedGuest()
        self.closers: list[Callable[[], Any]] = []
        _, self.left, _, _ = socket.recv_fds(self.link, 4096, 5)
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        self.guest.base = self.guest.finish(
            self.guest.start(
                "map",
                fds=(self.left[1], device),
                map_bytes=NR_PAGES * PAGE,
                features=uffd_features(),
            )
        )
        os.close(device)
        told = {"base": self.guest.base, "pid": self.guest.pid}
        socket.send_fds(self.link, [json.dumps(told).encode()], self.guest.fds[:2])
        self.link.recv(4096)

    def order(self, **order: Any) -> None:
        """Have the first backend do something; it may die of it."""
        self.link.send(json.dumps(order).encode())
        self.link.recv(4096)

    def die(self) -> None:
        """Wait for its death at the point that was armed."""
        assert self.backend.wait(60) == -signal.SIGKILL

    def kill(self) -> None:
        self.backend.kill()
        self.backend.wait()

    def succeed(self) -> None:
        """Take everything over, as a daemon does."""
        frames, guest_fd, arrays, quota, ledger = self.left
        self.left = []
        self.store = PageStore(NR_EXTENTS * EXTENT_PAGES * PAGE)
        self.image = self.store.adopt_image(
            "disk", FileSource.open(self.path), InheritedImage(frames, guest_fd, arrays)
        )
        self.quota = Quota.adopt(quota)
        self.account = Account(self.image, self.quota, ledger)
        self.account.place(self.guest.fds[0], self.guest.fds[1], self.account.regions())
        self.handler = FaultHandler(
            self.account.cdata, self.guest.fds[0], self.guest.pidfd, FaultOptions(0, PAGE, 0)
        )
        self.handler.resume()
        closers = (self.handler.stop, self.account.close, self.quota.close, self.store.close)
        self.closers = list(closers)

    def check(self, mine: set[int]) -> None:
        """Every page is the image's, or the guest's own; and the books agree with the kernel."""
        for extent in range(NR_EXTENTS):
            got = self.guest.read(extent * EXTENT_PAGES, EXTENT_PAGES)
            for i in range(EXTENT_PAGES):
                page = extent * EXTENT_PAGES + i
                expected = MINE if page in mine else content(page)
                assert got[i * PAGE : (i + 1) * PAGE] == expected, f"page {page}"
        accounts = {"g": self.account}
        report = audit(lambda: [self.image], lambda _: nullcontext(accounts))
        assert report.mismatches == []
        self.account.settle()
        assert self.account.status().private_pages == len(mine)
        assert self.quota.status().used_pages == len(mine)

    def close(self) -> None:
        self.kill()
        for point in range(lib.POINT_NR):
            lib.point_release(point)
        for closer in self.closers:
            closer()
        for fd in self.left:
            os.close(fd)
        self.guest.close()
        self.link.close()


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
