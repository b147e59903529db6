# SPDX-License-Identifier: Apache-2.0
"""Faults injected into a daemon: `cowshed serve` with COWSHED_TEST_POINTS, and its request."""

from __future__ import annotations

from typing import Any

from domains import Daemon

BEFORE = ("env", "COWSHED_TEST_POINTS=1")


def switch(daemon: Daemon, point: str, action: str, **how: Any) -> None:
    """Arm a point: action off, stop, fail (errno), delay (ms) or kill; times, permille, seed."""
    daemon.request("point", name=point, action=action, **how)


def is_reached(daemon: Daemon, point: str) -> bool:
    """Return whether a thread has reached a point of the core since it was armed."""
    return bool(daemon.request("point", name=point, action="look")["reached"])
