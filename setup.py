# SPDX-License-Identifier: Apache-2.0
"""Builds what pyproject.toml cannot say: the cffi extension, for the stable ABI of Python 3.11.

The build script itself is left out of the wheel: it reads C headers that only the source tree has.
"""

from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# The library that `cowshed attach` preloads into programs: no module, but built and shipped as one.
# It contains no Python, and is never built with a sanitizer, since the programs would need it too.
PRELOAD = Extension(
    "cowshed.transport._preload",
    sources=[
        "transport/core/elf.c",
        *(
            f"transport/core/guest/{name}.c"
            for name in ("guard", "handshake", "json", "orphan", "packets", "replace")
        ),
        *sorted(glob("transport/preload/*.c")),
    ],
    depends=[
        "transport/core/elf.h",
        *sorted(glob("transport/core/guest/*.h")),
        "cache/core/abi.h",
        *sorted(glob("transport/preload/*.h")),
    ],
    include_dirs=["."],
    py_limited_api=True,
    extra_compile_args=[
        *("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-pthread", "-fvisibility=hidden"),
        *("-UNDEBUG", "-U_FORTIFY_SOURCE"),
    ],
    extra_link_args=["-pthread", "-Wl,-z,now"],
)


class BuildPackages(build_py):
    """Collects the packages' modules, without the ones that only a build needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, file) of each module that belongs into the wheel."""
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "core_build"]


setup(
    ext_modules=[PRELOAD],
    cffi_modules=["cache/core_build.py:ffibuilder"],
    cmdclass={"build_py": BuildPackages},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
