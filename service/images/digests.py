# SPDX-License-Identifier: Apache-2.0
"""Computes images' digests in the background, without leaving the images in the page cache."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from typing import Final

from cowshed.cache import FileSource, Image
from cowshed.service.runtime.logs import EventLog

__all__ = ["DigestThread", "digest_of"]

_log = EventLog("cowshed.digests")
_CHUNK_BYTES: Final = 1 << 20


def digest_of(source: FileSource, stop: Callable[[], bool] = lambda: False) -> str:
    """Give "sha256:HEX" of a source's bytes, "" if stopped; OSError if it cannot be read.

    Reads the source's own descriptors, O_DIRECT where possible: about as fast as SHA-256, 1 GB/s.
    """
    fd = source.direct_fd if source.direct_fd >= 0 else source.fd
    digest = hashlib.sha256()
    with mmap.mmap(-1, _CHUNK_BYTES) as chunk, memoryview(chunk) as view:  # aligned
        offset = 0
        while offset < source.size_bytes and not stop():
            got = os.preadv(fd, [view], offset)
            if got == 0:
                raise OSError(f"{source.path} ends at {offset} of {source.size_bytes} bytes")
            digest.update(view[: min(got, source.size_bytes - offset)])
            if source.direct_fd < 0:
                os.posix_fadvise(fd, offset, got, os.POSIX_FADV_DONTNEED)
            offset += got
    return "" if stop() else f"sha256:{digest.hexdigest()}"


class DigestThread:
    """Gives each image its digest, one after the other; stop() ends it between two chunks.

    Calls done(image), in its own thread, after each digest.
    """

    def __init__(self, images: Iterable[Image], done: Callable[[Image], None]) -> None:
        self._images = list(images)
        self._done = done
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="digests", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for image in self._images:
            try:
                image.digest = digest_of(image.source, self._stop.is_set)
            except OSError as error:
                _log.error("no-digest", str(error), image=image.label)
                continue
            if image.digest:
                self._done(image)
