# SPDX-License-Identifier: Apache-2.0
"""Overlays behind NBD against a model of bytes: whatever is done, in memory and in files."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from nbd_client import CACHE, FAST_ZERO, FLUSH, FUA, NO_HOLE, STATUS, TRIM, ZEROES, Client
from nbd_stage import TERMS, NbdStage
from stage import PAGE, Stage

from cowshed.accounting import QuotaPolicy

NR_PAGES = 150  # more than two groups of 64, and a part
CUT = 1000
SIZE = NR_PAGES * PAGE - CUT
QUOTA = 100

places = st.one_of(
    st.integers(0, SIZE - 1), st.integers(0, NR_PAGES - 1).map(lambda page: page * PAGE)
)
lengths = st.one_of(
    st.integers(1, 3 * PAGE), st.integers(1, 90).map(lambda nr: nr * PAGE), st.just(SIZE)
)


class OverlayMachine(RuleBasedStateMachine):
    """One guest with three connections, each in another dialect; model: bytes and who owns them."""

    in_files = False

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.stage = Stage(
            Path(self.folder.name), nr_pages=NR_PAGES, extent_pages=4, cut_bytes=CUT, capacity=64
        )
        self.nbd = NbdStage(self.stage)
        self.model = bytearray(self.nbd.bytes)
        self.private: set[int] = set()
        self.fill = 0
        self.connect()

    def connect(self) -> None:
        files = Path(self.folder.name) if self.in_files else None
        self.overlay = self.nbd.overlay(quota=QUOTA, files=files)
        export = self.nbd.export(self.overlay)
        self.clients = [self.nbd.client(export, terms) for terms in TERMS]

    def teardown(self) -> None:
        if hasattr(self, "nbd"):
            self.nbd.close()
            self.stage.close()
            self.folder.cleanup()

    def client(self, which: int) -> Client:
        return self.clients[which]

    def pages(self, offset: int, length: int) -> set[int]:
        return set(range(offset // PAGE, -(-(offset + length) // PAGE)))

    def has_room(self, offset: int, length: int) -> bool:
        return len(self.private | self.pages(offset, length)) <= QUOTA

    @rule(which=st.integers(0, 2), offset=places, length=lengths)
    def read(self, which: int, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        got = self.client(which).read(offset, length)
        assert got == self.model[offset : offset + length]

    @rule(which=st.integers(0, 2), offset=places, length=lengths, flags=st.sampled_from([0, FUA]))
    def write(self, which: int, offset: int, length: int, flags: int) -> None:
        length = min(length, SIZE - offset)
        self.fill = self.fill % 250 + 1
        data = bytes([self.fill]) * length
        error = self.client(which).write(offset, data, flags)
        if not self.has_room(offset, length):
            assert error == errno.ENOSPC
            return
        assert error == 0
        self.model[offset : offset + length] = data
        self.private |= self.pages(offset, length)

    @rule(
        which=st.integers(0, 2),
        offset=places,
        length=lengths,
        flags=st.sampled_from([0, NO_HOLE, FAST_ZERO]),
    )
    def zero(self, which: int, offset: int, length: int, flags: int) -> None:
        length = min(length, SIZE - offset)
        error = self.client(which).call(ZEROES, offset, length, flags).error
        whole = offset % PAGE == 0 and ((offset + length) % PAGE == 0 or offset + length == SIZE)
        if flags == FAST_ZERO and not whole:
            assert error == errno.ENOTSUP
        elif not self.has_room(offset, length):
            assert error == errno.ENOSPC
        else:
            assert error == 0
            self.model[offset : offset + length] = bytes(length)
            self.private |= self.pages(offset, length)

    @rule(which=st.integers(0, 2), offset=places, length=lengths)
    def trim(self, which: int, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        assert self.client(which).call(TRIM, offset, length).error == 0
        end = offset + length
        first, stop = -(-offset // PAGE), NR_PAGES if end == SIZE else end // PAGE
        if first < stop:
            self.model[first * PAGE : stop * PAGE] = self.nbd.bytes[first * PAGE : stop * PAGE]
            self.private -= set(range(first, stop))

    @rule(which=st.integers(0, 2), offset=places, length=lengths)
    def cache(self, which: int, offset: int, length: int) -> None:
        assert self.client(which).call(CACHE, offset, min(length, SIZE - offset)).error == 0

    @rule(which=st.integers(0, 2))
    def flush(self, which: int) -> None:
        assert self.client(which).call(FLUSH).error == 0

    @rule()
    def evict(self) -> None:
        self.stage.evict_all()

    @rule()
    def discard(self) -> None:
        self.overlay.discard()
        self.private = set()
        self.model = bytearray(self.nbd.bytes)

    @rule()
    def come_again(self) -> None:
        self.nbd.disconnect()
        if not self.in_files:
            self.private = set()
            self.model = bytearray(self.nbd.bytes)
        self.connect()

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "overlay"):
            return
        account = self.overlay.account
        bits = sum(1 << page for page in self.private)
        assert int.from_bytes(account.private_bitmap(), "little") == bits
        assert int.from_bytes(self.overlay.stored_bitmap(), "little") & ~bits == 0
        assert account.status().private_pages == len(self.private)
        assert account.status().quota_pages == QUOTA

    @rule()
    def status_is_the_bitmap(self) -> None:
        runs = self.clients[1].call(STATUS, 0, SIZE).runs[3]
        shown = [status for length, status in runs for _ in range(-(-length // PAGE))]
        assert [page for page, status in enumerate(shown) if status] == sorted(self.private)


class OverlayFilesMachine(OverlayMachine):
    in_files = True


hurry = settings(
    max_examples=25,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
TestInMemory = OverlayMachine.TestCase
TestInMemory.settings = hurry
TestInFiles = OverlayFilesMachine.TestCase
TestInFiles.settings = hurry


def test_allow_counts_and_never_refuses(nbd: NbdStage) -> None:
    overlay = nbd.overlay(quota=1, policy=QuotaPolicy.ALLOW)
    assert nbd.client(nbd.export(overlay)).write(0, b"x" * 50 * PAGE) == 0
    assert overlay.account.status().private_pages == 50


def test_a_refused_write_leaves_every_byte_as_it_was(nbd: NbdStage) -> None:
    overlay = nbd.overlay(quota=10)
    client = nbd.client(nbd.export(overlay))
    assert client.write(5 * PAGE, b"a" * 8 * PAGE) == 0
    assert client.write(0, b"b" * 17 * PAGE) == errno.ENOSPC
    assert client.read(5 * PAGE, 8 * PAGE) == b"a" * 8 * PAGE
    assert client.read(0, 5 * PAGE) == nbd.bytes[: 5 * PAGE]
    assert client.write(4 * PAGE, b"c" * 10 * PAGE) == 0  # two more: all that is left


def test_one_guests_writes_are_seen_on_all_its_connections_at_once(nbd: NbdStage) -> None:
    export = nbd.export(nbd.overlay())
    clients = [nbd.client(export) for _ in range(4)]
    for round_no in range(100):
        writer, reader = clients[round_no % 4], clients[(round_no + 1) % 4]
        assert writer.write(round_no * 100, bytes([round_no]) * 100) == 0
        assert reader.read(round_no * 100, 100) == bytes([round_no]) * 100


@pytest.mark.parametrize("nr_rounds", [60])
def test_parts_of_one_page_written_at_once_are_all_there(nbd: NbdStage, nr_rounds: int) -> None:
    export = nbd.export(nbd.overlay())
    clients = [nbd.client(export) for _ in range(4)]
    for page in range(nr_rounds):
        tickets = [
            client.start(1, page * PAGE + part * 1024, payload=bytes([part + 1]) * 1024)
            for part, client in enumerate(clients)
        ]
        for client, ticket in zip(clients, tickets, strict=True):
            assert client.finish(ticket).error == 0
        whole = b"".join(bytes([part + 1]) * 1024 for part in range(4))
        assert clients[page % 4].read(page * PAGE, PAGE) == whole
