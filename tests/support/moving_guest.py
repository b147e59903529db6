# SPDX-License-Identifier: Apache-2.0
"""A scripted guest with views of its disk, and threads that write while it moves."""

import ctypes
import hashlib
import threading
from typing import Any

from orders import PAGE_BYTES, main
from scripted_guest import Script


class MovingScript(Script):
    """Orders for what goes on during a move."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.views: list[memoryview] = []
        self.threads: list[threading.Thread] = []
        self.nr_written = 0
        self.errors: list[str] = []

    def do_hold_view(self) -> int:
        """Keep a view; return its address."""
        view = self.opened().view
        self.views.append(view)
        return ctypes.addressof(ctypes.c_char.from_buffer(view))

    def do_view_hash(self) -> str:
        return hashlib.sha256(self.views[0]).hexdigest()

    def do_release_view(self) -> None:
        while self.views:
            self.views.pop().release()

    def do_where(self) -> list[Any]:
        disk = self.opened()
        return [disk.origin, disk.mapped, disk.moving]

    def do_write_on(self, pages: list[int], nr: int, byte: int) -> None:
        """Start a thread for each page that writes nr times to it, byte + 1 the first time."""

        def write(page: int) -> None:
            try:
                for no in range(1, nr + 1):
                    value = bytes([(byte + no) % 256]) * PAGE_BYTES
                    self.opened().write(page * PAGE_BYTES, value)
                    self.nr_written += 1
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")

        for page in pages:
            self.threads.append(threading.Thread(target=write, args=(page,)))
            self.threads[-1].start()

    def do_nr_written(self) -> int:
        return self.nr_written

    def do_join(self) -> list[str]:
        """Wait for the threads; return their errors."""
        for thread in self.threads:
            thread.join()
        self.threads.clear()
        return self.errors

    def do_idle(self) -> bool:
        """Return whether the threads have ended."""
        return not any(thread.is_alive() for thread in self.threads)


if __name__ == "__main__":
    main(MovingScript)
