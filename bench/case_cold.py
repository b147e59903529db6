# SPDX-License-Identifier: Apache-2.0
"""An image that is not in memory, read front to back, against pread of the same file.

The image is served twice: with extents of the default size, and with extents of 2 MiB, whose frames
have huge pages. Both sides start cold each time: the image is evicted, the file is dropped from the
page cache (by posix_fadvise on that file, so that other files stay cached; by drop_caches if pages
remain and the run is root's).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from backend import BenchError
from cases import Bench, CaseResult, Row, Side, explain
from stats import Aim, compare

__all__ = ["COLD_HUGE", "cold"]

# The name of the image with extents of 2 MiB.
COLD_HUGE = "cold-2M"

COLD_AIM = Aim(0.95, at_least=True)
DIRECT_AIM = Aim(1.2, at_least=True)
KIB = 1 << 10
PREADS = {
    "pread 128K": (128 * KIB, False),
    "pread 1M": (1024 * KIB, False),
    "pread 128K direct": (128 * KIB, True),
    "pread 1M direct": (1024 * KIB, True),
}


def cold(bench: Bench) -> CaseResult:
    """Read an evicted image as a guest in three ways; read and map its uncached file."""
    size = f"whole image of {bench.cold.stat().st_size >> 20} MiB"
    return CaseResult(
        "cold image read front to back, bandwidth, against pread of the same file",
        [_row(bench, "cold", size), _row(bench, COLD_HUGE, f"{size}, 2M extents")],
        [
            "the daemon reads its source O_DIRECT; pread is buffered unless it says direct",
            "copy and pread move every byte into a buffer; touch reads one byte of each page",
            "a virtual disk may be cached by its host: for all sides alike",
        ],
    )


def _row(bench: Bench, image: str, name: str) -> Row:
    size_bytes = bench.cold.stat().st_size
    sides = {
        "guest copy": _side(bench, "touch", size_bytes, image, side="guest", how="copy"),
        "guest touch": _side(bench, "touch", size_bytes, image, side="guest", how="read"),
        "guest read()": _side(
            bench, "library", size_bytes, image, place=image, chunk_bytes=1024 * KIB
        ),
        "mmap copy": _side(bench, "touch", size_bytes, side="plain", how="copy"),
    }
    path = str(bench.cold)
    for pread, (chunk_bytes, direct) in PREADS.items():
        if not direct or _has_direct(bench.cold):
            sides[pread] = _side(
                bench, "file", size_bytes, path=path, chunk_bytes=chunk_bytes, direct=direct
            )
    row = Row.measure(bench, name, "MiB/s", sides, [])
    row.ratios = [
        compare(row.samples, "guest copy", pread, _aim(pread))
        for pread in sides
        if pread.startswith("pread")
    ]
    row.ratios += [
        compare(row.samples, guest, "pread 1M") for guest in ("guest touch", "guest read()")
    ]
    row.ratios.append(compare(row.samples, "guest copy", "mmap copy"))
    return row


def _aim(pread: str) -> Aim | None:
    if "direct" not in pread:
        return COLD_AIM
    return DIRECT_AIM if pread == "pread 1M direct" else None


def _has_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _make_cold(bench: Bench) -> None:
    for image in ("cold", COLD_HUGE):
        bench.served.evict(image)
    path = str(bench.cold)
    if bench.worker.call("uncache", path=path) and os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    left = bench.worker.call("uncache", path=path)
    if left:
        raise BenchError(f"{left} pages of {path} stay in the page cache: is it mapped elsewhere?")


def _side(bench: Bench, do: str, size_bytes: int, image: str = "", **fields: Any) -> Side:
    if do == "touch":
        place = image or str(bench.cold)
        fields |= {"order": "sequential", "place": place}

    def measure() -> tuple[float, dict[str, float]]:
        _make_cold(bench)
        answer = bench.worker.call(do, **fields)
        seconds = answer["cost"]["wall_ns"] / 1e9
        return size_bytes / (1 << 20) / seconds, explain(answer, size_bytes // 4096)

    return measure
