# SPDX-License-Identifier: Apache-2.0
"""Turn the results of C calls into values or exceptions."""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from cowshed.cache._core import ffi
from cowshed.cache.errors import CapacityError, InvariantError, SourceError, UsageError

# Stands in for a closed handle. cffi refuses it with a TypeError, since it is no pointer.
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
    """Return result if it is not negative; else raise the exception for its -errno.

    what names the operation and its object; the message adds the errno's text. The exception's
    cause is an OSError.
    """
    if result >= 0:
        return result
    kind = _KINDS.get(-result, SourceError)
    raise kind(f"{what}: {os.strerror(-result)}") from OSError(-result, os.strerror(-result))


def check_core(broken: Any) -> None:
    """Raise InvariantError if a check of the core returned a broken invariant."""
    if broken != ffi.NULL:
        raise InvariantError(ffi.string(broken).decode())
