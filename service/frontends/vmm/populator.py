# SPDX-License-Identifier: Apache-2.0
"""How a machine's memory is populated: by what its handshake said and what the backend allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cowshed.cache import Image, PeerError
from cowshed.faults import PopulateOptions, PopulateRegion, ZerocopyAllowance
from cowshed.service.settings.config import Config
from cowshed.transport.vmm.handshakes import HUGE_PAGE_BYTES, Policy, VmmHandshake

__all__ = ["Populator", "check_regions", "is_zerocopy"]

# Of the capacity, pinned for guests that map frames themselves.
_ZEROCOPY_PART: Final = 4


class Populator:
    """Makes the options for each handshake; all that share frames share one allowance.

    recorded gives the extents that earlier guests of an image touched, in order.
    """

    def __init__(
        self, config: Config, max_pinned_extents: int, recorded: Callable[[Image], list[int]]
    ) -> None:
        self._max_pinned_extents: Final = max(0, max_pinned_extents)
        nr_zerocopy = config.capacity_bytes // config.extent_bytes // _ZEROCOPY_PART
        self._allowance: Final = ZerocopyAllowance(min(nr_zerocopy, self._max_pinned_extents))
        self._recorded = recorded

    def options(self, handshake: VmmHandshake, image: Image) -> PopulateOptions:
        """Return the options for an image that the regions fit (check_regions)."""
        shares = is_zerocopy(handshake)
        return PopulateOptions(
            regions=_populate_regions(handshake),
            zero_discarded=handshake.protocol == "firecracker",
            order=() if shares else self._recorded(image),
            allowance=self._allowance if shares else None,
            max_pinned_extents=self._max_pinned_extents,
            zerocopy_resident=handshake.prefault,
        )


def is_zerocopy(handshake: VmmHandshake) -> bool:
    """Whether frames are to be mapped by the client itself."""
    return handshake.protocol == "nydus" and handshake.policy is Policy.ZEROCOPY


def check_regions(handshake: VmmHandshake, map_bytes: int) -> None:
    """Raise PeerError unless the regions of a handshake lie within an image of so many bytes.

    A machine's memory does, but for the rest of a huge page that its end is in: what a snapshot
    lacks is memory that was lost, and not zeros. A disk is mapped to the next 2 MiB by those who
    need that alignment, and is zero there.
    """
    for region in handshake.regions:
        is_memory = handshake.protocol == "firecracker"
        unit_bytes = region.page_bytes if is_memory else HUGE_PAGE_BYTES
        end = region.offset_bytes + region.length_bytes
        if region.offset_bytes >= map_bytes or end > -(-map_bytes // unit_bytes) * unit_bytes:
            raise PeerError(
                f"a region of {region.length_bytes} bytes of the image at {region.offset_bytes} is "
                f"past its end: it has {map_bytes} bytes; is it the right image's socket, and the "
                "whole snapshot?"
            )


def _populate_regions(handshake: VmmHandshake) -> tuple[PopulateRegion, ...]:
    return tuple(
        PopulateRegion(one.address, one.offset_bytes, one.length_bytes, one.page_bytes)
        for one in handshake.regions
    )
