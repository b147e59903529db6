# SPDX-License-Identifier: Apache-2.0
"""nbds: who has a certificate gets in, as who it says; nobody else gets anything."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import Authority
from domains import until
from nbd_site import SIZE, Site, run

from cowshed.transport.nbd.options import reply
from cowshed.transport.nbd.wire import OPTION_HEADER, OPTION_MAGIC, NbdOption, Reply

pytestmark = pytest.mark.slow

CONFIG = """
nbd = "127.0.0.1:0"

[tls]
cert = "{cert}"
key = "{key}"
ca = "{ca}"
{more}

[domains.tenant]
clients = ["carol"]
"""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def tls_site(
    make_site: Callable[..., Site], authority: Authority, tmp_path: Path
) -> Callable[..., Site]:
    def make(more: str = "") -> Site:
        files = authority.issue("server", "DNS:localhost,IP:127.0.0.1")
        path = tmp_path / "c.toml"
        path.write_text(CONFIG.format(**files, more=more))
        return make_site("--config", str(path))

    return make


def client_folder(authority: Authority, name: str) -> Path:
    """A client's files as libnbd and QEMU look for them."""
    files = authority.issue(name)
    folder = authority.folder / f"{name}.pki"
    folder.mkdir()
    for kind, as_name in (("ca", "ca"), ("cert", "client"), ("key", "client")):
        suffix = "key" if kind == "key" else "cert"
        (folder / f"{as_name}-{suffix}.pem").write_text(Path(files[kind]).read_text())
    return folder


def nbds(site: Site, export: str, folder: Path) -> str:
    _, port = site.address
    return f"nbds://localhost:{port}/{export}?tls-certificates={folder}"


def test_a_certificate_is_who_one_is(
    tls_site: Callable[..., Site], authority: Authority, tmp_path: Path
) -> None:
    site = tls_site()
    alice, bob = client_folder(authority, "alice"), client_folder(authority, "bob")
    copy = tmp_path / "copy.raw"
    run("nbdcopy", "--connections=3", nbds(site, "d", alice), str(copy))
    assert copy.read_bytes() == site.content()
    run("nbdcopy", "--connections=2", str(copy), nbds(site, "d@a", alice))
    assert "using structured packets" in run("nbdinfo", nbds(site, "d@a", alice))
    assert "with TLS" in run("nbdinfo", nbds(site, "d@a", alice))
    run("nbdinfo", nbds(site, "d@a", bob), status=1)
    assert "d@a" not in run("nbdinfo", "--list", nbds(site, "", bob))
    # Carol's domain has no images.
    run("nbdinfo", nbds(site, "d", client_folder(authority, "carol")), status=1)
    until(lambda: site.daemon.guest_status("a")["state"] == "away")


def test_qemu_speaks_it_too(tls_site: Callable[..., Site], authority: Authority) -> None:
    site = tls_site()
    folder = client_folder(authority, "alice")
    _, port = site.address
    where = f"driver=nbd,host=localhost,port={port},export=d,tls-creds=c"
    told = run(
        *("qemu-img", "compare", "--image-opts"),
        *("--object", f"tls-creds-x509,id=c,endpoint=client,dir={folder}"),
        f"driver=file,filename={site.path}",
        where,
    )
    assert "identical" in told


def test_without_tls_nothing_is_told_but_on_the_unix_socket(
    tls_site: Callable[..., Site], authority: Authority, tmp_path: Path
) -> None:
    site = tls_site()
    run("nbdinfo", site.tcp_uri(), status=1)
    run("nbdinfo", "--list", site.tcp_uri(""), status=1)
    assert str(SIZE) in run("nbdinfo", site.uri())
    stranger = client_folder(Authority(tmp_path / "other"), "mallory")
    (stranger / "ca-cert.pem").write_text(authority.ca.read_text())
    run("nbdinfo", nbds(site, "d", stranger), status=1)
    until(lambda: "event=dropped" in site.daemon.log())
    assert "Traceback" not in site.daemon.log()


def test_a_client_without_a_certificate_may_be_let_in(
    tls_site: Callable[..., Site], authority: Authority
) -> None:
    site = tls_site('clients = "optional"')
    context = ssl.create_default_context(cafile=authority.ca)
    with socket.create_connection(site.address) as plain:
        plain.sendall(b"\0\0\0\3" + OPTION_HEADER.pack(OPTION_MAGIC, NbdOption.STARTTLS, 0))
        assert receive(plain, 18) == b"NBDMAGICIHAVEOPT\0\3"
        assert receive(plain, 20) == reply(NbdOption.STARTTLS, Reply.ACK)
        with context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(OPTION_HEADER.pack(OPTION_MAGIC, NbdOption.ABORT, 0))
            assert receive(client, 20) == reply(NbdOption.ABORT, Reply.ACK)
            assert client.recv(1) == b""


def receive(sock: socket.socket, nr_bytes: int) -> bytes:
    parts = b""
    while len(parts) < nr_bytes:
        part = sock.recv(nr_bytes - len(parts))
        assert part, "it closed"
        parts += part
    return parts
