# SPDX-License-Identifier: Apache-2.0
"""The guests: who is attached to which image, from the handshake's last word until detached.

A guest is a name with a quota. What it has mapped are its mappings, one a connection, of
one process or several; all draw on the quota. The guest is there as long as a connection holds its
name, and attached as long as it has a mapping.
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
    """The process at the other end of a connection; pidfd -1 if it cannot be had."""

    pid: int
    uid: int
    pidfd: int = -1


@dataclass(frozen=True)
class OpenRequest:
    """What a connection asked for, checked: quota_bytes None is no quota.

    With a token, other connections that know it, of the same user and image, join the guest; the
    quota is then the guest's. offset_bytes and length_bytes are the part of the image to be mapped.
    carries: in a move the program takes the mapping's private pages along itself.
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

    @property
    def key(self) -> tuple[str, str]:
        """What is unique among guests: names are, within a domain."""
        return self.image.domain, self.name


class Guest:
    """A name that somebody holds, its quota, and what is mapped under it.

    Changed by the table alone. nr_connections counts the connections that hold the name.
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
        """The sharing domain it is in: its image's."""
        return self.request.image.domain

    @property
    def image(self) -> Image:
        """The image it uses."""
        return self.request.image

    @property
    def uid(self) -> int:
        """The user whose guest it is."""
        return self.owner.uid

    @property
    def pid(self) -> int:
        """The process of the first of its mappings."""
        return self.mappings[0].pid if self.mappings else self.owner.pid

    @property
    def transport(self) -> str:
        """How it is connected."""
        return self.mappings[0].transport if self.mappings else "unix"

    @property
    def quota_bytes(self) -> int | None:
        """What its private pages may take, None if there is no quota."""
        return self.quota.limit_bytes

    @property
    def is_attached(self) -> bool:
        """Whether it uses the image, and does not just hold a name."""
        return bool(self.mappings)

    @property
    def is_parked(self) -> bool:
        """Whether nobody speaks for it any more, and yet it has something mapped."""
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
        """Change the quota, None being none, and have who is stopped at it ask again."""
        self.quota.set_quota(
            NO_QUOTA_BYTES if quota_bytes is None else quota_bytes, self.request.policy
        )
        self.resume()

    def resume(self) -> None:
        """Have who is stopped at the quota ask again."""
        for mapping in self.mappings:
            mapping.handler.resume()

    def settle(self) -> None:
        """Give back charges whose copies never happened."""
        for mapping in self.mappings:
            mapping.account.settle()

    def status(self) -> AccountStatus | None:
        """Read its accounts, together; None if it has none."""
        return self.pick(
            {each.account_no: each.account.status() for each in self.mappings},
        )

    def pick(self, statuses: ReadOnlyDict[int, AccountStatus]) -> AccountStatus | None:
        """Put together what is its of the accounts that were read, by number; None: nothing."""
        own = [statuses[each.account_no] for each in self.mappings if each.account_no in statuses]
        return add_statuses(own) if own else None

    def granted_bytes(self, status: AccountStatus) -> int:
        """What it may map, by a reading of its accounts."""
        most = len(self.mappings) * self.image.map_bytes
        return min(status.granted_extents * self.image.extent_bytes, most)


@dataclass(eq=False)
class Mapping:
    """What one connection has mapped. Owns the descriptors in fds; all lives until detach.

    is_parked: the connection has ended without a word, and the memory is there still. carries: as
    in OpenRequest.
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
        """The process whose memory it is."""
        return self.peer.pid

    @property
    def uid(self) -> int:
        """That process's user."""
        return self.peer.uid


class GuestTable:
    """All guests, by domain and name; iterating gives those attached.

    Whoever reads their accounts does so inside `with table.lock`.

    Invariants: (1) a guest is in the table, by its name, exactly while connections hold that;
    (2) no name is held twice; (3) a mapping is its guest's, and each has a connection of its own;
    its account is open as long. What mappings that are gone had counted is in their image's sums.
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
        """Give the attached guest that NAME or DOMAIN/NAME means; UsageError if not just one."""
        return find_for_operator(self, text, "guest")

    @taking_in()
    def reserve(self, request: OpenRequest, peer: GuestProcess) -> Guest:
        """Make a guest for a connection that is about to attach, or let it join the one there is.

        UsageError if the name is taken; whose it is only root is told. CapacityError if there is
        no room for it. release() it once.
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
        """Have a guest again that a connection held before our time; release() it once.

        Takes the memfd of its quota over, which the guest's other connections may have brought too.
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
        """A connection gives the name back; the last one ends the guest."""
        with self.lock:
            guest.nr_connections -= 1
            if guest.nr_connections == 0:
                del self._guests[guest.request.key]
                guest.quota.close()

    def has(self, key: tuple[str, str]) -> bool:
        """Whether a connection holds the name."""
        return key in self._guests

    def has_joined(self, request: OpenRequest, peer: GuestProcess) -> bool:
        """Whether there is a guest that reserve() would have a connection join."""
        guest = self._guests.get(request.key)
        return guest is not None and guest.admits(request, peer)

    def check_free(self, request: OpenRequest) -> None:
        """Raise UsageError if a name is taken."""
        self.check_name(*request.key)

    def check_name(self, domain: str, name: str) -> None:
        """The same, for a guest of whose image no more is known than its domain."""
        if (domain, name) in self._guests or (domain, name) in self._kept_names:
            raise UsageError(f"guest name {name!r} is taken; choose another, or detach that guest")

    def reserve_name(self, request: OpenRequest) -> None:
        """Take a name for a guest that is not in this table; UsageError if it is taken."""
        with self.lock:
            self.check_free(request)
            self._kept_names.add(request.key)

    def release_name(self, request: OpenRequest) -> None:
        """Give such a name back."""
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
    ) -> Mapping:
        """Start answering a mapping; fds are [uffd, pagemap, mem], its own on success only.

        inherited memory came over fork: what is private in it is charged. On failure nothing is
        left of the mapping. preload is the private pages that it begins with: a file that has them,
        and their bitmap (Account.preload). With populate its pages are copied into memory of its
        own; fds may then be [uffd] alone. keep is called before anything is answered: an event
        that is read is in the account alone. Raises UsageError for regions that make no sense
        (Account.place), CapacityError if there is no descriptor, thread or memory for it.
        """
        with contextlib.ExitStack() as stack:
            account = Account(guest.image, guest.quota)
            stack.callback(account.close)
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
        """Answer a mapping that another process answered; whoever waits there asks again.

        Takes ledger_fd over, fds, which are as attach() has them, on success only. Raises
        InvariantError if it is no account, or one that was closed.
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
        """Settle a guest's charges, where it is attached still."""
        with self.lock:
            guest.settle()

    @contextlib.contextmanager
    def accounts(self, image: Image) -> Iterator[dict[str, Account]]:
        """Give the accounts of an image by guest name, kept open inside `with`.

        The second mapping of a guest and those after are told apart by their number.
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
            ": it closed its connection and has the image mapped still; choose another, "
            "or end that process"
        )
    return "; choose another, or detach that guest"
