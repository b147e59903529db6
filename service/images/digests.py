# SPDX-License-Identifier: Apache-2.0
"""Compute images' digests in the background, without leaving the images in the page cache."""

from __future__ import annotations

import hashlib
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from cowshed.cache import FileSource, Image, RemoteSource
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.side_threads import InTime

__all__ = ["DigestThread", "digest_of"]

_log = EventLog("cowshed.digests")
_CHUNK_BYTES: Final = 1 << 20
_LOOK_SECONDS: Final = 0.2
# A read of one chunk that takes longer is considered hung.
_HUNG_SECONDS: Final = 2.0


def digest_of(source: FileSource | RemoteSource, stop: Callable[[], bool] = lambda: False) -> str:
    """Return "sha256:HEX" of a source's bytes, "" if stopped; OSError if it cannot be read.

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
    """Computes each image's digest, one after the other; stop() ends it between two chunks.

    If a source hangs, its computation continues in a thread of its own, and the next image begins.
    Calls done(image), in any thread, after each digest.
    """

    def __init__(self, images: Iterable[Image], done: Callable[[Image], None]) -> None:
        self._images: queue.SimpleQueue[Image | None] = queue.SimpleQueue()
        for image in images:
            self._images.put(image)
        self._done = done
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="digests", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, image: Image) -> None:
        """Queue another image."""
        self._images.put(image)

    def stop(self) -> None:
        """Stop and join the thread; a computation that hangs in a read is left behind."""
        self._stop.set()
        self._images.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (image := self._images.get()) is not None and not self._stop.is_set():
            progress = _Progress(self._stop)
            reading = InTime(lambda of=image, by=progress: self._give(of, by))  # type: ignore[misc]
            while not reading.wait(_LOOK_SECONDS) and not progress.has_ended():
                pass

    def _give(self, image: Image, progress: _Progress) -> None:
        try:
            digest = digest_of(image.source, progress.stop)
        except OSError as error:
            _log.error("no-digest", str(error), image=image.label)
            return
        if not digest:
            return
        image.digest = digest
        try:
            self._done(image)
        except Exception:  # nothing else would report this thread's failure
            _log.crash("digest-failed", "a defect of cowshed: please report it", image=image.label)


class _Progress:
    """The progress of a digest; stop() is called before each chunk."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._moved_at = time.monotonic()

    def stop(self) -> bool:
        """Note progress; return whether to stop."""
        self._moved_at = time.monotonic()
        return self._stopping.is_set()

    def has_ended(self) -> bool:
        """Whether to stop waiting for it: it hangs, or the daemon ends."""
        return self._stopping.is_set() or time.monotonic() - self._moved_at > _HUNG_SECONDS
