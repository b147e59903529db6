# SPDX-License-Identifier: Apache-2.0
"""The examples for a host, run as their readers do; that of a machine is in tests/vm."""

import subprocess
import sys
from pathlib import Path

from domains import Daemon, MakeImage

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_the_guest_in_python_sees_its_write_and_nobody_else_does(
    run_dir: Path, make_image: MakeImage
) -> None:
    daemon = Daemon(run_dir, [f"--image=disk={make_image(1 << 20)}", "--no-keeper"])
    try:
        daemon.wait_ready()
        address = f"unix://{run_dir}/cowshed.sock"
        words = [sys.executable, str(EXAMPLES / "guest.py"), address, "disk"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    finally:
        daemon.kill()
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "both read the same frame: True",
        "the writer reads its write: b'private'",
        "the reader reads the image: True",
        "discarded, it is the image again: True",
    ]
