# SPDX-License-Identifier: Apache-2.0
"""The table of guests and their mappings, from the end of the handshake until detached.

A guest is a name with a quota. It has mappings, one per connection, of one process or several, all
charged to the quota. A guest exists as long as a connection has its name, and is attached as long
as it has a mapping.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass, field
from typing import Final

from cowshed.accounting import (
    NO_QUOTA_BYTES,
    Account,
    AccountStatus,
    Quota,
    QuotaPolicy,
    Region,
    add_statuses,
)
from cowshed.cache import Image, InvariantError, UsageError
from cowshed.faults import FaultHandler, FaultOptions, PopulateHandler, PopulateOptions
from cowshed.service.settings.names import find_for_operator
from cowshed.transport.links.no_room import taking_in

__all__ = ["Guest", "GuestProcess", "GuestTable", "Mapping", "OpenRequest"]


@dataclass(frozen=True)
class GuestProcess:
    """The process at the other end of a connection; pidfd is -1 if the kernel gives none."""

    pid: int
    uid: int
    pidfd: int = -1


@dataclass(frozen=True)
class OpenRequest:
    """A connection's request to open an image, checked; quota_bytes None: no quota.

    With a token, other connections of the same user and image that know it join the guest, and
    share its quota. offset_bytes and length_bytes are the part of the image to map. carries: when
    the guest is moved, the program itself takes along the mapping's private pages. read_only: it
    does not write the mapping, so that open regions are not charged.
    """

    name: str
    image: Image
    quota_bytes: int | None
    policy: QuotaPolicy
    options: FaultOptions
    token: str | None = None
    offset_bytes: int = 0
    length_bytes: int = 0
    carries: bool = False
    read_only: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """The guest's key: names are unique within a domain."""
        return self.image.domain, self.name


class Guest:
    """A reserved name, its quota and its mappings.

    Changed by the table alone. nr_connections counts the connections that have the name.
    """

    def __init__(self, request: OpenRequest, owner: GuestProcess, quota: Quota) -> None:
        self.request: Final = request
        self.owner: Final = owner
        self.quota: Final = quota
        self.mappings: list[Mapping] = []
        self.nr_connections = 1

    @property
    def name(self) -> str:
        """The guest's name, unique among those of its domain."""
        return self.request.name

    @property
    def domain(self) -> str:
        """The sharing domain: its image's."""
        return self.request.image.domain

    @property
    def image(self) -> Image:
        """The image it uses."""
        return self.request.image

    @property
    def uid(self) -> int:
        """The user who owns the guest."""
        return self.owner.uid

    @property
    def pid(self) -> int:
        """The process of the first of its mappings."""
        return self.mappings[0].pid if self.mappings else self.owner.pid

    @property
    def transport(self) -> str:
        """The transport of its first mapping."""
        return self.mappings[0].transport if self.mappings else "unix"

    @property
    def quota_bytes(self) -> int | None:
        """The limit of its private pages, None if there is no quota."""
        return self.quota.limit_bytes

    @property
    def is_attached(self) -> bool:
        """Whether it has a mapping, and not only a name."""
        return bool(self.mappings)

    @property
    def is_parked(self) -> bool:
        """Whether it has mappings, and the connections of all of them are lost."""
        return bool(self.mappings) and all(mapping.is_parked for mapping in self.mappings)

    def admits(self, request: OpenRequest, peer: GuestProcess) -> bool:
        """Whether a connection may join: it knows the token, and is of the same user and image."""
        ours, theirs = self.request.token, request.token
        return (
            ours is not None
            and theirs is not None
            and hmac.compare_digest(ours.encode(), theirs.encode())
            and (peer.uid, request.image) == (self.owner.uid, self.image)
        )

    def set_quota(self, quota_bytes: int | None) -> None:
        """Change the quota (None: no limit), and retry the faults stopped at it."""
        self.quota.set_quota(
            NO_QUOTA_BYTES if quota_bytes is None else quota_bytes, self.request.policy
        )
        self.shrink()
        self.resume()

    def resume(self) -> None:
        """Retry the faults stopped at the quota."""
        for mapping in self.mappings:
            mapping.handler.resume()

    def shrink(self) -> None:
        """Close open regions while more than the quota is charged."""
        for mapping in self.mappings:
            mapping.account.shrink()

    def settle(self) -> None:
        """Give back charges whose copies never happened."""
        for mapping in self.mappings:
            mapping.account.settle()

    def status(self) -> AccountStatus | None:
        """Return the sum of its accounts' statuses; None if it has none."""
        return self.pick(
            {each.account_no: each.account.status() for each in self.mappings},
        )

    def pick(self, statuses: ReadOnlyDict[int, AccountStatus]) -> AccountStatus | None:
        """Return the sum of its accounts in statuses, by number; None if there are none."""
        own = [statuses[each.account_no] for each in self.mappings if each.account_no in statuses]
        return add_statuses(own) if own else None

    def granted_bytes(self, status: AccountStatus) -> int:
        """The bytes it may map, by a status of its accounts."""
        most = len(self.mappings) * self.image.map_bytes
        return min(status.granted_extents * self.image.extent_bytes, most)


