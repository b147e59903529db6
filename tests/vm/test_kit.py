# SPDX-License-Identifier: Apache-2.0
"""The machines themselves, without cowshed: they boot, read disks, answer, and end when told to."""

from __future__ import annotations

import os
import random
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filesystems import MOUNT_OPTIONS, make_disk, make_files, sums_of
from guest_kernel import VmError
from initramfs import archive
from kernel_modules import Module, closure, modules_alias, modules_dep
from machines import Kit, Machine, drive, network, pmem

MIB = 1 << 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first of all fetches a kernel
PLACES = {"ext4": "/dev/pmem0", "erofs": "/dev/pmem1", "squashfs": "/dev/vda"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    make_files(folder, 8 * MIB, random.Random(7))
    return folder


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disks")


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    """Somebody to talk to, listening at a socket's path."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path_factory.mktemp("s") / "peer"))
        listener.listen()
        yield listener


@pytest.fixture(scope="module")
def machine(kit: Kit, folder: Path, disks: Path, peer: socket.socket) -> Iterator[Machine]:
    """A machine with a disk of each kind, and one port that leads to the peer."""
    words = []
    for kind, place in PLACES.items():
        path = make_disk(kind, folder, disks / kind)
        words.append(pmem(path, path.stat().st_size) if "pmem" in place else drive(path))
    words.append(network(forwards={7: f"socket,path={peer.getsockname()}"}))
    with Machine(kit, *words, modules=["virtio_net"]) as machine:
        yield machine


@pytest.mark.parametrize("kind", MOUNT_OPTIONS)
def test_a_guest_reads_every_file_as_it_was_made(machine: Machine, folder: Path, kind: str) -> None:
    machine.call(f"await {PLACES[kind]}")
    machine.call(f"mount -t {kind} -o {MOUNT_OPTIONS[kind]} {PLACES[kind]} /mnt")
    assert machine.call("sums /mnt") == sums_of(folder)
    machine.call("umount /mnt")


def test_what_is_private_to_a_machine_is_not_in_the_file(
    machine: Machine, folder: Path, disks: Path
) -> None:
    machine.call("mount -t ext4 -o dax=always /dev/pmem0 /mnt && echo changed > /mnt/d0/f0")
    machine.call("sync; umount /mnt")
    assert machine.call("mount -o ro /dev/pmem0 /mnt; cat /mnt/d0/f0; umount /mnt") == "changed\n"
    debugfs = ["/sbin/debugfs", "-R", "cat /d0/f0", str(disks / "ext4")]
    done = subprocess.run(debugfs, capture_output=True, check=True)
    assert done.stdout == (folder / "d0/f0").read_bytes()


def test_an_order_says_what_it_printed_and_how_it_ended(machine: Machine) -> None:
    assert machine.call("echo a; echo b >&2; printf '.c'") == "a\nb\n.c\n"
    with pytest.raises(VmError, match=r"ended with status 3: oh no"):
        machine.call("echo oh no; exit 3")
    assert machine.answer(machine.start("false")).status == 1
    assert machine.call("echo $((6 * 7))") == "42\n"


def test_an_order_that_takes_too_long_is_a_failure_and_can_be_waited_for(machine: Machine) -> None:
    ticket = machine.start("await /tmp; sleep 2; echo done")
    assert not machine.answered(ticket)
    with pytest.raises(VmError, match=r"order \d+: not done in 0.1 s"):
        machine.finish(ticket, 0.1)
    assert machine.finish(ticket) == "done\n"


def test_programs_of_this_machine_run_in_a_guest(machine: Machine) -> None:
    machine.call("dd if=/dev/zero of=/tmp/disk bs=1M count=4 && mke2fs -q -F /tmp/disk")


def test_a_forwarded_port_reaches_this_machine_and_nothing_else_does(
    machine: Machine, peer: socket.socket
) -> None:
    machine.call("ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0")
    assert machine.answer(machine.start("nc -w 2 10.0.2.2 7 < /dev/null")).status == 1
    conversation, _ = peer.accept()
    with conversation:
        hang_up = "{ read -r line; echo $line; killall nc; }"  # the forward never does
        ticket = machine.start(f"echo hello | nc 10.0.2.100 7 | {hang_up}")
        assert conversation.recv(100) == b"hello\n"
        conversation.sendall(b"good day\n")
        assert machine.answer(ticket).text.startswith("good day\n")


def test_a_machine_that_panics_is_a_failure_with_its_console(kit: Kit) -> None:
    with Machine(kit) as machine:
        ticket = machine.start("echo c > /proc/sysrq-trigger")
        with pytest.raises(VmError, match=r"(?s)the machine ended.*console ends.*panic"):
            machine.finish(ticket)


def test_a_machine_that_cannot_start_says_what_qemu_said(kit: Kit, tmp_path: Path) -> None:
    with pytest.raises(VmError, match=r"(?s)ended with status 1.*nothing-here.*No such file"):
        Machine(kit, drive(tmp_path / "nothing-here")).__enter__()


def test_no_machine_is_left_when_whoever_started_it_is_killed(kit: Kit, tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from machines import Machine, vm_kit\n"
        "machine = Machine(vm_kit())\n"
        "machine.wait_ready()\n"
        "print(machine.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # what it cannot remove any more
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as starter:
        assert starter.stdout is not None
        qemu = os.pidfd_open(int(starter.stdout.readline()))
        starter.kill()
    assert select.select([qemu], [], [], 60)[0], "QEMU outlived it"
    os.close(qemu)


def test_a_closed_machine_leaves_no_process_and_no_file(kit: Kit) -> None:
    with ExitStack() as stack:
        machine = stack.enter_context(Machine(kit, before=["sh", "-c", '"$@"; true', "sh"]))
        (child,) = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
        qemu = os.pidfd_open(int(child))
        files = machine.folder
        assert files.exists()
    assert select.select([qemu], [], [], 60)[0], "QEMU outlived its machine"
    os.close(qemu)
    assert not files.exists()


def test_modules_are_loaded_after_what_they_need() -> None:
    modules = {
        name: Module(name, depends, aliases, b"")
        for name, depends, aliases in (
            ("a", ("b", "c"), ("fs-a",)),
            ("b", ("c",), ()),
            ("c", (), ("c1", "c2")),
            ("d", (), ()),
        )
    }
    chosen = closure(["a", "built_in"], modules)
    assert [module.name for module in chosen] == ["c", "b", "a"]
    assert modules_dep(chosen) == "c.ko:\nb.ko: c.ko\na.ko: b.ko c.ko\n"
    assert modules_alias(chosen) == "alias c1 c\nalias c2 c\nalias fs-a a\n"
    with pytest.raises(KeyError, match="missing"):
        closure(["x"], {"x": Module("x", ("missing",), (), b"")})


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    data = archive(
        {"d": (0o40755, b""), "d/odd": (0o100644, b"12345"), "d/link": (0o120777, b"odd")}
    )
    busybox = shutil.which("busybox")
    assert busybox is not None
    subprocess.run([busybox, "cpio", "-i"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "d/link").read_bytes() == b"12345"
    assert os.readlink(tmp_path / "d/link") == "odd"
