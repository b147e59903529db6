# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are closed, full or broken: no traceback, and a status that says so."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import ANSWER_SECONDS, Daemon, command, listens, new_run_dir, until, write_image

from cowshed.transport import connect

pytestmark = pytest.mark.slow

MIB = 1 << 20
COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "check": ["serve", "--image", "d=/dev/null", "--check"],
    "status": ["status"],
    "status-json": ["status", "--json"],
    "top": ["top", "--once"],
    "audit": ["audit"],
    "audit-json": ["audit", "--json"],
    "pin": ["pin", "d"],
    "unpin": ["unpin", "d"],
    "warm": ["warm", "d"],
    "evict": ["evict", "d"],
    "export": ["export", "-"],
    "wrong": ["quota", "nobody", "1M"],
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with new_run_dir() as folder:
        image = write_image(folder / "image.raw", MIB)
        daemon = Daemon(folder, [f"--image=d={image}"])
        daemon.wait_ready()
        yield daemon
        daemon.kill()


def run_with(
    daemon: Daemon, words: list[str], redirection: str
) -> subprocess.CompletedProcess[str]:
    line = f"exec {shlex.join(command(*words))} {redirection}"
    return subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "COWSHED_RUN_DIR": str(daemon.run_dir)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ANSWER_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "<&- >&- 2>&-"])
def test_an_answer_that_is_lost_is_one_line_and_a_status(
    daemon: Daemon, name: str, redirection: str
) -> None:
    done = run_with(daemon, COMMANDS[name], redirection)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if "2>&-" not in redirection:
        (line,) = done.stderr.splitlines()
        assert line.startswith("cowshed: ")


@pytest.mark.parametrize("name", ["status", "status-json", "audit", "export", "help"])
def test_a_pipe_that_broke_is_no_traceback(daemon: Daemon, name: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(*COMMANDS[name]),
        env={**os.environ, "COWSHED_RUN_DIR": str(daemon.run_dir)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=ANSWER_SECONDS,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("redirection", ["2>&-", "<&- 2>&-"])
def test_what_is_answered_is_answered_without_the_others(daemon: Daemon, redirection: str) -> None:
    done = run_with(daemon, COMMANDS["pin"], redirection)
    assert (done.returncode, done.stdout) == (0, "d: 1M pinned\n")


def test_stdin_that_is_closed_is_no_empty_file(daemon: Daemon) -> None:
    done = run_with(daemon, ["import", "-"], "<&-")
    assert done.returncode == 1
    assert "Bad file descriptor" in done.stderr


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("keeper", ["--no-keeper", "--verbose"])
def test_a_daemon_begun_with_closed_descriptors_serves_and_ends_as_always(
    run_dir: Path, redirection: str, keeper: str
) -> None:
    image = write_image(run_dir / "image.raw", MIB)
    words = command("serve", "--run-dir", str(run_dir), f"--image=d={image}", keeper)
    process = subprocess.Popen(["sh", "-c", f"exec {shlex.join(words)} {redirection}"])
    try:
        until(lambda: listens(run_dir / "nbd.sock"))
        with connect(f"unix://{run_dir}/cowshed.sock") as backend:
            backend.request("status")
        lock = run_dir / "lock"
        for pid in {process.pid, int(lock.read_text())}:
            for fd in (fd for fd in "012" if f"{fd}>&-" in redirection.replace(" >", " 1>")):
                assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        process.send_signal(signal.SIGTERM)
        assert process.wait(ANSWER_SECONDS) == 0
    finally:
        process.kill()
        process.wait()


EXECUTES = """
import os
from cowshed.service.runtime.stdio import occupy_stdio
occupy_stdio()
os.execlp("sh", "sh", "-c", "for fd in 0 1 2; do [ -e /proc/$$/fd/$fd ] || touch closed$fd; done")
"""


def test_a_program_that_is_executed_finds_what_was_closed_closed(tmp_path: Path) -> None:
    line = f"exec {shlex.join([sys.executable, '-c', EXECUTES])} <&- >&-"
    subprocess.run(["sh", "-c", line], cwd=tmp_path, timeout=ANSWER_SECONDS, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed0", "closed1"]
