# SPDX-License-Identifier: Apache-2.0
"""Nothing of the product is left out of the packages, the extension or the distributions."""

import ctypes
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from cowshed.cache import core_build
from cowshed.transport.guest import preloading

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
NOT_PACKAGES = {"bench", "build", "dashboards", "dist", "docs", "examples", "tests", "tools"}


def package_directories() -> set[str]:
    return {
        path.parent.relative_to(ROOT).as_posix()
        for top in ROOT.iterdir()
        if top.is_dir() and not top.name.startswith(".") and top.name not in NOT_PACKAGES
        for path in top.rglob("*.py")
    }


def test_every_package_directory_is_listed() -> None:
    assert set(SETUPTOOLS["package-dir"].values()) == package_directories()


def test_packages_and_their_directories_agree() -> None:
    directories = SETUPTOOLS["package-dir"]
    assert sorted(directories) == sorted(SETUPTOOLS["packages"])
    assert all(name == "cowshed." + path.replace("/", ".") for name, path in directories.items())


def test_import_contract_watches_every_package() -> None:
    contract = PYPROJECT["tool"]["importlinter"]
    listed = {name for name in SETUPTOOLS["packages"] if name.count(".") == 1}
    assert set(contract["root_packages"]) == listed
    layers = " ".join(contract["contracts"][0]["layers"])
    assert set(re.findall(r"cowshed\.\w+", layers)) == listed


def test_namespace_has_no_root_init() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "cowshed").exists()


def test_every_c_source_is_built() -> None:
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for name in SETUPTOOLS["package-dir"].values()
        for path in (ROOT / name).rglob("*.c")
    }
    # setup.py builds transport/preload into the library of `cowshed attach`, and the Makefile
    # transport/library into the guest library.
    libraries = {
        path.relative_to(ROOT).as_posix()
        for folder in ("preload", "library")
        for path in ROOT.glob(f"transport/{folder}/*.c")
    }
    assert set(core_build.core_sources(ROOT)) | libraries == on_disk


def test_the_preloaded_library_is_built_and_knows_no_python() -> None:
    library = ctypes.CDLL(str(preloading.library_path()))
    assert library.mmap64
    assert library.openat
    symbols = preloading.library_path().read_bytes()
    assert b"Py_" not in symbols
    assert b"PyInit" not in symbols


def test_every_core_is_in_the_source_distribution() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text()
    for core in (*core_build.CORES, "transport/preload"):
        assert f"recursive-include {core} *.c *.h\n" in manifest


def test_every_dependency_is_explained() -> None:
    page = (ROOT / "docs/dependencies.md").read_text()
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=!~\[; ]", line)[0] for line in wanted}
    assert {name for name in names if f"| {name} |" not in page} == set()


def test_command_is_installed() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="cowshed")
    assert callable(command.load())


def test_cdef_keeps_the_lines_of_the_header() -> None:
    header = "#pragma once\n/* cdef-begin */\nint a_get(void);\n/* cdef-end */\nint b_get(void);\n"
    assert core_build.cdef_of_header(header, "a.h") == "\n\nint a_get(void);\n\n"


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("/* cdef-begin */\nint a;\n", "close it"),
        ("/* cdef-end */\n", "a.h:1: .* out of place"),
        ("/* cdef-begin */\n/* cdef-begin */\n/* cdef-end */\n", "a.h:2: .* out of place"),
    ],
)
def test_header_with_wrong_marks_is_refused(header: str, complaint: str) -> None:
    with pytest.raises(core_build.BuildError, match=complaint):
        core_build.cdef_of_header(header, "a.h")


def test_missing_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COWSHED_BOOTSTRAP", raising=False)
    with pytest.raises(core_build.BuildError, match="no such header"):
        core_build.present_headers(tmp_path)


def test_unlisted_header_with_marks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWSHED_BOOTSTRAP", "1")
    stray = tmp_path / "cache/core/stray.h"
    stray.parent.mkdir(parents=True)
    stray.write_text("/* cdef-begin */\nint a;\n/* cdef-end */\n")
    with pytest.raises(core_build.BuildError, match=r"stray\.h: .* not on HEADERS"):
        core_build.present_headers(tmp_path)


def test_unknown_sanitizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COWSHED_SANITIZE", "memory")
    with pytest.raises(core_build.BuildError, match="COWSHED_SANITIZE=memory"):
        core_build.sanitize_flags()
