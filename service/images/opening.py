# SPDX-License-Identifier: Apache-2.0
"""The store with its images: anew, or over what the last backend left of them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cowshed.accounting import Watermarks
from cowshed.cache import FileSource, Image, ImageRemains, PageStore
from cowshed.service.runtime.logs import EventLog
from cowshed.service.settings.config import Config
from cowshed.service.settings.images import ImageSpec
from cowshed.service.survival.fd_store import FdStore
from cowshed.service.survival.remains import Remains, record_make, record_read

__all__ = ["open_store"]

_log = EventLog("cowshed.images")


@contextlib.contextmanager
def open_store(config: Config, fd_store: FdStore, remains: Remains) -> Iterator[PageStore]:
    """Give the store with every image of the configuration open, and held for our successor.

    Raises CowshedError for a source that cannot be an image, or is not the one that was left.
    """
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(contextlib.ExitStack())
        store = stack.enter_context(
            PageStore(
                config.capacity_bytes,
                extent_bytes=config.extent_bytes,
                nr_loaders=config.loaders,
                low_free_extents=Watermarks(config.capacity_bytes // config.extent_bytes).low_free,
            )
        )
        for spec in config.images:
            group = f"image/{spec.domain}/{spec.name}"
            left = remains.take(group)
            source = FileSource.open(Path(spec.source))
            try:
                image = _open(store, spec, source, left)
            except BaseException:
                source.close()
                raise
            record = left["record"] if left else record_make(_identity(source))
            records.callback(os.close, record)
            fds = [record, image.frames_fd, image.guest_fd, image.arrays_fd]
            fd_store.hold(group, fds)
        yield store


def _open(
    store: PageStore, spec: ImageSpec, source: FileSource, left: dict[str, int] | None
) -> Image:
    if left is None:
        return store.open_image(spec.name, source, spec.domain)
    remains = ImageRemains(left["image"], left["guest"], left["extents"])
    image = store.adopt_image(spec.name, source, remains, spec.domain)
    if record_read(left["record"]) != _identity(source):
        image.source_change = "it is not the file that was served before the restart"
        _log.error(
            "source-changed",
            f"{image.source_change}; what is resident is of the old one: "
            "stop, and start again with a copy that stays as it is",
            image=image.label,
            source=source.path,
        )
    return image


def _identity(source: FileSource) -> dict[str, Any]:
    """What tells one source from another that has its place."""
    status = os.fstat(source.fd)
    is_file = stat.S_ISREG(status.st_mode)
    return {
        "path": os.fsencode(source.path).decode(errors="surrogateescape"),
        "device": status.st_dev if is_file else status.st_rdev,
        "inode": status.st_ino,
        "size_bytes": source.size_bytes,
        "mtime_ns": status.st_mtime_ns if is_file else 0,
    }
