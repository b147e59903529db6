# SPDX-License-Identifier: Apache-2.0
"""The library's JSON reader agrees with Python's, and reads nothing outside of what it is given."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from attached import ROOM

ROOT = ROOM.parents[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("json") / "json_fields"
    sources = [ROOM / "json_fields.c", ROOT / "transport/core/guest/json.c"]
    flags = ["-std=gnu11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    subprocess.run(["gcc", *flags, f"-I{ROOT}", "-o", program, *sources], check=True)
    return program


def read(program: Path, texts: list[bytes]) -> list[str]:
    given = b"".join(b"%d\n%s" % (len(text), text) for text in texts)
    ended = subprocess.run([program], input=given, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    return ended.stdout.decode().splitlines()


def right(value: dict[str, Any]) -> str:
    """What json_fields prints of an object."""

    def number(holder: dict[str, Any]) -> str:
        n = holder.get("n")
        return str(n) if type(n) is int and 0 <= n < 1 << 63 else "-"

    text, nested = value.get("s"), value.get("o")
    shown = "-"
    if isinstance(text, str):
        shown = "'" + "".join(c if " " <= c <= "~" else "?" for c in text)[:7] + "'"
    inner = number(nested) if isinstance(nested, dict) else "-"
    return f"1 {int(value.get('t') is True)} {number(value)} {shown} {inner}"


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 5 else 6)
    if kind == 0:
        return rng.choice([True, False, None])
    if kind in (1, 2):
        return rng.choice([0, 1, -1, 1.5, 1e300, 1 << 63, (1 << 63) - 1, rng.randrange(1 << 64)])
    if kind in (3, 4, 5):
        return "".join(rng.choice('ab"\\/{}[]:, é☃\x7f') for _ in range(rng.randrange(12)))
    if kind == 6:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ["n", "s", "t", "o", "x", "ok", 'q"']
    return {name: some_value(rng, depth + 1) for name in rng.sample(names, rng.randrange(6))}


def some_object(rng: random.Random) -> dict[str, Any]:
    value = some_value(rng)
    return value if isinstance(value, dict) else {"n": value, "o": {"n": 5}, "s": value, "t": value}


def test_fields_are_read_as_python_reads_them(program: Path, rng: random.Random) -> None:
    values = [some_object(rng) for _ in range(3000)]
    texts = [
        json.dumps(
            value,
            ensure_ascii=True,
            indent=rng.choice([None, 1]),
            separators=rng.choice([(",", ":"), None]),
        ).encode()
        for value in values
    ]
    for value, text, line in zip(values, texts, read(program, texts), strict=True):
        assert line == right(value), text


NO_OBJECTS = [
    *("", "{", "}", "[]", "5", '"x"', "{}x", '{"n"}', '{"n":}', '{"n":1,}', '{"n" 1}', "{n:1}"),
    *('{"n":1', '{"n":"x', '{"n":"x\\', '{"s":"\\"', "{" * 100, '{"o":' * 20 + "1" + "}" * 20),
]


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_what_is_no_object_has_no_fields(program: Path, text: str) -> None:
    assert read(program, [text.encode()]) == ["0 0 - - -"]


def test_damaged_texts_are_survived(program: Path, rng: random.Random) -> None:
    texts = []
    for _ in range(5000):
        text = bytearray(json.dumps(some_object(rng)).encode())
        for _ in range(rng.randrange(4)):
            if text:
                text[rng.randrange(len(text))] = rng.randrange(256)
        texts.append(bytes(text[: rng.randrange(len(text) + 1)] if rng.random() < 0.5 else text))
    assert len(read(program, texts)) == len(texts)
