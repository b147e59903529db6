# SPDX-License-Identifier: Apache-2.0
"""Fault injection for tests: the operators' request "point", if COWSHED_TEST_POINTS is set.

The core's named points (cache/core/points.h) stop, fail, delay or kill; the service's own only
kill. Without the variable there is no such request, and reach() only looks into an empty set.
docs/testing.md lists them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, Final

from cowshed.cache._core import lib
from cowshed.cache.calls import checked
from cowshed.cache.errors import UsageError
from cowshed.transport.messages.fields import take_choice, take_optional_number, take_text

__all__ = ["ENABLED", "arm", "reach"]

ENABLED: Final = bool(os.environ.get("COWSHED_TEST_POINTS"))

_OURS: Final = frozenset(
    {
        *("GUEST_CAME", "NETWORK_CAME", "NETWORK_OPENS", "NETWORK_GIVEN", "NBD_CAME"),
        *("OPEN_TOLD", "REGION_ATTACHED", "REGION_HELD", "REGION_TOLD"),
        *("HANDOFF_KEPT", "HANDOFF_OWNED", "HANDOFF_ADMITTED"),
        *("MACHINE_ACCEPTED", "MACHINE_CAME", "MACHINE_ATTACHED", "MACHINE_HELD"),
    }
)
_armed: set[str] = set()


def arm(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arm the named point with an action: "stop", "fail" (errno), "delay" (ms), "kill", or "off".

    The point acts times times, 1 unless given, 0 for ever, and on permille of those that reach it,
    chosen by seed. "look" returns whether a thread has reached a point of the core since then.
    """
    name = take_text(request, "name")
    action = take_choice(
        request, "action", ("off", "stop", "fail", "delay", "kill", "look"), default="kill"
    )
    if action == "look":
        yield {"reached": lib.point_wait(_number(name), 1, 0) == 0}
        return
    if name in _OURS:
        (_armed.discard if action == "off" else _armed.add)(name)
    elif action == "off":
        checked(lib.point_release(_number(name)), "releasing a point")
    else:
        value = getattr(lib, f"POINT_{action.upper()}")
        argument = take_optional_number(request, "ms" if action == "delay" else "errno") or 0
        times = take_optional_number(request, "times")
        some = take_optional_number(request, "permille")
        armed = lib.point_arm_some(
            _number(name),
            value,
            argument,
            1 if times is None else times,
            1000 if some is None else some,
            take_optional_number(request, "seed") or 0,
        )
        checked(armed, "arming a point")
    yield {}


def reach(name: str) -> None:
    """Kill this process, if a test armed the point."""
    if name in _armed:
        os.kill(os.getpid(), signal.SIGKILL)


def _number(name: str) -> int:
    number = getattr(lib, f"POINT_{name}", None)
    if number is None or name in ("NR", "OFF", "STOP", "FAIL", "KILL", "DELAY"):
        raise UsageError(f"no point {name!r}")
    return int(number)
