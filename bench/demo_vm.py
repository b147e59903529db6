# SPDX-License-Identifier: Apache-2.0
"""`make demo-vm`: three machines, one disk in memory, and not one wrong byte.

Makes an ext4 disk that machines can boot from and serves it. Three machines of stock QEMU have it
as their root, mapped from the cache. Each prints a checksum of all its files: at first, after one
of them has written, and while everything is evicted under them. Then three more boot from separate
copies, to measure what sharing saves.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final

import click
from demo_command import fail, ignore_signals, one_line_failures, size_option, stop_on_signals
from demo_crowd import Backend
from demo_folders import open_to_all, roomy, temporary_folder
from demo_image import fill_tree
from demo_report import resident_frames_bytes
from demo_stage import DemoError, Stage, Step
from demo_vm_disk import Contents, checksum, parse_sums
from demo_vm_report import Memory, VmMeasured, vm_report
from rich.console import Console

from cowshed.service.runtime.sizes import format_bytes
from cowshed.transport import connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/vm"))
from filesystems import add_system, make_disk, sums_of
from guest_kernel import VmError
from herds import Herd, image_memory, process_memory
from machines import Kit, Machine, pmem, vm_kit

_NR_MACHINES: Final = 3
_WRITER: Final = 1
_MIN_SIZE_BYTES: Final = 16 << 20
_WRITE_BYTES: Final = 6 << 20
_FREE_BYTES: Final = 2 * _WRITE_BYTES
# For a guest's shell; head ends yes with SIGPIPE, which is no failure here.
_YES: Final = f"set +o pipefail; yes '{{}}' | head -c {_WRITE_BYTES}"
_EVICT_EVERY_SECONDS: Final = 0.1
_NR_STEPS: Final = 10


class VmDemo:
    """One run."""

    def __init__(self, stage: Stage, size_bytes: int, seed: int) -> None:
        self._stage = stage
        self._size_bytes = size_bytes
        self._rng = Random(seed)
        self._problems: list[str] = []
        self._wrong_bytes = self._compared_bytes = 0

    def run(self) -> tuple[VmMeasured, list[str]]:
        """Run every step; return the figures, and the problems, a line each.

        Leaves no process and no file behind but build/vm/, the machines' kernel. Raises DemoError,
        VmError or CowshedError.
        """
        with contextlib.ExitStack() as stack:
            try:
                measured = self._show(stack)
            finally:
                ignore_signals()
        self._stage.say()
        self._stage.console.print(vm_report(measured))
        self._stage.say()
        return measured, self._problems

    def _show(self, stack: contextlib.ExitStack) -> VmMeasured:
        """Run the steps; stack undoes their effects."""
        folder = stack.enter_context(temporary_folder(roomy((_NR_MACHINES + 3) * self._size_bytes)))
        run_dir = stack.enter_context(temporary_folder(open_to_all()))
        run_dir.chmod(0o755)
        kit = self._make_kit()
        self._disk = self._make_disk(folder)
        self._disk_bytes = self._disk.stat().st_size
        self._backend = self._start_backend(stack, run_dir)
        self._control = stack.enter_context(connect(self._backend.uri))
        self._herd = stack.enter_context(Herd(kit, run_dir))
        machines = self._boot()
        self._check("Each reads all of its files and prints one checksum of them.", machines)
        self._write(machines[_WRITER])
        self._check(
            "Each reads all again: the writer has what it wrote, the others what they\nhad.",
            machines,
        )
        self._check_evicted(machines)
        copied = self._boot_copies(stack, kit, folder)
        shared, copies, audit = self._measure(machines, copied)
        return VmMeasured(
            _NR_MACHINES,
            self._disk_bytes,
            shared,
            copies,
            audit,
            self._status(),
            self._compared_bytes,
            self._wrong_bytes,
        )

    def _make_kit(self) -> Kit:
        with self._stage.step(
            "Make ready what machines are made of: QEMU, Debian's kernel, busybox."
        ) as step:
            kit = vm_kit()
            how = "translated (TCG)" if kit.accel == "tcg" else "on the processor (KVM)"
            step.outcome = f"Linux {kit.kernel.release}, {how}"
        return kit

    def _make_disk(self, folder: Path) -> Path:
        with self._stage.step(
            f"Make an ext4 disk to boot from, with {format_bytes(self._size_bytes)} of files.",
            self._size_bytes,
        ) as step:
            tree = folder / "tree"
            tree.mkdir(mode=0o700)
            try:
                fill_tree(tree, self._size_bytes, step.reach)
                add_system(tree)
                disk = make_disk("ext4", tree, folder / "demo.ext4", _FREE_BYTES)
                sums = parse_sums(sums_of(tree))
                sizes = {name: (tree / name).stat().st_size for name in sums}
                self._contents = Contents(sums, sizes)
                self._writers = self._contents.copy()
            finally:
                shutil.rmtree(tree, ignore_errors=True)
            step.outcome = (
                f"{len(self._contents.sums)} files, checksum {checksum(self._contents.sums)}"
            )
        return disk

    def _start_backend(self, stack: contextlib.ExitStack, run_dir: Path) -> Backend:
        capacity_bytes = self._disk_bytes
        with self._stage.step(
            f"Start the backend:\ncowshed serve --image demo={self._disk.name} "
            f"--capacity {format_bytes(capacity_bytes)}"
        ) as step:
            backend = stack.enter_context(Backend(self._disk, capacity_bytes, run_dir))
            backend.wait_ready()
            step.outcome = f"process {backend.pid}, as root"
        return backend

    def _boot(self) -> list[Machine]:
        with self._stage.step(
            f"Boot {_NR_MACHINES} machines from it, with the disk mapped from the cache:\n"
            "cowshed attach demo -- qemu-system-x86_64 ...\n"
            "  -object memory-backend-file,share=off,mem-path={image},id=disk,size=...\n"
            "  -device virtio-pmem-pci,memdev=disk",
            _NR_MACHINES * self._disk_bytes,
        ) as step:
            seconds, loads = [], []
            for number in range(1, _NR_MACHINES + 1):
                name = f"vm{number}"
                machine = self._herd.start(name, "demo", self._disk_bytes)
                machine.wait_ready()
                step.reach(number * self._disk_bytes)
                seconds.append(f"{machine.boot_seconds:.1f}")
                loads.append(str(self._guest(name)["misses"]))
            step.outcome = f"boots of {', '.join(seconds)} s, waiting for {', '.join(loads)} loads"
        return list(self._herd.machines.values())

    def _check(self, text: str, machines: list[Machine]) -> None:
        with self._stage.step(text, len(machines) * self._disk_bytes) as step:
            self._compare_all(machines, step)
            step.outcome = f"wrong bytes so far: {self._wrong_bytes}"

    def _compare_all(self, machines: list[Machine], step: Step | None = None) -> None:
        tickets = [machine.start("sums /") for machine in machines]
        for machine, ticket in zip(machines, tickets, strict=True):
            self._compare(machine, machine.finish(ticket), told=step is not None)
            if step is not None:
                step.advance(self._disk_bytes)

    def _compare(self, machine: Machine, text: str, *, told: bool = True) -> None:
        """Compare the files that a machine found with the expected ones; return its checksum."""
        number = list(self._herd.machines.values()).index(machine)
        contents = self._contents if number != _WRITER else self._writers
        found = parse_sums(text)
        wrong_bytes, wrong_names = contents.compare(found)
        self._compared_bytes += contents.nr_bytes
        self._wrong_bytes += wrong_bytes
        verdict = "correct" if not wrong_names else f"WRONG: {', '.join(wrong_names[:3])}"
        if told:
            self._stage.say(
                f"      machine {number + 1}: {len(found)} files, checksum {checksum(found)}, "
                f"{verdict}"
            )
        self._problems += [f"machine {number + 1}: {name} is wrong" for name in wrong_names]

    def _write(self, machine: Machine) -> None:
        with self._stage.step(
            f"Machine {_WRITER + 1} mounts its disk read-write, makes a file of "
            f"{format_bytes(_WRITE_BYTES)}, overwrites\none of the others' and removes another."
        ) as step:
            overwritten, removed = self._rng.sample(self._contents.ordinary_names(), 2)
            machine.call("mount -o remount,rw /")
            machine.call(f"{_YES.format('of machine 2')} > /written.by.machine.2")
            machine.call(f"echo overwritten > '{overwritten}' && rm '{removed}' && sync")
            self._writers.write(overwritten, b"overwritten\n")
            self._writers.write("./written.by.machine.2", b"of machine 2\n", _WRITE_BYTES)
            self._writers.remove(removed)
            private_bytes = self._guest("vm2")["private_bytes"]
            step.outcome = f"{private_bytes // 4096} pages copied for it, charged to it"

    def _check_evicted(self, machines: list[Machine]) -> None:
        with self._stage.step(
            "Each reads all again, while everything is evicted under it ten times a\n"
            "second: cowshed evict demo",
            len(machines) * self._disk_bytes,
        ) as step:
            tickets = [machine.start("sums /") for machine in machines]
            nr_evictions = evicted_bytes = 0
            for machine, ticket in zip(machines, tickets, strict=True):
                while not machine.answered(ticket, _EVICT_EVERY_SECONDS):
                    evicted_bytes += self._control.request("evict", image="demo")["evicted_bytes"]
                    nr_evictions += 1
                self._compare(machine, machine.finish(ticket))
                step.advance(self._disk_bytes)
            step.outcome = (
                f"{nr_evictions} evictions, {format_bytes(evicted_bytes)}; "
                f"wrong bytes so far: {self._wrong_bytes}"
            )

    def _boot_copies(
        self, stack: contextlib.ExitStack, kit: Kit, folder: Path
    ) -> list[tuple[int, Path]]:
        """Boot as many machines without cowshed, with the same work; return pids and disks."""
        booted = []
        with self._stage.step(
            f"Boot {_NR_MACHINES} others without cowshed, each from its own copy of the disk.",
            _NR_MACHINES * self._disk_bytes,
        ) as step:
            for number in range(_NR_MACHINES):
                copy = folder / f"copy-{number}.ext4"
                shutil.copyfile(self._disk, copy)
                disk = pmem(copy, self._disk_bytes)
                machine = stack.enter_context(Machine(kit, disk, root="ext4"))
                if number == _WRITER:
                    machine.call("mount -o remount,rw /")
                    machine.call(f"{_YES.format('of machine 2')} > /written && sync")
                machine.call("sums /")
                step.advance(self._disk_bytes)
                booted.append((machine.pid, copy))
            step.outcome = "all have read everything"
        return booted

    def _measure(
        self, machines: list[Machine], copies: list[tuple[int, Path]]
    ) -> tuple[Memory, Memory, dict[str, Any]]:
        """Measure both crowds while all run, so that memory shared by all counts alike."""
        with self._stage.step(
            "Each reads all once more; then the kernel's count of their memory is\n"
            "read, and the ledger is compared with it: cowshed audit"
        ) as step:
            self._compare_all(machines)
            audit = self._control.request("audit")
            self._problems += [f"audit: {mismatch}" for mismatch in audit["mismatches"]]
            shared = _weigh([(machine.pid, self._disk) for machine in machines])
            mapped_bytes = shared.disk_bytes - shared.private_bytes
            frames_bytes = resident_frames_bytes(self._backend.pid, self._disk_bytes)
            unmapped_bytes = max(0, frames_bytes - mapped_bytes)
            backend_bytes = process_memory(self._backend.pid) + unmapped_bytes
            step.outcome = f"{len(audit['mismatches'])} mismatches"
        return replace(shared, backend_bytes=backend_bytes), _weigh(copies), audit

    def _status(self) -> dict[str, Any]:
        return dict(self._control.request("status")["status"])

    def _guest(self, name: str) -> dict[str, Any]:
        return next(guest for guest in self._status()["guests"] if guest["name"] == name)


def _weigh(machines: list[tuple[int, Path]]) -> Memory:
    """Add up machines' memory, by pid and the file of the disk."""
    disk_bytes = sum(image_memory(pid, path) for pid, path in machines)
    private_bytes = sum(image_memory(pid, path, ["Anonymous"]) for pid, path in machines)
    whole_bytes = sum(process_memory(pid) for pid, _ in machines)
    return Memory(disk_bytes, private_bytes, whole_bytes - disk_bytes, 0)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.option("--size", callback=size_option, default="64M", show_default=True, help="Of the disk.")