@dataclass(eq=False)
class Mapping:
    """What one connection has mapped. Owns the descriptors in fds, until detach.

    is_parked: the connection has ended without "close", and the memory lives. carries: as in
    OpenRequest.
    """

    guest: Guest
    peer: GuestProcess
    transport: str
    account: Account
    handler: FaultHandler
    fds: list[int]
    attached_ns: int = field(default_factory=time.monotonic_ns)
    logged_state: str = "running"
    is_parked: bool = False
    carries: bool = False
    account_no: int = field(init=False)

    def __post_init__(self) -> None:
        self.account_no = self.account.number

    @property
    def name(self) -> str:
        """Its guest's name."""
        return self.guest.name

    @property
    def image(self) -> Image:
        """Its guest's image."""
        return self.guest.image

    @property
    def pid(self) -> int:
        """The process that has the mapping."""
        return self.peer.pid

    @property
    def uid(self) -> int:
        """That process's user."""
        return self.peer.uid


class GuestTable:
    """All guests, by domain and name; iterating gives those attached.

    Callers that read accounts must hold `table.lock`.

    Invariants: (1) a guest is in the table, by its name, exactly while connections have the name;
    (2) no name is taken twice; (3) each mapping has a connection of its own, and an open account.
    The counters of mappings that were detached are in their image's sums.
    """

    def __init__(self) -> None:
        self.lock: Final = threading.RLock()
        self._guests: dict[tuple[str, str], Guest] = {}
        self._kept_names: set[tuple[str, str]] = set()

    def __iter__(self) -> Iterator[Guest]:
        return iter([guest for guest in list(self._guests.values()) if guest.is_attached])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check(self) -> None:
        """Recompute the invariants, and those of all accounts. Raises InvariantError."""
        with self.lock:
            for key, guest in self._guests.items():
                if key != guest.request.key or guest.nr_connections < 1:
                    raise InvariantError(
                        f"guests (1): {key} has {guest.nr_connections} connections"
                    )
                if key in self._kept_names:
                    raise InvariantError(f"guests (2): {key} is the name of an overlay too")
                if any(mapping.guest is not guest for mapping in guest.mappings) or (
                    len(guest.mappings) > guest.nr_connections
                ):
                    raise InvariantError(
                        f"guests (3): {key} has {len(guest.mappings)} mappings, "
                        f"{guest.nr_connections} connections"
                    )
                for mapping in guest.mappings:
                    mapping.account.check()

    def find(self, text: str) -> Guest:
        """Return the attached guest of NAME or DOMAIN/NAME; UsageError unless it is exactly one."""
        return find_for_operator(self, text, "guest")

    @taking_in()
    def reserve(self, request: OpenRequest, peer: GuestProcess) -> Guest:
        """Make a guest for a connection about to attach, or let it join the existing one.

        UsageError if the name is taken; the message names the owner to root only. CapacityError if
        there is no room. The caller must release() it once.
        """
        with self.lock:
            guest = self._guests.get(request.key)
            if guest is None:
                self.check_free(request)
                quota_bytes = NO_QUOTA_BYTES if request.quota_bytes is None else request.quota_bytes
                guest = Guest(request, peer, Quota(quota_bytes, request.policy))
                self._guests[request.key] = guest
                return guest
            if not guest.admits(request, peer):
                by = f" by uid {guest.uid}, process {guest.pid}" if peer.uid == 0 else ""
                raise UsageError(f"guest name {request.name!r} is taken{by}{_cure(guest)}")
            guest.nr_connections += 1
            return guest

    def adopt(self, request: OpenRequest, peer: GuestProcess, quota_fd: int) -> Guest:
        """Restore a guest for one of its inherited connections; the caller must release() it once.

        Takes over quota_fd; another of the guest's connections may have brought the same memfd.
        """
        with self.lock:
            guest = self._guests.get(request.key)
            if guest is not None:
                os.close(quota_fd)
                guest.nr_connections += 1
                return guest
            guest = Guest(request, peer, Quota.adopt(quota_fd))
            self._guests[request.key] = guest
            return guest

    def release(self, guest: Guest) -> None:
        """Give the name back for one connection; the last one ends the guest."""
        with self.lock:
            guest.nr_connections -= 1
            if guest.nr_connections == 0:
                del self._guests[guest.request.key]
                guest.quota.close()

    def has(self, key: tuple[str, str]) -> bool:
        """Whether a connection has the name."""
        return key in self._guests

    def has_joined(self, request: OpenRequest, peer: GuestProcess) -> bool:
        """Whether reserve() would let the connection join an existing guest."""
        guest = self._guests.get(request.key)
        return guest is not None and guest.admits(request, peer)

    def check_free(self, request: OpenRequest) -> None:
        """Raise UsageError if a name is taken."""
        self.check_name(*request.key)

    def check_name(self, domain: str, name: str) -> None:
        """Raise UsageError if a name is taken in a domain."""
        if (domain, name) in self._guests or (domain, name) in self._kept_names:
            raise UsageError(f"guest name {name!r} is taken; choose another, or detach that guest")

    def reserve_name(self, request: OpenRequest) -> None:
        """Take a name for a guest that is not in this table; UsageError if it is taken."""
        with self.lock:
            self.check_free(request)
            self._kept_names.add(request.key)

    def release_name(self, request: OpenRequest) -> None:
        """Give back a name of reserve_name()."""
        with self.lock:
            self._kept_names.discard(request.key)

    @taking_in()
    def attach(
        self,
        guest: Guest,
        options: FaultOptions,
        peer: GuestProcess,
        regions: Sequence[Region],
        fds: list[int],
        *,
        inherited: bool = False,
        transport: str = "unix",
        populate: PopulateOptions | None = None,
        preload: tuple[int, bytes] | None = None,
        keep: Callable[[Account], None] | None = None,
        read_only: bool = False,
    ) -> Mapping:
        """Start answering a mapping; takes fds, [uffd, pagemap, mem], over on success only.

        inherited: the memory came over fork, and its private pages are charged. preload is the
        private pages that it begins with: a file of them, and their bitmap (Account.preload). With
        populate, pages are copied into the guest's own memory; fds may then be [uffd] alone. keep
        is called before any event is read, since an event, once read, is in the account alone.
        read_only is OpenRequest's.
        On failure nothing is left of the mapping. Raises UsageError for invalid regions
        (Account.place), CapacityError if no descriptor, thread or memory is left for it.
        """
        with contextlib.ExitStack() as stack:
            account = Account(guest.image, guest.quota)
            stack.callback(account.close)
            account.set_read_only(read_only)
            account.place(fds[0], fds[1] if len(fds) > 1 else -1, regions)
            if preload is not None:
                account.preload(*preload)
            arguments = (account.cdata, fds[0], peer.pidfd, options)
            if keep is not None:
                keep(account)
            handler = (
                FaultHandler(*arguments)
                if populate is None
                else PopulateHandler(*arguments, populate)
            )
            stack.callback(handler.stop)
            if inherited:
                account.adopt_private()
            stack.pop_all()
        mapping = Mapping(guest, peer, transport, account, handler, fds)
        with self.lock:
            guest.mappings.append(mapping)
            guest.image.note_attach()
        os.eventfd_write(guest.image.store.wanted_fd, 1)  # what is pinned is opened for it
        return mapping

    def attach_again(
        self,
        guest: Guest,
        options: FaultOptions,
        peer: GuestProcess,
        ledger_fd: int,
        fds: list[int],
        transport: str = "unix",
        preload_fd: int = -1,
        populate: PopulateOptions | None = None,
    ) -> Mapping:
        """Answer a mapping that another process answered; its waiting faults are retried.

        Takes ledger_fd over, and fds (as for attach()) on success only. Raises InvariantError if
        ledger_fd is no account, or a closed one.
        """
        with contextlib.ExitStack() as stack:
            try:
                account = Account(guest.image, guest.quota, ledger_fd)
            except BaseException:
                os.close(ledger_fd)
                raise
            stack.callback(account.close)
            account.place(fds[0], fds[1] if len(fds) > 1 else -1, account.regions())
            if preload_fd >= 0:
                account.adopt_preloaded(preload_fd)
            arguments = (account.cdata, fds[0], peer.pidfd, options)
            handler = (
                FaultHandler(*arguments)
                if populate is None
                else PopulateHandler(*arguments, populate)
            )
            stack.pop_all()
        account.finish_opening()
        handler.resume()
        mapping = Mapping(guest, peer, transport, account, handler, fds)
        with self.lock:
            guest.mappings.append(mapping)
        return mapping

    def detach(self, mapping: Mapping) -> None:
        """Stop answering a mapping, return its grants and charges, close its descriptors."""
        with self.lock:
            mapping.guest.mappings.remove(mapping)
            mapping.handler.stop()
            mapping.account.close()
            mapping.guest.resume()
        for fd in mapping.fds:
            os.close(fd)

    def settle(self, guest: Guest) -> None:
        """Settle a guest's charges, on the mappings still attached."""
        with self.lock:
            guest.settle()

    @contextlib.contextmanager
    def accounts(self, image: Image) -> Iterator[dict[str, Account]]:
        """Yield the accounts of an image by guest name, kept open inside `with`.

        A guest's second mapping is NAME#2, the next NAME#3, and so on.
        """
        with self.lock:
            yield {
                guest.name if no == 1 else f"{guest.name}#{no}": mapping.account
                for guest in self
                if guest.image is image
                for no, mapping in enumerate(guest.mappings, 1)
            }


def _cure(guest: Guest) -> str:
    if guest.is_parked:
        return (
            ": it closed its connection and still has the image mapped; choose another, "
            "or end that process"
        )
    return "; choose another, or detach that guest"
