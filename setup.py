"""Builds the native shim over Unicorn; everything else about the package is in pyproject.toml."""

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

NEEDS = (
    "kvmtick compiles a small C extension (kvmtick.cpu._shim): {missing}. "
    "Install a C compiler and Python's headers, e.g. `apt-get install gcc python3-dev` "
    "or `dnf install gcc python3-devel`, and run the installation again."
)


def missing_tool() -> str | None:
    """What the compilation would fail for, or None."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"the C compiler `{compiler}` was not found"
    folders = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any((Path(folder) / "Python.h").exists() for folder in folders):
        return f"the header Python.h was not found in {', '.join(sorted(folders))}"
    return None


class BuildShim(build_ext):
    """Says in one sentence what is missing instead of a page of compiler output."""

    def build_extensions(self) -> None:
        missing = missing_tool()
        if missing:
            raise SystemExit(NEEDS.format(missing=missing))
        try:
            super().build_extensions()
        except (BaseError, CompileError, LinkError) as error:
            raise SystemExit(NEEDS.format(missing=f"the compiler failed ({error})")) from None


setup(
    ext_modules=[
        Extension(
            "kvmtick.cpu._shim",
            sorted(str(source) for source in Path("src/kvmtick/cpu/shim").glob("*.c")),
            depends=["src/kvmtick/cpu/shim/shim.h"],
            libraries=["dl"],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
        )
    ],
    cmdclass={"build_ext": BuildShim},
)
