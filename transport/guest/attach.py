# SPDX-License-Identifier: Apache-2.0
"""The guest's handshake, made in C (handshake.c): an image mapped, its faults left to a backend."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.errors import CowshedError, PeerError, PeerGoneError, UsageError
from cowshed.transport.channels.exchange import REPLY_SECONDS
from cowshed.transport.links.connection import Connection
from cowshed.transport.messages.fields import check_reply
from cowshed.transport.messages.protocol import Body

if TYPE_CHECKING:
    from cowshed.cache._core import Pointer, StructHandshake, StructRegion

PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Attached:
    """A mapped image whose faults the backend answers; the owner must deinit region.

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

    On failure nothing is left mapped. Raises the error that the backend's refusal stands for,
    PeerError, which closes the connection, and UsageError if this process may not use userfaultfd
    or has no memory or descriptors for it.
    """
    return _attach(connection, request, b"")


def rehearse(connection: Connection, request: Body) -> None:
    """Do what attach() does, but have the backend only check the last step and not take it.

    Nothing is left mapped. A backend of an earlier version does take the last step, until the
    connection ends. Raises what attach() raises.
    """
    lib.region_deinit(_attach(connection, request, b',"rehearse":true').region)


def detach(connection: Connection, timeout: float) -> None:
    """Have the backend drop the connection's mapping; returns also if the backend is gone."""
    handshake = _handshake(connection, timeout)
    while lib.handshake_close(handshake) == -errno.EINTR:
        pass


def _handshake(connection: Connection, timeout: float) -> StructHandshake:
    handshake = lib.handshake_new(connection.fileno(), int(1000 * timeout))
    if handshake == ffi.NULL:
        raise MemoryError
    return ffi.gc(handshake, lib.handshake_free)


def _attach(connection: Connection, request: Body, more: bytes) -> Attached:
    handshake = _handshake(connection, REPLY_SECONDS)
    opening = json.dumps({"op": "open", **request}).encode()
    read_only = int(bool(request.get("read_only")))
    region = ffi.new(
        "struct region *", {"uffd": -1, "pagemap_fd": -1, "mem_fd": -1, "read_only": read_only}
    )
    image = ffi.new("struct guest_image *")
    stage = ffi.new("int *")
    try:
        # Signal handlers run between two calls, and may raise.
        while (
            err := lib.guest_attach(handshake, opening, more, region, image, stage)
        ) == -errno.EINTR:
            pass
    except BaseException:
        lib.region_deinit(region)
        connection.close()
        raise
    if err < 0:
        failure = _failure(handshake, request["image"], -err, stage[0])
        if isinstance(failure, PeerError):
            connection.close()
        raise failure
    return Attached(
        region=region,
        size_bytes=image.size_bytes,
        extent_bytes=image.extent_bytes,
        digest=_text(image.digest),
        generation=_text(image.generation),
        guest=_text(image.guest),
    )


def _failure(handshake: StructHandshake, image: str, code: int, stage: int) -> CowshedError:
    """Return the exception for an attach that failed with this errno at this stage."""
    why = os.strerror(code)
    if stage:
        what, cure = _text(lib.region_failure(stage)), _text(lib.region_cure(stage))
        return UsageError(f"image {image!r}: {what} ({why}); {cure}")
    match code:
        case errno.EACCES | errno.EREMCHG:
            nr_bytes = ffi.new("uint64_t *")
            reply = lib.handshake_reply(handshake, nr_bytes)
            try:
                check_reply(json.loads(bytes(ffi.buffer(reply, nr_bytes[0]))))
            except CowshedError as error:
                return error
            raise AssertionError("a refusal is no reply")
        case errno.EPIPE | errno.ECONNRESET:
            return PeerGoneError(
                "the peer closed the connection; the backend ended, or dropped us: see its log"
            )
        case errno.EPROTO:
            return PeerError(f"the backend sent a malformed reply to the opening of {image!r}")
        case errno.ETIMEDOUT:
            return PeerError(
                f"peer sent no message in {REPLY_SECONDS:g} s; is the backend stopped, or "
                "overloaded?"
            )
        case errno.EMSGSIZE:
            return UsageError(f"image {image!r}: the request to open it is too long to send")
    return PeerError(f"the backend did not open {image!r}: {why}")


def _text(chars: Pointer[bytes]) -> str:
    return ffi.string(chars).decode()


def round_up(length: int) -> int:
    """Round a length in bytes up to whole pages."""
    return (length + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
