# SPDX-License-Identifier: Apache-2.0
"""A backend dies in a request: its successor's overlay has each page as it was before or after."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from nbd_client import Client
from nbd_stage import NbdStage
from stage import PAGE, MakeStage, until

from cowshed.accounting import Account, Overlay, Quota
from cowshed.cache import FileSource, InheritedImage, InvariantError, PageStore
from cowshed.cache._core import lib
from cowshed.transport.nbd.serving import NbdCounters, NbdExport, NbdServer

pytestmark = pytest.mark.slow

CHILD = Path(__file__).parents[2] / "support/doomed_overlay.py"
NR_PAGES = 64

CASES = (
    ("TAKEN", "write"),
    ("WRITTEN", "write"),
    ("WRITTEN", "patch"),
    ("TAKEN", "zero"),
    ("ZEROED", "zero"),
    ("TRIMMED", "trim"),
)


def all_left_by(folder: Path, point: str, op: str) -> tuple[list[int], list[int]]:
    """Have a backend die there; its quota, ledger and pages, and what was of its image."""
    ours, theirs = socket.socketpair()
    number = str(getattr(lib, f"POINT_OVERLAY_{point}"))
    child = subprocess.run(
        [sys.executable, str(CHILD), str(theirs.fileno()), str(folder), number, op],
        pass_fds=[theirs.fileno()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stdout + child.stderr
    _, fds, _, _ = socket.recv_fds(ours, 1, 6)
    ours.close()
    theirs.close()
    return fds[:3], fds[3:]


def left_by(folder: Path, point: str, op: str) -> list[int]:
    """Have a backend die there; its quota, ledger and pages."""
    fds, of_image = all_left_by(folder, point, op)
    for fd in of_image:
        os.close(fd)
    return fds


def expected(image: bytes, op: str, *, is_done: bool) -> list[bytes]:
    """Each page after the request, or before it."""
    pages = [image[at : at + PAGE] for at in range(0, len(image), PAGE)]
    pages[:10] = [b"\1" * PAGE] * 10
    if not is_done:
        return pages
    if op == "patch":
        pages[12] = pages[12][:100] + b"\2" * 200 + pages[12][300:]
    elif op == "trim":
        pages[:5] = [image[at * PAGE : (at + 1) * PAGE] for at in range(5)]
    else:
        pages[5:15] = [(b"\2" if op == "write" else b"\0") * PAGE] * 10
    return pages


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize(("point", "op"), CASES, ids=["-".join(case) for case in CASES])
def test_each_page_is_as_before_or_after_a_request_that_was_cut_short(
    point: str, op: str, kind: str, tmp_path: Path, make_stage: MakeStage
) -> None:
    files = tmp_path / "files"
    if kind == "files":
        files.mkdir()
    quota_fd, ledger_fd, pages_fd = left_by(tmp_path, point, op)
    nbd = NbdStage(make_stage(nr_pages=NR_PAGES))
    try:
        quota = Quota.adopt(quota_fd)
        account = Account(nbd.stage.image, quota, ledger_fd)
        if kind == "files":
            os.close(pages_fd)
            overlay = Overlay.files(account, files, "x", b"i" * 32, is_adopted=True)
        else:
            overlay = Overlay.adopt(account, pages_fd)
        nbd.overlays.append(overlay)
        client = nbd.client(nbd.export(overlay))
        got = client.read(0, NR_PAGES * PAGE)
        before = expected(nbd.bytes, op, is_done=False)
        after = expected(nbd.bytes, op, is_done=True)
        for page in range(NR_PAGES):
            assert got[page * PAGE : (page + 1) * PAGE] in (before[page], after[page]), page
        # The books: what is private is paid for, what was taken and not used is back.
        private = int.from_bytes(account.private_bitmap(), "little")
        assert quota.status().used_pages == private.bit_count()
        assert account.status().private_pages == private.bit_count()
        assert int.from_bytes(account.unsettled_bitmap(), "little") == 0
        if kind == "memory":
            assert int.from_bytes(overlay.stored_bitmap(), "little") & ~private == 0
        # The client comes again with what was not answered, and others after it.
        assert client.write(20 * PAGE, b"\3" * PAGE) == 0
        assert client.read(20 * PAGE, PAGE) == b"\3" * PAGE
        quota.close()
    finally:
        nbd.close()


def test_bytes_that_a_cut_write_left_never_show_where_zeros_are_written(
    tmp_path: Path, make_stage: MakeStage
) -> None:
    from nbd_client import ZEROES

    quota_fd, ledger_fd, pages_fd = left_by(tmp_path, "WRITTEN", "write")
    nbd = NbdStage(make_stage(nr_pages=NR_PAGES))
    try:
        quota = Quota.adopt(quota_fd)
        overlay = Overlay.adopt(Account(nbd.stage.image, quota, ledger_fd), pages_fd)
        quota.close()
        nbd.overlays.append(overlay)
        client = nbd.client(nbd.export(overlay))
        assert client.call(ZEROES, 10 * PAGE, 5 * PAGE).error == 0
        assert client.read(10 * PAGE, 5 * PAGE) == bytes(5 * PAGE)
    finally:
        nbd.close()


def test_acknowledged_writes_in_files_are_durable_after_the_successors_flush(
    tmp_path: Path, make_stage: MakeStage
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    quota_fd, ledger_fd, pages_fd = left_by(tmp_path, "TRIMMED", "trim")
    os.close(pages_fd)
    nbd = NbdStage(make_stage(nr_pages=NR_PAGES))
    try:
        quota = Quota.adopt(quota_fd)
        account = Account(nbd.stage.image, quota, ledger_fd)
        quota.close()
        overlay = Overlay.files(account, files, "x", b"i" * 32, is_adopted=True)
        overlay.close()  # flushes
        account.close()
        # Another machine's daemon has nothing but the files.
        again = nbd.overlay(files=files)
        got = nbd.client(nbd.export(again)).read(0, NR_PAGES * PAGE)
        assert got[5 * PAGE : 10 * PAGE] == b"\1" * 5 * PAGE
        assert got[10 * PAGE :] == nbd.bytes[10 * PAGE :]
        private = int.from_bytes(again.account.private_bitmap(), "little")
        assert int.from_bytes(again.stored_bitmap(), "little") & ~private == 0
    finally:
        nbd.close()


def test_what_is_no_overlay_is_refused(tmp_path: Path, make_stage: MakeStage) -> None:
    quota_fd, ledger_fd, pages_fd = left_by(tmp_path, "TAKEN", "write")
    stage = make_stage(nr_pages=NR_PAGES)
    quota = Quota.adopt(quota_fd)
    account = Account(stage.image, quota, ledger_fd)
    quota.close()
    with pytest.raises(InvariantError, match="not of image 'disk'"):
        Overlay.adopt(account, os.memfd_create("other"))
    Overlay.adopt(account, pages_fd).close()
    account.close()


def test_what_clients_did_is_counted_on_by_the_successor(tmp_path: Path) -> None:
    (quota_fd, ledger_fd, pages_fd), of_image = all_left_by(tmp_path, "TRIMMED", "trim")
    source = FileSource.open(tmp_path / "image.raw")
    server = NbdServer(2)
    with PageStore(NR_PAGES * PAGE) as store, contextlib.ExitStack() as stack:
        stack.callback(server.close)
        image = store.adopt_image("disk", source, InheritedImage(*of_image))
        quota = Quota.adopt(quota_fd)
        account = Account(image, quota, ledger_fd)
        stack.callback(account.close)
        quota.close()
        overlay = Overlay.adopt(account, pages_fd)
        stack.callback(overlay.close)
        export = NbdExport(server, image, overlay.cdata)
        earlier = export.counters()
        # The trim was not answered: it is not counted, and nobody waits for it any more.
        expected = NbdCounters(connections=1, writes=1, write_bytes=10 * PAGE)
        assert earlier == server.counters(image) == expected
        export.close()
        # What is new of another export adds to the image's; not to the overlay's own.
        ours, theirs = socket.socketpair()
        shared = NbdExport(server, image)
        number = server.attach(shared, theirs.detach(), structured=True)
        client = Client(ours, structured=True, extended=False)
        client.connection_no = number
        client.read(0, PAGE)
        ours.close()
        until(lambda: server.counters(image).reads == 1, "the read is counted")
        again = NbdExport(server, image, overlay.cdata)
        assert again.counters() == earlier
        assert server.counters(image).connections == 2
        assert shared.counters().write_bytes == 0
        server.drain()
        shared.close()
        again.close()
