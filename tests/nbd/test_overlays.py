# SPDX-License-Identifier: Apache-2.0
"""Guests' private copies over NBD: what is written, what it may cost, whose it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from domains import until
from nbd_site import MIB, SIZE, Site, run
from scraping import ANY_PORT, scrape, value


def test_writes_are_one_guests_own_and_trim_gives_the_image_back(site: Site) -> None:
    told = site.nbdsh(
        f"""
image = open({str(site.path)!r}, "rb").read()
h.pwrite(b"\\x07" * 5000, 4000)
mine = bytearray(image)
mine[4000:9000] = b"\\x07" * 5000
print(h.pread(16384, 0) == mine[:16384])
h.zero(100000, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
h.zero(50000, 2 << 20)
mine[1 << 20:(1 << 20) + 100000] = bytes(100000)
mine[2 << 20:(2 << 20) + 50000] = bytes(50000)
h.pwrite(b"end", {SIZE} - 3, nbd.CMD_FLAG_FUA)
mine[-3:] = b"end"
h.flush()
print(b"".join(h.pread({MIB}, at) for at in range(0, {SIZE}, {MIB})) == mine)
h.trim({MIB}, 0)
h.trim({MIB}, 1 << 20)
mine[:2 << 20] = image[:2 << 20]
print(b"".join(h.pread({MIB}, at) for at in range(0, {SIZE}, {MIB})) == mine)
""",
        "d@g",
    )
    assert told.split() == ["True"] * 3
    private = [stretch for stretch in site.map("cowshed:private", "d@g") if stretch[2]]
    assert private == [(2 * MIB, 13 * 4096, 1), (SIZE - 4096, 4096, 1)]
    other = site.nbdsh("print(h.pread(3, h.get_size() - 3) == b'end')", "d@other")
    assert other.split() == ["False"]
    assert "identical" in run("qemu-img", "compare", str(site.path), site.uri())


def until_away(site: Site, name: str = "g") -> None:
    """Wait until the daemon has seen the end of a client, which comes after the client's own."""
    until(lambda: site.daemon.guest_status(name)["state"] == "away")


def test_a_guest_finds_its_pages_again_until_they_are_discarded(site: Site) -> None:
    site.nbdsh("h.pwrite(b'mine' * 1024, 8192)", "d@g")
    until_away(site)
    status = site.daemon.guest_status("g")
    assert status == status | {
        "state": "away",
        "transport": "nbd",
        "private_bytes": 4096,
        "clients": 0,
        "pid": 0,
    }
    site.cowshed("evict", "d")
    assert "True" in site.nbdsh("print(h.pread(4096, 8192) == b'mine' * 1024)", "d@g")
    assert "d@g" in run("nbdinfo", "--list", site.uri(""))
    until_away(site)
    assert site.cowshed("discard", "d@g") == "d@g: 4K discarded\n"
    assert "no overlay 'd@g'; there is none" in site.cowshed("discard", "d@g", status=1)
    assert site.map("cowshed:private", "d@g") == [(0, SIZE, 0)]
    assert site.daemon.mismatches() == []


def test_discarding_waits_until_nobody_is_connected(site: Site) -> None:
    told = site.nbdsh(
        f"""
import subprocess
h.pwrite(b"x", 0)
words = [{sys.executable!r}, "-m", "cowshed.service.cli"]
def cowshed(*more):
    done = subprocess.run([*words, *more, "--run-dir", {str(site.daemon.run_dir)!r}],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout
print('"state": "running"' in cowshed("status", "--json"))
print(cowshed("discard", "d@g"))
""",
        "d@g",
    )
    assert told.startswith("True")
    assert "has 1 client: disconnect" in told
    until_away(site)
    assert "4K discarded" in site.cowshed("discard", "d@g")


def test_at_its_quota_a_write_fails_and_nothing_else_does(site: Site) -> None:
    site.nbdsh("h.pwrite(b'x', 0)", "d@g")
    site.cowshed("quota", "g", "16K")
    told = site.nbdsh(
        """
h.pwrite(b"a" * 12288, 4096)
for what in (lambda: h.pwrite(b"b" * 4096, 65536), lambda: h.zero(8192, 65536)):
    try: what(); print("fine")
    except nbd.Error as error: print(error.errno)
h.pwrite(b"c" * 16384, 0)
print(h.pread(1, 4096), h.pread(4, 65536) == h.pread(4, 65540))
h.trim(4096, 0)
h.pwrite(b"b" * 4096, 65536)
""",
        "d@g",
    )
    assert told.split() == ["ENOSPC", "ENOSPC", "bytearray(b'c')", "False"]
    site.cowshed("quota", "g", "20K")
    site.nbdsh("h.pwrite(b'd' * 4096, 0)", "d@g")
    assert site.daemon.guest_status("g")["private_bytes"] == 20480
    assert site.daemon.mismatches() == []


def test_an_overlay_is_for_whom_it_was_made_and_for_root(site: Site, nobody: int) -> None:
    run("nbdsh", "-u", site.uri("d@mine"), "-c", "h.pwrite(b'root', 0)")
    run("nbdsh", "-u", site.uri("d@theirs"), "-c", "h.pwrite(b'body', 0)", uid=nobody)
    refused = run("nbdinfo", site.uri("d@mine"), uid=nobody, status=1)
    assert "d@mine" in refused
    listed = run("nbdinfo", "--list", site.uri(""), uid=nobody)
    assert "d@theirs" in listed
    assert "d@mine" not in listed
    assert "True" in site.nbdsh("print(h.pread(4, 0) == b'body')", "d@theirs")
    assert "refused" not in site.daemon.log()


def test_a_name_belongs_to_one_guest_of_whatever_transport(site: Site) -> None:
    site.nbdsh("h.pwrite(b'x', 0)", "d@g")
    with site.daemon.connect() as backend:
        try:
            backend.open("d", guest="g")
        except Exception as error:
            assert "guest name 'g' is taken" in str(error)  # noqa: PT017
        else:
            raise AssertionError("two guests of one name")


def test_metrics_count_requests_and_guests(make_site: Callable[..., Site]) -> None:
    site = make_site(*ANY_PORT)
    site.nbdsh("h.pwrite(b'x' * 8192, 0); h.trim(4096, 0); h.flush(); h.pread(512, 0)", "d@g")
    until_away(site)
    samples = scrape(site.daemon)
    for name, labels, expected in (
        ("nbd_requests_total", {"command": "write"}, 1),
        ("nbd_requests_total", {"command": "trim"}, 1),
        ("nbd_bytes_total", {"direction": "write"}, 8192),
        ("nbd_connections_total", {}, 1),
        ("nbd_errors_total", {}, 0),
        ("guests", {"transport": "nbd", "state": "away"}, 1),
        ("private_bytes", {}, 4096),
    ):
        assert value(samples, name, image="d", domain="default", **labels) == expected, name


def test_who_may_use_an_image_is_asked_of_nbd_too(
    make_site: Callable[..., Site], tmp_path: Path, nobody: int
) -> None:
    tmp_path.chmod(0o755)
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"s" * 8192)
    config = tmp_path / "c.toml"
    config.write_text(f'[[image]]\nname = "secret"\nsource = "{secret}"\nuids = [{nobody + 1}]\n')
    site = make_site("--config", str(config))
    assert "secret" in run("nbdinfo", "--list", site.uri(""))
    assert "secret" not in run("nbdinfo", "--list", site.uri(""), uid=nobody)
    for name in ("secret", "secret@g"):
        run("nbdinfo", site.uri(name), uid=nobody, status=1)
    run("nbdinfo", site.uri("secret"), uid=nobody + 1)
