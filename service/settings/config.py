# SPDX-License-Identifier: Apache-2.0
"""The configuration of `cowshed serve`: a TOML file, the environment, options; the last wins.

options.py has the table of settings, docs/configuration.md the reference made from it. A file also
has tables: [images] and [[image]], [domains] (domains.py) and [tls] (tls_config.py). Everything is
checked here, before anything is opened, except that sources can be read, which opening the image
checks. Each error is one UsageError that names the thing, the value and the cure.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cowshed.cache.errors import UsageError
from cowshed.cache.images import DEFAULT_DOMAIN
from cowshed.service.runtime.logs import LogFormat, LogLevel
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.settings.config_text import config_text_read
from cowshed.service.settings.domains import (
    DomainMembers,
    Domains,
    check_key,
    parse_domains,
    parse_members,
)
from cowshed.service.settings.endpoint import Endpoint
from cowshed.service.settings.handoff_rules import HandoffRules
from cowshed.service.settings.images import (
    ImageSpec,
    absolute,
    check_extent,
    image_spec,
    parse_image,
)
from cowshed.service.settings.options import OPTIONS, RUN_DIR_DEFAULT, TABLES, size_text, text_of
from cowshed.service.settings.quotas import check_quota
from cowshed.service.settings.tls_config import TlsConfig, parse_tls

OnQuota = Literal["stop", "kill", "allow"]

SOCKET_NAME = "cowshed.sock"
CAPACITY_DEFAULT_BYTES = 1 << 30
CAPACITY_MIN_EXTENTS = 2  # one stays while the next is loaded
EXTENT_DEFAULT_BYTES = 64 << 10
LOADERS_DEFAULT = 4
STANDBY_DEFAULT_PERCENT = 20
SOCKET_PATH_MAX_BYTES = 107  # sun_path less its NUL, unix(7)

_KEYS = (*(option.key for option in OPTIONS), *TABLES)
_MEMBER_KEYS = ("uids", "gids", "clients")
_IMAGE_KEYS = ("name", "source", "domain", "trim", "extent", *_MEMBER_KEYS)


@dataclass(frozen=True)
class Config:
    """A complete, checked configuration; options.py describes the values.

    `default_quota_bytes` and `network_quota_bytes` None: no limit. Paths are absolute. text is the
    configuration file's, if there is one, to be passed to this daemon's later processes. The
    constructor raises UsageError for invalid values.
    """

    images: tuple[ImageSpec, ...]
    run_dir: Path
    state_dir: Path
    capacity_bytes: int = CAPACITY_DEFAULT_BYTES
    extent_bytes: int = EXTENT_DEFAULT_BYTES
    standby: int = STANDBY_DEFAULT_PERCENT
    open_regions: str = "auto"
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
        """Whether ranges that an NBD client trims of that image then read as zeros."""
        for spec in self.images:
            if (spec.domain, spec.name) == (domain, name) and spec.trim is not None:
                return spec.trim == "zeros"
        return self.trim == "zeros"

    def extent_of(self, spec: ImageSpec) -> int:
        """Return the size of an image's extents, in bytes."""
        return spec.extent_bytes or self.extent_bytes

    @property
    def least_extent_bytes(self) -> int:
        """The size of the smallest extents, in which room is counted."""
        return min((self.extent_bytes, *map(self.extent_of, self.images)))

    @property
    def largest_extent_bytes(self) -> int:
        """The size of the largest extents."""
        return max((self.extent_bytes, *map(self.extent_of, self.images)))

    def __post_init__(self) -> None:
        check_extent(self.extent_bytes)
        extent = self.largest_extent_bytes
        least_bytes = CAPACITY_MIN_EXTENTS * extent
        if self.capacity_bytes < least_bytes:
            raise UsageError(
                f"capacity of {self.capacity_bytes} bytes is less than {CAPACITY_MIN_EXTENTS} "
                f"extents of {format_bytes(extent)}: give {format_bytes(least_bytes)} or more"
            )
        for option in OPTIONS:
            if option.bounds is not None or option.choices:
                option.check(getattr(self, option.name))
        if self.default_quota_bytes is not None:
            check_quota(self.default_quota_bytes)
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
    """Return the daemon's socket path in `run_dir`, absolute; UsageError if it is too long."""
    path = absolute(run_dir) / SOCKET_NAME
    nr_bytes = len(os.fsencode(path))
    if nr_bytes > SOCKET_PATH_MAX_BYTES:
        raise UsageError(
            f"socket path {str(path)!r} has {nr_bytes} bytes and the kernel takes "
            f"{SOCKET_PATH_MAX_BYTES}: choose a shorter --run-dir"
        )
    return path


