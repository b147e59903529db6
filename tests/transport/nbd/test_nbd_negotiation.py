# SPDX-License-Identifier: Apache-2.0
"""NBD's handshake: what each option is answered, and that nothing a client sends breaks it."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache.errors import PeerError
from cowshed.transport.nbd.negotiation import (
    MAX_HANDSHAKE_BYTES,
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    Aborted,
    Chosen,
    Export,
    ExportRefused,
    NbdHandshake,
    Negotiated,
    WantsTls,
)
from cowshed.transport.nbd.wire import OPTION_MAGIC, ExportFlag, NbdOption, Reply

DEBIAN = Export("debian", "a read-only image", 5 << 20, True, 65536)
OVERLAY = Export("debian@g", "a private copy", 5 << 20, False, 65536)
Answer = tuple[int, int, bytes]


class Shelf:
    """Two exports; notes which was entered."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def exports(self) -> Iterable[Export]:
        return [DEBIAN, OVERLAY]

    def find(self, name: str) -> Export:
        if name == "full":
            raise ExportRefused(Reply.ERR_POLICY, "no room")
        for export in (DEBIAN, OVERLAY):
            if name in (export.name, "" if export.read_only else export.name):
                return export
        raise ExportRefused(Reply.ERR_UNKNOWN, f"no export {name!r} here")

    def enter(self, name: str) -> Export:
        export = self.find(name)
        self.entered.append(export.name)
        return export


def option(kind: int, body: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, kind, len(body) if length is None else length) + body


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(raw)) + raw


