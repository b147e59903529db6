# SPDX-License-Identifier: Apache-2.0
"""The sections in a handoff's frames, typed and checked: the same in a file and on a socket.

    HEADER, IMAGE*, GUEST*, then IMAGE_BYTES, IMAGE_WHOLE, WORKING_SET, PAGES, DROPPED, TOTALS in
    any order, END

Images and guests are numbered from 0 in order. Later PAGES replace earlier ones of the same page;
DROPPED lists pages that are no longer private. One TOTALS ends each guest's sections and states
what the guest must have. Between two backends, control messages may stand anywhere.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from cowshed.accounting.page_runs import PackedRuns
from cowshed.cache.errors import CowshedError
from cowshed.transport.handoff.frames import (
    HEAD_BYTES,
    MAX_RAW_BYTES,
    DamagedError,
    Frame,
    FrameDecoder,
    FrameEncoder,
    FrameKind,
    Mark,
)
from cowshed.transport.handoff.image_sections import (
    PAGE_BYTES,
    RUN_BYTES,
    WHOSE_BYTES,
    ImageBytes,
    ImageWhole,
    Runs,
    check_runs,
    decode_runs,
    encode_runs,
)
from cowshed.transport.messages.fields import take_number, take_optional_number, take_text
from cowshed.transport.messages.protocol import parse_body

__all__ = [
    "MAX_PAGES",
    "PAGE_BYTES",
    "XXH128",
    "ControlMessage",
    "Dropped",
    "End",
    "GuestSection",
    "Header",
    "ImageBytes",
    "ImageSection",
    "ImageWhole",
    "Missing",
    "Pages",
    "Section",
    "StateReader",
    "StateWriter",
    "Totals",
    "WorkingSetSection",
]

MAX_PAGES: Final = 512
XXH128: Final = "xxh128"  # the feature of a reader that knows frames' flag 2
_MAX_IMAGES: Final = 4096
_MAX_GUESTS: Final = 65536
_POLICIES: Final = ("stop", "kill", "allow")
_WHOSE: Final = struct.Struct("<II")


@dataclass(frozen=True)
class Header:
    """The id of the handoff, its backend, and the time it was made."""

    handoff: str
    backend: str = ""
    created: int = 0


@dataclass(frozen=True)
class ImageSection:
    """An image of the catalogue, identified by its digest.

    has_bytes: its bytes are in the file, or can be sent. allowed lists the uids, gids and clients
    of the domain that may use it; None: all.
    """

    name: str
    domain: str
    size_bytes: int
    extent_bytes: int
    digest: str
    source: str
    has_bytes: bool = False
    allowed: Mapping[str, Sequence[int | str]] | None = None


@dataclass(frozen=True)
class GuestSection:
    """A guest to be admitted: owner may return to its private pages and proves itself by token.

    quota_bytes None: no quota.
    """

    name: str
    image: int
    uid: int
    quota_bytes: int | None
    policy: str
    token: str
    owner: str
    transport: str
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkingSetSection:
    """Extents of an image, in the order to load them."""

    image: int
    extents: tuple[int, ...]


@dataclass(frozen=True)
class Pages:
    """Private pages of a guest: runs of (first page, number of pages), and their bytes."""

    guest: int
    runs: Runs
    content: bytes | memoryview


@dataclass(frozen=True)
class Dropped:
    """Pages of a guest that are no longer private."""

    guest: int
    runs: Runs


@dataclass(frozen=True)
class Missing:
    """Private pages of a guest whose bytes come after the commit; between two backends only."""

    guest: int
    runs: Runs


@dataclass(frozen=True)
class Totals:
    """The final number of a guest's private pages, and its final counters."""

    guest: int
    private_pages: int
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ControlMessage:
    """A control message to the other backend; its field "say" is its kind."""

    body: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Its kind, "" if it has none."""
        kind = self.body.get("say")
        return kind if isinstance(kind, str) else ""


@dataclass(frozen=True)
class End:
    """The end of a handoff, with the digest of all bytes before."""

    nr_frames: int
    sha256: str


Section = (
    Header
    | ImageSection
    | GuestSection
    | ImageBytes
    | ImageWhole
    | WorkingSetSection
    | Pages
    | Dropped
    | Missing
    | Totals
    | ControlMessage
    | End
)

_JSON_KINDS: Final[dict[type, FrameKind]] = {
    Header: FrameKind.HEADER,
    ImageSection: FrameKind.IMAGE,
    GuestSection: FrameKind.GUEST,
    Totals: FrameKind.TOTALS,
    ImageWhole: FrameKind.IMAGE_WHOLE,
}


class StateWriter:
    """Encodes sections; the caller must send the bytes in order."""

    def __init__(self, mark: Mark | None = None) -> None:
        """Start a handoff, or go on at mark, where a StateReader found the end of good bytes."""
        self._frames = FrameEncoder(mark)
        self._began = mark is not None
        self._room = bytearray()

    @property
    def nr_bytes(self) -> int:
        """The number of bytes encoded, with those before the mark."""
        return self._frames.nr_bytes

    def write(self, section: Section) -> bytes:
        """Encode a section, with the preamble before the first."""
        start = b"" if self._began else self._frames.preamble()
        self._began = True
        return start + self._frames.frame(*_encode(section))

    def pages(
        self, guest: int, runs: PackedRuns, nr_bytes: int, load: Callable[[memoryview], object]
    ) -> bytes | memoryview:
        """Encode a PAGES section; load(room) puts the nr_bytes bytes of its pages into room.

        Returns what is valid until the next call, after other sections were written: so the pages
        are not copied again.
        """
        assert self._began
        front = encode_runs(guest, runs)
        start = HEAD_BYTES + len(front)
        size = start + nr_bytes
        if size > len(self._room):
            self._room = bytearray(size)
        room = memoryview(self._room)[:size]
        room[HEAD_BYTES:start] = front
        load(room[start:])
        return self._frames.seal(FrameKind.PAGES, room)

    def use_xxh128(self) -> None:
        """Check large payloads by XXH3-128 from now on; the reader must know that."""
        self._frames.checks_by_xxh128 = True

    def compress(self, on: bool) -> None:
        """Begin or end to compress payloads."""
        self._frames.compresses = on

    def end(self) -> bytes:
        """Encode the last section, END."""
        return self.write(End(self._frames.nr_frames, self._frames.digest()))


def _encode(section: Section) -> tuple[FrameKind, bytes]:
    if isinstance(section, WorkingSetSection):
        numbers = array("I", section.extents)
        return FrameKind.WORKING_SET, _WHOSE.pack(section.image, len(numbers)) + numbers.tobytes()
    if isinstance(section, Pages):
        return FrameKind.PAGES, encode_runs(section.guest, section.runs) + bytes(section.content)
    if isinstance(section, ImageBytes):
        content = bytes(section.content)
        return FrameKind.IMAGE_BYTES, encode_runs(section.image, section.runs) + content
    if isinstance(section, Dropped):
        return FrameKind.DROPPED, encode_runs(section.guest, section.runs)
    if isinstance(section, Missing):
        return FrameKind.MISSING, encode_runs(section.guest, section.runs)
    if isinstance(section, ControlMessage):
        return FrameKind.MESSAGE, _json(section.body)
    if isinstance(section, End):
        return FrameKind.END, _json(asdict(section))
    return _JSON_KINDS[type(section)], _json(asdict(section))


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


class StateReader:
    """Decodes sections and checks each against those before; DamagedError names the place.

    Invariant: images, guests and totals hold the received sections, by number; whole the images
    whose IMAGE_WHOLE came.
    """

    def __init__(self, *, messages: bool = False) -> None:
        """messages: whether the bytes come from a peer, which may send control messages."""
        self._frames = FrameDecoder()
        self._messages = messages
        self.header: Header | None = None
        self.images: list[ImageSection] = []
        self.guests: list[GuestSection] = []
        self.totals: dict[int, Totals] = {}
        self.whole: set[int] = set()
        self.ended = False
        self._in_state = False
        self._missing_sizes: list[int] | None = None

    @property
    def offset(self) -> int:
        """The number of bytes checked and found good."""
        return self._frames.offset

    def mark(self) -> Mark:
        """Return the place before the section yielded last; after it once feed() has returned."""
        return self._frames.mark()

    def feed(self, raw: bytes | bytearray | memoryview) -> Iterator[Section]:
        """Take received bytes; yield the sections they end.

        Not a list, since a few bytes may hold very many sections.
        """
        for frame in self._frames.feed(raw):
            yield self._section(frame)

    def room(self) -> memoryview:
        """Return where to receive the next bytes, at least one; advance() must follow."""
        return self._frames.room()

    def advance(self, nr_bytes: int) -> Iterator[Section]:
        """Take bytes that were received into room(); yield the section that they end, if any.

        Saves the copy that feed() makes.
        """
        for frame in self._frames.advance(nr_bytes):
            yield self._section(frame)

    def expect_missing(self, sizes_bytes: Sequence[int]) -> None:
        """Accept from now on the missing PAGES of guests, by number, with images of these sizes."""
        self._missing_sizes = list(sizes_bytes)

    def end(self) -> None:
        """Check the end of the bytes; DamagedError unless END was the last section."""
        if not self.ended:
            self._frames.end()
        self._frames.check_empty()

    def _section(self, frame: Frame) -> Section:
        try:
            section = self._decode(frame)
            self._check(section)
        except DamagedError:
            raise
        except (CowshedError, struct.error, ValueError, TypeError, OverflowError) as error:
            self._frames.refuse(f"section {frame.kind.name}: {error}")
        return section

    def _decode(self, frame: Frame) -> Section:
        payload, kind = frame.payload, frame.kind
        if kind is FrameKind.WORKING_SET:
            image, nr = _WHOSE.unpack_from(payload)
            if len(payload) != _WHOSE.size + 4 * nr:
                raise ValueError(f"{len(payload)} bytes for {nr} extents")
            return WorkingSetSection(image, tuple(array("I", bytes(payload[_WHOSE.size :]))))
        if kind in (FrameKind.PAGES, FrameKind.IMAGE_BYTES, FrameKind.DROPPED, FrameKind.MISSING):
            whose, runs, start = decode_runs(payload)
            if kind is FrameKind.PAGES:
                return Pages(whose, runs, payload[start:])
            if kind is FrameKind.IMAGE_BYTES:
                return ImageBytes(whose, runs, payload[start:])
            if start != len(payload):
                raise ValueError("bytes are left over")
            return (Missing if kind is FrameKind.MISSING else Dropped)(whose, runs)
        body = parse_body(bytes(payload))
        if kind is FrameKind.MESSAGE:
            return ControlMessage(body)
        if kind is FrameKind.END:
            nr_frames, sha256 = take_number(body, "nr_frames"), take_text(body, "sha256")
            if (nr_frames, sha256) != (frame.number, self._frames.digest()):
                raise ValueError("its digest or its number of frames does not match")
            return End(nr_frames, sha256)
        return _decode_body(kind, body)

    def _check(self, section: Section) -> None:
        """Check a section against those before and record it; ValueError if it does not fit."""
        if isinstance(section, ControlMessage):
            if not self._messages:
                raise ValueError("it may come between two backends, but not in a file")
            return
        if self._missing_sizes is not None and isinstance(section, Pages):
            size_bytes = self._of(self._missing_sizes, section.guest, "guest")
            check_runs(section.runs, size_bytes, section.content)
            return
        if isinstance(section, Missing) and not self._messages:
            raise ValueError("it may come between two backends, but not in a file")
        if self.ended or (self.header is None) != isinstance(section, Header):
            raise ValueError("it is out of place")
        if isinstance(section, Header):
            self.header = section
        elif isinstance(section, ImageSection | GuestSection):
            if self._in_state or (isinstance(section, ImageSection) and self.guests):
                raise ValueError("it is out of place")
            if isinstance(section, ImageSection):
                self.images.append(section)
            else:
                self._of(self.images, section.image, "image")
                self.guests.append(section)
            if len(self.images) > _MAX_IMAGES or len(self.guests) > _MAX_GUESTS:
                raise ValueError(f"more than {_MAX_IMAGES} images or {_MAX_GUESTS} guests")
        else:
            self._in_state = True
            self._check_state(section)

    def _check_state(
        self,
        section: WorkingSetSection
        | ImageBytes
        | ImageWhole
        | Pages
        | Dropped
        | Missing
        | Totals
        | End,
    ) -> None:
        if isinstance(section, End):
            if len(self.totals) != len(self.guests):
                raise ValueError(f"{len(self.totals)} totals for {len(self.guests)} guests")
            for no, image in enumerate(self.images):
                if not self._messages and image.has_bytes and no not in self.whole:
                    raise ValueError(f"the bytes of image {image.name!r} are not whole")
            self.ended = True
        elif isinstance(section, WorkingSetSection):
            image = self._of(self.images, section.image, "image")
            nr_extents = -(-image.size_bytes // image.extent_bytes)
            if max(section.extents, default=0) >= nr_extents:
                raise ValueError(f"an extent is outside of the image's {nr_extents}")
        elif isinstance(section, ImageBytes | ImageWhole):
            image = self._of(self.images, section.image, "image")
            if not image.has_bytes or section.image in self.whole:
                raise ValueError(f"image {image.name!r} may have no more bytes")
            if isinstance(section, ImageBytes):
                check_runs(section.runs, image.size_bytes, section.content)
            else:
                self.whole.add(section.image)
        else:
            guest = self._of(self.guests, section.guest, "guest")
            if section.guest in self.totals:
                raise ValueError("the guest's totals came before it")
            if isinstance(section, Totals):
                self.totals[section.guest] = section
                return
            content = section.content if isinstance(section, Pages) else None
            check_runs(section.runs, self.images[guest.image].size_bytes, content)

    @staticmethod
    def _of(things: list[Any], number: int, what: str) -> Any:
        if number >= len(things):
            raise ValueError(f"there is no {what} {number}")
        return things[number]


def _decode_body(kind: FrameKind, body: dict[str, Any]) -> Section:
    if kind is FrameKind.HEADER:
        return Header(
            take_text(body, "handoff", max_length=64),
            (body.get("backend") and take_text(body, "backend")) or "",
            take_number(body, "created", default=0),
        )
    if kind is FrameKind.IMAGE:
        extent_bytes = take_number(body, "extent_bytes", 4096, 2 << 20)
        return ImageSection(
            take_text(body, "name"),
            take_text(body, "domain"),
            take_number(body, "size_bytes", 1, 1 << 56),
            extent_bytes,
            take_text(body, "digest", max_length=256),
            take_text(body, "source", max_length=4096, default="?"),
            body.get("has_bytes") is True,
            _allowed(body),
        )
    if kind is FrameKind.IMAGE_WHOLE:
        return ImageWhole(take_number(body, "image"))
    if kind is FrameKind.TOTALS:
        return Totals(
            take_number(body, "guest"), take_number(body, "private_pages"), _counters(body)
        )
    policy = take_text(body, "policy")
    if policy not in _POLICIES:
        raise ValueError(f"unknown policy {policy!r}; one of {', '.join(_POLICIES)}")
    return GuestSection(
        name=take_text(body, "name", max_length=64),
        image=take_number(body, "image"),
        uid=take_number(body, "uid", minimum=-1, maximum=(1 << 32) - 1),
        quota_bytes=take_optional_number(body, "quota_bytes", minimum=PAGE_BYTES),
        policy=policy,
        token=take_text(body, "token", max_length=64),
        owner=take_text(body, "owner"),
        transport=take_text(body, "transport", max_length=32),
        counters=_counters(body),
    )


def _allowed(body: dict[str, Any]) -> dict[str, tuple[int | str, ...]] | None:
    allowed = body.get("allowed")
    if allowed is None:
        return None
    if not isinstance(allowed, dict) or not allowed.keys() <= {"uids", "gids", "clients"}:
        raise ValueError("'allowed' must list the uids, gids and clients that may use the image")
    for key, names in allowed.items():
        kind = str if key == "clients" else int
        if not isinstance(names, list) or not all(type(name) is kind for name in names):
            raise ValueError(f"its allowed {key} are {names!r}"[:200])
    return {key: tuple(names) for key, names in allowed.items()}


def _counters(body: dict[str, Any]) -> dict[str, int]:
    counters = body.get("counters") or {}
    if not isinstance(counters, dict) or len(counters) > 256:
        raise ValueError("its counters are not a table of at most 256 numbers")
    return {name: take_number(counters, name) for name in counters}


assert MAX_PAGES * (PAGE_BYTES + RUN_BYTES) + WHOSE_BYTES <= MAX_RAW_BYTES
