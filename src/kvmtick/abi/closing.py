"""What owns something of the host or of a VM: given back by `close`, or at the end of a `with`."""

from typing import Self

__all__ = ["Closing"]


class Closing:
    """A context manager that closes itself."""

    __slots__ = ()

    def close(self) -> None:
        """Give everything back; harmless when repeated."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
