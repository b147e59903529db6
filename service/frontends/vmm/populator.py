# SPDX-License-Identifier: Apache-2.0
"""How a machine's memory is populated, by its handshake and the backend's limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cowshed.cache import Image, PeerError
from cowshed.faults import PopulateOptions, PopulateRegion, ZerocopyAllowance
from cowshed.service.settings.config import Config
from cowshed.transport.vmm.handshakes import HUGE_PAGE_BYTES, Policy, VmmHandshake

__all__ = ["Populator", "check_regions", "is_zerocopy"]

# The divisor: a quarter of the capacity may be pinned for guests that map frames themselves.
_ZEROCOPY_PART: Final = 4


class Populator:
    """Makes the options for each handshake; all zerocopy guests share one allowance.

    recorded returns the extents that earlier guests of an image touched, in order.
    """

    def __init__(
        self, config: Config, max_pinned_extents: int, recorded: Callable[[Image], list[int]]
    ) -> None:
        self._max_pinned_extents: Final = max(0, max_pinned_extents)
        nr_zerocopy = config.capacity_bytes // config.least_extent_bytes // _ZEROCOPY_PART
        self._allowance: Final = ZerocopyAllowance(min(nr_zerocopy, self._max_pinned_extents))
        self._recorded = recorded

    def options(self, handshake: VmmHandshake, image: Image) -> PopulateOptions:
        """Return the options; the regions must fit the image (check_regions)."""
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
    """Whether the client maps the frames itself."""
    return handshake.protocol == "nydus" and handshake.policy is Policy.ZEROCOPY


def check_regions(handshake: VmmHandshake, map_bytes: int) -> None:
    """Raise PeerError unless the regions of a handshake lie within an image of map_bytes.

    A machine's memory may exceed the image only by the rest of its last huge page: pages missing
    from a snapshot are lost memory, not zeros. A disk may be mapped up to the next 2 MiB, for
    alignment, and reads as zeros there.
    """
    for region in handshake.regions:
        is_memory = handshake.protocol == "firecracker"
        unit_bytes = region.page_bytes if is_memory else HUGE_PAGE_BYTES
        end = region.offset_bytes + region.length_bytes
        if region.offset_bytes >= map_bytes or end > -(-map_bytes // unit_bytes) * unit_bytes:
            raise PeerError(
                f"a region of {region.length_bytes} bytes at {region.offset_bytes} ends past the "
                f"image's {map_bytes} bytes: check that the socket is the right image's and the "
                "snapshot is complete"
            )


def _populate_regions(handshake: VmmHandshake) -> tuple[PopulateRegion, ...]:
    return tuple(
        PopulateRegion(one.address, one.offset_bytes, one.length_bytes, one.page_bytes)
        for one in handshake.regions
    )
