# SPDX-License-Identifier: Apache-2.0
"""The environment for the preloaded library of `cowshed attach`, and the checks made before.

The library is transport/preload/*.c; its config.h has the form of the environment variable.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cowshed.cache.errors import CowshedError, PeerError, UsageError
from cowshed.transport.channels.exchange import again_if_gone, ask, ask_for_fds, close_all, greet
from cowshed.transport.guest import attach
from cowshed.transport.messages.fields import take_number
from cowshed.transport.messages.protocol import Body

VARIABLE: Final = "COWSHED_ATTACH"
_LIBRARY: Final = "_preload.abi3.so"
# The library's buffers hold a line of this many bytes and a terminator.
_MAX_LINE_BYTES: Final = 4095
_MUST_BE_FIRST: Final = re.compile(r"libasan\.so|libclang_rt\.asan")


@dataclass(frozen=True, slots=True)
class Source:
    """An image's source as the daemon has it open: a descriptor, the caller's, and its length."""

    fd: int
    map_bytes: int


def library_path() -> Path:
    """Return the library's path. UsageError if it is missing, or its path cannot be preloaded."""
    path = Path(__file__).resolve().parents[1] / _LIBRARY
    if not path.is_file():
        raise UsageError(f"cowshed's library {path} is missing: install cowshed again")
    if any(mark in str(path) for mark in " :\n"):
        raise UsageError(
            f"cowshed is installed at {str(path.parent)!r}, and the dynamic linker preloads "
            "nothing from a path with a space or a colon: install it elsewhere"
        )
    return path


def describe(uri: str, image: str) -> Source:
    """Ask for an image's source. Raises the error of the daemon's refusal, and PeerError."""
    return again_if_gone(lambda: _describe(uri, image))


def _describe(uri: str, image: str) -> Source:
    with contextlib.closing(greet(uri)) as connection:
        reply, fds = ask_for_fds(connection, "describe", {"image": image})
        try:
            source = Source(fds[0] if fds else -1, take_number(reply, "map_bytes", minimum=1))
            if len(fds) != 1 or not _is_readable(source.fd):
                raise PeerError(f"the backend described {image!r} in a way that makes no sense")
        except BaseException:
            close_all(fds)
            raise
        return source


def _is_readable(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def rehearse(uri: str, request: Body) -> None:
    """Do what the library will do up to the last step, so that failures show before the program.

    Raises what Backend.open raises.
    """
    again_if_gone(lambda: _rehearse(uri, request))


def _rehearse(uri: str, request: Body) -> None:
    with contextlib.closing(greet(uri)) as connection:
        attach.rehearse(connection, request)
        # The guest's name is free again once the backend answers this.
        with contextlib.suppress(CowshedError):
            ask(connection, "close", {})


def environment(
    outer: Mapping[str, str],
    library: Path,
    socket: Path,
    source: Source,
    path: str,
    request: Body,
    populate: bool = False,
    read_only: bool = False,
) -> dict[str, str]:
    """Return the program's environment: outer, plus what loads and configures the library.

    source was described for request's image; path is the file that the program opens for it;
    populate makes each mapping behave as with MAP_POPULATE; with read_only none may be writable.
    Raises UsageError if a value is too
    long or contains a newline.
    """
    status = os.stat(path)
    opening = json.dumps({"op": "open", **{k: v for k, v in request.items() if v is not None}})
    lines = [
        f"1 {status.st_dev} {status.st_ino} {source.map_bytes} {int(populate)} {int(read_only)}",
        str(socket),
        path,
        json.dumps({"op": "describe", "image": request["image"]}),
        opening.removesuffix("}"),
    ]
    for line in lines:
        if len(os.fsencode(line)) > _MAX_LINE_BYTES or "\n" in line:
            raise UsageError(f"{line[:100]!r} is too long or contains a newline: rename it")
    others = [name for name in re.split("[ :]", outer.get("LD_PRELOAD", "")) if name]
    # AddressSanitizer aborts a program that loads another library before its own.
    first = list(itertools.takewhile(_MUST_BE_FIRST.search, others))
    preloaded = [*first, str(library), *others[len(first) :]]
    return {**outer, VARIABLE: "\n".join(lines), "LD_PRELOAD": ":".join(preloaded)}
