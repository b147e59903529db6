# SPDX-License-Identifier: Apache-2.0
"""The guest's handshake: an image's descriptors come, a guarded mapping is made and handed over."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.channels.exchange import ask, ask_for_fds, close_all
from cowshed.transport.links.connection import Connection
from cowshed.transport.messages.fields import take_number, take_text
from cowshed.transport.messages.protocol import Body

if TYPE_CHECKING:
    from cowshed.cache._core import StructRegion

PAGE_BYTES: Final = 4096

# What failed, and the cure; by enum region_stage.
_CURES: Final = {
    lib.REGION_STAGE_COPY: (
        "cannot copy its own memory by process_vm_readv",
        "allow that call in this process's seccomp profile",
    ),
    lib.REGION_STAGE_MAP: ("cannot map it", "allow this process more address space (ulimit -v)"),
    lib.REGION_STAGE_UFFD: (
        "cannot have a userfaultfd that serves system calls too",
        (
            "run the backend as root so that it can lend /dev/userfaultfd, or give this user "
            "access to that device (chmod), or set sysctl vm.unprivileged_userfaultfd=1"
        ),
    ),
    lib.REGION_STAGE_API: (
        "the kernel's userfaultfd lacks features the backend needs",
        "use Linux 6.7 or newer",
    ),
    lib.REGION_STAGE_REGISTER: (
        "the kernel does not guard it by userfaultfd",
        "use Linux 6.7 or newer",
    ),
    lib.REGION_STAGE_PROC: (
        "cannot open /proc/self/pagemap and /proc/self/mem",
        "mount /proc, and exec after changing user ids",
    ),
}


@dataclass(frozen=True, slots=True)
class Attached:
    """A mapped image whose faults are answered; region is a struct region, to be deinited.

    The digest is "" while the backend does not know it.
    """

    region: StructRegion
    size_bytes: int
    extent_bytes: int
    digest: str
    generation: str
    guest: str


def attach(connection: Connection, request: Body) -> Attached:
    """Open the image that request names, map it, and have the backend answer its faults.

    On failure nothing is left mapped; the connection stays the caller's. Raises what the backend's
    refusal stands for, PeerError, and UsageError if this process cannot have what it takes.
    """
    attached, map_bytes = _open(connection, request)
    try:
        _hand_over(connection, attached.region, map_bytes)
    except BaseException:
        lib.region_deinit(attached.region)
        raise
    return attached


def rehearse(connection: Connection, request: Body) -> None:
    """Do what attach() does, but for the last step, which the backend says whether it would take.

    Nothing is left mapped. A backend of an earlier version takes it, until the connection ends.
    Raises what attach() raises.
    """
    attached, map_bytes = _open(connection, request)
    try:
        _hand_over(connection, attached.region, map_bytes, rehearse=True)
    finally:
        lib.region_deinit(attached.region)


def _open(connection: Connection, request: Body) -> tuple[Attached, int]:
    reply, fds = ask_for_fds(connection, "open", request)
    try:
        return _map_image(reply, fds, request["image"])
    finally:
        close_all(fds)


def _hand_over(connection: Connection, region: StructRegion, map_bytes: int, **more: bool) -> None:
    """Tell the backend of a region, which is a struct region."""
    where = {"address": int(ffi.cast("uintptr_t", region.address)), "length": map_bytes}
    own = (region.uffd, region.pagemap_fd, region.mem_fd)
    ask(connection, "region", {**where, **more}, own)


def _map_image(reply: Body, fds: list[int], image: str) -> tuple[Attached, int]:
    """Make the guarded mapping that a reply to `open` allows; give it and its length in bytes.

    The descriptors stay the caller's. Raises PeerError, and UsageError as attach does.
    """
    size_bytes = take_number(reply, "size_bytes", minimum=1)
    extent_bytes = take_number(reply, "extent_bytes", minimum=PAGE_BYTES)
    digest = take_text(reply, "digest", default="")
    guest = take_text(reply, "guest", max_length=64)
    features = take_number(reply, "uffd_features")
    map_bytes = round_up(size_bytes)
    if take_number(reply, "map_bytes") != map_bytes or not 1 <= len(fds) <= 2:
        raise PeerError(f"the backend opened {image!r} with a reply that makes no sense")
    # A mapping past the file's end would be SIGBUS.
    status = os.fstat(fds[0])
    if not stat.S_ISREG(status.st_mode) or round_up(status.st_size) < map_bytes:
        raise PeerError(f"the backend gave a file for {image!r} that is shorter than the image")
    region = ffi.new("struct region *")
    stage = ffi.new("int *")
    uffd_device = fds[1] if len(fds) > 1 else -1
    err = lib.region_init(region, fds[0], map_bytes, uffd_device, features, stage)
    if err < 0:
        what, cure = _CURES[stage[0]]
        raise UsageError(f"image {image!r}: {what} ({os.strerror(-err)}); {cure}")
    generation = take_text(reply, "generation", default="")
    return Attached(region, size_bytes, extent_bytes, digest, generation, guest), map_bytes


def round_up(length: int) -> int:
    """Give the bytes of the whole pages that length bytes from a page's start take."""
    return (length + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
