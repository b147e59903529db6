# SPDX-License-Identifier: Apache-2.0
"""Builds what pyproject.toml cannot say: the cffi extension, for the stable ABI of Python 3.11.

The build script itself is left out of the wheel: it reads C headers that only the source tree has.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackages(build_py):
    """Collects the packages' modules, without the ones that only a build needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return (package, module, file) of each module that belongs into the wheel."""
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "core_build"]


setup(
    cffi_modules=["cache/core_build.py:ffibuilder"],
    cmdclass={"build_py": BuildPackages},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
