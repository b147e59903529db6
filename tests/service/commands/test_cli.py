# SPDX-License-Identifier: Apache-2.0
"""The command line: what is refused and how, what is asked of a daemon, what its answers become."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from terminals import Terminal

from cowshed.service.cli import cli

Body = dict[str, Any]
COMMAND = [sys.executable, "-m", "cowshed.service.cli"]


def run(*words: str, **env: str) -> Result:
    """`cowshed WORDS` in this process."""
    return CliRunner(env={"COWSHED_RUN_DIR": "", "COLUMNS": "80", **env}).invoke(cli, words)


def refused(result: Result, exit_code: int) -> str:
    """The one line of an error, checked to be all there is."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    line = result.stderr
    assert line.startswith("cowshed: ")
    assert line.endswith("\n")
    assert line.count("\n") == 1
    return line.removeprefix("cowshed: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "missing command: see 'cowshed --help'"),
        ("statu", "no such command 'statu'"),
        ("attach debian", "missing argument '-- COMMAND...'"),
        ("begin", "no such command"),
        ("migrate", "no such command"),
        ("status --bogus", "no such option"),
        ("status extra", "unexpected extra argument"),
        ("serve --metrics :1", "is not HOST:PORT"),
        ("serve", "no image to serve"),
        ("serve --image debian", "has no '='"),
        ("serve --image a=/a --capacity 64MB", "powers of 1000 or of 1024"),
        ("serve --image a=/a --config /nowhere/c.toml", "check --config"),
        ("pin", "missing argument 'IMAGE': see 'cowshed pin --help'"),
        ("pin a 1M", "give both OFFSET and LENGTH"),
        ("unpin a 1 2 3", "give both OFFSET and LENGTH"),
        ("warm a x 4K", "OFFSET 'x' is not a size"),
        ("evict a 0 y", "LENGTH 'y' is not a size"),
        ("evict a 0 0", "LENGTH is 0"),
        ("quota g", "missing argument 'SIZE'"),
        ("quota g 100", "less than a page"),
        ("top", "top needs a terminal"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(words: str, says: str) -> None:
    assert says in refused(run(*words.split()), 2)


def test_a_name_of_two_lines_is_shown_in_one(tmp_path: Path) -> None:
    message = refused(run("serve", "--config", str(tmp_path / "a\n\x1b.toml")), 2)
    assert "check --config" in message
    assert "\x1b" not in message
    (tmp_path / "b\n\x1b.toml").write_text("=")
    message = refused(run("serve", "--config", str(tmp_path / "b\n\x1b.toml")), 2)
    assert "is not TOML" in message
    assert "\x1b" not in message


def test_help_names_every_command_there_is_and_no_other() -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:\n")[2].splitlines()
    there = (
        "attach",
        "audit",
        "completion",
        "discard",
        "drain",
        "evict",
        "export",
        "import",
        "pin",
        "quota",
    )
    assert [line.split()[0] for line in listed] == [
        *there,
        *("serve", "status", "top", "unpin", "warm"),
    ]
    assert "..." not in "".join(listed)


@pytest.mark.parametrize(
    "words",
    ["status", "audit", "top --once", "pin a", "unpin a", "warm a", "evict a", "quota g 1M"],
)
def test_without_a_daemon_every_command_says_so_with_status_1(tmp_path: Path, words: str) -> None:
    message = refused(run(*words.split(), "--run-dir", str(tmp_path)), 1)
    assert message.startswith(f"no daemon at {tmp_path} ")
    assert "'cowshed serve'" in message


def test_the_run_dir_comes_from_the_option_then_the_environment(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert f"no daemon at {there} " in refused(run("status", COWSHED_RUN_DIR=str(there)), 1)
    both = run("status", "--run-dir", str(here), COWSHED_RUN_DIR=str(there))
    assert f"no daemon at {here} " in refused(both, 1)


def test_a_socket_left_over_is_told_from_none(tmp_path: Path, stand_in: Callable[..., Any]) -> None:
    left_over = tmp_path / "cowshed.sock"
    os.mknod(left_over, stat.S_IFSOCK | 0o666)
    assert "left over" in refused(run("status", "--run-dir", str(tmp_path)), 1)


def test_a_daemon_that_hangs_up_is_one_line(stand_in: Callable[..., Any]) -> None:
    peer = stand_in()
    message = refused(run("status", "--run-dir", str(peer.run_dir)), 1)
    assert message.startswith(f"the daemon at {peer.run_dir} (status): ")
    assert message.endswith("look at its log")


def test_a_refusal_of_the_daemon_is_passed_on_with_status_1(stand_in: Callable[..., Any]) -> None:
    error = {"kind": "denied", "message": "pin is for root:\nuse sudo\x1b[m"}
    peer = stand_in(pin=[{"ok": False, "error": error}])
    message = refused(run("pin", "a", "--run-dir", str(peer.run_dir)), 1)
    assert message.startswith("pin is for root: use sudo")
    assert "\x1b" not in message


def test_an_answer_of_another_version_is_explained(stand_in: Callable[..., Any]) -> None:
    peer = stand_in(status=[{"ok": True, "status": {"pid": 1}}])
    message = refused(run("status", "--run-dir", str(peer.run_dir)), 1)
    assert "another version" in message


def test_status_is_tables_for_people_and_json_for_programs(
    stand_in: Callable[..., Any], status: Body
) -> None:
    peer = stand_in(status=[{"ok": True, "status": status}])
    table = run("status", "--run-dir", str(peer.run_dir))
    assert table.exit_code == 0
    assert "STOPPED" in table.stdout
    program = run("status", "--json", "--run-dir", str(peer.run_dir))
    assert program.exit_code == 0
    assert json.loads(program.stdout) == status


@pytest.mark.parametrize(("mismatches", "exit_code"), [([], 0), ([1], 3)])
@pytest.mark.parametrize("option", ["--json", None])
def test_audit_ends_with_3_only_if_something_differs(
    stand_in: Callable[..., Any], mismatches: list[int], exit_code: int, option: str | None
) -> None:
    mismatch = {"check": "refs", "domain": "default", "image": "a", "extent": 1}
    found = [{**mismatch, "expected": 1, "found": 2}] * len(mismatches)
    answer = {"mismatches": found, "checked": {"images": 1}}
    peer = stand_in(audit=[{"ok": True, **answer}])
    result = run("audit", *([option] if option else []), "--run-dir", str(peer.run_dir))
    assert result.exit_code == exit_code
    assert result.stderr == ""
    if option:
        assert json.loads(result.stdout) == answer
    else:
        assert ("No mismatches" in result.stdout) == (not mismatches)


@pytest.mark.parametrize(
    ("words", "asked", "reply", "line"),
    [
        (
            "pin debian",
            {"op": "pin", "image": "debian", "offset": None, "length": None},
            {"pinned_bytes": 64 << 20},
            "debian: 64M pinned",
        ),
        (
            "unpin debian 1M 64KiB",
            {"op": "unpin", "image": "debian", "offset": 1 << 20, "length": 64 << 10},
            {"pinned_bytes": 0},
            "debian: 0 still pinned",
        ),
        (
            "evict debian",
            {"op": "evict", "image": "debian", "offset": None, "length": None},
            {"evicted_bytes": 1 << 20, "kept_bytes": 0, "kept_why": ""},
            "debian: 1M evicted",
        ),
        (
            "evict debian 0 2M",
            {"op": "evict", "image": "debian", "offset": 0, "length": 2 << 20},
            {"evicted_bytes": 1 << 20, "kept_bytes": 1 << 20, "kept_why": "pinned"},
            "debian: 1M evicted, 1M kept (pinned)",
        ),
        (
            "quota g1 2G",
            {"op": "quota", "guest": "g1", "quota_bytes": 2 << 30},
            {"quota_bytes": 2 << 30},
            "g1: quota 2G",
        ),
        (
            "quota g1 none",
            {"op": "quota", "guest": "g1", "quota_bytes": None},
            {"quota_bytes": None},
            "g1: no quota",
        ),
    ],
)
def test_an_order_is_sent_in_bytes_and_its_outcome_told(
    stand_in: Callable[..., Any], words: str, asked: Body, reply: Body, line: str
) -> None:
    peer = stand_in(**{asked["op"]: [{"ok": True, **reply}]})
    result = run(*words.split(), "--run-dir", str(peer.run_dir))
    assert (result.exit_code, result.stdout, result.stderr) == (0, line + "\n", "")
    assert peer.asked == [asked]


def warm_replies() -> list[Body]:
    total_bytes = 128 << 20
    steps = range(0, total_bytes + 1, 32 << 20)
    reports = [{"done_bytes": done, "total_bytes": total_bytes} for done in steps]
    replies: list[Body] = [{"ok": True, "progress": report} for report in reports]
    outcome = {"loaded_bytes": 96 << 20, "already_bytes": 32 << 20, "left_out_bytes": 0}
    return [*replies, {"ok": True, **outcome}]


def test_warm_tells_its_outcome_and_draws_nothing_into_a_pipe(stand_in: Callable[..., Any]) -> None:
    peer = stand_in(warm=warm_replies())
    result = run("warm", "debian", "--run-dir", str(peer.run_dir))
    assert result.exit_code == 0
    assert result.stdout == "debian: 96M loaded, 32M already resident\n"
    assert result.stderr == ""


def test_warm_tells_what_had_no_room(stand_in: Callable[..., Any]) -> None:
    outcome = {"loaded_bytes": 1 << 20, "already_bytes": 0, "left_out_bytes": 3 << 20}
    peer = stand_in(warm=[{"ok": True, **outcome}])
    line = run("warm", "debian", "--run-dir", str(peer.run_dir)).stdout
    assert line.endswith(", 3M left out: more than the capacity holds\n")


def test_warm_that_fails_half_way_is_a_failure(stand_in: Callable[..., Any]) -> None:
    error = {"kind": "source", "message": "cannot read /srv/a at 4096: Input/output error"}
    peer = stand_in(warm=[*warm_replies()[:2], {"ok": False, "error": error}])
    message = refused(run("warm", "debian", "--run-dir", str(peer.run_dir)), 1)
    assert message == "cannot read /srv/a at 4096: Input/output error"


def test_warm_shows_its_progress_on_a_terminal(stand_in: Callable[..., Any]) -> None:
    peer = stand_in(warm=warm_replies())
    words = [*COMMAND, "warm", "debian", "--run-dir", str(peer.run_dir)]
    with contextlib.closing(Terminal(*words)) as terminal:
        assert terminal.end() == 0
    assert "warming" in terminal.drawn
    assert "128.0" in terminal.drawn
    assert "debian: 96M loaded" in terminal.drawn


@pytest.mark.parametrize("option", ["--json", None])
def test_a_reader_that_has_gone_away_is_no_news(
    stand_in: Callable[..., Any], status: Body, option: str | None
) -> None:
    peer = stand_in(status=[{"ok": True, "status": status}])
    reader, writer = os.pipe()
    os.close(reader)
    words = ["status", *([option] if option else []), "--run-dir", str(peer.run_dir)]
    done = subprocess.run([*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode != 0


@pytest.mark.parametrize("option", ["--json", None])
def test_a_full_disk_is_told_in_one_line(
    stand_in: Callable[..., Any], status: Body, option: str | None
) -> None:
    peer = stand_in(status=[{"ok": True, "status": status}])
    words = ["status", *([option] if option else []), "--run-dir", str(peer.run_dir)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b"cowshed: cannot write the answer: No space left on device\n"
    assert done.returncode == 1


def test_names_a_terminal_cannot_show_are_no_failure(
    stand_in: Callable[..., Any], status: Body
) -> None:
    status["guests"][0]["name"] = "g\u00fcnther"
    peer = stand_in(status=[{"ok": True, "status": status}])
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for words in (["status"], ["top", "--once"]):
        command = [*COMMAND, *words, "--run-dir", str(peer.run_dir)]
        done = subprocess.run(command, capture_output=True, env=env, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"g?nther" in done.stdout
