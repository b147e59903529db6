# SPDX-License-Identifier: Apache-2.0
"""Man pages and completions are made from the help, and groff and bash take them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cowshed.service.cli import cli
from cowshed.service.settings.options import OPTIONS

ROOT = Path(__file__).resolve().parents[3]
COWSHED = [sys.executable, "-m", "cowshed.service.cli"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "tools/man.py", folder], check=True)
    return folder


def shown(page: Path) -> str:
    if shutil.which("groff") is None:
        pytest.skip("needs groff: `make setup` as root installs it")
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-c", "-P-b", "-P-u", "-rLL=200n", "-wall", page],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return " ".join(done.stdout.split())


def test_every_command_has_a_page_that_groff_takes(pages: Path) -> None:
    names = {"cowshed", "cowshed.toml", *(f"cowshed-{name}" for name in cli.commands)}
    assert {path.stem for path in pages.iterdir()} == names
    for page in pages.iterdir():
        assert page.stem.upper() in shown(page)


def test_pages_say_what_the_help_and_the_settings_say(pages: Path) -> None:
    serve, settings = shown(pages / "cowshed-serve.1"), shown(pages / "cowshed.toml.5")
    for option in OPTIONS:
        assert option.about in settings
        assert f"{option.flag} " in serve


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    (tmp_path / "cowshed").write_text(f'#!/bin/sh\nexec {" ".join(COWSHED)} "$@"\n')
    (tmp_path / "cowshed").chmod(0o755)
    script = """
        eval "$(cowshed completion bash)"
        COMP_WORDS=(cowshed "$@"); COMP_CWORD=$#
        _cowshed_completion cowshed
        echo "${COMPREPLY[@]}"
    """

    def completed(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", script, "bash", *words],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert completed("un") == ["unpin"]
    assert completed("serve", "--cap") == ["--capacity"]
    assert completed("serve", "--trim", "z") == ["zeros"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_of_theirs(shell: str) -> None:
    done = subprocess.run([*COWSHED, "completion", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_COWSHED_COMPLETE={shell}_complete" in done.stdout
