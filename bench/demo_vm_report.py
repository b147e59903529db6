# SPDX-License-Identifier: Apache-2.0
"""The machines' use of host memory, as a table and bars for a terminal of 80 columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.runtime.text import format_count

__all__ = ["Memory", "VmMeasured", "vm_report"]

_BAR_CHARACTERS: Final = 44


@dataclass(frozen=True)
class Memory:
    """The memory of a crowd of machines, by PSS (proc(5)).

    disk_bytes are the mappings of their disks, private_bytes the written part of them;
    machines_bytes is all else of QEMU, guests' own memory included; backend_bytes the backend, and
    frames of the disk that no machine maps.
    """

    disk_bytes: int
    private_bytes: int
    machines_bytes: int
    backend_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.disk_bytes + self.machines_bytes + self.backend_bytes


@dataclass(frozen=True)
class VmMeasured:
    """The figures, taken while all machines run."""

    nr_machines: int
    disk_bytes: int
    shared: Memory
    copies: Memory
    audit: dict[str, Any]
    status: dict[str, Any]
    compared_bytes: int
    wrong_bytes: int


def vm_report(measured: VmMeasured) -> Group:
    """Return a table of the figures."""
    shared, copies = measured.shared, measured.copies
    memory = Table(title=None)
    memory.add_column("memory of the host (PSS)", no_wrap=True)
    memory.add_column("one disk, shared", justify="right")
    memory.add_column(f"{measured.nr_machines} copies", justify="right")
    for what, of_shared, of_copies in (
        ("the disk, in memory", shared.disk_bytes, copies.disk_bytes),
        ("  of it written by machines", shared.private_bytes, copies.private_bytes),
        ("QEMU and the guests' own memory", shared.machines_bytes, copies.machines_bytes),
        ("the backend", shared.backend_bytes, copies.backend_bytes),
    ):
        memory.add_row(what, format_bytes(of_shared), format_bytes(of_copies))
    memory.add_section()
    memory.add_row("together", format_bytes(shared.total_bytes), format_bytes(copies.total_bytes))

    most = max(shared.disk_bytes, copies.disk_bytes, 1)
    bars = Text()
    for label, taken in (("shared", shared.disk_bytes), ("copies", copies.disk_bytes)):
        bar = "█" * max(1, round(taken / most * _BAR_CHARACTERS))
        bars.append(f"  the disk, {label}  ").append(bar, "green" if label == "shared" else "red")
        bars.append(f" {format_bytes(taken)}\n")

    checks = Table(show_header=False)
    checks.add_column(no_wrap=True)
    checks.add_column(justify="right", no_wrap=True)
    checks.add_column()
    status, audit = measured.status, measured.audit
    checks.add_row(
        "loads", format_count(status["loads"]), f"{format_bytes(status['load_bytes'])} read"
    )
    checks.add_row("evictions", format_count(status["evicted_extents"]), "extents, under machines")
    checks.add_row(
        "mismatches",
        format_count(len(audit["mismatches"])),
        f"found by audit in {format_count(audit['checked']['refs'])} grants",
    )
    checks.add_row(
        "wrong bytes",
        format_count(measured.wrong_bytes),
        f"in {format_bytes(measured.compared_bytes)} of files checked",
    )
    return Group(memory, bars, checks)
