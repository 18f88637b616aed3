"""Builds what is compiled: the native shim over Unicorn, and by mypyc the modules a tick passes
through. Everything else about the package is in pyproject.toml.

KVMTICK_PURE=1 leaves the modules as Python; the shim is needed all the same.
"""

import os
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

NEEDS = (
    "kvmtick compiles C (kvmtick.cpu._shim, and the modules that mypyc translates): {missing}. "
    "Install a C compiler and Python's headers, e.g. `apt-get install gcc python3-dev` "
    "or `dnf install gcc python3-devel`, and run the installation again."
)
NEEDS_MYPYC = (
    "kvmtick's modules are translated to C by mypyc, which cannot be imported ({missing}). "
    "Run `pip install 'mypy>=2.1' 'setuptools>=77'` and the build again, "
    "or leave them as Python with KVMTICK_PURE=1 (slower)."
)
SOURCES = Path("src")
COMPILED = (
    "timing/[!w]*.py",
    "irqchip/*.py",
    "vcpu/*.py",
    "trace/decoder.py",
    "trace/event_reader.py",
    "trace/events.py",
    "trace/encode.py",
    "trace/recorder.py",
    "ticks/*.py",
    "cpu/engine.py",
    "cpu/listed.py",
    "machine/machine.py",
    "machine/board.py",
    "machine/ports.py",
)
"""Within the package; `doctor` says whether they are."""
BEGAN = time.time()
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


def missing_tool() -> str | None:
    """What the compilation would fail for, or None."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"the C compiler `{compiler}` was not found"
    folders = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any((Path(folder) / "Python.h").exists() for folder in folders):
        return f"the header Python.h was not found in {', '.join(sorted(folders))}"
    return None


def compiled_modules() -> list[Extension]:
    """What mypyc makes of `COMPILED`: one library, and a stub for each module."""
    if os.environ.get("KVMTICK_PURE") or not BUILDING & set(sys.argv):
        return []
    try:
        from mypyc.build import mypycify
    except ImportError as error:
        raise SystemExit(NEEDS_MYPYC.format(missing=error)) from None

    package = SOURCES / "kvmtick"
    modules = sorted({str(path) for each in COMPILED for path in package.glob(each)})
    options = ["--config-file=pyproject.toml", *modules]
    return mypycify(options, opt_level="2", debug_level="0", multi_file=True, group_name="kvmtick")


class Build(build_ext):
    """Compiles on all cores, and says in one sentence what is missing instead of a page of compiler
    output.
    """

    def run(self) -> None:
        if self.inplace:
            self.remove_old()
        super().run()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for built in self.built_in_place():
            # Newer than its source says up to date, also where nothing had to be linked anew.
            os.utime(built, (BEGAN, BEGAN))

    def build_extensions(self) -> None:
        missing = missing_tool()
        if missing:
            raise SystemExit(NEEDS.format(missing=missing))
        try:
            self.compile_at_once()
            super().build_extensions()
        except (BaseError, CompileError, LinkError) as error:
            raise SystemExit(NEEDS.format(missing=f"the compiler failed ({error})")) from None

    def remove_old(self) -> None:
        """What an earlier build compiled would be imported in place of the Python that it no longer
        is.
        """
        for old in self.built_in_place():
            old.unlink()

    def built_in_place(self) -> list[Path]:
        return [*SOURCES.glob("kvmtick__mypyc*.so"), *SOURCES.glob("kvmtick/**/*.so")]

    def compile_at_once(self) -> None:
        """The sources of an extension in as many processes as there are processors, and only those
        that changed: mypyc leaves a file as it is when it would write the same.
        """
        compiler = self.compiler
        headers = [path.stat().st_mtime for path in Path("build").glob("*.h")]

        def is_old(target: str, source: str) -> bool:
            if not Path(target).exists():
                return True
            return Path(target).stat().st_mtime < max(Path(source).stat().st_mtime, *headers, 0)

        def compile_sources(
            sources,
            output_dir=None,
            macros=None,
            include_dirs=None,
            debug=0,
            extra_preargs=None,
            extra_postargs=None,
            depends=None,
        ):
            macros, objects, extra_postargs, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)

            def compile_one(target: str) -> None:
                source, suffix = build[target]
                if "_shim" in target or is_old(target, source):
                    compiler._compile(target, source, suffix, cc_args, extra_postargs, pp_opts)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, build))
            return objects

        compiler.compile = compile_sources


setup(
    ext_modules=[
        Extension(
            "kvmtick.cpu._shim",
            sorted(str(source) for source in Path("src/kvmtick/cpu/shim").glob("*.c")),
            depends=["src/kvmtick/cpu/shim/shim.h"],
            libraries=["dl"],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
        ),
        *compiled_modules(),
    ],
    cmdclass={"build_ext": Build},
)
