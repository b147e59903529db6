# SPDX-License-Identifier: Apache-2.0
"""A thread of a guest: reads, writes and discards at random, and checks every byte of its pages."""

from __future__ import annotations

import errno
import random
import threading
from typing import TYPE_CHECKING

from model import PAGE_BYTES

if TYPE_CHECKING:
    from guest import Guest

_UNIT_PAGES = 5  # worker threads own pages in turns of this many
_MAX_RUN_BYTES = 256 << 10


class WrongError(Exception):
    """A guest saw what it must not see."""


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
