# SPDX-License-Identifier: Apache-2.0
"""Several connections that are one guest, parts of images, names, and who may not have them."""

import os
from pathlib import Path
from typing import Any

import pytest
from domains import NOBODY, Daemon, MakeImage, StartDaemon, StartGuest, until
from siege import MIB, still_serves

from cowshed.cache import CowshedError
from cowshed.transport.channels.exchange import ask, ask_for_fds, close_all, greet

pytestmark = pytest.mark.slow

PAGE = 4096
SIZE = 8 * MIB


@pytest.fixture
def daemon(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    image = make_image(SIZE)
    return start_daemon("--image", f"d={image}", "--image", f"e={image}", "--capacity", "64M")


def opening(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    """Open and go: the reply."""
    with greet(daemon.uri) as connection:
        reply, fds = ask_for_fds(connection, "open", {"image": "d", "guest": "g", **fields})
        close_all(fds)
        return dict(reply)


def test_a_killed_process_frees_its_grants_and_its_siblings_keep_theirs(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    terms = {"image": "d", "guest": "g", "token": "secret", "quota_bytes": 2 * MIB}
    doomed, stays = start_guest(daemon.uri), start_guest(daemon.uri)
    doomed.call("open", **terms)
    stays.call("open", **terms)
    doomed.call("fill", offset=0, length=MIB, byte=1)
    stays.call("fill", offset=2 * MIB, length=MIB, byte=2)
    status = daemon.guest_status("g")
    assert (status["mappings"], status["private_bytes"]) == (2, 2 * MIB)
    stays.start("fill", offset=4 * MIB, length=MIB, byte=3)
    until(lambda: daemon.guest_status("g")["state"] == "stopped-quota")
    doomed.kill()
    until(lambda: daemon.guest_status("g")["mappings"] == 1)
    stays.finish()
    status = daemon.guest_status("g")
    assert (status["state"], status["private_bytes"]) == ("running", 2 * MIB)
    assert daemon.mismatches() == []
    stays.call("close")
    until(lambda: daemon.status()["guests"] == [])
    assert daemon.status()["images"][0]["refs"] == 0


def test_a_quota_is_the_guests_whichever_mapping_waits_for_it(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    terms = {"image": "d", "guest": "g", "token": "secret", "quota_bytes": MIB}
    one, two = start_guest(daemon.uri), start_guest(daemon.uri)
    one.call("open", **terms)
    two.call("open", **terms)
    one.call("fill", offset=0, length=MIB, byte=1)
    two.start("fill", offset=0, length=MIB, byte=2)
    until(lambda: daemon.guest_status("g")["state"] == "stopped-quota")
    daemon.request("quota", guest="g", quota_bytes=2 * MIB)
    two.finish()
    assert daemon.guest_status("g")["quota_bytes"] == 2 * MIB
    assert daemon.mismatches() == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"token": "other"},
        {"token": "secre"},
        {"token": "secret", "image": "e"},
        {"token": "s\u00e9cret"},
    ],
    ids=str,
)
def test_who_does_not_know_the_token_is_refused_the_name(
    daemon: Daemon, start_guest: StartGuest, fields: dict[str, Any]
) -> None:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g", token="secret")
    with pytest.raises(CowshedError, match="guest name 'g' is taken"):
        opening(daemon, **fields)
    assert daemon.guest_status("g")["mappings"] == 1


def test_a_guest_without_a_token_is_joined_by_nobody(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    start_guest(daemon.uri).call("open", image="d", guest="g")
    with pytest.raises(CowshedError, match="taken"):
        opening(daemon, token="secret")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users")
def test_another_user_is_refused_with_the_token_too_and_not_told_whose_it_is(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    start_guest(daemon.uri, NOBODY).call("open", image="d", guest="g", token="secret")
    with pytest.raises(CowshedError, match=f"taken by uid {NOBODY}, process"):
        opening(daemon, token="secret")
    stranger = start_guest(daemon.uri, NOBODY + 1 if NOBODY < 65534 else 1234)
    with pytest.raises(AssertionError, match="is taken; choose another"):
        stranger.call("open", image="d", guest="g", token="secret")


def test_a_guest_that_gives_no_name_has_one_that_nobody_foresees(daemon: Daemon) -> None:
    names = {opening(daemon, guest=None)["guest"] for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith(f"pid-{os.getpid()}-") for name in names)


@pytest.mark.parametrize(
    "fields",
    [
        {"offset_bytes": 1},
        {"length_bytes": 1},
        {"length_bytes": 0},
        {"offset_bytes": SIZE},
        {"offset_bytes": SIZE, "length_bytes": PAGE},
        {"offset_bytes": PAGE, "length_bytes": SIZE},
        {"offset_bytes": (1 << 63) - PAGE, "length_bytes": (1 << 63) - PAGE},
        {"offset_bytes": -PAGE},
        {"offset_bytes": 1 << 63},
        {"offset_bytes": "0"},
        {"length_bytes": 4096.0},
        {"token": ""},
        {"token": "x" * 65},
        {"token": 7},
    ],
    ids=str,
)
def test_parts_and_tokens_that_make_no_sense_are_refused(
    daemon: Daemon, start_guest: StartGuest, fields: dict[str, Any]
) -> None:
    with pytest.raises(CowshedError, match=r"of 'd'; give whole pages|needed: "):
        opening(daemon, **fields)
    assert still_serves(daemon, start_guest)


def test_an_image_is_described_with_its_source_to_be_read_only(daemon: Daemon) -> None:
    with greet(daemon.uri) as connection:
        for _ in range(2):  # and the conversation goes on
            reply, fds = ask_for_fds(connection, "describe", {"image": "d"})
            path = Path(daemon.run_dir / "image.raw")
            status = path.stat()
            assert (reply["source_device"], reply["source_inode"]) == (status.st_dev, status.st_ino)
            assert (reply["size_bytes"], reply["map_bytes"]) == (SIZE, SIZE)
            (fd,) = fds
            assert os.pread(fd, 16, 0) == path.read_bytes()[:16]
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            close_all(fds)
        with pytest.raises(CowshedError, match="no image 'nope'"):
            ask(connection, "describe", {"image": "nope"})
