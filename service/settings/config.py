# SPDX-License-Identifier: Apache-2.0
"""What `cowshed serve` is told: by a TOML file, the environment, options; the last word wins.

A file has this shape; every key is optional, and an unknown one is an error::

    capacity = "2G"                 # memory for all images together
    run_dir  = "/run/cowshed"       # sockets
    state_dir = "/var/lib/cowshed"  # recorded working sets; RUN_DIR/state unless given
    extent   = "64K"                # unit of load and eviction: a power of two, 4K to 2M
    loaders  = 4                    # threads that load extents
    handoff_from = ["b.example"]    # backends, by certificate, that may drain to us
    accept_handoff = false          # whether any backend may, by tcp without TLS
    late_wait = 60                  # seconds that a lost source has to come again (post-copy)
    autowarm = true                 # load what guests touched in earlier runs, behind their demand
    keeper   = true                 # a process that starts the backend again if it dies
    quota    = "64M"                # private bytes of guests that name no quota; or "none"
    on_quota = "stop"               # at the limit: stop the writer, kill it, or allow (count)
    network_quota = "64M"           # the most that guests from networks may ask for; as quota
    metrics  = "localhost:9432"     # where Prometheus may ask; nowhere unless given
    guest_metrics = 0               # how many guests may have metrics of their own
    listen   = ["tls://0.0.0.0:7000"] # guests from elsewhere: tcp://, tls://, vsock://; nowhere
    nbd      = "localhost:10809"    # NBD over TCP there too; only RUN_DIR/nbd.sock unless given
    trim     = "image"              # what NBD clients' trimmed ranges read as: image, or zeros
    overlay_dir = "/var/lib/cowshed/overlays"  # NBD guests' private pages; in memory unless given
    log      = "logfmt"             # or "json"
    log_level = "notice"            # debug, info (guests come and go), notice, warning or error

    [images]
    debian = "/srv/images/debian.raw"     # a relative path starts at this file's directory
    alpine = "file:///srv/images/alpine.raw"

    [[image]]                       # the same, with room for a sharing domain; repeatable
    name = "debian"
    source = "/srv/images/debian.raw"
    domain = "tenant-a"             # "default" unless given
    trim = "zeros"                  # as above, for this image
    uids = [1001, "alice"]          # who may use it, all of its domain unless given; also gids
    clients = ["vm7.example"]       # the same, by the name in a TLS client's certificate

    [tls]                           # for what listens on networks; see tls_config.py
    cert = "server.pem"
    key = "server.key"
    ca = "ca.pem"

    [domains.tenant-a]              # who its guests are; see domains.py
    uids = [1001, "alice"]

Everything is checked here, before anything is opened, except whether sources can be read: that is
the image's to say. Each error is one UsageError naming the thing, the value and the cure.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cowshed.cache.errors import UsageError
from cowshed.cache.images import DEFAULT_DOMAIN
from cowshed.service.runtime.logs import LEVELS, LOG_FORMATS, LogFormat, LogLevel
from cowshed.service.runtime.sizes import format_bytes, parse_size
from cowshed.service.settings.config_text import config_text_read
from cowshed.service.settings.domains import (
    DomainMembers,
    Domains,
    check_key,
    parse_domains,
    parse_members,
)
from cowshed.service.settings.endpoint import Endpoint, parse_endpoint
from cowshed.service.settings.handoff_rules import HandoffRules
from cowshed.service.settings.images import (
    ImageSpec,
    absolute,
    check_trim,
    image_spec,
    parse_image,
)
from cowshed.service.settings.tls_config import TlsConfig, parse_tls

OnQuota = Literal["stop", "kill", "allow"]

RUN_DIR_DEFAULT = "/run/cowshed"
SOCKET_NAME = "cowshed.sock"
PAGE_BYTES = 4096
CAPACITY_DEFAULT_BYTES = 1 << 30
CAPACITY_MIN_EXTENTS = 2  # one stays while the next is loaded
EXTENT_DEFAULT_BYTES = 64 << 10
EXTENT_MIN_BYTES = 4 << 10
EXTENT_MAX_BYTES = 2 << 20
LOADERS_DEFAULT = 4
LOADERS_MAX = 64
GUEST_METRICS_MAX = 100_000
LATE_WAIT_MAX = 86400
SOCKET_PATH_MAX_BYTES = 107  # sun_path less its NUL, unix(7)

_KEYS = (
    "capacity",
    "run_dir",
    "state_dir",
    "extent",
    "loaders",
    "keeper",
    "quota",
    "on_quota",
    "network_quota",
    "metrics",
    "guest_metrics",
    "nbd",
    "trim",
    "listen",
    "handoff_from",
    "accept_handoff",
    "late_wait",
    "autowarm",
    "overlay_dir",
    "image_dir",
    "tls",
    "log",
    "log_level",
    "images",
    "image",
    "domains",
)
_MEMBER_KEYS = ("uids", "gids", "clients")
_IMAGE_KEYS = ("name", "source", "domain", "trim", *_MEMBER_KEYS)


@dataclass(frozen=True)
class Config:
    """A complete, checked configuration; see the module's text for what each value means.

    `default_quota_bytes` and `network_quota_bytes` None are no limits. Paths are absolute. text is
    the file's that it is of, if there is one: for this daemon's later processes. Raises
    UsageError when it is made with values that do not hold.
    """

    images: tuple[ImageSpec, ...]
    run_dir: Path
    state_dir: Path
    capacity_bytes: int = CAPACITY_DEFAULT_BYTES
    extent_bytes: int = EXTENT_DEFAULT_BYTES
    loaders: int = LOADERS_DEFAULT
    keeper: bool = True
    default_quota_bytes: int | None = None
    default_on_quota: OnQuota = "stop"
    network_quota_bytes: int | None = None
    metrics: Endpoint | None = None
    guest_metrics: int = 0
    nbd: Endpoint | None = None
    trim: str = "image"
    listen: tuple[str, ...] = ()
    handoff_rules: HandoffRules = field(default_factory=HandoffRules)
    late_wait: int = 60
    autowarm: bool = True
    overlay_dir: Path | None = None
    image_dir: Path | None = None
    tls: TlsConfig | None = None
    log_format: LogFormat = "logfmt"
    log_level: LogLevel = "notice"
    domains: Domains = field(default_factory=Domains)
    text: str | None = field(default=None, repr=False, compare=False)

    def trims_to_zeros(self, domain: str, name: str) -> bool:
        """Whether what an NBD client trims of an image of that name reads as zeros then."""
        for spec in self.images:
            if (spec.domain, spec.name) == (domain, name) and spec.trim is not None:
                return spec.trim == "zeros"
        return self.trim == "zeros"

    def __post_init__(self) -> None:
        extent = self.extent_bytes
        if not EXTENT_MIN_BYTES <= extent <= EXTENT_MAX_BYTES or extent & (extent - 1):
            raise UsageError(f"extent of {extent} bytes: use a power of two, 4K to 2M, such as 64K")
        least_bytes = CAPACITY_MIN_EXTENTS * extent
        if self.capacity_bytes < least_bytes:
            raise UsageError(
                f"capacity of {self.capacity_bytes} bytes is less than {CAPACITY_MIN_EXTENTS} "
                f"extents of {format_bytes(extent)}: give {format_bytes(least_bytes)} or more"
            )
        if not 1 <= self.loaders <= LOADERS_MAX:
            raise UsageError(f"loaders is {self.loaders}: use 1 to {LOADERS_MAX} threads")
        if not 0 <= self.guest_metrics <= GUEST_METRICS_MAX:
            raise UsageError(
                f"guest_metrics is {self.guest_metrics}: use 0 (none) to {GUEST_METRICS_MAX} guests"
            )
        if not 0 <= self.late_wait <= LATE_WAIT_MAX:
            raise UsageError(f"late_wait is {self.late_wait}: use 0 to {LATE_WAIT_MAX} seconds")
        check_trim(self.trim)
        if self.default_quota_bytes is not None:
            check_quota(self.default_quota_bytes)
        if self.default_on_quota not in get_args(OnQuota):
            raise UsageError(
                f"on_quota {self.default_on_quota!r} is not stop, kill or allow: use one"
            )
        for key, value, choices in (
            ("log", self.log_format, LOG_FORMATS),
            ("log_level", self.log_level, tuple(LEVELS)),
        ):
            if value not in choices:
                raise UsageError(
                    f"{key} {value!r} is not {', '.join(choices[:-1])} or {choices[-1]}: use one"
                )
        if not self.images and self.image_dir is None:
            raise UsageError(
                "no image to serve: give --image NAME=SOURCE or [images] in --config, or "
                "--image-dir DIR for images that come in handoffs"
            )
        seen: set[str] = set()
        for image in self.images:
            if image.label in seen:
                raise _given_twice(image)
            seen.add(image.label)
        socket_path(self.run_dir)


def socket_path(run_dir: Path) -> Path:
    """Where the daemon of `run_dir` listens, absolute; UsageError if no socket can be there."""
    path = absolute(run_dir) / SOCKET_NAME
    nr_bytes = len(os.fsencode(path))
    if nr_bytes > SOCKET_PATH_MAX_BYTES:
        raise UsageError(
            f"socket path {str(path)!r} has {nr_bytes} bytes and the kernel takes "
            f"{SOCKET_PATH_MAX_BYTES}: choose a shorter --run-dir"
        )
    return path


def check_quota(quota_bytes: int) -> None:
    """Raise UsageError for a quota that holds no page: its guest would stop at its first write."""
    if quota_bytes < PAGE_BYTES:
        raise UsageError(
            f"quota of {quota_bytes} bytes is less than a page: "
            "give 4K or more, or 'none' for no limit"
        )


def parse_quota(text: str) -> int | None:
    """A quota as people write it: a size, or ``none`` for no limit. Raises UsageError."""
    if text.strip().lower() == "none":
        return None
    quota_bytes = parse_size(text, "quota")
    check_quota(quota_bytes)
    return quota_bytes


def config_load(
    *,
    config_file: Path | None = None,
    images: Sequence[str] = (),
    capacity: str | None = None,
    run_dir: str | None = None,
    metrics: str | None = None,
    nbd: str | None = None,
    trim: str | None = None,
    listen: Sequence[str] = (),
    accept_handoff: bool = False,
    overlay_dir: str | None = None,
    image_dir: str | None = None,
    no_keeper: bool = False,
    verbose: bool = False,
) -> Config:
    """The configuration of `config_file` (None: none) overridden by options that are given.

    `images` are NAME=SOURCE[,domain=DOMAIN][,trim=WHAT]; one of the same name and domain as an
    image of the file takes its place. `run_dir` is --run-dir or $COWSHED_RUN_DIR; `verbose` is a
    log_level of info, at least. Reads the file, looks up users and groups that it names, and
    nothing else. Raises UsageError, one line.
    """
    table: Mapping[str, Any] = {}
    file_text = None
    if config_file is not None:
        table, file_text = _read_table(config_file)
    file_dir = Path.cwd() if config_file is None else absolute(config_file).parent

    specs: dict[str, ImageSpec] = {}
    try:
        for spec in _images_of(table, file_dir):
            if spec.label in specs:
                raise _given_twice(spec)
            specs[spec.label] = spec
        settings = _settings_of(table)
        paths = {
            key: file_dir / _text_of(table, key)
            for key in ("run_dir", "state_dir", "overlay_dir", "image_dir")
            if key in table
        }
        if "tls" in table:
            settings["tls"] = parse_tls(table["tls"], file_dir)
    except UsageError as error:
        raise UsageError(f"{config_file}: {error}") from error

    named: set[str] = set()
    for text in images:
        name, source, domain, image_trim = parse_image(text)
        spec = image_spec(name, source, Path.cwd(), domain, trim=image_trim)
        if spec.label in named:
            raise _given_twice(spec)
        named.add(spec.label)
        specs[spec.label] = spec

    if capacity is not None:
        settings["capacity_bytes"] = parse_size(capacity, "capacity")
    if metrics is not None:
        settings["metrics"] = parse_endpoint(metrics, "metrics")
    if accept_handoff:
        known = settings.get("handoff_rules", HandoffRules())
        settings["handoff_rules"] = HandoffRules(known.clients, plain=True)
    if listen:
        settings["listen"] = tuple(listen)
    if trim is not None:
        settings["trim"] = trim
    if nbd is not None:
        settings["nbd"] = parse_endpoint(nbd, "nbd")
    if run_dir:
        paths["run_dir"] = Path(run_dir)
    if overlay_dir is not None:
        paths["overlay_dir"] = Path(_text_of({"overlay_dir": overlay_dir}, "overlay_dir"))
    if image_dir is not None:
        paths["image_dir"] = Path(_text_of({"image_dir": image_dir}, "image_dir"))
    for key in ("overlay_dir", "image_dir"):
        if key in paths:
            settings[key] = absolute(paths[key])
    if no_keeper:
        settings["keeper"] = False
    if verbose and settings.get("log_level") != "debug":
        settings["log_level"] = "info"
    run_dir_path = absolute(paths.get("run_dir", Path(RUN_DIR_DEFAULT)))
    state_dir_path = absolute(paths.get("state_dir", run_dir_path / "state"))
    return Config(
        images=tuple(specs.values()),
        run_dir=run_dir_path,
        state_dir=state_dir_path,
        text=file_text,
        **settings,
    )


def _read_table(config_file: Path) -> tuple[Mapping[str, Any], str]:
    """The top-level table of a TOML file, its keys known to be ours, and the file's text."""
    import tomllib  # most processes have no file to read

    try:
        text = config_text_read(config_file)
        table = tomllib.loads(text)
    except OSError as error:
        raise UsageError(
            f"cannot read configuration {str(config_file)!r}: {error.strerror}: check --config"
        ) from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, a number of 5000 digits
        raise UsageError(f"{config_file} is not TOML: {error}") from error
    for key in table:
        check_key(key, _KEYS, f"{config_file}: ")
    return table, text


