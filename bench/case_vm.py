# SPDX-License-Identifier: Apache-2.0
"""From a machine's start to the checksum of all its files, when another has read the disk before.

The machine has the disk as its root: as a guest's mapping of the cache, on virtio-pmem with DAX; as
QEMU's own mapping of the file, the same otherwise; and as a read-only QEMU drive, on virtio-blk.
The file is in the page cache for the peers and in the store for cowshed: an earlier machine has
done all loads. Each side boots anew each round, so this is slow.
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from backend import BenchError, Served
from cases import Bench, CaseResult, Row, Side

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/vm"))
from filesystems import add_system, make_disk, make_files, sums_of
from guest_kernel import VmError
from herds import attach_words, image_memory, process_memory
from machines import Kit, Machine, drive, pmem, vm_kit

__all__ = ["vm"]

MIB = 1 << 20
CONTENT_BYTES = 64 * MIB
ROUNDS = 9
# A round is three boots: the bench's default limit for a row would end it after a few.
ROW_SECONDS = 600.0
_numbers = itertools.count(1)


def vm(bench: Bench) -> CaseResult:
    """Boot, and read, on each of three disks in turn. BenchError if no machine can be made."""
    try:
        kit = vm_kit()
        with _disk(bench) as (disk, sums):
            return _compare(bench, kit, disk, sums)
    except VmError as error:
        raise BenchError(f"machines: {error}") from error


def _compare(bench: Bench, kit: Kit, disk: Path, sums: str) -> CaseResult:
    size_bytes = disk.stat().st_size
    rounds = 1 if bench.quick else min(bench.rounds, ROUNDS)
    slow = replace(bench, rounds=rounds, row_seconds=ROW_SECONDS)
    with Served({"disk": disk}, 2 * size_bytes) as served:
        sides: dict[str, Side] = {
            "cowshed": _shared(kit, disk, sums, served),
            "pmem of the file": lambda: _boot(
                Machine(kit, pmem(disk, size_bytes), root="ext4"), disk, sums
            ),
            "-drive": lambda: _boot(
                Machine(kit, drive(disk), root="ext4", root_device="/dev/vda"), disk, sums
            ),
        }
        bench.say("a first machine, which loads")
        first_seconds, first = sides["cowshed"]()
        row = Row.measure(
            slow,
            f"disk of {size_bytes // MIB} MiB",
            "s",
            sides,
            [("cowshed", "-drive", None), ("cowshed", "pmem of the file", None)],
        )
    how = "translated (TCG)" if kit.accel == "tcg" else "on the processor (KVM)"
    return CaseResult(
        "from a machine's start to the checksum of all its files, another having read them",
        [row],
        [
            f"QEMU, Linux {kit.kernel.release}, {how}, one CPU; ext4, with DAX on virtio-pmem",
            f"the first of all took {first_seconds:.2f} s and had {first['misses']:.0f} misses",
            "mib_guest_cache: in the guest's own page cache in the end",
        ],
    )


def _shared(kit: Kit, disk: Path, sums: str, served: Served) -> Side:
    run_dir = Path(urlsplit(served.uri).path).parent

    def measure() -> tuple[float, dict[str, float]]:
        name = f"vm{next(_numbers)}"

        def faults() -> dict[str, float]:
            guests = served.request("status")["status"]["guests"]
            (guest,) = [guest for guest in guests if guest["name"] == name]
            return {"hits": guest["hits"], "misses": guest["misses"]}

        words = attach_words(run_dir, "disk", name)
        size_bytes = disk.stat().st_size
        machine = Machine(kit, pmem("{image}", size_bytes), before=words, root="ext4")
        return _boot(machine, disk, sums, faults)

    return measure


def _boot(
    machine: Machine,
    disk: Path,
    sums: str,
    more: Callable[[], dict[str, float]] = dict,
) -> tuple[float, dict[str, float]]:
    """Wait for a machine, just started, and its checksums; return the seconds since its start."""
    with machine:
        began = time.monotonic()
        found = machine.call("sums /")
        read_seconds = time.monotonic() - began
        if found != sums:
            raise BenchError("a machine read wrong bytes of its files")
        cached = machine.call("grep ^Cached: /proc/meminfo").split()[1]
        where = {
            "s_boot": machine.boot_seconds,
            "s_read": read_seconds,
            "mib_guest_cache": int(cached) / 1024,
            "mib_disk_mapped": image_memory(machine.pid, disk, ["Rss"]) / MIB,
            "mib_qemu": process_memory(machine.pid) / MIB,
            **more(),
        }
        return machine.boot_seconds + read_seconds, where


@contextmanager
def _disk(bench: Bench) -> Iterator[tuple[Path, str]]:
    """Make an ext4 disk to boot from for the block; yield it and its files' checksums."""
    with tempfile.TemporaryDirectory(dir=bench.build_dir, prefix="vm-") as name:
        tree = Path(name) / "tree"
        tree.mkdir()
        make_files(tree, 16 * MIB if bench.quick else CONTENT_BYTES, random.Random(7))
        add_system(tree)
        disk = make_disk("ext4", tree, Path(name) / "disk.ext4")
        sums = sums_of(tree)
        shutil.rmtree(tree)
        yield disk, sums
