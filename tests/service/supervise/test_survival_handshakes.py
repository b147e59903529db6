# SPDX-License-Identifier: Apache-2.0
"""A backend dies in the middle of a handshake: its successor is asked; the guest never knows."""

import re
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from domains import (
    Daemon,
    MakeImage,
    StartDaemon,
    StartGuest,
    command,
    kill_backend,
    plain_environment,
    until,
)

from cowshed.transport import connect

pytestmark = pytest.mark.slow

MIB = 1 << 20
PAGE = 4096
POINTS = ("GUEST_CAME", "OPEN_TOLD", "REGION_ATTACHED", "REGION_HELD", "REGION_TOLD")


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(4 * MIB)


@pytest.fixture
def kept(start_daemon: StartDaemon, image: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    monkeypatch.setenv("COWSHED_TEST_POINTS", "1")
    return start_daemon("--image", f"d={image}", "--listen=tcp://127.0.0.1:0", kept=True)


@pytest.mark.parametrize("point", POINTS)
def test_a_guest_attaches_to_the_successor_of_who_dies_meanwhile(
    kept: Daemon, start_guest: StartGuest, image: Path, point: str
) -> None:
    guest = start_guest(kept.uri)
    pid = kept.status()["pid"]
    kept.request("point", name=point)
    guest.call("open", image="d", guest="g")
    assert kept.status()["pid"] != pid
    guest.call("write", offset=PAGE, hex="ab" * PAGE)
    assert guest.call("compare", path=str(image), offset=2 * PAGE, length=MIB) == 0
    assert bytes.fromhex(guest.call("read", offset=PAGE, length=PAGE)) == b"\xab" * PAGE
    assert [each["name"] for each in kept.status()["guests"]] == ["g"]
    assert kept.mismatches() == []
    guest.call("close")
    until(lambda: kept.status()["guests"] == [])


@pytest.mark.parametrize("point", POINTS)
def test_a_program_attaches_to_the_successor_of_who_dies_meanwhile(
    kept: Daemon, image: Path, point: str
) -> None:
    look = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); "
        "m = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ); "
        "print(m[:] == open(sys.argv[2], 'rb').read())"
    )
    copy = image.with_name("copy")
    copy.write_bytes(image.read_bytes())
    kept.request("point", name=point)
    words = ["python3", "-c", look, "{image}", str(copy)]
    ended = subprocess.run(
        command("attach", "d", "--run-dir", str(kept.run_dir), "--", *words),
        capture_output=True,
        text=True,
        timeout=120,
        env=plain_environment(),
        check=False,
    )
    assert (ended.stdout, ended.returncode) == ("True\n", 0), ended.stderr
    kept.wait_logged("event=backend-died")
    assert kept.mismatches() == []


@pytest.mark.parametrize("point", ["NETWORK_CAME", "NETWORK_OPENS", "NETWORK_GIVEN"])
def test_a_network_guest_goes_on_with_the_successor_of_who_dies_meanwhile(
    kept: Daemon, image: Path, point: str
) -> None:
    uri = re.findall(r"event=listening uri=\"?([^\"\s]+)", kept.log())[0]
    pid = kept.status()["pid"]
    kept.request("point", name=point)
    with connect(uri) as backend, backend.open("d", guest="g", token="t" * 16) as disk:
        assert disk.read(0, MIB) == image.read_bytes()[:MIB]
    assert kept.status()["pid"] != pid


def test_a_client_of_nbd_is_told_at_once_that_its_handshake_was_cut(kept: Daemon) -> None:
    pid = kept.status()["pid"]
    kept.request("point", name="NBD_CAME")
    words = ["nbdinfo", "--size", f"nbd+unix:///d?socket={kept.run_dir}/nbd.sock"]
    cut = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert cut.returncode != 0
    assert cut.stderr.startswith("nbdinfo: ")
    assert kept.status()["pid"] != pid
    again = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (again.returncode, again.stdout) == (0, f"{4 * MIB}\n")


def test_a_machine_whose_handshake_was_cut_finds_its_connection_at_an_end_at_once(
    kept: Daemon,
) -> None:
    pid = kept.status()["pid"]
    kept.request("point", name="MACHINE_ACCEPTED")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(60)
        caller.connect(str(kept.run_dir / "images/d.sock"))
        assert caller.recv(1) == b""  # not one that is half somebody's
    assert kept.status()["pid"] != pid


def test_handshakes_under_a_hail_of_kills(kept: Daemon, start_guest: StartGuest) -> None:
    is_over = threading.Event()

    def kill() -> None:
        # So many: the keeper waits longer after each, and a handshake may need a second.
        for _ in range(6):
            kill_backend(kept)
            if is_over.wait(0.5):
                return

    guest = start_guest(kept.uri)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(8):
            guest.call("open", image="d", guest="g", token="t" * 16)
            guest.call("read", offset=0, length=PAGE)
            guest.call("close")
    finally:
        is_over.set()
        killer.join()
    until(lambda: kept.status()["guests"] == [])
    assert kept.mismatches() == []


def test_there_is_no_such_request_without_the_variable(
    start_daemon: StartDaemon, image: Path
) -> None:
    daemon = start_daemon("--image", f"d={image}")
    with pytest.raises(Exception, match="no request 'point'"):
        daemon.request("point", name="LOAD_READ")
