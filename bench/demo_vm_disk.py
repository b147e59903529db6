# SPDX-License-Identifier: Apache-2.0
"""What the files of a machine's disk should be: as they were made, and as it changed them. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Self

__all__ = ["Contents", "checksum", "parse_sums"]

# What a machine boots with; the others can be written to.
_SYSTEM: tuple[str, ...] = ("./bin/", "./init")


def parse_sums(text: str) -> dict[str, str]:
    """Read what md5sum prints: the checksums by name."""
    return {name: total for total, _, name in (line.partition("  ") for line in text.splitlines())}


def checksum(sums: Mapping[str, str]) -> str:
    """Give one checksum of all files, names included; short enough to compare by eye."""
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return hashlib.md5(text.encode()).hexdigest()[:12]


@dataclass
class Contents:
    """The files of a disk: checksums and sizes by name."""

    sums: dict[str, str]
    sizes: dict[str, int]

    @property
    def nr_bytes(self) -> int:
        """All files together."""
        return sum(self.sizes.values())

    def copy(self) -> Self:
        """Give another of the same contents."""
        return type(self)(dict(self.sums), dict(self.sizes))

    def ordinary_names(self) -> list[str]:
        """Name the files that no machine needs to boot."""
        return [name for name in sorted(self.sums) if not name.startswith(_SYSTEM)]

    def write(self, name: str, line: bytes, nr_bytes: int | None = None) -> None:
        """A file is now so many bytes of this line again and again; one line if not said."""
        nr_bytes = len(line) if nr_bytes is None else nr_bytes
        content = bytes(islice(chain.from_iterable(cycle([line])), nr_bytes))
        self.sums[name] = hashlib.md5(content).hexdigest()
        self.sizes[name] = nr_bytes

    def remove(self, name: str) -> None:
        """A file is no more."""
        del self.sums[name], self.sizes[name]

    def compare(self, found: Mapping[str, str]) -> tuple[int, list[str]]:
        """Hold checksums against these: how many bytes are wrong, and in which files.

        Of a file whose checksum is another, or that is missing, all bytes count as wrong; of one
        that should not be there, one.
        """
        names = [
            name for name in sorted({*self.sums, *found}) if self.sums.get(name) != found.get(name)
        ]
        return sum(max(1, self.sizes.get(name, 0)) for name in names), names
