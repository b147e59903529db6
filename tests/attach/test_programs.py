# SPDX-License-Identifier: Apache-2.0
"""Programs as they are shipped, none of which knows of us, map an image from the cache."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from attached import Attached
from domains import ANSWER_SECONDS, StartDaemon, plain_environment

PAGE = 4096
# SQLite maps what it reads when told to; without, it would read the file.
MAPPED = "PRAGMA mmap_size=1000000000;"
QUESTION = "select count(*), sum(length(body)), max(body) from things where body like '%7%';"


@pytest.fixture
def database(start_daemon: StartDaemon, run_dir: Path) -> Attached:
    """An image that is a database of about 2 MB, of which 1 MB may be resident."""
    source = run_dir / "image.db"
    with sqlite3.connect(source) as writer:
        writer.execute("create table things (no integer primary key, body text)")
        bodies = ((f"{no * 7919 % 100003:06}" * 30,) for no in range(10_000))
        writer.executemany("insert into things (body) values (?)", bodies)
    writer.close()
    copy = run_dir / "copy.db"
    shutil.copy(source, copy)
    daemon = start_daemon("--image", f"disk={source}", "--capacity", "1M", "--verbose")
    return Attached(daemon, source, copy)


def ask(path: Path | str) -> str:
    return subprocess.run(
        ["sqlite3", path, MAPPED + QUESTION], capture_output=True, text=True, check=True
    ).stdout


def test_sqlite_reads_a_database_through_its_mapping(database: Attached) -> None:
    for _ in range(2):
        ended = database.run("sqlite3", "{image}", MAPPED + QUESTION)
        assert (ended.returncode, ended.stdout) == (0, ask(database.copy)), ended.stderr
    assert database.daemon.status()["images"][0]["loads"] > 16
    database.daemon.wait_logged("event=attached")


def test_sqlite_cannot_write_the_image(database: Attached) -> None:
    ended = database.run("sqlite3", "{image}", MAPPED + "delete from things;")
    assert ended.returncode != 0
    assert "error" in ended.stderr.lower()
    assert database.source.read_bytes() == database.copy.read_bytes()
    assert ask(database.source) == ask(database.copy)


def test_git_hashes_what_the_image_holds(attached: Attached) -> None:
    right = subprocess.run(
        ["git", "hash-object", attached.copy], capture_output=True, text=True, check=True
    ).stdout
    ended = attached.run("git", "hash-object", "{image}")
    assert (ended.returncode, ended.stdout) == (0, right), ended.stderr
    attached.daemon.wait_logged("event=attached")


def test_pythons_mapping_reads_and_keeps_what_it_wrote(attached: Attached) -> None:
    script = """
import hashlib, mmap, sys
right = open(sys.argv[2], "rb").read()
with open(sys.argv[1], "rb") as file:
    read = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    own = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
assert hashlib.sha256(read).digest() == hashlib.sha256(right).digest()
for at in range(0, len(right), 40000):
    own[at : at + 5] = b"mine!"
assert hashlib.sha256(read).digest() == hashlib.sha256(right).digest()
mine = bytearray(right)
for at in range(0, len(right), 40000):
    mine[at : at + 5] = b"mine!"
assert own[:] == bytes(mine)[: len(right)]
"""
    ended = attached.run("python3", "-Wignore", "-c", script, "{image}", attached.copy)
    assert ended.returncode == 0, ended.stderr
    assert attached.source.read_bytes() == attached.copy.read_bytes()


def test_a_machine_of_qemu_has_the_image_as_memory(
    start_daemon: StartDaemon, run_dir: Path
) -> None:
    nr_bytes = 2 << 20  # QEMU wants pmem in 2 MiB
    source, saved = run_dir / "image.raw", run_dir / "saved"
    source.write_bytes(
        b"".join((no + 1).to_bytes(8, "little") * (PAGE // 8) for no in range(nr_bytes // PAGE))
    )
    daemon = start_daemon("--image", f"disk={source}", "--capacity", "1M", "--verbose")
    machine = Attached(daemon, source, source)
    words = [
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display"),
        *("none", "-S", "-m", "64M,slots=1,maxmem=1G", "-monitor", "stdio", "-object"),
        f"memory-backend-file,id=m,size={nr_bytes},mem-path={{image}},share=off",
        *("-device", "virtio-pmem-pci,memdev=m,id=disk"),
    ]
    asked = machine.run(*words, input="info memory-devices\nquit\n")
    address = re.search(r"memaddr: (0x[0-9a-f]+)", asked.stdout)
    assert address, asked
    ended = machine.run(*words, input=f'pmemsave {address[1]} {nr_bytes} "{saved}"\nquit\n')
    assert ended.returncode == 0, ended
    assert saved.read_bytes() == source.read_bytes()
    daemon.wait_logged("event=attached", 2)


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_nobody_reads_is_not_said(attached: Attached, mapper: Path, is_closed: bool) -> None:
    """Neither does a full pipe hold the program up, nor a closed one end it."""
    reading, writing = os.pipe()
    if is_closed:
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(PAGE))
        os.set_blocking(writing, True)
    words = attached.words(mapper, "says_and_goes_on", "{image}", attached.copy)
    with subprocess.Popen(words, stderr=writing, env=plain_environment()) as process:
        os.close(writing)
        assert process.wait(ANSWER_SECONDS) == 0
    if not is_closed:
        os.close(reading)


def test_a_pipe_that_the_program_closes_is_closed(attached: Attached) -> None:
    """A daemon closes its stderr, and who reads that sees its end."""
    script = """
import mmap, os, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.close(2)
sys.stdin.read()
"""
    words = attached.words("python3", "-Wignore", "-c", script, "{image}")
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=plain_environment()
    ) as process:
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], ANSWER_SECONDS)[0]
        assert process.stderr.read() == b""
        process.communicate()
