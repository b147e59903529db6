# SPDX-License-Identifier: Apache-2.0
"""What a guest can rely on, the same by every transport: the tests do not know which one it is."""

import contextlib
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from certificates import Authority
from domains import ANSWER_SECONDS, Daemon, new_run_dir, until, write_image
from places import SCHEMES, take_port

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport import ByteDisk, Disk, connect

SIZE = (8 << 20) + 5000
PAGE = 4096
AnyDisk = Disk | ByteDisk
Open = Callable[..., AnyDisk]


class Site:
    """A backend and how guests reach it by one transport."""

    def __init__(
        self, scheme: str, run_dir: Path, image: Path, authority: Authority | None
    ) -> None:
        self.scheme = scheme
        self.run_dir = run_dir
        self.content = image.read_bytes()
        self.images = [f"--image=disk={image}", f"--image=other={image}"]
        self._client = ""
        self.listen: list[str] = []
        with take_port() as taken:  # where it must be able to listen a second time
            port = taken.getsockname()[1]
        if scheme == "tcp":
            self.listen = [f"--listen=tcp://127.0.0.1:{port}"]
        if authority is not None:
            server = authority.issue("server", "IP:127.0.0.1")
            self.listen = [f"--listen=tls://127.0.0.1:{port}?{urlencode(server)}"]
            self._client = f"?{urlencode(authority.issue('alice', 'DNS:alice.example'))}"
        if scheme == "vsock":
            self.listen = ["--listen=vsock://any:6012345"]
        self.daemon = self.start()

    def start(self) -> Daemon:
        """Start the backend, each time at the same port."""
        self.daemon = Daemon(
            self.run_dir, [*self.images, *self.listen, "--capacity=4M", "--no-keeper", "--verbose"]
        )
        self.daemon.wait_ready()
        if self.scheme == "unix":
            self.uri = self.daemon.uri
            return self.daemon
        (where,) = [line for line in self.daemon.log().splitlines() if "event=listening " in line]
        listening = where.partition("uri=")[2].split()[0].strip('"')
        self.uri = listening.replace("any", "1") + self._client
        return self.daemon

    @contextlib.contextmanager
    def open(self, image: str = "disk", **terms: object) -> Iterator[AnyDisk]:
        with connect(self.uri) as backend:
            disk = backend.open(image, **terms)  # type: ignore[arg-type]
        with disk:
            yield disk

    def wait_left(self, guest: str) -> None:
        """Wait until the backend knows that a guest has gone: a network is slower than a test."""
        until(lambda: all(one["name"] != guest for one in self.daemon.status()["guests"]))


@pytest.fixture(scope="module", params=SCHEMES)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with new_run_dir() as run_dir, tempfile.TemporaryDirectory() as folder:
        image = write_image(run_dir / "image.raw", SIZE)
        authority = Authority(Path(folder)) if request.param == "tls" else None
        site = Site(request.param, run_dir, image, authority)
        try:
            yield site
        finally:
            site.daemon.kill()


def test_an_image_is_read_by_pages_in_part_and_as_a_whole(site: Site) -> None:
    with site.open() as disk:
        assert disk.size_bytes == SIZE
        assert disk.mapped == (site.scheme == "unix")
        assert disk.alive
        for offset, length in ((0, 1), (PAGE - 1, 2), (SIZE - 1, 1), (12345, 67890), (7, 0)):
            assert disk.read(offset, length) == site.content[offset : offset + length]
        assert disk.read(0, SIZE) == site.content
        if disk.mapped:
            with disk.view as view:
                assert view[:PAGE] == site.content[:PAGE]
        else:
            with pytest.raises(UsageError, match=f"no view: over {site.scheme}://"):
                _ = disk.view


