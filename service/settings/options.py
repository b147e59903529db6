# SPDX-License-Identifier: Apache-2.0
"""The table of the settings of `cowshed serve`: key, option, reader, bounds, default, help.

The TOML file's keys, the command line and its help, the checks of Config and docs/configuration.md
are made from it. A new setting is added here and as a field of Config, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cowshed.cache.errors import UsageError
from cowshed.service.runtime.logs import LEVELS, LOG_FORMATS
from cowshed.service.runtime.sizes import parse_size
from cowshed.service.settings.endpoint import Endpoint, parse_endpoint
from cowshed.service.settings.images import TRIMS
from cowshed.service.settings.quotas import parse_quota

__all__ = ["OPTIONS", "RUN_DIR_DEFAULT", "TABLES", "Option", "flag_of", "size_text", "text_of"]

RUN_DIR_DEFAULT: Final = "/run/cowshed"
# Tables of the file, which are not single settings.
TABLES: Final = ("images", "image", "domains", "tls")


@dataclass(frozen=True)
class Option:
    """One setting.

    read(key, value) turns the value from TOML or the command line into Config's; it raises
    UsageError, one line. kind and default are text for people; about is a sentence for the help,
    and the reference adds more. field is Config's, the key unless given; flag is the command line's
    option, "" if there is none. A path is relative to the file's directory, or to the current one.
    """

    key: str
    read: Callable[[str, object], Any]
    kind: str
    default: str
    about: str
    more: str = ""
    field: str = ""
    flag: str = ""
    envvar: str = ""
    is_path: bool = False
    is_repeatable: bool = False
    choices: tuple[str, ...] = ()
    bounds: tuple[int, int] | None = None
    unit: str = ""

    @property
    def name(self) -> str:
        """Config's field."""
        return self.field or self.key

    def check(self, value: Any) -> None:
        """Raise UsageError for a value of Config that is out of bounds or not among the choices."""
        if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
            least = f"{self.bounds[0]} (none)" if self.unit == "guests" else self.bounds[0]
            raise UsageError(f"{self.key} is {value}: use {least} to {self.bounds[1]} {self.unit}")
        if self.choices and value not in self.choices:
            some = ", ".join(self.choices[:-1])
            raise UsageError(f"{self.key} {value!r} is not {some} or {self.choices[-1]}: use one")


def text_of(key: str, value: object) -> str:
    """Check a text, which must not be empty or contain NUL."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"{key} is {value!r}: give text in quotes")
    return value


def flag_of(key: str, value: object) -> bool:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise UsageError(f"{key} is {value!r}: give true or false")
    return value


def size_text(key: str, value: object) -> str:
    """Return a size as text: a string, or a whole number of bytes (but not true or false)."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() < 64 else hex(value)  # which parse_size refuses
    raise UsageError(f'{key} is {value!r}: give a size such as "64M", in quotes')


def _size(key: str, value: object) -> int:
    return parse_size(size_text(key, value), key)


def _quota(key: str, value: object) -> int | None:
    return parse_quota(size_text(key, value))


def _endpoint(key: str, value: object) -> Endpoint:
    return parse_endpoint(text_of(key, value), key)


