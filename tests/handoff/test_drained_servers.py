# SPDX-License-Identifier: Apache-2.0
"""Whoever comes to a backend that is drained is told where its guests are, at every server."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from certificates import Authority
from domains import Daemon, StartGuest, in_thread, is_stopped, until
from machine_guests import new_machine
from two_hosts import PAGE, SIZE, Host

from cowshed.transport import connect
from cowshed.transport.channels.exchange import ask, ask_for_fds, close_all, greet
from cowshed.transport.messages.fields import MovedError

Pair = tuple[Host, Host]


def _where(daemon: Daemon, scheme: str) -> str:
    lines = [line for line in daemon.log().splitlines() if "event=listening " in line]
    (where,) = [line for line in lines if f"{scheme}://" in line]
    return where.partition("uri=")[2].split()[0].strip('"')


def test_every_server_of_a_drained_backend_tells_the_targets_address(
    hosts: Pair, start_guest: StartGuest, tmp_path: Path
) -> None:
    a, b = hosts
    authority = Authority(tmp_path / "ca")
    server = authority.issue("server", "IP:127.0.0.1")
    config = tmp_path / "tls.toml"
    lines = "\n".join(f'{key} = "{path}"' for key, path in server.items())
    config.write_text(f"[tls]\n{lines}\n")
    a.start(f"--config={config}", "--listen=tls://127.0.0.1:0")
    b.start()
    machine = new_machine(a.the_daemon, start_guest, [SIZE])
    a.drain("--to", b.unix)
    client = authority.issue("client", "DNS:client.example")
    options = "&".join(f"{key}={path}" for key, path in client.items())
    for uri in (a.unix, a.tcp, f"{_where(a.the_daemon, 'tls')}?{options}"):
        with connect(uri) as backend, pytest.raises(MovedError) as caught:
            backend.open("d", guest="g", follow_moves=False)
        assert caught.value.uri == b.unix, uri
    for export in ("d", "d@guest", ""):
        uri = f"nbd+unix:///{export}?socket={a.run_dir}/nbd.sock"
        # The server's words are in its debug output alone.
        done = subprocess.run(
            ["nbdinfo", uri],
            env={**os.environ, "LIBNBD_DEBUG": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode != 0
        assert b.unix in done.stderr, export
    machine.call("connect")
    assert machine.call("wait_dropped") == 0
    until(lambda: f"guests of this backend move to {b.unix}" in a.the_daemon.log())
    done = a.run("attach", "d", "--", "cat", "{image}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"cowshed: guests of this backend move to {b.unix}: open there\n"
    assert a.guests() == set()


def test_who_was_waiting_when_the_drain_began_is_sent_on(
    hosts: Pair, start_guest: StartGuest
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-prepare"))
    b.start()
    opened = greet(a.unix)
    _, fds = ask_for_fds(opened, "open", {"image": "d", "guest": "g"})
    machine = new_machine(a.the_daemon, start_guest, [SIZE])
    machine.call("connect")
    a.the_daemon.status()  # it is in
    drain = in_thread(lambda: a.run("drain", "--to", b.unix))
    until(lambda: is_stopped(a.the_daemon.pid))
    os.kill(a.the_daemon.pid, signal.SIGCONT)
    with pytest.raises(MovedError) as caught:
        ask(opened, "region", {"address": PAGE, "length": SIZE}, fds[:1] * 3)
    assert caught.value.uri == b.unix
    opened.close()
    close_all(fds)
    machine.call("hand_over")
    machine.call("wait_dropped")
    drain.join()
    assert a.guests() == set()