def info_body(name: str, *wanted: int) -> bytes:
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def context_body(name: str, *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def replies(sent: bytes) -> list[Answer]:
    answers = []
    while sent:
        magic, kind, reply, length = struct.unpack_from(">QIII", sent)
        assert magic == 0x3E889045565A9
        assert len(sent) >= 20 + length
        answers.append((kind, reply, sent[20 : 20 + length]))
        sent = sent[20 + length :]
    return answers


def begun(flags: int = 3, *, tls_offered: bool = False, tls_required: bool = False) -> NbdHandshake:
    handshake = NbdHandshake(Shelf(), tls_offered=tls_offered, tls_required=tls_required)
    assert handshake.greeting() == b"NBDMAGICIHAVEOPT\x00\x03"
    assert handshake.feed(struct.pack(">I", flags)) == b""
    return handshake


def ask(handshake: NbdHandshake, kind: int, body: bytes = b"") -> list[Answer]:
    return replies(handshake.feed(option(kind, body)))


def kinds(answers: list[Answer]) -> list[int]:
    return [reply for _, reply, _ in answers]


def test_list_names_every_export() -> None:
    *exports, last = ask(begun(), NbdOption.LIST)
    assert [body[4 : 4 + body[3]] for _, _, body in exports] == [b"debian", b"debian@g"]
    assert last == (NbdOption.LIST, Reply.ACK, b"")


def test_info_tells_and_stays_and_go_enters() -> None:
    handshake = begun()
    expected = [
        (Reply.INFO, struct.pack(">HQH", 0, 5 << 20, 0x50F)),
        (Reply.INFO, b"\x00\x01debian"),
        (Reply.INFO, b"\x00\x02a read-only image"),
        (Reply.INFO, struct.pack(">HIII", 3, 1, 65536, 32 << 20)),
        (Reply.ACK, b""),
    ]
    for kind in (NbdOption.INFO, NbdOption.GO):
        answers = ask(handshake, kind, info_body("debian", 3, 2, 1, 1, 77))
        assert [(reply, body) for _, reply, body in answers] == expected
        assert all(option == kind for option, _, _ in answers)
    assert handshake.outcome == Chosen(DEBIAN, Negotiated(False, False, True, (0, 0, 0)))
    assert isinstance(handshake._directory, Shelf)
    assert handshake._directory.entered == ["debian"]


@pytest.mark.parametrize(("flags", "nr_zeroes"), [(3, 0), (1, 124), (0, 124), (2, 0)])
def test_export_name_is_padded_unless_the_client_wants_it_not(flags: int, nr_zeroes: int) -> None:
    handshake = begun(flags)
    sent = handshake.feed(option(NbdOption.EXPORT_NAME, b"debian@g"))
    assert sent == struct.pack(">QH", 5 << 20, 0xD6D) + bytes(nr_zeroes)
    assert isinstance(handshake.outcome, Chosen)


def test_a_writable_export_may_be_trimmed_and_zeroed_and_a_read_only_one_not() -> None:
    handshake = begun()
    handshake.feed(option(NbdOption.STRUCTURED_REPLY))
    flags = {}
    for name in ("debian", "debian@g"):
        body = ask(handshake, NbdOption.INFO, info_body(name))[0][2]
        flags[name] = ExportFlag(struct.unpack(">HQH", body)[2])
    assert ExportFlag.READ_ONLY in flags["debian"]
    assert flags["debian@g"] & ~flags["debian"] == (
        ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO
    )
    assert ExportFlag.SEND_DF in flags["debian"]


def test_the_empty_name_is_the_default_export() -> None:
    assert kinds(ask(begun(), NbdOption.INFO, info_body("", 1))) == [
        Reply.INFO,
        Reply.INFO,
        Reply.ACK,
    ]


@pytest.mark.parametrize(
    ("kind", "body", "reply"),
    [
        (4, b"", Reply.ERR_UNSUP),
        (12, b"x" * 100, Reply.ERR_UNSUP),
        (0xFFFFFFFF, b"", Reply.ERR_UNSUP),
        (NbdOption.LIST, b"x", Reply.ERR_INVALID),
        (NbdOption.STARTTLS, b"", Reply.ERR_POLICY),
        (NbdOption.STARTTLS, b"x", Reply.ERR_INVALID),
        (NbdOption.STRUCTURED_REPLY, b"x", Reply.ERR_INVALID),
        (NbdOption.EXTENDED_HEADERS, b"x", Reply.ERR_INVALID),
        (NbdOption.INFO, b"", Reply.ERR_INVALID),
        (NbdOption.INFO, info_body("absent"), Reply.ERR_UNKNOWN),
        (NbdOption.GO, info_body("full"), Reply.ERR_POLICY),
        (NbdOption.GO, info_body("debian") + b"x", Reply.ERR_INVALID),
        (NbdOption.GO, info_body("debian")[:-1], Reply.ERR_INVALID),
        (NbdOption.GO, b"\xff\xff\xff\xff", Reply.ERR_INVALID),
        (NbdOption.GO, string(b"\xff\xfe") + b"\0\0", Reply.ERR_INVALID),
        (NbdOption.GO, string("a\0b") + b"\0\0", Reply.ERR_INVALID),
        (NbdOption.GO, info_body("x" * 4097), Reply.ERR_TOO_BIG),
        (NbdOption.GO, string("debian") + b"\xff\xff", Reply.ERR_INVALID),
        (NbdOption.LIST_META_CONTEXT, context_body("absent"), Reply.ERR_UNKNOWN),
        (NbdOption.SET_META_CONTEXT, context_body("debian", "base:x"), Reply.ERR_INVALID),
        (NbdOption.LIST_META_CONTEXT, context_body("debian", "base"), Reply.ERR_INVALID),
        (NbdOption.LIST_META_CONTEXT, context_body("debian", *["a:"] * 65), Reply.ERR_TOO_BIG),
        (NbdOption.LIST_META_CONTEXT, string("debian") + b"\xff" * 4, Reply.ERR_TOO_BIG),
        (77, b"x" * (MAX_OPTION_BYTES + 1), Reply.ERR_TOO_BIG),
        (NbdOption.GO, b"x" * (MAX_OPTION_BYTES + 5), Reply.ERR_TOO_BIG),
    ],
)
def test_a_refused_option_leaves_the_ends_in_step(kind: int, body: bytes, reply: Reply) -> None:
    handshake = begun()
    ((option, got, text),) = ask(handshake, kind, body)
    assert (option, got) == (kind, reply)
    assert text.decode()
    assert "\n" not in text.decode()
    assert kinds(ask(handshake, NbdOption.LIST)) == [Reply.SERVER, Reply.SERVER, Reply.ACK]


def test_abort_is_acknowledged_and_ends() -> None:
    handshake = begun()
    assert kinds(ask(handshake, NbdOption.ABORT, b"whatever")) == [Reply.ACK]
    assert isinstance(handshake.outcome, Aborted)


@pytest.mark.parametrize("extended", [False, True])
def test_contexts_are_chosen_by_name(extended: bool) -> None:
    handshake = begun()
    ask(handshake, NbdOption.EXTENDED_HEADERS if extended else NbdOption.STRUCTURED_REPLY)
    names = ("cowshed:private", "base:allocation", "qemu:dirty-bitmap:x", "base:allocation")
    answers = ask(handshake, NbdOption.SET_META_CONTEXT, context_body("debian@g", *names))
    assert [(reply, body) for _, reply, body in answers] == [
        (Reply.META_CONTEXT, b"\0\0\0\x01base:allocation"),
        (Reply.META_CONTEXT, b"\0\0\0\x03cowshed:private"),
        (Reply.ACK, b""),
    ]
    ask(handshake, NbdOption.GO, info_body("debian@g"))
    assert handshake.outcome == Chosen(OVERLAY, Negotiated(True, extended, False, (1, 0, 3)))


def test_contexts_of_another_export_do_not_count() -> None:
    handshake = begun()
    ask(handshake, NbdOption.STRUCTURED_REPLY)
    ask(handshake, NbdOption.SET_META_CONTEXT, context_body("debian@g", "base:allocation"))
    ask(handshake, NbdOption.GO, info_body("debian"))
    assert handshake.outcome == Chosen(DEBIAN, Negotiated(True, False, True, (0, 0, 0)))


@pytest.mark.parametrize("again", [context_body("absent", "base:allocation"), b"\xff"])
def test_a_failed_choice_of_contexts_undoes_the_one_before(again: bytes) -> None:
    handshake = begun()
    ask(handshake, NbdOption.STRUCTURED_REPLY)
    ask(handshake, NbdOption.SET_META_CONTEXT, context_body("debian", "base:allocation"))
    ask(handshake, NbdOption.SET_META_CONTEXT, again)
    ask(handshake, NbdOption.GO, info_body("debian"))
    assert handshake.outcome == Chosen(DEBIAN, Negotiated(True, False, True, (0, 0, 0)))


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ([], [b"base:allocation", b"cowshed:resident", b"cowshed:private"]),
        (["cowshed:"], [b"cowshed:resident", b"cowshed:private"]),
        (["base:", "x:"], [b"base:allocation"]),
        (["cowshed:resident"], [b"cowshed:resident"]),
        (["x:y"], []),
    ],
)
def test_contexts_are_listed_by_query(queries: list[str], names: list[bytes]) -> None:
    answers = ask(begun(), NbdOption.LIST_META_CONTEXT, context_body("debian@g", *queries))
    assert [body[4:] for _, reply, body in answers if reply == Reply.META_CONTEXT] == names
    assert kinds(answers)[-1] == Reply.ACK


