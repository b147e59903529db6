# SPDX-License-Identifier: Apache-2.0
"""A machine monitor that reads, writes and gives back memory by bytes, as scripted_guest.py does.

    chaos_machine.py SOCKET_PATH

Ends with status 3 once the backend has closed the connection: its faults are no longer answered,
so an order in progress would wait for ever.
"""

import ctypes
import os
import select
import threading

from machine_client import MADV_DONTNEED, PAGE_BYTES, Machine, libc, read_memory, write_memory
from orders import main

HUNG_UP = 3
FIRECRACKER = -1
ZEROCOPY = 0
NYDUS_COPY = 1


class ChaosMachine(Machine):
    """The orders; one region, which is the whole image."""

    closing = False

    def do_begin(self, image: str, size: int, policy: int) -> None:
        """Map memory and hand it over: as Firecracker does, or as Nydus' client with a policy."""
        self.do_map([size])
        if policy == FIRECRACKER:
            self.do_restore(image)
        else:
            self.do_nydus(image, policy)
        if policy != ZEROCOPY:
            threading.Thread(target=self.watch, daemon=True).start()

    def map_ranges(self) -> None:
        super().map_ranges()
        self.hung_up()

    def watch(self) -> None:
        """Wait until the backend has closed its end; it sends nothing before that."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        poll.poll()
        self.hung_up()

    def hung_up(self) -> None:
        if not self.closing:
            os._exit(HUNG_UP)

    def at(self, offset: int) -> int:
        return self.address(offset // PAGE_BYTES) + offset % PAGE_BYTES

    def do_read(self, offset: int, length: int) -> str:  # type: ignore[override]
        found = read_memory(self.at(offset), length).hex()
        if self.failures:
            raise RuntimeError(self.failures[0])
        return found

    def do_write(self, offset: int, hex: str) -> None:  # noqa: A002
        write_memory(self.at(offset), bytes.fromhex(hex))

    def do_discard(self, offset: int, length: int) -> None:
        if libc.madvise(self.at(offset), length, MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")

    def do_close(self) -> None:
        self.closing = True
        super().do_close()


if __name__ == "__main__":
    main(ChaosMachine)
