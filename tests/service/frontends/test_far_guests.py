# SPDX-License-Identifier: Apache-2.0
"""Guests over a network with delay and loss, whose link is cut and mended."""

import hashlib
import random
from collections.abc import Iterator

import pytest
from domains import ANSWER_SECONDS, Daemon, Guest, MakeImage, StartDaemon, StartGuest
from far_link import FarLink, can_make_links, far_link

SIZE = 4 << 20
PORT = 7419

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not can_make_links(), reason="needs root, /dev/net/tun and network namespaces"
    ),
]


@pytest.fixture
def link(rng: random.Random) -> Iterator[FarLink]:
    with far_link(delay_ms=5, loss_percent=1, rng=rng) as link:
        yield link


@pytest.fixture
def daemon(link: FarLink, start_daemon: StartDaemon, make_image: MakeImage) -> Daemon:
    return start_daemon(
        f"--image=disk={make_image(SIZE)}",
        f"--listen=tcp://{link.far_address}:{PORT}",
        "--no-keeper",
        "--verbose",
        before=link.inside(link.far),
    )


@pytest.fixture
def guest(link: FarLink, daemon: Daemon, start_guest: StartGuest) -> Guest:
    uri = f"tcp://{link.far_address}:{PORT}"
    return start_guest(uri, before=link.inside(link.near))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_bytes_are_right_over_a_slow_link_that_loses_packets(
    guest: Guest, daemon: Daemon, make_image: MakeImage, rng: random.Random
) -> None:
    model = bytearray(make_image(SIZE, "same.raw").read_bytes())
    guest.call("open", image="disk", guest="far", timeout=30)
    assert guest.call("hash", offset=0, length=SIZE) == digest(model)
    for _ in range(20):
        offset, data = rng.randrange(SIZE - 30_000), rng.randbytes(rng.randrange(1, 30_000))
        guest.call("write", offset=offset, hex=data.hex())
        model[offset : offset + len(data)] = data
        offset = rng.randrange(SIZE - 60_000)
        assert (
            guest.call("read", offset=offset, length=60_000)
            == model[offset : offset + 60_000].hex()
        )
    assert guest.call("hash", offset=0, length=SIZE) == digest(model)
    assert daemon.guest_status("far")["state"] == "running"


def test_a_call_goes_on_when_a_cut_link_is_mended(
    guest: Guest, daemon: Daemon, link: FarLink, make_image: MakeImage
) -> None:
    model = bytearray(make_image(SIZE, "same.raw").read_bytes())
    guest.call("open", image="disk", guest="far", timeout=60)
    guest.call("write", offset=10, hex=b"mine".hex())
    model[10:14] = b"mine"
    link.set_up(False)
    guest.start("hash", offset=0, length=SIZE)
    assert not guest.answered(1.0)
    link.set_up(True)
    assert guest.finish() == digest(model)


def test_a_peer_that_vanishes_is_a_clear_error_by_its_deadline(
    guest: Guest, daemon: Daemon, link: FarLink, make_image: MakeImage
) -> None:
    guest.call("open", image="disk", guest="far", timeout=ANSWER_SECONDS / 2)
    guest.call("write", offset=10, hex=b"mine".hex())
    link.set_up(False)
    guest.call("give_up_after", seconds=1.5)  # not sooner: it must not lose a peer that is slow
    with pytest.raises(AssertionError, match=r"PeerError: read .*the backend tcp://.* is gone"):
        guest.call("read", offset=0, length=4096)
    # It is back: the same guest with the same bytes, though its old connection looks alive there.
    link.set_up(True)
    guest.call("give_up_after", seconds=ANSWER_SECONDS / 2)
    assert guest.call("read", offset=10, length=4) == b"mine".hex()
