# SPDX-License-Identifier: Apache-2.0
"""Named counters in a memfd of their own, so that a successor goes on counting.

    "CWTALLY1"  number of counters, u32  0, u32  {name, 56 bytes, zero padded; count, u64} ...

A counter is one word, updated atomically, so a death cannot leave it half written.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final

from cowshed.cache import InvariantError
from cowshed.cache._core import ffi, lib
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds
from cowshed.service.runtime.logs import EventLog

__all__ = ["LOG_COUNTS", "LOG_GROUP", "KeptCounts", "keep_counts"]

_log = EventLog("cowshed.survival")

# Lost lines of the log, of backends and of keepers; both count in this group.
LOG_GROUP: Final = "log-counts"
LOG_COUNTS: Final = ("backend", "keeper")

_HEADER: Final = struct.Struct("<8sII")
_ENTRY: Final = struct.Struct("<56sQ")
_MAGIC: Final = b"CWTALLY1"
_WORD: Final = 8
_FIRST: Final = (_HEADER.size + 56) // _WORD
_STRIDE: Final = _ENTRY.size // _WORD


class KeptCounts:
    """The counters; each only grows. For any thread, and for several processes at once."""

    def __init__(self, names: Sequence[str], left_fd: int | None = None) -> None:
        """Start at 0, or go on with a memfd that another process left, taken over on success.

        InvariantError if the memfd has other counters, or another format.
        """
        wanted = _layout(names)
        if left_fd is None:
            self.fd = os.memfd_create("cowshed-tallies", os.MFD_CLOEXEC)
            os.write(self.fd, wanted)
        else:
            _check(os.pread(left_fd, len(wanted) + 1, 0), wanted)
            self.fd = left_fd
        self._places: Final = {name: _FIRST + no * _STRIDE for no, name in enumerate(names)}
        self._words = mmap.mmap(self.fd, len(wanted))
        self._view = memoryview(self._words).cast("Q")
        self._cdata = ffi.from_buffer("uint64_t[]", self._words)

    def close(self) -> None:
        """Unmap and close the memfd; other holders of it keep the counters."""
        ffi.release(self._cdata)
        self._view.release()
        self._words.close()
        os.close(self.fd)

    def add(self, name: str, nr: int = 1) -> None:
        """Add nr to a counter; KeyError for an unknown name."""
        lib.shared_count_add(self._cdata, self._places[name], nr)

    def read(self) -> dict[str, int]:
        """Return every counter by name; not a consistent snapshot."""
        return {name: self._view[place] for name, place in self._places.items()}


def keep_counts(
    group: str, names: Sequence[str], fd_store: FdStore, inherited: InheritedFds
) -> KeptCounts:
    """Go on with the counters inherited under a group's name, or start at 0; held from now on."""
    left = inherited.take(group) or {}
    try:
        if left.keys() - {"counters"}:
            raise InvariantError(f"the group has {', '.join(sorted(left))}")
        counts = KeptCounts(names, left.get("counters"))
    except InvariantError as error:
        _log.warning("counters-begin-again", f"{error}; they start at 0", group=group)
        fd_store.release(group)
        for fd in left.values():
            os.close(fd)
        counts = KeptCounts(names)
    fd_store.keep(group, [counts.fd])
    return counts


def _layout(names: Sequence[str]) -> bytes:
    raw = [name.encode() for name in names]
    assert all(0 < len(name) <= 56 for name in raw)
    entries = [_ENTRY.pack(name, 0) for name in raw]
    return b"".join([_HEADER.pack(_MAGIC, len(names), 0), *entries])


def _check(found: bytes, wanted: bytes) -> None:
    """Raise InvariantError unless found is a table of the same names, whatever its counts."""
    if len(found) != len(wanted):
        raise InvariantError(f"the inherited table has {len(found)} bytes, not {len(wanted)}")
    entries = zip(
        _ENTRY.iter_unpack(found[_HEADER.size :]),
        _ENTRY.iter_unpack(wanted[_HEADER.size :]),
        strict=True,
    )
    if found[: _HEADER.size] != wanted[: _HEADER.size] or any(
        ours[0] != theirs[0] for ours, theirs in entries
    ):
        raise InvariantError("the inherited table has other counters")