def config_load(
    *,
    config_file: Path | None = None,
    images: Sequence[str] = (),
    no_keeper: bool = False,
    verbose: bool = False,
    **given: Any,
) -> Config:
    """Return the configuration of `config_file` (None: no file), overridden by given options.

    `images` are NAME=SOURCE[,domain=DOMAIN][,trim=WHAT][,extent=SIZE]; each replaces the file's
    image of the same name and domain. `given` are options by key; None, () and False count as not
    given. `verbose` means a log_level of at least info. Reads the file and looks up the users and
    groups that it names, and nothing else. Raises UsageError, one line.
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
        settings = _settings_of(table, file_dir)
        settings["domains"] = parse_domains(table.get("domains", {}))
        if "tls" in table:
            settings["tls"] = parse_tls(table["tls"], file_dir)
    except UsageError as error:
        raise UsageError(f"{config_file}: {error}") from error

    named: set[str] = set()
    for text in images:
        name, source, options = parse_image(text)
        spec = image_spec(
            name,
            source,
            Path.cwd(),
            options.get("domain", DEFAULT_DOMAIN),
            trim=options.get("trim"),
            extent=options.get("extent"),
        )
        if spec.label in named:
            raise _given_twice(spec)
        named.add(spec.label)
        specs[spec.label] = spec

    for key in given:
        check_key(key, _KEYS, "")
    if given.get("run_dir") == "":  # an empty environment variable counts as unset
        del given["run_dir"]
    given = {k: v for k, v in given.items() if v is not None and v is not False and v != ()}
    settings |= _settings_of(given, Path.cwd())
    settings.setdefault("network_quota_bytes", settings.get("default_quota_bytes"))
    settings["handoff_rules"] = HandoffRules(
        settings.pop("handoff_from", ()), settings.pop("accept_handoff", False)
    )
    if no_keeper:
        settings["keeper"] = False
    if verbose and settings.get("log_level") != "debug":
        settings["log_level"] = "info"
    settings.setdefault("run_dir", Path(RUN_DIR_DEFAULT))
    settings.setdefault("state_dir", settings["run_dir"] / "state")
    return Config(images=tuple(specs.values()), text=file_text, **settings)


def _settings_of(table: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return Config's fields for the settings in a table; paths are relative to base."""
    settings = {}
    for option in OPTIONS:
        if option.key in table:
            value = option.read(option.key, table[option.key])
            settings[option.name] = absolute(base / value) if option.is_path else value
    return settings


def _read_table(config_file: Path) -> tuple[Mapping[str, Any], str]:
    """Return the top-level table of a TOML file, its keys checked, and the file's text."""
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
    """Yield the images of [images], then those of [[image]]."""
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
            text_of("name", each["name"]),
            text_of("source", each["source"]),
            file_dir,
            text_of("domain", each["domain"]) if "domain" in each else DEFAULT_DOMAIN,
            _allowed_of(each),
            text_of("trim", each["trim"]) if "trim" in each else None,
            size_text("extent", each["extent"]) if "extent" in each else None,
        )


def _allowed_of(each: Mapping[str, Any]) -> DomainMembers | None:
    """Return who may use an [[image]]; None: all of its domain."""
    lists = {key: each[key] for key in _MEMBER_KEYS if key in each}
    return parse_members(f"image {each['name']!r}", lists) if lists else None
