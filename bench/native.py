# SPDX-License-Identifier: Apache-2.0
"""The C of bench/core, compiled at first use: timed loops, and a server without a disk."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from cffi import FFI

from cowshed.cache.core_build import cdef_of_header

__all__ = ["ROOT", "checked", "cost_of", "ffi", "load", "load_steady", "nbd_limit"]

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "bench/core"
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT}"]

ffi = FFI()
for _name in ("touch.h", "steady.h"):
    ffi.cdef(cdef_of_header((CORE / _name).read_text(), _name))


def load(build_dir: Path) -> Any:
    """Return touch.c as a library. Raises CalledProcessError if it does not compile."""
    library = _compiled(build_dir, ["touch.c", "touch.h"], "so", ["-shared", "-fPIC"])
    return ffi.dlopen(str(library))


def load_steady(build_dir: Path) -> Any:
    """Return steady.c as a library. Raises CalledProcessError if it does not compile."""
    library = _compiled(build_dir, ["steady.c", "steady.h"], "so", ["-shared", "-fPIC"])
    return ffi.dlopen(str(library))


def nbd_limit(build_dir: Path) -> Path:
    """Return the path of nbd_limit.c as a program. Raises CalledProcessError as above."""
    return _compiled(build_dir, ["nbd_limit.c", "../../transport/core/nbd/wire.h"], "bin", [])


def _compiled(build_dir: Path, sources: list[str], suffix: str, flags: list[str]) -> Path:
    """Compile the first of sources with gcc, unless sources and flags are unchanged."""
    paths = [CORE / source for source in sources]
    key = hashlib.sha256(" ".join(FLAGS + flags).encode() + b"".join(s.read_bytes() for s in paths))
    made = build_dir / f"{paths[0].stem}-{key.hexdigest()[:12]}.{suffix}"
    if not made.exists():
        build_dir.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", *FLAGS, *flags, "-o", str(unfinished), str(paths[0])], check=True)
        unfinished.rename(made)
    return made


def checked(result: int, what: str) -> int:
    """Return a result of C, or raise OSError for its -errno."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def cost_of(cost: Any) -> dict[str, int]:
    """Return a struct touch_cost as a dict."""
    return {name: int(getattr(cost, name)) for name, _ in ffi.typeof("struct touch_cost").fields}
