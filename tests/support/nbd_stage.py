# SPDX-License-Identifier: Apache-2.0
"""A stage whose image is served over NBD: exports, overlays and clients, closed in order."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import Client
from stage import PAGE, MakeStage, Stage, content

from cowshed.accounting import NO_QUOTA_BYTES, Account, Overlay, Quota, QuotaPolicy
from cowshed.cache._core import lib
from cowshed.transport.nbd.serving import NbdExport, NbdServer

TERMS = {
    "simple": {"structured": False, "extended": False},
    "structured": {"structured": True, "extended": False},
    "extended": {"structured": False, "extended": True},
}


class NbdStage:
    """NBD over one Stage. bytes is its image's content."""

    def __init__(self, stage: Stage, nr_workers: int = 3) -> None:
        self.stage = stage
        self.size_bytes = stage.size_bytes
        self.bytes = content(0, -(-stage.size_bytes // PAGE))[: stage.size_bytes]
        self.server = NbdServer(nr_workers)
        self.exports: list[NbdExport] = []
        self.overlays: list[Overlay] = []
        self.clients: list[Client] = []

    def export(self, overlay: Overlay | None = None) -> NbdExport:
        export = NbdExport(self.server, self.stage.image, overlay.cdata if overlay else None)
        self.exports.append(export)
        return export

    def overlay(
        self,
        quota: int | None = None,
        policy: QuotaPolicy = QuotaPolicy.STOP,
        *,
        files: Path | None = None,
        identity: bytes = b"i" * 32,
    ) -> Overlay:
        """An overlay in memory, or in a folder; quota in pages."""
        quota = Quota(NO_QUOTA_BYTES if quota is None else quota * PAGE, policy)
        account = Account(self.stage.image, quota)
        quota.close()
        try:
            overlay = Overlay.files(account, files, "x", identity) if files else Overlay(account)
        except BaseException:
            account.close()
            raise
        self.overlays.append(overlay)
        return overlay

    def disconnect(self) -> None:
        """End every client, then every export, then every overlay."""
        self.server.drain()
        for client in self.clients:
            client.link.close()
        for export in self.exports:
            export.close()
        for overlay in self.overlays:
            overlay.close()
            overlay.account.close()
        self.clients, self.exports, self.overlays = [], [], []

    def client(
        self,
        export: NbdExport,
        terms: str = "structured",
        *,
        read_only: bool = False,
        contexts: bool = True,
        early: bytes = b"",
        link: tuple[socket.socket, socket.socket] | None = None,
    ) -> Client:
        ours, theirs = link or socket.socketpair()
        client = Client(ours, **TERMS[terms])
        client.connection_no = self.server.attach(
            export,
            theirs.detach(),
            **TERMS[terms],
            read_only=read_only,
            context_ids=(1, 2, 3) if contexts and terms != "simple" else (),
            early=early,
        )
        self.clients.append(client)
        return client

    def close(self) -> None:
        for point in range(lib.POINT_NR):
            lib.point_release(point)
        self.disconnect()
        self.server.close()


@pytest.fixture
def nbd(make_stage: MakeStage) -> Iterator[NbdStage]:
    """256 pages and a half, all extents absent, capacity for all."""
    stage = NbdStage(make_stage(nr_pages=257, cut_bytes=PAGE // 2))
    yield stage
    stage.close()
