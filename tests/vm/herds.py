# SPDX-License-Identifier: Apache-2.0
"""Machines whose disk is an image of a daemon's: started by `cowshed attach`, and looked at."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from machines import Kit, Machine, pmem

__all__ = ["Herd", "attach_words", "image_memory", "process_memory"]


class Herd:
    """Machines of one daemon, by their guests' names; ended with the block."""

    def __init__(self, kit: Kit, run_dir: Path) -> None:
        self._kit = kit
        self._run_dir = run_dir
        self.machines: Final[dict[str, Machine]] = {}

    def __enter__(self) -> Herd:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines.values():
            machine.close()

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def start(
        self, name: str, image: str, size_bytes: int, kind: str = "ext4", quota: str = "none"
    ) -> Machine:
        """Start a machine that has image as its root, and as its guest's name, name."""
        before = attach_words(self._run_dir, image, name, quota)
        machine = Machine(self._kit, pmem("{image}", size_bytes), before=before, root=kind)
        self.machines[name] = machine
        return machine

    def wait_ready(self, names: Sequence[str]) -> None:
        """Wait until these have booted."""
        for name in names:
            self.machines[name].wait_ready()


def attach_words(run_dir: Path, image: str, name: str, quota: str = "none") -> list[str]:
    """Give the command that runs another as a guest of that name."""
    words = [sys.executable, "-m", "cowshed.service.cli", "attach", image]
    return [*words, "--run-dir", str(run_dir), "--guest", name, "--quota", quota, "--"]


def image_memory(pid: int, path: Path, keys: Sequence[str] = ("Pss",)) -> int:
    """Give the bytes that a process's mappings of a file, or of a backend's image, take of memory.

    Added up over keys of /proc/PID/smaps (proc(5)). A frame that n processes map counts 1/n in Pss.
    """
    total_kib = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            inside = bool(rest[4:]) and (
                rest[4] == str(path) or rest[4].startswith("/memfd:cowshed")
            )
        elif inside and head.rstrip(":") in keys:
            total_kib += int(rest[0])
    return total_kib << 10


def process_memory(pid: int) -> int:
    """Give a process's PSS in bytes: its own memory, and its share of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("smaps_rollup has no Pss")
