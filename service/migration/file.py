# SPDX-License-Identifier: Apache-2.0
"""The state of a backend as a file: written while guests run, read back whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from cowshed.cache import Image, PeerError, UsageError
from cowshed.service.images.working_sets import WorkingSets
from cowshed.service.migration.blockers import print_blockers, wait_for_digests
from cowshed.service.migration.link import FileLink, Link, SocketLink, open_link
from cowshed.service.migration.migrating import MigratingGuest
from cowshed.service.migration.receiver import Receiver
from cowshed.service.migration.resumption import Prefix, read_prefix
from cowshed.service.migration.sender import Progress, Sender
from cowshed.service.settings.domains import DomainMembers
from cowshed.transport.handoff.sections import (
    End,
    GuestSection,
    Header,
    ImageSection,
    ImageWhole,
    StateReader,
    WorkingSetSection,
)
from cowshed.transport.links.no_room import start_thread

__all__ = ["export_state", "import_state"]

Body = dict[str, Any]

_REPORT_SECONDS = 0.2


class ExportHost(Protocol):
    """The part of the daemon that an export uses; a part of DrainHost."""

    @property
    def working_sets(self) -> WorkingSets:
        """The recorded working sets."""

    def images(self) -> list[Image]:
        """Return the images served."""

    def allowed(self, image: Image) -> DomainMembers | None:
        """Return who of its domain may use an image; None: all of the domain."""

    def migrating(self) -> list[MigratingGuest]:
        """Return every guest there is now."""


def export_state(
    fd: int, host: ExportHost, *, with_images: bool = False, resume: bool = False
) -> Iterator[Body]:
    """Write every guest to fd, which is taken over; yields progress, then the totals.

    Guests run meanwhile, except while the last pages are written: all pages are as of one moment,
    the freeze. with_images: write the bytes of images, too. resume: continue the file of an
    interrupted export, which determines whether it has images' bytes. Raises UsageError naming the
    guests that cannot be exported; only bytes in the file are left behind then.
    """
    stopping = threading.Event()

    def look() -> None:
        if stopping.is_set():
            raise PeerError("export cancelled: the client that asked for it disconnected")

    link = open_link(fd, look)
    progress = Progress()
    try:
        export = _Export(fd, link, host, progress, look)
        yield from _watched(lambda: export.write(with_images, resume), progress.as_json, stopping)
        yield {
            "guests": len(export.migrating),
            "images": len(export.images),
            "kept_bytes": export.kept_bytes,
            "frozen_seconds": round(progress.frozen_seconds, 6),
            **progress.as_json(),
        }
    finally:
        link.close()


class _Export:
    """One export, in a thread."""

    def __init__(
        self,
        fd: int,
        link: SocketLink | FileLink,
        host: ExportHost,
        progress: Progress,
        look: Callable[[], None],
    ) -> None:
        """fd is the link's."""
        self._fd = fd
        self._link = link
        self._host = host
        self._progress = progress
        self._look = look
        self.migrating: list[MigratingGuest] = []
        self.images: list[Image] = []
        self.kept_bytes = 0

    def write(self, with_images: bool, resume: bool) -> None:
        """Write the whole export."""
        host = self._host
        images, migrating = host.images(), host.migrating()
        used = [each.image for each in migrating]
        awaited = [each for each in images if with_images or resume or each in used]
        blockers = wait_for_digests(awaited, self._look)
        blockers += [
            {"guest": each.name, "reason": reason}
            for each in migrating
            for reason in each.blockers()
        ]
        if blockers:
            raise UsageError(print_blockers("export", blockers))
        prefix = read_prefix(self._fd, self._look) if resume else None
        if prefix is None:
            self.images = [image for image in images if image.digest]
            self.migrating = migrating
        else:
            self.images, self.migrating = prefix.find_images(images), prefix.find_guests(migrating)
            self.kept_bytes = prefix.mark.offset
        if isinstance(self._link, FileLink) and resume:
            self._link.cut(self.kept_bytes)
        sender = Sender(self._link, self.migrating, self.images, self._progress, prefix)
        if prefix is None:
            sender.offer(secrets.token_hex(16), with_images=with_images, allowed=host.allowed)
            self._send(sender, range(len(self.images)) if with_images else (), None)
        else:
            left = [no for no, image in enumerate(prefix.images) if image.has_bytes]
            self._send(sender, [no for no in left if no not in prefix.whole], prefix)

    def _send(self, sender: Sender, with_bytes: Iterable[int], prefix: Prefix | None) -> None:
        working_sets = self._host.working_sets
        for no in with_bytes:
            hot = working_sets.recorded(self.images[no])
            sender.send_image(no, hot, self._look, prefix.image_pages[no] if prefix else None)
        sender.send_working_sets(working_sets, prefix.working_sets if prefix else ())
        try:
            sender.track()
            sender.send_private()
            sender.send_until_few()
            sender.freeze()
            sender.send_last()
        finally:
            sender.thaw()
        if isinstance(self._link, FileLink):
            self._link.make_durable()


def _watched(
    call: Callable[[], None], report: Callable[[], Body], stopping: threading.Event
) -> Iterator[Body]:
    """Run call in a thread; yield its progress, the last time at its end; raise what it raises.

    Closing this generator cancels the call: it sets stopping, and joins the thread.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="export", daemon=True)
    start_thread(thread)
    try:
        is_over = False
        while not is_over:
            thread.join(_REPORT_SECONDS)
            is_over = not thread.is_alive()
            yield {"progress": report()}
    finally:
        stopping.set()
        thread.join()
    if failed:
        raise failed[0]


def import_state(fd: int, receiver: Receiver) -> Iterator[Body]:
    """Read guests from fd, which is taken over, and admit them all once all are complete.

    Raises DamagedError with the offset, UsageError naming the blockers; nothing is left then.
    """
    stopping = threading.Event()

    def look() -> None:
        if stopping.is_set():
            raise PeerError("import cancelled: the client that asked for it disconnected")

    link = open_link(fd, look)
    size_bytes = os.fstat(fd).st_size if stat.S_ISREG(os.fstat(fd).st_mode) else None
    extents: list[WorkingSetSection] = []
    reader = StateReader()
    try:
        yield from _watched(
            lambda: _read(link, reader, receiver, extents, look),
            lambda: {"done_bytes": reader.offset, "total_bytes": size_bytes},
            stopping,
        )
        names = receiver.admit(is_owned=False)
    except BaseException:
        receiver.discard()
        raise
    finally:
        link.close()
    for section in extents:
        for _ in receiver.warm(section):
            yield {"progress": {"done_bytes": reader.offset, "total_bytes": size_bytes}}
    yield {
        "guests": names,
        "images": len(reader.images),
        "private_bytes": receiver.total_bytes,
        "image_bytes": receiver.image_bytes,
    }


def _read(
    link: Link,
    reader: StateReader,
    receiver: Receiver,
    extents: list[WorkingSetSection],
    look: Callable[[], None],
) -> None:
    checked = False
    while nr_bytes := link.receive_into(reader.room()):
        for section in reader.advance(nr_bytes):
            if isinstance(section, Header | ImageSection | GuestSection):
                continue
            if not checked:
                checked = True
                if blockers := receiver.check(reader, look):
                    raise UsageError(print_blockers("import", blockers))
            if isinstance(section, WorkingSetSection):
                extents.append(section)
            elif isinstance(section, ImageWhole):
                if (source := receiver.seal(section.image, look)) is not None:
                    receiver.open(section.image, source)
            elif isinstance(section, End):
                receiver.finish(reader)
            else:
                receiver.take(section)
    reader.end()
