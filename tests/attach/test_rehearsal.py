# SPDX-License-Identifier: Apache-2.0
"""What a mapping needs is tried before the program runs, and said in one line with the cure."""

from __future__ import annotations

import subprocess

import pytest
from attached import Attached
from domains import StartDaemon, plain_environment, until

from cowshed.cache.errors import UsageError

pytestmark = pytest.mark.slow

IN_A_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
# Prints something, which says that it ran.
SCRIPT = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    print(len(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[:]))
"""


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    tried = subprocess.run([*IN_A_PID_NAMESPACE, "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("needs the right to make PID namespaces")


def again(attached: Attached, start_daemon: StartDaemon, *before: str) -> Attached:
    """The image, served by another daemon that is run by a command."""
    folder = attached.daemon.run_dir / "again"
    folder.mkdir()
    daemon = start_daemon(
        *("--image", f"disk={attached.source}", "--verbose"), at=folder, before=before
    )
    return Attached(daemon, attached.source, attached.copy)


def run(attached: Attached, *before: str) -> tuple[int, str, str]:
    words = [*before, *attached.words("python3", "-c", SCRIPT, "{image}")]
    ended = subprocess.run(
        words, capture_output=True, text=True, check=False, env=plain_environment()
    )
    return ended.returncode, ended.stdout, ended.stderr


def nr_bytes(attached: Attached) -> str:
    return f"{attached.copy.stat().st_size}\n"


def refusal(ended: tuple[int, str, str]) -> str:
    status, output, errors = ended
    assert status in (1, 2), errors
    assert output == ""
    assert errors.startswith("cowshed: ")
    assert errors.count("\n") == 1
    return errors


def test_a_program_in_a_pid_namespace_below_the_daemons_is_served(attached: Attached) -> None:
    for own_proc in (IN_A_PID_NAMESPACE, IN_A_PID_NAMESPACE[:-1]):
        assert run(attached, *own_proc) == (0, nr_bytes(attached), "")
    attached.daemon.wait_logged("event=attached", 2)


def test_a_daemon_that_does_not_see_the_programs_pid_namespace_is_told_before_it_runs(
    attached: Attached, start_daemon: StartDaemon
) -> None:
    hidden = again(attached, start_daemon, *IN_A_PID_NAMESPACE)
    for outside in ((), IN_A_PID_NAMESPACE):  # above it, and beside it
        assert "--pid=host" in refusal(run(hidden, *outside))
    with hidden.daemon.connect() as backend, pytest.raises(UsageError, match="--pid=host"):
        backend.open("disk")
    until(lambda: hidden.daemon.status()["guests"] == [])
    assert "event=dropped" not in hidden.daemon.log()


def test_a_daemon_that_may_not_look_into_the_programs_proc_is_told_before_it_runs(
    attached: Attached, start_daemon: StartDaemon
) -> None:
    weak = again(
        attached, start_daemon, "setpriv", "--inh-caps=-sys_ptrace", "--bounding-set=-sys_ptrace"
    )
    assert "CAP_SYS_PTRACE" in refusal(run(weak, *IN_A_PID_NAMESPACE))
    assert run(weak) == (0, nr_bytes(attached), "")
