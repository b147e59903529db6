# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: everything that reads a peer's bytes, each as a function of bytes.

The first byte says how the rest is cut into pieces. A target returns, or raises what a peer's
error is; anything else, or an invariant that does not hold, is a defect.
"""

import contextlib
from collections.abc import Callable, Iterator

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.guest.page_refs import PageRef
from cowshed.transport.links.addresses import parse_stream_uri
from cowshed.transport.messages.dialogue import Asked, Dialogue
from cowshed.transport.messages.protocol import MAX_REQUEST_BYTES, Decoder, parse_body
from cowshed.transport.messages.stream_decoder import StreamDecoder
from cowshed.transport.nbd.block_link import BlockLink, BlockOp, Kind
from cowshed.transport.nbd.negotiation import Export, ExportRefused, NbdHandshake, WantsTls
from cowshed.transport.nbd.wire import Reply
from cowshed.transport.vmm.handshakes import HandshakeDecoder

MAX_HELD_BYTES = 1 << 20


def pieces(said: bytes) -> Iterator[bytes]:
    """Cut by the first byte: whole, or in steps that it gives."""
    if not said:
        return
    step = said[0] or len(said)
    for start in range(1, len(said), step):
        yield said[start : start + step]


def packets(said: bytes) -> None:
    """Packets of the unix socket; each piece is one, with descriptors by its length."""
    decoder = Decoder(MAX_REQUEST_BYTES)
    for piece in pieces(said):
        decoder.feed(piece, len(piece) % 3)
        decoder.check()


def stream(said: bytes) -> None:
    """Messages on a stream, and the conversation they make, as who accepted."""
    decoder, dialogue = StreamDecoder(MAX_REQUEST_BYTES), Dialogue(our_limit=4)
    for piece in pieces(said):
        for message in decoder.feed(piece):
            event = dialogue.take(message.tag, message.body)
            dialogue.check()
            if isinstance(event, Asked) and event.tag % 2:
                dialogue.answer(event.tag, {"ok": True})
        decoder.check()


def replies(said: bytes) -> None:
    """A block server's replies, to operations of every kind under way."""
    link = BlockLink()
    ops = [BlockOp(kind, 4096, 64) for kind in (Kind.WRITE, Kind.FLUSH, Kind.TRIM)]
    ops += [BlockOp(Kind.READ, 4096 * no, 64) for no in range(3)]
    for op in ops:
        op.memory = memoryview(bytearray(64))
        link.start(op)
    for piece in pieces(said):
        link.feed(piece)
        assert len(link._note) <= 8192
        link.take_finished()


class _Directory:
    def exports(self) -> list[Export]:
        return [Export("disk", "image", 1 << 20, True), Export("disk@g", "", 1 << 20, False)]

    def find(self, name: str) -> Export:
        for export in self.exports():
            if export.name == name:
                return export
        raise ExportRefused(Reply.ERR_UNKNOWN, "no such export")

    enter = find


def negotiation(said: bytes) -> None:
    """NBD's options, as its server; STARTTLS goes on in plain text here."""
    handshake = NbdHandshake(_Directory(), tls_offered=bool(said[:1] < b"\x80"), tls_required=False)
    handshake.greeting()
    for piece in pieces(said):
        if isinstance(handshake.outcome, WantsTls):
            handshake.secured(_Directory())
        if handshake.outcome is not None:
            return
        assert handshake.wanted_bytes > 0
        assert len(handshake.feed(piece)) < MAX_HELD_BYTES


def monitors(said: bytes) -> None:
    """Machine monitors' handshakes."""
    decoder = HandshakeDecoder()
    for piece in pieces(said):
        decoder.feed(piece, len(piece) % 2)


def references(said: bytes) -> None:
    """A page reference in a message."""
    ref = PageRef.from_body(parse_body(said).get("ref"))
    assert PageRef.from_body(ref.to_body()) == ref


def uris(said: bytes) -> None:
    """A URI that a peer's page reference may name."""
    with contextlib.suppress(UsageError):
        parse_stream_uri(said.decode("utf-8", "replace"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (packets, stream, replies, negotiation, monitors, references, uris)
}


def run(name: str, said: bytes) -> None:
    """Run a target; a peer's error is what it is for, everything else passes on."""
    with contextlib.suppress(PeerError):
        TARGETS[name](said)
