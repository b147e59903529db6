# SPDX-License-Identifier: Apache-2.0
"""What a trimmed range reads as: the image's bytes again, or zeros for clients that expect them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nbd_site import MIB, SIZE, Site, run

from cowshed.transport import connect

pytestmark = pytest.mark.slow

MakeSite = Callable[..., Site]
# Whole pages, parts of pages, of one page alone, and the end.
TRIMS = ((0, 65536), (100_000, 70_001), (MIB + 5, 900), (2 * MIB, 2 * MIB), (SIZE - 3000, 3000))


@pytest.fixture
def zeros(make_site: MakeSite) -> Site:
    return make_site("--trim=zeros", "--listen=tcp://127.0.0.1:0")


def _check(site: Site, *, flag: str = "0") -> None:
    """Trim some of what was written and of what was not, and compare every byte."""
    told = site.nbdsh(
        f"""
mine = bytearray(open({str(site.path)!r}, "rb").read())
for at in (0, 150_000, {MIB}, 3 * {MIB}):
    h.pwrite(b"mine" * 20_000, at)
    mine[at:at + 80_000] = b"mine" * 20_000
for at, nr in {TRIMS}:
    h.trim(nr, at, {flag})
    mine[at:at + nr] = bytes(nr)
print(b"".join(h.pread({MIB}, at) for at in range(0, {SIZE}, {MIB})) == mine)
h.pwrite(b"again" * 1000, 2 * {MIB} + 7)
mine[2 * {MIB} + 7:2 * {MIB} + 5007] = b"again" * 1000
print(b"".join(h.pread({MIB}, at) for at in range(0, {SIZE}, {MIB})) == mine)
""",
        "d@g",
    )
    assert told.split() == ["True", "True"]


@pytest.mark.parametrize("flag", ["0", "nbd.CMD_FLAG_FUA"])
def test_every_byte_that_is_trimmed_reads_as_zero_and_no_other(zeros: Site, flag: str) -> None:
    _check(zeros, flag=flag)
    zeros.cowshed("evict", "d")
    known = [kind for at, _, kind in zeros.map("base:allocation", "d@g") if at == 2 * MIB + 8192]
    assert known == [2]  # zeros, and private
    assert zeros.daemon.mismatches() == []
    assert "identical" in run("qemu-img", "compare", str(zeros.path), zeros.uri())


def test_qemu_and_nbdcopy_find_zeros_where_they_discarded(zeros: Site, tmp_path: Path) -> None:
    orders = ("write -P 0x11 0 1M", "discard 64k 128k", "read -P 0 64k 128k", "read -P 0x11 0 64k")
    words = [
        word for order in (*orders, "discard 6M 1M", "read -P 0 6M 1M") for word in ("-c", order)
    ]
    told = run("qemu-io", "-t", "none", "-d", "unmap", "-f", "raw", *words, zeros.uri("d@g"))
    assert "Pattern verification failed" not in told
    assert "error" not in told.lower()
    back = tmp_path / "back.raw"
    run("nbdcopy", zeros.uri("d@g"), str(back))
    right = bytearray(zeros.content())
    right[:MIB] = b"\x11" * MIB
    right[65536 : 3 * 65536] = bytes(2 * 65536)
    right[6 * MIB : 7 * MIB] = bytes(MIB)
    assert back.read_bytes() == right


def test_a_trim_to_zeros_counts_against_the_quota_and_takes_nothing(zeros: Site) -> None:
    zeros.nbdsh(f"h.trim({MIB}, 0)", "d@g")
    assert zeros.daemon.guest_status("g")["private_bytes"] == MIB
    zeros.cowshed("quota", "g", "1M")
    told = zeros.nbdsh(
        f"""
h.trim({MIB}, 0)
try:
    h.trim(8192, {MIB})
except nbd.Error as error:
    print(error.errno)
print(h.pread(8192, {MIB}) == open({str(zeros.path)!r}, "rb").read()[{MIB}:{MIB} + 8192])
""",
        "d@g",
    )
    assert told.split() == ["ENOSPC", "True"]
    assert zeros.daemon.mismatches() == []


@pytest.mark.parametrize("which", ["site", "zeros"])
def test_write_zeroes_reads_as_zeros_whatever_a_trim_does(
    request: pytest.FixtureRequest, which: str
) -> None:
    site: Site = request.getfixturevalue(which)
    for flag in ("0", "nbd.CMD_FLAG_NO_HOLE"):
        told = site.nbdsh(
            f"h.zero(70_001, 100_000, {flag}); print(h.pread(70_001, 100_000) == bytes(70_001))",
            "d@g",
        )
        assert told.split() == ["True"]


def test_one_image_may_be_told_otherwise_and_the_library_always_gives_pages_back(
    make_site: MakeSite, tmp_path: Path
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"other" * 100_000)
    site = make_site("--trim=zeros", f"--image=e={other},trim=image", "--listen=tcp://127.0.0.1:0")
    code = "h.pwrite(b'x' * 4096, 0); h.trim(4096, 0); print(h.pread(4096, 0).hex())"
    for export, right in (("d@g", bytes(4096)), ("e@h", other.read_bytes()[:4096])):
        assert bytes.fromhex(site.nbdsh(code, export)) == right
    (uri,) = {
        line.partition("uri=")[2].split()[0].strip('"')
        for line in site.daemon.log().splitlines()
        if "event=listening " in line
    }
    with connect(uri) as backend, backend.open("d", guest="far") as disk:
        disk.write(0, b"x" * 4096)
        disk.discard(0, 4096)
        assert disk.read(0, 4096) == site.content()[:4096]


@pytest.mark.parametrize(
    "words", [["--image=e=SOURCE,trim=ones"], ["--config=CONFIG"]], ids=["option", "file"]
)
def test_anything_else_is_refused_in_one_line(site: Site, tmp_path: Path, words: list[str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'trim = "ones"\n[images]\nd = "{site.path}"\n')
    given = [
        word.replace("SOURCE", str(site.path)).replace("CONFIG", str(config)) for word in words
    ]
    told = site.cowshed("serve", "--check", *given, status=2)
    assert "trim 'ones'" in told
    assert "is not image or zeros: use one" in told
