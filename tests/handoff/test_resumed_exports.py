# SPDX-License-Identifier: Apache-2.0
"""Exports that broke off and are gone on with, and exports that cannot end."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from domains import StartGuest, command, until
from two_hosts import PAGE, SIZE, Host, Model

from cowshed.cache import UsageError
from cowshed.transport.handoff.sections import ImageBytes, Pages, StateReader, Totals

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


def _sections(path: Path) -> list[object]:
    return list(StateReader().feed(path.read_bytes()))


def _cut(file: Path, part: Path, at: int) -> None:
    """Make of a whole export one that broke off."""
    part.write_bytes(file.read_bytes()[:at])
    file.unlink()


def _pages_sent(path: Path, after: int) -> int:
    """How many private pages stand behind a byte."""
    reader, nr = StateReader(), 0
    for section in reader.feed(path.read_bytes()):
        if isinstance(section, Pages) and reader.mark().offset >= after:
            nr += sum(pages for _, pages in section.runs)
    return nr


def _ends(path: Path) -> list[tuple[int, object]]:
    """Each section's begin, and it."""
    reader = StateReader()
    return [(reader.mark().offset, section) for section in reader.feed(path.read_bytes())]


def test_an_export_goes_on_with_what_is_good_and_sends_only_what_differs(
    pair: Pair, image: Path, tmp_path: Path
) -> None:
    a, b = pair
    models = {name: Model(image, seed) for seed, name in enumerate(("one", "two"))}
    for name, model in models.items():
        with a.open(name) as disk:
            model.write(disk, 60)
    file, part = tmp_path / "state", tmp_path / "state.part"
    assert a.run("export", str(file)).returncode == 0
    totals = next(at for at, each in _ends(file) if isinstance(each, Totals))
    whole = file.read_bytes()
    for cut in (totals + 5, len(whole) - 30, totals - 100):
        part.write_bytes(whole[:cut])
        file.unlink(missing_ok=True)
        # What is written, discarded and written back meanwhile.
        model = models["one"]
        with a.open("one") as disk:
            model.write(disk, 1)
            model.discard(disk, 3, image)
            disk.write(5 * PAGE, b"news")
            model.bytes[5 * PAGE : 5 * PAGE + 4] = b"news"
        done = a.run("export", "--resume", str(file))
        assert done.returncode == 0, done.stderr
        assert "of it from before" in done.stdout
        assert not part.exists()
        if cut >= totals:
            assert file.read_bytes()[:totals] == whole[:totals]
            sent = _pages_sent(file, totals)
            assert sent < 60, "pages that were in the file as they are were sent again"
    assert b.run("import", str(file)).returncode == 0
    for name, model in models.items():
        with b.open(name) as disk:
            model.check(disk)
    assert b.the_daemon.mismatches() == []


def test_damage_within_a_part_is_where_it_goes_on(pair: Pair, image: Path, tmp_path: Path) -> None:
    a, b = pair
    model = Model(image, 3)
    with a.open("g") as disk:
        model.write(disk, 100)
    file, part = tmp_path / "state", tmp_path / "state.part"
    assert a.run("export", str(file)).returncode == 0
    at = next(at for at, each in _ends(file) if isinstance(each, Pages))
    raw = bytearray(file.read_bytes())
    raw[at + 30] ^= 1
    part.write_bytes(raw)
    file.unlink()
    assert a.run("export", "--resume", str(file)).returncode == 0
    assert b.run("import", str(file)).returncode == 0
    with b.open("g") as disk:
        model.check(disk)


def test_a_mapped_guest_without_a_token_is_gone_on_with(
    pair: Pair, start_guest: StartGuest, tmp_path: Path
) -> None:
    a, b = pair
    guest = start_guest(a.unix)
    guest.call("open", image="d", guest="g")
    guest.call("fill", offset=0, length=40 * PAGE, byte=7)
    file, part = tmp_path / "state", tmp_path / "state.part"
    assert a.run("export", str(file)).returncode == 0
    totals = next(at for at, each in _ends(file) if isinstance(each, Totals))
    _cut(file, part, totals)
    guest.call("fill", offset=0, length=PAGE, byte=8)
    assert a.run("export", "--resume", str(file)).returncode == 0
    assert _pages_sent(file, totals) == 1
    assert b.run("import", str(file)).returncode == 0
    assert b.the_daemon.guest_status("g")["private_bytes"] == 40 * PAGE


def test_images_bytes_that_came_are_not_sent_again(pair: Pair, tmp_path: Path) -> None:
    a, _ = pair
    file, part = tmp_path / "state", tmp_path / "state.part"
    assert a.run("export", "--with-images", str(file)).returncode == 0
    came = [(at, each) for at, each in _ends(file) if isinstance(each, ImageBytes)]
    assert len(came) >= 2
    whole = len(file.read_bytes())
    _cut(file, part, came[1][0] + 77)
    assert a.run("export", "--resume", str(file)).returncode == 0
    pages = [page for _, each in _ends(file) for page in _pages_of(each)]
    assert SIZE // PAGE - 8 <= len(pages) == len(set(pages)), "but for pages of zeros"
    assert abs(len(file.read_bytes()) - whole) < 1 << 16


def _pages_of(section: object) -> list[int]:
    if not isinstance(section, ImageBytes):
        return []
    return [page for first, nr in section.runs for page in range(first, first + nr)]


