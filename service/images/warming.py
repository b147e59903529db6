# SPDX-License-Identifier: Apache-2.0
"""The warm-ups in progress or planned: their reason, progress and abort flag."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from cowshed.cache import Image

__all__ = ["Warm", "WarmReason", "Warming"]

WarmReason = Literal["autowarm", "warm"]


@dataclass(eq=False)
class Warm:
    """One warm-up of an image, by Autowarm or an operator.

    total_extents is None until the image's digest is known, by which the working set is found. The
    loading thread checks is_aborted between two steps. Each field is written by one thread, read by
    any.
    """

    image: Image
    why: WarmReason
    total_extents: int | None = None
    done_extents: int = 0
    is_aborted: bool = False

    @property
    def done_bytes(self) -> int:
        """The bytes of the image that are done."""
        return self.done_extents * self.image.extent_bytes

    @property
    def total_bytes(self) -> int | None:
        """The bytes to do, None while unknown."""
        return None if self.total_extents is None else self.total_extents * self.image.extent_bytes


class Warming:
    """All warm-ups in progress or planned, in order of request; for any thread."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._warms: list[Warm] = []

    @contextlib.contextmanager
    def enter(
        self, image: Image, why: WarmReason, total_extents: int | None = None
    ) -> Iterator[Warm]:
        """Register a warm-up inside `with`."""
        warm = Warm(image, why, total_extents)
        with self._lock:
            self._warms.append(warm)
        try:
            yield warm
        finally:
            with self._lock:
                self._warms.remove(warm)

    def of(self, image: Image) -> list[Warm]:
        """Return the warm-ups running for an image."""
        with self._lock:
            return [warm for warm in self._warms if warm.image is image]

    def abort(self, image: Image) -> list[Warm]:
        """Abort and return an image's warm-ups; loads that loaders have begun still complete."""
        warms = self.of(image)
        for warm in warms:
            warm.is_aborted = True
        return warms

    def left_bytes(self, image: Image) -> int:
        """The bytes still to do for an image, by the warm-ups whose total is known."""
        return sum(
            warm.total_bytes - warm.done_bytes
            for warm in self.of(image)
            if warm.total_bytes is not None
        )
