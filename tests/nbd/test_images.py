# SPDX-License-Identifier: Apache-2.0
"""Images over NBD, read-only, as programs of others see them: libnbd's, QEMU's, nbdkit's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from domains import until
from nbd_site import EXTENT, MIB, SIZE, Site, run

pytestmark = pytest.mark.slow


def test_nbdinfo_lists_the_exports_and_what_each_can(site: Site) -> None:
    told = json.loads(run("nbdinfo", "--list", "--json", site.uri("")))
    (export,) = told["exports"]
    assert told["protocol"] == "newstyle-fixed"
    assert told["structured"] is True
    assert (export["export-name"], export["export-size"]) == ("d", SIZE)
    assert export["description"] == "read-only image"
    assert export["contexts"] == ["base:allocation", "cowshed:resident"]
    abilities = ("is_read_only", "can_multi_conn", "can_cache", "can_df", "can_flush", "can_fua")
    assert [export[ability] for ability in abilities] == [True] * len(abilities)
    assert [export[ability] for ability in ("can_trim", "can_zero")] == [False, False]
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, EXTENT, 32 * MIB]


def test_the_map_shows_what_is_resident_as_it_changes(site: Site) -> None:
    assert site.map("cowshed:resident") == [(0, SIZE, 0)]
    site.cowshed("warm", "d", "64K", "128K")
    assert site.map("cowshed:resident") == [
        (0, EXTENT, 0),
        (EXTENT, 2 * EXTENT, 1),
        (3 * EXTENT, SIZE - 3 * EXTENT, 0),
    ]

    def is_evicted() -> bool:
        # Whoever loaded an extent may hold it for an instant after the answer.
        site.cowshed("evict", "d")
        return site.map("cowshed:resident") == [(0, SIZE, 0)]

    until(is_evicted)
    assert sum(length for _, length, _ in site.map("base:allocation")) == SIZE


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_nbdcopy_copies_it_over_several_connections(
    site: Site, transport: str, tmp_path: Path
) -> None:
    uri = site.uri() if transport == "unix" else site.tcp_uri()
    copy = tmp_path / "copy.raw"
    run("nbdcopy", "--connections=4", "--requests=32", uri, str(copy))
    assert copy.read_bytes() == site.content()


@pytest.mark.parametrize("size", [1, 4097, MIB + 511])
def test_an_image_of_any_size_is_read_to_its_last_byte(
    make_site: Callable[..., Site], size: int, tmp_path: Path
) -> None:
    site = make_site(size=size)
    copy = tmp_path / "copy.raw"
    run("nbdcopy", site.uri(), str(copy))
    assert copy.read_bytes() == site.content()


def test_qemu_finds_it_identical_and_converts_it(site: Site, tmp_path: Path) -> None:
    told = run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(site.path), site.uri())
    assert "identical" in told
    converted = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", site.tcp_uri(), str(converted))
    assert "identical" in run("qemu-img", "compare", "-F", "raw", str(converted), str(site.path))


def test_nbdkit_serves_it_on_as_its_client(site: Site, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    run("nbdkit", "-U", "-", "nbd", site.uri(), "--run", f"nbdcopy $uri {copy}")
    assert copy.read_bytes() == site.content()


def test_the_empty_name_is_the_only_image(site: Site) -> None:
    assert json.loads(run("nbdinfo", "--json", site.uri("")))["exports"][0]["export-size"] == SIZE


def test_of_several_images_none_is_the_default(
    make_site: Callable[..., Site], tmp_path: Path
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(4096))
    site = make_site("--image", f"e={other}")
    told = site.nbdsh(
        f"""
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix({str(site.socket)!r})
for name in ("d", "e", "", "f", "d@", "x" * 4096, "default/e"):
    h.set_export_name(name)
    try:
        h.opt_info()
        print(h.get_size())
    except nbd.Error as error:
        print(error.errno)
"""
    )
    # libnbd tells an unknown export as ENOENT.
    assert told.split() == [str(SIZE), "4096", *["ENOENT"] * 4, "4096"]


def test_writing_and_reading_past_the_end_is_refused_and_harms_nothing(site: Site) -> None:
    told = site.nbdsh(
        f"""
h.set_strict_mode(0)
for what in (
    lambda: h.pwrite(b"x" * 512, 0),
    lambda: h.pread(512, {SIZE}),
    lambda: h.pread(512, {SIZE} - 511),
    lambda: h.pread(512, (1 << 63) - 512),
    lambda: h.pwrite(b"x" * 512, {SIZE}),
):
    try: what(); print("fine")
    except nbd.Error as error: print(error.errno)
print(h.pread(8, 4096) == {(2654435761).to_bytes(8, "little")!r})
"""
    )
    *errors, right = told.split()
    assert errors[0] == "EPERM"
    assert set(errors[1:4]) == {"EINVAL"}
    assert errors[4] in ("EPERM", "EINVAL", "ENOSPC")
    assert right == "True"


def test_cache_warms_and_many_reads_at_once_are_each_answered(site: Site) -> None:
    assert site.map("cowshed:resident") == [(0, SIZE, 0)]
    told = site.nbdsh(
        f"""
h.cache({MIB}, 0)
h.flush()
pieces = [nbd.Buffer(65536) for _ in range(64)]
waiting = {{h.aio_pread(pieces[no], no * 65536) for no in range(64)}}
while waiting:
    h.poll(-1)
    waiting -= {{cookie for cookie in waiting if h.aio_command_completed(cookie)}}
image = open({str(site.path)!r}, "rb").read(4 << 20)
print(b"".join(bytes(piece.to_bytearray()) for piece in pieces) == image)
"""
    )
    assert told.split() == ["True"]
    offset, length, resident = site.map("cowshed:resident")[0]
    assert (offset, resident) == (0, 1)
    assert length >= 4 * MIB


def test_structured_and_simple_replies_give_the_same_bytes(site: Site) -> None:
    told = site.nbdsh(
        f"""
for structured in (True, False):
    for flags in (0, 1, 2, 3):
        other = nbd.NBD()
        other.set_request_structured_replies(structured)
        other.set_handshake_flags(flags)
        other.set_export_name("d")
        other.connect_unix({str(site.socket)!r})
        print(other.get_structured_replies_negotiated())
        assert other.pread(70000, 4000) == h.pread(70000, 4000)
        other.shutdown()
"""
    )
    # Without fixed newstyle there are no options to ask for structured replies with.
    assert told.split() == ["False", "True"] * 2 + ["False"] * 4
