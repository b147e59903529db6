# SPDX-License-Identifier: Apache-2.0
"""`cowshed attach` runs what it can serve, as if it were not there, and refuses the rest."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from attached import Attached, StartReader
from domains import ANSWER_SECONDS, NOBODY, StartDaemon, command, cowshed, plain_environment, until

pytestmark = pytest.mark.slow

SHOW = """
import mmap, sys
with open(sys.argv[1]) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    print(mapped[:8].hex())
"""


def nr_attached(attached: Attached) -> int:
    """How many mappings its daemon has seen."""
    return attached.daemon.log().count("event=attached")


def refusal(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal that ran nothing."""
    assert ended.returncode in (1, 2), ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("cowshed: ")
    assert ended.stderr.count("\n") == 1
    return ended.stderr


@pytest.mark.parametrize("status", [0, 7, 255])
def test_the_exit_status_is_the_programs(shared: Attached, status: int) -> None:
    assert shared.run("sh", "-c", f"exit {status}", "{image}").returncode == status


def test_an_end_by_a_signal_is_the_programs(shared: Attached) -> None:
    assert shared.run("sh", "-c", "kill -USR1 $$", "{image}").returncode == -signal.SIGUSR1


def test_a_signal_reaches_the_program(shared: Attached) -> None:
    script = "trap 'echo caught; exit 9' USR1; echo ready; read line; exit 1"
    words = shared.words("sh", "-c", script, "{image}")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        # A shell looks for signals between commands: one that comes just before it reads waits.
        until(lambda: "pipe_read" in Path(f"/proc/{process.pid}/wchan").read_text())
        process.send_signal(signal.SIGUSR1)  # one that nobody has ignored before
        assert process.stdout.read() == b"caught\n"
    assert process.returncode == 9


def test_a_closed_pipe_ends_the_program_as_it_does_elsewhere(shared: Attached) -> None:
    words = shared.words("sh", "-c", "while :; do echo x; done", "{image}")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
    assert process.returncode == -signal.SIGPIPE


def test_standard_input_is_the_programs(shared: Attached) -> None:
    ended = shared.run("sh", "-c", "read line; echo got $line", "{image}", input="words\n")
    assert ended.stdout == "got words\n"


def test_the_terminal_is_the_programs(shared: Attached) -> None:
    ours, theirs = pty.openpty()
    try:
        words = shared.words("sh", "-c", "test -t 0 && test -t 1 && echo yes; tty", "{image}")
        assert subprocess.run(words, stdin=theirs, stdout=theirs, check=True).returncode == 0
        shown = b""
        while shown.count(b"\n") < 2 and select.select([ours], [], [], ANSWER_SECONDS)[0]:
            shown += os.read(ours, 1000)
        assert shown.split() == [b"yes", os.ttyname(theirs).encode()]
    finally:
        os.close(ours)
        os.close(theirs)


def test_every_image_word_is_replaced(shared: Attached) -> None:
    ended = shared.run("printf", "%s|", "{image}", "x={image},y={image}", "{other}")
    source = str(shared.source)
    assert ended.stdout == f"{source}|x={source},y={source}|{{other}}|"


def test_another_preloaded_library_stays(shared: Attached) -> None:
    own = {"LD_PRELOAD": "libpthread.so.0"}
    ended = shared.run("sh", "-c", "echo $LD_PRELOAD", "{image}", env=own)
    first, _, rest = ended.stdout.strip().partition(":")
    assert first.endswith("_preload.abi3.so")
    assert rest == "libpthread.so.0"
    assert ended.stderr == ""


def test_names_may_hold_blanks_and_quotes(shared: Attached, run_dir: Path, mapper: Path) -> None:
    odd = run_dir / "an \"odd\" 'name' \\ of, a % file"
    odd.mkdir()
    program = shutil.copy(mapper, odd / "map it")
    ended = shared.run(program, "whole", "{image}", shared.copy, options=["--guest", 'a "b\\'])
    assert ended.returncode == 0, ended.stderr


