# SPDX-License-Identifier: Apache-2.0
"""The typed stub of the C core says what the built core has, and type checkers believe it."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cowshed.cache._core import ffi, lib

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools/core_stub.py"
STUB = ast.parse((ROOT / "cache/_core.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("core_stub", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["core_stub"] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


core_stub = load_script()


def declared(owner: str) -> dict[str, str]:
    """Names with annotations in a class of the stub."""
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in CLASSES[owner].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_stubs_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_function_and_constant_of_the_built_core_is_declared() -> None:
    functions = {
        node.name: node for node in CLASSES["_Lib"].body if isinstance(node, ast.FunctionDef)
    }
    assert set(functions) | set(declared("_Lib")) == set(dir(lib))
    for name, node in functions.items():
        built = ffi.typeof(getattr(lib, name))
        kinds = [ast.unparse(each.annotation) for each in node.args.posonlyargs[1:]]
        assert len(kinds) == len(built.args), name
        for kind, argument in zip(kinds, built.args, strict=True):
            assert (kind in ("int", "bool")) == (argument.kind in ("primitive", "enum")), name
        assert (ast.unparse(node.returns) == "None") == (built.result.kind == "void"), name


def test_every_field_of_every_struct_is_declared() -> None:
    structs = {name for name in CLASSES if name.startswith("Struct")}
    for cname in ffi.list_types()[1]:
        shown = core_stub.class_name(cname)
        structs.discard(shown)
        try:
            ffi.sizeof(f"struct {cname}")
        except ffi.error:  # its fields are the core's own
            assert not declared(shown)
        else:
            fields = ffi.typeof(f"struct {cname}").fields
            assert list(declared(shown)) == [name for name, _ in fields]
    assert not structs


@pytest.mark.slow
def test_mistakes_at_the_boundary_are_errors_of_types(tmp_path: Path) -> None:
    (tmp_path / "cowshed").mkdir()
    (tmp_path / "cowshed/cache").symlink_to(ROOT / "cache")
    (tmp_path / "wrong.py").write_text(
        "from cowshed.cache._core import ffi, lib\n"
        'shape = ffi.new("struct image_shape *")\n'
        "lib.image_shape(shape, shape)\n"
        "print(shape.nr_extent)\n"
        "lib.image_close()\n"
        "number: str = lib.point_release(1)\n"
        'ffi.new("struct no_such *")\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "wrong.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong.py")]
    lines = {int(line.split(":")[1]) for line in wrong if " error: " in line}
    assert lines == {3, 4, 5, 6, 7}, done.stdout


def test_pointers_and_arrays_are_told_apart() -> None:
    text = core_stub.core_stub(
        "#define NR 3\n"
        "struct part { uint64_t nr; char name[NR]; };\n"
        "struct whole { struct part parts[NR]; uint8_t grid[NR][NR]; const struct part *first; };\n"
        "enum kind { KIND_A, KIND_B };\n"
        "int whole_fill(struct whole *whole, const char *from, struct part **out);\n"
        "void *whole_at(const struct whole *whole, enum kind kind, const uint8_t *map);\n"
    )
    whole = "whole: StructWhole | Array[StructWhole]"
    octets = "bytes | Pointer[bytes]"
    for line in (
        "    NR: int",
        "    KIND_B: int",
        "    name: Array[bytes]",
        "    parts: Array[StructPart]",
        "    grid: Array[Array[int]]",
        "    first: StructPart",
        f"(self, {whole}, from_: {octets}, out: Pointer[StructPart], /) -> int: ...",
        f"(self, {whole}, kind: int, map: {octets} | Pointer[int], /) -> CData: ...",
    ):
        assert f"{line}\n" in text


@pytest.mark.parametrize(
    "text", ["double ratio(void);", "int (*hook)(int);", "union u { int a; };"]
)
def test_what_has_no_type_here_is_refused(text: str) -> None:
    with pytest.raises(core_stub.StubError, match=r"line 1: .*extend this script"):
        core_stub.core_stub(text)
