# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be opened yet, and are served as soon as their source can be opened.

A successor serves without them, because the guests of all other images wait for it. It retries them
here, in threads that nothing waits for, since an open may hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cowshed.cache import CowshedError, FileSource
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.side_threads import SideThreads
from cowshed.service.settings.images import ImageSpec

__all__ = ["Unserved", "UnservedImages"]

_log = EventLog("cowshed.images")


@dataclass
class Unserved:
    """An image of the configuration that is not served, and why."""

    spec: ImageSpec
    why: str


class UnservedImages:
    """Retries unserved images. look() is for the loop; all else is for any thread."""

    def __init__(
        self,
        unserved: Iterable[Unserved],
        side: SideThreads,
        serve: Callable[[ImageSpec, FileSource], None],
    ) -> None:
        """serve(spec, source) takes over the source and serves the image, or raises."""
        self._lock: Final = threading.Lock()
        self._unserved: Final = list(unserved)
        self._side: Final = side
        self._serve: Final = serve
        for each in self._unserved:
            _log.error(
                "image-unserved",
                f"{each.why}; all other images are served, and this one once it can be opened",
                image=each.spec.label,
                source=each.spec.source,
            )

    def look(self) -> None:
        """Start a retry of each."""
        for each in self._listed():
            self._side.run(f"open {each.spec.label}", lambda each=each: self._try(each))  # type: ignore[misc]

    def labels(self) -> list[tuple[str, str]]:
        """The domain and name of each."""
        return [(each.spec.domain, each.spec.name) for each in self._listed()]

    def status(self) -> list[dict[str, Any]]:
        """Return the entries of the status."""
        return [
            {
                "name": each.spec.name,
                "domain": each.spec.domain,
                "source": each.spec.source,
                "why": each.why,
            }
            for each in self._listed()
        ]

    def _listed(self) -> list[Unserved]:
        with self._lock:
            return list(self._unserved)

    def _try(self, each: Unserved) -> None:
        try:
            self._serve(each.spec, FileSource.open(Path(each.spec.source)))
        except (CowshedError, OSError) as error:
            each.why = str(error)
            return
        _log.notice("image-served", "its source was opened", image=each.spec.label)
        with self._lock:
            self._unserved.remove(each)
