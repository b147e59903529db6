# SPDX-License-Identifier: Apache-2.0
"""The example of a machine, run as its readers do."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from domains import Daemon, MakeImage
from machines import Kit, Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parents[2] / "examples/machine.sh"
IMAGE_BYTES = 4 << 20


class ExampleMachine(Machine):
    """A machine that examples/machine.sh starts."""

    def _command(
        self,
        kit: Kit,
        disks: Sequence[Sequence[str]],
        memory_mib: int,
        modules: Sequence[str],
        vm_root: str,
    ) -> list[str]:
        ours = super()._command(kit, disks, memory_mib, modules, vm_root)
        kernel = ours[ours.index("-initrd") :]
        accel = ("-accel", kit.accel, "-nodefaults", "-no-reboot", "-nic", "none")
        return [str(SCRIPT), "disk", "web-1", str(kit.kernel.path), *accel, *kernel]


@pytest.fixture
def source(make_image: MakeImage) -> Path:
    return make_image(IMAGE_BYTES)


@pytest.fixture
def daemon(run_dir: Path, source: Path) -> Iterator[Daemon]:
    daemon = Daemon(run_dir, [f"--image=disk={source}", "--no-keeper"])
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        daemon.kill()


def environment(daemon: Daemon) -> list[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return ["env", f"PATH={path}", f"COWSHED_RUN_DIR={daemon.run_dir}"]


def test_the_machine_reads_the_image_and_its_write_is_its_own(
    kit: Kit, daemon: Daemon, source: Path
) -> None:
    with ExampleMachine(kit, before=environment(daemon)) as machine:
        machine.call("await /dev/pmem0")
        digest = hashlib.md5(source.read_bytes(), usedforsecurity=False).hexdigest()
        assert machine.call("md5sum /dev/pmem0").split()[0] == digest
        machine.call("echo private | dd of=/dev/pmem0 conv=notrunc && sync")
        assert machine.call("head -c 8 /dev/pmem0").strip() == "private"
        status = daemon.guest_status("web-1")
        assert status["private_bytes"] > 0
    assert hashlib.md5(source.read_bytes(), usedforsecurity=False).hexdigest() == digest


def test_an_image_that_is_not_served_is_one_line(daemon: Daemon) -> None:
    words = [*environment(daemon), str(SCRIPT), "nothing", "web-1", "/boot/none"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{SCRIPT}: image 'nothing' is not served; cowshed status lists those that are\n"
    )
