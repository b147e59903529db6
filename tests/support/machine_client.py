# SPDX-License-Identifier: Apache-2.0
"""A process that hands its memory over as machine monitors do, controlled like scripted_guest.

    machine_client.py SOCKET_PATH

It follows Firecracker's documentation of restoring a snapshot: maps anonymous memory for each
region, makes a userfaultfd with REMOVE events, registers, connects, and sends the list of regions
with the descriptor, once. It also follows Nydus's documentation of a client.

It reads and writes memory through process_vm_readv, which waits for faults without the GIL, and
compares it with the image and the effects of earlier orders.
"""

import array
import ctypes
import fcntl
import json
import mmap
import os
import random
import select
import socket
import struct
import threading
from pathlib import Path
from typing import Any

from orders import PAGE_BYTES, become, main

HUGE_BYTES = 2 << 20
EVENT_REMOVE = 1 << 3
MADV_DONTNEED = 4
MAP_HUGETLB = 0x40000
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_WAKE = 0x8010AA02
USERFAULTFD_IOC_NEW = 0xAA00
MODE_MISSING = 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def transfer(call: Any, address: int, buffer: Any) -> None:
    """Copy all bytes between a buffer and this process's own memory, faulting without the GIL."""
    done = 0
    while done < len(buffer):
        length = len(buffer) - done
        local = Iovec(ctypes.addressof(buffer) + done, length)
        remote = Iovec(address + done, length)
        got = call(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if got <= 0:
            raise OSError(ctypes.get_errno(), f"at {address + done:#x}")
        done += got


def read_memory(address: int, length: int) -> bytes:
    buffer = (ctypes.c_char * length)()
    transfer(libc.process_vm_readv, address, buffer)
    return bytes(buffer)


def write_memory(address: int, content: bytes) -> None:
    buffer = (ctypes.c_char * len(content)).from_buffer_copy(content)
    transfer(libc.process_vm_writev, address, buffer)


def new_uffd(features: int) -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    uffd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    os.close(device)
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("QQQ", 0xAA, features, 0))
    return uffd


