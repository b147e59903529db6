# SPDX-License-Identifier: Apache-2.0
"""Decide the extent size of each image on this host.

Frames in extents of 2 MiB are on a tmpfs with huge pages (cache/core/frames.h), which only some
processes may mount. Elsewhere an image with such extents gets the default ones, and the log says
so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cowshed.cache import HUGE_EXTENT_BYTES, probe_huge_frames
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.settings.config import EXTENT_DEFAULT_BYTES, Config

__all__ = ["resolve_extents"]

_log = EventLog("cowshed.images")


def resolve_extents(
    config: Config,
    *,
    is_logged: bool = True,
    probe: Callable[[], OSError | None] = probe_huge_frames,
) -> Config:
    """Return the configuration with only those extent sizes that this process can serve.

    The daemon and a program that describes to it what it would serve must both ask, so that they
    mean the same; the daemon logs it.
    """
    huge = [spec for spec in config.images if config.extent_of(spec) == HUGE_EXTENT_BYTES]
    if config.largest_extent_bytes < HUGE_EXTENT_BYTES:
        return config
    error = probe()
    if error is None:
        return config
    default = min(config.extent_bytes, EXTENT_DEFAULT_BYTES)
    if is_logged:
        _log.warning(
            "huge-frames-refused",
            f"extents of {format_bytes(HUGE_EXTENT_BYTES)} need a tmpfs with huge pages, and "
            f"mounting one failed ({error.strerror}): serving extents of {format_bytes(default)}; "
            "give the daemon CAP_SYS_ADMIN, or a smaller extent to these images",
            images=",".join(spec.label for spec in huge) or None,
        )
    images = tuple(
        replace(spec, extent_bytes=default) if spec in huge else spec for spec in config.images
    )
    return replace(config, extent_bytes=default, images=images)
