# SPDX-License-Identifier: Apache-2.0
"""A crowd of guests that never rest, each a process of its own; see bench/core/steady.h.

    steady.py BUILD_DIR SHARED_FD TERMS

TERMS is Terms as JSON. Each child opens the image, writes its private pages, and touches pages
until the order to stop. If a child fails it ends with status 1, and so does this program.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from mappings import PAGE_BYTES, page_order
from native import checked, ffi, load_steady

from cowshed.transport import connect

__all__ = ["Shared", "Terms"]


@dataclass(frozen=True)
class Terms:
    """A crowd's work. Each page of the image begins with its number, in 8 bytes.

    One in write_every accesses is a write (0: none); with hot_pages, writes cycle over that many
    pages. private_pages of random bytes are written before anything is measured.
    """

    uri: str
    image: str
    name: str
    nr_guests: int
    pace_ms: float
    write_every: int
    hot_pages: int = 0
    private_pages: int = 0

    def as_json(self) -> str:
        """Return it for the command line."""
        return json.dumps(asdict(self))


class Shared:
    """The memory that guests share with the measuring process: orders, and each guest's records."""

    def __init__(self, fd: int, nr_guests: int) -> None:
        order_bytes = ffi.sizeof("struct steady_order")
        size = order_bytes + nr_guests * ffi.sizeof("struct steady_guest")
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        self._map = mmap.mmap(fd, size)
        whole = ffi.from_buffer(self._map)
        self.order: Any = ffi.cast("struct steady_order *", whole)
        self.guests: Any = ffi.cast("struct steady_guest *", whole + order_bytes)


class _Guest:
    """One child: number no of the crowd."""

    def __init__(self, lib: Any, shared: Shared, terms: Terms, no: int) -> None:
        self._lib = lib
        self._shared = shared  # keeps its memory alive
        self._order = shared.order
        self._note = shared.guests + no
        self._terms = terms
        self._pace_ns = int(terms.pace_ms * 1e6)
        self._random = Random(no)
        with connect(terms.uri) as backend:
            self._disk = backend.open(
                terms.image,
                guest=f"{terms.name}-{no}",
                token=f"{terms.name}-{no}",
                window_bytes=PAGE_BYTES,
                write_window_bytes=PAGE_BYTES,
            )
        self._pages = page_order(self._disk.size_bytes // PAGE_BYTES, "shuffled", no)

    def live(self) -> None:
        """Prepare, touch pages until the order to stop, and detach."""
        for page in self._pages[: self._terms.private_pages]:
            self._disk.write(page * PAGE_BYTES, self._random.randbytes(PAGE_BYTES))
        self._lib.steady_ready(self._order)
        if self._disk.mapped:
            self._touch()
        else:
            self._ask()
        self._disk.close()

    def _touch(self) -> None:
        terms, view = self._terms, self._disk.view  # type: ignore[union-attr]
        base = ffi.from_buffer("char[]", view, require_writable=True)
        result = self._lib.steady_run(
            base,
            ffi.from_buffer("uint32_t[]", self._pages),
            len(self._pages),
            self._pace_ns,
            terms.write_every,
            terms.hot_pages,
            max(terms.hot_pages, terms.private_pages),
            len(view),
            self._order,
            self._note,
        )
        ffi.release(base)
        view.release()
        checked(result, "touching pages")

    def _ask(self) -> None:
        """Do as steady_run, by requests: random reads, and writes to the hot pages in turn."""
        terms, nr, at = self._terms, 0, max(self._terms.hot_pages, self._terms.private_pages)
        span = ffi.new("uint32_t *", self._order.span)
        before_ns = time.monotonic_ns()
        while not self._order.stop:
            write = terms.write_every and nr % terms.write_every == 0
            hot = write and terms.hot_pages
            page = self._pages[nr // terms.write_every % terms.hot_pages if hot else at]
            try:
                good = self._access(page, write=bool(write))
            except OSError as error:
                print(f"steady: guest {terms.name}: {error}", file=sys.stderr, flush=True)
                good = False
            before_ns = self._lib.steady_note(
                self._order, self._note, span, before_ns, self._pace_ns, not good
            )
            nr += 1
            at = at + (not hot)
            if at == len(self._pages):
                at = max(terms.hot_pages, terms.private_pages)
            time.sleep(max(0, before_ns + self._pace_ns - time.monotonic_ns()) / 1e9)

    def _access(self, page: int, *, write: bool) -> bool:
        mine = (~page & (1 << 64) - 1).to_bytes(8, "little")
        image = page.to_bytes(8, "little")
        if write:
            self._disk.write(page * PAGE_BYTES, mine)
        return self._disk.read(page * PAGE_BYTES, 8) in ((mine,) if write else (mine, image))


def main() -> None:
    """Fork the crowd and wait for all of it."""
    build_dir, fd, text = sys.argv[1:]
    terms = Terms(**json.loads(text))
    lib = load_steady(Path(build_dir))
    lib.steady_die_with_parent()
    pids = []
    for no in range(terms.nr_guests):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                lib.steady_die_with_parent()
                _Guest(lib, Shared(int(fd), terms.nr_guests), terms, no).live()
                status = 0
            except Exception as error:
                print(f"steady: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    failed = [status for status in statuses if status]
    sys.exit(f"steady: guests ended with {failed}" if failed else 0)


if __name__ == "__main__":
    main()
