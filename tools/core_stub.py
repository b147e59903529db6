# SPDX-License-Identifier: Apache-2.0
"""Writes the typed stubs of the C extensions from the headers' cdef sections.

    python tools/core_stub.py            write cache/_core.pyi and transport/_preload.pyi
    python tools/core_stub.py --check    exit with 1 if either differs from what would be written

C types as Python types:

    struct x, struct x *     one class StructX: cffi reads fields through a pointer as through the
                             struct, and accepts either where C takes a pointer
    T *                      Pointer[T]; for a T[] Array[T], a Pointer[T] with a length
    integers, enums, bool    int; bool
    char *                   bytes for a parameter, Pointer[bytes] elsewhere
    void *                   CData, the base of all other classes; bytes too for a parameter
    enum values, #define     int constants of lib

The classes exist for type checkers only: import them under TYPE_CHECKING. ffi has only what the
product uses: new(), from_buffer() and cast() take the type from their literal string argument.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path

from pycparser import c_ast, c_parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cache"))

import core_build  # noqa: E402 - found by the line above

INTEGERS = (
    *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("size_t", "ssize_t", "uintptr_t", "off_t", "pid_t", "uid_t", "gid_t"),
)
# Types that cffi knows without a declaration and pycparser does not.
PRELUDE = "".join(f"typedef int {name};" for name in INTEGERS) + "typedef _Bool bool;"
DEFINE = re.compile(r"^\s*#\s*define\s+(\w+)\s+\S.*$", re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)

CORE_HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Written by tools/core_stub.py from the headers' cdef sections; `make stubs` writes it anew.
# Each call of lib releases the GIL. Functions return >= 0 or -errno unless their header says
# otherwise; cache/calls.py turns that into exceptions.
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from _typeshed import ReadableBuffer

_T = TypeVar("_T")
_C = TypeVar("_C", bound=CData)

class CData:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
        /,
    ) -> None: ...

class Pointer(CData, Generic[_T]):
    @overload
    def __getitem__(self, index: int, /) -> _T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[_T]: ...
    def __setitem__(self, index: int | slice, value: Any, /) -> None: ...
    def __add__(self, nr: int, /) -> Pointer[_T]: ...

class Array(Pointer[_T]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...
"""

FFI_METHODS = """\
    @overload
    def new(self, cdecl: Literal[@POINTERS], init: int = ..., /) -> Pointer[int]: ...
    @overload
    def new(self, cdecl: Literal[@ARRAYS], init: int | Sequence[int], /) -> Array[int]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal[@ARRAYS], buffer: ReadableBuffer, require_writable: bool = ...
    ) -> Array[int]: ...
    @overload
    def from_buffer(
        self, buffer: ReadableBuffer, *, require_writable: bool = ...
    ) -> Array[bytes]: ...
    @overload
    def cast(self, cdecl: Literal["uintptr_t"], source: CData, /) -> int: ...
    @overload
    def cast(self, cdecl: Literal["char *"], source: int | CData, /) -> Pointer[bytes]: ...
    def gc(self, cdata: _C, destructor: Any, size: int = ...) -> _C: ...
    def buffer(self, cdata: CData, size: int = ..., /) -> memoryview: ...
    def string(self, cdata: Pointer[bytes], maxlen: int = ..., /) -> bytes: ...
    def release(self, cdata: CData, /) -> None: ...
"""

PRELOAD_STUB = """\
# SPDX-License-Identifier: Apache-2.0
# Written by tools/core_stub.py. This extension is the library that `cowshed attach` preloads into
# programs. It contains no Python: importing it fails, so nothing is declared.
"""


class StubError(Exception):
    """The cdef has an unknown construct; the message names it and its line."""


@dataclass(frozen=True)
class Declarations:
    """The headers' declarations in order: structs with fields, functions, constants."""

    structs: dict[str, list[tuple[str, c_ast.Node]]]
    functions: dict[str, c_ast.FuncDecl]
    constants: list[str]


def class_name(struct: str) -> str:
    """Return the stub's class for a struct: StructNbdServer for nbd_server."""
    return "Struct" + "".join(word.capitalize() for word in struct.split("_"))


def read_declarations(text: str) -> Declarations:
    """Parse a cdef; raises StubError for anything but structs, enums, functions and #defines."""
    constants = DEFINE.findall(COMMENT.sub("", text))
    plain = DEFINE.sub("", COMMENT.sub("", text))
    structs: dict[str, list[tuple[str, c_ast.Node]]] = {}
    functions: dict[str, c_ast.FuncDecl] = {}
    # Stubs show no array lengths, so the values of the #defines in them are not needed.
    plain = re.sub(r"\[[^\]]+\]", "[1]", plain)
    for node in c_parser.CParser().parse(PRELUDE + plain).ext:
        if isinstance(node, c_ast.Typedef):
            continue
        match node.type:
            case c_ast.Struct(name=name, decls=decls):
                structs.setdefault(name, [])
                structs[name] += [(each.name, each.type) for each in decls or []]
            case c_ast.Enum(values=values) if values is not None:
                constants += [each.name for each in values.enumerators]
            case c_ast.FuncDecl():
                functions[node.name] = node.type
            case _:
                raise StubError(f"line {node.coord.line}: {node.name}: unknown; extend this script")
    return Declarations(structs, functions, constants)