def test_random_reads_writes_and_discards_are_as_in_a_model(site: Site, rng: random.Random) -> None:
    model = bytearray(site.content)
    with site.open() as disk:
        for _ in range(250):
            offset = rng.randrange(SIZE)
            length = min(SIZE - offset, int(4 ** rng.uniform(0, 9)))
            kind = rng.random()
            if kind < 0.5:
                assert disk.read(offset, length) == model[offset : offset + length]
            elif kind < 0.85:
                data = rng.randbytes(length)
                assert disk.write(offset, data) == length
                model[offset : offset + length] = data
            else:
                start = offset // PAGE * PAGE
                end = min(SIZE, start + (length + PAGE - 1) // PAGE * PAGE)
                disk.discard(start, end - start)
                model[start:end] = site.content[start:end]
        disk.flush()
        assert disk.read(0, SIZE) == model


def test_what_a_guest_writes_nobody_else_sees(site: Site) -> None:
    with site.open(guest="a") as one, site.open(guest="b") as two, site.open("other") as third:
        one.write(100, b"one")
        two.write(101, b"two")
        assert one.read(100, 4) == b"one" + site.content[103:104]
        assert two.read(100, 4) == site.content[100:101] + b"two"
        assert third.read(100, 4) == site.content[100:104]
        assert site.daemon.guest_status("a")["private_bytes"] == PAGE
        assert site.daemon.guest_status("a")["transport"] == site.scheme
    site.wait_left("a")
    with site.open(guest="a") as again:
        assert again.read(100, 4) == site.content[100:104]


def test_names_are_one_guests_at_a_time(site: Site) -> None:
    with site.open(guest="twin"):
        with pytest.raises(UsageError, match="'twin' is taken"), site.open(guest="twin"):
            pass
        # Names are of all transports together.
        with connect(site.daemon.uri) as local, pytest.raises(UsageError, match="taken"):
            local.open("disk", guest="twin")
    site.wait_left("twin")
    with site.open(guest="twin"):
        pass


def test_an_image_that_is_not_there_is_refused_with_those_that_are(site: Site) -> None:
    what = "no image 'none'; there is disk, other"
    with pytest.raises(UsageError, match=what), site.open("none"):
        pass


def test_ranges_are_bounded(site: Site) -> None:
    with site.open() as disk:
        calls: list[Callable[[], object]] = [
            lambda: disk.read(SIZE, 1),
            lambda: disk.read(-1, 2),
            lambda: disk.write(SIZE - 1, b"ab"),
            lambda: disk.discard(0, SIZE + PAGE),
        ]
        for call in calls:
            with pytest.raises(UsageError, match=r"outside image 'disk'; stay within"):
                call()
        with pytest.raises(UsageError, match="whole 4096-byte pages"):
            disk.discard(1, PAGE)


def test_a_quota_holds_and_a_raised_one_lets_writes_go_on(site: Site) -> None:
    with site.open(guest="q", quota_bytes=4 * PAGE) as disk:
        for page in range(4):
            disk.write(page * PAGE, b"x")
        done = threading.Event()
        failed: list[OSError] = []

        def write() -> None:
            # Mapped, the writer stops; by bytes, it is told that there is no space.
            while True:
                try:
                    disk.write(4 * PAGE, b"x")
                except OSError as error:
                    failed.append(error)
                    if len(failed) == 1:
                        refused.set()
                    if not done.wait(0.01):
                        continue
                done.set()
                return

        refused = threading.Event()
        thread = threading.Thread(target=write)
        thread.start()
        if disk.mapped:
            until(lambda: site.daemon.guest_status("q")["state"] == "stopped-quota")
        else:
            assert refused.wait(ANSWER_SECONDS)
            assert failed[0].errno == 28
        assert site.daemon.guest_status("q")["private_bytes"] == 4 * PAGE
        site.daemon.request("quota", guest="q", quota_bytes=8 * PAGE)
        assert done.wait(ANSWER_SECONDS)
        thread.join()
        assert disk.read(4 * PAGE, 1) == b"x"


def test_evictions_meanwhile_change_nothing(site: Site, rng: random.Random) -> None:
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            site.daemon.request("evict", image="disk")

    with site.open() as disk:
        disk.write(5 * PAGE, b"mine" * 1000)
        model = bytearray(site.content)
        model[5 * PAGE : 5 * PAGE + 4000] = b"mine" * 1000
        thread = threading.Thread(target=evict)
        thread.start()
        try:
            for _ in range(60):
                offset = rng.randrange(SIZE - 300_000)
                length = rng.randrange(300_000)
                assert disk.read(offset, length) == model[offset : offset + length]
            assert disk.read(0, SIZE) == model
        finally:
            stop.set()
            thread.join()
    assert site.daemon.mismatches() == []


def test_several_disks_and_threads_go_on_side_by_side(site: Site) -> None:
    wrong: list[BaseException] = []

    def work(name: str) -> None:
        mine = random.Random(name)
        model = bytearray(site.content)
        try:
            with site.open(guest=name) as disk:
                for _ in range(40):
                    offset = mine.randrange(SIZE - 20_000)
                    data = mine.randbytes(mine.randrange(1, 20_000))
                    disk.write(offset, data)
                    model[offset : offset + len(data)] = data
                    offset = mine.randrange(SIZE - 50_000)
                    assert disk.read(offset, 50_000) == model[offset : offset + 50_000]
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=[f"g{no}"]) for no in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    until(lambda: site.daemon.status()["guests"] == [])


def test_a_backend_that_is_killed_never_shows_a_wrong_byte(site: Site) -> None:
    """Last, since the backend is another afterwards."""
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(site.open(guest="reader"))
        writer = stack.enter_context(site.open(guest="writer"))
        assert reader.read(0, PAGE) == site.content[:PAGE]
        writer.write(0, b"mine")
        site.daemon.kill()
        until(lambda: not reader.alive)
        if reader.mapped:
            assert reader.read(0, PAGE) == site.content[:PAGE]  # what is mapped stays
            assert writer.read(0, 4) == b"mine"
            site.start()
            return
        site.start()
        # A reader has lost nothing; a writer has, and is told so for ever.
        assert reader.read(PAGE, PAGE) == site.content[PAGE : 2 * PAGE]
        for _ in range(2):
            with pytest.raises(PeerError, match="has lost what guest 'writer' wrote"):
                writer.read(0, 4)
