# SPDX-License-Identifier: Apache-2.0
"""Records what programs read, as accesses to the extents of an image that holds their files.

strace shows the files that a program opens for reading, and reads of a part (pread). A file that is
opened counts as read from beginning to end, in order, as compilers, interpreters and loaders of
shared libraries do; of a file that is read in parts, the parts count. Each such access goes once to
every extent that it touches. The image is laid out as mkfs does: files in the order of a directory
walk, each from a page boundary on.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from backend import BenchError

__all__ = ["Layout", "Read", "record"]

PAGE_BYTES: Final = 4096
EXTENT_BYTES: Final = 64 << 10
_TRACED: Final = "open,openat,execve,pread64"
_OPENED: Final = re.compile(r"(?:open|openat)\(.*?O_RDONLY[^)]*\)\s+= \d+<(?P<path>/[^>]*)>")
_EXECUTED: Final = re.compile(r'execve\("(?P<path>/[^"]+)".*\)\s+= 0')
_PART: Final = re.compile(
    r"pread64\(\d+<(?P<path>/[^>]*)>, .*, (?P<asked>\d+), (?P<offset>\d+)\)\s+= (?P<length>\d+)"
)


@dataclass(frozen=True, slots=True)
class Read:
    """A read of a file: of length bytes from offset, or of all of it (length None)."""

    path: str
    offset: int = 0
    length: int | None = None


@dataclass
class Layout:
    """Where files lie in the image: their first byte and their length, by path."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    nr_bytes: int = 0

    @classmethod
    def of(cls, roots: Iterable[Path]) -> Layout:
        """Lay out the regular files below some folders, each once."""
        layout = cls()
        for root in roots:
            for folder, folders, names in os.walk(root):
                folders.sort()
                for name in sorted(names):
                    layout.add(os.path.join(folder, name))
        return layout

    def add(self, path: str) -> None:
        """Append a file, unless it is there, not regular or empty."""
        try:
            status = os.lstat(path)
        except OSError:
            return
        if path in self.places or not stat.S_ISREG(status.st_mode) or not status.st_size:
            return
        self.places[path] = (self.nr_bytes, status.st_size)
        self.nr_bytes += -(-status.st_size // PAGE_BYTES) * PAGE_BYTES

    def extents(self, reads: Iterable[Read]) -> Iterator[int]:
        """Yield the extents that reads touch, in order; skips files that are not in the image."""
        for read in reads:
            place = self.places.get(read.path)
            if place is None:
                continue
            start, size = place
            length = size if read.length is None else min(read.length, size - read.offset)
            if length > 0:
                first = (start + read.offset) // EXTENT_BYTES
                yield from range(first, (start + read.offset + length - 1) // EXTENT_BYTES + 1)


def record(
    command: Sequence[str], *, cwd: Path | None = None, parts_of: Sequence[Path] = ()
) -> list[Read]:
    """Run a command and its children, and return what they read, in order.

    Of the files in parts_of only reads of parts count, of all others only that they were opened.
    Raises BenchError if there is no strace, or if the command fails.
    """
    if shutil.which("strace") is None:
        raise BenchError("strace is not installed: apt-get install strace")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        words = ["strace", "-f", "-qq", "-y", "-s0", "-e", f"trace={_TRACED}", "-o", str(log)]
        done = subprocess.run([*words, *command], cwd=cwd, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise BenchError(f"{command[0]} ended with status {done.returncode}")
        partial = {str(path) for path in parts_of}
        with log.open(errors="replace") as lines:
            return list(_reads(lines, partial))


def _reads(lines: Iterable[str], partial: set[str]) -> Iterator[Read]:
    unfinished: dict[str, str] = {}
    for line in lines:
        pid, _, call = line.partition(" ")
        if call.rstrip().endswith("<unfinished ...>"):
            unfinished[pid] = call.rpartition(" <unfinished")[0]
            continue
        if "resumed>" in call:
            call = unfinished.pop(pid, "") + call.partition("resumed>")[2]
        part = _PART.search(call)
        whole = _OPENED.search(call) or _EXECUTED.search(call)
        if part and part["path"] in partial:
            yield Read(part["path"], int(part["offset"]), int(part["length"]))
        elif whole and whole["path"] not in partial:
            yield Read(os.path.realpath(whole["path"]))
