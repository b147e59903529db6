# SPDX-License-Identifier: Apache-2.0
"""Real machines: QEMU with Debian's kernel, started, asked to do things, and surely ended.

A machine's first serial port is the kernel's console, kept in a file for when something goes wrong.
The second is QEMU's stdin and stdout, on which guest_init.sh takes orders: so orders pass through
whatever program runs QEMU (`cowshed attach`), and nothing else is ever mixed into the answers.

A machine ends with its block, and with the thread that started it: whoever kills the tests, no
QEMU is left. All waiting has a limit, and ends early when the machine does.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Self

from guest_kernel import CACHE, GuestKernel, VmError, guest_kernel
from initramfs import initramfs

__all__ = ["Answer", "Kit", "Machine", "drive", "network", "pmem", "vm_kit"]

BOOT_SECONDS: Final = 300.0
ANSWER_SECONDS: Final = 180.0
PROBE_SECONDS: Final = 10.0
_TAIL_LINES: Final = 40
_QEMU: Final = "qemu-system-x86_64"
_PR_SET_PDEATHSIG: Final = 1
# Looked up now: between fork and exec as little as possible should happen.
_prctl: Final = ctypes.CDLL(None).prctl
_numbers: Final = itertools.count()
_MODULES: Final = ("virtio_pci", "virtio_blk", "nfit", "nd_pmem", "virtio_pmem")
# No module of the guest's is measured or tested by itself, and a panic ends QEMU. Nor is the timer
# tested: a translated machine on a busy host ticks less often than the kernel expects, a panic.
_KERNEL_WORDS: Final = (
    "console=ttyS0 panic=-1 mitigations=off nokaslr audit=0 ipv6.disable=1 "
    "cryptomgr.notests no_timer_check random.trust_cpu=on loglevel=7 swiotlb=noforce"
)


@dataclass(frozen=True)
class Kit:
    """What every machine is made of. accel is QEMU's word: "tcg" or "kvm"."""

    kernel: GuestKernel
    initramfs: Path
    qemu: str
    accel: str


@dataclass(frozen=True)
class Answer:
    """What a command in a guest printed, and the status it ended with."""

    text: str
    status: int


def vm_kit(programs: Sequence[str] = (), accel: str | None = None) -> Kit:
    """Make ready what machines need; programs of this machine's are in their /bin.

    accel is TCG, or KVM if a first machine boots with it here; COWSHED_VM_ACCEL chooses without
    trying. Raises VmError if something is not installed or cannot be fetched.
    """
    qemu = shutil.which(_QEMU)
    if qemu is None:
        raise VmError(f"{_QEMU} is not installed: `make setup` as root installs it")
    kernel = guest_kernel()
    archive = initramfs(kernel, programs)
    accel = accel or os.environ.get("COWSHED_VM_ACCEL")
    if accel is None:
        accel = "kvm" if _kvm_boots(Kit(kernel, archive, qemu, "kvm")) else "tcg"
    return Kit(kernel, archive, qemu, accel)


@cache
def _kvm_boots(kit: Kit) -> bool:
    """Whether a machine boots with KVM; found out once a boot of this one, and then remembered."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered = CACHE / f"kvm-{boot_id}-{kit.kernel.release}"
    try:
        return remembered.read_text() == "yes"
    except FileNotFoundError:
        pass
    machine = Machine(kit)
    try:
        machine.wait_ready(PROBE_SECONDS)
        boots = True
    except VmError:
        boots = False
    finally:
        machine.close()
    remembered.write_text("yes" if boots else "no")
    return boots


def pmem(path: str | Path, size_bytes: int) -> list[str]:
    """QEMU's words for a disk that it maps MAP_PRIVATE and the guest reads without a cache.

    path may be the `{image}` of `cowshed attach`. The guest's device is /dev/pmem0, then pmem1, ...
    """
    memory = f"pmem-memory-{next(_numbers)}"
    return [
        *(
            "-object",
            f"memory-backend-file,id={memory},share=off,mem-path={path},size={size_bytes}",
        ),
        *("-device", f"virtio-pmem-pci,memdev={memory}"),
    ]


def drive(path: str | Path) -> list[str]:
    """QEMU's words for a read-only disk of its own block layer: /dev/vda, then vdb, ..."""
    name = f"drive-{next(_numbers)}"
    return [
        *("-drive", f"if=none,id={name},format=raw,readonly=on,file={path}"),
        *("-device", f"virtio-blk-pci,drive={name}"),
    ]


