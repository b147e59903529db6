# SPDX-License-Identifier: Apache-2.0
"""Make one file read-only for this process and its children, by a mount namespace.

The namespace equals the outer one in everything else. In it the kernel refuses every change of the
file by its path, or by a descriptor opened there, also to static programs and bare system calls. It
takes CAP_SYS_ADMIN.

Landlock, which needs no privilege, cannot do this: its rules only allow, and cover a whole
directory, so every other file would have to be allowed by name, also those created later. A user
namespace, which would give anybody the capability, changes the owners of files and disables setuid
programs.

Mount propagation stays: mounts by the program appear outside too, and the reverse, wherever mounts
are shared. The mount that contains the file leaves its peer group while the read-only mount is
added, which would otherwise propagate outside, and joins the group again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["make_read_only"]

# Numbers that all architectures share, and <linux/mount.h>, <linux/fcntl.h>, <linux/sched.h>.
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_MOUNT_SETATTR: Final = 442
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_CLONE_NEWNS: Final = 0x20000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_MOVE_MOUNT_SET_GROUP: Final = 0x100
_MOUNT_ATTR_RDONLY: Final = 1
_MS_PRIVATE: Final = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class _Mount:
    """A mount's place, and whether mounts beneath it propagate to or from other namespaces."""

    place: str
    has_peers: bool


def make_read_only(path: str) -> None:
    """Make a file read-only to this process and its children, where the system allows it.

    Elsewhere it changes nothing and reports nothing. Open descriptors stay writable, and so do
    other names of the file.
    """
    with contextlib.ExitStack() as cleanup:

        def keep(fd: int) -> int:
            cleanup.callback(os.close, fd)
            return fd

        try:
            inside = keep(os.open(path, os.O_PATH | os.O_CLOEXEC))
            holding = _mount_of(inside)
            outer = keep(os.open(holding.place, os.O_PATH | os.O_CLOEXEC))
            if _mount_id(outer) != _mount_id(inside):  # another mount covers this one
                return
            _checked(_libc.unshare(_CLONE_NEWNS))
        except OSError:
            return
        inner = keep(os.open(holding.place, os.O_PATH | os.O_CLOEXEC))
        with contextlib.suppress(OSError):
            _put_over(path, inner, outer if holding.has_peers else None, keep)


def _put_over(path: str, inner: int, group_of: int | None, keep: Callable[[int], int]) -> None:
    """Mount the file read-only over itself, in the mount `inner`, which rejoins its peer group."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    copy = keep(_call(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags))
    _set_attributes(copy, set_bits=_MOUNT_ATTR_RDONLY)
    _set_attributes(inner)
    move = _MOVE_MOUNT_F_EMPTY_PATH
    try:
        _call(_SYS_MOVE_MOUNT, copy, b"", _AT_FDCWD, os.fsencode(path), move)
    finally:
        if group_of is not None:
            group = _MOVE_MOUNT_SET_GROUP | _MOVE_MOUNT_T_EMPTY_PATH | move
            _call(_SYS_MOVE_MOUNT, group_of, b"", inner, b"", group)


def _mount_id(fd: int) -> str:
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, number = line.partition(":")
        if name == "mnt_id":
            return number.strip()
    raise OSError(f"/proc/self/fdinfo/{fd} names no mount")


def _mount_of(fd: int) -> _Mount:
    """Return the mount of an open file. Raises OSError if it is not in this namespace."""
    wanted = os.fsencode(_mount_id(fd))
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        number, _, _, _, place, _, *optional = line.partition(b" - ")[0].split(b" ")
        if number == wanted:
            has_peers = any(word.startswith((b"shared:", b"master:")) for word in optional)
            return _Mount(os.fsdecode(_plain(place)), has_peers)
    raise OSError(f"mount {wanted!r} is not in this namespace")


def _plain(place: bytes) -> bytes:
    """Decode a path of mountinfo, which writes blanks and backslashes in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), place)


def _set_attributes(mount_fd: int, set_bits: int = 0) -> None:
    """Make a mount private, and set attributes."""
    attributes = struct.pack("QQQQ", set_bits, 0, _MS_PRIVATE, 0)
    _call(_SYS_MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, attributes, len(attributes))


def _call(number: int, *arguments: int | bytes) -> int:
    return _checked(_libc.syscall(number, *arguments))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