def test_what_cannot_be_gone_on_with_is_refused_and_left_as_it_is(
    pair: Pair, image: Path, tmp_path: Path
) -> None:
    a, _ = pair
    for name in ("one", "two"):
        with a.open(name) as disk:
            Model(image, 1).write(disk)
    file, part = tmp_path / "state", tmp_path / "state.part"

    def resumed(words: str) -> None:
        before = part.read_bytes()
        with (
            part.open("r+b") as opened,
            a.the_daemon.connect() as backend,
            pytest.raises(UsageError, match=words) as caught,
        ):
            list(backend.stream("export", fds=[opened.fileno()], resume=True))
        assert "\n" not in str(caught.value)
        assert part.read_bytes() == before

    assert "no interrupted export to" in a.run("export", "--resume", str(file)).stderr
    assert a.run("export", str(file)).returncode == 0
    whole = file.read_bytes()
    part.write_bytes(whole)
    resumed("complete")
    part.write_bytes(b"something else altogether")
    resumed("not an interrupted export")
    part.write_bytes(whole[:-500])
    a.the_daemon.request("quota", guest="one", quota_bytes=1 << 20)
    resumed("guest 'one' has another quota")
    a.the_daemon.request("quota", guest="one", quota_bytes=None)
    with a.open("three"):
        resumed("guest 'three' attached")
    until(lambda: a.the_daemon.guest_status("three")["state"] == "away")
    a.the_daemon.request("discard", overlay="d@three")
    a.the_daemon.request("discard", overlay="d@two")
    resumed("guest 'two' is gone")
    # So little that nothing is lost: it begins anew.
    part.write_bytes(whole[:40])
    assert a.run("export", "--resume", str(file)).returncode == 0
    assert "--resume continues" in a.run("export", "--resume", "-").stderr


def test_a_full_disk_ends_an_export_and_more_room_lets_it_go_on(
    pair: Pair, image: Path, small_disk: Path, tmp_path: Path
) -> None:
    a, b = pair
    model = Model(image, 4)
    with a.open("g") as disk:
        model.write(disk, 300)
    file = small_disk / "state"
    done = a.run("export", str(file))
    assert done.returncode == 1
    assert "No space left on device; make room" in done.stderr
    assert f"'cowshed export --resume {file}' continues state.part" in done.stderr
    assert done.stderr.count("\n") == 1
    with a.open("g") as disk:
        model.write(disk)
    subprocess.run(["mount", "-o", "remount,size=64M", str(small_disk)], check=True)
    done = a.run("export", "--resume", str(file))
    assert done.returncode == 0, done.stderr
    assert b.run("import", str(file)).returncode == 0
    with b.open("g") as disk:
        model.check(disk)


def test_a_reader_that_goes_away_ends_an_export_in_one_line(pair: Pair, image: Path) -> None:
    a, _ = pair
    model = Model(image, 5)
    with a.open("g") as disk:
        model.write(disk, 300)
    export = command("export", "--run-dir", str(a.run_dir), "-")
    for read_bytes in (0, 5000):
        process = subprocess.Popen(export, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(read_bytes)
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait(60) == 1
        assert said == "cowshed: cannot write to stdout: Broken pipe; every guest is as it was\n"
    with a.open("g") as disk:
        model.write(disk)


def test_an_export_ends_with_who_asked_for_it(pair: Pair, image: Path) -> None:
    a, _ = pair
    model = Model(image, 6)
    with a.open("g") as disk:
        model.write(disk, 100)
    nr_fds = a.the_daemon.nr_fds()
    export = command("export", "--run-dir", str(a.run_dir), "-")
    process = subprocess.Popen(export, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(1)  # it has begun, and waits for us to read on
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    # Fewer: it may have had a file open for a moment when they were counted.
    until(lambda: a.the_daemon.nr_fds() <= nr_fds)
    with a.open("g") as disk:
        model.write(disk)
        model.check(disk)


def test_a_drain_does_not_write_over_guests_that_were_drained(pair: Pair, tmp_path: Path) -> None:
    a, _ = pair
    file = tmp_path / "state"
    file.write_bytes(b"guests")
    done = a.run("drain", "--to", str(file))
    assert done.returncode == 1
    assert "has 6 bytes, perhaps of drained guests" in done.stderr
    assert file.read_bytes() == b"guests"


@pytest.mark.parametrize("op", ["export", "import"])
def test_progress_is_told_with_what_is_done_and_what_there_is(
    pair: Pair, image: Path, tmp_path: Path, op: str
) -> None:
    a, b = pair
    with a.open("g") as disk:
        Model(image, 7).write(disk, 50)
    file = tmp_path / "state"
    assert a.run("export", str(file)).returncode == 0
    with file.open("r+b" if op == "export" else "rb") as opened:
        daemon = (a if op == "export" else b).the_daemon
        with daemon.connect() as backend:
            replies = list(backend.stream(op, fds=[opened.fileno()]))
    progress = [reply["progress"] for reply in replies if "progress" in reply]
    assert progress
    assert 0 < progress[-1]["done_bytes"] == progress[-1]["total_bytes"]
    done = [each["done_bytes"] for each in progress]
    assert done == sorted(done)
    if op == "export":
        assert progress[-1]["rate_bytes_per_second"] > 0
        assert progress[-1]["seconds_left"] is not None
