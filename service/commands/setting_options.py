# SPDX-License-Identifier: Apache-2.0
"""The command line options of `cowshed serve`, made from the table of settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from cowshed.service.settings.options import OPTIONS, Option, flag_of

__all__ = ["setting_options"]

_METAVARS: Final = {"size": "SIZE", "directory": "DIR", "list of URIs": "URI"}

C = TypeVar("C", bound=Callable[..., Any])


def setting_options(command: C) -> C:
    """Add to a command an option for each setting that has a flag, passed as the setting's key."""
    for option in reversed(OPTIONS):
        if option.flag:
            command = click.option(option.flag, option.key, **_how(option))(command)
    return command


def _how(option: Option) -> dict[str, Any]:
    about = f"{option.about} {option.more}".strip() if option.is_repeatable else option.about
    if option.read is flag_of:
        return {"is_flag": True, "help": about}
    how: dict[str, Any] = {"multiple": option.is_repeatable}
    if option.choices:
        how["type"] = click.Choice(option.choices)
    elif option.bounds:
        how["type"] = click.INT
        how["metavar"] = option.unit.upper()
    else:
        how["metavar"] = _METAVARS.get(option.kind, option.kind)
    if option.envvar:
        how["envvar"] = option.envvar
        about = f"{about.removesuffix('.')}; also ${option.envvar}."
    end = "Repeatable." if option.is_repeatable else ""
    default = f" [default: {option.default}]"
    return {**how, "help": f"{about.removesuffix('.')}{default}." if not end else f"{about} {end}"}
