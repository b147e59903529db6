# SPDX-License-Identifier: Apache-2.0
"""The daemon's log: one line an event, for people and programs; no peer can forge or flood it.

    time=2026-11-01T09:12:44.031Z level=warning event=quota-stop guest=g1 image=debian uid=1000 ...

A line begins with time, level and event; fields follow, `message` last: a sentence with the cure,
if there is one. Values with blanks, quotes or unprintable characters are quoted and escaped as in
JSON. With `log = "json"` a line is a JSON object of the same fields.

Levels: notice, the default, logs start, stop and recoveries. Warnings and errors are above it;
info, below it, logs guests that come and go. Faults are not logged.

Any user who can connect can cause events. So lines are rate-limited per (event, uid); the rest are
counted, and the next line of that kind has their number as `suppressed`, or once a minute a line of
its own. A slow reader of the log delays nothing (log_sink.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cowshed.service.runtime.log_sink import LogSink

__all__ = [
    "LEVELS",
    "LOG_FORMATS",
    "EventLog",
    "FloodLimit",
    "LogFormat",
    "LogLevel",
    "format_event",
    "logging_abandon",
    "logging_begin",
    "logging_count_lost",
    "logging_end",
    "logging_report_lost",
    "logging_report_suppressed",
]

LogFormat = Literal["logfmt", "json"]
LogLevel = Literal["debug", "info", "notice", "warning", "error"]

NOTICE: Final = 25
LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "notice": NOTICE,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
LOG_FORMATS: Final[tuple[LogFormat, ...]] = ("logfmt", "json")

# Burst, and lines a second after it, of one event of one user. The second is for --verbose, which
# logs a line for each of a thousand guests that attach.
_BUDGET: Final = (20, 0.1)
_BUDGET_VERBOSE: Final = (2000, 50.0)
# At most this many (event, uid) are counted; the one unused for longest is forgotten.
_MOST_KEYS: Final = 1024

_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:@%+,~-]+")
_NAMES: Final = {number: name for name, number in LEVELS.items()}


class EventLog:
    """A module's log: `log.warning("dropped", "why, and the cure", pid=7, uid=1000)`.

    The first argument names the event, in words joined by '-'. Fields that are None are left out.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, message: str = "", /, **fields: Any) -> None:
        """Log what only a developer of cowshed wants."""
        self._log(logging.DEBUG, event, message, fields)

    def info(self, event: str, message: str = "", /, **fields: Any) -> None:
        """Log what happens often in normal operation."""
        self._log(logging.INFO, event, message, fields)

    def notice(self, event: str, message: str = "", /, **fields: Any) -> None:
        """Log a change that explains the other lines of a quiet log."""
        self._log(NOTICE, event, message, fields)

    def warning(self, event: str, message: str = "", /, **fields: Any) -> None:
        """Log what an operator should look at; the daemon goes on unaffected."""
        self._log(logging.WARNING, event, message, fields)

    def error(self, event: str, message: str = "", /, **fields: Any) -> None:
        """Log what an operator must act on."""
        self._log(logging.ERROR, event, message, fields)

    def crash(self, event: str, message: str = "", /, **fields: Any) -> None:
        """Log a defect of cowshed, with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, message, fields, with_traceback=True)

    def record(self, event: str, message: str = "", /, **fields: Any) -> logging.LogRecord:
        """Return a warning without logging it, for the log's own handler."""
        extra = {"event": event, "fields": fields}
        name, level = self._logger.name, logging.WARNING
        return self._logger.makeRecord(name, level, "", 0, "%s", (message,), None, extra=extra)

    def _log(
        self,
        level: int,
        event: str,
        message: str,
        fields: dict[str, Any],
        *,
        with_traceback: bool = False,
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"event": event, "fields": fields}
            self._logger.log(level, "%s", message, exc_info=with_traceback, extra=extra)


