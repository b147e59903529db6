# SPDX-License-Identifier: Apache-2.0
"""A guest's first file system: busybox, the kernel's modules, our init, and programs on request.

Written as a cpio archive of the "newc" kind (Linux, Documentation/driver-api/early-userspace), by
hand: it is a header of thirteen numbers a file, and needs neither root nor the cpio program.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from guest_kernel import CACHE, GuestKernel, VmError, cache_lock
from kernel_modules import modules_alias, modules_dep

__all__ = ["INIT", "SYSTEM_FOLDERS", "applets", "archive", "find_program", "initramfs"]

INIT: Final = Path(__file__).with_name("guest_init.sh")
_SYSTEM_PATHS: Final = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin"
SYSTEM_FOLDERS: Final = ("bin", "dev", "mnt", "proc", "root", "sys", "tmp")


def initramfs(kernel: GuestKernel, programs: Sequence[str] = ()) -> Path:
    """Give an archive for this kernel, made or of an earlier call.

    programs are copied from this machine into the guest's /bin, with the libraries they are linked
    to. Raises VmError if one of them, or busybox, is not installed.
    """
    entries = _entries(kernel, programs)
    data = archive(entries)
    path = CACHE / f"initramfs-{hashlib.sha256(data).hexdigest()[:16]}.cpio"
    with cache_lock():
        if not path.exists():
            half = path.with_suffix(".half")
            half.write_bytes(data)
            half.rename(path)
    return path


def archive(entries: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Write a newc archive of path -> (mode, content); a symlink's content is where it leads."""
    parts = []
    for number, (path, (mode, content)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))]):
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        parts += [header, bytes(-len(header) % 4), content, bytes(-len(content) % 4)]
    return b"".join(parts)


def _entries(kernel: GuestKernel, programs: Sequence[str]) -> dict[str, tuple[int, bytes]]:
    folder = f"lib/modules/{kernel.release}"
    entries = dict.fromkeys(
        (*SYSTEM_FOLDERS, "lib", "lib/modules", folder), (stat.S_IFDIR | 0o755, b"")
    )
    entries["init"] = (stat.S_IFREG | 0o755, INIT.read_bytes())
    busybox = find_program("busybox")
    _add_program(entries, busybox)
    for applet in applets(busybox):
        entries.setdefault(f"bin/{applet}", (stat.S_IFLNK | 0o777, b"busybox"))
    # The kernel calls it by this name to find the module of a file system.
    entries["sbin"] = (stat.S_IFLNK | 0o777, b"bin")
    for module in kernel.modules:
        entries[f"{folder}/{module.file_name}"] = (stat.S_IFREG | 0o644, module.content)
    for name, text in (
        ("modules.dep", modules_dep(kernel.modules)),
        ("modules.alias", modules_alias(kernel.modules)),
    ):
        entries[f"{folder}/{name}"] = (stat.S_IFREG | 0o644, text.encode())
    for name in programs:
        _add_program(entries, find_program(name))
    return entries


def applets(busybox: Path) -> list[str]:
    """Name the commands that this busybox has."""
    done = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def find_program(name: str) -> Path:
    """Give a program of this machine. Raises VmError if it is not installed."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATHS}")
    if found is None:
        raise VmError(f"{name} is not installed: `make setup` as root installs what guests need")
    return Path(found)


def _add_program(entries: dict[str, tuple[int, bytes]], program: Path) -> None:
    """Add a program as /bin/NAME, and its libraries where it will look for them."""
    entries[f"bin/{program.name}"] = (stat.S_IFREG | 0o755, program.read_bytes())
    for library in _libraries(program):
        inside = library.lstrip("/")
        for parent in reversed(Path(inside).parents[:-1]):
            entries.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))
        entries[inside] = (stat.S_IFREG | 0o755, Path(library).read_bytes())


def _libraries(program: Path) -> Iterable[str]:
    """Name what a dynamically linked program is linked to, its loader too; nothing if static."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    return re.findall(r"(?:=> |^\s)(/\S+)", done.stdout, re.MULTILINE)
