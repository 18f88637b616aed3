"""KVMTICK_PURE=1 at run time: the Python modules are imported even where mypyc's stand beside them.

The native shim has no Python source and is imported as ever.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from types import ModuleType

__all__ = ["prefer_sources"]


class SourceFinder:
    """Finds the modules of this package that have a source file."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder` describes."""
        if path is None or not fullname.startswith("kvmtick."):
            return None
        for folder in path:
            finder = FileFinder(folder, (SourceFileLoader, SOURCE_SUFFIXES))
            spec = finder.find_spec(fullname)
            if spec is not None and spec.loader is not None:
                return spec
        return None


def prefer_sources() -> None:
    """From now on in this process."""
    sys.meta_path.insert(0, SourceFinder)
