# SPDX-License-Identifier: Apache-2.0
"""What is being warmed, by whom and how far it is, and who wants it to stop."""

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
    """One warming of an image: by Autowarm or an operator. Extents are in the order of loading.

    total_extents is None as long as nobody knows: what to load only the image's digest tells. Who
    loads looks at is_aborted between two steps. Written by one thread each, read by any.
    """

    image: Image
    why: WarmReason
    total_extents: int | None = None
    done_extents: int = 0
    is_aborted: bool = False

    @property
    def done_bytes(self) -> int:
        """Of the image, what has been seen to."""
        return self.done_extents * self.image.extent_bytes

    @property
    def total_bytes(self) -> int | None:
        """What is to be seen to."""
        return None if self.total_extents is None else self.total_extents * self.image.extent_bytes


class Warming:
    """All warmings under way or planned, in the order in which they were asked for; any thread."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._warms: list[Warm] = []

    @contextlib.contextmanager
    def enter(
        self, image: Image, why: WarmReason, total_extents: int | None = None
    ) -> Iterator[Warm]:
        """Have a warming known of inside `with`."""
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
        """Have those of an image end soon, but for what loaders have in hand; which they are."""
        warms = self.of(image)
        for warm in warms:
            warm.is_aborted = True
        return warms

    def left_bytes(self, image: Image) -> int:
        """What is still to be seen to of an image, as far as it is known."""
        return sum(
            warm.total_bytes - warm.done_bytes
            for warm in self.of(image)
            if warm.total_bytes is not None
        )
