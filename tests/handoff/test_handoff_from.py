# SPDX-License-Identifier: Apache-2.0
"""Who may hand guests over by a network: each refusal is one line at both ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority
from domains import in_thread, is_stopped, kill_backend, new_run_dir, until
from two_hosts import Host, Model

from cowshed.transport import connect
from cowshed.transport.messages.fields import MovedError

pytestmark = pytest.mark.slow

CONFIG = """
handoff_from = ["a.example"]

[tls]
cert = "{cert}"
key = "{key}"
ca = "{ca}"
"""


class TlsHost(Host):
    """A backend that listens with TLS, and takes handoffs of one name alone."""

    config: Path

    def options(self) -> list[str]:
        return ["--config", str(self.config), f"--listen=tls://127.0.0.1:{self.port}"]

    def uri(self, files: dict[str, str]) -> str:
        options = "&".join(f"{key}={value}" for key, value in files.items())
        return f"tls://127.0.0.1:{self.port}?{options}"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def hosts(image: Path, authority: Authority, tmp_path: Path) -> Iterator[tuple[Host, TlsHost]]:
    """A source, and a target that asks for certificates."""
    with new_run_dir() as one, new_run_dir() as two:
        a, b = Host("a", one, image), TlsHost("b", two, image)
        b.config = tmp_path / "b.toml"
        b.config.write_text(CONFIG.format(**authority.issue("b", "DNS:localhost,IP:127.0.0.1")))
        try:
            yield a.start(), b.start()  # type: ignore[misc]
        finally:
            for host in (a, b):
                host.end()


def test_a_drain_by_tls_needs_a_certificate_that_is_named_there(
    hosts: tuple[Host, TlsHost], authority: Authority, image: Path, tmp_path: Path
) -> None:
    a, b = hosts
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    right = authority.issue("a.example")
    stranger = Authority(tmp_path / "other", "another authority").issue("a.example")
    plain = f"tls://127.0.0.1:{b.port}"
    for to, words, heard in (
        (
            b.uri(authority.issue("c.example")),
            "from 'c.example' are not taken",
            "not taken",
        ),
        (b.uri({**stranger, "ca": right["ca"]}), "unknown ca", "certificate"),
        (b.uri({**right, "ca": stranger["ca"]}), "certificate is not valid", "unknown ca"),
        (plain, "lacks cert, key, ca", ""),
        (b.uri({**right, "key": "/nowhere"}), "cannot use cert", ""),
        (f"tcp://127.0.0.1:{b.port}", "", ""),
    ):
        seen = len(b.the_daemon.log())
        done = a.run("drain", "--to", to)
        assert done.returncode == 1, to
        assert words in done.stderr, (to, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
        until(lambda seen=seen, heard=heard: heard in b.the_daemon.log()[seen:])
        assert (a.guests(), b.guests()) == ({"g"}, set())
    report = a.drain("--to", b.uri(right))
    assert (report["phase"], report["guests"]) == ("moved", 1)
    assert report["to"] == plain, "without the paths of our key"
    with connect(a.unix) as backend, pytest.raises(MovedError) as moved:
        backend.open("d", guest="other", follow_moves=False)
    assert moved.value.uri == plain
    b.the_daemon.wait_logged("event=handoff-received")
    assert b.the_daemon.guest_status("g")["private_bytes"] > 0


def test_plain_tcp_is_no_way_in_unless_the_target_says_so(image: Path) -> None:
    with new_run_dir() as one, new_run_dir() as two:
        a, b = Host("a", one, image), Host("b", two, image)
        try:
            a.start()
            b.takes_handoffs = False
            b.start()
            with a.open("g") as disk:
                disk.write(0, b"x")
            done = a.run("drain", "--to", b.tcp)
            assert done.returncode == 1
            assert "serve with --accept-handoff" in done.stderr
            assert done.stderr.count("\n") == 1
            until(lambda: "are not taken here" in b.the_daemon.log())
            with a.open("g") as disk:
                disk.write(0, b"y")
        finally:
            for host in (a, b):
                host.end()


def test_pages_are_pushed_on_by_tls_to_a_target_that_died_meanwhile(
    hosts: tuple[Host, TlsHost], authority: Authority, image: Path
) -> None:
    """Whoever is asked again is asked with the certificate that it was asked with at first."""
    a, b = hosts
    for host in hosts:
        host.end()
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-push"))
    b.start(kept=True)
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk, 100)
    right = b.uri(authority.issue("a.example"))
    drain = in_thread(lambda: a.run("drain", "--post-copy", "--to", right))
    until(lambda: is_stopped(a.the_daemon.pid))
    kill_backend(b.the_daemon)

    def is_over() -> bool:
        if is_stopped(a.the_daemon.pid):  # it comes there each time that it pushes
            os.kill(a.the_daemon.pid, signal.SIGCONT)
        return not drain.is_alive()

    until(is_over)
    assert a.the_daemon.request("drain-state")["drain"]["phase"] == "moved"
    with connect(right) as backend, backend.open("d", guest="g", token="token") as disk:
        model.check(disk)
