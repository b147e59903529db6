# SPDX-License-Identifier: Apache-2.0
"""A crowd of processes that each have the whole image in memory, and wait to be measured.

    crowd.py BUILD_DIR SIDE PLACE URI NR WRITE_PAGES

SIDE "guest" opens image PLACE through the backend at URI, "plain" maps the file PLACE. Each of NR
children reads every page, writes WRITE_PAGES of them, and prints [pid, address] on stdout, a line
of JSON each. They end when stdin does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from mappings import PAGE_BYTES, GuestMapping, PlainMapping, page_order
from native import checked, ffi, load

READ, WRITE = 0, 2


def live(lib: Any, side: str, place: str, uri: str, nr_write: int) -> None:
    """Run one of the crowd: map, read everything, write some, report; wait for the end of stdin."""
    mapping = GuestMapping(uri, place) if side == "guest" else PlainMapping(place)
    nr_pages = mapping.nr_bytes // PAGE_BYTES
    cost = ffi.new("struct touch_cost *")
    for how, pages in (
        (READ, page_order(nr_pages, "sequential", 0)),
        (WRITE, page_order(nr_pages, "subset", os.getpid())[:nr_write]),
    ):
        numbers = ffi.from_buffer("uint32_t[]", pages)
        checked(
            lib.touch_pages(mapping.base, numbers, len(pages), how, mapping.nr_bytes, 0, cost),
            "touching pages",
        )
    os.write(1, (json.dumps([os.getpid(), mapping.address]) + "\n").encode())
    os.read(0, 1)
    mapping.close()


def main() -> None:
    """Fork the crowd, one child after the other, and wait for all."""
    build_dir, side, place, uri, nr, nr_write = sys.argv[1:]
    lib = load(Path(build_dir))
    pids = []
    for _ in range(int(nr)):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                live(lib, side, place, uri, int(nr_write))
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    sys.exit(f"{failed} of the crowd failed" if failed else 0)


if __name__ == "__main__":
    main()
