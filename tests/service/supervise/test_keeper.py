# SPDX-License-Identifier: Apache-2.0
"""A keeper starts the backend again: nothing that was resident is lost, and nobody is refused."""

import configparser
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from domains import (
    ANSWER_SECONDS,
    Daemon,
    MakeImage,
    StartDaemon,
    command,
    kill_backend,
    until,
)
from supervisor import Supervisor

from cowshed.transport import connect

pytestmark = pytest.mark.slow

MIB = 1 << 20


def backend_pid(daemon: Daemon) -> int:
    """Who serves now; its keeper is daemon.pid."""
    return int((daemon.run_dir / "lock").read_text())


def died(pid: int) -> None:
    """Wait for the end of a process that is not ours."""
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.fixture
def kept(start_daemon: StartDaemon, make_image: MakeImage) -> Daemon:
    return start_daemon("--image", f"d={make_image(4 * MIB)}", kept=True)


def test_a_killed_backend_is_followed_by_one_with_everything_resident(kept: Daemon) -> None:
    kept.request("warm", image="d")
    kept.request("pin", image="d", offset=0, length=65536)
    before = kept.status()
    pids = [before["pid"]]
    for _ in range(3):
        os.kill(pids[-1], signal.SIGKILL)
        # Whoever comes meanwhile waits at the socket, which is open all the time.
        status = kept.status()
        pids.append(status["pid"])
        assert status["resident_bytes"] == before["resident_bytes"] == 4 * MIB
        assert status["loads"] == before["loads"] == 64
        assert status["images"][0]["pinned_bytes"] == 65536
    assert len(set(pids)) == 4
    assert kept.mismatches() == []
    kept.wait_logged("event=backend-died ", 3)
    assert kept.stop() == 0
    died(pids[-1])
    assert not (kept.run_dir / "cowshed.sock").exists()


def test_an_orderly_end_is_the_keepers_too(kept: Daemon) -> None:
    pid = backend_pid(kept)
    kept.request("shutdown")
    assert kept.process.wait(ANSWER_SECONDS) == 0
    died(pid)
    assert "backend-died" not in kept.log()


