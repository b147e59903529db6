# SPDX-License-Identifier: Apache-2.0
"""A guest process under a test's control: one JSON order a line in, one JSON answer a line out.

    scripted_guest.py URI [UID]

With UID it becomes that user first. Orders are the methods of Script below whose names begin with
do_; an answer is {"ok": value} or {"error": type, "message": text}. Faults happen here and never in
the test's own process, which may have to answer them.
"""

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from orders import PAGE_BYTES, main

from cowshed.transport import Disk, connect


class Script:
    """The orders, and the one disk that they use."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.disk: Disk | None = None

    def opened(self) -> Disk:
        assert self.disk is not None
        return self.disk

    def do_open(self, image: str, **terms: Any) -> int:
        """Open the image; return its size."""
        with connect(self.uri) as backend:
            self.disk = backend.open(image, **terms)
        return self.disk.size_bytes

    def do_close(self) -> None:
        self.opened().close()
        self.disk = None

    def do_read(self, offset: int, length: int) -> str:
        """Read a range; return it as hex."""
        return self.opened().read(offset, length).hex()

    def do_hash(self, offset: int, length: int) -> str:
        """Read a range; return its SHA-256."""
        return hashlib.sha256(self.opened().read(offset, length)).hexdigest()

    def do_compare(self, path: str, offset: int, length: int, step: int = 1 << 20) -> int:
        """Count the bytes that differ from a file's, over a range."""
        wrong = 0
        with Path(path).open("rb") as file:
            for at in range(offset, offset + length, step):
                nr = min(step, offset + length - at)
                file.seek(at)
                wanted = file.read(nr)
                found = self.opened().read(at, nr)
                if wanted != found:
                    wrong += sum(a != b for a, b in zip(wanted, found, strict=True))
        return wrong

    def do_write(self, offset: int, hex: str) -> int:  # noqa: A002
        return self.opened().write(offset, bytes.fromhex(hex))

    def do_fill(self, offset: int, length: int, byte: int) -> int:
        """Write one byte value over a range."""
        return self.opened().write(offset, bytes([byte]) * length)

    def do_discard(self, offset: int, length: int) -> None:
        self.opened().discard(offset, length)

    def do_touch(self, pages: list[int]) -> list[int]:
        """Read the first byte of each page through the mapping itself, as programs do."""
        view = self.opened().view
        return [view[page * PAGE_BYTES] for page in pages]

    def do_poke(self, pages: list[int], byte: int) -> None:
        """Write the first byte of each page through the mapping itself."""
        view = self.opened().view
        for page in pages:
            view[page * PAGE_BYTES] = byte

    def do_request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send an operators' request."""
        with connect(self.uri) as backend:
            return backend.request(op, **fields)

    def do_execute_another(self) -> None:
        """Execute another program, which keeps the disk's connection open."""
        os.set_inheritable(self.opened()._connection.fileno(), True)
        os.execvp("sleep", ["sleep", "600"])

    def do_lend_connection(self) -> int:
        """Start another process that keeps the disk's connection open too; return its pid."""
        fd = self.opened()._connection.fileno()
        return subprocess.Popen(["sleep", "600"], pass_fds=[fd]).pid

    def do_give_up_after(self, seconds: float) -> None:
        """Set the timeout of later calls of a disk over a network."""
        self.opened()._timeout = seconds

    def do_pid(self) -> int:
        return os.getpid()


if __name__ == "__main__":
    main(Script)
