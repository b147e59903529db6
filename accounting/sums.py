# SPDX-License-Identifier: Apache-2.0
"""Sums over all accounts of an image, in one call to the C core that stops no guest."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cowshed.accounting.ledger import (
    Account,
    AccountCounters,
    AccountState,
    AccountStatus,
    CloseReason,
    LatencyKind,
)
from cowshed.cache import Image
from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import checked

__all__ = [
    "AccountSums",
    "Latency",
    "add_statuses",
    "read_accounts",
    "read_latency",
    "read_states",
    "sum_accounts",
]

_MORE_ACCOUNTS: Final = 64
_STATES: Final = tuple(AccountState)


@dataclass(frozen=True)
class Latency:
    """A histogram of durations: counts[i] were below bounds_ns[i] and not below the one before."""

    counts: list[int]
    sum_ns: int

    @property
    def count(self) -> int:
        """The number of durations."""
        return sum(self.counts)

    def __add__(self, other: Latency) -> Latency:
        counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        return Latency(counts, self.sum_ns + other.sum_ns)

    def percentile_ns(self, percent: float) -> int:
        """Give an upper bound, within 25 %, of the duration that percent of all stay below."""
        wanted = self.count * percent / 100
        seen = 0
        for bucket, nr in enumerate(self.counts):
            seen += nr
            if nr and seen >= wanted:
                return lib.bucket_bound_ns(bucket)
        return 0


@dataclass(frozen=True)
class AccountSums:
    """An image's accounts together. Counters and latencies include closed accounts.

    private_pages are charged now, reserved_pages beside them for open_regions. opens and closes, by
    reason, are of regions, over the accounts that ever were. cow_pages are the private copies ever
    made, ahead of the kernel by charges that were not settled yet; closed_cow_pages are those of
    closed accounts. No counter is ever less than at an earlier reading.
    """

    private_pages: int
    cow_pages: int
    closed_cow_pages: int
    reserved_pages: int
    open_regions: int
    lost_regions: int
    opens: int
    closes: dict[CloseReason, int]
    counters: AccountCounters
    latencies: dict[LatencyKind, Latency]


def sum_accounts(image: Image) -> AccountSums:
    """Add up the accounts of an image; about 1 us for each that is open."""
    sums = ffi.new("struct account_sums *")
    lib.account_sum(image.cdata, sums)
    return AccountSums(
        private_pages=sums.private_pages,
        cow_pages=sums.cow_pages,
        closed_cow_pages=sums.closed_cow_pages,
        reserved_pages=sums.reserved_pages,
        open_regions=sums.open_regions,
        lost_regions=sums.lost_regions,
        opens=sums.opens,
        closes={reason: sums.closes[reason] for reason in CloseReason},
        counters=AccountCounters.of(sums.counters),
        latencies={
            kind: Latency(list(sums.latency[kind]), sums.latency_sum_ns[kind])
            for kind in LatencyKind
        },
    )


def read_latency(accounts: Iterable[Account], kind: LatencyKind) -> Latency:
    """Add up the histograms of several accounts."""
    counts = ffi.new("uint64_t[]", lib.LATENCY_BUCKETS)
    sum_ns = ffi.new("uint64_t *")
    for account in accounts:
        checked(lib.account_latency(account.cdata, kind, counts, sum_ns), "reading latencies")
    return Latency(list(counts), sum_ns[0])


def read_accounts(image: Image) -> dict[int, AccountStatus]:
    """Read every open account of an image, by account_no."""
    room = _MORE_ACCOUNTS
    while True:
        statuses = ffi.new("struct account_status[]", room)
        nr = lib.account_read_all(image.cdata, statuses, room)
        if nr <= room:
            return {
                status.account_no: status
                for status in (AccountStatus.of(statuses[no]) for no in range(nr))
            }
        room = nr + _MORE_ACCOUNTS


def read_states(image: Image) -> dict[int, AccountState]:
    """Read the state of every open account of an image, by account_no; about 0.2 us each."""
    room = _MORE_ACCOUNTS
    while True:
        account_nos, states = array("Q", bytes(8 * room)), bytearray(room)
        nr = int(
            lib.account_states(
                image.cdata,
                ffi.from_buffer("uint64_t[]", account_nos),
                ffi.from_buffer(states),
                room,
            )
        )
        if nr <= room:
            return dict(zip(account_nos[:nr], map(_STATES.__getitem__, states[:nr]), strict=True))
        room = nr + _MORE_ACCOUNTS


def add_statuses(statuses: Sequence[AccountStatus]) -> AccountStatus:
    """Combine the accounts of a guest's mappings, at least one, as if they were one.

    It is stopped since the earliest stop, frozen if one is, and broken if all are.
    """
    first = statuses[0]
    if len(statuses) == 1:
        return first
    stops = [status.stopped_since_ns for status in statuses if status.stopped_since_ns]
    return AccountStatus(
        granted_extents=sum(status.granted_extents for status in statuses),
        private_pages=sum(status.private_pages for status in statuses),
        quota_pages=first.quota_pages,
        stopped_since_ns=min(stops, default=0),
        policy=first.policy,
        broken=first.broken if all(status.broken for status in statuses) else 0,
        frozen=any(status.frozen for status in statuses),
        preloaded_pages=sum(status.preloaded_pages for status in statuses),
        open_regions=sum(status.open_regions for status in statuses),
        lost_regions=sum(status.lost_regions for status in statuses),
        reserved_pages=sum(status.reserved_pages for status in statuses),
        account_no=first.account_no,
        counters=functools.reduce(operator.add, (status.counters for status in statuses)),
    )