class Machine:
    """The orders. page is a page of the image; _expected holds what differs from the image."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.uffd = -1
        self.regions: list[dict[str, int]] = []
        self.expected: dict[int, bytes] = {}
        self.image = b""
        self.mapped_ranges: list[tuple[int, int]] = []
        self.failures: list[str] = []
        self.busy: list[threading.Thread] = []
        self.told: list[dict[str, Any]] = []

    def do_map(
        self,
        sizes: list[int],
        page_bytes: int = PAGE_BYTES,
        features: int = EVENT_REMOVE,
        align: int = 0,
        first_offset: int = 0,
    ) -> list[int]:
        """Map and register a region of each size; return their addresses."""
        self.uffd = new_uffd(features)
        offset = first_offset
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if page_bytes > PAGE_BYTES:
            flags |= MAP_HUGETLB
        for size in sizes:
            address = libc.mmap(None, size + align, 3, flags, -1, 0)
            if address == ctypes.c_void_p(-1).value:
                raise OSError(ctypes.get_errno(), "mmap")
            address = (address + align - 1) // align * align if align else address
            order = struct.pack("QQQQ", address, size, MODE_MISSING, 0)
            fcntl.ioctl(self.uffd, UFFDIO_REGISTER, order)
            self.regions.append(
                {
                    "base_host_virt_addr": address,
                    "size": size,
                    "offset": offset,
                    "page_size": page_bytes,
                    "page_size_kib": page_bytes,
                }
            )
            offset += size
        return [region["base_host_virt_addr"] for region in self.regions]

    def do_become(self, uid: int) -> None:
        """Change to another user, with the userfaultfd made before."""
        become(uid)

    def do_connect(self) -> None:
        self.socket.connect(self.path)

    def do_hand_over(self) -> None:
        """Send Firecracker's handshake on the present connection."""
        self.send(self.regions, [self.uffd])

    def do_restore(self, image: str) -> None:
        """Connect and send Firecracker's handshake; the memory must then equal image."""
        self.image = Path(image).read_bytes()
        self.socket.connect(self.path)
        self.send(self.regions, [self.uffd])

    def do_restore_again(self, image: str) -> None:
        """Make another connection of this process, with separate memory; the first stays open."""
        other = Machine(self.path)
        other.do_map([one["size"] for one in self.regions])
        other.do_restore(image)
        self.other = other

    def do_nydus(
        self, image: str, policy: int, page_size: int = 0, **fields: Any
    ) -> dict[str, Any]:
        """Connect, request the size, send a typed handshake; return the answer with the size."""
        self.image = Path(image).read_bytes()
        self.socket.connect(self.path)
        self.send({"type": 2}, [])
        stat = json.loads(self.socket.recv(4096))
        regions = [dict(one) for one in self.regions]
        for one in regions:
            del one["page_size_kib"]
            one["page_size"] = page_size or one["page_size"]
        self.send({"type": 0, "regions": regions, "policy": policy, **fields}, [self.uffd])
        if policy == 0:
            threading.Thread(target=self.map_ranges, daemon=True).start()
        return dict(stat)

    def send(self, message: object, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self.socket.sendmsg([json.dumps(message).encode()], rights if fds else [])

    def do_send(self, text: str, nr_fds: int = 0, what: str = "uffd") -> None:
        """Send any text with any number of descriptors."""
        fd = self.uffd if what == "uffd" else os.open("/dev/null", os.O_RDONLY)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * nr_fds))]
        self.socket.sendmsg([text.encode()], rights if nr_fds else [])

    def do_handshake(self, regions: list[dict[str, int]]) -> None:
        """Send a list of regions unchanged, with the userfaultfd."""
        self.send(regions, [self.uffd])

    def do_wait_dropped(self) -> int:
        """Wait until the daemon closes the connection; return how many bytes came first."""
        nr = 0
        while True:
            try:
                piece = self.socket.recv(4096)
            except ConnectionResetError:
                return nr
            if not piece:
                return nr
            nr += len(piece)

    def map_ranges(self) -> None:
        """Run a Nydus client's thread: map the ranges that it receives, and wake their waiters."""
        while True:
            text, fds, _, _ = socket.recv_fds(self.socket, 4096, 64)
            if not text:
                return
            message = json.loads(text)
            self.told.append(message)
            assert message["type"] == 1
            assert len(fds) == len(message["ranges"])
            for one, fd in zip(message["ranges"], fds, strict=True):
                address = self.address(one["block_offset"] // PAGE_BYTES)
                flags = mmap.MAP_SHARED | mmap.MAP_PRIVATE | 0x10  # MAP_FIXED, like its client
                got = libc.mmap(address, one["len"], 1, flags, fd, one["blob_offset"])
                if got != address:
                    self.failures.append(f"mmap of {one}: errno {ctypes.get_errno()}")
                os.close(fd)
                self.mapped_ranges.append((one["block_offset"], one["len"]))
                fcntl.ioctl(self.uffd, UFFDIO_WAKE, struct.pack("QQ", address, one["len"]))

    def do_told(self) -> list[list[int]]:
        """Return the ranges mapped so far."""
        return [list(one) for one in self.mapped_ranges]

    def address(self, page: int) -> int:
        for region in self.regions:
            at = page * PAGE_BYTES - region["offset"]
            if 0 <= at < region["size"]:
                return region["base_host_virt_addr"] + at
        raise ValueError(f"page {page} is in no region")

    def pages(self) -> list[int]:
        return [
            page
            for one in self.regions
            for page in range(
                one["offset"] // PAGE_BYTES, (one["offset"] + one["size"]) // PAGE_BYTES
            )
        ]

    def wanted(self, page: int) -> bytes:
        if page in self.expected:
            return self.expected[page]
        return self.image[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].ljust(PAGE_BYTES, b"\0")

    def check(self, pages: list[int]) -> None:
        try:
            for page in pages:
                if read_memory(self.address(page), PAGE_BYTES) != self.wanted(page):
                    self.failures.append(f"page {page} is wrong")
        except BaseException as error:
            self.failures.append(repr(error))

    def do_compare(self, nr_threads: int = 1, seed: int = 0, nr_pages: int = 0) -> list[str]:
        """Read every page, or so many, in random order in threads; return the differences."""
        self.do_begin_compare(nr_threads, seed, nr_pages)
        return self.do_end_compare()

    def do_begin_compare(self, nr_threads: int = 1, seed: int = 0, nr_pages: int = 0) -> None:
        pages = self.pages()
        random.Random(seed).shuffle(pages)
        pages = pages[: nr_pages or len(pages)]
        self.busy = [
            threading.Thread(target=self.check, args=(pages[no::nr_threads],), daemon=True)
            for no in range(nr_threads)
        ]
        for thread in self.busy:
            thread.start()

    def do_end_compare(self) -> list[str]:
        for thread in self.busy:
            thread.join()
        return self.failures[:20]

    def do_is_busy(self) -> bool:
        return any(thread.is_alive() for thread in self.busy)

    def do_begin_touch(self, pages: list[int]) -> None:
        """Check some pages, each in a thread of its own."""
        self.busy = [
            threading.Thread(target=self.check, args=([page],), daemon=True) for page in pages
        ]
        for thread in self.busy:
            thread.start()

    def do_read(self, page: int) -> str:
        """Return the first 8 bytes of a page, as hex."""
        return read_memory(self.address(page), 8).hex()

    def do_fill(self, page: int, nr_pages: int, byte: int) -> None:
        for no in range(page, page + nr_pages):
            write_memory(self.address(no), bytes([byte]) * PAGE_BYTES)
            self.expected[no] = bytes([byte]) * PAGE_BYTES

    def do_balloon(self, page: int, nr_pages: int, reads: str = "zeros") -> None:
        """Discard pages, as a balloon does; they must then read as zeros, or as the image."""
        for no in range(page, page + nr_pages):
            self.expected.pop(no, None)
            if reads == "zeros":
                self.expected[no] = bytes(PAGE_BYTES)
        if libc.madvise(self.address(page), nr_pages * PAGE_BYTES, MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")

    def do_begin_balloon(self, page: int, nr_pages: int) -> None:
        """Discard pages in a thread, which waits until the backend has read the event."""
        balloon = threading.Thread(target=self.do_balloon, args=(page, nr_pages), daemon=True)
        balloon.start()
        select.select([self.uffd], [], [])

    def do_churn(self, rounds: int, seed: int, nr_pages: int) -> list[str]:
        """Balloon and use the same pages from two threads; each page has one thread at a time."""
        rng = random.Random(seed)

        def run(pages: list[int], seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(rounds):
                page = rng.choice(pages)
                kind = rng.randrange(4)
                if kind == 0:
                    self.do_balloon(page, 1)
                elif kind == 1:
                    self.do_fill(page, 1, rng.randrange(1, 256))
                else:
                    self.check([page])

        pages = self.pages()[:nr_pages]
        rng.shuffle(pages)
        threads = [
            threading.Thread(target=run, args=(pages[no::4], rng.random()), daemon=True)
            for no in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.failures[:20]

    def do_close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)  # a thread may be reading
        self.socket.close()

    def do_pid(self) -> int:
        return os.getpid()


if __name__ == "__main__":
    main(Machine)
