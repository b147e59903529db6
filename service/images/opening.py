# SPDX-License-Identifier: Apache-2.0
"""The store with its images: anew, or over what the last backend left of them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cowshed.accounting import Watermarks
from cowshed.cache import CowshedError, FileSource, Image, ImageRemains, PageStore
from cowshed.service.runtime.logs import EventLog
from cowshed.service.settings.config import Config
from cowshed.service.settings.images import ImageSpec
from cowshed.service.settings.names import Named
from cowshed.service.survival.fd_store import FdStore
from cowshed.service.survival.remains import Remains, record_make, record_read

__all__ = ["HeldImages", "open_store"]

_log = EventLog("cowshed.images")


class HeldImages:
    """Has images outlive us. close() it after the store."""

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store
        self._records: list[int] = []

    def hold(self, image: Image, record: int | None = None) -> None:
        """Have an image held for our successor; record is what was left of it, taken over."""
        if record is None:
            record = record_make(_identity(image.source))
        self._records.append(record)
        fds = [record, image.frames_fd, image.guest_fd, image.arrays_fd]
        self._fd_store.hold(_group(image), fds)

    def close(self) -> None:
        """Let go of the records; what is held stays so."""
        while self._records:
            os.close(self._records.pop())


def _group(image: Named) -> str:
    return f"image/{image.domain}/{image.name}"


@contextlib.contextmanager
def open_store(
    config: Config, arrived: Sequence[ImageSpec], held: HeldImages, remains: Remains
) -> Iterator[PageStore]:
    """Give the store with every image of the configuration open, and held for our successor.

    arrived are those that came in handoffs; one that cannot be opened is left out. Raises
    CowshedError for a source of the others that cannot be an image, or is not the one that was
    left.
    """
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(
            PageStore(
                config.capacity_bytes,
                extent_bytes=config.extent_bytes,
                nr_loaders=config.loaders,
                low_free_extents=Watermarks(config.capacity_bytes // config.extent_bytes).low_free,
            )
        )
        for spec in config.images:
            _open_held(store, spec, held, remains)
        for spec in arrived:
            try:
                _open_held(store, spec, held, remains)
            except CowshedError as error:
                _log.error("image-unusable", str(error), image=spec.label)
        yield store


def _open_held(store: PageStore, spec: ImageSpec, held: HeldImages, remains: Remains) -> None:
    left = remains.take(_group(spec))
    source = FileSource.open(Path(spec.source))
    try:
        image = _open(store, spec, source, left)
    except BaseException:
        source.close()
        raise
    held.hold(image, left["record"] if left else None)


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
