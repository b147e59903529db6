# SPDX-License-Identifier: Apache-2.0
"""Debian's kernel for guests: fetched once with apt-get, without installing it.

linux-image-amd64 depends on the kernel of the day; that package is downloaded, and what a guest
needs of it kept in build/vm/. Whoever comes later, offline too, finds it there until `make clean`.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernel_modules import Module, closure, read_module

__all__ = ["CACHE", "GUEST_MODULES", "GuestKernel", "VmError", "cache_lock", "guest_kernel"]

CACHE: Final = Path(__file__).resolve().parents[2] / "build/vm"
_META_PACKAGE: Final = "linux-image-amd64"
_DOWNLOAD_SECONDS: Final = 300
# Loaded by name, or found by the kernel through their aliases. ext4 asks for crc32c, an algorithm.
GUEST_MODULES: Final = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_console"),
    *("libnvdimm", "nd_btt", "nd_pmem", "virtio_pmem", "nfit", "dax", "device_dax"),
    *("crc32c_generic", "ext4", "erofs", "squashfs", "loop", "nbd"),
    *("vsock", "vmw_vsock_virtio_transport"),
)
# Where those and what they need lie; the rest of the package, nine tenths of it, is passed over.
_FOLDERS: Final = (
    *("fs/", "lib/", "crypto/", "net/core/", "net/vmw_vsock/", "arch/x86/crypto/"),
    *(f"drivers/{name}/" for name in ("acpi/nfit", "block", "char", "dax", "nvdimm", "virtio")),
    *("drivers/net/virtio_net.ko", "drivers/net/net_failover.ko"),
)
_MEMBER = re.compile(r"(?:\./)?(?:usr/)?lib/modules/([^/]+)/kernel/(.+\.ko(?:\.xz)?)$")


class VmError(Exception):
    """A guest cannot be made, started or talked to; says why, and what there is to see of it."""


@dataclass(frozen=True)
class GuestKernel:
    """A kernel to boot and its modules, in the order in which they can be loaded."""

    release: str
    path: Path
    modules: tuple[Module, ...]


def guest_kernel() -> GuestKernel:
    """Give the kernel in build/vm/, after fetching it if there is none yet. Raises VmError."""
    with cache_lock():
        folder = next(iter(sorted(CACHE.glob("kernel-*"))), None) or _fetch()
    modules = {
        module.name: module
        for path in (folder / "modules").iterdir()
        for module in [read_module(path.name, path.read_bytes())]
    }
    ordered = closure(GUEST_MODULES, modules)
    return GuestKernel(folder.name.removeprefix("kernel-"), folder / "kernel", tuple(ordered))


@contextmanager
def cache_lock() -> Iterator[None]:
    """Have build/vm/ for the block alone."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch() -> Path:
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        download = Path(name)
        _apt_get_download(_kernel_package(), download)
        (package,) = download.glob("*.deb")
        unpacked = download / "kernel"
        release = _unpack(package, unpacked)
        folder = CACHE / f"kernel-{release}"
        unpacked.rename(folder)
        return folder


def _kernel_package() -> str:
    """Name the package that linux-image-amd64 depends on; its lists fetched first if need be."""
    if shutil.which("apt-cache") is None:
        raise VmError("no apt-cache here: guests' kernels are Debian's; run this on Debian")
    for try_no in range(2):
        done = subprocess.run(
            ["apt-cache", "depends", _META_PACKAGE], capture_output=True, text=True, check=False
        )
        if found := re.search(r"Depends: (linux-image-\S+)", done.stdout):
            return found[1]
        if try_no == 0 and os.geteuid() == 0:
            _run(["apt-get", "-qq", "update"])
    raise VmError(f"apt does not know {_META_PACKAGE}; run as root: apt-get update")


def _apt_get_download(package: str, folder: Path) -> None:
    # As root apt would drop to a user of its own, who may not enter our folder.
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
    try:
        _run(command, cwd=folder)
    except VmError:
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "-qq", "update"])
        _run(command, cwd=folder)


def _run(command: list[str], cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VmError(f"{' '.join(command)}: not done in {_DOWNLOAD_SECONDS} s") from error
    if done.returncode:
        raise VmError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _unpack(package: Path, folder: Path) -> str:
    """Write a package's kernel and the modules for guests into folder; its release."""
    release, found = "", {}
    (folder / "modules").mkdir(parents=True)
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as unpacker,
        tarfile.open(fileobj=unpacker.stdout, mode="r|") as members,
    ):
        for member in members:
            match = _MEMBER.match(member.name)
            wanted = match is not None and match[2].startswith(_FOLDERS)
            is_kernel = "/boot/vmlinuz-" in f"/{member.name.removeprefix('./')}"
            if not (wanted or is_kernel):
                continue
            content = members.extractfile(member)
            if content is None:
                continue
            if match is None:
                (folder / "kernel").write_bytes(_unpacked(content.read()))
            else:
                release = match[1]
                module = read_module(Path(member.name).name, content.read())
                found[module.name] = module
    if unpacker.returncode or not release or not (folder / "kernel").exists():
        raise VmError(f"{package.name} is no kernel package that can be read")
    try:
        chosen = closure(GUEST_MODULES, found)
    except KeyError as error:
        raise VmError(f"{package.name}: module {error} is not where it was looked for") from error
    for module in chosen:
        (folder / "modules" / module.file_name).write_bytes(module.content)
    return release


def _unpacked(vmlinuz: bytes) -> bytes:
    """Take the kernel out of its self-extracting shell, if it is xz: QEMU starts that as well.

    Under TCG the shell takes twice as long as all the rest of a boot. Where the packed kernel lies:
    Linux, Documentation/arch/x86/boot.rst, payload_offset.
    """
    setup_sectors = vmlinuz[0x1F1] or 4
    (offset,) = struct.unpack_from("<I", vmlinuz, 0x248)
    packed = vmlinuz[(setup_sectors + 1) * 512 + offset :]
    try:
        kernel = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(packed)
    except lzma.LZMAError:
        return vmlinuz
    return kernel if kernel.startswith(b"\x7fELF") else vmlinuz
