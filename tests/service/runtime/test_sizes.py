# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache.errors import UsageError
from cowshed.service.runtime.sizes import format_bytes, parse_size


@pytest.mark.parametrize(
    ("text", "nr_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("64KiB", 64 << 10),
        ("64 kib", 64 << 10),
        (" 64M\n", 64 << 20),
        ("2G", 2 << 30),
        ("2GiB", 2 << 30),
        ("1.5G", 3 << 29),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes_people_write_are_read(text: str, nr_bytes: int) -> None:
    assert parse_size(text) == nr_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "M",
        "-1",
        "+1",
        "1e3",
        "0x10",
        "1_000",
        "1,5G",
        ".5G",
        "5.G",
        "64MM",
        "64Mi",
        "64Q",
        "64iB",
        "nan",
        "64M 2",
        "\u0663",
        "64\u212a",
        "0.1",
        "1.0001K",
        "8E",
        "9223372036854775808",
        "9" * 5000,
        "1." + "0" * 5000 + "1G",
        "64M\nrm",
    ],
)
def test_anything_else_is_refused_in_one_line_with_the_cure(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, "capacity")
    message = str(caught.value)
    assert message.startswith("capacity ")
    assert "\n" not in message
    assert len(message) < 200
    assert "write" in message


def test_decimal_looking_unit_is_refused_and_the_binary_one_suggested() -> None:
    with pytest.raises(UsageError, match=r"powers of 1000 or of 1024: write 64M for 1024"):
        parse_size("64MB")


@pytest.mark.parametrize(
    ("nr_bytes", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1023, "1023"),
        (1024, "1K"),
        (1536, "1.5K"),
        (64 << 20, "64M"),
        (100 << 10, "100K"),
        ((64 << 20) + (300 << 10), "64.3M"),
        (1023 << 10, "1023K"),
        ((1 << 20) - 1, "1M"),
        ((1 << 30) + (220 << 20), "1.21G"),
        (1 << 60, "1E"),
        (-2048, "-2K"),
    ],
)
def test_sizes_are_shown_in_few_digits(nr_bytes: int, text: str) -> None:
    assert format_bytes(nr_bytes) == text


@given(st.integers(0, 2**62))
def test_what_is_shown_is_near_and_short(nr_bytes: int) -> None:
    text = format_bytes(nr_bytes)
    assert len(text) <= 5
    number, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    shown = float(number) * 1024 ** (" KMGTPE".index(unit) if unit else 0)
    assert abs(shown - nr_bytes) <= nr_bytes * 0.01


@given(st.integers(0, 1023), st.sampled_from(["", "K", "M", "G", "T", "P"]))
def test_whole_sizes_survive_the_round_trip(count: int, unit: str) -> None:
    nr_bytes = parse_size(f"{count}{unit}")
    assert parse_size(format_bytes(nr_bytes)) == nr_bytes
