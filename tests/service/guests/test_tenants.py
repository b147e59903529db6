# SPDX-License-Identifier: Apache-2.0
"""Two tenants on one source: nothing of one is shared with, named by or shown to the other."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import NOBODY, Daemon, Guest, MakeImage, StartDaemon, StartGuest, cowshed, until
from scraping import ANY_PORT, scrape, value

from cowshed.service.frontends.vmm.image_folders import make_image_folders
from cowshed.service.settings.domains import DomainMembers, Domains
from cowshed.service.settings.images import ImageSpec

MIB = 1 << 20
PAGE = 4096
ALICE, BOB = NOBODY, 54321  # who need not exist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users: needs root"),
]

CONFIG = """
guest_metrics = 10

[[image]]
name = "debian"
source = "image.raw"
domain = "a"

[[image]]
name = "debian"
source = "image.raw"
domain = "b"

[[image]]
name = "secret"
source = "image.raw"
domain = "b"

[domains.a]
uids = [{alice}]

[domains.b]
uids = [{bob}]
"""


@pytest.fixture
def daemon(run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    make_image(4 * MIB)
    config = run_dir / "cowshed.toml"
    config.write_text(CONFIG.format(alice=ALICE, bob=BOB))
    # A region that is opened replaces its frames: guests touch them anew.
    return start_daemon("--config", str(config), *ANY_PORT, "--open-regions", "off")


@pytest.fixture
def tenants(daemon: Daemon, start_guest: StartGuest) -> tuple[Guest, Guest]:
    """A guest of each tenant, both of the same name, that have read all of the image."""
    guests = start_guest(daemon.uri, ALICE), start_guest(daemon.uri, BOB)
    for guest in guests:
        guest.call("open", image="debian", guest="web")
        assert guest.call("compare", path=image_path(daemon), offset=0, length=4 * MIB) == 0
    return guests


def image_path(daemon: Daemon) -> str:
    return str(daemon.run_dir / "image.raw")


def mapping(guest: Guest) -> tuple[int, str]:
    """Where the image is mapped in a guest, and the inode of its frames."""
    maps = Path(f"/proc/{guest.pid}/maps").read_text()
    found = re.findall(r"^(\w+)-\w+ .* (\d+) +/memfd:cowshed-image", maps, re.MULTILINE)
    return int(found[0][0], 16), found[0][1]


def frame_numbers(guest: Guest) -> set[int]:
    """The physical frames that a guest has mapped of the image: proc_pid_pagemap(5)."""
    address, _ = mapping(guest)
    with Path(f"/proc/{guest.pid}/pagemap").open("rb") as pagemap:
        pagemap.seek(address // PAGE * 8)
        entries = struct.unpack(f"<{4 * MIB // PAGE}Q", pagemap.read(4 * MIB // PAGE * 8))
    return {entry & ((1 << 55) - 1) for entry in entries if entry >> 63}


def by_domain(things: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {each["domain"]: each for each in things if each["name"] == name}


def test_guests_share_frames_within_a_domain_and_none_beyond(
    daemon: Daemon, tenants: tuple[Guest, Guest], start_guest: StartGuest
) -> None:
    alice, bob = tenants
    carol = start_guest(daemon.uri, ALICE)  # alice's neighbour
    carol.call("open", image="debian", guest="other")
    carol.call("compare", path=image_path(daemon), offset=0, length=4 * MIB)
    assert mapping(alice)[1] == mapping(carol)[1] != mapping(bob)[1]
    frames = [frame_numbers(guest) for guest in (alice, carol, bob)]
    if frames[0] == {0}:
        pytest.skip("the kernel hides frame numbers: needs CAP_SYS_ADMIN")
    assert len(frames[0]) == 4 * MIB // PAGE
    assert frames[0] == frames[1]
    assert not frames[0] & frames[2]
    images = by_domain(daemon.status()["images"], "debian")
    assert [images[domain]["resident_bytes"] for domain in "ab"] == [4 * MIB, 4 * MIB]
    assert [images[domain]["saved_bytes"] for domain in "ab"] == [4 * MIB, 0]


def test_a_guest_is_answered_the_same_for_anothers_image_and_for_none(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    def refusal(uid: int | None, name: str) -> str:
        guest = start_guest(daemon.uri, uid)
        with pytest.raises(AssertionError) as caught:
            guest.call("open", image=name, guest="prober")
        return str(caught.value).splitlines()[0].replace(repr(name), "'NAME'")

    missing = refusal(ALICE, "nobodys")
    assert missing == "UsageError: no image 'NAME'; there is debian"
    assert refusal(ALICE, "secret") == missing
    assert refusal(ALICE, "b/secret") == missing
    assert refusal(ALICE, "b/debian") == missing
    # Who is listed nowhere is in the default domain, which has no image here.
    stranger = refusal(12345, "debian")
    assert stranger == refusal(12345, "nobodys") == "UsageError: no image 'NAME'; there is none"
    # An operator crosses domains by the full name only.
    assert "a/debian, b/debian, b/secret" in refusal(None, "debian")
    start_guest(daemon.uri).call("open", image="b/secret", guest="operator")
    assert daemon.guest_status("operator")["domain"] == "b"


def test_guests_of_one_name_in_two_domains_are_apart(
    daemon: Daemon, tenants: tuple[Guest, Guest], start_guest: StartGuest
) -> None:
    with pytest.raises(AssertionError, match="'web' is taken"):
        start_guest(daemon.uri, ALICE).call("open", image="debian", guest="web")
    run_dir = ("--run-dir", str(daemon.run_dir))
    ambiguous = cowshed("quota", "web", "1M", *run_dir)
    assert ambiguous.returncode == 1
    assert ambiguous.stderr == (
        "cowshed: guest 'web' is in several domains: name one of a/web, b/web\n"
    )
    assert cowshed("quota", "a/web", "16K", *run_dir).stdout == "a/web: quota 16K\n"
    quotas = {
        domain: guest["quota_bytes"]
        for domain, guest in by_domain(daemon.status()["guests"], "web").items()
    }
    assert quotas == {"a": 16384, "b": None}
    alice, bob = tenants
    alice.start("fill", offset=0, length=32 << 10, byte=1)
    assert bob.call("fill", offset=0, length=32 << 10, byte=2) == 32 << 10
    until(lambda: by_domain(daemon.status()["guests"], "web")["a"]["state"] == "stopped-quota")
    shown = cowshed("status", *run_dir).stdout
    assert f"cowshed quota --run-dir {daemon.run_dir} a/web 32K" in shown
    samples = scrape(daemon)
    for domain, stopped in (("a", 1), ("b", 0)):
        labels = {"domain": domain, "image": "debian"}
        assert value(samples, "guest_stopped", guest="web", **labels) == stopped
        where = {"transport": "unix", "state": "stopped-quota"}
        assert value(samples, "guests", **labels, **where) == stopped
        assert value(samples, "resident_bytes", **labels) == 4 * MIB
    cowshed("quota", "a/web", "none", *run_dir)
    assert alice.finish() == 32 << 10
    assert alice.call("read", offset=0, length=1) == "01"


def test_operators_orders_reach_one_domain_only(
    daemon: Daemon, tenants: tuple[Guest, Guest]
) -> None:
    run_dir = ("--run-dir", str(daemon.run_dir))
    refused = cowshed("evict", "debian", *run_dir)
    assert (refused.returncode, refused.stderr) == (
        1,
        "cowshed: image 'debian' is in several domains: name one of a/debian, b/debian\n",
    )
    assert cowshed("pin", "b/debian", "0", "64K", *run_dir).stdout == "b/debian: 64K pinned\n"
    assert cowshed("evict", "a/debian", *run_dir).stdout == "a/debian: 4M evicted\n"
    images = by_domain(daemon.status()["images"], "debian")
    figures = ("resident_bytes", "pinned_bytes")
    assert [images["a"][name] for name in figures] == [0, 0]
    assert [images["b"][name] for name in figures] == [4 * MIB, 64 << 10]
    assert frame_numbers(tenants[0]) == set()
    assert len(frame_numbers(tenants[1])) == 4 * MIB // PAGE
    # A name that is unique needs no domain.
    assert "secret: 4M loaded" in cowshed("warm", "secret", *run_dir).stdout
    for guest in tenants:
        assert guest.call("compare", path=image_path(daemon), offset=0, length=4 * MIB) == 0
    assert daemon.mismatches() == []


def test_an_audit_says_whose_guest_it_found(
    daemon: Daemon, tenants: tuple[Guest, Guest], start_guest: StartGuest
) -> None:
    """A guest that un-protects its own pages has copies that nobody charged."""
    cheat = start_guest(daemon.uri, BOB, script="hostile_guest.py")
    cheat.call("open", image="debian", guest="cheat")
    cheat.call("read", offset=0, length=2 * PAGE)
    assert daemon.mismatches() == []
    cheat.call("write_uncharged", length=2 * PAGE)
    found = {(each["domain"], each["image"], each["guest"]) for each in daemon.mismatches()}
    assert found == {("b", "debian", "cheat")}
    shown = cowshed("audit", "--run-dir", daemon.run_dir)
    assert shown.returncode == 3
    assert "image b/debian, guest cheat" in " ".join(shown.stdout.split())


def test_working_sets_are_kept_by_domain(
    daemon: Daemon, run_dir: Path, tenants: tuple[Guest, Guest]
) -> None:
    until(lambda: all(image["digest"] for image in daemon.status()["images"]))
    assert daemon.stop() == 0
    kept = sorted(
        str(path.relative_to(run_dir / "state")) for path in run_dir.rglob("*.workingset")
    )
    assert kept == ["a/debian.workingset", "b/debian.workingset"]


def test_logs_say_which_domains_image(daemon: Daemon) -> None:
    assert 'images="a/debian (4M), b/debian (4M), b/secret (4M)"' in daemon.log()


# The folders of images' own sockets.


@pytest.fixture
def listener(run_dir: Path) -> Iterator[Path]:
    """A socket that everybody may write to, in the folder of domain a."""
    domains = Domains({"a": DomainMembers(frozenset({ALICE}), frozenset({BOB}))})
    assert make_image_folders(run_dir, [ImageSpec("x", "/x", "a")], domains) == []
    path = run_dir / "images/a/x.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen()
        yield path


def connects(path: Path, uid: int, gid: int) -> bool:
    script = (
        "import os, socket, sys; path, uid, gid = sys.argv[1:];"
        "os.setgroups([]); os.setgid(int(gid)); os.setuid(int(uid));"
        "socket.socket(socket.AF_UNIX).connect(path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(uid), str(gid)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0 or "PermissionError" in done.stderr, done.stderr
    return done.returncode == 0


def test_the_daemon_has_the_folders_while_it_runs(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        path = daemon.run_dir / "images/a/x.sock"
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen()
        assert connects(path, ALICE, ALICE)
        assert not connects(path, BOB, BOB)
        path.unlink()
    assert daemon.stop() == 0
    assert not (daemon.run_dir / "images").exists()


def test_only_members_of_a_domain_reach_its_sockets(listener: Path, run_dir: Path) -> None:
    assert connects(listener, ALICE, 7)
    assert connects(listener, 7, BOB)
    assert not connects(listener, BOB, 7)
    assert not connects(listener, 7, 7)
    assert connects(listener, 0, 0)
    # Another configuration: who was let in before is not any more.
    nobody = Domains({"a": DomainMembers()})
    images = [ImageSpec("x", "/x", "a"), ImageSpec("y", "/y")]
    assert make_image_folders(run_dir, images, nobody) == []
    assert not connects(listener, ALICE, 7)
    assert (run_dir / "images").stat().st_mode & 0o777 == 0o755
