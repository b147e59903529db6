# SPDX-License-Identifier: Apache-2.0
"""The memory of N guests that have read the whole image, against one copy of it.

Shared frames are counted by PSS: each process that maps a frame is charged an equal share of it, so
the sum over all guests counts each frame once. Frames that no guest maps are added from the
daemon's own figure, which an audit compares with the memfd's st_blocks. The peer is the same crowd
of processes with a plain mmap of the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backend import BENCH, BenchError
from cases import Bench, CaseResult, Row
from mappings import smaps_of
from stats import Aim, compare

__all__ = ["memory"]

MEMORY_AIM = Aim(1.01)
CROWDS = (1, 4, 16, 64)
WRITE_PAGES = 64
MIB = 1 << 20


def memory(bench: Bench) -> CaseResult:
    """Measure crowds of guests and crowds of plain mappings through /proc."""
    bench.served.request("warm", image="warm")
    image_bytes = bench.warm.stat().st_size
    crowds = (1, 4) if bench.quick else CROWDS
    daemon_bytes = rollup(bench.served.pid)["Pss"]
    before = _own(bench.served.pid)
    rows = []
    curves: dict[str, list[float]] = {"guests": [], "plain mmap": []}
    for nr in crowds:
        bench.say(f"{nr} guests")
        with _crowd(bench, "guest", "warm", nr) as people:
            guests = _weigh(people)
            backend = _own(bench.served.pid) - before
            resident = bench.served.image_status("warm")["resident_bytes"]
        with _crowd(bench, "plain", str(bench.warm), nr) as people:
            plain = _weigh(people)
        private = guests["private"]
        unmapped = max(0.0, resident - (guests["image"] - private))
        frames = guests["image"] + unmapped
        whole = frames + backend + max(0.0, guests["other"] - plain["other"])
        samples = {
            "guests": [frames / MIB],
            "one copy + private": [(image_bytes + private) / MIB],
            "guests and what they add": [whole / MIB],
            "with page tables": [(whole + guests["tables"]) / MIB],
            "plain mmap": [plain["image"] / MIB],
            "plain mmap with page tables": [(plain["image"] + plain["tables"]) / MIB],
        }
        to = "one copy + private"
        ratios = [
            compare(samples, "guests", to, MEMORY_AIM),
            compare(samples, "guests and what they add", to),
            compare(samples, "with page tables", "plain mmap with page tables"),
        ]
        where = {
            "guests": {
                "mib_private": private / MIB,
                "mib_mapped_per_guest": guests["mapped"] / MIB / nr,
                "mib_resident_not_mapped": unmapped / MIB,
                "kib_backend_grew_per_guest": backend / 1024 / nr,
                "kib_other_per_guest": guests["other"] / 1024 / nr,
                "kib_page_tables_per_guest": guests["tables"] / 1024 / nr,
            },
            "plain mmap": {
                "mib_private": plain["private"] / MIB,
                "mib_mapped_per_guest": plain["mapped"] / MIB / nr,
                "kib_other_per_guest": plain["other"] / 1024 / nr,
                "kib_page_tables_per_guest": plain["tables"] / 1024 / nr,
            },
        }
        rows.append(Row(f"{nr} guest{'s' * (nr > 1)}", "MiB", samples, ratios, where))
        curves["guests"].append(samples["with page tables"][0])
        curves["plain mmap"].append(samples["plain mmap with page tables"][0])
    return CaseResult(
        f"memory of N guests that read all of the image and wrote {WRITE_PAGES} pages each",
        rows,
        [
            "guests: PSS of the image's mappings, with private copies, and frames nobody maps",
            "what they add: growth of the backend, and of guests over a plain crowd's processes",
            "most of that growth is Python's: the guest library's modules and objects",
            f"the daemon itself, before any guest: {daemon_bytes / MIB:.0f} MiB, not counted",
        ],
        [(name, [float(nr) for nr in crowds], values) for name, values in curves.items()],
    )


def rollup(pid: int) -> dict[str, int]:
    """Return the byte counts of /proc/PID/smaps_rollup, and VmPTE as "Tables"."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sums = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            sums["Tables"] = int(line.split()[1]) * 1024
    return sums


def _own(pid: int) -> int:
    """Return a process's memory without files: the PSS of libraries falls as others use them."""
    sums = rollup(pid)
    return sums["Pss_Anon"] + sums["Pss_Shmem"]


def _weigh(people: list[tuple[int, int]]) -> dict[str, float]:
    """Add up, over (pid, address of the image), the memory of the image and of all else."""
    sums = dict.fromkeys(("image", "mapped", "private", "other", "tables"), 0.0)
    for pid, address in people:
        whole = rollup(pid)
        image = smaps_of(pid, address)
        sums["image"] += image["Pss"]
        sums["mapped"] += image["Rss"]
        sums["private"] += image["Anonymous"]
        sums["other"] += whole["Pss"] - image["Pss"]
        sums["tables"] += whole["Tables"]
    return sums


@contextmanager
def _crowd(bench: Bench, side: str, place: str, nr: int) -> Iterator[list[tuple[int, int]]]:
    """Run nr processes with the image in memory for the block; yield their pids and addresses."""
    arguments = [str(bench.build_dir), side, place, bench.served.uri, str(nr), str(WRITE_PAGES)]
    process = subprocess.Popen(
        [sys.executable, str(BENCH / "crowd.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        people = []
        for _ in range(nr):
            line = process.stdout.readline()
            if not line:
                raise BenchError(f"a crowd of {nr} ({side}) ended early")
            pid, address = json.loads(line)
            people.append((pid, address))
        yield people
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()
