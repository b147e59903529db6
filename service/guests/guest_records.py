# SPDX-License-Identifier: Apache-2.0
"""The groups by which attached guests outlive this backend, and their adoption by a successor.

Each mapping is a group of its own: a record of its request, the ledger, the guest's quota, its
userfaultfd, /proc files and socket. The socket is held because the guest takes its end for the end
of the backend. A peer without a mapping, or with an unfinished handshake, reconnects instead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

from cowshed.accounting import QuotaPolicy
from cowshed.cache import CowshedError, Image, PageStore
from cowshed.faults import FaultOptions
from cowshed.service.guests.guests import GuestProcess, GuestTable, Mapping, OpenRequest
from cowshed.service.persist.fd_store import FdStore, kind_of
from cowshed.service.persist.inherited import (
    InheritedFds,
    Kinds,
    record_is_open,
    record_make,
    record_read,
)
from cowshed.service.persist.restoring import has_kinds, new_group, restore_groups
from cowshed.service.runtime.logs import EventLog
from cowshed.transport import Connection, adopt_connection

__all__ = ["GuestRecords", "RestoredGuest", "describe_request", "image_of_record", "request_of"]

_log = EventLog("cowshed.guests")

_PREFIX: Final = "mapping/"
_KINDS: Final = {"record", "ledger", "quota", "uffd", "pagemap", "mem", "socket"}
# The file, in memory or on disk, of preloaded pages that the guest has not touched yet.
_PRELOADED: Final = frozenset({"overlay", "pages"})


@dataclass(frozen=True)
class RestoredGuest:
    """A restored mapping, its connection and its group.

    tag is that of a request whose reply may not have been sent, None if it was.
    """

    mapping: Mapping
    connection: Connection
    request: OpenRequest
    group: str
    tag: int | None


class GuestRecords:
    """Has the keeper hold mappings, and adopts those it held. In the loop's thread.

    Invariant: _preloaded has, by group, a duplicate of the group's preload file. The account closes
    its own descriptor once the guest's memory has all pages, and the number is reused, but the
    group may have to be given to another keeper at any time.
    """

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store
        self._preloaded: dict[str, int] = {}

    def keep(self, mapping: Mapping, connection: Connection, request: OpenRequest, tag: int) -> str:
        """Have the keeper hold a mapping; return the group's name.

        The record becomes the last of the mapping's descriptors. The caller must record_close() it
        once the reply to that tag is sent: our successor cannot know otherwise.
        """
        group = new_group(_PREFIX)
        record = record_make({**describe_request(request), "tag": tag})
        mapping.fds.append(record)
        fds = [*mapping.fds, mapping.account.fd, mapping.guest.quota.fd, connection.fileno()]
        if (preload_fd := mapping.account.copy_preload_fd()) >= 0:
            if kind_of(preload_fd) in _PRELOADED:
                self._preloaded[group] = preload_fd
                fds.append(preload_fd)
            else:
                os.close(preload_fd)
        self._fd_store.keep(group, fds, guest=mapping.name, image=mapping.image.label)
        return group

    def release(self, group: str) -> None:
        """Have the keeper release a mapping; must precede closing its descriptors."""
        if group:
            self._fd_store.release(group)
            self._close_preloaded(group)

    def _close_preloaded(self, group: str) -> None:
        preload_fd = self._preloaded.pop(group, -1)
        if preload_fd >= 0:
            os.close(preload_fd)

    def adopt(
        self, inherited: InheritedFds, store: PageStore, guests: GuestTable
    ) -> list[RestoredGuest]:
        """Restore all mappings that our predecessor served, also of guests that died meanwhile."""
        return restore_groups(
            inherited,
            _PREFIX,
            self._fd_store,
            lambda group, group_fds: self._adopt(group, group_fds, store, guests),
        )

    def _adopt(
        self, group: str, group_fds: Kinds, store: PageStore, guests: GuestTable
    ) -> RestoredGuest | None:
        """Adopt one mapping and its descriptors; on failure return None and take no descriptor."""
        if not has_kinds(group_fds, _KINDS, _PRELOADED):
            return None
        preload_kind = next(iter(group_fds.keys() & _PRELOADED), "")
        record = record_read(group_fds["record"])
        tag = record["tag"] if record_is_open(group_fds["record"]) else None
        request = request_of(record, store)
        if request is None:
            return None
        image = request.image
        connection = adopt_connection(os.dup(group_fds["socket"]))
        peer = GuestProcess(
            connection.peer.pid,
            connection.peer.uid,
            -1 if connection.peer.pidfd is None else connection.peer.pidfd,
        )
        guest = guests.adopt(request, peer, os.dup(group_fds["quota"]))
        try:
            fds = [group_fds["uffd"], group_fds["pagemap"], group_fds["mem"], group_fds["record"]]
            mapping = guests.attach_again(
                guest,
                request.options,
                peer,
                os.dup(group_fds["ledger"]),
                fds,
                preload_fd=group_fds.get(preload_kind, -1),
            )
        except CowshedError as error:
            # The account was closed just before the backend died, or it is damaged.
            _log.info("guest-left", str(error), guest=request.name, image=image.label)
            guests.release(guest)
            connection.close()
            return None
        mapping.carries = request.carries
        for name in ("ledger", "quota", "socket"):
            os.close(group_fds[name])
        if preload_kind:
            self._preloaded[group] = group_fds[preload_kind]
        group_fds.update(
            ledger=mapping.account.fd, quota=guest.quota.fd, socket=connection.fileno()
        )
        self._fd_store.keep(group, [*group_fds.values()])
        return RestoredGuest(mapping, connection, request, group, tag)


def describe_request(request: OpenRequest) -> dict[str, Any]:
    """Return a request's fields of a record."""
    return {
        "guest": request.name,
        "domain": request.image.domain,
        "image": request.image.name,
        "token": request.token,
        "offset_bytes": request.offset_bytes,
        "length_bytes": request.length_bytes,
        "quota_bytes": request.quota_bytes,
        "policy": int(request.policy),
        "window_bytes": request.options.window_bytes,
        "write_window_bytes": request.options.write_window_bytes,
        "carries": request.carries,
        "read_only": request.read_only,
    }


def request_of(record: dict[str, Any], store: PageStore) -> OpenRequest | None:
    """Return the recorded request; log and return None if its image is no longer served."""
    image = image_of_record(record, store)
    if image is None:
        _log.error(
            "guest-lost",
            "its image is no longer served",
            guest=record["guest"],
            image=record["image"],
        )
        return None
    return OpenRequest(
        name=record["guest"],
        image=image,
        quota_bytes=record["quota_bytes"],
        policy=QuotaPolicy(record["policy"]),
        options=FaultOptions(record["window_bytes"], record["write_window_bytes"]),
        token=record["token"],
        offset_bytes=record["offset_bytes"],
        length_bytes=record["length_bytes"],
        carries=record.get("carries") is True,
        read_only=record.get("read_only") is True,
    )


def image_of_record(record: dict[str, Any], store: PageStore) -> Image | None:
    """Return the image of a record; None if it is no longer served."""
    wanted = record["domain"], record["image"]
    return next((image for image in store if (image.domain, image.name) == wanted), None)
