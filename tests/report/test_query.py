"""SQL over a trace: it answers as the report does, and reads nothing else."""

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from recordings import write_recording

from kvmtick.report.query import COLUMNS, QueryError, Tables, open_tables
from kvmtick.report.tables import EVENTS, TICKS, write_tables
from kvmtick.trace.formats import FormatError

pytest.importorskip("duckdb", reason="duckdb is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "exporting.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of a guest that keeps interrupts off for some ticks."""
    return write_recording(tmp_path_factory.mktemp("trace") / "t.ktrace", "tick-if0")


@pytest.fixture(scope="module")
def directory(recording: Path) -> Path:
    """Its tables."""
    write_tables(recording, recording.parent / "tables")
    return recording.parent / "tables"


@pytest.fixture
def tables(directory: Path) -> Iterator[Tables]:
    """To be asked."""
    with open_tables(directory) as opened:
        yield opened


def rows(tables: Tables, sql: str) -> list[tuple[object, ...]]:
    """All rows of an answer."""
    return [row for chunk in tables.ask(sql).chunks() for row in chunk]


def test_a_trace_and_its_directory_answer_alike(recording: Path, directory: Path) -> None:
    told: list[int] = []
    with (
        open_tables(recording, lambda trace: told.append(trace.position_bytes)) as of_trace,
        open_tables(directory) as of_directory,
    ):
        for table in COLUMNS:
            sql = f"SELECT * FROM {table}"
            assert rows(of_trace, sql) == rows(of_directory, sql) != []
    assert told


def test_the_columns_are_those_that_are_told(tables: Tables) -> None:
    for table, columns in COLUMNS.items():
        described = rows(tables, f"DESCRIBE {table}")
        assert [row[:2] for row in described] == list(columns.items())


def test_the_tables_are_gone_when_the_question_is_answered(
    recording: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_tables(recording) as tables:
        assert rows(tables, "SELECT count(*) FROM ticks") == [(9,)]
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_there_are_ten_questions() -> None:
    assert len(QUESTIONS) == 10
    assert len(set(QUESTIONS)) == 10


@pytest.mark.parametrize("sql", QUESTIONS)
def test_the_page_s_questions_have_answers(tables: Tables, sql: str) -> None:
    if "hurried" not in sql:
        assert rows(tables, sql)
    assert tables.ask(sql).columns


def test_what_the_page_s_questions_say(tables: Tables) -> None:
    verdicts = {row[3]: row[4] for row in rows(tables, QUESTIONS[0])}
    lives = rows(tables, "SELECT verdict, inject_ns, expiry_ns, expiry_to_eoi_ns FROM ticks")
    assert verdicts == Counter(row[0] for row in lives)
    slowest = max(row[3] for row in lives if isinstance(row[3], int))
    assert rows(tables, QUESTIONS[1])[0][4] == slowest
    assert rows(tables, QUESTIONS[4])[0][4] == slowest
    (clock,) = rows(tables, QUESTIONS[7])
    assert clock[3:] == (9, sum(row[1] is not None for row in lives), 0.0)
    around = rows(tables, QUESTIONS[9])
    assert around[0][0] == min(row[0] for row in around if isinstance(row[0], int))
    assert around[-1][0] == slowest
    assert "kvm_ack_irq" in [row[4] for row in around]


def test_bursts_are_found(tables: Tables) -> None:
    (burst,) = [sql for sql in QUESTIONS if "hurried" in sql]
    ((_, source, _, hurried, closest_ns),) = rows(tables, burst)
    at = sorted(row[0] for row in rows(tables, "SELECT inject_ns FROM ticks WHERE inject_ns > 0"))
    after = [after - before for before, after in pairwise(at)]
    period_ns = 999_848
    assert source == "pit"
    assert hurried == sum(ns < period_ns / 2 for ns in after)
    assert closest_ns == min(after)


@pytest.mark.parametrize(
    ("sql", "what"),
    [
        ("selec 1", "syntax error"),
        ("SELECT nosuch FROM ticks", "ticks has vm, name, source"),
        ("SELECT 1 FROM nosuch", "there are the tables ticks, events, vms, trace"),
        ("SELECT 1; SELECT 2", "2 statements: give one SELECT"),
        ("", "0 statements: give one SELECT"),
        ("SELECT 'a'::INT", "Could not convert"),
    ],
)
def test_a_mistake_is_told_in_one_line(tables: Tables, sql: str, what: str) -> None:
    with pytest.raises(QueryError, match=re.escape(what)) as caught:
        rows(tables, sql)
    assert "\n" not in str(caught.value)


def test_only_the_columns_of_the_tables_in_question_are_told(tables: Tables) -> None:
    with pytest.raises(QueryError) as caught:
        tables.ask("SELECT nosuch FROM vms")
    assert "vms has vm, name, notes" in str(caught.value)
    assert "ticks has" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM glob('{directory}/*')",
        "SELECT * FROM sniff_csv('{file}')",
        "SELECT * FROM read_parquet('{directory}/other.parquet')",
        "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
        "COPY ticks TO '{directory}/other.parquet'",
        "COPY ticks TO '{directory}/ticks.parquet' (USE_TMP_FILE false)",
        "COPY (PIVOT ticks ON verdict USING count(*)) TO '{directory}/ticks.parquet'"
        " (USE_TMP_FILE false)",
        "EXPLAIN ANALYZE COPY ticks TO '{directory}/ticks.parquet' (USE_TMP_FILE false)",
        "ATTACH '{directory}/a.db'",
        "CREATE TABLE mine AS SELECT 1",
        "DROP VIEW ticks",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "LOAD httpfs",
        "EXPORT DATABASE '{directory}/copy'",
        "CALL pragma_version()",
    ],
)
def test_nothing_else_is_read_and_nothing_written(
    recording: Path, directory: Path, tables: Tables, sql: str
) -> None:
    file = recording.parent / "secret.txt"
    file.write_text("secret")
    (directory / "other.parquet").write_bytes((directory / TICKS).read_bytes())
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(QueryError):
        rows(tables, sql.format(file=file, directory=directory))
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_a_variable_of_the_program_is_no_table(tables: Tables) -> None:
    import pyarrow as pa

    secret = pa.table({"a": [1]})
    assert len(secret) == 1
    with pytest.raises(QueryError):
        tables.ask("SELECT * FROM secret")


def test_ctrl_c_ends_a_long_question(tables: Tables) -> None:
    # Its answer would take years, so whenever the signal comes it is in the middle.
    sql = "SELECT sum(a.range * b.range) FROM range(1000000000000) a, range(1000) b"
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask() -> None:
        timer.start()
        rows(tables, sql)

    try:
        with pytest.raises(KeyboardInterrupt):
            ask()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("broken", [TICKS, EVENTS])
def test_a_directory_without_our_tables(directory: Path, tmp_path: Path, broken: str) -> None:
    for name in {TICKS, EVENTS} - {broken}:
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    for content in (None, b"PAR1 nonsense", foreign()):
        if content is not None:
            (tmp_path / broken).write_bytes(content)
        with pytest.raises(FormatError, match=f"no tables of kvmtick.*{broken}"):
            open_tables(tmp_path).__enter__()


def foreign() -> bytes:
    """A Parquet file of somebody else's."""
    import pyarrow as pa
    from pyarrow import parquet

    out = pa.BufferOutputStream()
    parquet.write_table(pa.table({"a": [1]}), out)
    content: bytes = out.getvalue().to_pybytes()
    return content
