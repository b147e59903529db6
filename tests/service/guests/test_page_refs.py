# SPDX-License-Identifier: Apache-2.0
"""References to pages: resolved by map, copy or network, and forwarded to a third party."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import Daemon, new_run_dir, write_image

from cowshed.cache.errors import PeerError, SourceError, UsageError
from cowshed.transport import Disk, PageRef, Resolver, connect
from cowshed.transport.channels import channel
from cowshed.transport.channels.channel import Channel

SIZE = 20 << 20
PAGE = 4096
SECONDS = 60.0


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with new_run_dir() as run_dir:
        image = write_image(run_dir / "image.raw", SIZE)
        daemon = Daemon(run_dir, [f"--image=disk={image}", *TERMS])
        daemon.wait_ready()
        try:
            yield daemon
        finally:
            daemon.kill()


TERMS = ["--listen=tcp://127.0.0.1:0", "--no-keeper", "--capacity=8M"]


@pytest.fixture
def content(daemon: Daemon) -> bytes:
    return (daemon.run_dir / "image.raw").read_bytes()


def network_uri(daemon: Daemon) -> str:
    found = re.search(r"event=listening uri=\"?([^\"\s]+)", daemon.log())
    assert found
    return found[1]


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Callable[[Callable[[Channel], None]], Channel]]:
    """Start a program, which is a function of its channel, and give our end of it."""
    with channel.listen("tcp://127.0.0.1:0") as listener:
        threads, ours = [], []

        def start(program: Callable[[Channel], None]) -> Channel:
            def run() -> None:
                with listener.accept(SECONDS) as peer:
                    program(peer)

            threads.append(threading.Thread(target=run))
            threads[-1].start()
            ours.append(channel.connect(listener.uri))
            return ours[-1]

        yield start
        for one in ours:
            one.close()
        for thread in threads:
            thread.join()


def test_by_map_no_byte_is_copied(daemon: Daemon, content: bytes) -> None:
    with daemon.connect() as backend, backend.open("disk") as ours:
        ref = PageRef.of(ours, 3 * PAGE, 5 * PAGE)
        body = ref.to_body()
        with backend.open("disk") as theirs, Resolver({"disk": theirs}) as resolver:
            with PageRef.from_body(body).resolve(resolver) as memory:
                assert memory == content[3 * PAGE : 8 * PAGE]
                assert memory.readonly
                # The very frames: what the holder writes to its view is there.
                with theirs.view as view:
                    view[3 * PAGE] ^= 0xFF
                assert memory[0] == content[3 * PAGE] ^ 0xFF
            with PageRef.of(ours, 0, 10, "c").resolve(resolver) as memory:
                memory[0] ^= 1  # our own copy
                assert theirs.read(0, 10) == content[:10]
            assert resolver.ways == {"map": 2, "copy": 0, "network": 0}


def test_by_network_from_the_origin_that_it_names(daemon: Daemon, content: bytes) -> None:
    uri = network_uri(daemon)
    with connect(uri) as backend, backend.open("disk") as ours:
        ours.write(0, b"private")  # and no part of what is referred to
        ref = PageRef.of(ours, 0, 2 * PAGE)
    with Resolver(origins=[uri]) as resolver, ref.resolve(resolver) as memory:
        assert memory == content[: 2 * PAGE]
        assert resolver.ways["network"] == 1
    with Resolver() as nobody, pytest.raises(UsageError, match="may not connect to tcp://"):
        ref.resolve(nobody)


def test_by_copy_and_forwarded_to_a_third_party(
    daemon: Daemon, content: bytes, talk: Callable[[Callable[[Channel], None]], Channel]
) -> None:
    """A has the image mapped and sends a reference to B, who forwards it to C, who resolves it."""
    found: list[bytes] = []

    def third(peer: Channel) -> None:
        asked = peer.recv(SECONDS)
        with Resolver(copies_from=peer) as resolver:
            with PageRef.from_body(asked.body["what"]["pages"]).resolve(resolver) as memory:
                found.append(bytes(memory))
            assert resolver.ways == {"map": 0, "copy": 1, "network": 0}
        asked.reply({"done": True})

    def second(peer: Channel) -> None:
        asked = peer.recv(SECONDS)
        forwarded = onward.send("look", what=asked.body["what"])
        with Resolver(copies_from=peer) as resolver:
            while not forwarded.done:
                # C asks B for the bytes, and B, who has none, asks A.
                try:
                    request = onward.recv(SECONDS)
                except PeerError:
                    break
                resolver.answer(request)
                if request.body["ref"]["offset"] >= 8 << 20:
                    break
        asked.reply(forwarded.result(SECONDS))

    onward = talk(third)
    with daemon.connect() as backend, backend.open("disk") as ours:
        peer = talk(second)
        length = (8 << 20) + 5 * PAGE  # more than one message's worth
        pending = peer.send("look", what={"pages": PageRef.of(ours, PAGE, length).to_body()})
        with Resolver({"disk": ours}) as resolver:
            for _ in range(2):
                resolver.answer(peer.recv(SECONDS))
            assert pending.result(SECONDS)["done"]
            assert resolver.ways["map"] == 2
    assert found == [content[PAGE : PAGE + length]]


def test_a_reference_to_an_image_that_was_replaced_is_refused(tmp_path: Path) -> None:
    with new_run_dir() as run_dir:
        image = write_image(run_dir / "image.raw", PAGE)
        refs = []
        for _ in range(2):
            daemon = Daemon(run_dir, [f"--image=disk={image}", "--no-keeper"])
            daemon.wait_ready()
            with daemon.connect() as backend, backend.open("disk") as disk:
                assert isinstance(disk, Disk)
                refs.append(PageRef.of(disk, 0, PAGE))
                old = refs[0]
                if len(refs) == 2:
                    with Resolver({"disk": disk}, origins=[daemon.uri]) as resolver:
                        with pytest.raises(SourceError, match="was replaced"):
                            old.resolve(resolver)
                        refs[1].resolve(resolver).release()
            daemon.stop()
            other = write_image(run_dir / "other.raw", PAGE)
            os.replace(other, image)
        assert refs[0].generation != refs[1].generation


def test_generations_stay_through_a_restart() -> None:
    with new_run_dir() as run_dir:
        image = write_image(run_dir / "image.raw", PAGE)
        seen = set()
        for _ in range(2):
            daemon = Daemon(run_dir, [f"--image=disk={image}", "--no-keeper"])
            daemon.wait_ready()
            with daemon.connect() as backend, backend.open("disk") as disk:
                seen.add(disk.generation)
            daemon.stop()
        assert len(seen) == 1


GOOD = {
    "image": "disk",
    "generation": "0",
    "offset": 0,
    "length": 1,
    "mode": "r",
    "origin": "tcp://h:1",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"image": 7},
        {"offset": -1},
        {"offset": "0"},
        {"length": 1 << 60},
        {"mode": "w"},
        {"origin": "x" * 2000},
        {"generation": None},
    ],
)
def test_what_is_no_reference_is_the_peers_error(changes: dict[str, object]) -> None:
    assert PageRef.from_body(GOOD).to_body() == GOOD
    with pytest.raises(PeerError):
        PageRef.from_body({**GOOD, **changes})
    with pytest.raises(PeerError):
        PageRef.from_body([1])


def test_a_reference_past_the_end_reaches_nothing(daemon: Daemon) -> None:
    with daemon.connect() as backend, backend.open("disk") as disk:
        with pytest.raises(UsageError, match="outside"):
            PageRef.of(disk, SIZE, 1)
        body = {**PageRef.of(disk, 0, 1).to_body(), "offset": SIZE - 1, "length": 2}
        with Resolver({"disk": disk}) as resolver, pytest.raises(UsageError, match="outside"):
            PageRef.from_body(body).resolve(resolver)
