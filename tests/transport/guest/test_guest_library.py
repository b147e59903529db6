# SPDX-License-Identifier: Apache-2.0
"""The guest library for C: built, installed and used as strangers would."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import (
    Daemon,
    MakeImage,
    StartDaemon,
    cowshed,
    kill_backend,
    new_run_dir,
    until,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
MIB = 1 << 20
PAGE = 4096


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library is installed."""
    prefix = tmp_path_factory.mktemp("prefix")
    subprocess.run(
        [
            "make",
            "-s",
            "install-guest-library",
            f"PREFIX={prefix}",
            f"GUEST_LIBRARY={prefix}/build",
        ],
        cwd=ROOT,
        check=True,
    )
    return prefix


class LibraryGuest:
    """A library_guest.py process."""

    def __init__(self, prefix: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "library_guest.py", prefix / "lib/libcowshed_guest.so"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, name: str, *arguments: object, **fields: object) -> tuple[Any, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, arguments, fields]), file=self.process.stdin, flush=True)
        returned, error = json.loads(self.process.stdout.readline())
        return returned, error

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(prefix: Path) -> Iterator[Callable[[], LibraryGuest]]:
    started: list[LibraryGuest] = []

    def start() -> LibraryGuest:
        started.append(LibraryGuest(prefix))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(MIB + 1000)


def socket_of(daemon: Daemon) -> str:
    return daemon.uri.removeprefix("unix://")


