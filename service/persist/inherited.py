# SPDX-License-Identifier: Apache-2.0
"""Groups of descriptors inherited from the last backend, and the records that describe them.

A group has what a successor needs to go on with one image, mapping, overlay or listening socket.
One of its descriptors is a record: a memfd with a JSON object. It is complete before the group is
held, and later only one byte is appended, so a death never leaves a partial one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from cowshed.cache.errors import InvariantError
from cowshed.service.persist.fd_store import kind_of
from cowshed.service.persist.notice import Groups

__all__ = ["InheritedFds", "Kinds", "record_close", "record_is_open", "record_make", "record_read"]

_MAX_RECORD_BYTES: Final = 1 << 20

# White space, to JSON.
_END: Final = b"\n"

Kinds = dict[str, int]


def record_make(fields: Mapping[str, Any]) -> int:
    """Return a memfd that has the fields, which the caller owns."""
    fd = os.memfd_create("cowshed-record", os.MFD_CLOEXEC)
    os.write(fd, json.dumps(fields).encode())
    return fd


def record_read(fd: int) -> dict[str, Any]:
    """Read a record; InvariantError for anything else, since only backends write them."""
    raw = os.pread(fd, min(os.fstat(fd).st_size, _MAX_RECORD_BYTES), 0)
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise InvariantError(f"a record of {len(raw)} bytes is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvariantError(f"a record is a JSON {type(fields).__name__}, not an object")
    return fields


def record_close(fd: int) -> None:
    """Mark the operation that the record describes as done."""
    os.pwrite(fd, _END, os.fstat(fd).st_size)


def record_is_open(fd: int) -> bool:
    """Whether record_close() was not called for it yet."""
    return os.pread(fd, 1, max(0, os.fstat(fd).st_size - 1)) != _END


class InheritedFds:
    """Descriptors by group and kind; close() closes those that were not taken.

    A group with two descriptors of a kind, or one of unknown kind, is foreign: it is closed.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups: dict[str, Kinds] = {}
        for name, fds in groups.items():
            kinds = {kind_of(fd): fd for fd in fds}
            if len(kinds) == len(fds) and "" not in kinds:
                self._groups[name] = kinds
            else:
                _close_all(fds)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._groups))

    def take(self, name: str) -> Kinds | None:
        """Return a group's descriptors by kind, now the caller's; None if there is no group."""
        return self._groups.pop(name, None)

    def take_all(self, prefix: str) -> Iterator[tuple[str, Kinds]]:
        """Yield the name of every group with that prefix, with its descriptors as in take()."""
        for name in self:
            if name.startswith(prefix):
                yield name, self._groups.pop(name)

    def close(self) -> None:
        """Close the groups that were not taken."""
        for kinds in self._groups.values():
            _close_all(kinds.values())
        self._groups.clear()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