def test_what_is_private_is_no_question_for_an_image() -> None:
    answers = ask(begun(), NbdOption.LIST_META_CONTEXT, context_body("debian"))
    assert b"cowshed:private" not in b"".join(body for _, _, body in answers)


def test_structured_replies_after_extended_headers_are_refused() -> None:
    handshake = begun()
    ask(handshake, NbdOption.EXTENDED_HEADERS)
    assert kinds(ask(handshake, NbdOption.STRUCTURED_REPLY)) == [Reply.ERR_EXT_HEADER_REQD]


def test_nothing_but_tls_is_answered_where_tls_is_required() -> None:
    handshake = begun(tls_required=True)
    for kind, body in (
        (NbdOption.LIST, b""),
        (NbdOption.INFO, info_body("debian")),
        (NbdOption.GO, info_body("debian")),
        (NbdOption.STRUCTURED_REPLY, b""),
        (99, b"x" * (MAX_OPTION_BYTES + 1)),
    ):
        assert kinds(ask(handshake, kind, body)) == [Reply.ERR_TLS_REQD]
    assert kinds(ask(handshake, NbdOption.STARTTLS)) == [Reply.ACK]
    assert isinstance(handshake.outcome, WantsTls)
    with pytest.raises(PeerError, match="TLS only"):
        begun(tls_required=True).feed(option(NbdOption.EXPORT_NAME, b"debian"))


def test_tls_forgets_what_was_said_before_it() -> None:
    handshake = begun(tls_offered=True)
    ask(handshake, NbdOption.STRUCTURED_REPLY)
    ask(handshake, NbdOption.SET_META_CONTEXT, context_body("debian", "base:allocation"))
    ask(handshake, NbdOption.STARTTLS)
    handshake.secured(Shelf())
    assert kinds(ask(handshake, NbdOption.STARTTLS)) == [Reply.ERR_INVALID]
    ask(handshake, NbdOption.GO, info_body("debian"))
    assert handshake.outcome == Chosen(DEBIAN, Negotiated(False, False, True, (0, 0, 0)))


@pytest.mark.parametrize("kind", [NbdOption.STARTTLS, NbdOption.ABORT])
def test_bytes_behind_the_last_option_are_refused(kind: NbdOption) -> None:
    # Behind STARTTLS they would be plain text that counts as said in private.
    with pytest.raises(PeerError, match="after an option"):
        begun(tls_offered=True).feed(option(kind) + option(NbdOption.LIST))


