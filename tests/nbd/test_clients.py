# SPDX-License-Identifier: Apache-2.0
"""Programs of others that write to a guest's private copy, and check what they wrote."""

from __future__ import annotations

from pathlib import Path

from nbd_site import MIB, SIZE, Site, run


def test_nbdcopy_writes_and_reads_over_several_connections(site: Site, tmp_path: Path) -> None:
    new = tmp_path / "new.raw"
    new.write_bytes(bytes(range(256)) * (SIZE // 512) + bytes(SIZE // 2))
    back = tmp_path / "back.raw"
    run("nbdcopy", "--connections=4", "--flush", str(new), site.tcp_uri("d@g"))
    # Over TCP nobody vouches for a user: root may come back to it by the unix socket.
    run("nbdcopy", "--connections=4", site.uri("d@g"), str(back))
    assert back.read_bytes() == new.read_bytes()
    # One export to another, both ours.
    run("nbdcopy", site.uri("d"), site.uri("d@h"))
    run("nbdcopy", site.uri("d@h"), str(back))
    assert back.read_bytes() == site.content()


def test_qemu_io_writes_discards_zeroes_and_verifies(site: Site) -> None:
    orders = [
        "write -P 0x11 0 1M",
        "write -P 0x22 4k 4k",
        "write -P 0x33 300k 100",
        "read -P 0x11 0 4k",
        "read -P 0x22 4k 4k",
        "read -P 0x33 300k 100",
        "write -z 512k 128k",
        "read -P 0 512k 128k",
        "write -z -u 2M 1M",
        "read -P 0 2M 1M",
        "write -f -P 0x44 3M 64k",
        "aio_write -P 0x55 4M 256k",
        "aio_write -P 0x66 5M 256k",
        "aio_flush",
        "flush",
        "read -P 0x44 3M 64k",
        "read -P 0x55 4M 256k",
        "read -P 0x66 5M 256k",
        "discard 0 1M",
    ]
    words = [word for order in orders for word in ("-c", order)]
    told = run("qemu-io", "-t", "none", "-f", "raw", *words, site.uri("d@g"))
    assert "Pattern verification failed" not in told
    assert "error" not in told.lower()
    assert told.count("ops;") == len(orders) - 2
    assert "True" in site.nbdsh(
        f"print(h.pread({MIB}, 0) == open({str(site.path)!r}, 'rb').read({MIB}))", "d@g"
    )


def test_qemu_img_converts_into_it(site: Site, tmp_path: Path) -> None:
    new = tmp_path / "new.raw"
    new.write_bytes(b"\x5a" * (SIZE // 4) + bytes(SIZE // 4 * 3))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(new), site.uri("d@g"))
    assert "identical" in run("qemu-img", "compare", str(new), site.uri("d@g"))
    assert "identical" in run("qemu-img", "compare", str(site.path), site.uri("d"))


def test_fio_verifies_what_it_wrote(site: Site, tmp_path: Path) -> None:
    told = run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={site.uri('d@g')}"),
        *("--rw=randwrite", "--bsrange=512-64k", "--iodepth=16", f"--size={SIZE}"),
        *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=7"),
        f"--aux-path={tmp_path}",
    )
    assert "err= 0" in told


def test_nbdkit_writes_through_its_nbd_plugin(site: Site, tmp_path: Path) -> None:
    new = tmp_path / "new.raw"
    new.write_bytes(bytes(range(256)) * (SIZE // 256))
    run("nbdkit", "-U", "-", "nbd", site.uri("d@g"), "--run", f"nbdcopy {new} $uri")
    assert "identical" in run("qemu-img", "compare", str(new), site.uri("d@g"))


def test_a_read_that_waits_for_a_load_holds_up_nobody(site: Site) -> None:
    told = site.nbdsh(
        """
h.pwrite(b"p" * 65536, 0)
slow = [nbd.Buffer(1 << 20) for _ in range(4)]
waiting = [h.aio_pread(slow[no], (no + 1) << 20) for no in range(4)]
quick = nbd.Buffer(4096)
first = h.aio_pread(quick, 0)
order = []
left = set(waiting) | {first}
while left:
    h.poll(-1)
    for cookie in sorted(left):
        if h.aio_command_completed(cookie):
            left.discard(cookie)
            order.append(cookie)
print(bytes(quick.to_bytearray()) == b"p" * 4096, len(order))
""",
        "d@g",
    )
    assert told.split() == ["True", "5"]
