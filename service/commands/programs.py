# SPDX-License-Identifier: Apache-2.0
"""Check that a program can be run with a library preloaded: found, dynamic, not privileged.

A static program and one for another machine do not load the library, and the dynamic linker
ignores it in a program that gains privileges. None of these reports an error, so they are checked
before the program runs.
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cowshed.cache._core import ffi, lib
from cowshed.cache.errors import UsageError

__all__ = ["Elf", "check_preloadable", "find_program", "read_elf"]

_MAX_INTERPRETERS: Final = 5  # the kernel's own limit for scripts run by scripts
_MAX_LINE_BYTES: Final = 256


@dataclass(frozen=True)
class Elf:
    """The machine an ELF file is for, and its dynamic linker, "" if it is static."""

    bits: int
    is_big_endian: bool
    machine: int
    linker: str
    needs_first: bool

    @property
    def kind(self) -> tuple[int, bool, int]:
        """The fields in which a library must match a program."""
        return self.bits, self.is_big_endian, self.machine


def find_program(command: str) -> str:
    """Return the path of a command as a shell would find it. Raises UsageError."""
    path = shutil.which(command)
    if path is not None:
        return path
    if "/" not in command:
        raise UsageError(f"no command {command!r} in $PATH: name a program, or give its path")
    try:
        is_file = stat.S_ISREG(os.stat(command).st_mode)
    except OSError as error:
        raise UsageError(f"no program at {command!r}: {error.strerror}") from error
    what = "it is not executable: chmod +x it" if is_file else "it is not a regular file"
    raise UsageError(f"cannot run {command!r}: {what}")


def check_preloadable(path: str) -> None:
    """Raise UsageError, with the cure, unless the program at path will load a preloaded library.

    Follows `#!` lines to the interpreter that finally runs.
    """
    script = path
    for _ in range(_MAX_INTERPRETERS):
        head = _read_head(path)
        if not head.startswith(b"#!"):
            break
        path = _interpreter(head, path)
    elf = read_elf(path)
    if elf is None:
        if path == script and not head.startswith(b"#!"):
            raise UsageError(
                f"{path!r} is neither an ELF program nor a script with a #! line: "
                "run it by its interpreter, as `-- sh SCRIPT`"
            )
        raise UsageError(f"{script!r} is run by {path!r}, which is not an ELF program")
    own = read_elf("/proc/self/exe")
    if own is not None and elf.kind != own.kind:
        raise UsageError(
            f"{path!r} is a {elf.bits}-bit program for another machine than this cowshed: "
            "use a build for this one"
        )
    if not elf.linker:
        raise UsageError(
            f"{path!r} is statically linked, so its mappings cannot be served: "
            "use a dynamically linked build of it"
        )
    if own is not None and own.linker and Path(own.linker).name != Path(elf.linker).name:
        raise UsageError(
            f"{path!r} is linked by {elf.linker}, and this cowshed by {own.linker}: "
            "use a build of it for the same C library"
        )
    if elf.needs_first:
        raise UsageError(
            f"{path!r} is built with the address sanitizer, whose library must be loaded first: "
            "use a build without it"
        )
    _check_unprivileged(path)


def read_elf(path: str) -> Elf | None:
    """Read an ELF file's header; None if it is not ELF. Raises UsageError if unreadable."""
    found = ffi.new("struct elf *")
    try:
        with open(path, "rb", buffering=0) as file:
            result = lib.elf_read(file.fileno(), found)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
    except OSError as error:
        raise UsageError(f"cannot read the program {path!r}: {error.strerror}") from error
    if result == 0:
        return None
    linker = os.fsdecode(ffi.string(found.linker))
    return Elf(found.bits, found.is_big_endian, found.machine, linker, found.needs_first)


def _read_head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_LINE_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read the program {path!r}: {error.strerror}") from error


def _interpreter(head: bytes, script: str) -> str:
    words = head[2:].partition(b"\n")[0].split()
    if not words:
        raise UsageError(f"the script {script!r} names no interpreter in its #! line")
    return os.fsdecode(words[0])


def _check_unprivileged(path: str) -> None:
    status = os.stat(path)
    gains = ""
    if status.st_mode & stat.S_ISUID and status.st_uid != os.getuid():
        gains = "is setuid"
    elif status.st_mode & stat.S_ISGID and status.st_gid != os.getgid():
        gains = "is setgid"
    elif os.getuid() != 0 and "security.capability" in _attributes(path):
        gains = "has file capabilities"
    if gains:
        raise UsageError(
            f"{path!r} {gains}, so the dynamic linker ignores preloaded libraries: "
            "run it as the user or group whose rights it takes, or use a copy without them"
        )


def _attributes(path: str) -> list[str]:
    try:
        return os.listxattr(path)
    except OSError:
        return []
