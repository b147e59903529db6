# SPDX-License-Identifier: Apache-2.0
"""`cowshed attach`: run a program that maps an image's source file from the cache.

The program gets the path of the image's source. A preloaded library (transport/preload) turns
each of its mappings of that file into a guest mapping. Accesses that the library cannot see, by a
static child or a bare system call, read the source file itself, never zeros.

This process becomes the program by execve: signals, exit status and terminal are the program's.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

from cowshed.cache.errors import UsageError
from cowshed.service.commands.programs import check_preloadable, find_program
from cowshed.service.commands.shield import make_read_only
from cowshed.service.operators.control_client import ControlClient
from cowshed.service.settings.config import socket_path
from cowshed.service.settings.quotas import parse_quota
from cowshed.transport.guest import preloading

__all__ = ["IMAGE_WORD", "AttachOrder", "become"]

IMAGE_WORD: Final = "{image}"
_MAX_NAME_LENGTH: Final = 64
# "none" on the wire, where an absent number means the daemon's default: larger than any image.
_NO_QUOTA_BYTES: Final = 1 << 60
# Python ignores these signals; programs expect the default action, as a shell leaves it.
_SIGNALS_IGNORED: Final = ("SIGPIPE", "SIGXFSZ")


@dataclass(frozen=True)
class AttachOrder:
    """What to run and how; quota_bytes and on_quota None leave it to the daemon."""

    image: str
    command: Sequence[str]
    run_dir: Path
    guest: str | None = None
    quota_bytes: int | None = None
    on_quota: str | None = None
    populate: bool = False
    read_only: bool = False

    @classmethod
    def parse(
        cls,
        image: str,
        command: Sequence[str],
        run_dir: Path,
        guest: str | None,
        quota: str | None,
        on_quota: str | None,
        populate: bool,
        read_only: bool = False,
    ) -> Self:
        """Build the order from a command line. Raises UsageError, one line."""
        if not any(IMAGE_WORD in word for word in command):
            raise UsageError(
                f"the command has no {IMAGE_WORD} in it: write that where the program is to find "
                f"the image, as `cowshed attach {image} -- md5sum {IMAGE_WORD}`"
            )
        if guest is not None and not 1 <= len(guest) <= _MAX_NAME_LENGTH:
            raise UsageError(
                f"guest name {guest[:80]!r} has {len(guest)} characters: "
                f"give 1 to {_MAX_NAME_LENGTH}"
            )
        quota_bytes = None
        if quota is not None:
            quota_bytes = parse_quota(quota)
            if quota_bytes is None:
                quota_bytes = _NO_QUOTA_BYTES
        return cls(image, command, run_dir, guest, quota_bytes, on_quota, populate, read_only)


def become(order: AttachOrder) -> NoReturn:
    """Become the program of the order. On failure raises CowshedError and has run nothing."""
    program = find_program(order.command[0])
    check_preloadable(program)
    library = preloading.library_path()
    request = {
        "image": order.image,
        "guest": order.guest or _own_name(program),
        "quota_bytes": order.quota_bytes,
        "on_quota": order.on_quota,
        "token": os.urandom(16).hex(),
    }
    socket = socket_path(order.run_dir)
    with ControlClient(order.run_dir):  # its error, if no daemon listens, names --run-dir
        source = preloading.describe(f"unix://{socket}", order.image)
        preloading.rehearse(f"unix://{socket}", request)
    path = _path_of(source, order.image)
    make_read_only(path)
    words = [word.replace(IMAGE_WORD, path) for word in order.command]
    environment = preloading.environment(
        os.environ,
        library,
        socket,
        source,
        path,
        request,
        order.populate,
        order.read_only,
    )
    _execute(program, words, environment)


def _own_name(program: str) -> str:
    suffix = f"-{os.getpid()}"
    return Path(program).name[: _MAX_NAME_LENGTH - len(suffix)] + suffix


def _path_of(source: preloading.Source, image: str) -> str:
    """Return the source's path, or /proc/self/fd/N, left open, if this user may not open it."""
    path = os.readlink(f"/proc/self/fd/{source.fd}")
    status = os.fstat(source.fd)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    except OSError:  # this user may not search a directory of the path
        return _lend(source)
    if there is None or not _is_same(there, status):
        raise UsageError(
            f"the file of image {image!r}, {path.removesuffix(' (deleted)')!r}, was replaced or "
            "removed since the daemon opened it: put it back, or restart the daemon"
        )
    if not os.access(path, os.R_OK):
        return _lend(source)
    os.close(source.fd)
    return path


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return os.path.samestat(one, other) and stat.S_IFMT(one.st_mode) == stat.S_IFMT(other.st_mode)


def _lend(source: preloading.Source) -> str:
    os.set_inheritable(source.fd, True)
    return f"/proc/self/fd/{source.fd}"


def _execute(program: str, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    for name in _SIGNALS_IGNORED:
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, list(words), dict(environment))
    except OSError as error:
        raise UsageError(f"cannot run {program!r}: {error.strerror}") from error
