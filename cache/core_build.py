# SPDX-License-Identifier: Apache-2.0
"""Describes the C core to cffi, once: the headers are also the cdef.

Every package keeps its C in a `core` folder; all of it is one extension, `cowshed.cache._core`, so
that a fault goes from the handler to the store to the ledger without leaving C. What Python may
see of a header stands between these two lines (a header may have several such pairs):

    /* cdef-begin */
    /* cdef-end */

Between them, write only what cffi reads: plain declarations, and `#define NAME integer`. HEADERS is
in order of dependence, because the later cdefs use the types of the earlier ones. All C includes by
path from the repository's root (`#include "cache/core/store.h"`).

Environment: COWSHED_SANITIZE=thread|address builds with that sanitizer (see `make sanitize`);
COWSHED_BOOTSTRAP=1 leaves out headers that are not written yet, and prints their names.
"""

import os
import sys
from pathlib import Path

from cffi import FFI

MODULE = "cowshed.cache._core"
CORES = (
    "cache/core",
    "accounting/core",
    "accounting/core/overlay",
    "faults/core",
    "faults/core/populate",
    "transport/core",
    "transport/core/blocks",
    "transport/core/guest",
    "transport/core/nbd",
)
HEADERS = (
    "cache/core/points.h",
    "cache/core/extent.h",
    "cache/core/shared_count.h",
    "cache/core/arrays.h",
    "cache/core/frames.h",
    "cache/core/image.h",
    "cache/core/collapse.h",
    "cache/core/fetch.h",
    "cache/core/room.h",
    "cache/core/store.h",
    "accounting/core/quota.h",
    "accounting/core/regions.h",
    "accounting/core/ledger.h",
    "accounting/core/open_regions.h",
    "accounting/core/settle.h",
    "accounting/core/presence.h",
    "accounting/core/preload.h",
    "accounting/core/track.h",
    "accounting/core/page_runs.h",
    "accounting/core/guest_memory.h",
    "accounting/core/evict.h",
    "accounting/core/overlay/overlay.h",
    "accounting/core/overlay/move.h",
    "accounting/core/overlay/missing.h",
    "faults/core/window.h",
    "faults/core/guest.h",
    "faults/core/populate/populate.h",
    "transport/core/elf.h",
    "transport/core/guest/handshake.h",
    "transport/core/guest/region.h",
    "transport/core/guest/attach.h",
    "transport/core/guest/follow.h",
    "transport/core/nbd/nbd.h",
)
BEGIN = "/* cdef-begin */"
END = "/* cdef-end */"
SANITIZERS = ("thread", "address")
COMPILE_FLAGS = (
    "-std=gnu11",
    "-O2",
    "-g",
    "-Wall",
    "-Wextra",
    "-pthread",
    "-fvisibility=hidden",
    "-UNDEBUG",  # Python's own flags take assertions out; ours guard against wrong bytes
)


class BuildError(Exception):
    """The C tree and this script disagree; the message says where and what to do."""


def cdef_of_header(header_text: str, name: str) -> str:
    """Return the text between the marks, padded so that line numbers stay the header's own.

    Raises BuildError if the marks are nested or unclosed.
    """
    lines: list[str] = []
    inside = False
    for line_no, line in enumerate(header_text.splitlines(), start=1):
        mark = line.strip()
        if mark == (END if inside else BEGIN):
            inside = not inside
            lines.append("")
        elif mark in (BEGIN, END):
            raise BuildError(f"{name}:{line_no}: {mark} out of place; marks come in pairs")
        else:
            lines.append(line if inside else "")
    if inside:
        raise BuildError(f"{name}: {BEGIN} without {END}; close it")
    return "\n".join(lines)


def has_marks(header: Path) -> bool:
    """Whether the header exists and has a cdef section."""
    return header.is_file() and BEGIN in header.read_text()


def present_headers(root: Path) -> list[str]:
    """Return HEADERS, after checking that exactly these headers have marks.

    Raises BuildError for a listed header without them (unless COWSHED_BOOTSTRAP=1) and for one with
    marks that is not listed, whose declarations would silently be left out.
    """
    missing = [name for name in HEADERS if not has_marks(root / name)]
    if missing and os.environ.get("COWSHED_BOOTSTRAP") != "1":
        wrong = ", ".join(missing)
        raise BuildError(f"{wrong}: no such header, or no {BEGIN} in it; write it or unlist it")
    for name in missing:
        print(f"core_build: bootstrapping without {name}", file=sys.stderr)
    for core in CORES:
        for path in sorted((root / core).glob("*.h")):
            name = path.relative_to(root).as_posix()
            if name not in HEADERS and has_marks(path):
                raise BuildError(f"{name}: has {BEGIN} but is not on HEADERS; list it")
    return [name for name in HEADERS if name not in missing]


def core_sources(root: Path) -> list[str]:
    """Return every C file of the cores, relative to the root, in a stable order."""
    return [
        path.relative_to(root).as_posix()
        for core in CORES
        for path in sorted((root / core).glob("*.c"))
    ]


def sanitize_flags() -> list[str]:
    """Return the flags that COWSHED_SANITIZE asks for; none if it is unset or empty."""
    sanitizer = os.environ.get("COWSHED_SANITIZE", "")
    if not sanitizer:
        return []
    if sanitizer not in SANITIZERS:
        raise BuildError(f"COWSHED_SANITIZE={sanitizer}: set it to one of {', '.join(SANITIZERS)}")
    return [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]


def describe_core(root: Path) -> FFI:
    """Return the extension's description: cdef from the headers, sources from the cores.

    Sources are relative to the root, where setuptools must be run. Raises BuildError.
    """
    headers = present_headers(root)
    ffi = FFI()
    for name in headers:
        ffi.cdef(cdef_of_header((root / name).read_text(), name))
    ffi.set_source(
        MODULE,
        "".join(f'#include "{name}"\n' for name in headers),
        sources=core_sources(root),
        include_dirs=["."],
        depends=[p.relative_to(root).as_posix() for c in CORES for p in (root / c).glob("*.h")],
        extra_compile_args=[*COMPILE_FLAGS, *sanitize_flags()],
        extra_link_args=["-pthread", *sanitize_flags()],
    )
    return ffi


ffibuilder = describe_core(Path(__file__).resolve().parent.parent)
