# SPDX-License-Identifier: Apache-2.0
"""References to an image's pages, which travel in messages instead of the pages.

    ref = PageRef.of(disk, offset, length)              # any program that has the image open
    peer.request("look", pages=ref.to_body())           # in any field of any message

    ref = PageRef.from_body(asked.body["pages"])        # the receiver, or a further one
    ref.resolve(resolver)                               # the bytes, at the point of use

A reference names pages of an image, not of a guest: it does not include private writes. The program
that uses it resolves it in the cheapest way it has: by *map*, if it has the image mapped (no copy,
the shared frames themselves); by *copy*, over a channel to a program that can resolve it; by
*network*, from the backend that its origin names. A reference grants no access: the resolver must
have access to the image itself, or a peer that has it and agrees to copy.

A replaced image has another generation, and references to the old one are refused.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from cowshed.cache.errors import PeerError, SourceError, UsageError
from cowshed.transport.channels.channel import Channel, ChannelRequest
from cowshed.transport.guest.client import connect
from cowshed.transport.messages.fields import take_choice, take_number, take_text
from cowshed.transport.messages.protocol import MAX_REPLY_BYTES, Body

__all__ = ["PAGES_OP", "PageRef", "Resolver", "Way"]

PAGES_OP: Final = "pages"
MAX_COPY_BYTES: Final = MAX_REPLY_BYTES // 2  # in one message, as base64
MAX_URI_LENGTH: Final = 1024

Way = Literal["map", "copy", "network"]


class OpenImage(Protocol):
    """A Disk, mapped or not: references are made of it and resolved from it."""

    image: str
    generation: str
    size_bytes: int

    @property
    def mapped(self) -> bool:
        """Whether view works."""

    @property
    def origin(self) -> str:
        """The URI of its backend."""

    @property
    def view(self) -> memoryview:
        """The image as memory."""

    def read(self, offset: int, length: int) -> bytes:
        """Give bytes."""


@dataclass(frozen=True, slots=True)
class PageRef:
    """length bytes at offset of an image of that generation, served at origin.

    mode "r" resolves to read-only memory; "c" to a private copy that the caller may write to.
    """

    image: str
    generation: str
    offset: int
    length: int
    mode: str
    origin: str

    @classmethod
    def of(cls, disk: OpenImage, offset: int, length: int, mode: str = "r") -> PageRef:
        """Refer to a range of an open image; UsageError if it is not within the image."""
        if offset < 0 or length < 0 or offset + length > disk.size_bytes:
            raise UsageError(
                f"{length} bytes at {offset} are outside image {disk.image!r}; "
                f"stay within its {disk.size_bytes} bytes"
            )
        if mode not in ("r", "c"):
            raise UsageError(f"mode {mode!r} of a page reference is neither 'r' nor 'c'")
        return cls(disk.image, disk.generation, offset, length, mode, disk.origin)

    def to_body(self) -> Body:
        """Return the JSON object that stands for the reference in a message."""
        return {
            "image": self.image,
            "generation": self.generation,
            "offset": self.offset,
            "length": self.length,
            "mode": self.mode,
            "origin": self.origin,
        }

    @classmethod
    def from_body(cls, body: object) -> PageRef:
        """Read a reference out of a message; PeerError if body is not one."""
        if not isinstance(body, dict):
            raise PeerError(f"a page reference is an object, not {type(body).__name__}")
        return cls(
            take_text(body, "image"),
            take_text(body, "generation", max_length=128),
            take_number(body, "offset"),
            take_number(body, "length", maximum=1 << 48),
            take_choice(body, "mode", ("r", "c")),
            take_text(body, "origin", max_length=MAX_URI_LENGTH),
        )

    def resolve(self, resolver: Resolver) -> memoryview:
        """Return the bytes: read-only memory, or for mode "c" writable memory of the caller's own.

        Raises SourceError if the image was replaced, PeerError if the peer or backend that has it
        is gone, UsageError if this resolver knows no way to it.
        """
        return resolver.resolve(self)


class Resolver:
    """Resolves references by map, copy or network. For one thread at a time.

    images are open disks that this program does not write to; copies_from is a channel whose peer
    answers PAGES_OP; origins are the URIs that may be connected to: a reference is untrusted input
    and may name any. ways counts how often each way was taken.
    """

    def __init__(
        self,
        images: Mapping[str, OpenImage] | None = None,
        copies_from: Channel | None = None,
        origins: Container[str] = (),
        timeout: float = 60.0,
    ) -> None:
        self._images = dict(images or {})
        self._opened: dict[tuple[str, str], Any] = {}
        self._copies_from = copies_from
        self._origins = origins
        self._timeout = timeout
        self.ways: dict[Way, int] = {"map": 0, "copy": 0, "network": 0}

    def __enter__(self) -> Resolver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the disks opened to resolve; the caller must release memory got by map first."""
        while self._opened:
            _, disk = self._opened.popitem()
            disk.close()

    def resolve(self, ref: PageRef) -> memoryview:
        """See PageRef.resolve."""
        image = self._images.get(ref.image)
        if image is not None and image.mapped and image.generation == ref.generation:
            self.ways["map"] += 1
            return _as_asked(ref, _part(ref, image.view))
        if self._copies_from is not None:
            copied = self._copy(ref, self._copies_from)
            self.ways["copy"] += 1
            return _as_asked(ref, memoryview(copied))
        disk = self._origin(ref)
        if disk.generation != ref.generation:
            raise SourceError(
                f"image {ref.image!r} at {ref.origin} was replaced since the reference to it was "
                "made; ask for a new one"
            )
        if disk.mapped:
            self.ways["map"] += 1
            return _as_asked(ref, _part(ref, disk.view))
        self.ways["network"] += 1
        return _as_asked(ref, memoryview(disk.read(ref.offset, ref.length)))

    def answer(self, request: ChannelRequest) -> None:
        """Answer a peer's PAGES_OP by resolving here: the serving end of "copy"."""
        try:
            ref = PageRef.from_body(request.body.get("ref"))
            if ref.length > MAX_COPY_BYTES:
                raise UsageError(f"{ref.length} bytes; {MAX_COPY_BYTES} at most are copied at once")
            with self.resolve(ref) as memory:
                text = base64.b64encode(memory).decode("ascii")
        except (UsageError, SourceError) as error:
            request.refuse(error)
            return
        request.reply({"bytes": text})

    def _copy(self, ref: PageRef, channel: Channel) -> bytes:
        pieces = []
        for start in range(ref.offset, ref.offset + ref.length, MAX_COPY_BYTES):
            length = min(MAX_COPY_BYTES, ref.offset + ref.length - start)
            part = {**ref.to_body(), "offset": start, "length": length}
            pieces.append((length, channel.send(PAGES_OP, ref=part)))
        copied = bytearray()
        for length, pending in pieces:
            text = pending.result(self._timeout).get("bytes")
            try:
                piece = base64.b64decode(text if isinstance(text, str) else "!", validate=True)
            except (binascii.Error, ValueError) as error:
                raise PeerError(f"the peer's copy of {ref.image!r} is not base64") from error
            if len(piece) != length:
                raise PeerError(f"the peer's copy has {len(piece)} bytes instead of {length}")
            copied += piece
        return bytes(copied)

    def _origin(self, ref: PageRef) -> Any:
        key = ref.origin, ref.image
        if key not in self._opened:
            if ref.origin not in self._origins:
                raise UsageError(
                    f"image {ref.image!r} is not mapped here, there is no copies_from, and this "
                    f"program may not connect to {ref.origin}; add that to origins"
                )
            with connect(ref.origin) as backend:
                self._opened[key] = backend.open(ref.image)
        return self._opened[key]


def _part(ref: PageRef, view: memoryview) -> memoryview:
    if ref.offset + ref.length > len(view):
        view.release()
        raise UsageError(f"{ref.length} bytes at {ref.offset} are outside image {ref.image!r}")
    part = view[ref.offset : ref.offset + ref.length]
    view.release()
    return part


def _as_asked(ref: PageRef, memory: memoryview) -> memoryview:
    given = memoryview(bytearray(memory)) if ref.mode == "c" else memory.toreadonly()
    memory.release()
    return given