@pytest.mark.parametrize(
    ("flags", "rest", "words"),
    [
        (4, b"", "client flags 0x4"),
        (1 << 31, b"", "client flags"),
        (3, b"x" * 16, "begins with 0x7878787878787878"),
        (2, option(NbdOption.LIST), "without fixed newstyle"),
        (3, option(NbdOption.EXPORT_NAME, b"absent"), "has no error reply: no export 'absent'"),
        (3, option(NbdOption.EXPORT_NAME, b"\xff"), "not UTF-8"),
        (3, option(NbdOption.EXPORT_NAME, length=4097), "name of 4097 bytes"),
        (3, option(NbdOption.LIST) * (MAX_OPTIONS + 1), "more than 1024 options"),
        (3, option(99, b"x" * MAX_HANDSHAKE_BYTES, length=0xFFFFFFFF), "handshake of over"),
    ],
)
def test_what_no_reply_can_mend_ends_the_connection(flags: int, rest: bytes, words: str) -> None:
    handshake = NbdHandshake(Shelf(), tls_offered=False, tls_required=False)
    with pytest.raises(PeerError, match=words) as caught:
        handshake.feed(struct.pack(">I", flags) + rest)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


BODIES = st.one_of(
    st.binary(max_size=40),
    st.builds(info_body, st.sampled_from(["", "debian", "debian@g", "full", "é" * 9])),
    st.builds(info_body, st.just("debian"), st.integers(0, 65535), st.integers(0, 4)),
    st.builds(context_body, st.just("debian@g"), st.sampled_from(["base:", "x:y", "nocolon"])),
    st.sampled_from([b"debian", b"", b"\0" * 70000]),
)
OPTIONS = st.builds(
    option,
    st.integers(0, 12) | st.integers(0, 0xFFFFFFFF),
    BODIES,
    length=st.none() | st.none() | st.integers(0, 100) | st.integers(0, 0xFFFFFFFF),
)


@given(
    st.sampled_from([0, 1, 2, 3, 3, 3, 3, 7]),
    st.lists(OPTIONS | st.binary(max_size=20), max_size=12),
    st.lists(st.integers(1, 70), min_size=1, max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_any_bytes_in_any_pieces_are_answered_or_refused(
    flags: int, parts: list[bytes], piece_sizes: list[int], offered: bool, required: bool
) -> None:
    handshake = NbdHandshake(Shelf(), tls_offered=offered, tls_required=required)
    arriving = struct.pack(">I", flags) + b"".join(parts)
    if len(arriving) > 5000:
        piece_sizes = [size * 1000 for size in piece_sizes]
    no = 0
    try:
        while arriving and handshake.outcome is None:
            size = min(piece_sizes[no % len(piece_sizes)], handshake.wanted_bytes)
            assert size > 0
            sent = handshake.feed(arriving[:size])
            arriving = arriving[size:]
            no += 1
            assert len(sent) < 4096 + 2 * len(DEBIAN.name) + 20
            if not (isinstance(handshake.outcome, Chosen) and not sent.startswith(b"\0\3\xe8\x89")):
                replies(sent)
            if isinstance(handshake.outcome, WantsTls):
                handshake.secured(Shelf())
    except PeerError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)


@given(st.lists(OPTIONS, max_size=12), st.integers(1, 200))
def test_how_bytes_are_cut_makes_no_difference(parts: list[bytes], piece_bytes: int) -> None:
    arriving = struct.pack(">I", 3) + b"".join(parts)
    outcomes = []
    for size in (len(arriving), max(piece_bytes, len(arriving) // 500)):
        handshake = NbdHandshake(Shelf(), tls_offered=False, tls_required=False)
        sent = b""
        end: object = None
        try:
            for start in range(0, len(arriving), size):
                if handshake.outcome is None:
                    sent += handshake.feed(arriving[start : start + size])
        except PeerError as error:
            end = "error" if handshake.outcome is None else "behind"
            if end == "error":
                sent = str(error).encode()
        outcomes.append((handshake.outcome, None if end == "error" else handshake.outcome))
        if handshake.outcome is None and end is None:
            outcomes[-1] = (None, sent)
    assert outcomes[0] == outcomes[1]


def test_memory_follows_what_arrived_and_dropped_bodies_take_none() -> None:
    handshake = begun()
    header = option(99, length=0xFFFFFFFF)
    piece = b"x" * 65536
    tracemalloc.start()
    try:
        handshake.feed(header)
        assert tracemalloc.get_traced_memory()[1] < 65536
        for _ in range(MAX_HANDSHAKE_BYTES // len(piece) - 1):
            assert handshake.feed(piece) == b""
        assert tracemalloc.get_traced_memory()[1] < 4 * len(piece)
    finally:
        tracemalloc.stop()


def test_names_are_told_as_they_are_called_and_not_as_they_were_asked_for() -> None:
    class Renamed(Shelf):
        def find(self, name: str) -> Export:
            return replace(DEBIAN, name="default/debian")

    handshake = NbdHandshake(Renamed(), tls_offered=False, tls_required=False)
    handshake.feed(struct.pack(">I", 3))
    body = ask(handshake, NbdOption.INFO, info_body("debian", 1))[1][2]
    assert body == b"\x00\x01default/debian"
