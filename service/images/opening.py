# SPDX-License-Identifier: Apache-2.0
"""Open the store with its images, new or from what the last backend held of them.

An image's frames and the bytes still to be loaded must be of one file. So the keeper also holds the
source's descriptors, and a successor reads from them, whatever the path names by then. An image is
held as two groups: image/DOMAIN/NAME has its frames and a record of its source, source/DOMAIN/NAME
the source. Older releases hold the first only and ignore the second, so either release may succeed
the other; without the second group the source is opened at its path, and must be the same file as
in the record.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from cowshed.accounting import Watermarks
from cowshed.cache import (
    CowshedError,
    FileSource,
    Image,
    InheritedImage,
    PageStore,
    RemoteSource,
    SourceError,
    SourceIdentity,
)
from cowshed.service.images.unserved import Unserved
from cowshed.service.persist.fd_store import FdStore, kind_of
from cowshed.service.persist.inherited import InheritedFds, Kinds, record_make, record_read
from cowshed.service.runtime.side_threads import InTime
from cowshed.service.settings.config import Config
from cowshed.service.settings.images import ImageSpec
from cowshed.service.settings.names import Named
from cowshed.transport.links.foreign_fds import device_and_inode

__all__ = ["KeptImages", "is_kept", "open_store"]

# How long to wait for sources to open, and for reads to end at the stop; slower ones are left.
_OPEN_SECONDS: Final = 3.0
_STOP_SECONDS: Final = 1.0

_KINDS: Final = {"record", "image", "guest", "extents"}


class KeptImages:
    """Has the keeper hold images. Close it after the store."""

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store
        self._records: list[int] = []

    def keep(self, image: Image, record: int | None = None) -> None:
        """Have the keeper hold an image; record is an inherited one, taken over."""
        if record is None:
            record = record_make(_describe(image.source))
        self._records.append(record)
        # The source first, so that the source of every held image is held, too.
        source = image.source
        if kind_of(source.fd) not in _KINDS:
            direct = [source.direct_fd] if source.direct_fd >= 0 else []
            self._fd_store.keep(_source_group(image), [source.fd, *direct])
        fds = [record, image.frames_fd, image.guest_fd, image.arrays_fd]
        self._fd_store.keep(_group(image), fds)

    def release(self, image: Named) -> None:
        """Have the keeper release an image that cannot be restored."""
        for group in (_group(image), _source_group(image)):
            self._fd_store.release(group)

    def close(self) -> None:
        """Close the records; the keeper still holds the images."""
        while self._records:
            os.close(self._records.pop())


def is_kept(name: tuple[str, str], inherited: InheritedFds) -> bool:
    """Whether we inherited the image of that domain and name, and its source."""
    return {"/".join(("image", *name)), "/".join(("source", *name))} <= set(inherited)


def _group(image: Named) -> str:
    return f"image/{image.domain}/{image.name}"


def _source_group(image: Named) -> str:
    return f"source/{image.domain}/{image.name}"


@contextlib.contextmanager
def open_store(
    config: Config,
    arrived: Sequence[ImageSpec],
    kept: KeptImages,
    inherited: InheritedFds,
    *,
    is_first: bool = True,
) -> Iterator[tuple[PageStore, list[Unserved]]]:
    """Yield the store with all images that can be opened, held by the keeper, and the other images.

    arrived are the images received in handoffs. is_first: no backend preceded us, so no guests
    wait; then an image of the configuration that cannot be opened raises CowshedError. Sources that
    do not answer are waited for _OPEN_SECONDS in all. If a loader hangs, the store is not closed.
    """
    extent_bytes = config.least_extent_bytes
    capacity_extents = config.capacity_bytes // extent_bytes
    largest_extent = config.largest_extent_bytes // extent_bytes
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(
            PageStore(
                config.capacity_bytes,
                extent_bytes=extent_bytes,
                default_extent_bytes=config.extent_bytes,
                nr_loaders=config.loaders,
                low_free_extents=Watermarks(capacity_extents, largest_extent).low_free,
                standby_max_extents=capacity_extents * config.standby // 100,
            )
        )
        stack.callback(store.stop, _STOP_SECONDS)
        unserved = []
        specs = (*config.images, *arrived)
        openings = _Openings(
            spec for spec in specs if not is_kept((spec.domain, spec.name), inherited)
        )
        for spec in specs:
            try:
                _open_kept(store, spec, kept, inherited, openings)
            except CowshedError as error:
                if is_first and spec in config.images and not openings.is_late(spec):
                    raise
                unserved.append(Unserved(spec, str(error)))
        yield store, unserved


class _Openings:
    """Opens sources at their paths, all in parallel, with one deadline."""

    def __init__(self, specs: Iterable[ImageSpec]) -> None:
        self._deadline = time.monotonic() + _OPEN_SECONDS
        self._late: set[ImageSpec] = set()
        self._openings = {spec: self._begin(spec) for spec in specs}

    def take(self, spec: ImageSpec) -> FileSource:
        """Return a source, now the caller's; SourceError if it cannot be opened in time."""
        opening = self._openings.pop(spec, None) or self._begin(spec)
        opening.wait(max(0.0, self._deadline - time.monotonic()))
        if opening.give_up():
            self._late.add(spec)
            raise SourceError(
                f"image source {spec.source!r} does not answer: its file system hangs"
            )
        return opening.result()

    def is_late(self, spec: ImageSpec) -> bool:
        """Whether a source did not answer in time."""
        return spec in self._late

    def _begin(self, spec: ImageSpec) -> InTime[FileSource]:
        return InTime(lambda: FileSource.open(Path(spec.source)), FileSource.close)


