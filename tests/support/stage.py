# SPDX-License-Identifier: Apache-2.0
"""A backend in the test's own process, guests in theirs, races set up at the core's named points.

The test's process answers the faults, so it must never touch a guest's mapping itself. To set up a
race: arm a point, start the operation that stops there, wait until it has, do the other, release.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from domains import plain_environment

from cowshed.accounting import (
    Account,
    AuditReport,
    EvictReason,
    Quota,
    QuotaPolicy,
    Region,
    audit,
    evict,
)
from cowshed.cache import (
    ExtentState,
    FileSource,
    Image,
    PageStore,
    RemoteSource,
    StoreEvent,
)
from cowshed.cache._core import lib
from cowshed.faults import (
    FaultHandler,
    FaultOptions,
    PopulateHandler,
    PopulateOptions,
    PopulateRegion,
    uffd_features,
)

PAGE = 4096
EXTENT_PAGES = 16
NO_QUOTA = 1 << 40
ANSWER_SECONDS = 60.0
SCRIPT = Path(__file__).with_name("mapped_guest.py")


def loaded(*extents: int) -> list[tuple[StoreEvent, tuple[int, int], float]]:
    """Return the events of a store's first image that tell of loads of these extents."""
    return [(StoreEvent.LOADED, (0, extent), 0.0) for extent in extents]


