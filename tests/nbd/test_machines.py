# SPDX-License-Identifier: Apache-2.0
"""A real machine on NBD: its kernel's client and QEMU's, each with a file system it writes to."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from domains import StartDaemon
from filesystems import make_disk, make_files, sums_of
from guest_kernel import VmError
from machines import Kit, Machine, vm_kit
from nbd_site import MIB, Site, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kit() -> Kit:
    client = shutil.which("nbd-client", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if client is None:
        pytest.skip("needs nbd-client: `make setup` as root installs it")
    try:
        return vm_kit(programs=[client])
    except VmError as error:
        pytest.skip(f"needs QEMU, busybox and Debian's kernel: {error}")


@pytest.mark.timeout(300)
def test_a_machine_mounts_its_private_copies_and_writes_to_them(
    kit: Kit, run_dir: Path, start_daemon: StartDaemon, rng: random.Random
) -> None:
    folder = run_dir / "files"
    make_files(folder, 2 * MIB, rng)
    path = make_disk("ext4", folder, run_dir / "disk.raw", free_bytes=6 * MIB)
    before = path.read_bytes()
    site = Site(start_daemon("--image", f"d={path}", "--nbd", "127.0.0.1:0"), path)
    _, port = site.address
    words = [
        *("-drive", f"if=none,id=private,format=raw,file={site.uri('d@machine')}"),
        *("-device", "virtio-blk-pci,drive=private"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
    ]
    expected = sums_of(folder)
    with Machine(kit, words, modules=["virtio_net", "nbd"]) as machine:
        machine.call("ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0")
        machine.call(f"nbd-client -N d@kernel 10.0.2.2 {port} /dev/nbd0")
        for device in ("vda", "nbd0"):
            machine.call(f"mkdir -p /mnt/{device} && mount -t ext4 /dev/{device} /mnt/{device}")
            assert machine.call(f"sums /mnt/{device}") == expected
            machine.call(f"dd if=/dev/urandom of=/mnt/{device}/new bs=64k count=40 && sync")
        site.cowshed("evict", "d")
        sums = {}
        for device in ("vda", "nbd0"):
            machine.call("echo 3 > /proc/sys/vm/drop_caches")
            sums[device] = machine.call(f"sums /mnt/{device}")
            assert set(expected.splitlines()) < set(sums[device].splitlines())
            machine.call(f"umount /mnt/{device}")
        machine.call("nbd-client -d /dev/nbd0")
    assert sums["vda"] != sums["nbd0"]
    for guest in ("machine", "kernel"):
        copy = run_dir / f"{guest}.raw"
        run("nbdcopy", site.uri(f"d@{guest}"), str(copy))
        run("/usr/sbin/e2fsck", "-fn", str(copy))
        assert site.daemon.guest_status(guest)["private_bytes"] >= 40 * 65536
    assert path.read_bytes() == before
    assert site.daemon.mismatches() == []
