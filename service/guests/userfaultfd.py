# SPDX-License-Identifier: Apache-2.0
"""Checks of this host's userfaultfd, and of the descriptors that guests send."""

from __future__ import annotations

import fcntl
import os
import select
import struct
from pathlib import Path
from typing import Final

from cowshed.cache import PeerError, UsageError
from cowshed.faults import uffd_features
from cowshed.transport.links.foreign_fds import close_foreign, device_and_inode

__all__ = [
    "check_guest_files",
    "check_populated_uffd",
    "check_uffd",
    "has_ended",
    "memory_lives",
    "open_device",
    "open_pagemap",
]

DEVICE: Final = "/dev/userfaultfd"
_USERFAULTFD_IOC_NEW: Final = 0xAA00
_UFFDIO_API: Final = 0xC018AA3F
_UFFD_API: Final = 0xAA
_UFFD_FEATURE_EVENT_FORK: Final = 1 << 1
# Beyond every process's address space.
_NOWHERE: Final = 1 << 62
_SYSCTL: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")


def open_device() -> int | None:
    """Open the device that is lent to guests for making a userfaultfd; None if they need none.

    Raises UsageError, with the cure, if this host cannot serve any guest.
    """
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if os.geteuid() == 0 or _sysctl_allows():
            return None
        raise UsageError(
            f"cannot open {DEVICE}: {error.strerror}, so no guest's faults can be answered; "
            "run as root, give this user access to the device, "
            "or set sysctl vm.unprivileged_userfaultfd=1"
        ) from error
    try:
        _check_features(device)
    except BaseException:
        os.close(device)
        raise
    return device


def _sysctl_allows() -> bool:
    try:
        return _SYSCTL.read_text().strip() == "1"
    except OSError:
        return False


def _check_features(device: int) -> None:
    uffd = fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        api = bytearray(struct.pack("QQQ", _UFFD_API, 0, 0))
        fcntl.ioctl(uffd, _UFFDIO_API, api)
    finally:
        os.close(uffd)
    missing = uffd_features() & ~struct.unpack("QQQ", api)[1]
    if missing:
        raise UsageError(
            f"this kernel's userfaultfd lacks features {missing:#x} that cowshed needs; "
            "run Linux 6.7 or newer"
        )


def check_uffd(fd: int) -> None:
    """Raise PeerError unless fd is a userfaultfd with the features that guests must enable."""
    features = _features_of(fd)
    if uffd_features() & ~features:
        raise PeerError(
            f"the userfaultfd has features {features:#x}, needed are {uffd_features():#x}"
        )


def check_populated_uffd(fd: int) -> None:
    """Raise PeerError unless fd is a userfaultfd whose faults can be answered by copy.

    A guest may choose any features except EVENT_FORK, whose events would install descriptors in
    this process.
    """
    features = _features_of(fd)
    if features & _UFFD_FEATURE_EVENT_FORK:
        raise PeerError(
            "the userfaultfd reports forks, and a fork's memory cannot be served: "
            "make it without UFFD_FEATURE_EVENT_FORK"
        )


def _features_of(fd: int) -> int:
    if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[userfaultfd]":
        raise PeerError("the first descriptor of a region must be a userfaultfd")
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("API:"):
            return int(line.split(":")[2], 16)
    raise PeerError("the userfaultfd was not set up with UFFDIO_API")


def open_pagemap(pid: int, pidfd: int | None) -> int | None:
    """Open a peer's /proc/PID/pagemap; None if this process may not, or the peer has ended."""
    if pidfd is None or has_ended(pidfd):
        return None
    try:
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if has_ended(pidfd):  # then the pid may belong to another process
        os.close(fd)
        return None
    return fd


def check_guest_files(pid: int, pidfd: int | None, fds: list[int]) -> None:
    """Raise PeerError unless fds[1] and [2] are the peer's own /proc/PID/pagemap and /proc/PID/mem.

    A guest that passed another process's page tables could hide its private pages from its quota.
    Files of another /proc mount, as a container's, cannot be compared: files of our /proc replace
    them in the list. Raises UsageError, with the cure, if this process does not see the guest's
    process or may not open its files.
    """
    if pid == 0:
        raise UsageError(
            "the guest's process is in a PID namespace that the daemon does not see, so its page "
            "tables cannot be identified: run the daemon in the host's PID namespace "
            "(in a container: --pid=host), or the guest in the daemon's"
        )
    for no, name in enumerate(("pagemap", "mem"), 1):
        path = f"/proc/{pid}/{name}"
        try:
            about = os.stat(path)
            own = about.st_dev, about.st_ino
            sent = device_and_inode(fds[no])
            if sent[0] != own[0] and os.readlink(f"/proc/self/fd/{fds[no]}").endswith(f"/{name}"):
                theirs, fds[no] = fds[no], os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                close_foreign([theirs])
                sent = own
        except PermissionError as error:
            raise UsageError(
                f"the daemon may not open {path}, of a guest with a /proc of its own: run the "
                "daemon as root with CAP_SYS_PTRACE, or the guest in the daemon's PID namespace"
            ) from error
        except OSError as error:
            raise PeerError(f"cannot use {path}: {error.strerror}") from error
        if sent != own:
            raise PeerError(f"a region needs the guest's own /proc/self/{name}")
    if pidfd is None or has_ended(pidfd):
        raise PeerError(f"the guest's process {pid} has ended")


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def memory_lives(mem_fd: int) -> bool:
    """Whether any process still has the memory that a /proc/PID/mem was opened on.

    None has once the process has ended or executed another program. Never blocks: the address read
    is beyond all pages.
    """
    try:
        os.pread(mem_fd, 1, _NOWHERE)
    except OSError:
        return True
    return False  # 0 bytes and no error: the memory is gone, see proc_pid_mem(5)
