"""JUnit XML as the usual readers want it."""

from xml.etree import ElementTree

from kvmtick.conform.case import Case, Failed
from kvmtick.conform.junit import junit
from kvmtick.conform.run import Result


def case(name: str) -> Case:
    return Case(name, 'Right is "<1>" & more.', lambda bench: None)


RESULTS = [
    Result(case("pit.one"), "passed", "", 0.25),
    Result(
        *(case("pit.two-with.dots"), "failed", "count: expected <1>, got 2\x00\x1b", 0.5),
        failed=Failed("count", 1, 2),
    ),
    Result(case("pic.three"), "failed", "ValueError: no", 0.0, traceback="line 1\nline 2"),
    Result(case("pic.four"), "skipped", "not here", 0.25),
]


def test_suite_and_counts() -> None:
    root = ElementTree.fromstring(junit("kernel", RESULTS))
    [suite] = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert suite.attrib == {
        "name": "kvmtick conform kernel",
        "tests": "4",
        "failures": "2",
        "errors": "0",
        "skipped": "1",
        "time": "1.000",
    }


def test_each_case_is_a_test_case() -> None:
    suite = ElementTree.fromstring(junit("kernel", RESULTS))[0]
    assert [(test.get("classname"), test.get("name"), test.get("time")) for test in suite] == [
        ("conform.pit", "one", "0.250"),
        ("conform.pit", "two-with.dots", "0.500"),
        ("conform.pic", "three", "0.000"),
        ("conform.pic", "four", "0.250"),
    ]
    for test in suite:
        right = test.find("properties/property")
        assert right is not None
        assert (right.get("name"), right.get("value")) == ("right", 'Right is "<1>" & more.')


def test_outcomes() -> None:
    passed, failed, broke, skipped = ElementTree.fromstring(junit("kernel", RESULTS))[0]
    assert [child.tag for child in passed] == ["properties"]
    failure = failed.find("failure")
    assert failure is not None
    assert (failure.get("type"), failure.get("message")) == (
        "Failed",
        r"count: expected <1>, got 2\x00\x1b",
    )
    failure = broke.find("failure")
    assert failure is not None
    assert (failure.get("type"), failure.text) == ("Error", "line 1\nline 2")
    reason = skipped.find("skipped")
    assert reason is not None
    assert reason.get("message") == "not here"


def test_nothing_at_all_is_a_document_too() -> None:
    assert ElementTree.fromstring(junit("model", []))[0].get("tests") == "0"
