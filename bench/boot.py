# SPDX-License-Identifier: Apache-2.0
"""Boots a small Debian in QEMU from a disk whose reads nbdkit logs."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

from backend import BenchError
from record import Read

__all__ = ["record_boot"]

_PACKAGES: Final = "systemd-sysv,udev,dbus,linux-image-amd64,openssh-server,cron"
_DISK_BYTES: Final = 2 << 30
_BOOT_SECONDS: Final = 600.0
_READ: Final = re.compile(r" Read id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)")


def record_boot(folder: Path) -> tuple[Path, list[Read]]:
    """Make the disk, boot until the login prompt, and return the disk's image and its reads.

    Needs root and a mirror of Debian. Raises BenchError if a program is missing or no prompt comes.
    """
    for program in ("mmdebstrap", "mkfs.ext4", "qemu-system-x86_64", "nbdkit"):
        if shutil.which(program) is None:
            raise BenchError(f"{program} is not installed: apt-get install it")
    root, image = folder / "root", folder / "disk"
    _run("mmdebstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(root))
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    _run("mkfs.ext4", "-q", "-d", str(root), str(image))
    (kernel,) = root.glob("boot/vmlinuz-*")
    (initrd,) = root.glob("boot/initrd.img-*")
    log, socket, console = folder / "reads", folder / "nbd", folder / "console"
    words = ["nbdkit", "-f", "-U", str(socket), "--filter=log", "file", str(image)]
    disk = subprocess.Popen([*words, f"logfile={log}"])
    drive = f"file=nbd+unix:///?socket={socket},if=virtio,format=raw,snapshot=on"
    machine = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "1024", "-display", "none"),
            *("-no-reboot", "-serial", f"file:{console}", "-drive", drive),
            *("-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", "root=/dev/vda rw console=ttyS0 quiet"),
        ]
    )
    try:
        _wait_for_prompt(machine, console)
    finally:
        for process in (machine, disk):
            process.kill()
            process.wait()
    reads = [
        Read(str(image), int(offset, 16), int(count, 16))
        for offset, count in _READ.findall(log.read_text())
    ]
    return image, reads


def _wait_for_prompt(machine: subprocess.Popen[bytes], console: Path) -> None:
    deadline = time.monotonic() + _BOOT_SECONDS
    while not console.exists() or b"login:" not in console.read_bytes():
        if machine.poll() is not None or time.monotonic() > deadline:
            raise BenchError("the Debian did not boot: see its console")
        time.sleep(0.2)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise BenchError(f"{words[0]} ended with status {done.returncode}: {' '.join(last)}")
