"""The house: seven files at the root that import one way, run without lab/, and stay small."""
import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import eraser
import evaluate
import lcdd

ROOT = Path(__file__).parents[1]
# a file imports those before it
ORDER = ["common", "model", "carrier", "data", "lcdd", "eraser", "evaluate"]
NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
    tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def modules_of(path):
    """Top-level names of the modules that a file imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def docstring_lines(text):
    """The numbers of the lines that belong to docstrings."""
    lines = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def code_lines(path):
    """([tokens of each line that carries one], comment and docstring lines)."""
    text = path.read_text()
    documented, tokens = docstring_lines(text), {}
    comments, within = len(documented), 0               # an f-string is one token, as before 3.12
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comments += token.type == tokenize.COMMENT
        first, last = token.start[0], token.end[0]
        within -= tokenize.tok_name[token.type] == "FSTRING_END"
        if token.type not in NO_CODE and first not in documented and not within:
            for line in range(first, last + 1):         # a long string has several
                tokens[line] = tokens.get(line, 0) + (line == first)
        within += tokenize.tok_name[token.type] == "FSTRING_START"
    return list(tokens.values()), comments


def test_the_root_is_seven_files_that_import_one_way():
    """No file of the root knows of those behind it, of lab or of tests."""
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(ORDER)
    for i, name in enumerate(ORDER):
        ours = modules_of(ROOT / f"{name}.py") & {*ORDER, "lab", "tests"}
        assert ours <= set(ORDER[:i]), (name, ours)


def test_the_commands_start_with_lab_and_tests_deleted(tmp_path):
    """Each in a folder that holds the seven files and no other."""
    for name in ORDER:
        source = (ROOT / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(source)
    for name in ("lcdd", "eraser", "evaluate"):
        words = [sys.executable, f"{name}.py", "--help"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "--device" in done.stdout, done.stderr


def test_options_are_few():
    """What nobody turns is a named constant."""
    for module, most in ((lcdd, 32), (eraser, 16), (evaluate, 9)):
        assert len(module.OPTIONS) <= most, module.__name__


def test_budgets(capsys):
    """
    Code lines of root, lab and tests, helpers and oracle included. The root's aim is 2,200: it may
    shrink, and must not grow.
    """
    parts = {"root": ("*.py", 2390), "lab": ("lab/*.py", 2600), "tests": ("tests/*.py", 3500)}
    for part, (pattern, most) in parts.items():
        total = sum(len(code_lines(path)[0]) for path in ROOT.glob(pattern))
        with capsys.disabled():
            print(f"\n{part}: {total} code lines of {most}", end="")
        assert total <= most


def test_lines_and_files_of_the_root_are_short(capsys):
    """Code lines of each file, tokens of a line, and comments beside them."""
    every = []
    for name in ORDER:
        tokens, comments = code_lines(ROOT / f"{name}.py")
        every += tokens
        assert len(tokens) <= 450 and max(tokens) <= 40, name
        assert comments >= 0.15 * len(tokens), name
    every.sort()
    median, p90 = every[len(every) // 2], every[int(0.9 * len(every))]
    with capsys.disabled():
        print(f"\ntokens of the root {sum(every)}: median of a line {median}, p90 {p90}", end="")
