# SPDX-License-Identifier: Apache-2.0
"""Clients that read slowly, ask too much, or come in numbers: nobody else notices."""

from __future__ import annotations

import contextlib
import socket

import pytest
from nbd_client import DISC, READ, WRITE
from nbd_stage import TERMS, NbdStage
from stage import PAGE, MakeStage, until

from cowshed.transport.nbd.serving import NbdEnd

EXTENT = 16 * PAGE


def idle(nbd: NbdStage) -> bool:
    """Whether no extent is held: all of them can be evicted."""
    nbd.stage.evict(*range(nbd.stage.image.nr_extents), at_once=True)
    return nbd.stage.image.resident_bytes == 0


@pytest.mark.parametrize("terms", list(TERMS))
def test_a_slow_reader_holds_nothing_and_gets_every_byte(make_stage: MakeStage, terms: str) -> None:
    nbd = NbdStage(make_stage(nr_pages=1024))
    try:
        nbd.stage.load()
        client = nbd.client(nbd.export(), terms)
        other = nbd.client(nbd.exports[0], terms)
        tickets = [client.start(READ, 0, nbd.size_bytes) for _ in range(4)]
        until(lambda: idle(nbd), "no extent is held for a client that does not read")
        assert other.read(PAGE, PAGE) == nbd.bytes[PAGE : 2 * PAGE]
        for ticket in tickets:
            assert client.finish(ticket).data == nbd.bytes
    finally:
        nbd.close()


def test_a_client_that_only_asks_and_never_reads_can_be_ended(nbd: NbdStage) -> None:
    nbd.stage.load()
    client = nbd.client(nbd.export())
    client.link.settimeout(0.2)
    _, header = client.header(READ, 0, 64 * PAGE)
    nr_sent = 0
    with contextlib.suppress(TimeoutError):  # the server stops reading: what it owes is bounded
        while nr_sent < 100_000:
            client.link.sendall(header * 50)
            nr_sent += 50
    assert nr_sent < 100_000
    nbd.server.detach(client.connection_no)
    nbd.server.drain()
    assert [end.reason for end in nbd.server.take_ended()] == [NbdEnd.DETACHED]
    assert idle(nbd)


def test_many_requests_in_one_packet_and_one_request_in_many(nbd: NbdStage) -> None:
    client = nbd.client(nbd.export(nbd.overlay()))
    headers = [client.header(READ, page * PAGE, PAGE) for page in range(200)]
    client.link.sendall(b"".join(header for _, header in headers))
    for page, (cookie, _) in enumerate(headers):
        assert client.finish(cookie).data == nbd.bytes[page * PAGE : (page + 1) * PAGE]
    cookie, header = client.header(WRITE, 100, 2 * PAGE)
    message = header + b"w" * 2 * PAGE
    for at in range(0, len(message), 611):
        client.link.sendall(message[at : at + 611])
    assert client.finish(cookie).error == 0
    assert client.read(100, 2 * PAGE) == b"w" * 2 * PAGE


def test_hundreds_of_connections_come_and_go_and_each_end_is_told_once(
    make_stage: MakeStage,
) -> None:
    nbd = NbdStage(make_stage())
    try:
        export = nbd.export()
        pairs = [socket.socketpair() for _ in range(400)]
        clients = [nbd.client(export, link=pair) for pair in pairs]
        for client in clients[::50]:
            assert client.read(5, 10) == nbd.bytes[5:15]
        for client in clients[::2]:
            client.link.close()
        for client in clients[1::2]:
            client.start(DISC)
        ends = []

        def all_ended() -> bool:
            ends.extend(nbd.server.take_ended())
            return len(ends) == len(clients)

        until(all_ended, "all of them ended")
        assert {end.reason for end in ends} <= {NbdEnd.EOF, NbdEnd.DISC}
        assert export.counters().connections == len(clients)
    finally:
        nbd.close()


def test_tcp_is_served_as_well(nbd: NbdStage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    client = nbd.client(nbd.export(), link=(ours, theirs))
    assert client.read(0, nbd.size_bytes) == nbd.bytes
