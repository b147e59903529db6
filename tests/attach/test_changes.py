# SPDX-License-Identifier: Apache-2.0
"""Nothing under `cowshed attach` changes the image's source, its name or what stat says of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from attached import ROOM, Attached
from domains import NOBODY, StartDaemon

pytestmark = pytest.mark.slow

BESIDE = ("hard", "soft", "other")


@pytest.fixture(scope="session")
def changer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of changer.c."""
    program = tmp_path_factory.mktemp("changer") / "changer"
    flags = ("-O1", "-g", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *flags, "-o", program, ROOM / "changer.c"], check=True)
    return program


def put_beside(attached: Attached, uid: int) -> None:
    """What changer.c wants to find; all of it, and the folder, is the user's to change."""
    hard, soft, other = (Path(f"{attached.source}.{word}") for word in BESIDE)
    os.link(attached.source, hard)
    soft.symlink_to(attached.source)
    other.write_bytes(b"other")
    os.setxattr(attached.source, "user.old", b"x")
    for path in (attached.source.parent, attached.source, other):
        os.chown(path, uid, -1)


def state(path: Path) -> tuple[object, ...]:
    """All that is to stay; reading may change when it was read."""
    status = os.lstat(path)
    kept = (*status[:7], status.st_mtime_ns, status.st_ctime_ns, status.st_blocks)
    return (*kept, hashlib.sha256(path.read_bytes()).hexdigest(), os.listxattr(path))


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: to become another user, or to make a mount")


def needs_mounts() -> None:
    needs_root()
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("needs the right to mount")


def run_changer(attached: Attached, program: Path, table: str, uid: int | None) -> str:
    """Run a table as a user to whom the source belongs; what it prints."""
    needs_root()
    put_beside(attached, 0 if uid is None else uid)
    beside = shutil.copy(program, attached.source.parent / "changer")
    before = state(attached.source)
    ended = attached.run(beside, table, "{image}", uid=uid)
    assert state(attached.source) == before, ended.stdout
    assert ended.returncode == 0, ended
    return ended.stdout


def test_no_call_of_the_c_library_lets_its_owner_change_the_source(
    attached: Attached, changer: Path
) -> None:
    assert run_changer(attached, changer, "calls", NOBODY) == ""


def test_no_call_of_the_c_library_lets_root_change_the_source(
    attached: Attached, changer: Path
) -> None:
    assert run_changer(attached, changer, "calls", None) == ""


def test_no_bare_system_call_or_static_child_of_root_changes_the_source(
    attached: Attached, changer: Path
) -> None:
    needs_mounts()
    assert run_changer(attached, changer, "bare", None) == ""


def test_a_refused_change_is_told(attached: Attached) -> None:
    script = "import os, sys; os.truncate(sys.argv[1], 100)"
    ended = attached.run("python3", "-c", script, "{image}")
    assert "Read-only file system" in ended.stderr
    assert "cowshed: attach: truncate of the image's source is refused" in ended.stderr


def test_other_files_beside_the_source_are_as_ever(attached: Attached) -> None:
    script = """
set -e
echo new >{image}.new; echo more >>{image}.new; truncate -s 3 {image}.new; chmod 600 {image}.new
mv {image}.new {image}.kept; ln {image}.kept {image}.same; rm {image}.same; test -w {image}.kept
"""
    ended = attached.run("sh", "-c", script)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert Path(f"{attached.source}.kept").read_bytes() == b"new"


@pytest.fixture
def shared_mount(run_dir: Path) -> Iterator[Path]:
    """A mount of the test's own, whose mounts other namespaces see."""
    needs_mounts()
    place = run_dir / 'mounted \\ "here"'
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    try:
        subprocess.run(["mount", "--make-shared", place], check=True)
        yield place
    finally:
        subprocess.run(["umount", "-lR", place], check=True)


def test_only_the_program_sees_the_source_read_only_and_all_else_is_shared(
    start_daemon: StartDaemon, attached: Attached, shared_mount: Path, run_dir: Path
) -> None:
    source = shared_mount / "image.raw"
    shutil.copy(attached.copy, source)
    folder = run_dir / "other"
    folder.mkdir()
    (shared_mount / "inner").mkdir()
    daemon = start_daemon("--image", f"disk={source}", at=folder)
    script = """
mount -t tmpfs none "$1/inner"
busybox sh -c 'echo x >>"$1"' sh "$2"
"""
    there = Attached(daemon, source, attached.copy)
    ended = there.run("sh", "-c", script, "sh", shared_mount, "{image}")
    assert (ended.returncode, "Read-only" in ended.stderr) == (1, True), ended
    assert os.path.ismount(shared_mount / "inner")
    assert not os.path.ismount(source)
    os.truncate(source, source.stat().st_size)  # may be changed here


@pytest.fixture
def block_device(attached: Attached) -> Iterator[Path]:
    """A loop device over a copy of the image, of whole sectors."""
    needs_root()
    behind = attached.source.parent / "behind"
    behind.write_bytes(attached.copy.read_bytes()[: 64 << 10])
    made = subprocess.run(
        ["losetup", "--find", "--show", behind], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"needs a loop device: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_a_block_device_is_known_by_its_number_whatever_the_node(
    start_daemon: StartDaemon, attached: Attached, block_device: Path, run_dir: Path
) -> None:
    folder = run_dir / "other"
    folder.mkdir()
    node = folder / "node"
    os.mknod(node, 0o600 | stat.S_IFBLK, block_device.stat().st_rdev)
    daemon = start_daemon("--image", f"disk={block_device}", "--verbose", at=folder)
    there = Attached(daemon, block_device, attached.copy)
    right = block_device.read_bytes()
    for path in ("{image}", node):
        for script in ('echo changed >"$1"', 'dd if=/dev/zero of="$1" conv=notrunc,fsync count=1'):
            ended = there.run("sh", "-c", script, "sh", path, "{image}")
            assert ended.returncode != 0
            assert "Read-only file system" in ended.stderr
    with open(block_device, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == right
    reads = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    print(mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_READ)[:8].hex())
"""
    ended = there.run("python3", "-c", reads, node, "{image}")
    assert (ended.stdout.strip(), ended.stderr) == (right[:8].hex(), "")
    daemon.wait_logged("event=attached")