def test_the_example_is_compiled_and_runs(
    prefix: Path, image: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(f"--image=d={image}")
    flags = [f"-I{prefix}/include", f"-L{prefix}/lib", "-lcowshed_guest"]
    if shutil.which("pkg-config"):
        found = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "cowshed_guest"],
            env={**os.environ, "PKG_CONFIG_PATH": f"{prefix}/lib/pkgconfig"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert set(found.stdout.split()) == set(flags)
    program = tmp_path / "guest"
    warnings = ["-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{prefix}/lib"]
    subprocess.run(["gcc", *warnings, "-o", program, ROOT / "examples/guest.c", *flags], check=True)
    before = image.read_bytes()
    ran = subprocess.run(
        [program, socket_of(daemon), "d"], capture_output=True, text=True, timeout=60, check=True
    )
    first, private, given_back = ran.stdout.splitlines()
    assert f": {len(before)} bytes, sum " in first
    assert private == "private: mine; the mapping has the same bytes"
    assert given_back == "discarded: the image again"
    assert image.read_bytes() == before
    until(lambda: daemon.status()["guests"] == [])
    refused = subprocess.run(
        [program, socket_of(daemon), "none"], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("guest: ")
    assert "'none'" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_header_is_for_cxx_too(prefix: Path) -> None:
    text = "#include <cowshed_guest.h>\ncowshed_options o = COWSHED_OPTIONS_INIT;\n"
    command = ["g++", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{prefix}/include", "-x"]
    if shutil.which("g++") is None:
        command = ["gcc", "-pedantic", "-fsyntax-only", f"-I{prefix}/include", "-x", "c", "-"]
        text = text.replace("cowshed_options o", "struct cowshed_options o")
    else:
        command += ["c++", "-"]
    subprocess.run(command, input=text, text=True, check=True)


def test_only_the_documented_names_are_exported(prefix: Path) -> None:
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", prefix / "lib/libcowshed_guest.so"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split()[-1] for line in shown.stdout.splitlines()}
    header = (prefix / "include/cowshed_guest.h").read_text()
    assert names
    assert all(name.startswith("cowshed_") and f"{name}(" in header for name in names)


def test_a_guest_reads_writes_discards_and_is_counted(
    start: Callable[[], LibraryGuest], image: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(f"--image=d={image}")
    content = image.read_bytes()
    guest = start()
    assert guest.call("open", socket_of(daemon), "d", guest="c", quota_bytes=2 * PAGE) == (0, "")
    size, name, _, is_alive, api = guest.call("about")[0]
    assert (size, name, is_alive, api) == (len(content), "c", 1, 1)
    assert bytes.fromhex(guest.call("read", 0, size)[0]) == content
    assert guest.call("look", size - 1)[0] == content[-1]
    assert guest.call("write", PAGE - 1, "aabb")[0] == 2
    assert bytes.fromhex(guest.call("read", PAGE - 2, 4)[0]) == (
        content[PAGE - 2 : PAGE - 1] + b"\xaa\xbb" + content[PAGE + 1 : PAGE + 2]
    )
    until(lambda: daemon.guest_status("c")["private_bytes"] == 2 * PAGE)
    assert guest.call("discard", 0, 2 * PAGE)[0] == 0
    until(lambda: daemon.guest_status("c")["private_bytes"] == 0)
    assert bytes.fromhex(guest.call("read", PAGE - 2, 4)[0]) == content[PAGE - 2 : PAGE + 2]
    assert daemon.mismatches() == []
    guest.call("close")
    until(lambda: daemon.status()["guests"] == [])


def test_what_a_caller_gets_wrong_is_one_line(
    start: Callable[[], LibraryGuest], image: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(f"--image=d={image}")
    guest = start()
    code, error = guest.call("open", str(tmp_path / "none"), "d")
    assert (code, "no backend answers at" in error) == (-errno.ENOENT, True)
    code, error = guest.call("open", "/" + "x" * 200, "d")
    assert (code, "over 107 bytes" in error) == (-errno.ENAMETOOLONG, True)
    code, error = guest.call("open", socket_of(daemon), 'no "such"\n')
    assert code == -errno.EACCES
    assert "\n" not in error
    code, error = guest.call("open", socket_of(daemon), "d", struct_bytes=4096)
    assert (code, "newer version" in error) == (-errno.EINVAL, True)
    code, error = guest.call("open", socket_of(daemon), "d", on_quota="sometimes")
    assert code < 0
    assert guest.call("open", socket_of(daemon), "d") == (0, "")
    size = len(image.read_bytes())
    code, error = guest.call("read", size - 1, 2)
    assert (code, "outside the image" in error) == (-errno.EINVAL, True)
    assert guest.call("discard", 1, PAGE)[0] == -errno.EINVAL
    assert guest.call("discard", size // PAGE * PAGE, size % PAGE)[0] == 0


def test_a_guest_lives_through_the_death_of_its_backend_and_a_reload(
    start: Callable[[], LibraryGuest], image: Path, start_daemon: StartDaemon
) -> None:
    kept = start_daemon(f"--image=d={image}", kept=True)
    content = image.read_bytes()
    guest = start()
    assert guest.call("open", socket_of(kept), "d", guest="c")[0] == 0
    assert guest.call("write", 0, "cc")[0] == 1
    kill_backend(kept)
    assert bytes.fromhex(guest.call("read", 0, len(content))[0]) == b"\xcc" + content[1:]
    assert kept.guest_status("c")["private_bytes"] == PAGE
    guest.call("close")
    until(lambda: kept.status()["guests"] == [])


def test_a_forked_child_has_no_part_in_the_mapping(
    start: Callable[[], LibraryGuest], image: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(f"--image=d={image}")
    guest = start()
    assert guest.call("open", socket_of(daemon), "d", guest="c")[0] == 0
    assert guest.call("fork")[0] >= 4, "a socket, a userfaultfd and two of /proc are closed"
    assert guest.call("read", 0, 4)[0] == image.read_bytes()[:4].hex()
    assert [each["name"] for each in daemon.status()["guests"]] == ["c"]


@pytest.fixture
def target(image: Path) -> Iterator[Daemon]:
    """Another backend of the same image, which takes guests over."""
    with new_run_dir() as run_dir:
        daemon = Daemon(run_dir, [f"--image=d={image}", "--accept-handoff"])
        try:
            daemon.wait_ready()
            yield daemon
        finally:
            daemon.end()


def test_a_guest_follows_a_drain(
    start: Callable[[], LibraryGuest], image: Path, start_daemon: StartDaemon, target: Daemon
) -> None:
    source = start_daemon(f"--image=d={image}")
    content = image.read_bytes()
    guest = start()
    assert guest.call("open", socket_of(source), "d", guest="c")[0] == 0
    assert guest.call("write", 0, "cc")[0] == 1
    for each in (source, target):
        until(lambda each=each: all(image["digest"] for image in each.status()["images"]))
    drained = cowshed("drain", "--run-dir", source.run_dir, "--to", target.uri)
    assert drained.returncode == 0, drained.stderr
    assert bytes.fromhex(guest.call("read", 0, len(content))[0]) == b"\xcc" + content[1:]
    until(lambda: [guest["name"] for guest in target.status()["guests"]] == ["c"])
    guest.call("close")
    until(lambda: target.status()["guests"] == [])
