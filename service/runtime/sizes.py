# SPDX-License-Identifier: Apache-2.0
"""Byte counts as people write and read them.

Units are powers of 1024, as for QEMU and nbdkit: ``64M``, ``64MiB`` and ``67108864`` are one size.
``64MB`` is refused, since it may mean powers of 1000 or of 1024.
"""

import re

from cowshed.cache.errors import UsageError

_UNITS = "KMGTPE"
_MAX_BYTES = 2**63 - 1  # off_t: no file, and so no image or offset, is longer
_SIZE = re.compile(r"(?P<count>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")
_HOW = "write a number of bytes or a size such as 64K, 64M or 2G"


def parse_size(text: str, what: str = "size") -> int:
    """Return the number of bytes that `text` names, 0 to 2**63 - 1; errors call the value `what`.

    Accepts plain bytes (``4096``, ``4096B``) and K, M, G, T, P, E with or without ``iB``, in any
    case, blanks around them. Fractions are fine if the result is whole bytes (``1.5G``).
    Raises UsageError, one line, on anything else.
    """
    stripped = text.strip()
    match = _SIZE.fullmatch(stripped)
    # Valid sizes have at most 19 digits: refuse long texts before doing arithmetic on them.
    if match is None or len(stripped) > 40:
        raise UsageError(f"{what} {_shown(text)} is not a size: {_HOW}")
    unit = match["unit"].upper()
    if unit in ("", "B"):
        exponent = 0
    elif unit[0] in _UNITS and unit[1:] in ("", "IB"):
        exponent = _UNITS.index(unit[0]) + 1
    elif unit[0] in _UNITS and unit[1:] == "B":
        raise UsageError(
            f"{what} {_shown(text)} could mean powers of 1000 or of 1024: "
            f"write {match['count']}{unit[0]} for 1024"
        )
    else:
        raise UsageError(f"{what} {_shown(text)} has no known unit: {_HOW}")
    whole, _, decimals = match["count"].partition(".")
    parts: int = 10 ** len(decimals)
    nr_bytes, rest = divmod(int(whole + decimals) << 10 * exponent, parts)
    if rest:
        raise UsageError(f"{what} {_shown(text)} is not a whole number of bytes: {_HOW}")
    if nr_bytes > _MAX_BYTES:
        raise UsageError(
            f"{what} {_shown(text)} is more than {_MAX_BYTES} bytes: write a smaller size"
        )
    return nr_bytes


def format_bytes(nr_bytes: int) -> str:
    """Format bytes in about three significant digits: ``0``, ``512``, ``1.5K``, ``1.21G``.

    parse_size reads the result back, less than 1 % off `nr_bytes`.
    """
    if nr_bytes < 0:
        return "-" + format_bytes(-nr_bytes)
    exponent = 0
    # 1023.5 and more would be shown as 1024 of a unit: show 1 of the next.
    while 2 * nr_bytes >= 2047 << 10 * exponent and exponent < len(_UNITS):
        exponent += 1
    if exponent == 0:
        return str(nr_bytes)
    count = nr_bytes / (1 << 10 * exponent)
    nr_decimals = 2 if count < 10 else 1 if count < 100 else 0
    digits = f"{count:.{nr_decimals}f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return digits + _UNITS[exponent - 1]


def _shown(text: str) -> str:
    """Quote `text` on one short line, whatever it contains."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
