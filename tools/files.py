# SPDX-License-Identifier: Apache-2.0
"""Prints what each source file owns: the first sentence of its first comment or docstring.

    python tools/files.py [FOLDER...]     all packages if none is named

A C file without a comment at its head gets its header's.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cache", "accounting", "faults", "transport", "service")
HEAD_COMMENT = re.compile(r"\A/\* SPDX[^\n]*\n\s*/\*\s*(.*?)\*/", re.DOTALL)
SENTENCE = re.compile(r"(.+?\.)(?:\s|$)", re.DOTALL)


def first_sentence(text: str) -> str:
    """Return the first sentence of a comment, on one line."""
    plain = " ".join(re.sub(r"^\s*\* ?", "", line).strip() for line in text.splitlines()).strip()
    found = SENTENCE.match(plain)
    return (found[1] if found else plain).rstrip(".")


def owned_by(path: Path) -> str:
    """Return the first sentence of a file's head comment; "" if it has none."""
    text = path.read_text()
    if path.suffix == ".py":
        return first_sentence(ast.get_docstring(ast.parse(text)) or "")
    found = HEAD_COMMENT.match(text)
    if found is None and path.suffix == ".c" and path.with_suffix(".h").exists():
        found = HEAD_COMMENT.match(path.with_suffix(".h").read_text())
    return first_sentence(found[1]) if found else ""


def sources(rooms: tuple[str, ...]) -> Iterator[Path]:
    """Yield the source files of rooms, by folder, without headers whose C file is listed."""
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*"), key=lambda each: (each.parent, each.name)):
            is_listed = path.suffix == ".h" and path.with_suffix(".c").exists()
            if path.suffix in (".py", ".c", ".h") and not is_listed:
                yield path


def main() -> int:
    """Print a table."""
    paths = list(sources(tuple(sys.argv[1:]) or ROOMS))
    names = [os.path.relpath(path, ROOT) for path in paths]
    for name, path in zip(names, paths, strict=True):
        with contextlib.suppress(BrokenPipeError):  # `| head`
            print(f"{name:{max(map(len, names))}}  {owned_by(path)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
