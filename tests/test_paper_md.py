"""PAPER.md: the functions and tests that it names exist, and nothing numbered is left out."""
import ast
import functools
import re

import pytest
from helpers import ROOT

TEXT = (ROOT / "PAPER.md").read_text(encoding="utf-8")
FUNCTION = re.compile(r"`([\w/]+\.py): ([\w.]+)`")             # `carrier.py: Carrier.merge`
TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")               # `tests/test_carrier.py::test_linear`
FUNCTIONS, TESTS = sorted(set(FUNCTION.findall(TEXT))), sorted(set(TEST.findall(TEXT)))


@functools.cache
def names(source):
    """Functions, classes, their methods as Class.method, and constants of a piece of source."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def rows(text):
    """First cell → the whole line, for every row of every table that is no header."""
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    found = {line.split("|")[1].strip(): line for line in lines}
    del found["of the paper"]
    return found


def equations(label):
    """The numbers in a label: 'Eq. 9, 10' and 'Eq. 16–18' alike."""
    found = set()
    for first, last in re.findall(r"(\d+)(?:–(\d+))?", label.partition("Eq. ")[2]):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_names_are_found():
    source = "A = 1\ndef f(): pass\nclass C:\n    def g(self):\n        def h(): pass"
    assert names(source) == {"A", "f", "C", "C.g"}


def test_equations_are_counted():
    assert equations("Eq. 9, 10") == {9, 10}
    assert equations("Eq. 16–18") == {16, 17, 18}
    assert equations("Table 5") == set()


@pytest.mark.parametrize("file, name", FUNCTIONS)
def test_the_function_exists(file, name):
    assert name in names((ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("file, name", TESTS)
def test_the_test_exists(file, name):
    assert name.startswith("test_")
    assert name in names((ROOT / file).read_text(encoding="utf-8"))


def test_every_pointer_is_read():
    """What looks like a pointer and has a typing error would be looked up by no test above."""
    pointers = re.findall(r"`[^`]*\.py(?:: |::)[^`]*`", TEXT)
    assert all(FUNCTION.fullmatch(p) or TEST.fullmatch(p) for p in pointers), pointers


def test_every_row_names_code_and_a_test():
    for label, line in rows(TEXT).items():
        assert FUNCTION.search(line), label
        assert TEST.search(line), label


def test_every_equation_has_a_row():
    assert set().union(*map(equations, rows(TEXT))) == set(range(1, 29))


@pytest.mark.parametrize("label", [
    "Alg. 1", "Tables 1–3", "Table 4", "Table 5", "Table 6", "Table 7",
    "App. E", "App. F.1", "App. F.2", "App. F.3", "App. F.4"])
def test_algorithm_tables_and_appendices_have_rows(label):
    assert any(label in row for row in rows(TEXT))
