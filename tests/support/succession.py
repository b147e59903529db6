# SPDX-License-Identifier: Apache-2.0
"""A backend that dies at a named point (doomed_backend.py), its guest, and its successor here."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from domains import plain_environment
from stage import EXTENT_PAGES, PAGE, MappedGuest, content

from cowshed.accounting import OPEN_PAGES, Account, Quota, audit
from cowshed.cache import FileSource, InheritedImage, PageStore
from cowshed.cache._core import lib
from cowshed.faults import FaultHandler, FaultOptions, uffd_features

SCRIPT = Path(__file__).with_name("doomed_backend.py")
NR_EXTENTS = 8
NR_PAGES = NR_EXTENTS * EXTENT_PAGES
MINE = b"\xee" * PAGE


class Succession:
    """One guest, the backend it has first, and, after succeed(), one in this process."""

    def __init__(
        self, folder: Path, quota_pages: int | None = None, nr_extents: int = NR_EXTENTS
    ) -> None:
        self.nr_extents = nr_extents
        nr_pages = nr_extents * EXTENT_PAGES
        quota_pages = quota_pages or nr_pages
        self.path = folder / "image.raw"
        self.path.write_bytes(content(0, nr_pages))
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = [str(nr_extents), str(quota_pages * PAGE)]
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
                map_bytes=nr_pages * PAGE,
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

    def shorten_ledger(self) -> None:
        """Cut off what releases without open regions do not have."""
        nr_pages = self.nr_extents * EXTENT_PAGES
        by_page, by_region = -(-nr_pages // 64) * 8, -(-nr_pages // OPEN_PAGES // 64) * 8
        ledger = self.left[4]
        os.ftruncate(ledger, os.fstat(ledger).st_size - by_page - 2 * by_region - 8)

    def succeed(self, nr_extents: int | None = None) -> None:
        """Take everything over, as a daemon does, with room for so many extents."""
        frames, guest_fd, arrays, quota, ledger = self.left
        self.left = []
        self.store = PageStore((nr_extents or self.nr_extents) * EXTENT_PAGES * PAGE)
        self.image = self.store.adopt_image(
            "disk", FileSource.open(self.path), InheritedImage(frames, guest_fd, arrays)
        )
        self.quota = Quota.adopt(quota)
        self.account = Account(self.image, self.quota, ledger)
        self.account.place(self.guest.fds[0], self.guest.fds[1], self.account.regions())
        self.handler = FaultHandler(
            self.account.cdata, self.guest.fds[0], self.guest.pidfd, FaultOptions(0, PAGE, 0)
        )
        self.account.finish_opening()
        self.handler.resume()
        closers = (self.handler.stop, self.account.close, self.quota.close, self.store.close)
        self.closers = list(closers)

    def check(self, mine: set[int]) -> None:
        """Every page is the image's, or the guest's own; and the books agree with the kernel."""
        for extent in range(self.nr_extents):
            got = self.guest.read(extent * EXTENT_PAGES, EXTENT_PAGES)
            for i in range(EXTENT_PAGES):
                page = extent * EXTENT_PAGES + i
                expected = MINE if page in mine else content(page)
                assert got[i * PAGE : (i + 1) * PAGE] == expected, f"page {page}"
        accounts = {"g": self.account}
        report = audit(lambda: [self.image], lambda _: nullcontext(accounts))
        assert report.mismatches == []
        self.account.settle()
        self.account.check()
        status = self.account.status()
        assert status.private_pages == len(mine)
        assert self.quota.status().used_pages == len(mine) + status.reserved_pages

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
