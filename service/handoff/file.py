# SPDX-License-Identifier: Apache-2.0
"""The state of a backend as a file: written while guests go on, read back whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cowshed.cache import Image, UsageError
from cowshed.service.handoff.drain import say_blockers
from cowshed.service.handoff.link import FileLink, Link, SocketLink, open_link
from cowshed.service.handoff.moving import Moving
from cowshed.service.handoff.receiver import Receiver, wait_for_digests
from cowshed.service.handoff.sender import Progress, Sender
from cowshed.service.images.working_sets import WorkingSets
from cowshed.transport.handoff_sections import (
    End,
    GuestSection,
    Header,
    ImageSection,
    StateReader,
    WorkingSetSection,
)

__all__ = ["export_state", "import_state"]

Body = dict[str, Any]

_REPORT_SECONDS = 0.2


def export_state(
    fd: int, images: Sequence[Image], moving: Sequence[Moving], working_sets: WorkingSets
) -> Iterator[Body]:
    """Write every guest to fd, which is taken over; gives progress, then what was written.

    Guests go on meanwhile, but for the last pages: all are as of one moment, the freeze. Raises
    UsageError naming who cannot be exported; nothing but bytes in the file is left behind then.
    """
    link = open_link(fd)
    progress = Progress()
    try:
        blockers = wait_for_digests([each.image for each in moving], lambda: None)
        blockers += [
            {"guest": each.name, "reason": reason} for each in moving for reason in each.blockers()
        ]
        if blockers:
            raise UsageError(say_blockers("export", blockers))
        known = [image for image in images if image.digest]
        sender = Sender(link, moving, known, progress)
        yield from _watched(lambda: _write(link, sender, working_sets), progress)
        yield {
            "guests": len(moving),
            "images": len(known),
            "frozen_seconds": round(progress.frozen_seconds, 6),
            **progress.as_json(),
        }
    finally:
        link.close()


def _write(
    link: SocketLink | FileLink,
    sender: Sender,
    working_sets: WorkingSets,
) -> None:
    sender.offer(secrets.token_hex(16))
    sender.send_working_sets(working_sets)
    try:
        sender.track()
        sender.send_private()
        sender.send_until_few()
        sender.freeze()
        sender.send_last()
    finally:
        sender.thaw()
    if isinstance(link, FileLink):
        link.make_durable()


def _watched(call: Callable[[], None], progress: Progress) -> Iterator[Body]:
    """Run call in a thread and tell how far it is; raises what it does."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="export", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_REPORT_SECONDS)
        yield {"progress": progress.as_json()}
    if failed:
        raise failed[0]


def import_state(fd: int, receiver: Receiver) -> Iterator[Body]:
    """Read guests from fd, which is taken over, and admit them all once all are here and right.

    Raises DamagedError with the place, UsageError for what cannot be here: nothing is left then.
    """
    link = open_link(fd)
    size_bytes = os.fstat(fd).st_size if stat.S_ISREG(os.fstat(fd).st_mode) else None
    extents: list[WorkingSetSection] = []
    reader = StateReader()
    try:
        yield from _read(link, reader, receiver, extents, size_bytes)
        names = receiver.admit()
    except BaseException:
        receiver.discard()
        raise
    finally:
        link.close()
    for section in extents:
        for _ in receiver.warm(section):
            yield {"progress": {"done_bytes": reader.offset, "total_bytes": size_bytes}}
    yield {"guests": names, "images": len(reader.images), "private_bytes": receiver.total_bytes}


def _read(
    link: Link,
    reader: StateReader,
    receiver: Receiver,
    extents: list[WorkingSetSection],
    size_bytes: int | None,
) -> Iterator[Body]:
    checked = False
    while raw := link.receive():
        for section in reader.feed(raw):
            if isinstance(section, Header | ImageSection | GuestSection):
                continue
            if not checked:
                checked = True
                if blockers := receiver.check(reader, lambda: None):
                    raise UsageError(say_blockers("import", blockers))
            if isinstance(section, WorkingSetSection):
                extents.append(section)
            elif isinstance(section, End):
                receiver.finish(reader)
            else:
                receiver.take(section)
        yield {"progress": {"done_bytes": reader.offset, "total_bytes": size_bytes}}
    reader.end()
