# SPDX-License-Identifier: Apache-2.0
"""The sequences of accesses that policies are compared on: recorded from programs, or drawn.

Each function returns the extents in the order in which guests use them. Recorded ones depend on
this machine's programs and on how they were scheduled, drawn ones (draws.py) on a seed only.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Final

from backend import BenchError
from draws import hot_set_and_scan, interleave, zipf, zipf_with_scans
from record import Layout, record

__all__ = ["WORKLOADS", "Workload"]

Workload = Callable[[Path, random.Random], list[int]]

_NR_GUESTS: Final = 16
_PROGRAMS: Final = (
    "json.tool",
    "unittest",
    "http.server",
    "asyncio",
    "email.mime.text",
    "pydoc",
    "tarfile",
    "sqlite3",
    "xml.dom.minidom",
    "multiprocessing.pool",
)


def python_storm(_: Path, rng: random.Random) -> list[int]:
    """Record starts of Python programs; sixteen guests start one each, four times, side by side."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    roots = [library, Path(sys.executable).resolve().parent.parent / "lib", Path("/usr/lib")]
    layout = Layout.of(roots)
    starts = [
        list(layout.extents(record([sys.executable, "-c", f"import {name}"]))) for name in _PROGRAMS
    ]
    guests = [
        [extent for _ in range(4) for extent in rng.choice(starts)] for _ in range(_NR_GUESTS)
    ]
    return list(interleave(guests, rng))


def sqlite(folder: Path, rng: random.Random) -> list[int]:
    """Record SQLite's reads of a database of about 100 MB: popular keys, and ranges."""
    path = folder / "keys.sqlite"
    with sqlite3.connect(path) as made:
        made.execute("create table t (key integer primary key, name text, value blob)")
        rows = ((no, f"name {no * 7919 % 400_000}", rng.randbytes(200)) for no in range(400_000))
        made.executemany("insert into t values (?, ?, ?)", rows)
        made.execute("create index by_name on t (name)")
    made.close()
    layout = Layout()
    layout.add(str(path))
    script = Path(__file__).with_name("sqlite_reads.py")
    seed = str(rng.randrange(1 << 30))
    return list(
        layout.extents(record([sys.executable, str(script), str(path), seed], parts_of=[path]))
    )


def kernel_build(folder: Path, _: random.Random) -> list[int]:
    """Record the reads of a small configuration's build; COWSHED_LINUX names the source tree."""
    tree = os.environ.get("COWSHED_LINUX")
    if not tree:
        raise BenchError("COWSHED_LINUX is not set: name a folder with the kernel's source")
    build = folder / "build"
    build.mkdir()
    make = ["make", "-C", tree, f"O={build}"]
    subprocess.run([*make, "tinyconfig"], check=True, stdout=subprocess.DEVNULL)
    layout = Layout.of([Path(tree).resolve(), Path("/usr/lib/gcc"), Path("/usr/bin")])
    return list(layout.extents(record([*make, f"-j{os.cpu_count()}", "vmlinux"])))


def debian_boot(folder: Path, rng: random.Random) -> list[int]:
    """Record the blocks that a Debian reads as it boots; sixteen machines boot one by one."""
    from boot import record_boot

    image, reads = record_boot(folder)
    layout = Layout()
    layout.add(str(image))
    boot = list(layout.extents(reads))
    guests = [boot] * _NR_GUESTS
    return list(interleave(guests, rng, stagger=len(boot) // 4))


WORKLOADS: Final[dict[str, Workload]] = {
    "Zipf": zipf,
    "Zipf, four scans": zipf_with_scans,
    "hot set beside a random scan": hot_set_and_scan,
    "16 guests start Python programs": python_storm,
    "SQLite": sqlite,
    "kernel build": kernel_build,
    "16 machines boot Debian": debian_boot,
}
"""By name: a function of a folder for its files and a source of chance."""
