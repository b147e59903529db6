# SPDX-License-Identifier: Apache-2.0
"""What a kernel module says of itself, and the files that modprobe looks that up in.

Every module carries its names, needs and aliases in a section of NUL-ended `key=value` strings
(modinfo(8)). depmod(8) collects them into modules.dep and modules.alias; we do the same for the few
modules that a guest gets, so that building one needs no kmod.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Module", "closure", "modules_alias", "modules_dep", "read_module"]

_PAIR = re.compile(rb"(?<=\0)(depends|alias)=([^\0]*)\0")


@dataclass(frozen=True)
class Module:
    """A module: its name with underscores, what modprobe must load before it, its other names."""

    name: str
    depends: tuple[str, ...]
    aliases: tuple[str, ...]
    content: bytes

    @property
    def file_name(self) -> str:
        """What it is called in a guest."""
        return f"{self.name}.ko"


def read_module(file_name: str, content: bytes) -> Module:
    """Read a .ko or .ko.xz file. Raises lzma.LZMAError."""
    if file_name.endswith(".xz"):
        content = lzma.decompress(content)
    found: dict[bytes, list[str]] = {b"depends": [], b"alias": []}
    for key, value in _PAIR.findall(content):
        found[key].append(value.decode())
    return Module(
        name=_canonical(file_name.partition(".")[0]),
        depends=tuple(_canonical(d) for text in found[b"depends"] for d in text.split(",") if d),
        aliases=tuple(found[b"alias"]),
        content=content,
    )


def closure(wanted: Iterable[str], modules: Mapping[str, Module]) -> list[Module]:
    """Give the wanted modules and all they need, each after what it needs.

    A wanted name that the kernel has built in, and so not as a module, is left out; a dependency
    cannot be. Raises KeyError with a dependency that modules lacks.
    """
    done: dict[str, Module] = {}

    def add(name: str) -> None:
        if name not in done:
            module = modules[name]
            for needed in module.depends:
                add(needed)
            done[name] = module

    for name in wanted:
        if name in modules:
            add(name)
    return list(done.values())


def modules_dep(modules: Iterable[Module]) -> str:
    """Write modules.dep (modules.dep(5)): each module's file, and all it needs, nearest first."""
    by_name = {module.name: module for module in modules}
    lines = []
    for module in by_name.values():
        needed = [m.file_name for m in reversed(closure(module.depends, by_name))]
        lines.append(" ".join([f"{module.file_name}:", *needed]) + "\n")
    return "".join(lines)


def modules_alias(modules: Iterable[Module]) -> str:
    """Write modules.alias, by which the kernel finds a file system's or an algorithm's module."""
    return "".join(
        f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases
    )


def _canonical(name: str) -> str:
    return name.replace("-", "_")
