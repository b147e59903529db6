# SPDX-License-Identifier: Apache-2.0
"""A program without cowshed's library: maps a file, and reads and writes its private mapping.

    attached_guest.py IMAGE

One JSON order a line in, one JSON answer a line out; orders as those of scripted_guest.py.
"""

import json
import mmap
import os
import sys


class Script:
    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def do_read(self, offset: int, length: int) -> str:
        return self.mapped[offset : offset + length].hex()

    def do_write(self, offset: int, hex: str) -> None:  # noqa: A002
        given = bytes.fromhex(hex)
        self.mapped[offset : offset + len(given)] = given

    def do_discard(self, offset: int, length: int) -> None:
        self.mapped.madvise(mmap.MADV_DONTNEED, offset, length)

    def do_child_read(self, offset: int, length: int) -> str:
        """Return what a forked child reads there."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            view = memoryview(self.mapped[offset : offset + length])
            while view:
                view = view[os.write(writer, view) :]
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            found = pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        return found.hex()


def main() -> None:
    script = Script(sys.argv[1])
    print(json.dumps({"ok": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"ok": getattr(script, "do_" + order.pop("do"))(**order)}
        except OSError as error:
            answer = {"error": "OSError", "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
