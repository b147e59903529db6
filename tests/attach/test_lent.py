# SPDX-License-Identifier: Apache-2.0
"""A user who may neither open the source nor enter its folder finds a file at {image}."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from attached import ROOM, Attached
from domains import NOBODY, StartDaemon

LIBRARY = Path(__file__).parents[2] / "transport"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user"),
    pytest.mark.skipif(
        not all(folder.stat().st_mode & 1 for folder in [LIBRARY, *LIBRARY.parents]),
        reason="another user cannot reach the library here: a folder above it is private",
    ),
]


@pytest.fixture
def lent(start_daemon: StartDaemon, run_dir: Path) -> Attached:
    """A database that only root finds; its copy is for everybody."""
    private = run_dir / "above" / "private"
    private.mkdir(parents=True)
    source = private / "facts.db"
    with sqlite3.connect(source) as writer:
        writer.execute("create table facts (answer)")
        writer.executemany("insert into facts values (?)", [(42,)] * 1000)
    writer.close()
    copy = run_dir / "copy.db"
    shutil.copy(source, copy)
    copy.chmod(0o644)
    source.chmod(0o600)
    private.parent.chmod(0o700)
    daemon = start_daemon("--image", f"disk={source}", "--verbose")
    return Attached(daemon, source, copy)


def test_whatever_is_asked_of_its_path_says_that_it_is_a_file(
    lent: Attached, run_dir: Path
) -> None:
    folder = run_dir / "everybodys"
    folder.mkdir()
    folder.chmod(0o777)
    program = folder / "looker"
    flags = ("-O1", "-g", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *flags, "-o", program, ROOM / "looker.c"], check=True)
    ended = lent.run(program, "{image}", lent.copy, folder, uid=NOBODY)
    assert ended.returncode == 0, ended.stderr


def test_sqlite_which_resolves_the_path_reads_the_database(lent: Attached) -> None:
    words = ("sqlite3", "-readonly", "{image}")
    question = "pragma mmap_size=1000000; select sum(answer) from facts;"
    ended = lent.run(*words, question, uid=NOBODY)
    assert (ended.returncode, ended.stdout.split()[-1]) == (0, "42000"), ended.stderr
    lent.daemon.wait_logged("event=attached")


def test_programs_that_resolve_the_path_first_open_it(lent: Attached) -> None:
    script = """
import os, pathlib, sys
image, copy = map(pathlib.Path, sys.argv[1:])
assert image.is_file() and not image.is_symlink() and os.access(image, os.R_OK)
assert image.resolve(strict=True).read_bytes() == copy.read_bytes()
with open(os.path.realpath(f"/dev/fd/{image.name}"), "rb") as file:
    assert file.read() == copy.read_bytes()
"""
    ended = lent.run("python3", "-c", script, "{image}", lent.copy, uid=NOBODY)
    assert (ended.returncode, ended.stderr) == (0, "")
    script = """
set -e
test -f $1; test -r $1; test ! -w $1; test ! -L $1; cmp $(readlink -f $1) $2; cmp $(realpath $1) $2
cd /proc/self/fd; cmp $(basename $1) $2; find $1 -type f | xargs cat | cmp - $2
"""
    for shell in ("sh", "bash"):
        ended = lent.run(shell, "-c", script, shell, "{image}", lent.copy, uid=NOBODY)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_nothing_of_it_can_be_changed(lent: Attached) -> None:
    for script in ("echo x >$1", "truncate -s 1 $1", "chmod 666 $1", "touch -c $1"):
        ended = lent.run("sh", "-c", script, "sh", "{image}", uid=NOBODY)
        assert ended.returncode != 0
        assert "Read-only file system" in ended.stderr
    assert lent.source.read_bytes() == lent.copy.read_bytes()
