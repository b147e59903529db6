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
    Account,
    AccountCounters,
    Latency,
    LatencyKind,
    QuotaPolicy,
    read_latency,
)
from cowshed.cache import Image, UsageError
from cowshed.faults import FaultHandler, Orders

__all__ = ["NO_QUOTA_BYTES", "Guest", "GuestTable", "Terms"]

# A quota nobody reaches: more than any image has.
NO_QUOTA_BYTES: Final = 1 << 60


@dataclass(frozen=True)
class Terms:
    """What a guest asked for, checked: quota_bytes None is no quota."""

    name: str
    image: Image
    quota_bytes: int | None
    policy: QuotaPolicy
    orders: Orders


@dataclass
class Guest:
    """An attached guest. Owns the descriptors in fds; account and handler live until detach."""

    terms: Terms
    pid: int
    uid: int
    transport: str
    account: Account
    handler: FaultHandler
    fds: list[int]
    quota_bytes: int | None
    attached_ns: int = field(default_factory=time.monotonic_ns)
    said_state: str = "running"

    @property
    def name(self) -> str:
        """The guest's name, unique among those attached."""
        return self.terms.name

    @property
    def image(self) -> Image:
        """The image it uses."""
        return self.terms.image


class GuestTable:
    """All attached guests, by name. Whoever reads their accounts does so inside `with table.lock`.

    Invariants: a name is reserved by at most one connection; an account is open exactly while its
    guest is in the table. past and the latencies add up what guests that left had counted.
    """

    def __init__(self) -> None:
        self.lock: Final = threading.RLock()
        self._guests: dict[str, Guest] = {}
        self._reserved: set[str] = set()
        self.past: dict[str, int] = dict.fromkeys(AccountCounters.__dataclass_fields__, 0)
        self._past_latency = {kind: read_latency((), kind) for kind in LatencyKind}

    def __iter__(self) -> Iterator[Guest]:
        return iter(list(self._guests.values()))

    def __len__(self) -> int:
        return len(self._guests)

    def find(self, name: str) -> Guest | None:
        """Give the attached guest of that name, or None."""
        return self._guests.get(name)

    def reserve(self, name: str) -> None:
        """Take a name for a connection that is about to attach; UsageError if it is taken."""
        if name in self._reserved:
            raise UsageError(f"guest name {name!r} is taken; choose another, or detach that guest")
        self._reserved.add(name)

    def release(self, name: str) -> None:
        """Give a reserved name back."""
        self._reserved.discard(name)

    def attach(
        self, terms: Terms, peer: tuple[int, int], pidfd: int, address: int, fds: list[int]
    ) -> Guest:
        """Start answering a guest; fds are [uffd, pagemap, mem], its own on success only.

        peer is (pid, uid). On failure nothing is left of the guest but its reserved name.
        """
        pid, uid = peer
        quota_bytes = NO_QUOTA_BYTES if terms.quota_bytes is None else terms.quota_bytes
        account = Account(terms.image, quota_bytes, terms.policy)
        try:
            account.place(fds[0], fds[1], address)
            handler = FaultHandler(account.cdata, fds[0], pidfd, terms.orders)
        except BaseException:
            account.close()
            raise
        guest = Guest(terms, pid, uid, "unix", account, handler, fds, terms.quota_bytes)
        with self.lock:
            self._guests[terms.name] = guest
        return guest

    def detach(self, guest: Guest) -> None:
        """Stop answering a guest, return its grants and charges, close its descriptors."""
        with self.lock:
            del self._guests[guest.name]
            guest.handler.stop()
            counters = guest.account.status().counters
            for name in self.past:
                self.past[name] += getattr(counters, name)
            for kind, latency in self._past_latency.items():
                self._past_latency[kind] = latency + read_latency([guest.account], kind)
            guest.account.close()
        for fd in guest.fds:
            os.close(fd)

    def latency(self, kind: LatencyKind) -> Latency:
        """Give the durations of all faults of a kind, of guests that left too."""
        with self.lock:
            attached = read_latency([guest.account for guest in self], kind)
            return self._past_latency[kind] + attached

    @contextlib.contextmanager
    def accounts(self, image: Image) -> Iterator[dict[str, Account]]:
        """Give the accounts of an image by guest name, kept open inside `with`."""
        with self.lock:
            yield {guest.name: guest.account for guest in self if guest.image is image}