def format_event(fields: Mapping[str, Any], log_format: LogFormat) -> str:
    """Format the fields, in order, as one line without a newline; None values are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    if log_format == "json":
        return json.dumps(given, default=str)
    return " ".join(f"{name}={_quoted(value)}" for name, value in given.items())


def _quoted(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return '"' + "".join(_escaped(mark) for mark in text) + '"'


def _escaped(mark: str) -> str:
    """Return a character as JSON escapes it, or itself if it is printable and needs no escape."""
    if mark not in '"\\' and mark.isprintable():
        return mark
    return json.dumps(mark)[1:-1]


@dataclass
class _Bucket:
    tokens: float
    at: float
    nr_suppressed: int = 0


class FloodLimit:
    """Decides which lines are logged; pure, the caller gives the time. Not thread-safe.

    Invariants: at most _MOST_KEYS buckets, the last used last; in t seconds at most
    burst + t * rate lines of a key pass.
    """

    def __init__(self) -> None:
        self._buckets: OrderedDict[tuple[str, Any], _Bucket] = OrderedDict()

    def admit(self, event: str, uid: Any, *, verbose: bool, now: float) -> int | None:
        """Return how many lines of this key were suppressed before this one; None suppresses it."""
        burst, per_second = _BUDGET_VERBOSE if verbose else _BUDGET
        bucket = self._buckets.setdefault((event, uid), _Bucket(burst, now))
        self._buckets.move_to_end((event, uid))
        if len(self._buckets) > _MOST_KEYS:
            self._buckets.popitem(last=False)
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * per_second)
        bucket.at = now
        if bucket.tokens < 1:
            bucket.nr_suppressed += 1
            return None
        bucket.tokens -= 1
        nr_suppressed, bucket.nr_suppressed = bucket.nr_suppressed, 0
        return nr_suppressed

    def take_suppressed(self) -> list[tuple[str, Any, int]]:
        """Return (event, uid, number) of suppressed lines not reported yet, and forget them."""
        suppressed = [(*key, each.nr_suppressed) for key, each in self._buckets.items()]
        for each in self._buckets.values():
            each.nr_suppressed = 0
        return [entry for entry in suppressed if entry[2]]


class _Formatter(logging.Formatter):
    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._log_format = log_format

    def format(self, record: logging.LogRecord) -> str:
        # A record of another library has no event.
        event = getattr(record, "event", None)
        fields = dict(getattr(record, "fields", {}))
        traceback = self.formatException(record.exc_info) if record.exc_info else None
        return format_event(
            {
                "time": _timestamp(record.created),
                "level": _NAMES.get(record.levelno, record.levelname.lower()),
                "event": event or "message",
                "logger": None if event else record.name,
                **fields,
                "suppressed": getattr(record, "suppressed", None) or None,
                "message": record.getMessage() or None,
                "traceback": traceback,
            },
            self._log_format,
        )


def _timestamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03}Z"


class _Handler(logging.Handler):
    """Writes whole lines, in UTF-8 whatever the locale.

    Never waits for the log's reader: a line that cannot be written at once is lost and counted. The
    handler logs the number (log-lost) as soon as a line can be written again.
    """

    def __init__(self, fd: int, log_format: LogFormat) -> None:
        super().__init__()
        self.setFormatter(_Formatter(log_format))
        self._sink = LogSink(fd)
        self._count_lost: Callable[[int], None] | None = None
        self._nr_unreported = 0
        self._nr_uncounted = 0
        self._limit = FloodLimit()
        self._limit_lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record; stores in it how many of its kind were suppressed."""
        uid = getattr(record, "fields", {}).get("uid")
        with self._limit_lock:
            suppressed = self._limit.admit(
                getattr(record, "event", record.name),
                uid,
                verbose=record.levelno < NOTICE,
                now=time.monotonic(),
            )
        if suppressed is None:
            return False
        record.suppressed = suppressed
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's line."""
        try:
            line = self.format(record).encode()
        except Exception:
            self.handleError(record)
            return
        if self.report_lost():
            self._write(line)
        else:
            self._note_lost(1)

    def close(self) -> None:
        """Close the sink. Idempotent."""
        self._sink.close()
        super().close()

    def count_lost(self, count: Callable[[int], None] | None) -> None:
        """Call count(number) for lost lines from now on, and once for those lost before."""
        with self.lock or contextlib.nullcontext():
            self._count_lost = count
            self._note_lost(0)

    def report_lost(self) -> bool:
        """Log how many lines were lost, if any; False if that line cannot be written either."""
        with self.lock or contextlib.nullcontext():
            nr_lost = self._nr_unreported
            if nr_lost == 0:
                return True
            record = EventLog("cowshed").record(
                "log-lost", "the log's reader was too slow: check what reads it", lines=nr_lost
            )
            if not self._sink.write(self.format(record).encode() + b"\n"):
                return False
            self._nr_unreported -= nr_lost
            return True

    def _write(self, line: bytes) -> None:
        if not self._sink.write(line + b"\n"):
            self._note_lost(1)

    def _note_lost(self, nr: int) -> None:
        self._nr_unreported += nr
        self._nr_uncounted += nr
        if self._count_lost is not None and self._nr_uncounted:
            self._count_lost(self._nr_uncounted)
            self._nr_uncounted = 0

    def report_suppressed(self) -> None:
        """Log the numbers of suppressed lines that no later line has."""
        with self._limit_lock:
            suppressed = self._limit.take_suppressed()
        for event, uid, nr in suppressed:
            EventLog("cowshed").notice("suppressed", of=event, uid=uid, lines=nr)


def logging_begin(log_format: LogFormat, log_level: LogLevel, fd: int = 2) -> None:
    """Log to `fd` from `log_level` up, instead of where logging_begin sent it before."""
    logging_end()
    root = logging.getLogger()
    root.addHandler(_Handler(fd, log_format))
    root.setLevel(LEVELS[log_level])


def logging_report_suppressed() -> None:
    """Log how many lines were suppressed or lost, if no later line has; to be called regularly."""
    for handler in _handlers():
        handler.report_suppressed()
        handler.report_lost()


def logging_count_lost(count: Callable[[int], None] | None) -> None:
    """Call count(number) for lost lines from now on, and once for those lost before.

    None: stop calling.
    """
    for handler in _handlers():
        handler.count_lost(count)


def logging_report_lost() -> bool:
    """Log how many lines were lost, if no later line has; False if that line is lost too."""
    return sum(not handler.report_lost() for handler in _handlers()) == 0


def logging_end() -> None:
    """Log what was suppressed, and stop logging."""
    for handler in _handlers():
        handler.report_suppressed()
    logging_abandon()


def logging_abandon() -> None:
    """Stop logging without a last line; for a forked child, whose parent logs it."""
    for handler in _handlers():
        logging.getLogger().removeHandler(handler)
        handler.close()


def _handlers() -> list[_Handler]:
    return [each for each in logging.getLogger().handlers if isinstance(each, _Handler)]
