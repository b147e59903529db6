# SPDX-License-Identifier: Apache-2.0
"""The server's half of NBD's fixed newstyle handshake, without a socket: bytes in, bytes out.

    greeting --client flags--> options --GO, EXPORT_NAME--> Chosen
                                  |  ^------STARTTLS--------> WantsTls, secured(), options again
                                  |  ^------GO, EXPORT_NAME-> WantsExport, entered(), options again
                                  `-----ABORT-------------> Aborted

The caller must feed() received bytes and send the result, until `outcome` is set. An unknown,
forbidden or malformed option is refused and skipped by its length, so both ends stay in step.
Violations that no reply can repair (a wrong magic, too many options) are PeerError, after which
this object must not be used.

Bounds: an option's body is kept up to 64 KiB, a longer one is dropped as it arrives; a handshake
has at most 1,024 options and 4 MiB; the replies of one feed() are bounded by the options in it and
by the number of exports. Feeding at most `wanted_bytes` at a time makes that one option.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from cowshed.cache.errors import PeerError
from cowshed.transport.nbd.options import (
    BadOptionError,
    export_name,
    info_reply,
    parse_context_query,
    parse_info_request,
    reply,
)
from cowshed.transport.nbd.wire import (
    CLIENT_FLAGS,
    EXPORT_ANSWER,
    GREETING,
    MAX_STRING_BYTES,
    OPTION_HEADER,
    OPTION_MAGIC,
    ClientFlag,
    ExportFlag,
    Info,
    NbdOption,
    Reply,
)

__all__ = [
    "CONTEXTS",
    "MAX_PAYLOAD_BYTES",
    "Aborted",
    "Chosen",
    "Directory",
    "Export",
    "ExportPending",
    "ExportRefused",
    "NbdHandshake",
    "Negotiated",
    "WantsExport",
    "WantsTls",
]

MAX_PAYLOAD_BYTES: Final = 32 << 20
MAX_OPTION_BYTES: Final = 64 << 10
MAX_OPTIONS: Final = 1024
MAX_HANDSHAKE_BYTES: Final = 4 << 20
# A context's id on the wire is its index here plus 1; only overlays have the last.
CONTEXTS: Final = ("base:allocation", "cowshed:resident", "cowshed:private")

_CLIENT_FLAGS: Final = range((ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES) + 1)


@dataclass(frozen=True)
class Export:
    """What a client may learn of an export before it enters."""

    name: str
    description: str
    size_bytes: int
    read_only: bool
    preferred_bytes: int = 4096


class ExportRefused(Exception):  # noqa: N818  (an answer, not a failure)
    """An option is refused; `kind` is the reply, the text is for the client's user."""

    def __init__(self, kind: Reply, why: str) -> None:
        super().__init__(why)
        self.kind: Final = kind


class ExportPending(Exception):  # noqa: N818  (no failure either)
    """An export cannot be entered yet: NbdHandshake.entered() calls enter() again."""


class Directory(Protocol):
    """The exports that this client may see. All three may raise ExportRefused."""

    def exports(self) -> Iterable[Export]:
        """Return them all."""

    def find(self, name: str) -> Export:
        """Describe one, without side effects; the empty name is the default export."""

    def enter(self, name: str) -> Export:
        """Describe one and claim it for this client, which is about to use it.

        Raises ExportPending if that takes long.
        """


@dataclass(frozen=True)
class Negotiated:
    """The negotiated transmission phase. context_ids are in the order of CONTEXTS; 0: not set."""

    structured: bool
    extended: bool
    read_only: bool
    context_ids: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """The handshake is over: the client has entered an export, which its Directory claimed."""

    export: Export
    negotiated: Negotiated


@dataclass(frozen=True)
class WantsTls:
    """The caller must send the replies, start TLS, call secured() and feed plaintext."""


@dataclass(frozen=True)
class WantsExport:
    """The export is pending; the caller must call entered() once it no longer is."""


@dataclass(frozen=True)
class Aborted:
    """The client aborted; the caller must send the replies and close."""


