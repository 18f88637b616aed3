"""What the verbs share in reading their options."""

import argparse
from typing import NoReturn

from kvmtick.cli import UsageError

__all__ = ["Parser"]

_NUMBER_STARTS = ("-0", "-1", "-2", "-3", "-4", "-5", "-6", "-7", "-8", "-9", "-.")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Instead of usage and exit."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_command_line(self, argv: list[str]) -> argparse.Namespace:
        """`parse_args`, but what looks like a negative number (`-5ms`) is the value of the option
        before it: whoever reads that option can say what is wrong with it.
        """
        joined: list[str] = []
        for word in argv:
            if word.startswith(_NUMBER_STARTS) and joined and joined[-1].startswith("--"):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return self.parse_args(joined)
