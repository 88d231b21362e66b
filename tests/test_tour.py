"""docs/tour.ipynb: it calls the root and copies none of it, and what is committed is a whole run."""
import ast
import importlib
import json
import re
from functools import reduce
from pathlib import Path

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SHOWS = r"\b(?:print|show|display|Markdown)\("        # a cell that holds one of these has outputs


def definitions(text):
    """Names of the functions and classes that a text of code defines."""
    kinds = ast.FunctionDef, ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)}


def test_it_defines_nothing_of_the_root_and_names_what_is_there():
    """Each `file.py: name` of its text exists."""
    ours = set().union(*(definitions("".join(cell["source"])) for cell in CODE))
    assert not any(ours & definitions(path.read_text()) for path in ROOT.glob("*.py"))
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    named = re.findall(r"`(\w+)\.py: ([\w.]+)`", text)
    assert len(named) > 20
    for module, name in named:
        reduce(getattr, name.split("."), importlib.import_module(module))


def test_its_outputs_are_those_of_one_run_from_top_to_bottom():
    """No error, no warning, and no path of the machine on which it ran."""
    assert 20 <= len(CELLS) <= 30 and "docs/tour.ipynb" in (ROOT / "README.md").read_text()
    for number, cell in enumerate(CODE, 1):
        source, shown = "".join(cell["source"]), json.dumps(cell["outputs"])
        assert cell["execution_count"] == number and cell["metadata"] == {}
        assert bool(cell["outputs"]) == bool(re.search(SHOWS, source)), source
        shown = re.sub(r'"image/png": "[^"]*"', "", shown)
        assert not re.search(r'"stderr"|"error"|Traceback|Warning|(?<![\w.])/\w+/', shown), source
