# SPDX-License-Identifier: Apache-2.0
"""A listener that fails in a successor costs itself alone, until it can be opened."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority
from domains import (
    ANSWER_SECONDS,
    Daemon,
    Guest,
    MakeImage,
    StartDaemon,
    StartGuest,
    command,
    cowshed,
    kill_backend,
    until,
)
from places import take_port

from cowshed.transport.guest.client import connect

# Some start several backends, one after the other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MIB = 1 << 20
TLS_TABLE = '[tls]\ncert = "{cert}"\nkey = "{key}"\nca = "{ca}"\n'
FILES = ("cert", "key", "ca")


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(MIB, "d.raw")


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port of this host at which somebody else listens."""
    with take_port() as listener:
        yield listener


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return Authority(tmp_path / "pki").issue("server", "DNS:localhost,IP:127.0.0.1")


def settings_of(run_dir: Path, image: Path, more: str = "", tables: str = "") -> Path:
    path = run_dir / "cowshed.toml"
    path.write_text(f'{more}\n[images]\nd = "{image}"\n{tables}')
    return path


def configured(what: str, port: int) -> str:
    return {
        "tcp": f'listen = ["tcp://127.0.0.1:{port}"]',
        "nbd": f'nbd = "127.0.0.1:{port}"',
        "metrics": f'metrics = "127.0.0.1:{port}"',
    }[what]


def addresses(daemon: Daemon) -> list[str]:
    return [each["address"] for each in daemon.status()["unserved_listeners"]]


def still_served(daemon: Daemon, guest: Guest, image: Path) -> bool:
    """Whether a guest that came before goes on, with nothing lost."""
    assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0
    return bool(daemon.guest_status("g")["state"] == "running" and not daemon.mismatches())


def damage(files: dict[str, str], how: str) -> dict[str, bytes]:
    """Take the certificate's files away, or spoil them; what they had."""
    had = {name: Path(files[name]).read_bytes() for name in FILES}
    for name in FILES:
        if how == "missing":
            Path(files[name]).unlink()
        else:
            Path(files[name]).write_text("no certificate")
    return had


def put_back(files: dict[str, str], had: dict[str, bytes]) -> None:
    for name in FILES:
        new = Path(files[name]).with_suffix(".new")
        new.write_bytes(had[name])
        new.rename(files[name])


@pytest.mark.parametrize("what", ["tcp", "nbd", "metrics"])
def test_at_a_first_start_an_address_that_is_taken_is_an_error(
    run_dir: Path, image: Path, taken: socket.socket, what: str
) -> None:
    settings = settings_of(run_dir, image, configured(what, taken.getsockname()[1]))
    ended = cowshed("serve", "--run-dir", run_dir, "--config", settings)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "in use" in line


@pytest.mark.parametrize("more", ["", 'listen = ["tls://127.0.0.1:0"]', 'nbd = "127.0.0.1:0"'])
def test_at_a_first_start_a_certificate_that_is_not_there_is_an_error(
    run_dir: Path, image: Path, files: dict[str, str], more: str
) -> None:
    damage(files, "missing")
    settings = settings_of(run_dir, image, more, TLS_TABLE.format(**files))
    ended = cowshed("serve", "--run-dir", run_dir, "--config", settings)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "cannot use ca" in line


@pytest.mark.parametrize("what", ["tcp", "nbd", "metrics"])
def test_an_address_that_is_taken_is_served_once_it_is_free(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    run_dir: Path,
    image: Path,
    taken: socket.socket,
    what: str,
) -> None:
    kept = start_daemon("--config", str(settings_of(run_dir, image)), kept=True)
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    port = taken.getsockname()[1]
    settings_of(run_dir, image, configured(what, port))
    kill_backend(kept, signal.SIGHUP)
    assert still_served(kept, guest, image)
    kill_backend(kept)
    assert still_served(kept, guest, image)
    (unserved,) = kept.status()["unserved_listeners"]
    assert f"127.0.0.1:{port}" in unserved["address"]
    assert "in use" in unserved["why"]
    told = " ".join(cowshed("status", "--run-dir", run_dir).stdout.split())
    assert f"{unserved['address']} is not served" in told
    kept.wait_logged("event=listener-unserved", 2)  # once of each backend
    taken.close()
    until(lambda: addresses(kept) == [])
    kept.wait_logged("event=listener-served")
    if what == "metrics":
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            assert b"cowshed_" in answer.read()
    elif what == "tcp":
        connect(f"tcp://127.0.0.1:{port}").close()
    else:
        with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as client:
            assert client.recv(8) == b"NBDMAGIC"
    kill_backend(kept)
    assert addresses(kept) == []
    assert still_served(kept, guest, image)