def _number_of(what: str) -> Callable[[str, object], int]:
    def read(key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{key} is {value!r}: give a whole number of {what}")
        return value

    return read


def _texts_of(what: str, example: str) -> Callable[[str, object], tuple[str, ...]]:
    def read(key: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(each, str) and each for each in value
        ):
            raise UsageError(f'{key} is {value!r}: give a list of {what}, as ["{example}"]')
        return tuple(value)

    return read


OPTIONS: Final = (
    Option(
        "capacity",
        _size,
        "size",
        "1G",
        "Memory for all images together.",
        "It is never exceeded: a load waits until another extent is evicted. At least two extents.",
        field="capacity_bytes",
        flag="--capacity",
    ),
    Option(
        "extent",
        _size,
        "size",
        "64K",
        "The unit of load, map and eviction.",
        "A power of two, 4K to 2M; an image can have its own. Extents of 2M have huge pages, if "
        "the daemon may mount a tmpfs: their loads take a fraction of the CPU time.",
        field="extent_bytes",
        flag="--extent",
    ),
    Option(
        "standby",
        _number_of("percent"),
        "number",
        "20",
        "Percent of the capacity that may keep the bytes of unmapped extents.",
        "A guest that touches one has it back without a read of the source, and eviction learns "
        "that it is used. 0 turns it off: extents are then dropped when they are unmapped.",
        flag="--standby",
        bounds=(0, 50),
        unit="percent",
    ),
    Option(
        "open_regions",
        text_of,
        "auto, pinned or off",
        "auto",
        "Which regions of 2 MiB the kernel maps for guests by itself, at its own speed.",
        "auto: those that guests use much, if the capacity is 8M or more, and what is pinned; "
        "pinned: only that. All pages of an open region are charged to its guest, until the quota "
        "needs them.",
        flag="--open-regions",
        choices=("auto", "pinned", "off"),
    ),
    Option(
        "loaders",
        _number_of("threads"),
        "number",
        "4",
        "Threads that load extents.",
        bounds=(1, 64),
        unit="threads",
    ),
    Option(
        "autowarm",
        flag_of,
        "true or false",
        "true",
        "Load what guests touched in earlier runs; loads that guests wait for go first.",
    ),
    Option(
        "run_dir",
        text_of,
        "directory",
        RUN_DIR_DEFAULT,
        "Where to put the sockets.",
        flag="--run-dir",
        envvar="COWSHED_RUN_DIR",
        is_path=True,
    ),
    Option(
        "state_dir",
        text_of,
        "directory",
        "RUN_DIR/state",
        "Where recorded working sets and the record of handoffs are kept.",
        is_path=True,
    ),
    Option(
        "quota",
        _quota,
        'size, or "none"',
        "none",
        "Private bytes of guests that name no quota.",
        field="default_quota_bytes",
    ),
    Option(
        "on_quota",
        text_of,
        "stop, kill or allow",
        "stop",
        "What happens at a guest's quota: the writer waits, gets SIGBUS, or is only counted.",
        field="default_on_quota",
        choices=("stop", "kill", "allow"),
    ),
    Option(
        "network_quota",
        _quota,
        'size, or "none"',
        "as quota",
        "The most that guests whose pages the backend keeps may ask for.",
        field="network_quota_bytes",
    ),
    Option(
        "listen",
        _texts_of("URIs", "tls://0.0.0.0:7000"),
        "list of URIs",
        "nowhere",
        "Accept guests at tcp://, tls:// or vsock:// too.",
        "Plain tcp is for networks where everybody may read every image of the default domain.",
        flag="--listen",
        is_repeatable=True,
    ),
    Option(
        "nbd",
        _endpoint,
        "HOST:PORT",
        "RUN_DIR/nbd.sock only",
        "Speak NBD there too.",
        flag="--nbd",
    ),
    Option(
        "trim",
        text_of,
        "image or zeros",
        "image",
        "How a range that an NBD client trimmed reads: as the image again, or as zeros.",
        flag="--trim",
        choices=TRIMS,
    ),
    Option(
        "overlay_dir",
        text_of,
        "directory",
        "in memory",
        "Keep the private pages of guests that map nothing in files there.",
        flag="--overlay-dir",
        is_path=True,
    ),
    Option(
        "image_dir",
        text_of,
        "directory",
        "none are kept",
        "Keep there the images whose bytes come in handoffs; they are served from then on.",
        flag="--image-dir",
        is_path=True,
    ),
    Option(
        "handoff_from",
        _texts_of("names", "b.example"),
        "list of names",
        "none",
        "Backends, by the name in their certificate, that may drain to this one by tls.",
    ),
    Option(
        "accept_handoff",
        flag_of,
        "true or false",
        "false",
        "Let any backend hand its guests over by plain tcp.",
        flag="--accept-handoff",
    ),
    Option(
        "late_wait",
        _number_of("seconds"),
        "seconds",
        "60",
        "How long to wait for a source backend that is lost in post-copy to come back.",
        bounds=(0, 86400),
        unit="seconds",
    ),
    Option(
        "keeper",
        flag_of,
        "true or false",
        "true",
        "Run a keeper: it holds all descriptors for the next backend, and starts it if this dies.",
        "Under systemd, systemd always does that instead.",
    ),
    Option(
        "metrics",
        _endpoint,
        "HOST:PORT",
        "nowhere",
        "Serve Prometheus metrics there, and a page to browsers.",
        flag="--metrics",
    ),
    Option(
        "guest_metrics",
        _number_of("guests"),
        "number",
        "0",
        "How many guests may have metrics of their own.",
        bounds=(0, 100_000),
        unit="guests",
    ),
    Option(
        "log",
        text_of,
        "logfmt or json",
        "logfmt",
        "The form of the log's lines.",
        field="log_format",
        choices=tuple(LOG_FORMATS),
    ),
    Option(
        "log_level",
        text_of,
        ", ".join(LEVELS),
        "notice",
        "The lowest level that is logged; info logs guests that come and go.",
        choices=tuple(LEVELS),
    ),
)
