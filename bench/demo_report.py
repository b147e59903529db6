# SPDX-License-Identifier: Apache-2.0
"""The demo's figures, as one table that fits a terminal of 80 columns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.runtime.text import format_count, format_share, format_us

__all__ = ["Measured", "pss_bytes", "report", "resident_frames_bytes"]


@dataclass(frozen=True)
class Measured:
    """The figures, taken while all guests are attached and idle."""

    status: dict[str, Any]
    audit: dict[str, Any]
    peak_resident_bytes: int
    peak_saved_bytes: int
    pss_bytes: int
    frames_bytes: int
    compared_bytes: int
    wrong_bytes: int

    @property
    def private_bytes(self) -> int:
        """Private pages of all guests."""
        return sum(int(guest["private_bytes"]) for guest in self.status["guests"])


def pss_bytes(pids: list[int]) -> int:
    """Add up the PSS of these processes' mappings of the image.

    A frame that n processes map counts 1/n for each (proc(5), smaps).
    """
    total_kib = 0
    for pid in pids:
        in_image = False
        with Path(f"/proc/{pid}/smaps").open() as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if "-" in key:
                    in_image = "/memfd:" in line
                elif in_image and key == "Pss":
                    total_kib += int(value.split()[0])
    return total_kib << 10


def resident_frames_bytes(pid: int, size_bytes: int) -> int:
    """Return the memory of the backend's memfd of an image (st_blocks, memfd_create(2))."""
    folder = Path(f"/proc/{pid}/fd")
    held = {}
    for name in os.listdir(folder):
        try:
            if "/memfd:" in os.readlink(folder / name):
                status = os.stat(folder / name)
                if status.st_size >= size_bytes:
                    held[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(held.values())


def report(measured: Measured) -> Table:
    """Return a table of the figures, each with an explanation."""
    status = measured.status
    (image,) = status["images"]
    nr_guests = len(status["guests"])
    now_bytes = status["resident_bytes"] + measured.private_bytes
    latency = status["latency_us"]
    checked = measured.audit["checked"]

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_row(
        "fault hits",
        format_share(status["hits"], status["hits"] + status["misses"]),
        "faults whose page was resident already; pages that are mapped do not fault",
    )
    table.add_row(
        "resident",
        format_bytes(status["resident_bytes"]),
        f"the one copy; peak {format_bytes(measured.peak_resident_bytes)}, "
        f"{format_bytes(status['capacity_bytes'])} allowed",
    )
    table.add_row(
        "shared",
        format_bytes(status["saved_bytes"]),
        "granted beyond the first copy, without more memory; "
        f"peak {format_bytes(measured.peak_saved_bytes)}",
    )
    table.add_row(
        "private",
        format_bytes(measured.private_bytes),
        "copies of the pages that guests wrote",
    )
    table.add_section()
    table.add_row("memory used", format_bytes(now_bytes), "resident and private together")
    table.add_row(
        f"{nr_guests} copies",
        format_bytes(nr_guests * image["size_bytes"]),
        "if each guest had its own copy of the image",
    )
    table.add_row(
        "kernel's count",
        format_bytes(measured.pss_bytes),
        "PSS of the guests' mappings; the resident pages alone "
        f"take {format_bytes(measured.frames_bytes)} (st_blocks)",
    )
    table.add_section()
    table.add_row("faults", "count", "p50 / p90 / p99 in the backend")
    for kind, meaning in (
        ("hit", "the page was in memory"),
        ("miss", "the page had to be loaded"),
        ("write", "the page was copied"),
    ):
        figures = " / ".join(format_us(latency[kind][name]) for name in ("p50", "p90", "p99"))
        count = format_count(latency[kind]["count"])
        table.add_row(f"  {kind}", count, f"{figures}: {meaning}")
    table.add_row(
        "loads", format_count(status["loads"]), f"of {format_bytes(image['extent_bytes'])} each"
    )
    table.add_row(
        "evictions",
        format_count(status["evicted_extents"]),
        f"{format_count(status['evictions']['pressure'])} to make room, "
        f"{format_count(status['evictions']['request'])} on request",
    )
    table.add_section()
    table.add_row(
        "mismatches",
        format_count(len(measured.audit["mismatches"])),
        f"found by audit in {format_count(checked['refs'])} grants, "
        f"{format_count(checked['private_pages'])} private pages, "
        f"{format_count(checked['resident_extents'])} resident extents",
    )
    table.add_row(
        "wrong bytes",
        format_count(measured.wrong_bytes),
        f"in {format_bytes(measured.compared_bytes)} compared",
    )
    return table