@pytest.mark.slow
def test_a_takeover_goes_on_without_an_address_that_is_taken(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    run_dir: Path,
    image: Path,
    taken: socket.socket,
) -> None:
    old = start_daemon("--config", str(settings_of(run_dir, image)), kept=True)
    guest = start_guest(old.uri)
    guest.call("open", image="d", guest="g")
    before = old.status()["pid"]
    settings = settings_of(run_dir, image, configured("tcp", taken.getsockname()[1]))
    with (run_dir / "taker").open("wb") as log:
        taker = subprocess.Popen(
            command("serve", "--takeover", "--run-dir", str(run_dir), "--config", str(settings)),
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: taker.poll() is not None or old.status()["pid"] != before)
        assert still_served(old, guest, image)
        assert addresses(old) == [f"tcp://127.0.0.1:{taken.getsockname()[1]}"]
    finally:
        if taker.poll() is None:
            os.kill(int((run_dir / "lock").read_text()), signal.SIGTERM)
            taker.wait(ANSWER_SECONDS)


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_without_its_certificate_a_listener_has_clients_wait_and_nobody_else(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    run_dir: Path,
    image: Path,
    files: dict[str, str],
    how: str,
) -> None:
    more = 'listen = ["tls://127.0.0.1:0"]\nnbd = "127.0.0.1:0"'
    settings = settings_of(run_dir, image, more, TLS_TABLE.format(**files))
    kept = start_daemon("--config", str(settings), kept=True)
    guests_port, nbd_port = (
        int(re.findall(rf"={scheme}://127.0.0.1:(\d+)", kept.log())[0])
        for scheme in ("tls", "nbds")
    )
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    trust = ssl.create_default_context(cafile=files["ca"])
    trust.load_cert_chain(files["cert"], files["key"])
    had = damage(files, how)
    kill_backend(kept)
    kill_backend(kept, signal.SIGHUP)
    assert still_served(kept, guest, image)
    assert addresses(kept) == [
        f"nbds+unix:///?socket={run_dir}/nbd.sock",
        "nbds://127.0.0.1:0",
        "tls://127.0.0.1:0",
    ]
    assert "left-over" not in kept.log()
    # Local clients are served, without TLS.
    with socket.socket(socket.AF_UNIX) as local:
        local.connect(str(run_dir / "nbd.sock"))
        assert local.recv(8) == b"NBDMAGIC"
    with (
        socket.create_connection(("127.0.0.1", guests_port), ANSWER_SECONDS) as client,
        socket.create_connection(("127.0.0.1", nbd_port), ANSWER_SECONDS) as other,
    ):
        put_back(files, had)
        until(lambda: addresses(kept) == [])
        with trust.wrap_socket(client, server_hostname="localhost") as secured:
            assert secured.version()
        assert other.recv(8) == b"NBDMAGIC"
    assert still_served(kept, guest, image)


def test_a_certificate_on_a_disk_that_hangs_holds_up_its_listener_alone(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    run_dir: Path,
    image: Path,
    files: dict[str, str],
) -> None:
    more = 'listen = ["tls://127.0.0.1:0"]'
    settings = settings_of(run_dir, image, more, TLS_TABLE.format(**files))
    kept = start_daemon("--config", str(settings), kept=True)
    port = int(re.findall(r"=tls://127.0.0.1:(\d+)", kept.log())[0])
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    trust = ssl.create_default_context(cafile=files["ca"])
    trust.load_cert_chain(files["cert"], files["key"])
    had = damage(files, "missing")
    for name in FILES:
        os.mkfifo(files[name])  # whoever opens it waits for a writer
    kill_backend(kept)
    assert still_served(kept, guest, image)
    kill_backend(kept, signal.SIGHUP)
    assert still_served(kept, guest, image)
    nbd = f"nbds+unix:///?socket={run_dir}/nbd.sock"
    assert addresses(kept) == [nbd, "tls://127.0.0.1:0"]
    kept.wait_logged("does not answer")
    hangs = Path(files["ca"]).with_suffix(".hangs")
    Path(files["ca"]).rename(hangs)
    with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as client:
        put_back(files, had)

        def is_served() -> bool:
            # Who waits there, or comes only now, gets an error and tries again; nobody may.
            with contextlib.suppress(OSError):
                os.close(os.open(hangs, os.O_WRONLY | os.O_NONBLOCK))
            return addresses(kept) == []

        until(is_served)
        with trust.wrap_socket(client, server_hostname="localhost") as secured:
            assert secured.version()
    assert still_served(kept, guest, image)