def _open_kept(
    store: PageStore,
    spec: ImageSpec,
    kept: KeptImages,
    inherited: InheritedFds,
    openings: _Openings,
) -> None:
    left, source_fds = inherited.take(_group(spec)), inherited.take(_source_group(spec))
    if left is None or left.keys() != _KINDS:
        kept.release(spec)
        _close_all(left or {}, source_fds or {})
        image = _open_new(store, spec, openings)
        kept.keep(image)
        return
    try:
        image = _adopt(store, spec, left, source_fds or {}, openings)
    except BaseException:
        kept.release(spec)
        _close_all(left)
        raise
    kept.keep(image, left["record"])


def _open_new(store: PageStore, spec: ImageSpec, openings: _Openings) -> Image:
    source = openings.take(spec)
    try:
        return store.open_image(spec.name, source, spec.domain, extent_bytes=spec.extent_bytes)
    except BaseException:
        source.close()
        raise


def _adopt(
    store: PageStore, spec: ImageSpec, left: Kinds, source_fds: Kinds, openings: _Openings
) -> Image:
    """Restore an image; takes over source_fds, and left only on success."""
    identity = _identity(record_read(left["record"]))
    source = _left_source(spec, identity, source_fds)
    if source is None:
        source = _same_source(spec, identity, openings)
    try:
        image = InheritedImage(left["image"], left["guest"], left["extents"])
        return store.adopt_image(
            spec.name, source, image, spec.domain, extent_bytes=spec.extent_bytes
        )
    except BaseException:
        source.close()
        raise


def _left_source(spec: ImageSpec, identity: SourceIdentity, fds: Kinds) -> FileSource | None:
    """Return the inherited source; close it and return None if it is not the record's."""
    direct_fd = fds.pop("direct", -1)
    if len(fds) == 1:
        fd = next(iter(fds.values()))  # its kind, guessed from the file's name, means nothing
        device, inode = device_and_inode(fd)
        is_device = identity.mtime_ns == 0
        if inode == identity.inode and (is_device or device == identity.device):
            return FileSource(Path(spec.source), identity, fd, direct_fd)
    _close_all(fds, {"direct": direct_fd} if direct_fd >= 0 else {})
    return None


def _same_source(spec: ImageSpec, identity: SourceIdentity, openings: _Openings) -> FileSource:
    """Open the source at its path; SourceError unless it is the file that was served."""
    source = openings.take(spec)
    found = source.identity
    if not found.is_same_file(identity) or found.size_bytes != identity.size_bytes:
        source.close()
        raise SourceError(
            f"{spec.source!r} is not the file that image {spec.label!r} was served from: the "
            "image's frames cannot be restored; it is served anew from the file there now"
        )
    # The file may have been written to since; SourceWatch finds out.
    return FileSource(source.path, identity, source.fd, source.direct_fd)


def _close_all(*groups: Kinds) -> None:
    for group in groups:
        for fd in group.values():
            os.close(fd)


def _describe(source: FileSource | RemoteSource) -> dict[str, Any]:
    """Return the record of a source."""
    identity = source.identity
    return {
        "path": os.fsencode(source.path).decode(errors="surrogateescape"),
        "device": identity.device,
        "inode": identity.inode,
        "size_bytes": identity.size_bytes,
        "mtime_ns": identity.mtime_ns,
    }


def _identity(record: dict[str, Any]) -> SourceIdentity:
    return SourceIdentity(
        record["device"], record["inode"], record["size_bytes"], record["mtime_ns"]
    )