def test_a_backend_that_cannot_begin_is_not_started_again(
    run_dir: Path, make_image: MakeImage
) -> None:
    words = command("serve", "--run-dir", str(run_dir), "--image", f"d={run_dir}/none")
    ended = subprocess.run(words, capture_output=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.decode().count("\n") == 1
    assert ended.stderr.startswith(b"cowshed: ")


def test_a_dead_keeper_is_replaced_and_the_new_one_keeps_everything(kept: Daemon) -> None:
    kept.request("warm", image="d")
    pid = backend_pid(kept)
    kept.kill()
    assert kept.status()["pid"] == pid  # it serves on
    until(lambda: "event=held" in kept.log())
    os.kill(pid, signal.SIGKILL)
    status = kept.status()
    assert status["pid"] != pid
    assert status["resident_bytes"] == 4 * MIB
    assert kept.mismatches() == []
    os.kill(backend_pid(kept), signal.SIGTERM)
    died(status["pid"])


def test_a_keeper_that_took_anothers_place_is_reloaded_and_loses_nothing(kept: Daemon) -> None:
    kept.request("warm", image="d")
    for nr_keepers in (1, 2):
        keeper = kept.pid if nr_keepers == 1 else later_keepers(kept)[-1]
        os.kill(keeper, signal.SIGKILL)
        kept.process.poll()
        until(lambda n=nr_keepers: len(later_keepers(kept)) == n)
    until(lambda: kept.status()["not_held"] == 0)
    pid = backend_pid(kept)
    os.kill(later_keepers(kept)[-1], signal.SIGHUP)
    until(lambda: kept.status()["pid"] != pid)
    for _ in range(2):
        status = kept.status()
        assert (status["resident_bytes"], status["loads"]) == (4 * MIB, 64)
        os.kill(status["pid"], signal.SIGKILL)
    assert kept.mismatches() == []


def later_keepers(kept: Daemon) -> list[int]:
    return [int(pid) for pid in re.findall(r"event=keeper-changed pid=(\d+)", kept.log())]


def test_nobody_else_reaches_the_keeper(kept: Daemon) -> None:
    pid = backend_pid(kept)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"NOTIFY_SOCKET" not in environment  # set after the fork, and forgotten
    (path,) = kept.run_dir.glob("keeper.*")
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        for message in (b"STOPPING=1", b"FDSTOREREMOVE=1\nFDNAME=image/default/d", b"\xff" * 4000):
            stranger.sendto(message, str(path))  # root may write there, and is not obeyed
    kept.request("warm", image="d")
    os.kill(pid, signal.SIGKILL)
    assert kept.status()["resident_bytes"] == 4 * MIB
    assert kept.stop() == 0
    assert list(kept.run_dir.glob("keeper.*")) == []


def test_a_reload_replaces_the_backend_and_refuses_nobody(kept: Daemon) -> None:
    kept.request("warm", image="d")
    pids = [backend_pid(kept)]
    for _ in range(2):
        os.kill(kept.pid, signal.SIGHUP)
        until(lambda: kept.status()["pid"] != pids[-1])
        status = kept.status()
        pids.append(status["pid"])
        assert status["resident_bytes"] == 4 * MIB
        assert status["loads"] == 64
        assert kept.process.poll() is None
    assert "backend-died" not in kept.log()
    kept.wait_logged("event=replaced ", 2)
    assert kept.mismatches() == []
    os.kill(pids[-1], signal.SIGKILL)  # the keeper that came by exec keeps as well
    assert kept.status()["resident_bytes"] == 4 * MIB
    assert kept.stop() == 0


def test_a_reload_with_a_wrong_configuration_changes_nothing(
    start_daemon: StartDaemon, run_dir: Path, make_image: MakeImage
) -> None:
    settings = run_dir / "cowshed.toml"
    settings.write_text(f'images = {{ d = "{make_image(MIB)}" }}\n')
    kept = start_daemon("--config", str(settings), kept=True)
    pid = backend_pid(kept)
    settings.write_text("loaders = 'many'\n")
    os.kill(kept.pid, signal.SIGHUP)
    until(lambda: "event=reload-refused" in kept.log())
    kept.wait_logged("loaders is 'many'")
    assert kept.status()["pid"] == pid
    assert kept.stop() == 0


@pytest.mark.parametrize("end", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_a_restart_by_another_supervisor_loses_nothing(
    run_dir: Path, make_image: MakeImage, end: signal.Signals
) -> None:
    words = command("serve", "--run-dir", str(run_dir), "--image", f"d={make_image(4 * MIB)}")
    supervisor = Supervisor(words, run_dir / "log")
    try:
        with connect(f"unix://{run_dir}/cowshed.sock") as backend:
            backend.request("warm", image="d")
        supervisor.process.send_signal(end)
        assert supervisor.process.wait(ANSWER_SECONDS) == (-9 if end == signal.SIGKILL else 0)
        supervisor.start()
        with connect(f"unix://{run_dir}/cowshed.sock") as backend:
            status = backend.request("status")["status"]
        assert status["pid"] == supervisor.process.pid
        assert (status["resident_bytes"], status["loads"]) == (4 * MIB, 64)
    finally:
        supervisor.close()


def test_systemd_itself_finds_every_setting_of_the_unit_where_it_belongs(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    unit = root / "service" / "cowshed.service"
    misplaced = tmp_path / "cowshed.service"
    line = "StartLimitIntervalSec=0\n"
    text = unit.read_text().replace(line, "")
    misplaced.write_text(text.replace("[Service]\n", f"[Service]\n{line}"))

    def check(path: Path) -> tuple[int, str]:
        words = ["sh", root / "tools/check_unit.sh", path, sys.executable]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    assert check(unit) == (0, "")
    status, said = check(misplaced)
    assert status != 0
    assert "'StartLimitIntervalSec' in section [Service]" in said


def test_an_empty_notify_socket_is_as_none(
    start_daemon: StartDaemon, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    kept = start_daemon("--config", str(settings), kept=True)
    assert kept.status()["keeper"] == "own"
    kill_backend(kept)
    assert kept.stop() == 0


def test_an_empty_notify_socket_without_a_keeper_is_nobody(
    start_daemon: StartDaemon, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    daemon = start_daemon("--config", str(settings))
    assert daemon.status()["keeper"] == "none"


def test_the_unit_file_fits_the_program() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(Path(__file__).parents[3] / "service" / "cowshed.service")
    service = unit["Service"]
    words = service["ExecStart"].split()
    assert words[1:3] == ["serve", "--config"]
    assert service["Type"] == "notify"
    assert int(service["FileDescriptorStoreMax"]) >= 10_000
    assert service["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"


@pytest.fixture
def settings(run_dir: Path, make_image: MakeImage) -> Path:
    path = run_dir / "cowshed.toml"
    path.write_text(f'images = {{ d = "{make_image(MIB)}" }}\n')
    return path


def make_unreadable(settings: Path) -> str:
    """Have whoever reads it wait; what it said."""
    text = settings.read_text()
    settings.unlink()
    os.mkfifo(settings)
    return text


def test_a_death_is_followed_while_the_check_of_a_reload_waits(
    start_daemon: StartDaemon, settings: Path
) -> None:
    kept = start_daemon("--config", str(settings), kept=True)
    pid = backend_pid(kept)
    text = make_unreadable(settings)
    os.kill(kept.pid, signal.SIGHUP)
    until(lambda: bool(children(kept.pid) - {pid}))
    first = children(kept.pid) - {pid}
    os.kill(kept.pid, signal.SIGHUP)  # a second one begins anew
    # Else the first might be who reads what is written below.
    until(lambda: bool(children(kept.pid) - {pid} - first) and not any(map(runs, first)))
    kill_backend(kept)
    pid = backend_pid(kept)
    settings.write_text(text)  # whoever is written to reads it once, and nobody reads it again
    until(lambda: kept.status()["pid"] != pid)
    kept.wait_logged("event=replaced ", 1)
    assert kept.stop() == 0


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has reaped has."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    return False


def test_another_keeper_needs_no_configuration_that_can_be_read(
    start_daemon: StartDaemon, settings: Path
) -> None:
    kept = start_daemon("--config", str(settings), kept=True)
    pid = backend_pid(kept)
    settings.write_text("nonsense")
    kept.kill()
    until(lambda: "event=held" in kept.log())
    until(lambda: kept.status()["not_held"] == 0)
    make_unreadable(settings)
    os.kill(later_keepers(kept)[-1], signal.SIGKILL)
    until(lambda: len(later_keepers(kept)) == 2)
    until(lambda: kept.status()["not_held"] == 0)
    kill_backend(kept)
    assert kept.status()["pid"] != pid


# The program as it is installed now: what runs with --check says another layout, or cannot be run.
_OTHER_LAYOUT = """
import sys
if "--check" in sys.argv:
    from cowshed.service.supervise import layouts
    layouts.LAYOUTS = layouts.ALL_LAYOUTS = "9.9.9"
"""
# A release that knows no open regions: it would find ledgers longer than its own, and lose guests.
_OLDER = """
import json, os, sys
if "--check" in sys.argv:
    from cowshed.service.supervise import reload_check
    def answer_check(layouts, all_layouts, text):
        answer = {"layouts": layouts, "text": text}
        os.write(int(os.environ["COWSHED_CHECK_FD"]), json.dumps(answer).encode())
    reload_check.answer_check = answer_check
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that each of the daemon's processes runs as it begins; it does nothing yet."""
    module = tmp_path / "site" / "sitecustomize.py"
    module.parent.mkdir()
    module.touch()
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{module.parent}:{path}" if path else str(module.parent))
    return module


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (_OTHER_LAYOUT, "is installed now in 9.9.9"),
        (_OLDER, "is installed now in 2.5.1"),
        ("import os; os._exit(7)", "ended with status 7"),
        ("import os, sys; '--check' in sys.argv and os.kill(os.getpid(), 9)", "status -9"),
    ],
    ids=["layout", "older", "broken", "killed"],
)
@pytest.mark.parametrize("is_supervised", [False, True], ids=["keeper", "supervisor"])
def test_a_reload_to_a_program_that_could_not_go_on_is_refused_in_one_line(
    run_dir: Path,
    settings: Path,
    installed: Path,
    start_daemon: StartDaemon,
    text: str,
    why: str,
    is_supervised: bool,
) -> None:
    if is_supervised:
        words = command("serve", "--run-dir", str(run_dir), "--config", str(settings))
        supervisor = Supervisor(words, run_dir / "log")
        process, log = supervisor.process, supervisor.log
    else:
        kept = start_daemon("--config", str(settings), kept=True)
        process, log = kept.process, kept.log_path
    try:
        pid = int((run_dir / "lock").read_text())
        installed.write_text(text)
        process.send_signal(signal.SIGHUP)
        until(lambda: "event=reload-refused" in log.read_text())
        (line,) = [each for each in log.read_text().splitlines() if "reload-refused" in each]
        assert why in line
        installed.write_text("")
        with connect(f"unix://{run_dir}/cowshed.sock") as backend:
            assert backend.request("status")["status"]["pid"] == pid
    finally:
        if is_supervised:
            supervisor.close()
