# SPDX-License-Identifier: Apache-2.0
"""The expected files of a machine's disk: as they were made, and as it changed them. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Self

__all__ = ["Contents", "checksum", "parse_sums"]

# Files that a machine boots with; the others can be written.
_SYSTEM: tuple[str, ...] = ("./bin/", "./init")


def parse_sums(text: str) -> dict[str, str]:
    """Return the checksums by name from md5sum's output."""
    return {name: total for total, _, name in (line.partition("  ") for line in text.splitlines())}


def checksum(sums: Mapping[str, str]) -> str:
    """Return one checksum of all files, names included; short enough to compare by eye."""
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return hashlib.md5(text.encode()).hexdigest()[:12]


@dataclass
class Contents:
    """The files of a disk: checksums and sizes by name."""

    sums: dict[str, str]
    sizes: dict[str, int]

    @property
    def nr_bytes(self) -> int:
        """The size of all files together."""
        return sum(self.sizes.values())

    def copy(self) -> Self:
        """Return a copy."""
        return type(self)(dict(self.sums), dict(self.sizes))

    def ordinary_names(self) -> list[str]:
        """Return the names of files that no machine needs to boot."""
        return [name for name in sorted(self.sums) if not name.startswith(_SYSTEM)]

    def write(self, name: str, line: bytes, nr_bytes: int | None = None) -> None:
        """Record that a file now has nr_bytes of this line repeated; by default one line."""
        nr_bytes = len(line) if nr_bytes is None else nr_bytes
        content = bytes(islice(chain.from_iterable(cycle([line])), nr_bytes))
        self.sums[name] = hashlib.md5(content).hexdigest()
        self.sizes[name] = nr_bytes

    def remove(self, name: str) -> None:
        """Record that a file was removed."""
        del self.sums[name], self.sizes[name]

    def compare(self, found: Mapping[str, str]) -> tuple[int, list[str]]:
        """Compare checksums with these; return the number of wrong bytes, and the wrong files.

        All bytes of a file with another checksum, or of a missing one, count as wrong; an extra
        file counts as one.
        """
        names = [
            name for name in sorted({*self.sums, *found}) if self.sums.get(name) != found.get(name)
        ]
        return sum(max(1, self.sizes.get(name, 0)) for name in names), names
