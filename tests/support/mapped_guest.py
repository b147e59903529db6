# SPDX-License-Identifier: Apache-2.0
"""A guest without a daemon: it maps the frames it receives, and sends back its descriptors.

    mapped_guest.py SOCKET_FD [UID]

Each order is one JSON packet with an "id", executed in a thread of its own, so that one may wait
for a fault while the next runs. The reply is {"id", "tid"}, then {"id", "ok"}, or "errno".
Reads and writes go through process_vm_readv, which waits without the GIL; touch and poke are plain
loads and stores, which hold it and can be killed by SIGBUS.
"""

import array
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from machine_client import EVENT_REMOVE, MODE_MISSING, UFFDIO_REGISTER, new_uffd
from orders import become

from cowshed.cache._core import ffi, lib

PAGE_BYTES = 4096
MCL_FUTURE = 2
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MAP_FIXED_NOREPLACE = 0x100000
PR_SET_PDEATHSIG = 1
UFFDIO_UNREGISTER = 0x8010AA01
ALL_MODES = 7

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


def checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


class MappedGuest:
    """The orders, and the one mapping that they use."""

    def __init__(self) -> None:
        self.region = ffi.new("struct region *")

    @property
    def base(self) -> int:
        return int(ffi.cast("uintptr_t", self.region.address))

    def do_map(
        self,
        fds: list[int],
        map_bytes: int,
        features: int,
        blocking: bool = False,
        lock_all: bool = False,
        offset: int = 0,
    ) -> tuple[int, list[int]]:
        """Map and guard a part of fds[0], with a userfaultfd from fds[1] if there is one."""
        if lock_all:
            checked(-1 if libc.mlockall(MCL_FUTURE) else 0)
        stage = ffi.new("int *")
        device = fds[1] if len(fds) > 1 else -1
        err = lib.region_init(self.region, fds[0], offset + map_bytes, device, features, stage)
        if err < 0:
            raise OSError(-err, f"stage {stage[0]}")
        if offset:  # unmap the memory in front of the part before the backend knows the range
            fcntl.ioctl(self.region.uffd, UFFDIO_UNREGISTER, struct.pack("QQ", self.base, offset))
            libc.munmap(ctypes.c_void_p(self.base), ctypes.c_size_t(offset))
            self.region.address = ffi.cast("void *", self.base + offset)
            self.region.map_bytes = map_bytes
        if blocking:
            flags = fcntl.fcntl(self.region.uffd, fcntl.F_GETFL)
            fcntl.fcntl(self.region.uffd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        return self.base, [self.region.uffd, self.region.pagemap_fd, self.region.mem_fd]

    def do_map_anonymous(self, map_bytes: int) -> tuple[int, list[int]]:
        """Map anonymous memory and guard it as a machine monitor does, with REMOVE events."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, map_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        uffd = new_uffd(EVENT_REMOVE)
        fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("QQQQ", base, map_bytes, MODE_MISSING, 0))
        self.region.address = ffi.cast("void *", base)
        self.region.map_bytes = map_bytes
        self.region.uffd = uffd
        self.region.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        return base, [uffd, self.region.pagemap_fd]

    def do_read(self, offset: int, length: int) -> str:
        buffer = bytearray(length)
        done = checked(lib.region_read(self.region, offset, ffi.from_buffer(buffer), length))
        return buffer[:done].hex()

    def do_write(self, offset: int, given_hex: str) -> int:
        given = bytes.fromhex(given_hex)
        return checked(lib.region_write(self.region, offset, given, len(given)))

    def do_fill(self, page: int, nr_pages: int, byte: int) -> int:
        """Write one byte value over pages."""
        return self.do_write(page * PAGE_BYTES, (bytes([byte]) * nr_pages * PAGE_BYTES).hex())

    def do_hammer(self, seed: int, nr_pages: int, nr_writes: int) -> None:
        """Write a few bytes at random offsets of the first pages, and discard some pages."""
        rng = random.Random(seed)
        for _ in range(nr_writes):
            page = rng.randrange(nr_pages)
            if rng.random() < 0.05:
                self.do_discard(page, 1)
            else:
                self.do_write(page * PAGE_BYTES + 8 * rng.randrange(512), rng.randbytes(8).hex())

    def do_touch(self, page: int) -> int:
        return ctypes.c_ubyte.from_address(self.base + page * PAGE_BYTES).value

    def do_poke(self, page: int, byte: int) -> None:
        ctypes.c_ubyte.from_address(self.base + page * PAGE_BYTES).value = byte

    def do_discard(self, page: int, nr_pages: int) -> None:
        checked(lib.region_discard(self.region, page * PAGE_BYTES, nr_pages * PAGE_BYTES))

    def do_page_out(self, page: int, nr_pages: int) -> int:
        at = ctypes.c_void_p(self.base + page * PAGE_BYTES)
        return int(libc.madvise(at, ctypes.c_size_t(nr_pages * PAGE_BYTES), 21))

    def do_move(self) -> int:
        """Move the whole mapping; return its new address."""
        length = ctypes.c_size_t(self.region.map_bytes)
        hole = libc.mmap(None, length.value, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        moved = libc.mremap(
            ctypes.c_void_p(self.base),
            length,
            length,
            MREMAP_MAYMOVE | MREMAP_FIXED,
            ctypes.c_void_p(hole),
        )
        if moved == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mremap")
        self.region.address = ffi.cast("void *", moved)
        return int(moved)

    def do_move_part(self, page: int, nr_pages: int) -> int:
        """Move some pages out of the mapping; return their new address."""
        hole = libc.mmap(
            None, nr_pages * PAGE_BYTES, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        return self.do_move_to(self.base + page * PAGE_BYTES, nr_pages, int(hole))

    def do_move_to(self, start: int, nr_pages: int, to: int, nr_there: int | None = None) -> int:
        """Move pages to an address, and grow or shrink them there."""
        before, after = nr_pages * PAGE_BYTES, (nr_there or nr_pages) * PAGE_BYTES
        moved = libc.mremap(
            ctypes.c_void_p(start),
            ctypes.c_size_t(before),
            ctypes.c_size_t(after),
            MREMAP_MAYMOVE | MREMAP_FIXED,
            ctypes.c_void_p(to),
        )
        if moved == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mremap")
        # The kernel may put an allocation of this process (each Python thread has one of 16 KiB)
        # where the pages were; a later move to that address would unmap it.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        if libc.mmap(ctypes.c_void_p(start), before, 0, flags, -1, 0) != start:
            raise OSError(ctypes.get_errno(), "the place that was left is taken")
        return int(moved)

    def do_use_up_mappings(self, nr_left: int, full: str, enough: str) -> None:
        """Make mappings until the kernel allows about nr_left more; then make the file full.

        Gives them back once there is a file enough: another order would need a thread, and that
        mappings for its stack.
        """
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        span = 2 * PAGE_BYTES * most
        start = libc.mmap(None, span, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        page = ctypes.c_size_t(PAGE_BYTES)
        pages = iter(range(start, start + span, 2 * PAGE_BYTES))
        while libc.mprotect(ctypes.c_void_p(next(pages)), page, 0) == 0:
            pass
        for at in range(start, start + nr_left * PAGE_BYTES, 2 * PAGE_BYTES):
            libc.mprotect(ctypes.c_void_p(at), page, mmap.PROT_READ)
        os.close(os.open(full, os.O_CREAT))
        while not os.access(enough, os.F_OK):
            time.sleep(0.01)
        libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(span))

    def do_hole(self, nr_pages: int) -> int:
        """Reserve address space for so many pages; return its address.

        A page on either side stays reserved: what is moved there borders on nothing moved before,
        since mremap takes no range of two mappings.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return int(libc.mmap(None, (nr_pages + 2) * PAGE_BYTES, 0, flags, -1, 0)) + PAGE_BYTES

    def do_read_at(self, address: int, length: int) -> str:
        buffer = ctypes.create_string_buffer(length)
        self._copy(libc.process_vm_readv, ctypes.addressof(buffer), address, length)
        return buffer.raw.hex()

    def do_write_at(self, address: int, given_hex: str) -> None:
        given = bytes.fromhex(given_hex)
        buffer = ctypes.create_string_buffer(given, len(given))
        self._copy(libc.process_vm_writev, ctypes.addressof(buffer), address, len(given))

    def _copy(self, copy: Any, ours: int, address: int, length: int) -> None:
        local, remote = (ctypes.c_size_t * 2)(ours, length), (ctypes.c_size_t * 2)(address, length)
        if copy(os.getpid(), local, 1, remote, 1, 0) != length:
            raise OSError(ctypes.get_errno() or errno.EFAULT, "short")

    def do_discard_at(self, address: int, nr_pages: int) -> None:
        length = ctypes.c_size_t(nr_pages * PAGE_BYTES)
        if libc.madvise(ctypes.c_void_p(address), length, 4):
            raise OSError(ctypes.get_errno(), "madvise")

    def do_unmap(self, page: int, nr_pages: int) -> int:
        at = ctypes.c_void_p(self.base + page * PAGE_BYTES)
        return int(libc.munmap(at, ctypes.c_size_t(nr_pages * PAGE_BYTES)))

    def do_protect(self, page: int, nr_pages: int, prot: int) -> int:
        at = ctypes.c_void_p(self.base + page * PAGE_BYTES)
        return int(libc.mprotect(at, ctypes.c_size_t(nr_pages * PAGE_BYTES), prot))

    def do_unregister(self, page: int, nr_pages: int) -> None:
        """Take the guard off by itself."""
        at, length = self.base + page * PAGE_BYTES, nr_pages * PAGE_BYTES
        fcntl.ioctl(self.region.uffd, UFFDIO_UNREGISTER, struct.pack("QQ", at, length))

    def do_steal(self, page: int, nr_pages: int) -> None:
        """Take the guard off, and register the range with a userfaultfd of its own."""
        self.do_unregister(page, nr_pages)
        self.own_uffd = new_uffd(0)
        at, length = self.base + page * PAGE_BYTES, nr_pages * PAGE_BYTES
        fcntl.ioctl(
            self.own_uffd, UFFDIO_REGISTER, struct.pack("QQQQ", at, length, MODE_MISSING, 0)
        )

    def do_guard(self) -> None:
        """Register the whole mapping for all faults again."""
        order = struct.pack("QQQQ", self.base, self.region.map_bytes, ALL_MODES, 0)
        fcntl.ioctl(self.region.uffd, UFFDIO_REGISTER, order)

    def do_splice(self, page: int) -> None:
        """Put a page into a pipe by reference, as a reader in the kernel holds it."""
        self.pipe = os.pipe()
        at = (ctypes.c_size_t * 2)(self.base + page * PAGE_BYTES, PAGE_BYTES)
        if libc.vmsplice(self.pipe[1], at, ctypes.c_size_t(1), 0) != PAGE_BYTES:
            raise OSError(ctypes.get_errno(), "vmsplice")

    def do_spliced(self) -> str:
        """Return what the page in the pipe holds now."""
        return os.read(self.pipe[0], PAGE_BYTES).hex()

    def do_occupy(self, page: int, nr_pages: int) -> None:
        """Map ordinary memory where the image was, and write to it."""
        at = self.base + page * PAGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        libc.mmap(at, nr_pages * PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        ctypes.memset(at, 1, nr_pages * PAGE_BYTES)

    def do_fork_touch(self, page: int) -> int:
        """Touch a page in a forked child; return its wait status, 0 if it read a byte."""
        child = os.fork()
        if child == 0:
            self.do_touch(page)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def do_make_blocking(self) -> None:
        flags = fcntl.fcntl(self.region.uffd, fcntl.F_GETFL)
        fcntl.fcntl(self.region.uffd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)

    def do_unmap_all(self) -> None:
        checked(lib.region_deinit(self.region))

    def do_attack(self, fds: list[int], backend_pid: int, backend_fd: int) -> dict[str, str]:
        """Try everything that would change or keep shared frames; return each outcome."""
        return attack(fds[0], backend_pid, backend_fd)


def attack(fd: int, backend_pid: int, backend_fd: int) -> dict[str, str]:
    """Try every access to a frame by an image's descriptor; return errno names, or "DONE"."""
    page = ctypes.c_size_t(PAGE_BYTES)
    shared = libc.mmap(None, PAGE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    at = ctypes.c_void_p(shared)

    def opening(path: str, flags: int) -> Any:
        return lambda: os.close(os.open(path, flags))

    def calling(call: Any, *arguments: Any) -> Any:
        def run() -> None:
            if call(*arguments) in (-1, ctypes.c_void_p(-1).value):
                raise OSError(ctypes.get_errno(), "")

        return run

    tries = {
        "write": lambda: os.pwrite(fd, b"x", 0),
        "truncate": lambda: os.ftruncate(fd, 0),
        "punch": calling(libc.fallocate, fd, 3, ctypes.c_long(0), ctypes.c_long(PAGE_BYTES)),
        "seal": lambda: fcntl.fcntl(fd, 1033, 0x8),  # F_ADD_SEALS, F_SEAL_WRITE
        "chmod": lambda: os.fchmod(fd, 0o777),
        "map shared": calling(libc.mmap, None, PAGE_BYTES, 3, mmap.MAP_SHARED, fd, 0),
        "mprotect": calling(libc.mprotect, at, page, 3),
        "madvise remove": calling(libc.madvise, at, page, 9),
        "own fd": opening(f"/proc/self/fd/{fd}", os.O_RDWR),
        "own fd, truncating": opening(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC),
        "backend's fd": opening(f"/proc/{backend_pid}/fd/{backend_fd}", os.O_RDWR),
    }
    came: dict[str, str] = {}
    for name, call in tries.items():
        try:
            call()
            came[name] = "DONE"
        except OSError as error:
            came[name] = os.strerror(error.errno or 0)
    return came


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    if len(sys.argv) > 2:
        become(int(sys.argv[2]))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # unanswered faults block it for ever
    guest = MappedGuest()

    def obey(order: dict[str, Any], fds: list[int]) -> None:
        no, call = order.pop("id"), getattr(guest, "do_" + order.pop("do"))
        link.send(json.dumps({"id": no, "tid": threading.get_native_id()}).encode())
        give: list[int] = []
        try:
            answer = {"id": no, "ok": call(**order, **({"fds": fds} if fds else {}))}
            if call in (guest.do_map, guest.do_map_anonymous):
                answer["ok"], give = answer["ok"]
        except OSError as error:
            answer = {"id": no, "errno": error.errno, "message": str(error)}
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", give))] if give else []
        link.sendmsg([json.dumps(answer).encode()], anc)

    link.send(b'{"id": 0, "ok": null}')
    # Made once: a new one for each order would be mapped where a mapping was just moved away.
    room = bytearray(1 << 20)
    while True:
        nr_bytes, ancillary, _, _ = link.recvmsg_into([room], socket.CMSG_SPACE(8 * 4))
        if not nr_bytes:
            return
        fds = array.array("i")
        for _, _, rights in ancillary:
            fds.frombytes(rights)
        order = json.loads(bytes(memoryview(room)[:nr_bytes]))
        threading.Thread(target=obey, args=(order, list(fds)), daemon=True).start()


if __name__ == "__main__":
    main()
