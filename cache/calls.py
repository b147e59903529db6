# SPDX-License-Identifier: Apache-2.0
"""What a C call returned, as an exception or a value."""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from cowshed.cache._core import ffi
from cowshed.cache.errors import CapacityError, InvariantError, SourceError, UsageError

# Stands in for a handle that was closed. The C core refuses it with a TypeError: it is no pointer.
CLOSED: Final[Any] = None

_KINDS: dict[int, type[Exception]] = {
    errno.EINVAL: UsageError,
    errno.ERANGE: UsageError,
    errno.EBUSY: UsageError,
    errno.ENOENT: UsageError,
    errno.ENOSPC: CapacityError,
    errno.ENOMEM: CapacityError,
    errno.EMFILE: CapacityError,
    errno.ENFILE: CapacityError,
    errno.EAGAIN: CapacityError,
    errno.EFAULT: InvariantError,
}


def checked(result: int, what: str) -> int:
    """Return result if it is not negative; else raise what -errno stands for.

    what says, in words, what was being done and to what; the reason is appended, and the OSError
    that it is of is the exception's cause.
    """
    if result >= 0:
        return result
    kind = _KINDS.get(-result, SourceError)
    raise kind(f"{what}: {os.strerror(-result)}") from OSError(-result, os.strerror(-result))


def check_core(broken: Any) -> None:
    """Raise InvariantError if a check of the core says what does not hold."""
    if broken != ffi.NULL:
        raise InvariantError(ffi.string(broken).decode())
