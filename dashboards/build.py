# SPDX-License-Identifier: Apache-2.0
"""Writes dashboards/generated/*.json: python -m dashboards.build [--check].

--check writes nothing; it prints a line for each file that differs and exits with status 1.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import drain, guest, image, overview

GENERATED: Final = Path(__file__).resolve().parent / "generated"


def generate() -> dict[str, str]:
    """Return the text of each file by its name; deterministic."""
    boards = {
        "overview": overview.board(),
        "image": image.board(),
        "guest": guest.board(),
        "drain": drain.board(),
    }
    return {
        f"{name}.json": json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, board in boards.items()
    }


def differences(wanted: Mapping[str, str], folder: Path) -> list[str]:
    """Return a line for each file in folder that is missing, stale or left over."""
    found = {path.name: path.read_text() for path in folder.glob("*.json")}
    wrong = [f"{name}: missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name}: no dashboard of that name" for name in sorted(found.keys() - wanted.keys())]
    same = wanted.keys() & found.keys()
    wrong += [f"{name}: out of date" for name in sorted(same) if wanted[name] != found[name]]
    return wrong


def main(arguments: list[str]) -> int:
    """Write or check the files; return the exit status."""
    wanted = generate()
    if arguments == ["--check"]:
        wrong = differences(wanted, GENERATED)
        for line in wrong:
            print(f"dashboards/generated/{line}: run make dashboards", file=sys.stderr)
        return 1 if wrong else 0
    if arguments:
        print("usage: python -m dashboards.build [--check]", file=sys.stderr)
        return 2
    GENERATED.mkdir(exist_ok=True)
    for path in GENERATED.glob("*.json"):
        path.unlink()
    for name, text in wanted.items():
        (GENERATED / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
