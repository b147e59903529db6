# SPDX-License-Identifier: Apache-2.0
"""Frames whose payloads have a digest of their own, and those for files and older peers."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib

import pytest
import xxhash
from handoff_state import GUEST, IMAGE, PAGE, SECTIONS, written

from cowshed.accounting.page_runs import PackedRuns
from cowshed.transport.handoff.frames import DamagedError, FrameKind
from cowshed.transport.handoff.sections import Header, Pages, Section, StateReader, StateWriter

_HEADER = struct.Struct("<HHIIII")
_DIGEST = 2


def _with_digests() -> list[bytes]:
    """The frames of a handoff between two backends that know flag 2; the preamble is apart."""
    writer = StateWriter()
    writer.use_xxh128()
    pieces = [writer.write(section) for section in SECTIONS] + [writer.end()]
    return [pieces[0][:16], pieces[0][16:], *pieces[1:]]


def _read(raw: bytes) -> list[Section]:
    reader = StateReader()
    sections = list(reader.feed(raw))
    reader.end()
    return sections


def test_large_payloads_have_an_xxh128_and_are_read_back() -> None:
    pieces = _with_digests()
    assert _read(b"".join(pieces))[:-1] == SECTIONS
    kinds = set()
    for piece in pieces[1:]:
        kind, flags, _, raw_bytes, stored_bytes, crc = _HEADER.unpack_from(piece)
        if flags & _DIGEST:
            kinds.add(kind)
            digest, stored = piece[20:36], piece[36:]
            assert digest == xxhash.xxh3_128(stored).digest()
            assert crc == zlib.crc32(digest, zlib.crc32(piece[:16]))
            assert len(stored) == stored_bytes
        else:
            assert raw_bytes < 128
    assert {FrameKind.PAGES, FrameKind.IMAGE_BYTES} <= kinds


def test_a_flipped_bit_anywhere_is_refused_with_digests_too(rng: random.Random) -> None:
    raw = b"".join(_with_digests())
    for at in range(len(raw)):
        bad = bytearray(raw)
        bad[at] ^= 1 << rng.randrange(8)
        with pytest.raises(DamagedError, match="at byte"):
            _read(bytes(bad))


def test_a_payload_and_digest_that_belong_together_but_not_here_are_refused_at_the_end() -> None:
    pieces = _with_digests()
    no = next(no for no, piece in enumerate(pieces) if piece[:2] == b"\5\0")
    _, flags, number, raw_bytes, stored_bytes, _ = _HEADER.unpack_from(pieces[no])
    other = bytearray(pieces[no][36:])
    other[-1] ^= 1
    head = struct.pack("<HHIII", FrameKind.PAGES, flags, number, raw_bytes, stored_bytes)
    digest = xxhash.xxh3_128(other).digest()
    crc = struct.pack("<I", zlib.crc32(digest, zlib.crc32(head)))
    pieces[no] = head + crc + digest + bytes(other)
    with pytest.raises(DamagedError, match=r"digest|cannot be decompressed"):
        _read(b"".join(pieces))


def test_files_and_older_peers_get_frames_as_they_always_were() -> None:
    raw, offset, number = written(), 16, 0
    while offset < len(raw):
        kind, flags, got, _, stored_bytes, crc = _HEADER.unpack_from(raw, offset)
        end = offset + _HEADER.size + stored_bytes
        payload = raw[offset + _HEADER.size : end]
        assert flags in (0, 1)
        assert got == number
        assert crc == zlib.crc32(payload, zlib.crc32(raw[offset : offset + 16]))
        if kind == FrameKind.END:
            assert json.loads(payload)["sha256"] == hashlib.sha256(raw[:offset]).hexdigest()
        offset, number = end, number + 1
    assert offset == len(raw)


def test_pages_encoded_in_place_are_those_that_are_written() -> None:
    runs, content = PackedRuns.of(((2, 1), (5, 2))), random.Random(2).randbytes(3 * PAGE)
    for use_xxh128 in (False, True):
        one, other = StateWriter(), StateWriter()
        for writer in (one, other):
            writer.compress(False)
            if use_xxh128:
                writer.use_xxh128()
            for section in (Header("h"), IMAGE, GUEST):
                writer.write(section)

        def load(room: memoryview) -> None:
            room[:] = content

        in_place = bytes(one.pages(0, runs, len(content), load))
        assert in_place == other.write(Pages(0, tuple(runs), content))
        assert one.end() == other.end()


def test_a_received_payload_stays_as_it_is_while_it_is_referred_to() -> None:
    writer = StateWriter()
    raw = b"".join(writer.write(section) for section in (Header("h"), IMAGE, GUEST))
    sent = [Pages(0, ((no, 1),), random.Random(no).randbytes(PAGE)) for no in range(20)]
    raw += b"".join(writer.write(section) for section in sent)
    reader, left, kept = StateReader(), memoryview(raw), []
    while left:
        room = reader.room()
        nr = min(len(room), len(left))
        room[:nr], left = left[:nr], left[nr:]
        kept += [section for section in reader.advance(nr) if isinstance(section, Pages)]
    assert kept == sent
