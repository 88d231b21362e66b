"""The house: seven files at the root that import one way, run without lab/, and stay within their budgets."""
import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = ["common", "model", "carrier", "data", "lcdd", "eraser", "evaluate"]      # a file imports those before it
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def modules_of(path):
    """Top-level names of the modules that a file imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def code_lines(path):
    """[tokens of each line that carries one], without comments and docstrings; and how many comment lines."""
    text, documented, tokens, comments = path.read_text(), set(), {}, 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comments += token.type == tokenize.COMMENT
        if token.type not in NO_CODE:
            for line in range(token.start[0], token.end[0] + 1):
                if line not in documented:
                    tokens[line] = tokens.get(line, 0) + (line == token.start[0])
    return list(tokens.values()), comments + len(documented)


def test_the_root_is_seven_files_that_import_one_way():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(ORDER)
    for i, name in enumerate(ORDER):
        ours = modules_of(ROOT / f"{name}.py") & {*ORDER, "lab", "tests"}
        assert ours <= set(ORDER[:i]), (name, ours)


def test_the_commands_start_with_lab_and_tests_deleted(tmp_path):
    for name in ORDER:
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    for name in ("lcdd", "eraser", "evaluate"):
        done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "--device" in done.stdout, done.stderr


def test_options_are_few():
    import eraser
    import evaluate
    import lcdd
    assert [len(module.OPTIONS) for module in (lcdd, eraser, evaluate)] <= [32, 16, 9]
    assert len(lcdd.OPTIONS) <= 32 and len(eraser.OPTIONS) <= 16 and len(evaluate.OPTIONS) <= 9


def test_budgets(capsys):
    """Code lines of root, lab and tests; tokens a line at the root; comments."""
    parts = {"root": ROOT.glob("*.py"), "lab": ROOT.glob("lab/*.py"), "tests": ROOT.glob("tests/*.py")}
    counts = {part: {path.name: code_lines(path) for path in paths} for part, paths in parts.items()}
    totals = {part: sum(len(tokens) for tokens, _ in files.values()) for part, files in counts.items()}
    each = sorted(n for tokens, _ in counts["root"].values() for n in tokens)
    with capsys.disabled():
        print(f"\ncode lines {totals}; root: tokens {sum(each)}, per line median {each[len(each) // 2]}, "
              f"p90 {each[int(0.9 * len(each))]}, most {each[-1]}")
    assert totals["root"] <= 2200 and totals["lab"] <= 2600 and totals["tests"] <= 3500
    assert each[-1] <= 40
    for name, (tokens, comments) in counts["root"].items():
        assert len(tokens) <= 450 and comments >= 0.15 * len(tokens), name
