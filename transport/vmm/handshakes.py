# SPDX-License-Identifier: Apache-2.0
"""The handshakes of virtual machine monitors, without a socket: bytes in, typed requests out.

Two dialects share an image's socket; the first bytes show which a client speaks:

- Firecracker's (docs/snapshotting/handling-page-faults-on-snapshot-resume.md there): one bare JSON
  array of memory regions and one userfaultfd. There is no reply; pages are populated by copy.
- Nydus's typed v1 (docs/nydus-uffd.md there): objects with a "type". 0 is a handshake (regions, a
  policy, enable_prefault, and one userfaultfd); 2 asks for the device's size, and 3 is the reply;
  1 names ranges of a file to map, with a descriptor of that file for each range.

A region's page size has several names: Firecracker's "page_size" is in bytes, and so is its older
"page_size_kib", despite the name; a value that can only be KiB is taken as KiB.

Descriptors stay the caller's, which passes only their number. A handshake needs exactly one;
descriptors without a handshake are an error.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from cowshed.cache.errors import PeerError
from cowshed.transport.messages.fields import take_number
from cowshed.transport.messages.protocol import parse_body
from cowshed.transport.vmm.json_stream import JsonStream

__all__ = [
    "HUGE_PAGE_BYTES",
    "MAX_REGIONS",
    "HandshakeDecoder",
    "MemoryRegion",
    "Policy",
    "Range",
    "StatRequest",
    "Unexpected",
    "VmmHandshake",
    "range_replies",
    "stat_reply",
]

PAGE_BYTES: Final = 4096
HUGE_PAGE_BYTES: Final = 2 << 20
MAX_REGIONS: Final = 32
# User space ends at 2^47, or 2^56 with five levels of page tables.
_MAX_ADDRESS: Final = 1 << 56
_MAX_OFFSET: Final = 1 << 48
_PAGE_SIZES: Final = (PAGE_BYTES, HUGE_PAGE_BYTES)
_INT32: Final = 1 << 31

# Clients read one message by one call, with room for this many descriptors.
_MAX_RANGES: Final = 16
_VERSION: Final = 1
_HANDSHAKE, _PAGE_FAULT, _STAT, _STAT_REPLY = range(4)


class Policy(enum.IntEnum):
    """How a Nydus client gets its pages: it maps ranges of a file itself, or they are copied."""

    ZEROCOPY = 0
    COPY = 1


class MemoryRegion(NamedTuple):
    """A range of the client's memory and the part of the image it shows; all in bytes.

    page_bytes is the unit of populating: for Firecracker the page size of the memory, for Nydus the
    client's choice.
    """

    address: int
    length_bytes: int
    offset_bytes: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class VmmHandshake:
    """A request to answer the faults of regions; one userfaultfd came with it.

    There are 1 to MAX_REGIONS regions, of whole pages, disjoint in addresses and in the image.
    """

    protocol: str
    regions: tuple[MemoryRegion, ...]
    policy: Policy
    prefault: bool


@dataclass(frozen=True, slots=True)
class StatRequest:
    """A request for the device's size; stat_reply is the answer."""


@dataclass(frozen=True, slots=True)
class Unexpected:
    """A message of a type that only servers send: ignored, as Nydus's own server does."""

    type_no: int


Request = VmmHandshake | StatRequest | Unexpected


class HandshakeDecoder:
    """Reassembles a client's messages; buffers at most one unfinished message.

    Invariant: nr_fds descriptors have arrived since the last handshake; it is 0 without an
    unfinished message.
    """

    def __init__(self) -> None:
        self._stream = JsonStream()
        self.nr_fds = 0

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._stream.unfinished

    def feed(self, piece: bytes, nr_fds: int = 0) -> list[Request]:
        """Take received bytes and the number of their descriptors; return the requests they end.

        Raises PeerError for anything else; the decoder must not be used then.
        """
        self.nr_fds += nr_fds
        requests = [self._request(text) for text in self._stream.feed(piece)]
        if self.nr_fds and not self.unfinished:
            raise PeerError(f"{self.nr_fds} descriptors came without a handshake")
        return requests

    def _request(self, text: bytes) -> Request:
        if text.startswith(b"["):
            body = parse_body(b'{"regions":%b}' % text)
            return self._handshake("firecracker", body, Policy.COPY)
        body = parse_body(text)
        type_no = take_number(body, "type", maximum=_STAT_REPLY, default=_HANDSHAKE)
        if type_no == _STAT:
            return StatRequest()
        if type_no != _HANDSHAKE:
            return Unexpected(type_no)
        policy = Policy(take_number(body, "policy", maximum=max(Policy), default=Policy.ZEROCOPY))
        return self._handshake("nydus", body, policy)

    def _handshake(self, protocol: str, body: Mapping[str, Any], policy: Policy) -> VmmHandshake:
        if self.nr_fds != 1:
            raise PeerError(
                f"a handshake comes with one userfaultfd, not {self.nr_fds} descriptors"
            )
        self.nr_fds = 0
        prefault = body.get("enable_prefault")
        if not isinstance(prefault, bool | None):
            raise PeerError("field 'enable_prefault' is neither true nor false")
        regions = _take_regions(body.get("regions"), strict=protocol == "firecracker")
        return VmmHandshake(protocol, regions, policy, bool(prefault))


