"""Results as JUnit XML: one test suite, a test case of each conformance case.

`classname` is the module, `name` the rest of the case's name; what is right is a property of it.
"""

from collections.abc import Iterable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from kvmtick.conform.run import Result

__all__ = ["junit"]


def junit(backend: str, results: Iterable[Result]) -> bytes:
    """An XML document."""
    results = list(results)
    counts = {
        "tests": str(len(results)),
        "failures": str(sum(result.outcome == "failed" for result in results)),
        "errors": "0",
        "skipped": str(sum(result.outcome == "skipped" for result in results)),
        "time": f"{sum(result.wall_s for result in results):.3f}",
    }
    root = Element("testsuites", counts)
    suite = SubElement(root, "testsuite", {"name": f"kvmtick conform {backend}", **counts})
    for result in results:
        _add(suite, result)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, "utf-8", xml_declaration=True)
    return document + b"\n"


def _add(suite: Element, result: Result) -> None:
    module, _, name = result.case.name.partition(".")
    test = SubElement(
        suite,
        "testcase",
        {"classname": f"conform.{module}", "name": name, "time": f"{result.wall_s:.3f}"},
    )
    properties = SubElement(test, "properties")
    SubElement(properties, "property", {"name": "right", "value": _text(result.case.right)})
    if result.outcome == "skipped":
        SubElement(test, "skipped", {"message": _text(result.reason)})
    elif result.outcome == "failed":
        kind = "Failed" if result.failed else "Error"
        failure = SubElement(test, "failure", {"message": _text(result.reason), "type": kind})
        failure.text = _text(result.traceback or result.reason)


def _text(text: str) -> str:
    """XML 1.0 has no control characters, not even escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
