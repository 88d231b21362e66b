"""The house: imports run downwards only, from the floor of the files to the laboratory under the roof."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"files"},
    {"weights", "spm"},
    {"chat", "behaviour", "model"},
    {"data", "carrier"},
    {"paper"},
    {"lora"},
    {"run"},
    {"lcdd", "eraser"},
    {"evaluate", "export"},
    {"lab"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")])


def imports(source):
    """The first names of all modules that a piece of source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.add(node.module.split(".")[0])
    return found


def module(path):
    """The name of a file's module; a file of lab/ counts as lab."""
    return path.stem if path.parent == ROOT else "lab"


def test_imports_are_found():
    assert imports("import a.b, c\ndef f():\n    from d.e import x") == {"a", "c", "d"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    own = module(path)
    assert own in FLOOR, f"{path.name} has no floor: name it in FLOORS"
    for name in imports(path.read_text(encoding="utf-8")) & FLOOR.keys():
        assert FLOOR[name] < FLOOR[own], f"{own} imports {name}"
