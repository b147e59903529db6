# SPDX-License-Identifier: Apache-2.0
"""Sharing domains and their members. Guests share frames within a domain and never beyond.

A guest is in the domain that lists its identity, which it cannot choose: its user or group, which
the kernel reports for a unix socket's peer, or the name in its TLS certificate, which the handshake
has verified. An unlisted guest is in the domain "default". A user counts before its group, so that
one member of a group can be in another domain. In the configuration file::

    [domains.tenant-a]
    uids = [1001, "alice"]              # numbers, or names of users
    gids = ["tenant-a"]                 # primary groups: numbers, or names
    clients = ["vm7.tenant-a.example"]  # common or alternative names of TLS client certificates

Pure, except that reading a configuration looks up the names of users and groups.
"""

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cowshed.cache.errors import UsageError
from cowshed.cache.images import DEFAULT_DOMAIN

__all__ = [
    "DEFAULT_DOMAIN",
    "DomainMembers",
    "Domains",
    "Identity",
    "check_domain_name",
    "check_key",
    "is_operator",
    "parse_domains",
    "parse_members",
]

# No dot: folders named after domains lie beside NAME.sock and NAME.workingset.
_DOMAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_ID_MAX: Final = (1 << 32) - 2  # the last one means "no change" to chown(2)
_KEYS: Final = ("uids", "gids", "clients")


@dataclass(frozen=True)
class Identity:
    """A guest's identity as its transport verified it; None: unknown.

    client_name is the name in a verified TLS client certificate; of several, Domains.client_name
    chooses one.
    """

    uid: int | None = None
    gid: int | None = None
    client_name: str | None = None


@dataclass(frozen=True)
class DomainMembers:
    """The members of a domain, or the users of an image."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()
    clients: frozenset[str] = frozenset()

    def has(self, identity: Identity) -> bool:
        """Whether any of the lists has the identity."""
        return (
            identity.uid in self.uids
            or identity.gid in self.gids
            or identity.client_name in self.clients
        )


@dataclass(frozen=True)
class Domains:
    """The members of each domain; everybody else is in "default".

    The constructor raises UsageError for a member that is listed in two domains.
    """

    members: Mapping[str, DomainMembers] = field(default_factory=dict)
    _by_uid: dict[object, str] = field(init=False, repr=False, compare=False)
    _by_gid: dict[object, str] = field(init=False, repr=False, compare=False)
    _by_client: dict[object, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, what in (("uid", "uid"), ("gid", "gid"), ("client", "client")):
            by: dict[object, str] = {}
            for domain, members in self.members.items():
                for who in sorted(getattr(members, f"{key}s")):
                    if who in by:
                        raise UsageError(
                            f"{what} {who!r} is in domains {by[who]!r} and {domain!r}: "
                            "list it in one of them"
                        )
                    by[who] = domain
            object.__setattr__(self, f"_by_{key}", by)

    def domain_of(self, identity: Identity) -> str:
        """Return a guest's domain: by its certificate, then its user, then its group; O(1)."""
        return (
            self._by_client.get(identity.client_name)
            or self._by_uid.get(identity.uid)
            or self._by_gid.get(identity.gid)
            or DEFAULT_DOMAIN
        )

    def admits(self, identity: Identity, domain: str) -> bool:
        """Whether a guest may use a domain's images: those of its own; an operator, any."""
        return is_operator(identity.uid) or self.domain_of(identity) == domain

    def client_name(self, names: Iterable[str]) -> str | None:
        """Choose a certificate's identity among all its names: a listed one, else the first.

        None if there are no names; UsageError if they belong to several domains.
        """
        names = list(names)
        listed = {self._by_client[name]: name for name in names if name in self._by_client}
        if len(listed) > 1:
            raise UsageError(
                f"a certificate has names of several domains ({', '.join(sorted(listed))}): "
                "give it names of one"
            )
        return next(iter([*listed.values(), *names]), None)


def is_operator(uid: int | None) -> bool:
    """Whether a user may make any request: root and the daemon's own user may."""
    return uid is not None and uid in (0, os.geteuid())


def check_domain_name(domain: str) -> None:
    """Raise UsageError for an invalid domain name."""
    if not _DOMAIN_NAME.fullmatch(domain):
        raise UsageError(
            f"domain name {domain!r} is not usable: use up to 32 letters, digits, '_' and '-', "
            "a letter or digit first"
        )


def check_key(key: str, known: Sequence[str], where: str) -> None:
    """Raise UsageError for an unknown key of a table."""
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
        raise UsageError(f"{where}unknown key {key!r}: {cure}")


def parse_domains(table: object) -> Domains:
    """Parse a configuration's table [domains]. Raises UsageError."""
    if not isinstance(table, dict):
        raise UsageError(f"domains is {table!r}: write [domains.NAME] and uids = [...] below it")
    members = {}
    for domain, lists in table.items():
        check_domain_name(domain)
        if domain == DEFAULT_DOMAIN:
            raise UsageError(
                f"domain {DEFAULT_DOMAIN!r} is for guests that no other lists: give it no members"
            )
        members[domain] = _members(domain, lists)
    return Domains(members)


def _members(domain: str, lists: object) -> DomainMembers:
    if not isinstance(lists, dict):
        raise UsageError(f"domain {domain!r} is {lists!r}: write [domains.{domain}]")
    for key in lists:
        check_key(key, _KEYS, f"domain {domain!r} has ")
    return parse_members(f"domain {domain!r}", lists)


def parse_members(what: str, lists: Mapping[str, Any]) -> DomainMembers:
    """Parse the lists uids, gids and clients of what (as "domain 'a'"). Raises UsageError."""
    return DomainMembers(
        uids=_ids(what, lists, "uid", "user", lambda name: pwd.getpwnam(name).pw_uid),
        gids=_ids(what, lists, "gid", "group", lambda name: grp.getgrnam(name).gr_gid),
        clients=_clients(what, lists),
    )


def _ids(
    what: str, lists: Mapping[str, Any], kind: str, of: str, look_up: Callable[[str], int]
) -> frozenset[int]:
    ids = set()
    for who in _list(what, lists, f"{kind}s"):
        if isinstance(who, str):
            try:
                ids.add(look_up(who))
            except (KeyError, ValueError) as error:  # ValueError: a NUL in it
                raise UsageError(
                    f"{what} lists {of} {who!r}, which this host does not know: "
                    f"correct the name, or give a {kind} without quotes"
                ) from error
        elif isinstance(who, int) and not isinstance(who, bool) and 0 <= who <= _ID_MAX:
            ids.add(who)
        else:
            raise UsageError(
                f"{what} lists {kind} {who!r}: give a whole number from 0 to "
                f"{_ID_MAX}, or the name of a {of} in quotes"
            )
    return frozenset(ids)


def _clients(what: str, lists: Mapping[str, Any]) -> frozenset[str]:
    clients = _list(what, lists, "clients")
    for name in clients:
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"{what} lists client {name!r}: give a certificate's name in quotes")
    return frozenset(clients)


def _list(what: str, lists: Mapping[str, Any], key: str) -> list[Any]:
    value = lists.get(key, [])
    if not isinstance(value, list):
        raise UsageError(f"{key} of {what} is {value!r}: give a list, as {key} = [...]")
    return value