def test_an_image_may_have_an_odd_path(
    start_daemon: StartDaemon, attached: Attached, run_dir: Path, mapper: Path, tmp_path: Path
) -> None:
    folder = run_dir / "other"
    folder.mkdir()
    odd = folder / "an \"odd\" 'name' \\ 1=2 ü.raw"
    shutil.copy(attached.source, odd)
    start_daemon("--image", f"disk={odd}", at=folder)
    words = command("attach", "disk", "--run-dir", str(folder), "--")
    ended = subprocess.run(
        [*words, mapper, "whole", "{image}", attached.copy], capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_a_script_is_run_by_its_interpreter(shared: Attached, run_dir: Path) -> None:
    script = run_dir / "script"
    script.write_text(f"#!/usr/bin/env python3\n{SHOW}\n")
    script.chmod(0o755)
    before = nr_attached(shared)
    ended = shared.run(script, "{image}")
    assert ended.stdout.strip() == shared.copy.read_bytes()[:8].hex(), ended.stderr
    assert nr_attached(shared) == before + 1


def test_a_program_that_execs_another_maps_there_too(shared: Attached, mapper: Path) -> None:
    line = f"exec {mapper} whole {{image}} {shared.copy}"
    before = nr_attached(shared)
    ended = shared.run("sh", "-c", f"{line.replace('exec ', '')} && {line}")
    assert ended.returncode == 0, ended.stderr
    assert nr_attached(shared) == before + 2


def test_what_is_not_mapped_is_the_file(shared: Attached) -> None:
    before = nr_attached(shared)
    ended = shared.run("cmp", "{image}", shared.copy)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert nr_attached(shared) == before


def test_a_static_child_reads_the_file(shared: Attached) -> None:
    ended = shared.run("sh", "-c", f"busybox cmp {{image}} {shared.copy}")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_static_program_is_refused(shared: Attached, run_dir: Path) -> None:
    source = run_dir / "static.c"
    source.write_text("int main(void) { return 0; }\n")
    program = run_dir / "static"
    subprocess.run(["gcc", "-static", "-o", program, source], check=True)
    assert "statically linked" in refusal(shared.run(program, "{image}"))
    script = run_dir / "script"
    script.write_text(f"#!{program} -x\n")
    script.chmod(0o755)
    assert "statically linked" in refusal(shared.run(script, "{image}"))


def test_a_program_for_another_machine_is_refused(
    shared: Attached, run_dir: Path, mapper: Path
) -> None:
    other = bytearray(mapper.read_bytes())
    other[18] ^= 0x40
    program = run_dir / "other"
    program.write_bytes(other)
    program.chmod(0o755)
    assert "another machine" in refusal(shared.run(program, "{image}"))


def test_a_setuid_program_is_refused(shared: Attached, run_dir: Path, mapper: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a program setuid")
    program = run_dir / "privileged"
    shutil.copy(mapper, program)
    os.chown(program, NOBODY, -1)
    program.chmod(0o4755)
    assert "setuid" in refusal(shared.run(program, "{image}"))


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (["true"], "{image}"),
        (["no-such-command", "{image}"], "no command 'no-such-command'"),
        (["/no/such/command", "{image}"], "No such file"),
        (["/etc/passwd", "{image}"], "not executable"),
        (["/", "{image}"], "not a regular file"),
    ],
)
def test_what_cannot_be_run_is_refused(shared: Attached, program: list[str], says: str) -> None:
    assert says in refusal(shared.run(*program))


def test_a_text_file_without_an_interpreter_is_refused(shared: Attached, run_dir: Path) -> None:
    script = run_dir / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    assert "neither an ELF program nor" in refusal(shared.run(script, "{image}"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--quota", "1"], "less than a page"),
        (["--quota", "many"], "quota"),
        (["--on-quota", "stpo"], "stop"),
        (["--guest", "g" * 65], "65 characters"),
        (["--guest", ""], "0 characters"),
    ],
)
def test_wrong_options_are_refused(shared: Attached, options: list[str], says: str) -> None:
    assert says in refusal(shared.run("true", "{image}", options=options))


def test_an_unknown_image_is_refused(shared: Attached) -> None:
    words = ["attach", "dsk", "--run-dir", str(shared.daemon.run_dir), "--", "true", "{image}"]
    assert "no image 'dsk'; there is disk" in refusal(cowshed(*words))


def test_a_daemon_that_is_not_there_is_told(tmp_path: Path) -> None:
    words = ["attach", "disk", "--run-dir", str(tmp_path), "--", "true", "{image}"]
    assert "no daemon at" in refusal(cowshed(*words))


def test_a_name_that_is_taken_is_refused(attached: Attached, start_reader: StartReader) -> None:
    start_reader("taken").call("map")
    ended = attached.run("true", "{image}", options=["--guest", "taken"])
    assert "'taken' is taken" in refusal(ended)


def test_a_source_that_was_replaced_is_refused(attached: Attached) -> None:
    attached.source.unlink()
    assert "was replaced" in refusal(attached.run("true", "{image}"))
    shutil.copy(attached.copy, attached.source)
    assert "was replaced" in refusal(attached.run("true", "{image}"))


def test_a_user_who_may_not_read_the_source_gets_its_bytes(
    attached: Attached, mapper: Path, run_dir: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    library = Path(__file__).parents[2] / "transport"
    if not all(folder.stat().st_mode & 1 for folder in [library, *library.parents]):
        pytest.skip("another user cannot reach the library here: a folder above it is private")
    attached.source.chmod(0o600)
    program = shutil.copy(mapper, run_dir / "mapper")
    for case in ("whole", "writers", "inherits"):
        ended = attached.run(program, case, "{image}", attached.copy, uid=NOBODY)
        assert ended.returncode == 0, ended.stderr
    # Each open has a position of its own.
    ended = attached.run("cmp", "{image}", "{image}", uid=NOBODY)
    assert (ended.returncode, ended.stderr) == (0, "")
    script = "exec 3<{image} 4<{image}; head -c 4096 <&3 >/dev/null; head -c 8 <&4 | od -An -tx1"
    ended = attached.run("sh", "-c", script, uid=NOBODY)
    assert ended.stdout.split() == [f"{byte:02x}" for byte in attached.copy.read_bytes()[:8]]


def test_help_says_what_is_replaced() -> None:
    ended = cowshed("attach", "--help")
    assert ended.returncode == 0
    assert "{image}" in ended.stdout
    assert "mmap" in ended.stdout


def test_a_variable_that_makes_no_sense_is_told_and_leaves_the_program_alone(
    shared: Attached,
) -> None:
    library = Path(__file__).parents[2] / "transport/_preload.abi3.so"
    wrong = plain_environment() | {"LD_PRELOAD": str(library), "COWSHED_ATTACH": "1 2\n3"}
    ended = subprocess.run(
        ["sh", "-c", "echo fine"], env=wrong, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "fine\n"
    assert "COWSHED_ATTACH is malformed" in ended.stderr
