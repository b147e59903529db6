# SPDX-License-Identifier: Apache-2.0
"""Files that were damaged by chance or with intent: each is refused with its place, at little cost.

What a reader gave before the place is good; what it gives after END was checked is all there is. So
whoever admits nothing before END has nothing half applied.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import pytest
import zstandard
from handoff_state import GUEST, IMAGE, PAGE, SECTIONS

from cowshed.transport.handoff.frames import (
    MAX_RAW_BYTES,
    DamagedError,
    FrameDecoder,
    FrameEncoder,
    FrameKind,
)
from cowshed.transport.handoff.sections import Header, StateReader, StateWriter, Totals

_HEADER = struct.Struct("<HHIIII")


def _pieces() -> list[bytes]:
    """A file as its frames, the preamble apart."""
    writer = StateWriter()
    pieces = [writer.write(section) for section in SECTIONS] + [writer.end()]
    return [pieces[0][:16], pieces[0][16:], *pieces[1:]]


def _refused(raw: bytes) -> str:
    """Read a file, which must be refused; how."""
    reader = StateReader()
    said = ""
    try:
        list(reader.feed(raw))
        reader.end()
    except DamagedError as error:
        said = str(error)
    assert said.startswith("at byte "), said
    assert "\n" not in said
    return said


def _resealed(frame: bytes, **changes: int) -> bytes:
    """A frame with some of its header's fields changed, and the checksum right again."""
    names = ("kind", "flags", "number", "raw_bytes", "stored_bytes")
    fields = dict(zip(names, _HEADER.unpack_from(frame), strict=False))
    head = struct.pack("<HHIII", *{**fields, **changes}.values())
    payload = frame[_HEADER.size :]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def test_every_kind_of_frame_is_tried_here() -> None:
    kinds = {_HEADER.unpack_from(piece)[0] for piece in _pieces()[1:]}
    assert kinds == set(FrameKind) - {FrameKind.MESSAGE, FrameKind.MISSING}, (
        "those are of two backends"
    )


def test_a_flipped_byte_in_any_frame_is_refused_at_that_frame(rng: random.Random) -> None:
    pieces = _pieces()
    start = 0
    for no, piece in enumerate(pieces):
        for at in {0, len(piece) - 1, *(rng.randrange(len(piece)) for _ in range(6))}:
            bad = bytearray(piece)
            bad[at] ^= 1 << rng.randrange(8)
            said = _refused(b"".join((*pieces[:no], bad, *pieces[no + 1 :])))
            assert f"at byte {start}, " in said, (no, at, said)
        start += len(piece)


def test_a_file_cut_at_a_frames_end_or_within_says_where_to_go_on(rng: random.Random) -> None:
    pieces = _pieces()
    whole = b"".join(pieces)
    start = 0
    for no, piece in enumerate(pieces):
        for cut in {start, start + 1, start + rng.randrange(len(piece)), start + len(piece) - 1}:
            said = _refused(whole[:cut])
            assert f"resume the transfer from byte {cut}" in said, said
            assert cut < 16 or f"at byte {start}, frame {no - 1}, " in said, said
            # And that is true: the rest behind it makes it whole.
            reader = StateReader()
            sections = [*reader.feed(whole[:cut]), *reader.feed(whole[cut:])]
            assert sections[:-1] == SECTIONS
        start += len(piece)
    for more in (b"x", bytes(19), pieces[3]):
        assert "after section END" in _refused(whole + more)


def test_frames_that_change_places_are_refused_even_if_numbered_right(rng: random.Random) -> None:
    pieces = _pieces()
    for one in range(1, len(pieces)):
        other = rng.choice([no for no in range(1, len(pieces)) if no != one])
        swapped = pieces.copy()
        swapped[one], swapped[other] = pieces[other], pieces[one]
        assert f"frame {min(one, other) - 1}" in _refused(b"".join(swapped))
        renumbered = [
            piece if no == 0 else _resealed(piece, number=no - 1)
            for no, piece in enumerate(swapped)
        ]
        if renumbered != pieces:
            _refused(b"".join(renumbered))


