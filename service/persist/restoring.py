# SPDX-License-Identifier: Apache-2.0
"""Restore mappings, machines and overlays from inherited groups of descriptors, in one way."""

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
    """Return a new unique group name with that prefix."""
    return f"{prefix}{secrets.token_hex(8)}"


def has_kinds(fds: Kinds, needed: Set[str], optional: Set[str] = frozenset()) -> bool:
    """Whether a group has all kinds that are needed, and no others except optional ones."""
    return fds.keys() - optional == needed


def let_go(fd_store: FdStore, group: str, fds: Kinds) -> None:
    """Drop a group from the supervisor, and close its descriptors."""
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
    """Return what restore(group, fds) makes of each group with that prefix.

    restore must take the descriptors over; or take none, log why, and return None: then the group
    is let go. A group with a broken record is let go too, and logged as the event `lost`; the
    others are restored.
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
