# SPDX-License-Identifier: Apache-2.0
"""What a program under `cowshed attach` starts runs as without us; what can maps from the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from attached import ROOM, Attached
from domains import NOBODY

pytestmark = pytest.mark.slow

# Maps the file it is told, and says what is preloaded into it.
SHOW = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
int main(int nr_words, char **words)
{
	int fd = nr_words > 1 ? open(words[1], O_RDONLY) : -1;
	unsigned char *at = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
	const char *preloaded = getenv("LD_PRELOAD");
	if (preloaded && strstr(preloaded, "_preload.abi3.so"))
		preloaded = "ours";
	if (at == MAP_FAILED)
		return 1;
	for (int i = 0; i < 8; i++)
		printf("%02x", at[i]);
	printf(" %s\n", preloaded ? preloaded : "none");
	return 0;
}
"""
BUILDS = {
    "ordinary": ["gcc"],
    "musl": ["musl-gcc"],
    "address": ["gcc", "-fsanitize=address"],
    "thread": ["gcc", "-fsanitize=thread"],
    "undefined": ["gcc", "-fsanitize=undefined"],
    "static": ["gcc", "-static"],
    "static-pie": ["gcc", "-static-pie"],
}
# Those that would end, or complain, with the library in them.
PLAIN = ("musl", "address")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of BUILDS, and runner."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "show.c").write_text(SHOW)
    for name, words in BUILDS.items():
        subprocess.run([*words, "-o", folder / name, folder / "show.c"], check=True)
    flags = ("-O1", "-g", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *flags, "-o", folder / "runner", ROOM / "runner.c"], check=True)
    return folder


def line(attached: Attached, preloaded: str) -> str:
    return f"{attached.copy.read_bytes()[:8].hex()} {preloaded}"


@pytest.mark.parametrize("kind", BUILDS)
def test_every_kind_of_child_runs_and_reads_the_image(
    shared: Attached, folder: Path, kind: str
) -> None:
    ended = shared.run("sh", "-c", f"{folder / kind} {{image}}; true")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.strip() == line(shared, "none" if kind in PLAIN else "ours")


@pytest.mark.parametrize("kind", ["ordinary", *PLAIN])
def test_every_way_to_run_a_program_looks_at_it(shared: Attached, folder: Path, kind: str) -> None:
    before = shared.daemon.log().count("event=attached")
    ended = shared.run(folder / "runner", folder / kind, "{image}")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    lines = ended.stdout.splitlines()
    assert set(lines) == {line(shared, "none" if kind in PLAIN else "ours")}
    nr_mapped = 0 if kind in PLAIN else len(lines)
    shared.daemon.wait_logged("event=attached", before + nr_mapped)


def test_a_script_is_judged_by_its_interpreter(
    shared: Attached, folder: Path, run_dir: Path
) -> None:
    for name, preloaded in (("musl", "none"), ("ordinary", "ours")):
        script = run_dir / "script"
        script.write_bytes(b"#! %s\n" % os.fsencode(folder / name) + shared.copy.read_bytes()[:99])
        script.chmod(0o755)
        ended = shared.run("sh", "-c", f"{script}; true", "{image}")
        assert ended.stderr == ""
        assert ended.stdout.split()[1] == preloaded


def test_another_c_librarys_linker_run_as_a_program_is_left_alone(
    shared: Attached, folder: Path
) -> None:
    named = subprocess.run(
        ["readelf", "-p", ".interp", folder / "musl"], capture_output=True, text=True, check=True
    )
    linker = named.stdout.split()[-1]
    ended = shared.run("sh", "-c", f"{linker} {folder / 'musl'} {{image}}; true")
    assert (ended.stdout.strip(), ended.stderr) == (line(shared, "none"), "")


def test_a_static_shell_hands_the_library_on(shared: Attached, folder: Path) -> None:
    ended = shared.run("sh", "-c", f"busybox sh -c '{folder / 'ordinary'} {{image}}'; true")
    assert (ended.stdout.strip(), ended.stderr) == (line(shared, "ours"), "")


def test_other_preloaded_libraries_stay(shared: Attached, folder: Path) -> None:
    own = {"LD_PRELOAD": "libpthread.so.0 libdl.so.2"}
    ended = shared.run("sh", "-c", f"{folder / 'musl'} {{image}}; true", env=own)
    assert ended.stdout.strip() == line(shared, "libpthread.so.0:libdl.so.2")


def test_a_child_without_an_environment_runs(shared: Attached, folder: Path) -> None:
    for name in ("musl", "ordinary"):
        ended = shared.run("env", "-i", folder / name, "{image}")
        assert (ended.stdout.strip(), ended.stderr) == (line(shared, "none"), "")


def test_a_setuid_child_runs(shared: Attached, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a program setuid")
    with_rights = shared.daemon.run_dir / "privileged"
    shutil.copy(folder / "ordinary", with_rights)
    os.chown(with_rights, NOBODY, -1)
    with_rights.chmod(0o4755)
    ended = shared.run("sh", "-c", f"{with_rights} {{image}}; true")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split()[0] == shared.copy.read_bytes()[:8].hex()


def test_a_sanitizers_library_that_is_preloaded_stays_first(shared: Attached) -> None:
    found = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    first = f"{found.stdout.strip()}:libdl.so.2"
    own = {"LD_PRELOAD": first, "ASAN_OPTIONS": "detect_leaks=0"}
    words = shared.words("sh", "-c", "echo $LD_PRELOAD", "{image}")
    ended = subprocess.run(words, env=os.environ | own, capture_output=True, text=True, check=False)
    asan, ours, other = ended.stdout.strip().split(":")
    assert (asan, other) == (found.stdout.strip(), "libdl.so.2"), ended.stderr
    assert ours.endswith("_preload.abi3.so")


def test_a_program_that_cannot_be_preloaded_is_refused(shared: Attached, folder: Path) -> None:
    for name, says in (("musl", "the same C library"), ("address", "address sanitizer")):
        ended = shared.run(folder / name, "{image}")
        assert ended.returncode != 0
        assert ended.stdout == ""
        assert ended.stderr.count("\n") == 1
        assert says in ended.stderr
