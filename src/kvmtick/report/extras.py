"""Libraries that only some outputs need: imported when used, missed in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvmtick.abi.errors import HostError

__all__ = ["extra"]


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around the imports of the extra `name` (pyproject.toml), which `what` needs.

    Raises `HostError` with the command that installs it where one is missing.

    with extra("report", "--png"):
        import matplotlib
    """
    try:
        yield
    except ImportError as error:
        raise HostError(
            f"{what} needs {error.name or error}, which cannot be imported here",
            f"pip install 'kvmtick[{name}]'",
        ) from None
