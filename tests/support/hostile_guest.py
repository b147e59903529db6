# SPDX-License-Identifier: Apache-2.0
"""A hostile guest, controlled like scripted_guest.py."""

import ctypes
import fcntl
import mmap
import os
import struct
import threading
from typing import Any

from orders import PAGE_BYTES, main
from scripted_guest import Script

from cowshed.cache._core import ffi, lib
from cowshed.transport import connect
from cowshed.transport.channels.exchange import ask_for_fds, close_all, greet

UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WRITEPROTECT = 0xC018AA06
libc = ctypes.CDLL(None, use_errno=True)
libc.munmap.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]


class Hostile(Script):
    """Attacks its own mapping through the disk's internals; threads end with the process."""

    def where(self) -> tuple[int, int, int]:
        """Return its userfaultfd, and its mapping's address and length."""
        region = self.opened()._region
        return region.uffd, int(ffi.cast("uintptr_t", region.address)), region.map_bytes

    def touch_in_threads(self, nr_threads: int = 4) -> None:
        """Fault without pause, in threads that are not joined."""
        disk = self.opened()

        def touch(no: int) -> None:
            page = no
            while True:
                page = (page + 37) % (disk.size_bytes // PAGE_BYTES)
                disk.write(page * PAGE_BYTES, b"x")
                if page < 37:
                    disk.discard(0, disk.size_bytes // PAGE_BYTES * PAGE_BYTES)

        for no in range(nr_threads):
            threading.Thread(target=touch, args=(no,), daemon=True).start()

    def do_touch_all(self) -> None:
        self.touch_in_threads()

    def do_block(self, times: int) -> None:
        """Make the userfaultfd, which the backend shares, blocking repeatedly."""
        uffd, _, _ = self.where()
        self.touch_in_threads()
        flags = fcntl.fcntl(uffd, fcntl.F_GETFL)
        for _ in range(times):
            fcntl.fcntl(uffd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
        # It stays blocking.

    def do_steal(self, nr_events: int) -> int:
        """Read its own events before the backend does; return how many it got."""
        uffd, _, _ = self.where()
        self.touch_in_threads(8)
        got = 0
        for _ in range(nr_events * 1000):
            try:
                got += len(os.read(uffd, 32)) // 32
            except BlockingIOError:
                continue
            if got >= nr_events:
                break
        return got

    def do_unregister(self) -> str:
        """Remove the guard and read the first page."""
        uffd, address, length = self.where()
        fcntl.ioctl(uffd, UFFDIO_UNREGISTER, struct.pack("QQ", address, length))
        return self.opened().read(0, PAGE_BYTES).hex()

    def do_unmap(self, offset: int, length: int) -> None:
        _, address, _ = self.where()
        assert libc.munmap(address + offset, length, 0) == 0

    def do_move(self, offset: int, length: int) -> None:
        """Move a part of the mapping elsewhere."""
        _, address, _ = self.where()
        assert libc.mremap(address + offset, length, length, 1, None) not in (None, -1)

    def do_close_all(self) -> None:
        """Close every descriptor in the middle of faults."""
        self.touch_in_threads()
        self.hang_up()
        os.closerange(3, 1 << 20)

    def hang_up(self) -> None:
        """End the connection, like a program whose library has no thread that waits at it."""
        self.opened()._stop_following()
        self.opened()._connection._socket.close()

    def do_close_quietly(self) -> None:
        """Close every descriptor, and rest."""
        self.hang_up()
        os.closerange(3, 1 << 20)

    def do_become_another(self) -> None:
        """Execute another program."""
        os.execvp("sleep", ["sleep", "600"])

    def do_map_over(self, offset: int, length: int) -> None:
        """Map other memory over a part of the mapping."""
        _, address, _ = self.where()
        got = libc.mmap(address + offset, length, 1, 0x32, -1, 0)  # private, anonymous, fixed
        assert got == address + offset

    def do_leave(self) -> None:
        """Unmap and close everything without "close"."""
        disk = self.opened()
        disk._state = "closed"
        self.hang_up()
        disk._connection.close()
        lib.region_deinit(disk._region)

    def do_flood_discards(self, times: int) -> None:
        """madvise(MADV_DONTNEED) over everything, from several threads while others fault."""
        _, address, length = self.where()
        self.touch_in_threads(2)
        floods = [
            threading.Thread(
                target=lambda: [libc.madvise(address, length, 4) for _ in range(times)]
            )
            for _ in range(3)
        ]
        for flood in floods:
            flood.start()
        for flood in floods:
            flood.join()

    def do_write_uncharged(self, length: int) -> None:
        """Remove the write protection with its own userfaultfd, and write."""
        uffd, address, _ = self.where()
        fcntl.ioctl(uffd, UFFDIO_WRITEPROTECT, struct.pack("QQQ", address, length, 0))
        ctypes.memset(address, 1, length)

    def do_read_holes(self, length: int) -> int:
        """Read the frames through an unguarded mapping; return how many bytes were not zero."""
        connection = greet(self.uri)
        request = {"image": "d", "guest": f"holes-{os.getpid()}"}
        _, fds = ask_for_fds(connection, "open", request)
        with mmap.mmap(fds[0], length, mmap.MAP_SHARED, mmap.PROT_READ) as frames:
            found = sum(frames[at] != 0 for at in range(0, length, PAGE_BYTES))
        close_all(fds)
        connection.close()
        return found

    def do_tamper(self) -> list[str]:
        """Try to write to, truncate, seal and re-open the frames; return the errors."""
        connection = greet(self.uri)
        request = {"image": "d", "guest": f"tamper-{os.getpid()}"}
        _, fds = ask_for_fds(connection, "open", request)
        fd = fds[0]
        attempts: list[Any] = [
            lambda: mmap.mmap(fd, PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_WRITE),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: os.posix_fallocate(fd, 0, PAGE_BYTES),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
            lambda: os.fchmod(fd, 0o666),
        ]
        errors = []
        for attempt in attempts:
            try:
                attempt()
                errors.append("none")
            except OSError as error:
                errors.append(type(error).__name__)
        close_all(fds)
        connection.close()
        return errors

    def do_flood_connections(self, nr_connections: int) -> int:
        """Open connections that send hello and stay; return how many were admitted."""
        self.kept = []
        for _ in range(nr_connections):
            try:
                self.kept.append(connect(self.uri))
            except Exception:
                break
        return len(self.kept)


if __name__ == "__main__":
    main(Hostile)
