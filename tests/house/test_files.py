# SPDX-License-Identifier: Apache-2.0
"""Each source file says at its head what it owns, so that no list of files is kept by hand."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def listed(*rooms: str) -> dict[str, str]:
    script = ROOT / "tools/files.py"
    done = subprocess.run(
        [sys.executable, script, *rooms], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    return {words[0]: words[1] if len(words) > 1 else "" for words in lines}


def test_every_source_file_says_what_it_owns() -> None:
    found = listed()
    assert [path for path, text in found.items() if not text] == []
    assert "cache/core/store.c" in found
    assert "service/daemon.py" in found
    assert "cache/core/store.h" not in found, "a header with a C file is listed by that"


def test_a_file_without_a_comment_at_its_head_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text('#include "a.h"\n\n/* Of a function. */\nint f(void);\n')
    (tmp_path / "b.c").write_text("int g(void);\n")
    (tmp_path / "b.h").write_text("/* SPDX-License-Identifier: X */\n/* Owns b.  And more. */\n")
    (tmp_path / "c.py").write_text('"""Owns c.\n\nMore."""\n')
    found = listed(str(tmp_path))
    assert [text for _, text in sorted(found.items())] == ["", "Owns b", "Owns c"]
