# SPDX-License-Identifier: Apache-2.0
"""A program that knows nothing of cowshed: maps a file and obeys, one JSON order a line.

    reader.py IMAGE COPY

Answers each order with one JSON line. COPY has the bytes that IMAGE is to have.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

PAGE = 4096
SYS_CLOSE = 57 if os.uname().machine == "aarch64" else 3


class Reader:
    def __init__(self, image: str, copy: str) -> None:
        self.file = open(image, "rb")  # noqa: SIM115
        self.copy = Path(copy).read_bytes()
        self.maps: list[tuple[mmap.mmap, int]] = []
        self.written: dict[tuple[int, int], int] = {}

    def do_map(self, first: int = 0, nr_pages: int = 0, writable: bool = False) -> int:
        access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        length = nr_pages * PAGE or len(self.copy)
        mapped = mmap.mmap(self.file.fileno(), length, access=access, offset=first * PAGE)
        self.maps.append((mapped, first))
        return len(self.maps) - 1

    def do_write(self, no: int, page: int, nr_pages: int = 1, byte: int = 1) -> None:
        """Pages are counted from the mapping's start."""
        for each in range(page, page + nr_pages):
            self.maps[no][0][each * PAGE : (each + 1) * PAGE] = bytes([byte]) * PAGE
            self.written[no, each] = byte

    def do_check(self) -> list[tuple[int, int]]:
        """Every page that is not as it should be, as mapping and page."""
        wrong = []
        for no, (mapped, first) in enumerate(self.maps):
            for page in range(-(-len(mapped) // PAGE)):
                end = min((page + 1) * PAGE, len(mapped))
                right = self.copy[(first + page) * PAGE : first * PAGE + end]
                if (no, page) in self.written:
                    right = bytes([self.written[no, page]]) * PAGE
                if mapped[page * PAGE : end] != right:
                    wrong.append((no, page))
        return wrong

    def do_child_check(self) -> int:
        """Check in a forked child; its wait status."""
        child = os.fork()
        if child == 0:
            os._exit(1 if self.do_check() else 0)
        return os.waitpid(child, 0)[1]

    def do_child_write(self, no: int, page: int, nr_pages: int) -> int:
        """Fork a child that writes, and then waits to be killed; its process id."""
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            self.do_write(no, page, nr_pages, byte=2)
            os.write(told, b"!" if not self.do_check() else b"?")
            signal.pause()
        os.close(told)
        answer = os.read(ready, 1)
        os.close(ready)
        assert answer == b"!", answer
        return child

    def do_close_fds(self) -> None:
        os.closerange(3, 1 << 16)

    def do_close_fds_bare(self) -> None:
        """By system calls that no library sees."""
        syscall = ctypes.CDLL(None).syscall
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2:
                syscall(SYS_CLOSE, fd)


def main() -> None:
    reader = Reader(sys.argv[1], sys.argv[2])
    print(json.dumps({"ok": None}), flush=True)
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        answer = getattr(reader, "do_" + order.pop("do"))(**order)
        print(json.dumps({"ok": answer}), flush=True)


if __name__ == "__main__":
    main()
