# SPDX-License-Identifier: Apache-2.0
"""The guests: who is attached to which image, from the handshake's last word until detached."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from cowshed.accounting import (
    NO_QUOTA_BYTES,
    Account,
    AccountStatus,
    Purse,
    QuotaPolicy,
    Region,
)
from cowshed.cache import Image, UsageError
from cowshed.faults import FaultHandler, Orders
from cowshed.service.names import find_for_operator

__all__ = ["Guest", "GuestTable", "Terms"]


@dataclass(frozen=True)
class Terms:
    """What a guest asked for, checked: quota_bytes None is no quota."""

    name: str
    image: Image
    quota_bytes: int | None
    policy: QuotaPolicy
    orders: Orders

    @property
    def key(self) -> tuple[str, str]:
        """What is unique among guests: names are, within a domain."""
        return self.image.domain, self.name


@dataclass
class Guest:
    """An attached guest. Owns the descriptors in fds; account and handler live until detach."""

    terms: Terms
    pid: int
    uid: int
    transport: str
    purse: Purse
    account: Account
    handler: FaultHandler
    fds: list[int]
    quota_bytes: int | None
    attached_ns: int = field(default_factory=time.monotonic_ns)
    said_state: str = "running"
    account_no: int = field(init=False)

    def __post_init__(self) -> None:
        self.account_no = self.account.status().account_no

    @property
    def name(self) -> str:
        """The guest's name, unique among those attached in its domain."""
        return self.terms.name

    @property
    def domain(self) -> str:
        """The sharing domain it is in: its image's."""
        return self.terms.image.domain

    @property
    def image(self) -> Image:
        """The image it uses."""
        return self.terms.image

    def granted_bytes(self, status: AccountStatus) -> int:
        """What it may map, by a reading of its account."""
        return min(status.granted_extents * self.image.extent_bytes, self.image.map_bytes)


class GuestTable:
    """All attached guests, by domain and name.

    Whoever reads their accounts does so inside `with table.lock`.

    Invariants: a name is reserved by at most one connection; an account is open exactly while its
    guest is in the table. What guests that left had counted is in their image's sums.
    """

    def __init__(self) -> None:
        self.lock: Final = threading.RLock()
        self._guests: dict[tuple[str, str], Guest] = {}
        self._reserved: set[tuple[str, str]] = set()

    def __iter__(self) -> Iterator[Guest]:
        return iter(list(self._guests.values()))

    def __len__(self) -> int:
        return len(self._guests)

    def find(self, text: str) -> Guest:
        """Give the attached guest that NAME or DOMAIN/NAME means; UsageError if not just one."""
        return find_for_operator(self, text, "guest")

    def reserve(self, terms: Terms) -> None:
        """Take a name for a connection that is about to attach; UsageError if it is taken."""
        self.check_free(terms)
        self._reserved.add(terms.key)

    def check_free(self, terms: Terms) -> None:
        """Raise UsageError if a name is taken."""
        if terms.key in self._reserved:
            raise UsageError(
                f"guest name {terms.name!r} is taken; choose another, or detach that guest"
            )

    def release(self, terms: Terms) -> None:
        """Give a reserved name back."""
        self._reserved.discard(terms.key)

    def attach(
        self, terms: Terms, peer: tuple[int, int], pidfd: int, address: int, fds: list[int]
    ) -> Guest:
        """Start answering a guest; fds are [uffd, pagemap, mem], its own on success only.

        peer is (pid, uid). On failure nothing is left of the guest but its reserved name.
        """
        pid, uid = peer
        quota_bytes = NO_QUOTA_BYTES if terms.quota_bytes is None else terms.quota_bytes
        purse = Purse(quota_bytes, terms.policy)
        with contextlib.ExitStack() as stack:
            stack.callback(purse.close)
            account = Account(terms.image, purse)
            stack.callback(account.close)
            account.place(fds[0], fds[1], [Region(address, 0, terms.image.map_bytes)])
            handler = FaultHandler(account.cdata, fds[0], pidfd, terms.orders)
            stack.pop_all()
        guest = Guest(terms, pid, uid, "unix", purse, account, handler, fds, terms.quota_bytes)
        with self.lock:
            self._guests[terms.key] = guest
            terms.image.note_attach()
        return guest

    def detach(self, guest: Guest) -> None:
        """Stop answering a guest, return its grants and charges, close its descriptors."""
        with self.lock:
            del self._guests[guest.terms.key]
            guest.handler.stop()
            guest.account.close()
            guest.purse.close()
        for fd in guest.fds:
            os.close(fd)

    def settle(self, guest: Guest) -> None:
        """Settle a guest's charges, if it is attached still."""
        with self.lock:
            if self._guests.get(guest.terms.key) is guest:
                guest.account.settle()

    @contextlib.contextmanager
    def accounts(self, image: Image) -> Iterator[dict[str, Account]]:
        """Give the accounts of an image by guest name, kept open inside `with`."""
        with self.lock:
            yield {guest.name: guest.account for guest in self if guest.image is image}
