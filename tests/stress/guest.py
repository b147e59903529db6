# SPDX-License-Identifier: Apache-2.0
"""A guest process: threads that read, write and discard at random, and check every byte they see.

Runs in a process forked by multiprocessing's fork server. The main thread opens the disks and obeys
the driver; the worker threads keep to pages of their own, interleaved finely, so that they meet in
extents and windows but never disagree about a byte. What each thread is about is written to a
shared file first: it outlives a kill, and shows who hangs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from model import PAGE_BYTES, DiskModel
from worker import Worker

from cowshed.transport import Disk, connect

SLOT_BYTES = 256
MAX_THREADS = 4
EXIT_WRONG = 3
_PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class Life:
    """What one guest process is to do; everything random follows from seed.

    errors_armed: sources may fail, so an EIO is no failure in itself.
    """

    name: str
    seed: str
    uri: str
    image: str
    source: str
    slots: str
    uid: int | None
    nr_threads: int
    nr_ops: int
    nr_sessions: int
    quota_bytes: int | None
    on_quota: str
    window_bytes: int | None
    write_window_bytes: int | None
    writes: float
    errors_armed: bool


class Slots:
    """A shared file: per thread, operations done and the operation it is at."""

    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SLOT_BYTES * MAX_THREADS)

    def note(self, thread_no: int, nr_done: int, text: str) -> None:
        at = thread_no * SLOT_BYTES
        packed = text.encode()[: SLOT_BYTES - 8].ljust(SLOT_BYTES - 8, b"\0")
        self._map[at : at + SLOT_BYTES] = struct.pack("<Q", nr_done) + packed

    def read(self) -> list[tuple[int, str]]:
        """Operations done and text, of each thread."""
        slots = []
        for no in range(MAX_THREADS):
            slot = self._map[no * SLOT_BYTES : (no + 1) * SLOT_BYTES]
            slots.append(
                (struct.unpack_from("<Q", slot)[0], slot[8:].rstrip(b"\0").decode(errors="replace"))
            )
        return slots

    def close(self) -> None:
        self._map.close()


class Guest:
    """The process: sessions of a disk and its threads, in turn, and the driver's orders."""

    def __init__(self, life: Life, orders: Connection) -> None:
        self.life = life
        self.slots = Slots(life.slots)
        self._orders = orders
        self._changed = threading.Condition()
        self._paused = False
        self._over = False
        self._nr_running = 0
        self._nr_waiting = 0
        with Path(life.source).open("rb") as file:
            self._image = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.session_no = 0
        self.disk: Disk
        self.model: DiskModel

    def pass_gate(self) -> bool:
        """Wait while the guest is paused; whether to go on."""
        with self._changed:
            self._nr_waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._paused or self._over)
            self._nr_waiting -= 1
            return not self._over

    def leave(self) -> None:
        with self._changed:
            self._nr_running -= 1
            self._changed.notify_all()

    def fail(self, text: str) -> None:
        """Tell the driver what is wrong, and end at once: the state is its evidence."""
        self._orders.send(("wrong", text))
        os._exit(EXIT_WRONG)

    def live(self) -> None:
        for session_no in range(self.life.nr_sessions):
            self.session_no = session_no
            with connect(self.life.uri) as backend:
                self.disk = backend.open(
                    self.life.image,
                    guest=f"{self.life.name}.{self.session_no}",
                    quota_bytes=self.life.quota_bytes,
                    on_quota=self.life.on_quota,
                    window_bytes=self.life.window_bytes,
                    write_window_bytes=self.life.write_window_bytes,
                )
            self.model = DiskModel(self._image, self.disk.size_bytes)
            workers = [Worker(self, no) for no in range(self.life.nr_threads)]
            self._nr_running = len(workers)
            for worker in workers:
                worker.start()
            self._obey_until_done()
            for worker in workers:
                worker.join()
            self.disk.close()
            if self._over:
                break
        self._orders.send(("end", ""))

    def _obey_until_done(self) -> None:
        while True:
            with self._changed:
                if self._nr_running == 0 and not self._paused:
                    return
            if self._orders.poll(0.02):
                self._obey(self._orders.recv())

    def _obey(self, order: str) -> None:
        if order == "pause":
            with self._changed:
                self._paused = True
                self._changed.wait_for(lambda: self._nr_waiting == self._nr_running)
            self._orders.send(("paused", ""))
        elif order == "verify":
            self._verify()
            self._orders.send(("verified", str(len(self.model.doubtful))))
        else:
            with self._changed:
                self._over = order == "end"
                self._paused = False
                self._changed.notify_all()

    def _verify(self) -> None:
        """Every byte of the image, at rest; nothing may fail but for a quota that kills."""
        for page in range(self.model.nr_pages):
            self.slots.note(MAX_THREADS - 1, page, f"verify page {page}")
            length = len(self.model.page(page))
            try:
                found = self.disk.read(page * PAGE_BYTES, length)
            except OSError as error:
                if self.life.on_quota != "kill" or page not in self.model.doubtful:
                    self.fail(f"verifying page {page} (repaired by now): {error}")
                self.disk.discard(page * PAGE_BYTES, length)
                self.model.discard(page, 1)
                found = self.disk.read(page * PAGE_BYTES, length)
            if problem := self.model.wrong_in_page(page, 0, found):
                self.fail(f"verifying {self.life.image}: {problem}")
        self.model.doubtful.clear()


def become(uid: int) -> None:
    """Change to uid for good; as after an exec, /proc/self is the new user's."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def live(life: Life, orders: Connection) -> None:
    """The process's whole life, as multiprocessing calls it."""
    if life.uid is not None:
        become(life.uid)
    try:
        Guest(life, orders).live()
    except Exception as error:
        orders.send(("wrong", f"{type(error).__name__}: {error}"))
        sys.exit(EXIT_WRONG)