@click.option("--seed", default=1, show_default=True, help="For the files that are written to.")
def main(size: int, seed: int) -> None:
    """Show three machines that share one disk in memory, write to it, and see no wrong byte."""
    console = Console(highlight=False)
    if os.geteuid() != 0:
        fail("needs root, to fetch a kernel and to serve machines: try: sudo make demo-vm")
    if size % 4096 or size < _MIN_SIZE_BYTES:
        fail(
            f"--size of {size} bytes: give whole 4K pages, {format_bytes(_MIN_SIZE_BYTES)} or more"
        )
    stop_on_signals()
    started = time.monotonic()
    stage = Stage(console, _NR_STEPS)
    stage.say(
        "Three machines have one disk, mapped into them from the backend's memory, which\n"
        "has each page of it once. Their own page caches keep no copies (virtio-pmem,\n"
        "DAX).\n"
    )
    with one_line_failures():
        try:
            measured, problems = VmDemo(stage, size, seed).run()
        except VmError as error:
            raise DemoError(str(error)) from error
    for problem in problems:
        stage.say(f"WRONG: {problem}")
    wrong = f"wrong bytes: {measured.wrong_bytes}"
    verdict = "Something is wrong" if problems else "All is right"
    stage.say(f"{verdict}: {wrong}. It took {time.monotonic() - started:.0f} s; seed {seed}.")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
