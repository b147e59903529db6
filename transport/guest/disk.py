# SPDX-License-Identifier: Apache-2.0
"""An image mapped into its guest: shared pages to read, private ones where it has written.

The pages are mapped here (see region.c); the first access to a missing page and the first write to
a page are faults that the backend answers. A call that touches such pages waits for the backend:
through its restart, and for as long as a quota stops the guest; only SIGKILL ends the wait. A page
that the backend could not load is OSError (EIO) from read and write, and SIGBUS through view; so is
any page not in memory once the backend is gone for good.

When its backend is drained the disk follows its guest: a thread in C (follow.c) replaces the old
frames by the target's, at the same addresses, so that views stay valid and frozen writes go on. If
the target can only be reached over a network, where memory cannot follow, the disk goes on by
bytes once no view is left; until then the memory stays frozen: reads work and writes wait. Not for
a forked child, where the pages are not mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.errors import CowshedError, UsageError
from cowshed.transport.guest.attach import PAGE_BYTES, attach, detach, round_up
from cowshed.transport.guest.byte_disk import ByteDisk, check_writable
from cowshed.transport.guest.following import Following
from cowshed.transport.guest.forks import forget_in_child
from cowshed.transport.links.connection import Connection
from cowshed.transport.messages.protocol import Body

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from cowshed.cache._core import Pointer, StructRegion

# A long read or write checks for signals after each slice, so that Ctrl-C ends it.
_SLICE_BYTES: Final = 64 << 20
_CLOSE_SECONDS: Final = 5.0

# The documented way to fill a bytes object once, in place: no zeroing, no second copy.
_new_bytes: Callable[[None, int], bytes] = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t
)(("PyBytes_FromStringAndSize", ctypes.pythonapi))


class Disk:
    """An image opened by Backend.open, with a connection of its own; for use by any thread.

    Until closed or forgotten, _region is mapped and guarded. It stays mapped while _nr_busy calls
    are copying, and while _exporter is alive.
    """

    def __init__(
        self, connection: Connection, request: Body, origin: str = "", *, follow: bool = True
    ) -> None:
        """Attach over connection, which the disk then owns; it is closed if this fails.

        origin is the backend's URI, to be named in page references.
        """
        self._origin: Final = origin
        self._following: Following | None = None
        self.image: Final[str] = request["image"]
        self.read_only: Final = bool(request.get("read_only"))
        self._connection = connection
        self._lock = threading.Lock()
        self._state = "closed"
        self._nr_busy = 0
        self._exporter: weakref.ref[Any] | None = None
        try:
            attached = attach(connection, request)
        except BaseException:
            connection.close()
            raise
        self.guest: Final = attached.guest
        self.size_bytes: Final = attached.size_bytes
        self.digest: Final = attached.digest
        self._attached: Final = attached
        self._region = attached.region
        self._state = "open"
        try:
            self._following = Following(attached, connection.fileno(), request, follows=follow)
        except BaseException:
            self.close()
            raise
        forget_in_child(self)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # The traceback may still hold a view: do not let UsageError hide the error.
        with contextlib.suppress(UsageError):
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "closed") == "open":
            warnings.warn(f"disk {self.image!r} was not closed", ResourceWarning, stacklevel=1)
            try:
                self.close()
            finally:
                self._stop_following()  # its thread uses the region, which is freed with the disk

    @property
    def alive(self) -> bool:
        """Whether the backend, or a successor, is there.

        Without one, pages in memory still work, and access to others fails.
        """
        return self._connection.alive or not self.mapped

    @property
    def mapped(self) -> bool:
        """Whether pages are in this process's memory; False once the guest moved over a network."""
        return self._following is None or not self._following.goes_by_bytes

    @property
    def origin(self) -> str:
        """The URI of the backend that has this guest."""
        place = self._following.place if self._following else None
        return place.uri if place and (place.nr_moves or not self.mapped) else self._origin

    @property
    def generation(self) -> str:
        """What the backend calls this version of the image."""
        place = self._following.place if self._following else None
        return place.generation if place and place.nr_moves else self._attached.generation

    @property
    def extent_bytes(self) -> int:
        """The unit in which the backend loads and maps."""
        place = self._following.place if self._following else None
        return place.extent_bytes if place and place.nr_moves else self._attached.extent_bytes

    @property
    def moving(self) -> str:
        """Where the guest moves and what that waits for, as text; "" if it does not move."""
        return self._following.moving if self._following else ""

    @property
    def view(self) -> memoryview:
        """The whole image as memory; writes are private to this guest. Read-only if the disk is.

        Keeps the disk mapped: release every view, and all slices and casts of it, before close. An
        access may wait for the backend while the thread holds the GIL. Raises UsageError once the
        guest has moved to where nothing can be mapped.
        """
        with self._lock:
            if self._state != "open":
                raise self._unusable()
            exporter = self._exporter() if self._exporter else None
            if exporter is None:
                if self._following is not None:
                    self._following.begin_view()
                # The pointer's destructor holds the disk while views live.
                pointer = ffi.gc(ffi.cast("char *", self._region.address), self._end_view)
                exporter = ffi.buffer(pointer, self.size_bytes)
                self._exporter = weakref.ref(exporter)
            memory = memoryview(exporter)
            return memory.toreadonly() if self.read_only else memory

    def _end_view(self, _: object) -> None:
        if self._following is not None:
            self._following.end_view()

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range. Copies once.

        Raises UsageError for a range outside the image, OSError (EIO) if a page cannot be loaded.
        """
        self._check_range("read", offset, length)
        if length == 0:
            return b""
        result = _new_bytes(None, length)
        if self._copy("read", lib.region_read, offset, ffi.from_buffer(result), length):
            return result
        return self._far().read(offset, length)

    def write(self, offset: int, data: ReadableBuffer) -> int:
        """Write bytes, private to this guest, and return their number. Copies once.

        Raises as read does; the bytes before the bad page are then written.
        """
        check_writable(self)
        with ffi.from_buffer(data) as source:
            length = len(source)
            self._check_range("write", offset, length)
            is_done = self._copy("write", lib.region_write, offset, source, length)
        return length if is_done else self._far().write(offset, data)

    def discard(self, offset: int, length: int) -> None:
        """Give back private pages: the range reads as the image again.

        Raises UsageError unless offset is a multiple of 4096 and the end one too, or the image's.
        """
        self._check_range("discard", offset, length)
        end = offset + length
        if offset % PAGE_BYTES or (end % PAGE_BYTES and end != self.size_bytes):
            raise UsageError(
                f"discard of {length} bytes at {offset} is not of whole 4096-byte pages"
            )
        self._begin()
        try:
            err = lib.region_discard(self._region, offset, round_up(length))
        finally:
            self._end()
        if not self.mapped:
            self._far().discard(offset, length)
        elif err < 0:
            raise OSError(-err, f"discard of {length} bytes at {offset} of image {self.image!r}")

    def flush(self) -> None:
        """Do nothing while mapped: private pages are this process's memory, and no more durable.

        By bytes, as ByteDisk.flush.
        """
        if not self.mapped:
            self._far().flush()

    def close(self) -> None:
        """Detach and drop the private pages. Idempotent; does nothing in a forked child.

        Raises UsageError, and leaves the disk open, while it has views or calls in progress.
        """
        with self._lock:
            if self._state != "open":
                return
            if self._nr_busy:
                raise UsageError(
                    f"disk {self.image!r} is in use by {self._nr_busy} other threads; join them"
                )
            if self._exporter and self._exporter() is not None:
                raise UsageError(
                    f"disk {self.image!r} still has views; release() or del them before close"
                )
            self._state = "closed"
        self._stop_following()
        # The backend detaches first: a fault handler that is late must not meet another mapping at
        # this address. If the backend is gone, do not wait for it.
        with contextlib.suppress(CowshedError):
            if self._connection.alive:
                detach(self._connection, _CLOSE_SECONDS)
        lib.region_deinit(self._region)
        self._connection.close()

    def forget(self) -> None:
        """In a forked child: close the copies of the descriptors; the pages are not here."""
        if self._state == "open":
            self._state = "forked"
            lib.region_forget(self._region)
            if self._following is not None:
                self._following.forget()
        self._lock = threading.Lock()
        self._connection.close()

    def _stop_following(self) -> None:
        if self._following is not None:
            self._following.stop()

    def _far(self) -> ByteDisk:
        """The disk by bytes, at the backend that has the guest."""
        assert self._following is not None
        return self._following.far()

    def _check_range(self, what: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise UsageError(
                f"{what} of {length} bytes at {offset} is outside image {self.image!r}; "
                f"stay within its {self.size_bytes} bytes"
            )

    def _unusable(self) -> UsageError:
        if self._state == "forked":
            return UsageError(f"disk {self.image!r} was opened before a fork; open it again here")
        return UsageError(f"disk {self.image!r} is closed; open it again")

    def _begin(self) -> None:
        with self._lock:
            if self._state != "open":
                raise self._unusable()
            self._nr_busy += 1

    def _end(self) -> None:
        with self._lock:
            self._nr_busy -= 1

    def _copy(
        self,
        what: str,
        copy: Callable[[StructRegion, int, Pointer[bytes], int], int],
        offset: int,
        ours: Pointer[bytes],
        length: int,
    ) -> bool:
        """Copy; False if the disk went on by bytes, and the caller must repeat the call there."""
        done = 0
        self._begin()
        try:
            while done < length:
                if not self.mapped:
                    return False
                slice_bytes = min(length - done, _SLICE_BYTES)
                copied = copy(self._region, offset + done, ours + done, slice_bytes)
                if copied < 0 and self.mapped:
                    raise self._copy_error(what, -copied, offset, done, length)
                done += max(0, copied)
        finally:
            self._end()
        return True

    def _copy_error(self, what: str, code: int, offset: int, done: int, length: int) -> OSError:
        page_offset = (offset + done) // PAGE_BYTES * PAGE_BYTES
        return OSError(
            code,
            f"{what} of {length} bytes at {offset} of image {self.image!r} failed after {done}: "
            f"no page at {page_offset}; see the backend's log",
        )
