"""`kvmtick query`: what it prints, and what it says of what it cannot answer."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from recordings import write_recording
from terminal import Terminal

from kvmtick.report.query import COLUMNS
from kvmtick.report.tables import write_tables

pytest.importorskip("duckdb", reason="duckdb is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a recording's tables."""
    directory = tmp_path_factory.mktemp("trace")
    write_tables(write_recording(directory / "t.ktrace", "tick-mask"), directory)
    return str(directory)


def test_a_table_for_people(kvmtick: Terminal, tables: str) -> None:
    result = kvmtick(
        "query", tables, "SELECT name, tick, place, 1.5 AS x FROM ticks ORDER BY tick LIMIT 2"
    )
    assert (result.code, result.err) == (0, "")
    assert [line.split() for line in result.out.splitlines()] == [
        ["name", "tick", "place", "x"],
        ["tick-mask", "1", "1.5"],
        ["tick-mask", "2", "1.5"],
    ]


def test_a_recording_is_asked_itself(kvmtick: Terminal, tables: str) -> None:
    result = kvmtick("query", f"{tables}/t.ktrace", "SELECT count(*) AS n FROM ticks", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == [{"n": 9}]


def test_json_has_every_kind_of_value(kvmtick: Terminal, tables: str) -> None:
    result = kvmtick(
        "query",
        tables,
        "SELECT 1 AS i, 1.5::DECIMAL(4, 2) AS d, 2::DECIMAL(4, 0) AS whole, 'nan'::DOUBLE AS nan,"
        " true AS b, NULL AS none, MAP {'a': 1} AS m, [1, NULL] AS l, DATE '2026-01-02' AS day,"
        " 'x'::BLOB AS bytes",
        "--json",
    )
    assert json.loads(result.out) == [
        {
            "i": 1,
            "d": 1.5,
            "whole": 2,
            "nan": None,
            "b": True,
            "none": None,
            "m": {"a": 1},
            "l": [1, None],
            "day": "2026-01-02",
            "bytes": "b'x'",
        }
    ]


def test_csv(kvmtick: Terminal, tables: str) -> None:
    sql = "SELECT tick, NULL AS nothing, fields FROM ticks, events LIMIT 150"
    result = kvmtick("query", tables, sql, "--csv")
    header, *rows = csv.reader(io.StringIO(result.out))
    assert header == ["tick", "nothing", "fields"]
    assert len(rows) == 150
    assert rows[0][1] == ""
    assert json.loads(rows[0][2])


def test_many_rows_are_shown_in_part_and_given_whole(kvmtick: Terminal, tables: str) -> None:
    everything = kvmtick("query", tables, "FROM events", "--json")
    count = len(json.loads(everything.out))
    result = kvmtick("query", tables, "FROM events")
    lines = result.out.splitlines()
    assert len(lines) == 1 + 100 + 1
    assert lines[-1] == f"... {count - 100} more rows; --json or --csv gives all"
    assert len(kvmtick("query", tables, "FROM events LIMIT 100").out.splitlines()) == 101
    assert "... 1 more row;" in kvmtick("query", tables, "FROM events LIMIT 101").out


@pytest.mark.parametrize(("form", "out"), [("--json", "[]\n"), ("--csv", "vm,name,notes\n")])
def test_no_rows(kvmtick: Terminal, tables: str, form: str, out: str) -> None:
    assert kvmtick("query", tables, "FROM vms WHERE false", form).out == out


def test_without_a_question_the_tables_are_listed(kvmtick: Terminal, tables: str) -> None:
    for source in (tables, f"{tables}/t.ktrace"):
        result = kvmtick("query", source)
        assert result.code == 0
        listed = [line.split() for line in result.out.splitlines()[1:]]
        assert [(line[0], line[1]) for line in listed] == [
            (table, column) for table, columns in COLUMNS.items() for column in columns
        ]
    assert json.loads(kvmtick("query", tables, "--json").out) == COLUMNS


def test_help_has_examples(kvmtick: Terminal) -> None:
    result = kvmtick("query", "--help")
    assert result.code == 0
    for word in (*COLUMNS, "--json", "--csv", "GROUP BY"):
        assert word in result.out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "the following arguments are required: FILE"),
        (["/nowhere", "FROM ticks"], "/nowhere: No such file or directory; give a recording"),
        (["/nowhere"], "/nowhere: No such file or directory; give a recording"),
        ([sys.executable, "FROM ticks"], "neither a recording of kvmtick nor ftrace text"),
        (["{empty}"], "no tables of kvmtick: give a directory that report --parquet wrote"),
        (["{tables}", "SELECT x FROM vms"], 'column "x" not found'),
        (["{tables}", "DROP VIEW ticks"], "DROP is no question: give a SELECT"),
        (["{tables}", "FROM ticks", "--json", "--csv"], "not allowed with argument"),
    ],
)
def test_what_is_wrong_in_one_line(
    kvmtick: Terminal, tables: str, tmp_path: Path, words: list[str], what: str
) -> None:
    result = kvmtick("query", *(word.format(tables=tables, empty=tmp_path) for word in words))
    assert (result.code, result.out) == (2, "")
    assert what in result.err
    assert result.err.count("\n") == 1
    assert result.err.startswith("kvmtick: ")


def test_a_missing_library_is_told(
    kvmtick: Terminal, tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    result = kvmtick("query", tables, "FROM ticks")
    assert result.code == 3
    assert "duckdb" in result.err
    assert "pip install 'kvmtick[export]'" in result.err
    assert result.err.count("\n") == 1