def test_frames_of_lengths_that_cannot_be_are_refused_before_their_bytes_come() -> None:
    pieces = _pieces()
    for changes in (
        {"raw_bytes": MAX_RAW_BYTES + 1},
        {"raw_bytes": 0xFFFFFFFF, "stored_bytes": 0xFFFFFFFF},
        {"stored_bytes": 0xFFFFFFFF},
        {"flags": 0x8000},
    ):
        for no in range(1, len(pieces)):
            head = _resealed(pieces[no], **changes)[: _HEADER.size]
            assert "invalid frame header" in _refused(b"".join(pieces[:no]) + head)
    assert "unknown section kind 99" in _refused(pieces[0] + _resealed(pieces[1], kind=99))


@pytest.mark.parametrize(("at", "value"), [(8, 2), (8, 0), (8, 0xFFFF), (10, 1)])
def test_another_version_is_named(at: int, value: int) -> None:
    preamble = bytearray(_pieces()[0])
    struct.pack_into("<H", preamble, at, value)
    struct.pack_into("<I", preamble, 12, zlib.crc32(preamble[:12]))
    assert "this end reads version 1, 0" in _refused(bytes(preamble))


def _framed(number: int, kind: FrameKind, payload: bytes) -> bytes:
    encoder = FrameEncoder()
    raw = encoder.frame(kind, payload)
    return _resealed(raw, number=number)


def _much_in_a_frame() -> bytes:
    packed = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    head = _HEADER.pack(FrameKind.PAGES, 1, 3, 0, 0, 0)
    return _resealed(head + packed, raw_bytes=MAX_RAW_BYTES, stored_bytes=len(packed))


def _many_frames() -> bytes:
    """Well formed, a hundred bytes for 400 KiB each: what a reader makes of them adds up."""
    one = _framed(0, FrameKind.PAGES, struct.pack("<IIQI", 0, 1, 0, 100) + bytes(100 * PAGE))
    return b"".join(_resealed(one, number=3 + no) for no in range(1000))


def _long_number() -> bytes:
    body = json.dumps({"guest": 0, "private_pages": 1, "x": "9"}).encode()
    return _framed(3, FrameKind.TOTALS, body.replace(b'"9"', b"9" * 100_000))


_BOMBS: dict[str, Callable[[], bytes]] = {
    "a frame that holds much": _much_in_a_frame,
    "many frames in few bytes": _many_frames,
    "JSON of many brackets": lambda: _framed(3, FrameKind.TOTALS, b"[" * MAX_RAW_BYTES),
    "JSON that is deep": lambda: _framed(
        3, FrameKind.TOTALS, b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    ),
    "a number of many digits": _long_number,
}
_LIMIT_BYTES = 96 << 20


def _swallow(name: str) -> None:
    """In a process of its own: read a bomb with little memory to be had."""
    writer = StateWriter()
    start = b"".join(map(writer.write, (Header("h"), IMAGE, GUEST)))
    raw = start + _BOMBS[name]()
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + _LIMIT_BYTES, used + _LIMIT_BYTES))
    reader = StateReader()
    try:
        for _ in reader.feed(raw):
            pass
        reader.end()
    except DamagedError as error:
        print(error)


@pytest.mark.parametrize("name", _BOMBS)
def test_little_that_would_become_much_costs_little_memory(name: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("at byte "), done.stderr
    assert done.stdout.count("\n") == 1


def test_a_decoder_takes_no_memory_for_what_was_only_announced() -> None:
    decoder = FrameDecoder()
    list(decoder.feed(_pieces()[0]))
    head = _resealed(_HEADER.pack(5, 0, 0, MAX_RAW_BYTES, MAX_RAW_BYTES, 0))
    assert list(decoder.feed(head)) == []
    assert decoder.offset == 16


def test_a_writer_goes_on_at_a_mark_as_if_it_had_never_stopped() -> None:
    whole = b"".join(_pieces())
    reader = StateReader()
    for section in reader.feed(whole):
        if isinstance(section, Totals):
            break
    mark = reader.mark()
    writer = StateWriter(mark)
    at = SECTIONS.index(section)
    rest = b"".join(map(writer.write, SECTIONS[at:])) + writer.end()
    assert whole[: mark.offset] + rest == whole
    assert writer.nr_bytes == len(whole)
    # And where bytes ended within a frame, after what is whole.
    reader = StateReader()
    taken = list(reader.feed(whole[: mark.offset + 9]))
    assert reader.mark().offset == mark.offset
    assert taken == SECTIONS[:at]
    writer = StateWriter(reader.mark())
    assert b"".join(map(writer.write, SECTIONS[at:])) + writer.end() == rest


if __name__ == "__main__":
    _swallow(sys.argv[1])
