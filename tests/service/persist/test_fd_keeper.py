# SPDX-License-Identifier: Apache-2.0
"""What a holder could not be told it is told later, whatever kept it from being told."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import ANSWER_SECONDS

from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.notice import NOT_HELD, Notice
from cowshed.service.runtime.loop import READ, Loop
from cowshed.service.supervise.keeper_watch import KeeperWatch


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.setblocking(False)
    return sock


def take_all(holder: socket.socket) -> list[tuple[str, str]]:
    """What came: what is to be done with which group, or a notice's word."""
    said = []
    while True:
        try:
            datagram, fds, _, _ = socket.recv_fds(holder, 4096, 16)
        except BlockingIOError:
            return said
        for fd in fds:
            os.close(fd)
        fields = Notice.parse(datagram).fields
        word = next(iter(fields))
        said.append((word, fields.get("FDNAME", "")))


def stored(*names: str) -> list[tuple[str, str]]:
    return [("FDSTORE", name) for name in names]


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FdStore]:
    """One whose keeper is not there yet."""
    store = FdStore(str(tmp_path / "a"))
    yield store
    store.close()


def fill(store: FdStore, fd: int) -> int:
    """Hold groups g0, g1, ... until the keeper takes no more; how many it has taken."""
    nr = 0
    while store.keep(f"g{nr}", [fd]):
        nr += 1
    return nr


def test_what_a_keeper_that_is_away_was_not_told_it_is_told_once_it_is_there(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    asked = []
    store.on_unsent = lambda: asked.append(store.nr_not_held)
    assert not store.keep("a", [fd])
    assert not store.keep("b", [fd])
    assert asked == [1, 2]
    assert not store.reconcile()
    with listening(tmp_path / "a") as keeper:
        assert store.reconcile()
        assert store.nr_not_held == 0
        assert take_all(keeper) == stored("a", "b")
    # It is gone, and another is there.
    assert not store.keep("c", [fd])
    (tmp_path / "a").unlink()
    with listening(tmp_path / "a") as keeper:
        assert store.reconcile()
        assert take_all(keeper) == stored("c")


def test_what_a_full_keeper_did_not_take_it_gets_once_it_reads(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    with listening(tmp_path / "a") as keeper:
        nr_taken = fill(store, fd)
        assert nr_taken > 0
        assert not store.keep("last", [fd])
        store.notify(READY="1")
        assert store.nr_not_held == 2
        assert store.is_keeper_full
        assert not store.needs_time  # keeper_fd() says when
        assert take_all(keeper) == stored(*(f"g{no}" for no in range(nr_taken)))
        assert store.reconcile()
        assert not store.is_keeper_full
        assert take_all(keeper) == [*stored(f"g{nr_taken}", "last"), ("READY", "")]


def test_a_keeper_that_comes_in_mid_send_gets_everything(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    with listening(tmp_path / "a"), listening(tmp_path / "b") as second:
        nr_groups = fill(store, fd) + 1
        store.lose()
        assert store.nr_not_held == nr_groups
        assert not store.reconcile()
        assert not store.keep("between", [fd])
        store.move(str(tmp_path / "b"))
        names: list[tuple[str, str]] = []
        while not store.reconcile():
            names += take_all(second)
        names += take_all(second)
        assert names == stored(*(f"g{no}" for no in range(nr_groups)), "between")


def test_what_is_released_before_it_was_sent_is_never_sent(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    store.keep("a", [fd])
    store.keep("b", [fd])
    store.release("a")
    with listening(tmp_path / "a") as keeper:
        assert store.reconcile()
        assert take_all(keeper) == stored("b")


def test_a_name_that_is_used_again_is_removed_before_it_is_stored_anew(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    with listening(tmp_path / "a") as keeper:
        nr_taken = fill(store, fd)
        store.release("g0")
        store.keep("g0", [fd])
        take_all(keeper)
        assert store.reconcile()
        assert take_all(keeper) == [("FDSTOREREMOVE", "g0"), *stored(f"g{nr_taken}", "g0")]


def test_a_group_that_cannot_be_sent_keeps_no_other_from_it(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    with listening(tmp_path / "a") as keeper:
        closed = os.dup(fd)
        os.close(closed)
        assert not store.keep("bad", [closed])
        store.keep("good", [fd])
        assert not store.reconcile()
        assert store.nr_not_held == 1
        assert take_all(keeper) == stored("good")


def test_what_a_keeper_says_it_has_no_room_for_is_sent_again(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    with listening(tmp_path / "a") as keeper:
        assert store.keep("a", [fd])
        _, fds, _, address = socket.recv_fds(keeper, 4096, 16)
        os.close(fds[0])
        assert store.take_refused() == []
        for name in ("a", "unknown"):
            keeper.sendto(Notice({NOT_HELD: name}).encode(), address)
        assert store.take_refused() == ["a"]
        assert store.nr_not_held == 1
        assert store.reconcile()
        assert take_all(keeper) == stored("a")


def test_a_copy_is_complete_or_is_none(fd: int, tmp_path: Path) -> None:
    store = FdStore(None)
    for no in range(3):
        assert store.keep(f"g{no}", [fd])
    assert store.nr_not_held == 0  # nobody is to hold anything
    with pytest.raises(OSError, match="No such file"):
        store.copy_to(str(tmp_path / "b"))
    with pytest.raises(ConnectionRefusedError):
        store.notify_copy(LEFT="1")
    with listening(tmp_path / "b") as copy:
        assert store.copy_to(str(tmp_path / "b")) == 3
        store.keep("late", [fd])
        store.release("g1")
        store.notify_copy(LEFT="1")
        assert take_all(copy) == [
            *stored("g0", "g1", "g2", "late"),
            ("FDSTOREREMOVE", "g1"),
            ("LEFT", ""),
        ]
    store.close()


def test_nobody_watches_the_socket_of_a_copy_which_may_be_closed_at_any_time(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    with listening(tmp_path / "a") as keeper, listening(tmp_path / "b"), Loop() as loop:
        watch = KeeperWatch(store, loop)
        assert store.copy_to(str(tmp_path / "b")) == 0
        nr = 0
        while store.reconcile():  # until the copy is full; the keeper reads all the while
            store.keep(f"g{nr}", [fd])
            take_all(keeper)
            nr += 1
        store.release("g0")  # which has the loop look what is to be sent
        loop.stop()
        loop.run()
        store.end_copy()
        for end in (ends := socket.socketpair()):  # one has the number that the copy's had
            loop.watch(end.fileno(), READ, lambda *_: None)
        for end in ends:
            loop.forget(end.fileno())
            end.close()
        watch.close()


def test_a_keeper_that_was_away_is_told_in_a_while_without_another_reason(
    store: FdStore, fd: int, tmp_path: Path
) -> None:
    with Loop() as loop:
        watch = KeeperWatch(store, loop)
        assert not store.keep("a", [fd])
        loop.stop()  # once it has been tried again at once
        loop.run()
        loop.begin_again()
        with listening(tmp_path / "a") as keeper:
            loop.watch(keeper.fileno(), READ, lambda *_: loop.leave())
            loop.once(ANSWER_SECONDS, loop.leave)
            loop.run()
            assert take_all(keeper) == stored("a")
        watch.close()
