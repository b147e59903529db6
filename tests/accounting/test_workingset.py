# SPDX-License-Identifier: Apache-2.0
"""Working-set files: what is read is what was written, of that image, or nothing at all."""

import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.accounting.policy import workingset
from cowshed.accounting.policy.workingset import (
    FirstTouches,
    WorkingSet,
    decode_working_set,
    encode_working_set,
    read_working_set,
    write_working_set,
)
from cowshed.cache.errors import SourceError, UsageError

SAMPLE = WorkingSet("sha256:00ff", 65536, 1000, (7, 3, 999, 0))


@st.composite
def working_sets(draw: st.DrawFn) -> WorkingSet:
    nr_image_extents = draw(st.integers(0, 1 << 32))
    extents = (
        draw(st.lists(st.integers(0, nr_image_extents - 1), unique=True))
        if nr_image_extents
        else []
    )
    digest = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
    return WorkingSet(digest, 1 << draw(st.integers(12, 31)), nr_image_extents, tuple(extents))


def read_sample(path: Path) -> WorkingSet | None:
    return read_working_set(path, digest="sha256:00ff", extent_bytes=65536, nr_image_extents=1000)


def sealed(body: bytes) -> bytes:
    """Append a good CRC, so that a test reaches the check behind it."""
    return body + struct.pack("<I", zlib.crc32(body))


@given(working_sets())
def test_what_is_encoded_is_decoded(working_set: WorkingSet) -> None:
    assert decode_working_set(encode_working_set(working_set)) == working_set


def test_the_layout_is_the_documented_one() -> None:
    body = b"CSHDWSET" + struct.pack("<IIQII", 1, 65536, 1000, 4, 11) + b"sha256:00ff"
    assert encode_working_set(SAMPLE) == sealed(body + struct.pack("<4I", 7, 3, 999, 0))


def test_every_flipped_bit_is_refused() -> None:
    content = encode_working_set(SAMPLE)
    for bit_no in range(len(content) * 8):
        damaged = bytearray(content)
        damaged[bit_no // 8] ^= 1 << bit_no % 8
        with pytest.raises(UsageError):
            decode_working_set(bytes(damaged))


def test_every_truncation_and_extension_is_refused() -> None:
    content = encode_working_set(SAMPLE)
    for length in range(len(content)):
        with pytest.raises(UsageError):
            decode_working_set(content[:length])
    with pytest.raises(UsageError):
        decode_working_set(content + b"\0")


@given(st.binary(max_size=200))
def test_noise_is_refused_in_one_line(noise: bytes) -> None:
    for content in (noise, b"CSHDWSET" + noise, sealed(b"CSHDWSET" + noise)):
        with pytest.raises(UsageError) as caught:
            decode_working_set(content)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "tail", "said"),
    [
        ((2, 65536, 1000, 0, 1), b"d", "version 2"),
        ((1, 65535, 1000, 0, 1), b"d", "power of two"),
        ((1, 2048, 1000, 0, 1), b"d", "power of two"),
        ((1, 65536, 1 << 33, 0, 1), b"d", "an image of"),
        ((1, 65536, 1000, 1, 1), b"d" + struct.pack("<I", 1000), "outside"),
        ((1, 65536, 1000, 2, 1), b"d" + struct.pack("<2I", 5, 5), "twice"),
        ((1, 65536, 1000, 0, 0), b"", "digest"),
        ((1, 65536, 1000, 0, 1025), b"d" * 1025, "digest"),
        ((1, 65536, 1000, 0, 1), b"\xff", "UTF-8"),
        ((1, 65536, 1000, 0xFFFFFFFF, 1), b"d", "bytes, not"),
    ],
)
def test_a_wrong_field_under_a_good_crc_is_refused(
    header: tuple[int, int, int, int, int], tail: bytes, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        decode_working_set(sealed(b"CSHDWSET" + struct.pack("<IIQII", *header) + tail))


def test_a_negative_extent_is_refused() -> None:
    with pytest.raises(UsageError, match="outside"):
        WorkingSet("d", 65536, 1000, (3, -1))


def test_a_list_too_long_for_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode_working_set(SAMPLE)
    monkeypatch.setattr(workingset, "MAX_FILE_BYTES", len(content))
    assert encode_working_set(SAMPLE) == content
    monkeypatch.setattr(workingset, "MAX_FILE_BYTES", len(content) - 1)
    with pytest.raises(UsageError, match="4 extents is too long"):
        encode_working_set(SAMPLE)


def test_first_touches_keep_order_and_count_once() -> None:
    touches = FirstTouches()
    touches.note([7, 3, 7])
    touches.note([3, 999, 0, 7])
    assert len(touches) == 4
    made = touches.working_set(digest="sha256:00ff", extent_bytes=65536, nr_image_extents=1000)
    assert made == SAMPLE


def test_a_file_is_read_back_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "debian.workingset"
    assert read_sample(path) is None
    write_working_set(path, WorkingSet("sha256:00ff", 65536, 1000, (1,)))
    write_working_set(path, SAMPLE)
    assert read_sample(path) == SAMPLE
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"digest": "sha256:11"}, r"digest sha256:00ff, not sha256:11"),
        ({"extent_bytes": 4096}, r"extent size 65536, not 4096"),
        ({"nr_image_extents": 1001}, r"number of extents 1000, not 1001"),
    ],
)
def test_a_file_of_another_image_is_refused(
    tmp_path: Path, wanted: dict[str, object], said: str
) -> None:
    path = tmp_path / "debian.workingset"
    write_working_set(path, SAMPLE)
    asked = {"digest": "sha256:00ff", "extent_bytes": 65536, "nr_image_extents": 1000, **wanted}
    with pytest.raises(UsageError, match=said):
        read_working_set(path, **asked)  # type: ignore[arg-type]


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "debian.workingset"
    path.write_bytes(encode_working_set(SAMPLE)[:-1] + b"!")
    with pytest.raises(UsageError, match=rf"{path}: .*CRC"):
        read_sample(path)


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "debian.workingset"
    with open(path, "wb") as file:
        file.truncate(workingset.MAX_FILE_BYTES + 1)
    with pytest.raises(UsageError, match="too many for a working set"):
        read_sample(path)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "debian.workingset"
    os.mkfifo(path)
    with pytest.raises(UsageError, match="not a regular file"):
        read_sample(path)


def test_a_failed_read_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"reading working set {tmp_path}"):
        read_sample(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "debian.workingset"
    write_working_set(path, SAMPLE)

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(SourceError, match="No space left"):
        write_working_set(path, WorkingSet("sha256:00ff", 65536, 1000, (1,)))
    assert read_sample(path) == SAMPLE
    assert os.listdir(tmp_path) == [path.name]


def test_a_write_to_a_missing_place_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="writing working set"):
        write_working_set(tmp_path / "absent" / "debian.workingset", SAMPLE)
