"""Libraries of an extra: imported when they are there, else one line that says what to install."""

import pytest

from kvmtick.abi.errors import HostError
from kvmtick.report.extras import extra


def test_a_library_that_is_there() -> None:
    with extra("report", "--png"):
        import json
    assert json.loads("1") == 1


def test_one_that_is_missing_is_told_with_the_remedy() -> None:
    with pytest.raises(HostError) as caught, extra("export", "--parquet"):
        import pyarrow_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401
    assert str(caught.value) == (
        "--parquet needs pyarrow_that_is_not_there, which cannot be imported here;"
        " pip install 'kvmtick[export]'"
    )
