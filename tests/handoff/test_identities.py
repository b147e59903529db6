# SPDX-License-Identifier: Apache-2.0
"""Guests known by a certificate or by a token alone, sent to where the other kind comes in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from certificates import Authority
from domains import new_run_dir
from two_hosts import Host, Model

from cowshed.cache import UsageError
from cowshed.transport import ByteDisk, connect

pytestmark = pytest.mark.slow


class BothHost(Host):
    """A backend that listens by tcp and by tls."""

    server: str

    def options(self) -> list[str]:
        return [*super().options(), f"--listen=tls://127.0.0.1:0?{self.server}"]

    def tls(self, client: dict[str, str]) -> str:
        (where,) = re.findall(r"uri=\"?(tls://[^\"\s]+)", self.the_daemon.log())
        return f"{where}?{urlencode(client)}"


Pair = tuple[BothHost, BothHost]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def both(image: Path, authority: Authority) -> Iterator[Pair]:
    with new_run_dir() as one, new_run_dir() as two:
        pair = BothHost("a", one, image), BothHost("b", two, image)
        try:
            for host in pair:
                host.server = urlencode(authority.issue(host.name, "IP:127.0.0.1"))
                host.start()
            yield pair
        finally:
            for host in pair:
                host.end()


def test_a_tls_guest_that_is_told_a_tcp_address_hears_that_its_certificate_is_wanted(
    both: Pair, authority: Authority, image: Path
) -> None:
    a, b = both
    alice = authority.issue("alice", "DNS:alice.example")
    model = Model(image, 1)
    with (
        connect(a.tls(alice)) as backend,
        backend.open("d", guest="g", token="secret", timeout=20) as disk,
    ):
        assert isinstance(disk, ByteDisk)
        model.write(disk)
        a.drain("--to", b.tcp)
        with pytest.raises(UsageError) as caught:
            model.check(disk)
        said = str(caught.value)
        wanted = "guest 'g' is identified by a certificate and its token, and sends no certificate"
        assert f"{wanted} by tcp" in said
        assert "connect by tls://" in said
        assert "taken" not in said
    # Who does not know the token, or has another certificate, hears nothing of that.
    mallory = authority.issue("mallory", "DNS:mallory.example")
    for uri, token in ((b.tcp, "guess"), (b.tls(mallory), "secret")):
        with connect(uri) as backend, pytest.raises(UsageError, match="'g' is taken"):
            backend.open("d", guest="g", token=token)
    with (
        connect(b.tls(alice)) as backend,
        backend.open("d", guest="g", token="secret") as disk,
    ):
        model.check(disk)


def test_a_guest_known_by_its_token_alone_finds_its_pages_by_tls_too(
    both: Pair, authority: Authority, image: Path
) -> None:
    a, b = both
    model = Model(image, 2)
    with a.open("g", "secret") as disk:
        model.write(disk)
    a.drain("--to", b.tcp)
    alice = b.tls(authority.issue("alice", "DNS:alice.example"))
    with connect(alice) as backend, backend.open("d", guest="g", token="secret") as disk:
        model.check(disk)
        model.write(disk)
    with connect(alice) as backend, pytest.raises(UsageError, match="'g' is taken"):
        backend.open("d", guest="g", token="guess")
    with b.open("g", "secret") as disk:
        model.check(disk)
