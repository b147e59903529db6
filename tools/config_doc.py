# SPDX-License-Identifier: Apache-2.0
"""Writes docs/configuration.md from the table of settings.

.venv/bin/python tools/config_doc.py            write it
.venv/bin/python tools/config_doc.py --check    exit with 1 if it is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from cowshed.service.settings.options import OPTIONS, Option

PAGE = Path(__file__).resolve().parent.parent / "docs/configuration.md"

HEAD = """\
<!-- Written by tools/config_doc.py from service/settings/options.py. Do not edit. -->
# Configuration

`cowshed serve --config FILE` reads a TOML file. Each key is optional, and an unknown one is an
error. An option of the command line wins over the file. `cowshed serve --check` checks a
configuration and exits. A reload (`SIGHUP` to the keeper, `systemctl reload`) reads the file anew
and is refused, with one line, if it is wrong.

Sizes are bytes, or a number with K, M, G or T. Relative paths start at the file's directory; on the
command line, at the current one.

## Settings

| key | value | default | option | meaning |
|---|---|---|---|---|
"""

TAIL = """
`--no-keeper` is `keeper = false`; `--verbose` is a `log_level` of `info`, at least.

## Images

```toml
[images]
debian = "/srv/images/debian.raw"       # NAME = "SOURCE", in the sharing domain "default"
alpine = "file:///srv/images/alpine.raw"

[[image]]                               # the same, with more settings; repeatable
name = "debian"
source = "/srv/images/debian.raw"
domain = "tenant-a"                     # "default" unless given
trim = "zeros"                          # as the setting, for this image
extent = "2M"                           # likewise
uids = [1001, "alice"]                  # its users, unless given all of its domain; also gids
clients = ["vm7.example"]               # the same, by the name in a TLS client's certificate
```

`--image NAME=SOURCE[,domain=DOMAIN][,trim=WHAT][,extent=SIZE]` adds one, or replaces the file's of
that name and domain.

Extents of 2M are for images that guests read in large pieces. Their frames are on a tmpfs with
huge pages, which the daemon mounts for itself and nobody else sees. If it may not (it needs
CAP_SYS_ADMIN), the log says so, and the image gets extents of 64K, or of the `extent` setting if
that is less. Extents larger than the smallest in the configuration do not go to the standby list:
they are dropped when they are unmapped, and the estimates of use leave their image out. A reload or
a takeover cannot change the extents of an image that is served; a drain can.

## Sharing domains

```toml
[domains.tenant-a]                      # its guests, by user, group, or name in a certificate
uids = [1001, "alice"]
gids = ["tenants"]
clients = ["vm7.example"]
```

Guests of different domains share no frame: [domains.md](domains.md).

## TLS

```toml
[tls]                                   # for every network listener
cert = "server.pem"                     # the daemon's certificate, and those up to the CA's
key = "server.key"                      # its key, without a passphrase
ca = "ca.pem"                           # the CA that signs clients' certificates
clients = "required"                    # or "optional": clients without a certificate are anonymous
```
"""


def row(option: Option) -> str:
    """Return the table row of one setting."""
    flag = f"`{option.flag}`" if option.flag else ""
    bounds = f", {option.bounds[0]} to {option.bounds[1]}" if option.bounds else ""
    about = f"{option.about} {option.more}".strip()
    if option.envvar:
        about += f" Also `${option.envvar}`."
    return f"| `{option.key}` | {option.kind}{bounds} | {option.default} | {flag} | {about} |\n"


def page() -> str:
    """Return the whole page."""
    return HEAD + "".join(map(row, OPTIONS)) + TAIL


def main() -> int:
    """Write or check the page."""
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text() == page():
            return 0
        print("docs/configuration.md is stale; run tools/config_doc.py", file=sys.stderr)
        return 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