class NbdHandshake:
    """One client's negotiation; it begins with a greeting() to send.

    _skip_bytes > 0 only between the header of an option to be skipped and the next header;
    _refusal is sent after the skip. Contexts are set only with structured replies on, for the
    export _contexts_of.
    """

    def __init__(self, directory: Directory, *, tls_offered: bool, tls_required: bool) -> None:
        self.outcome: Chosen | WantsTls | WantsExport | Aborted | None = None
        self.secure = False
        self._directory = directory
        self._tls_offered = tls_offered or tls_required
        self._tls_required = tls_required
        self._client_flags: ClientFlag | None = None
        self._arrived = bytearray()
        self._header: tuple[int, int] | None = None  # option, length
        self._pending: tuple[int, bytes] | None = None  # with WantsExport, and what was asked
        self._skip_bytes = 0
        self._refusal = b""
        self._nr_options = 0
        self._nr_bytes = 0
        self._forget()

    def _forget(self) -> None:
        self._structured = False
        self._extended = False
        self._context_ids = [0] * len(CONTEXTS)
        self._contexts_of: str | None = None

    @property
    def wanted_bytes(self) -> int:
        """The number of bytes that the next step needs; reading no more leaves the rest unread."""
        if self.outcome is not None:
            return 0
        if self._client_flags is None:
            return CLIENT_FLAGS.size - len(self._arrived)
        if self._skip_bytes:
            return min(self._skip_bytes, MAX_OPTION_BYTES)
        if self._header is not None:
            return self._header[1] - len(self._arrived)
        return OPTION_HEADER.size - len(self._arrived)

    def greeting(self) -> bytes:
        """Return the server's first bytes."""
        return GREETING

    def secured(self, directory: Directory) -> None:
        """Go on over TLS, with what this client may see; forget all options set before TLS."""
        assert isinstance(self.outcome, WantsTls)
        self.outcome = None
        self.secure = True
        self._directory = directory
        self._forget()

    def entered(self) -> bytes:
        """Enter the pending export again, and go on as feed() does."""
        assert self._pending is not None
        self.outcome, pending, self._pending = None, self._pending, None
        return self._answer(*pending) + self.feed(b"")

    def feed(self, arrived: bytes) -> bytes:
        """Take received bytes and return the bytes to send; may set `outcome`.

        Raises PeerError for a violation, and for bytes after the option that ends the handshake.
        """
        self._nr_bytes += len(arrived)
        if self._nr_bytes > MAX_HANDSHAKE_BYTES:
            raise PeerError(f"an NBD handshake of over {MAX_HANDSHAKE_BYTES} bytes")
        self._arrived += arrived
        to_send: list[bytes] = []
        while self._step(to_send):
            pass
        if self.outcome not in (None, WantsExport()) and self._arrived:
            raise PeerError(f"{len(self._arrived)} bytes sent after an option that must be last")
        return b"".join(to_send)

    def _step(self, to_send: list[bytes]) -> bool:
        """Make one step; False if not enough has arrived for it."""
        if self.outcome is not None:
            return False
        if self._skip_bytes:
            nr_skipped = min(self._skip_bytes, len(self._arrived))
            del self._arrived[:nr_skipped]
            self._skip_bytes -= nr_skipped
            if self._skip_bytes:
                return False
            to_send.append(self._refusal)
            return True
        if len(self._arrived) < (wanted := self._step_bytes()):
            return False
        taken = bytes(self._arrived[:wanted])
        del self._arrived[:wanted]
        if self._client_flags is None:
            self._take_flags(taken)
        elif self._header is None:
            to_send.append(self._take_header(taken))
        else:
            option, self._header = self._header[0], None
            to_send.append(self._answer(option, taken))
        return True

    def _step_bytes(self) -> int:
        if self._client_flags is None:
            return CLIENT_FLAGS.size
        return OPTION_HEADER.size if self._header is None else self._header[1]

    def _take_flags(self, taken: bytes) -> None:
        (flags,) = CLIENT_FLAGS.unpack(taken)
        if flags not in _CLIENT_FLAGS:
            raise PeerError(f"NBD client flags {flags:#x}: only 1 and 2 are known")
        self._client_flags = ClientFlag(flags)

    def _take_header(self, taken: bytes) -> bytes:
        magic, option, length = OPTION_HEADER.unpack(taken)
        if magic != OPTION_MAGIC:
            raise PeerError(f"an NBD option begins with {magic:#018x}, not {OPTION_MAGIC:#018x}")
        self._nr_options += 1
        if self._nr_options > MAX_OPTIONS:
            raise PeerError(f"more than {MAX_OPTIONS} options in an NBD handshake")
        if option == NbdOption.EXPORT_NAME:
            if length > MAX_STRING_BYTES:
                raise PeerError(f"an NBD export name of {length} bytes: {MAX_STRING_BYTES} at most")
        elif ClientFlag.FIXED_NEWSTYLE not in (self._client_flags or ClientFlag(0)):
            raise PeerError(f"NBD option {option} from a client without fixed newstyle")
        elif length > MAX_OPTION_BYTES:
            kind = (
                Reply.ERR_TLS_REQD if self._tls_required and not self.secure else Reply.ERR_TOO_BIG
            )
            why = f"an option of {length} bytes: {MAX_OPTION_BYTES} at most"
            self._skip_bytes, self._refusal = length, reply(option, kind, why)
            return b""
        self._header = option, length
        return b""

    # Complete options.

    def _answer(self, option: int, body: bytes) -> bytes:
        try:
            return self._dispatch(option, body)
        except ExportPending:
            self._pending = option, body
            self.outcome = WantsExport()
            return b""
        except BadOptionError as error:
            kind = Reply.ERR_TOO_BIG if error.too_big else Reply.ERR_INVALID
            return self._refuse(option, kind, str(error))
        except ExportRefused as error:
            return self._refuse(option, error.kind, str(error))

    def _refuse(self, option: int, kind: Reply, why: str) -> bytes:
        if option == NbdOption.EXPORT_NAME:
            raise PeerError(f"NBD_OPT_EXPORT_NAME has no error reply: {why}")
        return reply(option, kind, why.encode()[:MAX_STRING_BYTES])

    def _dispatch(self, option: int, body: bytes) -> bytes:
        if option == NbdOption.ABORT:
            self.outcome = Aborted()
            return reply(option, Reply.ACK)
        if option == NbdOption.STARTTLS:
            return self._on_starttls(body)
        if self._tls_required and not self.secure:
            raise ExportRefused(Reply.ERR_TLS_REQD, "this server speaks TLS only: use nbds")
        match option:
            case NbdOption.EXPORT_NAME:
                return self._on_export_name(body)
            case NbdOption.LIST:
                _without_body(body)
                return self._list()
            case NbdOption.INFO | NbdOption.GO:
                return self._on_info(option, body)
            case NbdOption.STRUCTURED_REPLY:
                _without_body(body)
                if self._extended:
                    why = "extended headers are on, and include structured replies"
                    raise ExportRefused(Reply.ERR_EXT_HEADER_REQD, why)
                self._structured = True
                return reply(option, Reply.ACK)
            case NbdOption.EXTENDED_HEADERS:
                _without_body(body)
                self._structured = self._extended = True
                return reply(option, Reply.ACK)
            case NbdOption.LIST_META_CONTEXT:
                return self._on_list_contexts(body)
            case NbdOption.SET_META_CONTEXT:
                return self._on_set_contexts(body)
        raise ExportRefused(Reply.ERR_UNSUP, f"option {option} is not supported")

    def _on_starttls(self, body: bytes) -> bytes:
        _without_body(body)
        if self.secure:
            raise BadOptionError("TLS is on")
        if not self._tls_offered:
            raise ExportRefused(Reply.ERR_POLICY, "this server has no certificate: use nbd")
        self.outcome = WantsTls()
        return reply(NbdOption.STARTTLS, Reply.ACK)

    def _list(self) -> bytes:
        replies = []
        for export in self._directory.exports():
            name = export.name.encode()
            payload = len(name).to_bytes(4, "big") + name + export.description.encode()
            replies.append(reply(NbdOption.LIST, Reply.SERVER, payload))
        return b"".join([*replies, reply(NbdOption.LIST, Reply.ACK)])

    def _on_info(self, option: int, body: bytes) -> bytes:
        request = parse_info_request(body)
        look = self._directory.enter if option == NbdOption.GO else self._directory.find
        export = look(request.name)
        answers = [
            info_reply(option, Info.EXPORT, "QH", (export.size_bytes, self._flags(export))),
        ]
        for kind, text in ((Info.NAME, export.name), (Info.DESCRIPTION, export.description)):
            if kind in request.wanted:
                encoded = text.encode()
                answers.append(info_reply(option, kind, f"{len(encoded)}s", (encoded,)))
        if Info.BLOCK_SIZE in request.wanted:
            sizes = (1, export.preferred_bytes, MAX_PAYLOAD_BYTES)
            answers.append(info_reply(option, Info.BLOCK_SIZE, "III", sizes))
        if option == NbdOption.GO:
            self._choose(export, request.name)
        return b"".join([*answers, reply(option, Reply.ACK)])

    def _on_export_name(self, body: bytes) -> bytes:
        name = export_name(body)
        export = self._directory.enter(name)
        self._choose(export, name)
        padding = 0 if ClientFlag.NO_ZEROES in (self._client_flags or ClientFlag(0)) else 124
        return EXPORT_ANSWER.pack(export.size_bytes, self._flags(export)) + bytes(padding)

    def _choose(self, export: Export, asked_name: str) -> None:
        """End the handshake in export; contexts count only if set by the name it is entered by."""
        ids = self._context_ids if self._contexts_of == asked_name else [0] * len(CONTEXTS)
        negotiated = Negotiated(self._structured, self._extended, export.read_only, tuple(ids))
        self.outcome = Chosen(export, negotiated)

    def _flags(self, export: Export) -> ExportFlag:
        flags = (
            ExportFlag.HAS_FLAGS
            | ExportFlag.SEND_FLUSH
            | ExportFlag.SEND_FUA
            | ExportFlag.CAN_MULTI_CONN
            | ExportFlag.SEND_CACHE
        )
        if self._structured:
            flags |= ExportFlag.SEND_DF
        if export.read_only:
            return flags | ExportFlag.READ_ONLY
        return flags | (
            ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO
        )

    # Metadata contexts.

    def _on_list_contexts(self, body: bytes) -> bytes:
        """List the contexts that match the queries; "NAMESPACE:" matches all of a namespace."""
        query = parse_context_query(body)
        available = _contexts(self._directory.find(query.name))
        matching = [
            context
            for context in available
            if not query.queries
            or context in query.queries
            or context[: context.index(":") + 1] in query.queries
        ]
        option = NbdOption.LIST_META_CONTEXT
        return _context_replies(option, [(0, context) for context in matching])

    def _on_set_contexts(self, body: bytes) -> bytes:
        self._context_ids = [0] * len(CONTEXTS)
        self._contexts_of = None
        if not self._structured:
            raise BadOptionError("contexts need structured replies: ask for those first")
        query = parse_context_query(body)
        available = _contexts(self._directory.find(query.name))
        chosen = [
            (no + 1, context)
            for no, context in enumerate(CONTEXTS)
            if context in available and context in query.queries
        ]
        for context_id, _ in chosen:
            self._context_ids[context_id - 1] = context_id
        self._contexts_of = query.name
        return _context_replies(NbdOption.SET_META_CONTEXT, chosen)


def _contexts(export: Export) -> tuple[str, ...]:
    return CONTEXTS[:-1] if export.read_only else CONTEXTS


def _context_replies(option: int, contexts: Iterable[tuple[int, str]]) -> bytes:
    return b"".join(
        [
            *(
                reply(option, Reply.META_CONTEXT, context_id.to_bytes(4, "big") + context.encode())
                for context_id, context in contexts
            ),
            reply(option, Reply.ACK),
        ]
    )


def _without_body(body: bytes) -> None:
    if body:
        raise BadOptionError(f"this option takes no body, and has one of {len(body)} bytes")
