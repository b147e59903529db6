# SPDX-License-Identifier: Apache-2.0
"""A forked child closes its copies of the parent's descriptors.

A child inherits copies of the parent's sockets and userfaultfds. If it kept them, the peer would
not notice the parent's death. The child has no use for them: MADV_DONTFORK mappings are not copied.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forgetful(Protocol):
    """Something a forked child must not use."""

    def forget(self) -> None:
        """Close inherited descriptors, take no lock, and refuse use from now on."""


_live: weakref.WeakSet[Forgetful] = weakref.WeakSet()


def forget_in_child(thing: Forgetful) -> None:
    """Have thing.forget() called in every child forked while thing lives."""
    _live.add(thing)


def _forget_all() -> None:
    for thing in list(_live):
        thing.forget()
    _live.clear()


os.register_at_fork(after_in_child=_forget_all)
