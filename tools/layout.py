# SPDX-License-Identifier: Apache-2.0
"""Compares files with .editorconfig, for properties that neither ruff nor clang-format checks.

    python tools/layout.py [FILE...]      all files of the tree if none is named; 1 if one is wrong

These are: UTF-8, Unix line ends, a newline at the end of the file, no white space at the end of a
line, and no tab in the indentation of a file that is indented by spaces.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from editorconfig import get_properties

ROOT = Path(__file__).resolve().parent.parent
MADE = {".git", ".venv", "build", "dist", "generated", "__pycache__"}
BINARY = {".so", ".o", ".hex"}
FORMATTED = {".py", ".pyi", ".c", ".h"}


def tree_files() -> Iterator[Path]:
    """Yield the tree's files that are not generated."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in MADE and not name.endswith((".egg-info", "_cache", ".hypothesis"))
        ]
        yield from (Path(folder, name) for name in names if Path(name).suffix not in BINARY)


def faults_of(path: Path) -> Iterator[str]:
    """Yield a line for each violation of .editorconfig in a file."""
    wanted = get_properties(str(path.resolve()))
    content = path.read_bytes()
    try:
        text = content.decode(wanted.get("charset", "utf-8"))
    except UnicodeDecodeError as error:
        yield f"{path}: byte {error.start} is not {error.encoding}; convert the file"
        return
    if wanted.get("end_of_line") == "lf" and "\r" in text:
        yield f"{path}: has a carriage return; end lines with a newline only"
    if wanted.get("insert_final_newline") == "true" and text and not text.endswith("\n"):
        yield f"{path}: does not end with a newline; add one"
    is_code = path.suffix in FORMATTED
    for no, line in enumerate(text.split("\n"), start=1):
        if wanted.get("trim_trailing_whitespace") == "true" and line != line.rstrip():
            yield f"{path}:{no}: white space at the end of the line; remove it"
        indentation = line[: len(line) - len(line.lstrip())]
        if wanted.get("indent_style") == "space" and "\t" in indentation and not is_code:
            yield f"{path}:{no}: is indented with a tab; use spaces"


def main() -> int:
    """Check the named files, or all."""
    paths = [Path(name) for name in sys.argv[1:]] or sorted(tree_files())
    faults = [fault for path in paths for fault in faults_of(path)]
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
