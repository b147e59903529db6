# SPDX-License-Identifier: Apache-2.0
"""Read and check the requests by which a guest maps: `open` and `region`."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Final

from cowshed.accounting import QuotaPolicy
from cowshed.cache import Image, PeerError, UsageError
from cowshed.faults import FaultOptions
from cowshed.service.guests.guests import OpenRequest
from cowshed.service.guests.userfaultfd import check_guest_files, check_uffd
from cowshed.service.settings.config import Config
from cowshed.service.settings.quotas import check_quota
from cowshed.transport import Received
from cowshed.transport.links.connection import Peer
from cowshed.transport.messages.fields import (
    take_choice,
    take_flag,
    take_number,
    take_optional_number,
    take_optional_text,
    take_text,
)

__all__ = ["check_region", "read_open_request"]

PAGE_BYTES: Final = 4096


def read_open_request(
    body: dict[str, Any], config: Config, find_image: Callable[[str], Image], pid: int
) -> OpenRequest:
    """Read the body of `open` from a peer with that pid; the configuration has the defaults.

    Raises what find_image raises, PeerError for malformed fields, and UsageError for an invalid
    part or quota.
    """
    quota_bytes = take_optional_number(body, "quota_bytes")
    if quota_bytes is None:
        quota_bytes = config.default_quota_bytes
    else:
        check_quota(quota_bytes)
    policy = take_choice(
        body, "on_quota", ("stop", "kill", "allow"), default=config.default_on_quota
    )
    image = find_image(take_text(body, "image"))
    offset_bytes = take_optional_number(body, "offset_bytes") or 0
    length_bytes = take_optional_number(body, "length_bytes")
    if length_bytes is None:
        length_bytes = max(0, image.map_bytes - offset_bytes)
    _check_part(image, offset_bytes, length_bytes)
    return OpenRequest(
        name=take_optional_text(body, "guest", max_length=64) or _new_name(pid),
        image=image,
        token=take_optional_text(body, "token", max_length=64),
        offset_bytes=offset_bytes,
        length_bytes=length_bytes,
        quota_bytes=quota_bytes,
        policy=QuotaPolicy[policy.upper()],
        options=FaultOptions(
            window_bytes=take_optional_number(body, "window_bytes") or 0,
            write_window_bytes=take_optional_number(body, "write_window_bytes") or 0,
        ),
        carries=take_flag(body, "carries"),
        read_only=take_flag(body, "read_only"),
    )


def _new_name(pid: int) -> str:
    """Make a name for a guest that gave none: unique, and not predictable."""
    return f"pid-{pid}-{secrets.token_hex(4)}"


def _check_part(image: Image, offset_bytes: int, length_bytes: int) -> None:
    """Raise UsageError unless this is at least one whole page within the image."""
    if (
        (offset_bytes | length_bytes) % PAGE_BYTES
        or length_bytes == 0
        or offset_bytes + length_bytes > image.map_bytes
    ):
        raise UsageError(
            f"cannot map {length_bytes} bytes at {offset_bytes} of {image.label!r}; "
            f"give whole pages of {PAGE_BYTES} bytes within its {image.map_bytes} bytes"
        )


def check_region(message: Received, request: OpenRequest, peer: Peer) -> int:
    """Check a region against its open request; return its address.

    Raises PeerError for an invalid region, and what check_uffd and check_guest_files raise.
    """
    if len(message.fds) != 3:
        raise PeerError(f"a region comes with 3 descriptors, not {len(message.fds)}")
    address = take_number(message.body, "address", minimum=4096, maximum=1 << 56)
    length = take_number(message.body, "length", minimum=4096, maximum=1 << 48)
    if address % 4096 or length != request.length_bytes:
        raise PeerError(
            f"a region of {length} bytes at {address:#x} does not match the part opened of "
            f"{request.image.label!r}, which takes {request.length_bytes} bytes"
        )
    check_uffd(message.fds[0])
    check_guest_files(peer.pid, peer.pidfd, message.fds)
    return address