def network(*, forwards: Mapping[int, str] | None = None) -> list[str]:
    """QEMU's words for a network of the guest's own, and no other: eth0, with 10.0.2.15/24.

    forwards gives, by port of 10.0.2.100, the chardev that a connection to it reaches, such as
    "socket,path=PATH". QEMU opens it as it starts, for one connection in all. Needs the module
    virtio_net, and in the guest `ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0`.
    """
    words, ports = [], []
    for port, chardev in (forwards or {}).items():
        name = f"forward-{next(_numbers)}"
        words += ["-chardev", f"{chardev},id={name}"]
        ports.append(f",guestfwd=tcp:10.0.2.100:{port}-chardev:{name}")
    net = f"net-{next(_numbers)}"
    return [
        *words,
        *("-netdev", f"user,id={net},restrict=on{''.join(ports)}"),
        *("-device", f"virtio-net-pci,netdev={net},romfile="),
    ]


class Machine:
    """A machine; `with` waits until it is ready. call() waits for an answer, start() does not.

    disks are words of pmem(), drive() and network(); before is a command that runs QEMU. root is
    the kind of file system on root_device, if the machine is to have that as its root, read-only;
    it holds what add_system() adds. Else the root is in the guest's memory. In its orders a guest
    has, besides busybox, `await PATH` and `sums FOLDER` (guest_init.sh). Whoever does not use
    `with` calls wait_ready() and close().
    """

    def __init__(
        self,
        kit: Kit,
        *disks: Sequence[str],
        before: Sequence[str] = (),
        memory_mib: int = 128,
        modules: Sequence[str] = (),
        root: str | None = None,
        root_device: str = "/dev/pmem0",
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cowshed-vm-")
        self.folder: Final = Path(self._folder.name)
        self._console = self.folder / "console"
        self._words = self.folder / "words"
        self._heard = bytearray()
        self._last = 0
        vm_root = f"vm_root={root} vm_device={root_device}" if root else ""
        self._began = time.monotonic()
        with self._words.open("wb") as words:
            self.process = subprocess.Popen(
                [*before, *self._command(kit, disks, memory_mib, modules, vm_root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                process_group=0,
                preexec_fn=_die_with_parent,
            )
        self.pid: Final = self.process.pid
        self.boot_seconds = 0.0

    def wait_ready(self, seconds: float = BOOT_SECONDS) -> None:
        """Wait until it listens; boot_seconds is then what that took, from the start."""
        self._hear_until(re.compile(rb"^=ready\r?\n", re.MULTILINE), "boot", seconds)
        self.boot_seconds = time.monotonic() - self._began

    def _command(
        self,
        kit: Kit,
        disks: Sequence[Sequence[str]],
        memory_mib: int,
        modules: Sequence[str],
        vm_root: str,
    ) -> list[str]:
        words = f"{_KERNEL_WORDS} vm_modules={','.join([*_MODULES, *modules])} {vm_root}"
        cpu = "host" if kit.accel == "kvm" else "qemu64"
        return [
            kit.qemu,
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", f"pc,accel={kit.accel},mem-merge=off,usb=off", "-cpu", cpu),
            # Room in the guest's addresses for what is mapped in beside its own memory.
            *("-m", f"size={memory_mib}M,maxmem=64G,slots=1", "-nic", "none"),
            *("-kernel", str(kit.kernel.path), "-initrd", str(kit.initramfs)),
            *("-append", words),
            *("-serial", f"file:{self._console}", "-chardev", "stdio,id=orders,signal=off"),
            *("-serial", "chardev:orders"),
            *(word for disk in disks for word in disk),
        ]

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, order: str, seconds: float = ANSWER_SECONDS) -> str:
        """Have a shell command done in the guest: what it printed. VmError if it fails."""
        return self.finish(self.start(order), seconds)

    def start(self, order: str) -> int:
        """Ask for a command without waiting: a ticket. The guest does one after the other."""
        assert "\n" not in order, "an order is one line"
        assert self.process.stdin is not None
        self._last += 1
        try:
            self.process.stdin.write(f"{self._last} {order}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise VmError(f"a machine ended before {order!r}; {self.last_words()}") from None
        return self._last

    def finish(self, ticket: int, seconds: float = ANSWER_SECONDS) -> str:
        """Wait for a command's end: what it printed. VmError if it failed."""
        answer = self.answer(ticket, seconds)
        if answer.status:
            raise VmError(
                f"order {ticket} ended with status {answer.status}: {answer.text.strip()}"
            )
        return answer.text

    def answer(self, ticket: int, seconds: float = ANSWER_SECONDS) -> Answer:
        """Wait for a command's end, good or bad. Answers are taken in the order of the tickets."""
        ended = re.compile(rb"^=%d (\d+)\r?\n" % ticket, re.MULTILINE)
        printed, status = self._hear_until(ended, f"order {ticket}", seconds)
        lines = printed.decode(errors="replace").replace("\r\n", "\n").splitlines(keepends=True)
        return Answer("".join(line.removeprefix(".") for line in lines), int(status))

    def answered(self, ticket: int, seconds: float = 0.0) -> bool:
        """Whether the answer to an order is there, or comes within seconds."""
        ended = re.compile(rb"^=%d (\d+)\r?\n" % ticket, re.MULTILINE)
        deadline = time.monotonic() + seconds
        while not ended.search(self._heard):
            if not self._hear(max(0.0, deadline - time.monotonic())):
                return False
        return True

    def last_words(self) -> str:
        """Give the ends of the kernel's console and of what QEMU said."""
        told = []
        for what, path in (("console", self._console), ("stderr", self._words)):
            text = path.read_text(errors="replace") if path.exists() else ""
            if lines := [line for line in text.splitlines() if line.strip()][-_TAIL_LINES:]:
                told.append(f"its {what} ends:\n  " + "\n  ".join(lines))
        return "\n".join(told) or "it said nothing"

    def kill(self) -> None:
        """End it as a crash does: SIGKILL, and reap it."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it and all that ran it, and forget its files."""
        # Its own group: whatever ran QEMU, both go.
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate()
        self._folder.cleanup()

    def _hear_until(
        self, pattern: re.Pattern[bytes], what: str, seconds: float
    ) -> tuple[bytes, bytes]:
        """Wait for a line: what came before it, and its last word; nothing of it is heard again."""
        deadline = time.monotonic() + seconds
        while not (match := pattern.search(self._heard)):
            if not self._hear(max(0.0, deadline - time.monotonic())):
                raise VmError(f"{what}: not done in {seconds:g} s; {self.last_words()}")
        printed, last_word = bytes(self._heard[: match.start()]), match[0].split()[-1]
        end = match.end()
        del match, self._heard[:end]
        return printed, last_word

    def _hear(self, seconds: float) -> bool:
        """Take what the guest says; False if it says nothing for so long. VmError if it ended."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return False
        said = os.read(self.process.stdout.fileno(), 1 << 16)
        if not said:
            status = self.process.wait()
            raise VmError(f"the machine ended with status {status}; {self.last_words()}")
        self._heard += said
        return True


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
