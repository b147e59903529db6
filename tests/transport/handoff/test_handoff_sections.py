# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
import zlib

import pytest
import zstandard
from handoff_state import GUEST, IMAGE, PAGE, SECTIONS, WITH_BYTES, written
from hypothesis import given, settings
from hypothesis import strategies as st

from cowshed.transport.handoff.frames import (
    MAX_RAW_BYTES,
    DamagedError,
    FrameDecoder,
    FrameEncoder,
    FrameKind,
)
from cowshed.transport.handoff.sections import (
    ControlMessage,
    Header,
    ImageBytes,
    ImageWhole,
    Pages,
    Section,
    StateReader,
    StateWriter,
    Totals,
    WorkingSetSection,
)


def read(raw: bytes) -> list[Section]:
    reader = StateReader()
    sections = list(reader.feed(raw))
    reader.end()
    return sections


def test_what_is_written_is_read_back_however_it_is_cut() -> None:
    raw = written()
    assert read(raw)[:-1] == SECTIONS
    for step in (1, 7, 1000):
        reader = StateReader()
        sections = []
        for at in range(0, len(raw), step):
            sections += reader.feed(raw[at : at + step])
        assert sections[:-1] == SECTIONS
        assert reader.ended
        assert reader.offset == len(raw)


def test_a_file_cut_short_anywhere_is_refused_with_the_place() -> None:
    raw = written()
    for length in range(len(raw)):
        reader = StateReader()
        list(reader.feed(raw[:length]))
        with pytest.raises(DamagedError, match=r"at byte \d+, frame \d+, after section"):
            reader.end()
        assert not reader.ended
    with pytest.raises(DamagedError, match=f"from byte {len(raw) - 1}"):
        reader.end()


def test_a_flipped_bit_anywhere_is_refused() -> None:
    raw = written()
    for at in range(len(raw)):
        for bit in (1, 128):
            bad = bytearray(raw)
            bad[at] ^= bit
            with pytest.raises(DamagedError, match="at byte"):
                read(bytes(bad))


def test_a_frame_left_out_or_twice_is_refused() -> None:
    writer = StateWriter()
    pieces = [writer.write(section) for section in SECTIONS] + [writer.end()]
    for no in range(1, len(pieces)):
        with pytest.raises(DamagedError, match="at byte"):
            read(b"".join(pieces[:no] + pieces[no + 1 :]))
        with pytest.raises(DamagedError, match="at byte"):
            read(b"".join(pieces[: no + 1] + pieces[no:]))


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ([IMAGE], "out of place"),
        ([Header("h"), Header("h")], "out of place"),
        ([Header("h"), GUEST], "no image 0"),
        ([Header("h"), IMAGE, GUEST, IMAGE], "out of place"),
        ([Header("h"), IMAGE, WorkingSetSection(0, (7,))], "outside"),
        ([Header("h"), IMAGE, WorkingSetSection(1, ())], "no image 1"),
        ([Header("h"), IMAGE, GUEST, Pages(0, ((100, 1),), b"x" * PAGE)], "outside the image"),
        ([Header("h"), IMAGE, GUEST, Pages(0, ((1, 1), (1, 1)), b"x" * 2 * PAGE)], "out of order"),
        ([Header("h"), IMAGE, GUEST, Pages(0, ((1, 1 << 31),), b"x")], "outside the image"),
        ([Header("h"), IMAGE, GUEST, Pages(0, ((1, 1),), b"x")], "bytes for 1 pages"),
        ([Header("h"), IMAGE, GUEST, Pages(1, (), b"")], "no guest 1"),
        ([Header("h"), IMAGE, GUEST, Totals(0, 0), Pages(0, (), b"")], "totals came before"),
        ([Header("h"), IMAGE, GUEST], "0 totals for 1 guests"),
        ([Header("h"), ControlMessage({"say": "commit"})], "not in a file"),
        ([Header("h"), IMAGE, ImageBytes(0, ((1, 1),), b"x" * PAGE)], "no more bytes"),
        ([Header("h"), WITH_BYTES], "are not whole"),
        ([Header("h"), WITH_BYTES, ImageWhole(1)], "no image 1"),
        ([Header("h"), WITH_BYTES, ImageWhole(0), ImageWhole(0)], "no more bytes"),
        ([Header("h"), WITH_BYTES, ImageBytes(0, ((100, 1),), b"x" * PAGE)], "outside the image"),
        ([Header("h"), WITH_BYTES, ImageBytes(0, ((1, 2),), b"x" * PAGE)], "bytes for 2 pages"),
    ],
)
def test_sections_that_make_no_sense_are_refused(sections: list[Section], why: str) -> None:
    with pytest.raises(DamagedError, match=why):
        read(written(sections))


def _framed(kind: int, flags: int, raw_bytes: int, stored: bytes) -> bytes:
    head = struct.pack("<HHIII", kind, flags, 0, raw_bytes, len(stored))
    return head + struct.pack("<I", zlib.crc32(stored, zlib.crc32(head))) + stored


def test_no_frame_makes_us_take_the_memory_it_claims() -> None:
    begin = FrameEncoder().preamble()
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    for frame in (
        _framed(1, 0, MAX_RAW_BYTES + 1, b""),
        _framed(1, 1, MAX_RAW_BYTES, bomb),
        _framed(1, 1, 1000, unsized),
        _framed(1, 1, 100, b"no zstd at all"),
        _framed(1, 0, 5, b"abc"),
        _framed(1, 4, 3, b"abc"),
        _framed(77, 0, 3, b"abc"),
    ):
        decoder = FrameDecoder()
        with pytest.raises(DamagedError):
            list(decoder.feed(begin + frame))


def _refusal(reader: StateReader, raw: bytes) -> str:
    try:
        list(reader.feed(raw))
        reader.end()
    except DamagedError as error:
        return str(error)
    return ""


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(FrameKind)), st.binary(max_size=60)),
        max_size=6,
    ),
    st.booleans(),
)
def test_any_well_framed_nonsense_is_refused_in_one_line(
    frames: list[tuple[FrameKind, bytes]], messages: bool
) -> None:
    encoder = FrameEncoder()
    raw = encoder.preamble() + b"".join(encoder.frame(*frame) for frame in frames)
    reader = StateReader(messages=messages)
    assert "\n" not in _refusal(reader, raw)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(raw: bytes, begin: bool) -> None:
    reader = StateReader()
    assert _refusal(reader, (FrameEncoder().preamble() if begin else b"") + raw)
