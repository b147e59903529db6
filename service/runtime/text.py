# SPDX-License-Identifier: Apache-2.0
"""Values as short plain text that is safe to print on a terminal."""


def printable(value: object) -> str:
    """Return `value` with every control or format character escaped.

    Guests choose their names, which may contain terminal escapes or right-to-left marks.
    """
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii")
        for mark in str(value)
    )


def one_line(message: object) -> str:
    """Return `message` on one line: each run of white space is one blank, the rest printable()."""
    return printable(" ".join(str(message).split()))


def format_count(count: int) -> str:
    """Format a whole number with separated thousands: ``1,234,567``."""
    return f"{count:,}"


def format_share(part: float, whole: float) -> str:
    """Format `part` of `whole` in percent; ``-`` for no whole; 100% and 0% only if exact."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}".removesuffix(".0") + "%"


def format_seconds(seconds: float) -> str:
    """Format a duration in its two largest units: ``12s``, ``3m 05s``, ``1h 02m``, ``9d 04h``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"


def format_us(microseconds: float) -> str:
    """Format a latency: ``3.1us``, ``85us``, ``1.2ms``, ``2.5s``."""
    for limit, scale, unit in (
        (999.5, 1.0, "us"),
        (999_500.0, 1e3, "ms"),
        (float("inf"), 1e6, "s"),
    ):
        if microseconds < limit:
            return f"{microseconds / scale:.3g}{unit}"
    return "-"
