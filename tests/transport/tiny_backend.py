# SPDX-License-Identifier: Apache-2.0
"""A backend small enough to see through: one image, pages loaded when touched; run as a script.

    tiny_backend.py PATH [no-device]

Page p of the image is filled with byte p + 1; the page BAD_PAGE cannot be loaded. It says "ready"
on stdout when it listens. Extra requests: "count" tells which faults were answered; "deaf" makes it
stop answering faults; "spam" sends three replies; "grow" a reply of the length asked for.
"""

import contextlib
import fcntl
import os
import selectors
import struct
import sys
from collections import Counter
from typing import Any

from cowshed.cache.errors import CowshedError
from cowshed.transport.links.unix import EOF, Connection, Received, listen
from cowshed.transport.messages.fields import error_reply

PAGE_BYTES = 4096
NR_PAGES = 4096
BAD_PAGE = 3000
SIZE_BYTES = NR_PAGES * PAGE_BYTES - 100
FEATURES = 1 << 5 | 1 << 10 | 1 << 0 | 1 << 12 | 1 << 3 | 1 << 6 | 1 << 2 | 1 << 14


def _ioctl(number: int, length: int, direction: int = 3) -> int:
    return direction << 30 | length << 16 | 0xAA << 8 | number


UFFDIO_WAKE = _ioctl(2, 16, 2)
UFFDIO_WRITEPROTECT = _ioctl(6, 24)
UFFDIO_CONTINUE = _ioctl(7, 32)
UFFDIO_POISON = _ioctl(8, 32)
MODE_WP = 2
PAGEFAULT, REMOVE = 0x12, 0x15
FLAG_WP, FLAG_MINOR = 2, 4


class Backend:
    def __init__(self, path: str, lend_device: bool) -> None:
        self.listener = listen(f"unix://{path}")
        self.memfd = os.memfd_create("image")
        os.fchmod(self.memfd, 0)
        os.ftruncate(self.memfd, NR_PAGES * PAGE_BYTES)
        self.lend_device = lend_device
        self.loaded: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.regions: dict[Connection, tuple[int, int]] = {}
        self.deaf = False
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def run(self) -> None:
        print("ready", flush=True)
        while True:
            for key, _ in self.selector.select():
                key.data()

    def accept(self) -> None:
        if (connection := self.listener.accept()) is not None:
            self.selector.register(connection, selectors.EVENT_READ, lambda: self.hear(connection))

    def hear(self, connection: Connection) -> None:
        try:
            messages = connection.recv_ready()
            if messages is not EOF:
                for message in messages:
                    self.answer(connection, message)
                return
        except CowshedError as error:
            print(error, file=sys.stderr, flush=True)
        self.detach(connection)
        self.selector.unregister(connection)
        connection.close()

    def detach(self, connection: Connection) -> None:
        if connection in self.regions:
            uffd, _ = self.regions.pop(connection)
            with contextlib.suppress(KeyError):
                self.selector.unregister(uffd)
            os.close(uffd)

    def answer(self, connection: Connection, message: Received) -> None:
        body, fds = message.body, []
        reply: dict[str, Any] = {"ok": True}
        match body["op"]:
            case "hello":
                reply |= {"version": 1, "features": ["map"], "pid": os.getpid()}
            case "open" if body["image"] != "tiny":
                reply = error_reply("unknown", f"no image {body['image']!r}; there is: tiny")
            case "open":
                fds.append(os.open(f"/proc/self/fd/{self.memfd}", os.O_RDONLY))
                if self.lend_device:
                    fds.append(os.open("/dev/userfaultfd", os.O_RDWR))
                reply |= {"size_bytes": SIZE_BYTES, "map_bytes": NR_PAGES * PAGE_BYTES}
                reply |= {"extent_bytes": 65536, "uffd_features": FEATURES, "digest": "tiny"}
                reply["guest"] = body.get("guest") or "pid-1-tiny"
            case "region":
                uffd = message.fds.pop(0)
                self.regions[connection] = uffd, body["address"]
                self.selector.register(
                    uffd, selectors.EVENT_READ, lambda: self.serve(uffd, body["address"])
                )
                reply |= {"guest": "g"}
            case "close":
                self.counts["close"] += 1
                self.detach(connection)
            case "count":
                reply |= {"counts": dict(self.counts), "guests": len(self.regions)}
            case "deaf":
                self.deaf = True
            case "spam":
                connection.send({"ok": True, "progress": {"done_bytes": 1}}, tag=message.tag)
                connection.send({"ok": True, "progress": {"done_bytes": 2}}, tag=message.tag)
            case "grow":
                reply |= {"text": "x" * body["length"]}
            case op:
                reply = error_reply("usage", f"no operation {op!r}")
        message.close_fds()
        connection.send(reply, fds, tag=message.tag)
        for fd in fds:
            os.close(fd)

    def serve(self, uffd: int, address: int) -> None:
        if self.deaf:
            self.selector.unregister(uffd)
            return
        for message in struct.iter_unpack("<B7xQQ8x", os.read(uffd, 32 * 16)):
            self.serve_one(uffd, address, *message)

    def serve_one(self, uffd: int, address: int, event: int, flags: int, place: int) -> None:
        if event != PAGEFAULT:
            self.counts["remove" if event == REMOVE else "other"] += 1
            return
        place -= place % PAGE_BYTES
        page_no = (place - address) // PAGE_BYTES
        if flags & FLAG_WP:
            self.counts["write"] += 1
            fcntl.ioctl(uffd, UFFDIO_WRITEPROTECT, struct.pack("3Q", place, PAGE_BYTES, 0))
            return
        self.counts["minor" if flags & FLAG_MINOR else "missing"] += 1
        order = struct.pack("4Q", place, PAGE_BYTES, MODE_WP, 0)
        if page_no == BAD_PAGE:
            fcntl.ioctl(uffd, UFFDIO_POISON, struct.pack("4Q", place, PAGE_BYTES, 0, 0))
            return
        if page_no not in self.loaded:
            self.loaded.add(page_no)
            content = bytes([(page_no + 1) % 256]) * PAGE_BYTES
            os.pwrite(self.memfd, content, page_no * PAGE_BYTES)
        fcntl.ioctl(uffd, UFFDIO_CONTINUE, order)


if __name__ == "__main__":
    Backend(sys.argv[1], "no-device" not in sys.argv).run()
