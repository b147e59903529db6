# SPDX-License-Identifier: Apache-2.0
"""The timed loops of bench/core, compiled when first wanted and loaded into this process."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from cffi import FFI

from cowshed.cache.core_build import cdef_of_header

__all__ = ["ROOT", "checked", "cost_of", "ffi", "load"]

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "bench/core"
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC"]

ffi = FFI()
ffi.cdef(cdef_of_header((CORE / "touch.h").read_text(), "touch.h"))


def load(build_dir: Path) -> Any:
    """Give the library, compiled by gcc into build_dir if its source or the flags are new there.

    Raises CalledProcessError, with gcc's complaint on stderr, if it does not compile.
    """
    sources = [CORE / "touch.h", CORE / "touch.c"]
    key = hashlib.sha256(" ".join(FLAGS).encode() + b"".join(s.read_bytes() for s in sources))
    library = build_dir / f"touch-{key.hexdigest()[:12]}.so"
    if not library.exists():
        build_dir.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["gcc", *FLAGS, f"-I{ROOT}", "-o", str(unfinished), str(CORE / "touch.c")], check=True
        )
        unfinished.rename(library)
    return ffi.dlopen(str(library))


def checked(result: int, what: str) -> int:
    """Give a result of C back, or raise what its -errno stands for."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def cost_of(cost: Any) -> dict[str, int]:
    """Give a struct touch_cost as a dict."""
    return {name: int(getattr(cost, name)) for name, _ in ffi.typeof("struct touch_cost").fields}
