# SPDX-License-Identifier: Apache-2.0
"""A reader.py that also reads all the time, has a child that obeys, and cuts its mappings up.

mover.py IMAGE COPY
"""

import ctypes
import json
import mmap
import os
import random
import sys
import threading
import time
from typing import Any

from reader import PAGE, Reader

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = LIBC.mremap.restype = ctypes.c_void_p
MAP_FAILED = ctypes.c_void_p(-1).value
MREMAP_MAYMOVE = 1


class Mover(Reader):
    """A thread looks, or changes, under the lock: what is there and what should be go together."""

    def __init__(self, image: str, copy: str) -> None:
        super().__init__(image, copy)
        self.pieces: dict[int, bytes] = {}  # what is to be found at an address, a page each
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []
        self.lock = threading.RLock()
        self.nr_looks = 0
        self.wrong: list[tuple[int, int]] = []
        self.to_child = self.from_child = -1

    def do_map(self, first: int = 0, nr_pages: int = 0, writable: bool = False) -> int:
        with self.lock:
            return super().do_map(first, nr_pages, writable)

    def do_write(self, no: int, page: int, nr_pages: int = 1, byte: int = 1) -> None:
        with self.lock:
            super().do_write(no, page, nr_pages, byte)

    def do_check(self) -> list[tuple[int, int]]:
        with self.lock:
            return super().do_check()

    def do_spin(self) -> None:
        """Begin to look at pages, in a thread, in no order."""
        self.stop.clear()
        self.threads = [threading.Thread(target=self._spin, args=(no,)) for no in range(2)]
        for thread in self.threads:
            thread.start()

    def _spin(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stop.is_set():
            with self.lock:
                no = chance.randrange(len(self.maps))
                mapped, first = self.maps[no]
                page = chance.randrange(len(mapped) // PAGE)
                if mapped[page * PAGE : (page + 1) * PAGE] != self._right(no, first, page):
                    self.wrong.append((no, page))
                self.nr_looks += 1
            time.sleep(0)  # the main thread may want the lock

    def _right(self, no: int, first: int, page: int) -> bytes:
        if (no, page) in self.written:
            return bytes([self.written[no, page]]) * PAGE
        return self.copy[(first + page) * PAGE : (first + page + 1) * PAGE]

    def do_looks(self) -> int:
        return self.nr_looks

    def do_spun(self) -> list[tuple[int, int]]:
        """End that; what was wrong."""
        self.stop.set()
        for thread in self.threads:
            thread.join()
        self.threads.clear()
        return self.wrong

    def do_fork(self) -> int:
        """Make a child that obeys orders; its process id."""
        theirs, self.to_child = os.pipe()
        self.from_child, ours = os.pipe()
        with self.lock:  # no other thread has it, which the child does not have
            child = os.fork()
            if child == 0:
                os.close(self.to_child)
                os.close(self.from_child)
                with os.fdopen(theirs) as orders, os.fdopen(ours, "w") as answers:
                    obey(self, orders, answers)
                os._exit(0)
        os.close(theirs)
        os.close(ours)
        return child

    def do_child(self, order: dict[str, Any]) -> Any:
        """Have the child do it."""
        os.write(self.to_child, json.dumps(order).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            got = os.read(self.from_child, 1 << 16)
            assert got, "the child has ended"
            answer += got
        return json.loads(answer)["ok"]

    def do_cut_up(self, first: int, nr_pages: int) -> int:
        """Map a part in many pieces of several protections, moved and unmapped; the address."""
        length = nr_pages * PAGE
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        fd, offset = self.file.fileno(), ctypes.c_long(first * PAGE)
        at = LIBC.mmap(None, ctypes.c_size_t(length), writable, mmap.MAP_PRIVATE, fd, offset)
        assert at != MAP_FAILED
        for page in range(nr_pages):
            self.pieces[at + page * PAGE] = self._right(-1, first, page)
        for page in range(0, nr_pages, 3):
            self._write(at + page * PAGE, page % 251)
        self._protect(at + 4 * PAGE, 2, mmap.PROT_READ)
        self._protect(at + 8 * PAGE, 4, 0)  # nobody looks, and what is there is kept
        gone = at + 13 * PAGE
        assert LIBC.munmap(ctypes.c_void_p(gone), ctypes.c_size_t(2 * PAGE)) == 0
        for page in range(2):
            del self.pieces[gone + page * PAGE]
        old = at + (nr_pages - 6) * PAGE
        new = LIBC.mremap(
            ctypes.c_void_p(old), ctypes.c_size_t(6 * PAGE), ctypes.c_size_t(9 * PAGE), 1
        )
        assert new != MAP_FAILED
        for page in range(6):
            self.pieces[new + page * PAGE] = self.pieces.pop(old + page * PAGE)
        for page in range(6, 9):
            self.pieces[new + page * PAGE] = self._right(-1, first, nr_pages - 6 + page)
        return int(at)

    def _write(self, address: int, byte: int) -> None:
        ctypes.memset(address, byte, PAGE)
        self.pieces[address] = bytes([byte]) * PAGE

    def _protect(self, address: int, nr_pages: int, protection: int) -> None:
        where = ctypes.c_void_p(address), ctypes.c_size_t(nr_pages * PAGE)
        assert LIBC.mprotect(*where, protection) == 0

    def do_open_up(self, address: int) -> None:
        """Let what nobody could look at be looked at."""
        self._protect(address + 8 * PAGE, 4, mmap.PROT_READ)

    def do_check_pieces(self, hidden: int = 0) -> list[int]:
        """Every address where something else is than should be; but for four pages behind one."""
        return [
            address
            for address, right in self.pieces.items()
            if not (hidden and 8 * PAGE <= address - hidden < 12 * PAGE)
            and ctypes.string_at(address, PAGE) != right
        ]

    def do_write_pieces(self, byte: int) -> int:
        """Write to each piece that may be written to; how many."""
        nr = 0
        with open("/proc/self/maps") as lines:
            spans = [line.split()[:2] for line in lines]
        for span, may in spans:
            start, end = (int(part, 16) for part in span.split("-"))
            for address in sorted(self.pieces):
                if start <= address < end and may.startswith("rw"):
                    self._write(address, byte)
                    nr += 1
        return nr

    def do_write_on(self) -> None:
        """Begin to write to the second mapping and give pages of it back, in a thread."""
        self.stop.clear()
        self.threads.append(threading.Thread(target=self._write_on))
        self.threads[-1].start()

    def _write_on(self) -> None:
        """What was written is there, and what was given back is the image's."""
        chance = random.Random(1)
        mapped, first = self.maps[1]
        nr_pages = len(mapped) // PAGE
        while not self.stop.is_set():
            page = chance.randrange(nr_pages)
            with self.lock:
                if mapped[page * PAGE : (page + 1) * PAGE] != self._right(1, first, page):
                    self.wrong.append((1, page))
                if chance.randrange(4):
                    self.do_write(1, page, byte=chance.randrange(1, 256))
                else:
                    self.do_discard(1, page)
                self.nr_looks += 1
            time.sleep(0)

    def do_count_on(self, first: int, nr_pages: int) -> None:
        """Begin to write to private pages of the second mapping, faster than any fault is."""
        self.do_write(1, first, nr_pages, byte=255)
        self.stop.clear()
        self.threads.append(threading.Thread(target=self._count_on, args=(first, nr_pages)))
        self.threads[-1].start()

    def _count_on(self, first: int, nr_pages: int) -> None:
        """A write that is lost is a page that is not as it was left, a round before."""
        mapped, number = self.maps[1][0], 0
        places = [(page, page * PAGE + 8) for page in range(first, first + nr_pages)]
        before = b"\xff" * 8
        while not self.stop.is_set():
            after = number.to_bytes(8, "little")
            for page, place in places:
                if mapped[place : place + 8] != before:
                    self.wrong.append((1, page))
                mapped[place : place + 8] = after
            before, number = after, number + 1
            self.nr_looks += 1
        for _, place in places:
            mapped[place : place + 8] = b"\xff" * 8

    def do_hide(self) -> None:
        """As after a change of the user: what is the process's own in /proc is root's."""
        assert LIBC.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE

    def do_discard(self, no: int, page: int) -> None:
        """Give a page of a mapping back: it is the image's again."""
        with self.lock:
            self.maps[no][0].madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
            self.written.pop((no, page), None)


def obey(mover: Mover, orders: Any, answers: Any) -> None:
    for line in orders:
        order: dict[str, Any] = json.loads(line)
        answer = getattr(mover, "do_" + order.pop("do"))(**order)
        print(json.dumps({"ok": answer}), file=answers, flush=True)


def main() -> None:
    mover = Mover(sys.argv[1], sys.argv[2])
    print(json.dumps({"ok": None}), flush=True)
    obey(mover, sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
