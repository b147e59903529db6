# SPDX-License-Identifier: Apache-2.0
"""The fault thread of a guest that is populated by copy, or maps frames by zerocopy."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.calls import checked
from cowshed.cache.images import PAGE_BYTES
from cowshed.faults.handler import FaultHandler, FaultOptions, to_struct

if TYPE_CHECKING:
    from cowshed.cache._core import StructAccount

__all__ = ["PopulateHandler", "PopulateOptions", "PopulateRegion", "ZerocopyAllowance"]

_RUNS_AT_ONCE: Final = 256


@dataclass(frozen=True)
class PopulateRegion:
    """A range of a guest's memory and the part of the image that it shows, in bytes.

    It may reach past the image's end, where it reads as zeros. page_bytes: 4096 or 2 MiB; the
    others are multiples of it.
    """

    address: int
    offset: int
    length: int
    page_bytes: int


class ZerocopyAllowance:
    """How many extents all zerocopy guests may keep pinned; must outlive those guests."""

    def __init__(self, nr_extents: int) -> None:
        self.cdata = ffi.new("struct zerocopy_allowance *", [nr_extents])

    @property
    def left_extents(self) -> int:
        """How many more may be pinned."""
        return int(self.cdata.left_extents)


@dataclass(frozen=True)
class PopulateOptions:
    """What is populated, and how.

    zero_discarded: discarded memory reads as zeros (a machine's memory), not as the image (a disk).
    order: extents to populate in idle time. allowance: bounds the extents that are lent, while at
    most max_pinned_extents are pinned in the store. zerocopy_resident: lend resident extents ahead
    of faults.
    """

    regions: tuple[PopulateRegion, ...]
    zero_discarded: bool
    order: Sequence[int] = ()
    allowance: ZerocopyAllowance | None = None
    max_pinned_extents: int = 0
    zerocopy_resident: bool = False


class PopulateHandler(FaultHandler):
    """Answers one populated guest's faults until stop(), and borrows its descriptors until then."""

    def __init__(
        self,
        account: StructAccount,
        uffd: int,
        pidfd: int,
        options: FaultOptions,
        populate: PopulateOptions,
    ) -> None:
        regions = ffi.new("struct populate_region[]", len(populate.regions))
        for place, region in zip(regions, populate.regions, strict=True):
            place.address = region.address
            place.first_page = region.offset // PAGE_BYTES
            place.nr_pages = region.length // PAGE_BYTES
            place.page_bytes = region.page_bytes
        order = array("I", populate.order)
        struct = ffi.new(
            "struct populate_options *",
            {
                "regions": regions,
                "nr_regions": len(populate.regions),
                "zero_discarded": populate.zero_discarded,
                "order": ffi.from_buffer("uint32_t[]", order),
                "nr_order": len(order),
                "allowance": ffi.NULL if populate.allowance is None else populate.allowance.cdata,
                "max_pinned_extents": populate.max_pinned_extents,
                "zerocopy_resident": populate.zerocopy_resident,
            },
        )
        guest = ffi.new("struct guest **")
        checked(
            lib.populate_start(account, uffd, pidfd, to_struct(options), struct, guest),
            "starting to populate a guest",
        )
        self._guest = guest[0]
        self._account = account
        self._allowance = populate.allowance  # the thread uses it

    @property
    def zerocopy_fd(self) -> int:
        """A borrowed eventfd, raised when extents wait for take_zerocopy(); or -1."""
        return lib.zerocopy_fd(self._guest)

    def take_zerocopy(self) -> list[tuple[int, int]]:
        """Take runs of lent extents that the guest must be sent: offset and length in bytes.

        In order, at most 256 runs: call it again until it returns none.
        """
        firsts = ffi.new("uint64_t[]", _RUNS_AT_ONCE)
        numbers = ffi.new("uint64_t[]", _RUNS_AT_ONCE)
        nr = checked(
            lib.zerocopy_take(self._guest, firsts, numbers, _RUNS_AT_ONCE),
            "taking lent extents",
        )
        return [(firsts[no] * PAGE_BYTES, numbers[no] * PAGE_BYTES) for no in range(nr)]
