# SPDX-License-Identifier: Apache-2.0
"""The state of the page in a browser: the status, and a map of each image's extents.

A map has a bounded number of cells: a cell stands for one extent, or for several adjacent ones. It
has four values for each cell, run-length encoded as [value, run, value, run, ...]:

    resident  how many of its extents are in memory
    pinned    how many of its extents are pinned
    refs      guests that are granted its most shared extent
    heat      0 to 6: the touches of its most touched extent since the eviction policy last took
              them, at most 3, plus the bit length of refs, at most 3. Reading takes no touches

Reading costs as much as a status and a few nanoseconds per extent. It is done at most once in half
a second, for all browsers.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Final

from cowshed.cache import ExtentState, Image
from cowshed.service.reports.wording import STOPPED, format_drain, key_of, quota_command

__all__ = ["MOST_CELLS", "PageStateReader", "image_map", "run_lengths"]

MOST_CELLS: Final = 4096  # of one image
_MOST_CELLS_OF_ALL: Final = 4 * MOST_CELLS
_LEAST_CELLS: Final = 64
_MOST_GUESTS: Final = 500
_KEPT_NS: Final = 500_000_000
_HEAT_STEPS: Final = 3


class PageStateReader:
    """Makes /state.json; for any thread. The images are in the order of the status.

    images() returns the open images, status() the object of `cowshed status --json`.
    """

    def __init__(
        self, images: Callable[[], Iterable[Image]], status: Callable[[], dict[str, Any]]
    ) -> None:
        self._images = images
        self._status = status
        self._lock = threading.Lock()
        self._kept = b""
        self._kept_until_ns = 0

    def read(self) -> bytes:
        """Return JSON of at most a few hundred KiB, at most half a second old."""
        with self._lock:
            now_ns = time.monotonic_ns()
            if now_ns >= self._kept_until_ns:
                state = self._state()
                self._kept = json.dumps(state, separators=(",", ":")).encode()
                self._kept_until_ns = time.monotonic_ns() + _KEPT_NS
            return self._kept

    def _state(self) -> dict[str, Any]:
        status = self._status()
        images = {(image.domain, image.name): image for image in self._images()}
        most_cells = max(_LEAST_CELLS, min(MOST_CELLS, _MOST_CELLS_OF_ALL // max(1, len(images))))
        for image_status in status["images"]:
            image = images.get((image_status["domain"], image_status["name"]))
            image_status["map"] = image and image_map(image, most_cells)
        guests = sorted(
            status["guests"], key=lambda guest: (guest["state"] != STOPPED, key_of(guest))
        )
        nr_by_image = Counter((guest["domain"], guest["image"]) for guest in guests)
        for image_status in status["images"]:
            image_status["nr_guests"] = nr_by_image[image_status["domain"], image_status["name"]]
        for guest in guests:
            if guest["state"] == STOPPED:
                guest["cure"] = quota_command(guest, status)
        status["drained"] = format_drain(status)
        status["guests"] = guests[:_MOST_GUESTS]
        status["nr_guests"] = len(guests)
        status["nr_by_state"] = Counter(guest["state"] for guest in guests)
        status["nr_stopped"] = status["nr_by_state"][STOPPED]
        return status


def image_map(image: Image, most_cells: int = MOST_CELLS) -> dict[str, Any]:
    """Return the map of an image; its values are not one consistent snapshot."""
    nr = image.nr_extents
    per_cell = max(1, -(-nr // most_cells))
    cells = [slice(at, at + per_cell) for at in range(0, nr, per_cell)]
    states, refs, pins, touches = image.states(), image.refs(), image.pins(), image.touches()
    resident = [states[cell].count(ExtentState.RESIDENT) for cell in cells]
    most_refs = [max(refs[cell]) for cell in cells]
    return {
        "nr_extents": nr,
        "extents_per_cell": per_cell,
        "nr_cells": len(cells),
        "resident": run_lengths(resident),
        "pinned": run_lengths([len(pins[cell]) - pins[cell].count(0) for cell in cells]),
        "refs": run_lengths(most_refs),
        "heat": run_lengths(
            [
                min(_HEAT_STEPS, max(touches[cell])) + min(_HEAT_STEPS, nr_refs.bit_length())
                if nr_resident
                else 0
                for cell, nr_resident, nr_refs in zip(cells, resident, most_refs, strict=True)
            ]
        ),
    }


def run_lengths(values: Sequence[int]) -> list[int]:
    """Encode as [value, run, value, run, ...]; at most twice as long as the values."""
    encoded: list[int] = []
    for value, run in groupby(values):
        encoded += (value, sum(1 for _ in run))
    return encoded
