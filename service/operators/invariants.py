# SPDX-License-Identifier: Apache-2.0
"""Recompute all invariants that have a check(), for tests: the operators' request "check".

The request exists if COWSHED_TEST_POINTS is set. Stress and chaos tests make it after every event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cowshed.cache.errors import InvariantError
from cowshed.service.host import Host

__all__ = ["check_invariants"]


def check_invariants(host: Host) -> Iterator[dict[str, Any]]:
    """Yield one reply: a line for each broken invariant."""
    checks: list[Callable[[], None]] = [
        host.store.check,
        host.guests.check,
        host.overlays.check_all,
        host.evictor.check,
        host.fd_store.check,
    ]
    broken = []
    for check in checks:
        try:
            check()
        except InvariantError as error:
            broken.append(str(error))
    yield {"broken": broken}
