# SPDX-License-Identifier: Apache-2.0
"""The numbers and layouts of NBD's handshake, all big-endian, as its proto.md names them.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "Handshake phase".
"""

from __future__ import annotations

import enum
import struct
from typing import Final

__all__ = [
    "CLIENT_FLAGS",
    "EXPORT_ANSWER",
    "GREETING",
    "GREETING_BYTES",
    "MAX_STRING_BYTES",
    "OPTION_HEADER",
    "OPTION_MAGIC",
    "REPLY_HEADER",
    "REPLY_MAGIC",
    "ClientFlag",
    "ExportFlag",
    "Info",
    "NbdOption",
    "Reply",
]

INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
REPLY_MAGIC: Final = 0x0003E889045565A9

# magic, magic, FIXED_NEWSTYLE | NO_ZEROES
GREETING: Final = struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 1 | 2)
GREETING_BYTES: Final = len(GREETING)
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")  # magic, option, length
REPLY_HEADER: Final = struct.Struct(">QIII")  # magic, option, reply type, length
EXPORT_ANSWER: Final = struct.Struct(">QH")  # size in bytes, transmission flags
# proto.md's limit of any string.
MAX_STRING_BYTES: Final = 4096


class ClientFlag(enum.IntFlag):
    """The flags with which a client answers the greeting."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class NbdOption(enum.IntEnum):
    """The options of the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(enum.IntEnum):
    """The replies to an option; errors from ERR_UNSUP on."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


class Info(enum.IntEnum):
    """The kinds of information on an export, of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(enum.IntFlag):
    """The transmission flags: what a client may do with an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
