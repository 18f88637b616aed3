"""What the verbs share in reading their options."""

import argparse
from typing import NoReturn

from kvmtick.cli import UsageError

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Instead of usage and exit."""
        raise UsageError(f"{message}; see {self.prog} --help")
