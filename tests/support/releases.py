# SPDX-License-Identifier: Apache-2.0
"""The previous release, built from the repository's history, and installations to replace.

A guest of that release keeps its library, or its preloaded one, until it ends; a backend of that
release hands its guests to this one. Formats that both read may only be extended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("accounting", "cache", "faults", "service", "transport")
# The last commit before names and formats began to change. Update it at each release.
PREVIOUS = "bf9531c9da94ebe8bf64c082bf006e32ab20b382"


def _git(*words: str, **how: object) -> subprocess.CompletedProcess[bytes]:
    command = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}", *words]
    return subprocess.run(command, capture_output=True, check=False, **how)  # type: ignore[call-overload, no-any-return]


def previous_release() -> Path:
    """Build the previous release, once; return its tree. Skips if the commit is missing."""
    tree = ROOT / "build/releases" / PREVIOUS
    if tree.is_dir():
        return tree
    if _git("cat-file", "-e", f"{PREVIOUS}^{{commit}}").returncode:
        pytest.skip(f"needs the history of the repository, with commit {PREVIOUS[:12]} in it")
    tree.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=tree.parent))
    try:
        archive = _git("archive", PREVIOUS)
        assert archive.returncode == 0, archive.stderr
        subprocess.run(["tar", "-x", "-C", half], input=archive.stdout, check=True)
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=half, check=True
        )
        half.rename(tree)
    except BaseException:
        shutil.rmtree(half)
        raise
    return tree


class Installation:
    """A folder that programs are run from, with one release installed, and then another."""

    def __init__(self, folder: Path, tree: Path) -> None:
        folder.mkdir()
        folder.chmod(0o755)
        self._folder = folder
        self.install(tree)

    def install(self, tree: Path) -> None:
        """Replace the installed release atomically."""
        packages = Path(tempfile.mkdtemp(dir=self._folder))
        packages.chmod(0o755)
        for package in PACKAGES:
            (packages / package).symlink_to(tree / package)
        link = packages.with_name("link")
        link.symlink_to(packages.name)
        link.rename(self._folder / "cowshed")

    def environment(self) -> dict[str, str]:
        """Return the environment of a program that is run from there."""
        path = [str(self._folder), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": ":".join(filter(None, path))}

    @property
    def before(self) -> tuple[str, str]:
        """Return the prefix of a command line that runs it from there."""
        return "env", f"PYTHONPATH={self.environment()['PYTHONPATH']}"
