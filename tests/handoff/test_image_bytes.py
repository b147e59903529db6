# SPDX-License-Identifier: Apache-2.0
"""Images whose bytes go along, to a target that has no source of its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import in_thread, is_stopped, kill_backend, listens, new_run_dir, until
from two_hosts import SIZE, Host, Model

from cowshed.transport import connect
from cowshed.transport.handoff.sections import ImageBytes, ImageWhole, StateReader

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


class BareHost(Host):
    """A backend that serves no image of its own."""

    def serves(self) -> list[str]:
        return []


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """An image with holes, zeros, and an end within a page."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.write(os.urandom(SIZE // 4))
        file.seek(SIZE // 2)
        file.write(bytes(200_000) + os.urandom(70_000))
        file.seek(SIZE - 1234)
        file.write(b"the end")
        file.truncate(SIZE - 99)
    return path


@pytest.fixture
def bare(sparse: Path, tmp_path: Path) -> Iterator[Pair]:
    """A backend with an image and one with nothing but a place for images."""
    with new_run_dir() as one, new_run_dir() as two:
        a, b = Host("a", one, sparse), BareHost("b", two, sparse)
        try:
            a.start()
            b.start("--image-dir", str(tmp_path / "arrived"), kept=True)
            yield a, b
        finally:
            for host in (a, b):
                host.end()


def _sha(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _files(folder: Path) -> set[str]:
    found = os.walk(folder)  # which rglob is not: a folder may go meanwhile
    return {
        str(Path(where, name).relative_to(folder)) for where, _, names in found for name in names
    }


def _image(host: Host) -> dict[str, object]:
    (image,) = host.the_daemon.status()["images"]
    return dict(image)


def test_a_drain_takes_images_along_and_they_are_served_from_then_on(
    bare: Pair, sparse: Path, tmp_path: Path
) -> None:
    a, b = bare
    arrived = tmp_path / "arrived"
    model = Model(sparse, 1)
    with a.open("g") as disk:
        model.write(disk)
    said = a.run("drain", "--dry-run", "--with-images", "--to", b.unix)
    assert "the bytes of image d would be sent" in said.stdout
    until(lambda: _files(arrived) == set())
    report = a.drain("--with-images", "--to", b.unix)
    assert report["images"] == ["d"]
    assert SIZE // 4 <= report["image_bytes"] < SIZE // 2
    assert _image(b)["digest"] == _sha(sparse)
    assert _files(arrived) == {"default/d.raw", "default/d.json"}
    came = arrived / "default/d.raw"
    assert came.read_bytes() == sparse.read_bytes()
    assert came.stat().st_blocks <= sparse.stat().st_blocks
    for is_successor in (False, True):
        if is_successor:
            kill_backend(b.the_daemon)
        with b.open("g") as disk:
            model.check(disk)
            model.write(disk)
        with connect(b.unix) as backend, backend.open("d", guest="mapped") as disk:
            assert disk.mapped
            assert disk.read(0, SIZE - 99) == sparse.read_bytes()
        until(lambda: listens(b.run_dir / "images" / "d.sock"))
        assert b.the_daemon.mismatches() == []
    # And from the folder alone.
    b.the_daemon.stop()
    b.start(kept=False)
    assert _image(b)["digest"] == _sha(sparse)
    with b.open("new") as disk:
        assert disk.read(0, 5000) == sparse.read_bytes()[:5000]


def test_who_lacks_which_option_is_said(bare: Pair, tmp_path: Path) -> None:
    a, b = bare
    with a.open("g") as disk:
        disk.write(0, b"x")
    done = a.run("drain", "--to", b.unix)
    assert done.returncode == 1
    assert f"--image d={a.image}, or give --with-images" in done.stderr
    assert done.stderr.count("\n") == 1
    file = tmp_path / "state"
    assert a.run("export", str(file)).returncode == 0
    assert "give --with-images" in b.run("import", str(file)).stderr
    b.the_daemon.stop()
    b.image = tmp_path / "other.raw"
    b.image.write_bytes(b"other" * 100_000)
    b.serves = lambda: ["--image", f"d={b.image}"]  # type: ignore[method-assign]
    b.start("--accept-handoff")
    for arguments, words in (
        (("--with-images",), "in place of another"),
        ((), "in place of another"),
    ):
        assert words in a.run("drain", *arguments, "--to", b.unix).stderr
    b.the_daemon.stop()
    b.serves = lambda: ["--image", f"other={b.image}"]  # type: ignore[method-assign]
    b.start()
    assert "or with --image-dir DIR" in a.run("drain", "--with-images", "--to", b.unix).stderr
    said = a.run("drain", "--to", b.unix).stderr
    assert "or with --image-dir DIR to keep the bytes that are sent, and give --with-im" in said
    b.the_daemon.stop()
    b.start("--image-dir", str(tmp_path / "arrived"))
    in_the_way = tmp_path / "arrived" / "default" / "d.raw"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_bytes(b"mine")
    assert "in the way" in a.run("drain", "--with-images", "--to", b.unix).stderr
    assert in_the_way.read_bytes() == b"mine"
    assert a.guests() == {"g"}


def test_a_file_with_images_stands_alone(bare: Pair, sparse: Path, tmp_path: Path) -> None:
    a, b = bare
    model = Model(sparse, 2)
    with a.open("g") as disk:
        model.write(disk)
    file = tmp_path / "state"
    done = a.run("export", "--with-images", str(file))
    assert "of images" in done.stdout, done.stderr
    raw = file.read_bytes()
    sections = list(StateReader().feed(raw))
    came = [section for section in sections if isinstance(section, ImageBytes)]
    assert sum(len(section.content) for section in came) < SIZE // 2  # no zeros
    # Damaged, it leaves nothing.
    arrived = tmp_path / "arrived"
    whole = next(no for no, each in enumerate(sections) if isinstance(each, ImageWhole))
    assert whole
    file.write_bytes(raw[:-1000])
    done = b.run("import", str(file))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "at byte" in done.stderr
    assert _files(arrived) == set()
    assert b.the_daemon.status()["images"] == []
    file.write_bytes(raw)
    a.the_daemon.stop()
    sparse.rename(tmp_path / "gone")
    done = b.run("import", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    with b.open("g") as disk:
        model.check(disk)
    # A second time the image is there.
    b.run("discard", "d@g")
    assert _files(arrived) == {"default/d.raw", "default/d.json"}


PHASES = ["target-ready", "target-owner", "source-commit"]


@pytest.mark.parametrize("phase", PHASES)
def test_an_image_comes_with_its_guests_or_not_at_all_wherever_one_end_is_killed(
    hosts: Pair, image: Path, phase: str, tmp_path: Path
) -> None:
    a, b = hosts
    b.serves = list  # type: ignore[method-assign]
    stop = ("env", f"COWSHED_TEST_STOP_AT={phase}")
    is_source = phase.startswith("source")
    arrived = tmp_path / "arrived"
    b_options = (f"--overlay-dir={tmp_path / 'b'}", f"--image-dir={arrived}")
    a.start(f"--overlay-dir={tmp_path / 'a'}", before=stop if is_source else ())
    b.start(*b_options, before=() if is_source else stop)
    model = Model(image, PHASES.index(phase))
    with a.open("g") as disk:
        model.write(disk)
        disk.flush()
    drain = in_thread(lambda: a.run("drain", "--with-images", "--to", b.unix))
    killed = a if is_source else b
    until(lambda: is_stopped(killed.the_daemon.pid))
    killed.kill()
    killed.start()
    drain.join()
    until(lambda: _owners(a, b) == 1)
    owner = b if "g" in b.guests() else a
    with owner.open("g") as disk:
        model.check(disk)
    if owner is a:
        until(lambda: os.listdir(arrived) == [])
        assert b.the_daemon.status()["images"] == []
        a.wait_movable("--with-images", "--to", b.unix)
        a.drain("--with-images", "--to", b.unix)
    with b.open("g") as disk:
        model.check(disk)
    assert _files(arrived) == {"default/d.raw", "default/d.json"}


def _owners(a: Host, b: Host) -> int:
    return sum("g" in host.guests() and not _is_drained(host) for host in (a, b))


def _is_drained(host: Host) -> bool:
    drain = host.the_daemon.request("drain-state")["drain"]
    return drain is not None and drain["phase"] in ("commit", "moved")


def test_a_source_that_changed_cannot_be_given_away(bare: Pair, sparse: Path) -> None:
    a, b = bare
    with a.open("g") as disk:
        disk.write(0, b"x")
    with sparse.open("r+b") as file:
        file.write(b"changed")
    done = a.run("drain", "--with-images", "--to", b.unix)
    assert done.returncode == 1
    assert "changed while it was served" in done.stderr
    assert b.the_daemon.status()["images"] == []
    assert a.guests() == {"g"}


def test_a_full_disk_at_the_target_is_said_and_nothing_is_left(
    hosts: Pair, small_disk: Path
) -> None:
    a, b = hosts
    b.serves = list  # type: ignore[method-assign]
    a.start()
    b.start(f"--image-dir={small_disk}")
    with a.open("g") as disk:
        disk.write(0, b"x")
    for to in (b.unix, b.tcp):
        done = a.run("drain", "--with-images", "--to", to)
        assert done.returncode == 1
        assert "No space left on device; make room there" in done.stderr
        until(lambda: os.listdir(small_disk) == [])  # the folder in it goes last
    assert b.the_daemon.status()["images"] == []
    with a.open("g") as disk:
        assert disk.read(0, 1) == b"x"
        disk.write(0, b"y")