def _named(node: c_ast.TypeDecl) -> str:
    """Return the annotation of a type that is neither pointer nor array."""
    match node.type:
        case c_ast.Struct(name=name):
            return class_name(name)
        case c_ast.Enum():
            return "int"
        case c_ast.IdentifierType(names=names):
            word = names[-1]
            if word in ("bool", "_Bool"):
                return "bool"
            if word == "char" and len(names) == 1:
                return "bytes"
            if word in INTEGERS or word in ("int", "long", "unsigned", "char", "short"):
                return "int"
            if word == "void":
                return "None"
    raise StubError(f"line {node.coord.line}: unknown type; extend this script")


def _is_octet(node: c_ast.TypeDecl) -> bool:
    """Return whether cffi accepts bytes for a pointer to it, as for char *."""
    return isinstance(node.type, c_ast.IdentifierType) and node.type.names == ["uint8_t"]


def python_type(node: c_ast.Node, *, is_parameter: bool = False) -> str:
    """Return the annotation of a C type."""
    match node:
        case c_ast.ArrayDecl(type=inner) if not is_parameter:
            return f"Array[{python_type(inner)}]"
        case (
            c_ast.PtrDecl(type=c_ast.TypeDecl() as pointee)
            | c_ast.ArrayDecl(type=c_ast.TypeDecl() as pointee)
        ):
            found = _named(pointee)
            if found.startswith("Struct"):
                return f"{found} | Array[{found}]" if is_parameter else found
            if found == "None":
                return "CData | bytes" if is_parameter else "CData"
            if is_parameter and found == "bytes":
                return "bytes | Pointer[bytes]"
            if is_parameter and _is_octet(pointee):
                return "bytes | Pointer[bytes] | Pointer[int]"
            return f"Pointer[{found}]"
        case c_ast.PtrDecl(type=inner):
            return f"Pointer[{python_type(inner)}]"
        case c_ast.TypeDecl():
            return _named(node)
    raise StubError(f"line {node.coord.line}: unknown declarator; extend this script")


def _parameters(function: c_ast.FuncDecl) -> Iterator[str]:
    for each in function.args.params if function.args else ():
        kind = python_type(each.type, is_parameter=True)
        if kind != "None":  # f(void) has no parameters
            yield f"{each.name}{'_' if iskeyword(each.name) else ''}: {kind}"


def _struct_lines(name: str, fields: list[tuple[str, c_ast.Node]]) -> Iterator[str]:
    if not fields:
        yield f"class {class_name(name)}(CData): ..."
        return
    yield f"class {class_name(name)}(CData):"
    for field, node in fields:
        yield f"    {field}: {python_type(node)}"


def _ffi_lines(structs: dict[str, list[tuple[str, c_ast.Node]]]) -> Iterator[str]:
    yield "class _Ffi:"
    yield "    NULL: Any"
    for name, fields in structs.items():
        shown = class_name(name)
        kinds = [(f"struct {name} **", f"Pointer[{shown}]")]
        if fields:
            kinds += [(f"struct {name} *", shown), (f"struct {name}[]", f"Array[{shown}]")]
        for cdecl, result in kinds:
            yield "    @overload"
            yield (
                f'    def new(self, cdecl: Literal["{cdecl}"], init: Any = ..., /) -> {result}: ...'
            )
    integers = ("int", *INTEGERS[:8])
    pointers = ", ".join(f'"{name} *"' for name in integers)
    arrays = ", ".join(f'"{name}[]"' for name in integers)
    yield FFI_METHODS.replace("@POINTERS", pointers).replace("@ARRAYS", arrays)
    yield ""
    yield "ffi: _Ffi"


def core_stub(text: str) -> str:
    """Return the stub of an extension whose cdef is text."""
    found = read_declarations(text)
    lines = [CORE_HEAD]
    for name, fields in found.structs.items():
        lines += [*_struct_lines(name, fields), ""]
    lines += ["class _Lib:"]
    lines += [f"    {name}: int" for name in found.constants]
    for name, function in found.functions.items():
        parameters = "".join(f", {each}" for each in _parameters(function))
        result = python_type(function.type)
        slash = ", /" if parameters else ""
        lines.append(f"    def {name}(self{parameters}{slash}) -> {result}: ...")
    lines += ["", "lib: _Lib", "", *_ffi_lines(found.structs), ""]
    return "\n".join(lines)


def _laid_out(text: str) -> str:
    """Return a stub as ruff formats it."""
    ruff = str(Path(sys.executable).with_name("ruff"))
    command = [ruff, "format", "--stdin-filename", "stub.pyi", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


def stubs() -> dict[Path, str]:
    """Return the text of each stub by its path."""
    text = "".join(
        core_build.cdef_of_header((ROOT / name).read_text(), name)
        for name in core_build.present_headers(ROOT)
    )
    return {
        ROOT / "cache/_core.pyi": _laid_out(core_stub(text)),
        ROOT / "transport/_preload.pyi": PRELOAD_STUB,
    }


def main() -> int:
    """Write or check the stubs."""
    parser = argparse.ArgumentParser(description="Write the C extensions' typed stubs.")
    parser.add_argument("--check", action="store_true", help="compare only; 1 if one differs")
    only_check = parser.parse_args().check
    stale = []
    for path, text in stubs().items():
        if path.exists() and path.read_text() == text:
            continue
        if only_check:
            stale.append(str(path.relative_to(ROOT)))
        else:
            path.write_text(text)
    if stale:
        print(f"{', '.join(stale)}: differs from the headers; run `make stubs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
