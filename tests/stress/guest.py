# SPDX-License-Identifier: Apache-2.0
"""A guest process: threads that read, write and discard at random, and check every byte they see.

Runs in a process forked by multiprocessing's fork server. The main thread opens the disks and obeys
the driver; the worker threads keep to pages of their own, interleaved finely, so that they meet in
extents and windows but never disagree about a byte. What each thread is about is written to a
shared file first: it outlives a kill, and shows who hangs.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import struct
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from model import PAGE_BYTES, DiskModel

from cowshed.transport import Disk, connect

SLOT_BYTES = 256
MAX_THREADS = 4
EXIT_WRONG = 3
_UNIT_PAGES = 5  # worker threads own pages in turns of this many
_PR_SET_DUMPABLE = 4
_MAX_RUN_BYTES = 256 << 10


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


class WrongError(Exception):
    """A guest saw what it must not see."""


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


class Worker(threading.Thread):
    """One thread of a guest; run() ends after nr_ops or when the guest is over."""

    def __init__(self, guest: Guest, no: int) -> None:
        super().__init__(daemon=True)
        self._guest = guest
        self._life = guest.life
        self._no = no
        self._disk = guest.disk
        self._model = guest.model
        self._rng = random.Random(f"{guest.life.seed}:{guest.session_no}:{no}")
        self._nr_done = 0
        self._stream_at = 0

    def run(self) -> None:
        try:
            for _ in range(self._life.nr_ops):
                if not self._guest.pass_gate():
                    break
                self._step()
            self._note("done")
        except WrongError as error:
            self._guest.fail(str(error))
        except BaseException as error:
            self._guest.fail(f"{type(error).__name__}: {error}")
        finally:
            self._guest.leave()

    def _note(self, text: str) -> None:
        self._nr_done += 1
        self._guest.slots.note(self._no, self._nr_done, text)

    def _owns(self, page: int) -> bool:
        return page // _UNIT_PAGES % self._life.nr_threads == self._no

    def _pick_own(self) -> int | None:
        """A page of our own, more often of the hot part than not."""
        nr_pages = self._model.nr_pages
        for _ in range(20):
            hot = self._rng.random() < 0.6
            page = self._rng.randrange(max(1, nr_pages // 6) if hot else nr_pages)
            if self._owns(page):
                return page
        return None

    def _own_run(self, page: int) -> int:
        """How many pages from page on are ours, up to a random bound."""
        most = self._rng.choice((1, 1, 2, 5, 20, 64))
        nr = 0
        while nr < most and page + nr < self._model.nr_pages and self._owns(page + nr):
            nr += 1
        return nr

    def _step(self) -> None:
        page = self._pick_own()
        if page is None:
            self._read(0, min(self._model.size_bytes, 100))
            return
        if self._rng.random() < self._life.writes:
            kind = self._rng.random()
            if kind < 0.15:
                self._discard(page)
            elif kind < 0.3 and not self._life.errors_armed:
                self._poke(page)
            else:
                self._write(page)
        else:
            kind = self._rng.random()
            if kind < 0.1 and not self._life.errors_armed:
                self._touch(page)
            elif kind < 0.25:
                self._read_stream()
            else:
                self._read_near(page)

    # Reading.

    def _read_near(self, page: int) -> None:
        offset = page * PAGE_BYTES + self._rng.choice((0, 0, self._rng.randrange(PAGE_BYTES)))
        length = self._rng.choice((1, 100, PAGE_BYTES, PAGE_BYTES, 12345, 65536, _MAX_RUN_BYTES))
        offset = min(offset, self._model.size_bytes - 1)
        self._read(offset, min(length, self._model.size_bytes - offset))

    def _read_stream(self) -> None:
        step = self._rng.choice((PAGE_BYTES, 3 * PAGE_BYTES, 65536))
        if self._stream_at >= self._model.size_bytes:
            self._stream_at = 0
        self._read(self._stream_at, min(step, self._model.size_bytes - self._stream_at))
        self._stream_at += step

    def _read(self, offset: int, length: int) -> None:
        self._note(f"read {length} at {offset}")
        try:
            found = self._disk.read(offset, length)
        except OSError as error:
            self._accept(error)
            self._read_each(offset, length)
            return
        self._check(offset, found)

    def _read_each(self, offset: int, length: int) -> None:
        for page, start, nr in self._model.pieces(offset, length):
            if self._owns(page):
                self._read_page(page, start, nr)

    def _read_page(self, page: int, start: int, nr: int) -> bytes | None:
        """Read within a page of ours and check it; None if it fails."""
        self._note(f"read {nr} of page {page}, byte {start}")
        try:
            found = self._disk.read(page * PAGE_BYTES + start, nr)
        except OSError as error:
            self._accept(error)
            if page in self._model.own:
                raise WrongError(f"page {page} is private, and failed: {error}") from error
            self._model.doubtful.add(page)
            return None
        self._check(page * PAGE_BYTES + start, found)
        return found

    def _accept(self, error: OSError) -> None:
        """An error may be met when sources fail, or a quota that kills is used up."""
        if error.errno != errno.EIO or not (
            self._life.errors_armed or self._life.on_quota == "kill"
        ):
            raise error

    def _check(self, offset: int, found: bytes) -> None:
        at = 0
        for page, start, nr in self._model.pieces(offset, len(found)):
            if self._owns(page):
                self._model.doubtful.discard(page)
                if problem := self._model.wrong_in_page(page, start, found[at : at + nr]):
                    raise WrongError(f"{self._life.image}: {problem}")
            at += nr

    def _touch(self, page: int) -> None:
        """Read through the mapping itself."""
        self._note(f"touch page {page}")
        with self._disk.view as view:
            byte = bytes(view[page * PAGE_BYTES : page * PAGE_BYTES + 1])
        self._check(page * PAGE_BYTES, byte)

    # Writing.

    def _poke(self, page: int) -> None:
        """Write through the mapping itself."""
        if self._life.on_quota == "kill" and self._rng.random() < 0.9:
            return  # it ends in SIGBUS once the quota is used up
        byte = bytes([self._rng.randrange(256)])
        self._note(f"poke page {page}")
        with self._disk.view as view:
            view[page * PAGE_BYTES : page * PAGE_BYTES + 1] = byte
        self._model.write_in_page(page, 0, byte)

    def _write(self, page: int) -> None:
        run_end = min((page + self._own_run(page)) * PAGE_BYTES, self._model.size_bytes)
        start = page * PAGE_BYTES
        if self._rng.random() < 0.5:
            start += self._rng.randrange(min(PAGE_BYTES, run_end - start))
            run_end = self._rng.randrange(start, run_end) + 1
        data = self._rng.randbytes(run_end - start)
        self._note(f"write {len(data)} at {start}")
        try:
            self._disk.write(start, data)
        except OSError as error:
            self._accept(error)
            self._find_written(start, data)
            return
        self._model.write(start, data)
        if self._rng.random() < 0.3:
            self._read(start, len(data))

    def _find_written(self, offset: int, data: bytes) -> None:
        """A write that failed wrote the pages before the bad one, and none from there on."""
        at, written = 0, True
        for page, start, nr in self._model.pieces(offset, len(data)):
            piece = data[at : at + nr]
            self._note(f"look at page {page} after a failed write")
            try:
                found = self._disk.read(page * PAGE_BYTES + start, nr)
            except OSError as error:
                self._accept(error)
                self._model.doubtful.add(page)
                found = b""
            if written and found == piece:
                self._model.write_in_page(page, start, piece)
            else:
                written = False
                if found and (problem := self._model.wrong_in_page(page, start, found)):
                    raise WrongError(f"{self._life.image}: after a failed write: {problem}")
            at += nr

    def _discard(self, page: int) -> None:
        nr = self._own_run(page)
        start = page * PAGE_BYTES
        length = min((page + nr) * PAGE_BYTES, self._model.size_bytes) - start
        self._note(f"discard {nr} pages from {page}")
        self._disk.discard(start, length)
        self._model.discard(page, nr)
        if self._rng.random() < 0.5:
            self._read_each(start, length)


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