def _take_regions(entries: object, *, strict: bool) -> tuple[MemoryRegion, ...]:
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_REGIONS:
        raise PeerError(f"a handshake needs a list of 1 to {MAX_REGIONS} regions")
    regions = tuple(_take_region(entry, strict=strict) for entry in entries)
    for what, spans in (
        ("memory", sorted((one.address, one.length_bytes) for one in regions)),
        ("image", sorted((one.offset_bytes, one.length_bytes) for one in regions)),
    ):
        end = 0
        for start, length in spans:
            if start < end:
                raise PeerError(f"two regions overlap in the {what}, at {start:#x}")
            end = start + length
    return regions


def _take_region(entry: object, *, strict: bool) -> MemoryRegion:
    if not isinstance(entry, dict):
        raise PeerError("a region is not a JSON object")
    page_bytes = _take_page_size(entry)
    address = take_number(entry, "base_host_virt_addr", PAGE_BYTES, _MAX_ADDRESS)
    length_bytes = take_number(entry, "size", PAGE_BYTES, _MAX_OFFSET)
    offset_bytes = take_number(entry, "offset", maximum=_MAX_OFFSET)
    for name in ("prot", "flags"):  # checked, not used: reserved for a mapping made by the server
        take_number(entry, name, -_INT32, _INT32 - 1, default=0)
    if address + length_bytes > _MAX_ADDRESS or offset_bytes + length_bytes > _MAX_OFFSET:
        raise PeerError(
            f"a region of {length_bytes} bytes at {address:#x}, of the image at {offset_bytes}, "
            "is outside any address space"
        )
    parts = (address, length_bytes, offset_bytes)
    if not strict and any(part % page_bytes for part in parts):
        page_bytes = PAGE_BYTES  # Nydus's is a wish, and such memory cannot have huge pages
    if any(part % page_bytes for part in parts):
        raise PeerError(
            f"a region of {length_bytes} bytes at {address:#x}, of the image at {offset_bytes}, "
            f"is not made of whole pages of {page_bytes} bytes"
        )
    return MemoryRegion(address, length_bytes, offset_bytes, page_bytes)


def _take_page_size(entry: Mapping[str, Any]) -> int:
    page_bytes = take_number(entry, "page_size", default=0)
    if not page_bytes:
        page_bytes = take_number(entry, "page_size_kib", default=PAGE_BYTES)
        if page_bytes * 1024 in _PAGE_SIZES:
            page_bytes *= 1024
    if page_bytes not in _PAGE_SIZES:
        raise PeerError(
            f"a region has pages of {page_bytes} bytes; needed: {PAGE_BYTES} or {HUGE_PAGE_BYTES}"
        )
    return page_bytes


class Range(NamedTuple):
    """A part of the image for a client to map: offsets in the file are those in the image."""

    offset_bytes: int
    length_bytes: int


def stat_reply(size_bytes: int) -> bytes:
    """Return the reply to a StatRequest."""
    return _text(
        {
            "type": _STAT_REPLY,
            "size": size_bytes,
            "block_size": PAGE_BYTES,
            "flags": 0,
            "version": _VERSION,
        }
    )


def range_replies(ranges: Sequence[Range]) -> Iterator[tuple[bytes, int]]:
    """Yield the messages that name ranges, each with the number of descriptors to send with it.

    A client reads a message by one call into 4 KiB: each is shorter, and must be sent whole.
    """
    for at in range(0, len(ranges), _MAX_RANGES):
        some = ranges[at : at + _MAX_RANGES]
        entries = [
            {
                "len": one.length_bytes,
                "blob_offset": one.offset_bytes,
                "block_offset": one.offset_bytes,
            }
            for one in some
        ]
        yield _text({"type": _PAGE_FAULT, "ranges": entries}), len(some)


def _text(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode("ascii")
