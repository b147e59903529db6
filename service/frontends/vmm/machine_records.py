# SPDX-License-Identifier: Apache-2.0
"""The groups by which VMMs' connections outlive this backend, and their adoption by a successor.

The keeper holds a connection from its first moment (a "caller": the socket, and a record of its
image), because a VMM sends its handshake once and never reconnects. Requests are peeked at before
they are received (handshake_peer.py), so a successor can still read a handshake that was not
attached. An attached connection is a group of another kind: record, ledger, quota, userfaultfd and
socket, and /proc/PID/pagemap if it can be opened. Unanswered requests are dropped, and extents
that were not yet announced to the client are announced when it faults there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from cowshed.accounting import Account
from cowshed.cache import CowshedError, Image, PageStore
from cowshed.service.frontends.vmm.handshake_peer import HandshakePeer
from cowshed.service.frontends.vmm.populator import Populator
from cowshed.service.guests.guest_records import (
    describe_request,
    image_of_record,
    request_of,
)
from cowshed.service.guests.guests import Guest, GuestProcess, GuestTable, Mapping, OpenRequest
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import InheritedFds, Kinds, record_make, record_read
from cowshed.service.persist.restoring import has_kinds, new_group, restore_groups
from cowshed.service.runtime.logs import EventLog
from cowshed.transport.vmm.handshakes import MemoryRegion, Policy, VmmHandshake

__all__ = ["Caller", "MachineRecords", "RestoredMachine"]

_log = EventLog("cowshed.images")

_CALLER: Final = "caller/"
_POPULATED: Final = "supplied/"
_KINDS: Final = {"record", "ledger", "quota", "uffd", "socket"}


@dataclass(frozen=True)
class Caller:
    """A connection to an image's socket without a handshake yet, and its group."""

    peer: HandshakePeer
    image: Image
    group: str


@dataclass(frozen=True)
class RestoredMachine:
    """A restored guest: its connection, its handshake, and its group."""

    peer: HandshakePeer
    mapping: Mapping
    handshake: VmmHandshake
    group: str
    has_pagemap: bool


class MachineRecords:
    """Has the keeper hold connections and their guests' descriptors. In the loop's thread."""

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store

    def keep_caller(self, peer: HandshakePeer, image: Image) -> str:
        """Have the keeper hold a connection; return the group's name."""
        peer.record = record_make({"domain": image.domain, "image": image.name})
        return self._keep(_CALLER, [peer.record, peer.fileno()], image, "")

    def keep(
        self,
        guest: Guest,
        account: Account,
        fds: list[int],
        peer: HandshakePeer,
        handshake: VmmHandshake,
    ) -> str:
        """Have the keeper hold a guest about to be populated; return the group's name.

        Appends a record to fds, the mapping's descriptors. As long as the connection's caller group
        is held too, a successor charges the pages that were present before.
        """
        fds.append(record_make(_describe(guest.request, handshake)))
        held = [*fds, account.fd, guest.quota.fd, peer.fileno()]
        return self._keep(_POPULATED, held, guest.request.image, guest.name)

    def _keep(self, prefix: str, fds: list[int], image: Image, guest: str) -> str:
        group = new_group(prefix)
        self._fd_store.keep(group, fds, guest=guest or None, image=image.label)
        return group

    def release(self, group: str) -> None:
        """Have the keeper release a group; must precede closing its descriptors."""
        if group:
            self._fd_store.release(group)

    def adopt(
        self, inherited: InheritedFds, store: PageStore, guests: GuestTable, populator: Populator
    ) -> list[RestoredMachine]:
        """Restore the guests that the last backend populated.

        Must precede any eviction: it pins the extents that were lent to them again.
        """
        return restore_groups(
            inherited,
            _POPULATED,
            self._fd_store,
            lambda group, group_fds: self._adopt(group, group_fds, store, guests, populator),
        )

    def _adopt(
        self,
        group: str,
        group_fds: Kinds,
        store: PageStore,
        guests: GuestTable,
        populator: Populator,
    ) -> RestoredMachine | None:
        """Adopt one guest and its descriptors; on failure return None and take no descriptor."""
        if not has_kinds(group_fds, _KINDS, {"pagemap"}):
            return None
        record = record_read(group_fds["record"])
        request = request_of(record, store)
        if request is None:
            return None
        image, handshake = request.image, _handshake(record)
        peer = HandshakePeer(socket.socket(fileno=os.dup(group_fds["socket"])))
        if peer.pidfd is None:
            peer.close()
            _log.info("guest-left", "its process has ended", guest=request.name, image=image.label)
            return None
        who = GuestProcess(peer.pid, peer.uid, peer.pidfd)
        guest = guests.adopt(request, who, os.dup(group_fds["quota"]))
        fds = [group_fds["uffd"], *([group_fds["pagemap"]] if "pagemap" in group_fds else [])]
        try:
            mapping = guests.attach_again(
                guest,
                request.options,
                who,
                os.dup(group_fds["ledger"]),
                fds,
                transport=handshake.protocol,
                populate=populator.options(handshake, image),
            )
        except (CowshedError, OSError) as error:
            _log.warning("guest-left", str(error), guest=request.name, image=image.label)
            guests.release(guest)
            peer.close()
            return None
        mapping.fds.append(group_fds["record"])
        for name in ("ledger", "quota", "socket"):
            os.close(group_fds[name])
        fds = [*mapping.fds, mapping.account.fd, guest.quota.fd, peer.fileno()]
        self._fd_store.keep(group, fds)
        return RestoredMachine(peer, mapping, handshake, group, "pagemap" in group_fds)

    def adopt_callers(
        self, inherited: InheritedFds, store: PageStore, restored: Iterable[RestoredMachine]
    ) -> list[Caller]:
        """Adopt connections without a handshake, except those of restored guests."""
        attached = {os.fstat(machine.peer.fileno()).st_ino: machine for machine in restored}
        return restore_groups(
            inherited,
            _CALLER,
            self._fd_store,
            lambda group, group_fds: _adopt_caller(group, group_fds, store, attached),
        )


def _adopt_caller(
    group: str, group_fds: Kinds, store: PageStore, attached: dict[int, RestoredMachine]
) -> Caller | None:
    """Adopt one connection; attached has those of restored guests, by socket inode."""
    if not has_kinds(group_fds, {"record", "socket"}):
        return None
    if machine := attached.get(os.fstat(group_fds["socket"]).st_ino):
        if machine.has_pagemap:
            _look_at_memory(machine.mapping)
        return None
    image = image_of_record(record_read(group_fds["record"]), store)
    if image is None:
        return None
    peer = HandshakePeer(socket.socket(fileno=group_fds["socket"]))
    peer.record = group_fds["record"]
    return Caller(peer, image, group)


def _look_at_memory(mapping: Mapping) -> None:
    """Charge pages present before the handshake, which the last backend may not have done yet."""
    try:
        mapping.account.adopt_private()
    except OSError as error:
        _log.warning("unseen-memory", str(error), guest=mapping.guest.name)


def _describe(request: OpenRequest, handshake: VmmHandshake) -> dict[str, Any]:
    return {
        **describe_request(request),
        "protocol": handshake.protocol,
        "regions": [list(region) for region in handshake.regions],
        "sharing": int(handshake.policy),
        "prefault": handshake.prefault,
    }


def _handshake(record: dict[str, Any]) -> VmmHandshake:
    return VmmHandshake(
        protocol=record["protocol"],
        regions=tuple(MemoryRegion(*region) for region in record["regions"]),
        policy=Policy(record["sharing"]),
        prefault=record["prefault"],
    )