def content(page: int, nr_pages: int = 1) -> bytes:
    """Return the image's content there: every page differs, none is zero."""
    return b"".join(
        (((page + i + 1) * 2654435761) & ((1 << 64) - 1)).to_bytes(8, "little") * (PAGE // 8)
        for i in range(nr_pages)
    )


def until(condition: Callable[[], Any], what: str, seconds: float = ANSWER_SECONDS) -> None:
    """Poll for a condition that sends no event."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        select.select([], [], [], 0.001)


class MappedGuest:
    """A mapped_guest.py process. start(order) returns a ticket; finish(ticket) its answer."""

    def __init__(self, uid: int | None = None) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = theirs.fileno()
        command = [sys.executable, str(SCRIPT), str(fd), *([] if uid is None else [str(uid)])]
        self.process = subprocess.Popen(command, env=plain_environment(), pass_fds=[fd])
        theirs.close()
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.base = 0
        self.fds: list[int] = []
        self.tids: dict[int, int] = {}
        self._answers: dict[int, dict[str, Any]] = {}
        self._last = 0
        self.account: Account
        self.quota: Quota
        self.handler: FaultHandler
        self.finish(0)

    def start(self, do: str, *, fds: tuple[int, ...] = (), **fields: Any) -> int:
        self._last += 1
        order = json.dumps({"id": self._last, "do": do, **fields}).encode()
        socket.send_fds(self.link, [order], fds)
        return self._last

    def _hear(self, seconds: float) -> bool:
        if not select.select([self.link], [], [], seconds)[0]:
            return False
        packet, fds, _, _ = socket.recv_fds(self.link, 1 << 20, 4)
        assert packet, f"the guest ended with status {self.process.wait(ANSWER_SECONDS)}"
        answer = json.loads(packet)
        if "tid" in answer:
            self.tids[answer["id"]] = answer["tid"]
        else:
            self._answers[answer["id"]] = answer
        self.fds += fds
        return True

    def answered(self, ticket: int) -> bool:
        while self._hear(0):
            pass
        return ticket in self._answers

    def finish(self, ticket: int, seconds: float = ANSWER_SECONDS) -> Any:
        """Wait for an answer; OSError for a failure there, AssertionError if there is none."""
        deadline = time.monotonic() + seconds
        while ticket not in self._answers:
            left = deadline - time.monotonic()
            assert left > 0, f"no answer: {self.where(ticket)}"
            self._hear(left)
        answer = self._answers.pop(ticket)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["message"])
        return answer["ok"]

    def call(self, do: str, **fields: Any) -> Any:
        return self.finish(self.start(do, **fields))

    def read(self, page: int, nr_pages: int = 1) -> bytes:
        assert nr_pages <= EXTENT_PAGES
        return bytes.fromhex(self.call("read", offset=page * PAGE, length=nr_pages * PAGE))

    def where(self, ticket: int) -> str:
        """Return the kernel function in which an order's thread waits; "0" if it runs."""
        while ticket not in self.tids:
            assert self._hear(ANSWER_SECONDS), "the guest is stuck with its GIL held"
        return Path(f"/proc/{self.pid}/task/{self.tids[ticket]}/wchan").read_text()

    def wait_stuck(self, ticket: int) -> None:
        """Wait until an order's thread waits for a fault to be answered."""
        until(lambda: self.where(ticket) == "handle_userfault", "the guest waits for its fault")

    def ended(self) -> int:
        """Wait for its end; return the status as subprocess does."""
        return self.process.wait(ANSWER_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.link.close()
        for fd in [*self.fds, self.pidfd]:
            os.close(fd)
        self.fds = []


class Stage:
    """A store with one image, and the guests that use it. Figures are in extents and pages.

    image_extent_pages: the image's, if they are larger than the store's, in which capacity and
    standby are counted. is_remote: the image has no file; its loads wait in queue.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nr_pages: int = 8 * EXTENT_PAGES,
        capacity: int | None = None,
        extent_pages: int = EXTENT_PAGES,
        image_extent_pages: int | None = None,
        nr_loaders: int = 4,
        cut_bytes: int = 0,
        standby: int = 0,
        is_remote: bool = False,
        low_free: int = 1,
    ) -> None:
        self.path = folder / "image.raw"
        self.size_bytes = nr_pages * PAGE - cut_bytes
        self.path.write_bytes(content(0, nr_pages)[: self.size_bytes])
        extent_bytes = extent_pages * PAGE
        capacity = capacity or -(-nr_pages // extent_pages) + 4
        self.store = PageStore(
            capacity * extent_bytes,
            extent_bytes=extent_bytes,
            nr_loaders=nr_loaders,
            standby_max_extents=standby,
        )
        self.store.set_standby(standby, low_free)
        self.queue = self.store.open_queue()
        remote = RemoteSource("http://origin/disk", self.size_bytes, '"1"', 0)
        self.image = self.store.open_image(
            "disk",
            remote if is_remote else FileSource.open(self.path),
            extent_bytes=(image_extent_pages or extent_pages) * PAGE,
            queue=self.queue if is_remote else None,
        )
        self.guests: list[MappedGuest] = []
        self._quotas: list[Quota] = []
        try:
            self.device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.device = -1

    def guest(
        self,
        *,
        quota: int | Quota | None = None,
        policy: QuotaPolicy = QuotaPolicy.STOP,
        window: int = 0,
        write_window: int = 1,
        uid: int | None = None,
        blocking: bool = False,
        lock_all: bool = False,
        spin_ns: int = 0,
        part: tuple[int, int] | None = None,
        preload: tuple[int, bytes] | None = None,
    ) -> MappedGuest:
        """Start and attach a guest: windows in pages, 0 adaptive; quota in pages, or one to share.

        part is the first page and the number of pages that it maps, if not all. A Quota object is
        another guest's, to be shared. preload is a file and the bitmap of its private pages in it.
        """
        first, nr_pages = part or (0, self.image.nr_pages)
        guest = MappedGuest(uid)
        self.guests.append(guest)
        fds = (self.image.guest_fd,) if self.device < 0 else (self.image.guest_fd, self.device)
        guest.base = guest.call(
            "map",
            fds=fds,
            map_bytes=nr_pages * PAGE,
            offset=first * PAGE,
            features=uffd_features(),
            blocking=blocking,
            lock_all=lock_all,
        )
        guest.quota = quota if isinstance(quota, Quota) else self.quota(quota, policy)
        guest.account = Account(self.image, guest.quota)
        region = Region(guest.base, first * PAGE, nr_pages * PAGE)
        guest.account.place(guest.fds[0], guest.fds[1], [region])
        if preload:
            guest.account.preload(*preload)
        options = FaultOptions(window * PAGE, write_window * PAGE, spin_ns)
        guest.handler = FaultHandler(guest.account.cdata, guest.fds[0], guest.pidfd, options)
        return guest

    def machine(
        self,
        *,
        quota: int | Quota | None = None,
        policy: QuotaPolicy = QuotaPolicy.STOP,
        window: int = 0,
        zero_discarded: bool = True,
    ) -> MappedGuest:
        """Start and attach a guest whose own memory is populated: windows in pages, 0 adaptive."""
        guest = MappedGuest()
        self.guests.append(guest)
        length = self.image.map_bytes
        guest.base = guest.call("map_anonymous", map_bytes=length)
        guest.quota = self.quota(quota, policy)
        guest.account = Account(self.image, guest.quota)
        guest.account.place(guest.fds[0], guest.fds[1], [Region(guest.base, 0, length)])
        region = PopulateRegion(guest.base, 0, length, PAGE)
        terms = PopulateOptions((region,), zero_discarded=zero_discarded)
        options = FaultOptions(window * PAGE, 0, 0)
        guest.handler = PopulateHandler(
            guest.account.cdata, guest.fds[0], guest.pidfd, options, terms
        )
        return guest

    def quota(self, nr_pages: int | None = None, policy: QuotaPolicy = QuotaPolicy.STOP) -> Quota:
        """Return a quota, or None, that is closed with the stage."""
        quota = Quota(NO_QUOTA if nr_pages is None else nr_pages * PAGE, policy)
        self._quotas.append(quota)
        return quota

    def detach(self, guest: MappedGuest) -> None:
        """Detach a guest in the daemon's order."""
        guest.handler.stop()
        guest.account.close()
        guest.close()
        self.guests.remove(guest)

    def load(self, first: int = 0, nr: int | None = None) -> None:
        """Make extents resident without a guest."""
        end = first + (self.image.nr_extents - first if nr is None else nr)
        while todo := [e for e in range(first, end) if self.state(e) is ExtentState.ABSENT]:
            self.image.prefetch(todo[0], end - todo[0])
            assert self.image.wait_loaded(first, end - first, int(ANSWER_SECONDS * 1000))

    def evict(self, *extents: int, at_once: bool = False) -> list[int]:
        """Evict what may be evicted, once no hold is left; at_once does not wait for holds.

        A fault thread that maps ahead may take a hold at any moment: then it is tried again.
        """
        if at_once:
            return sorted(evict(self.image, list(extents)))
        inside = [extent for extent in extents if extent < self.image.nr_extents]
        gone: set[int] = set()

        def are_gone() -> bool:
            staying = [e for e in inside if e not in gone and self._may_go(e)]
            gone.update(evict(self.image, staying))
            return gone.issuperset(staying)

        until(are_gone, "nobody holds the extents")
        return sorted(gone)

    def _may_go(self, extent: int) -> bool:
        return self.state(extent) is ExtentState.RESIDENT and not self.image.pins()[extent]

    def to_standby(self, *extents: int, reason: EvictReason = EvictReason.STANDBY) -> None:
        """Move extents, which must be resident, to the standby list, in this order."""
        for extent in extents:
            until(lambda: evict(self.image, [extent], reason), "nobody holds the extent")  # noqa: B023

    def evict_all(self) -> list[int]:
        return self.evict(*range(self.image.nr_extents))

    def state(self, extent: int) -> ExtentState:
        return ExtentState(self.image.states(extent, 1)[0])

    def audit(self) -> AuditReport:
        @contextmanager
        def accounts(_image: Image) -> Iterator[dict[str, Account]]:
            yield {f"g{i}": guest.account for i, guest in enumerate(self.guests)}

        return audit(lambda: [self.image], accounts)

    def frame(self, page: int) -> bytes:
        """Return the memfd's content, read without filling holes."""
        return os.pread(self.image.frames_fd, PAGE, page * PAGE)

    def looks(self, guest: MappedGuest, page: int, nr: int = 1) -> bytes:
        return guest.account.looks()[page : page + nr]

    def close(self) -> None:
        for point in range(lib.POINT_NR):
            lib.point_release(point)
        for guest in list(self.guests):
            self.detach(guest)
        for quota in self._quotas:
            quota.close()
        self.store.close()
        if self.device >= 0:
            os.close(self.device)


def private_pages(guest: MappedGuest) -> int:
    """Return the charged pages, after a settle."""
    guest.account.settle()
    return guest.account.status().private_pages


def write_faults(guest: MappedGuest) -> int:
    return guest.account.status().counters.faults_write


def read_faults(guest: MappedGuest) -> int:
    counters = guest.account.status().counters
    return counters.faults_missing + counters.faults_minor


def stop_at(point: int, nr_times: int = 1) -> None:
    """Stop the next nr_times threads that reach a point; 0: all of them."""
    assert lib.point_arm(point, lib.POINT_STOP, 0, nr_times) == 0


def fail_at(point: int, errno: int, nr_times: int = 0) -> None:
    assert lib.point_arm(point, lib.POINT_FAIL, errno, nr_times) == 0


def wait_at(point: int, nr_threads: int = 1) -> None:
    """Wait until that many threads have reached an armed point."""
    assert lib.point_wait(point, nr_threads, int(ANSWER_SECONDS * 1000)) == 0, "nobody came"


def let_go(point: int) -> None:
    assert lib.point_release(point) == 0


SIGBUS_DEATH = -signal.SIGBUS
SIGSEGV_DEATH = -signal.SIGSEGV
MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage(tmp_path: Path) -> Iterator[MakeStage]:
    """Set up a Stage: make_stage(nr_pages=..., capacity=...); all are closed."""
    stages: list[Stage] = []

    def make(**terms: Any) -> Stage:
        stage = Stage(tmp_path, **terms)
        stages.append(stage)
        return stage

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    return make_stage()
