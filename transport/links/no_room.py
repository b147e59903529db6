# SPDX-License-Identifier: Apache-2.0
"""Messages that refuse a guest for lack of resources, with the cure: the same at every server."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from typing import Final

from cowshed.cache.errors import CapacityError

__all__ = ["no_room", "start_thread", "taking_in"]

_OF_THE_KERNEL: Final = (
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN),
    *(errno.ENOMEM, errno.ENOBUFS),
)


def no_room(why: str | int, what: str = "guest") -> str:
    """Return the message that there is no room, and why: a text, or an errno of this process."""
    return f"no room for another {what}: {why if isinstance(why, str) else _words(why)}"


@contextlib.contextmanager
def taking_in() -> Iterator[None]:
    """Turn the kernel's lack of descriptors, threads or memory inside `with` into CapacityError.

    Other errors pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_KERNEL:
            raise
        raise CapacityError(no_room(error.errno)) from error
    except CapacityError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _OF_THE_KERNEL:
            raise
        raise CapacityError(no_room(cause.errno)) from error


def _words(number: int) -> str:
    match number:
        case errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return (
                f"the backend has as many descriptors open as it may ({limit}); close some guests, "
                "or raise its limit of open files (LimitNOFILE=, ulimit -n)"
            )
        case errno.ENFILE:
            return "its host has no descriptors left; raise fs.file-max there"
        case errno.EAGAIN:
            return (
                "the backend may start no more threads; close some guests, or raise its limit "
                "(TasksMax=, ulimit -u, kernel.threads-max)"
            )
        case errno.ENOMEM | errno.ENOBUFS:
            return "the backend's host is short of memory; free some there"
        case _:
            return os.strerror(number)


def start_thread(thread: threading.Thread) -> None:
    """Start a thread; CapacityError, with nothing started, at the limit of threads."""
    try:
        thread.start()
    except RuntimeError as error:
        raise CapacityError(no_room(errno.EAGAIN)) from error
