"""
The house: imports run downwards only, from the floor of the files to the laboratory under the roof.
"""
import ast
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

FLOORS = [
    {"parallel"},
    {"files", "template"},
    {"spm", "patterns", "packed", "config", "machine", "memory", "console"},
    {"ggufs", "rows"},
    {"weights"},
    {"chat", "behaviour", "model"},
    {"data", "carrier"},
    {"paper"},
    {"lora"},
    {"run"},
    {"settings", "answered", "training"},
    {"plan", "controller", "checks"},
    {"lcdd", "eraser"},
    {"metrics"},
    {"figure"},
    {"evaluate", "export"},
    {"lab"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")])


def imports(source):
    """
    The first names of all modules that a piece of source imports, wherever in it the import stands.
    """
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
    found = imports(path.read_text(encoding="utf-8")) & FLOOR.keys()
    if own == "lab":
        found.discard("lab")  # one floor, several rooms
    for name in found:
        assert FLOOR[name] < FLOOR[own], f"{own} imports {name}"


def test_the_drawing_is_true():
    """PAPER.md's drawing of the house has every file on its floor: a new file belongs there too."""
    drawn = (ROOT / "PAPER.md").read_text(encoding="utf-8").partition("```mermaid")[2]
    floors = drawn.split("subgraph ")[1:]
    assert [set(re.findall(r"<b>(\w+)", floor)) for floor in floors] == FLOORS


def is_script(path):
    """Is the file run as a command that computes?"""
    text = path.read_text(encoding="utf-8")
    return '__name__ == "__main__"' in text and path.stem != "density"


@pytest.mark.parametrize("path", list(filter(is_script, SOURCES)), ids=lambda p: p.name)
def test_a_script_says_how_threads_wait_before_torch_is_imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert isinstance(first, ast.Import)
    assert [alias.name for alias in first.names] == ["files"]


def test_threads_sleep_while_they_wait():
    """Set before torch is imported, and left alone where the user has set it."""
    # a finder that stands before all others, and ends the process where torch is looked for
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(name, *rest):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch)\n"
        "import lcdd\n")
    for given, found in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        clean = {
            k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        }
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=clean | given, capture_output=True,
            text=True, check=True
        )
        assert done.stdout.strip() == found
