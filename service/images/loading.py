# SPDX-License-Identifier: Apache-2.0
"""Load extents in order, after those that guests wait for; used by pin, warm and autowarm."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Final

from cowshed.cache import ExtentState, Image, SourceError

__all__ = ["load"]

_WAIT_MS: Final = 200
_BATCH_EXTENTS: Final = 64
# How often, and for how long, to repeat a prefetch that the store did not accept.
_AGAIN_SECONDS: Final = 0.002
_PATIENCE_SECONDS: Final = 10.0


def load(image: Image, wanted: Iterable[int]) -> Iterator[int]:
    """Load extents, in order, a run at a time; yields how many are done.

    Prefetches that the store did not accept are repeated. Extents that cannot be read, or find no
    room for long, are skipped. An extent that was loaded and evicted again counts as done. Raises
    SourceError once a read of the source hangs.
    """
    done = 0
    for run in _runs(wanted):
        for at in range(run.start, run.stop, _BATCH_EXTENTS):
            nr = min(_BATCH_EXTENTS, run.stop - at)
            for _ in _load_batch(image, at, nr):
                yield done
            done += nr
            yield done


def _load_batch(image: Image, first_extent: int, nr_extents: int) -> Iterator[None]:
    """Load a few extents until each was seen resident once; yields repeatedly while it waits."""
    left = set(range(first_extent, first_extent + nr_extents))
    errors = image.counters().load_errors
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline and image.counters().load_errors == errors:
        first = min(left)
        nr = max(left) + 1 - first
        image.prefetch(first, nr)
        while not image.wait_loaded(first, nr, _WAIT_MS):
            if image.read_wait_seconds > _PATIENCE_SECONDS:
                raise SourceError(
                    f"the source of image {image.label!r} has not answered a read for "
                    f"{_PATIENCE_SECONDS:g} s: check its file system, and try again"
                )
            yield
        states = image.states(first, nr)
        seen = {extent for extent in left if states[extent - first] == ExtentState.RESIDENT}
        left -= seen
        if not left:
            return
        if seen:
            deadline = time.monotonic() + _PATIENCE_SECONDS
        else:  # other readahead fills the store's queue, and no event reports free places
            time.sleep(_AGAIN_SECONDS)
        yield


def _runs(extents: Iterable[int]) -> Iterator[range]:
    """Group consecutive extents into ranges."""
    run = range(0)
    for extent in extents:
        if run and extent == run.stop:
            run = range(run.start, extent + 1)
        else:
            if run:
                yield run
            run = range(extent, extent + 1)
    if run:
        yield run
