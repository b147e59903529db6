# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from domains import command, until
from two_hosts import Host, Model

from cowshed.transport.handoff.sections import StateReader

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


@pytest.fixture
def exported(pair: Pair, image: Path, tmp_path: Path) -> tuple[Path, dict[str, Model]]:
    """A file with two guests of the first backend, and what they have."""
    models = {name: Model(image, seed) for seed, name in enumerate(("one", "two"))}
    for name, model in models.items():
        with pair[0].open(name) as disk:
            model.write(disk)
    file = tmp_path / "state.cowshed"
    done = pair[0].run("export", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 guests exported")
    assert not list(tmp_path.glob("*.part"))
    return file, models


def test_what_is_exported_is_imported_byte_for_byte_and_guests_go_on(
    pair: Pair, exported: tuple[Path, dict[str, Model]]
) -> None:
    a, b = pair
    file, models = exported
    before = {name: bytes(model.bytes) for name, model in models.items()}
    for name, model in models.items():
        with a.open(name) as disk:
            model.check(disk)
            model.write(disk)
    done = b.run("import", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    for name, model in models.items():
        model.bytes[:] = before[name]
        with b.open(name) as disk:
            model.check(disk)
    # What is there already cannot come again, and nothing of it is half there.
    done = b.run("import", str(file))
    assert done.returncode == 1
    assert "taken" in done.stderr
    assert b.the_daemon.mismatches() == []


def test_a_file_goes_through_pipes(
    pair: Pair, exported: tuple[Path, dict[str, Model]], tmp_path: Path
) -> None:
    a, b = pair
    out = tmp_path / "piped"
    with out.open("wb") as file:
        subprocess.run(command("export", "--run-dir", str(a.run_dir), "-"), stdout=file, check=True)
    with out.open("rb") as file:
        subprocess.run(command("import", "--run-dir", str(b.run_dir), "-"), stdin=file, check=True)
    for name, model in exported[1].items():
        with b.open(name) as disk:
            model.check(disk)


def test_a_damaged_file_is_refused_with_the_place_and_nothing_is_half_applied(
    pair: Pair, exported: tuple[Path, dict[str, Model]], tmp_path: Path
) -> None:
    _, b = pair
    raw = exported[0].read_bytes()
    reader = StateReader()
    ends = [at + 1 for at in range(len(raw)) if list(reader.feed(raw[at : at + 1]))]
    rng = random.Random(5)
    cuts = [*ends[:-1][:6], *(rng.randrange(len(raw)) for _ in range(6))]
    bad = [(f"cut at {cut}", raw[:cut]) for cut in cuts]
    for _ in range(6):
        at = rng.randrange(len(raw))
        bad.append((f"flip at {at}", raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]))
    file = tmp_path / "bad"
    nr_fds = b.the_daemon.nr_fds()
    for what, damaged in bad:
        file.write_bytes(damaged)
        with (
            b.the_daemon.connect() as backend,
            file.open("rb") as source,
            pytest.raises(Exception, match="at byte") as caught,
        ):
            list(backend.stream("import", fds=[source.fileno()]))
        assert "\n" not in str(caught.value), what
        assert b.guests() == set(), what
    # Fewer: it may have had a file open for a moment when they were counted.
    until(lambda: b.the_daemon.nr_fds() <= nr_fds)
    done = b.run("import", str(file))
    assert done.returncode == 1
    assert done.stderr.startswith("cowshed: ")
    assert b.run("import", str(exported[0])).returncode == 0


def test_a_drain_to_a_file_keeps_guests_frozen_until_it_is_imported(
    pair: Pair, image: Path, tmp_path: Path
) -> None:
    a, b = pair
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    file = tmp_path / "drained"
    report = a.drain("--to", str(file))
    assert report["phase"] == "moved"
    until(lambda: a.guests() == set())
    done = b.run("import", str(file))
    assert done.returncode == 0, done.stderr
    with b.open("g") as disk:
        model.check(disk)


def test_files_that_cannot_be_are_refused_in_one_line(pair: Pair, tmp_path: Path) -> None:
    a, _ = pair
    for arguments, words in (
        (("import", str(tmp_path / "none")), "cannot read"),
        (("import", "/dev/null"), "at byte 0"),
        (("import", sys.executable), "does not begin with a handoff's magic"),
        (("export", str(tmp_path / "no" / "folder")), "cannot write"),
        (("drain", "--to", "http://example"), "use unix://"),
        (("drain",), "give --to"),
        (("drain", "--to", "unix:///nowhere/sock"), "is the backend running"),
    ):
        done = a.run(*arguments)
        assert done.returncode in (1, 2), arguments
        assert words in done.stderr, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1
