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
MREMAP_FIXED = 2
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
FIXED_NOREPLACE = 0x100000
OFFSET = ctypes.c_long
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mremap.restype = LIBC.mmap.restype = ctypes.c_void_p
SYS_CLOSE = 57 if os.uname().machine == "aarch64" else 3


class Buffer(ctypes.Structure):
    """Py_buffer, of which only the address is looked at."""

    _fields_ = (("buf", ctypes.c_void_p), ("rest", ctypes.c_byte * 256))


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

    def do_map_private(self, writable: bool = False) -> int:
        """Map all privately, as a loader does; the mapping's number."""
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapped = mmap.mmap(self.file.fileno(), len(self.copy), flags=mmap.MAP_PRIVATE, prot=prot)
        self.maps.append((mapped, 0))
        return len(self.maps) - 1

    def do_protect(self, no: int, page: int, nr_pages: int, call: str = "mprotect") -> int:
        """Make pages writable by mprotect or pkey_mprotect; 0, or the errno."""
        at = ctypes.c_void_p(self._address(no) + page * PAGE)
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        key = [-1] if call == "pkey_mprotect" else []
        failed = getattr(LIBC, call)(at, ctypes.c_size_t(nr_pages * PAGE), prot, *key)
        return ctypes.get_errno() if failed else 0

    def do_fill(self, no: int, page: int, nr_pages: int, byte: int = 1) -> None:
        """Write to pages whatever Python thinks of the mapping."""
        ctypes.memset(self._address(no) + page * PAGE, byte, nr_pages * PAGE)
        self.written |= {(no, each): byte for each in range(page, page + nr_pages)}

    def do_address(self, no: int) -> int:
        return self._address(no)

    def do_move(self, no: int) -> bool:
        """Move a mapping and check its bytes at the new place; then move it back."""
        length = len(self.maps[no][0])
        whole = ctypes.c_size_t(-(-length // PAGE) * PAGE)
        hole = LIBC.mmap(None, whole, 0, ANONYMOUS, -1, OFFSET(0))
        old = ctypes.c_void_p(self._address(no))
        moved = LIBC.mremap(old, whole, whole, MREMAP_FIXED | 1, ctypes.c_void_p(hole))
        if moved != hole:
            raise OSError(ctypes.get_errno(), "mremap")
        # Or else an allocation of this process may take the place.
        LIBC.mmap(old, whole, 0, ANONYMOUS | FIXED_NOREPLACE, -1, OFFSET(0))
        found = ctypes.string_at(moved, length)
        back = LIBC.mremap(ctypes.c_void_p(moved), whole, whole, MREMAP_FIXED | 1, old)
        if back != old.value:
            raise OSError(ctypes.get_errno(), "mremap back")
        return found == self.copy

    def _address(self, no: int) -> int:
        view = Buffer()
        ctypes.pythonapi.PyObject_GetBuffer(
            ctypes.py_object(self.maps[no][0]), ctypes.byref(view), 0
        )
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
        return int(view.buf)

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