def _given_twice(image: ImageSpec) -> UsageError:
    within = "" if image.domain == DEFAULT_DOMAIN else " in a domain"
    return UsageError(f"image {image.label!r} is given twice: use each name once{within}")


def _images_of(table: Mapping[str, Any], file_dir: Path) -> Iterator[ImageSpec]:
    """The images of [images], then those of [[image]]."""
    images = table.get("images", {})
    if not isinstance(images, dict):
        raise UsageError(f'images is {images!r}: write [images] and NAME = "SOURCE" lines')
    for name, source in images.items():
        if not isinstance(source, str):
            raise UsageError(f"image {name!r} has source {source!r}: give a path in quotes")
        yield image_spec(name, source, file_dir)
    listed = table.get("image", [])
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise UsageError(f"image is {listed!r}: write [[image]], and name and source below it")
    for each in listed:
        for key in each:
            check_key(key, _IMAGE_KEYS, f"image {each.get('name', '?')!r} has ")
        for key in ("name", "source"):
            if key not in each:
                raise UsageError(f'an [[image]] has no {key}: write {key} = "..." below it')
        yield image_spec(
            _text_of(each, "name"),
            _text_of(each, "source"),
            file_dir,
            _text_of(each, "domain") if "domain" in each else DEFAULT_DOMAIN,
            _allowed_of(each),
            _text_of(each, "trim") if "trim" in each else None,
        )


