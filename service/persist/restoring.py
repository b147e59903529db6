# SPDX-License-Identifier: Apache-2.0
"""How groups of descriptors become what they were: the one way for mappings, machines, overlays."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Set
from typing import TypeVar

from cowshed.cache.errors import InvariantError
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds, Kinds
from cowshed.service.runtime.logs import EventLog

__all__ = ["has_kinds", "let_go", "new_group", "restore_groups"]

_log = EventLog("cowshed.persist")

T = TypeVar("T")


def new_group(prefix: str) -> str:
    """Name a group; the prefix says of what."""
    return f"{prefix}{secrets.token_hex(8)}"


def has_kinds(fds: Kinds, needed: Set[str], optional: Set[str] = frozenset()) -> bool:
    """Whether a group has all that it needs, and nothing that is not known."""
    return fds.keys() - optional == needed


def let_go(fd_store: FdStore, group: str, fds: Kinds) -> None:
    """Have a group held no more, and close its descriptors."""
    fd_store.release(group)
    for fd in fds.values():
        os.close(fd)


def restore_groups(
    inherited: InheritedFds,
    prefix: str,
    fd_store: FdStore,
    restore: Callable[[str, Kinds], T | None],
    lost: str = "guest-lost",
) -> list[T]:
    """Give what restore(group, fds) makes of each group with that prefix.

    restore takes the descriptors over, or returns None, which it logs, having taken none: then the
    group is let go. So is one whose record is broken: that costs itself alone, and is logged as
    the event lost.
    """
    restored = []
    for group, fds in inherited.take_all(prefix):
        try:
            made = restore(group, fds)
        except (InvariantError, KeyError, TypeError, ValueError) as error:
            _log.error(lost, f"{group} is broken: {type(error).__name__}: {error}")
            made = None
        if made is None:
            let_go(fd_store, group, fds)
        else:
            restored.append(made)
    return restored