def _allowed_of(each: Mapping[str, Any]) -> DomainMembers | None:
    """Who may use an [[image]]; None is all of its domain."""
    lists = {key: each[key] for key in _MEMBER_KEYS if key in each}
    return parse_members(f"image {each['name']!r}", lists) if lists else None


def _settings_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Config's fields (images and paths apart) for the keys that the file holds."""
    settings: dict[str, Any] = {"domains": parse_domains(table.get("domains", {}))}
    for key, into in (("capacity", "capacity_bytes"), ("extent", "extent_bytes")):
        if key in table:
            settings[into] = parse_size(_size_text(table, key), key)
    if "quota" in table:
        settings["default_quota_bytes"] = parse_quota(_size_text(table, "quota"))
    settings["network_quota_bytes"] = settings.get("default_quota_bytes")
    if "network_quota" in table:
        settings["network_quota_bytes"] = parse_quota(_size_text(table, "network_quota"))
    if "on_quota" in table:
        settings["default_on_quota"] = _text_of(table, "on_quota")
    for key, into in (("log", "log_format"), ("log_level", "log_level"), ("trim", "trim")):
        if key in table:
            settings[into] = _text_of(table, key)
    for key in ("metrics", "nbd"):
        if key in table:
            settings[key] = parse_endpoint(_text_of(table, key), key)
    for key, what in (
        ("loaders", "threads"),
        ("guest_metrics", "guests"),
        ("late_wait", "seconds"),
    ):
        if key in table:
            value = table[key]
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"{key} is {value!r}: give a whole number of {what}")
            settings[key] = value
    if "listen" in table:
        uris = table["listen"]
        if not isinstance(uris, list) or not all(isinstance(uri, str) and uri for uri in uris):
            raise UsageError(f'listen is {uris!r}: give a list of URIs, as ["tls://0.0.0.0:7000"]')
        settings["listen"] = tuple(uris)
    for key in ("keeper", "autowarm"):
        if key in table:
            settings[key] = _flag_of(table, key)
    if "handoff_from" in table or "accept_handoff" in table:
        settings["handoff_rules"] = _handoff_rules_of(table)
    return settings


def _flag_of(table: Mapping[str, Any], key: str) -> bool:
    value = table[key]
    if not isinstance(value, bool):
        raise UsageError(f"{key} is {value!r}: give true or false")
    return value


def _handoff_rules_of(table: Mapping[str, Any]) -> HandoffRules:
    names = table.get("handoff_from", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f'handoff_from is {names!r}: give a list of names, as ["b.example"]')
    return HandoffRules(
        tuple(names), "accept_handoff" in table and _flag_of(table, "accept_handoff")
    )


def _text_of(table: Mapping[str, Any], key: str) -> str:
    value = table[key]
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"{key} is {value!r}: give text in quotes")
    return value


def _size_text(table: Mapping[str, Any], key: str) -> str:
    """A size in the file as text: a string, or a whole number of bytes (but not true or false)."""
    value = table[key]
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() < 64 else hex(value)  # which parse_size refuses
    raise UsageError(f'{key} is {value!r}: give a size such as "64M", in quotes')
