"""How dense the code reads, file by file.

    python -m lab.density [FILE …]          without files: every Python file of the repository

Columns: code lines; tokens a code line, median and 90th percentile; share of non-blank lines over
100 columns. Docstrings and comments are no tokens. A table to look at: nothing depends on it.
"""
import ast
import io
import statistics
import tokenize
from collections import Counter
from pathlib import Path

from files import InputError
from console import Parser, check_numbers, cli, markdown

LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}


def docstring_lines(source):
    """Numbers of the lines that docstrings stand on."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                found |= set(range(node.lineno, node.end_lineno + 1))
    return found


def tokens_a_line(source):
    """
    Tokens of every line that has any, counted where they begin.

    >>> tokens_a_line("x = f(1)  # one\\n\\ny = 2\\n")
    [6, 3]
    """
    skipped = docstring_lines(source)
    counts = Counter()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in skipped:
            counts[token.start[0]] += 1
    return [counts[line] for line in sorted(counts)]


def quantile(values, share):
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def row(name, tokens, lines):
    """The table's cells for one file, or for all."""
    wide = sum(len(line) > 100 for line in lines) / max(1, len(lines))
    median = f"{statistics.median(tokens):.0f}" if tokens else "–"
    high = str(quantile(tokens, 0.9)) if tokens else "–"
    return [name, str(len(tokens)), median, high, f"{wide:.0%}"]


def main():
    p = Parser(__doc__)
    p.add_argument("files", nargs="*", type=Path, metavar="FILE")
    o = p.parse_args()
    check_numbers(o)
    root = Path(__file__).parent.parent
    some = o.files or [*root.glob("*.py"), *root.glob("lab/*.py"), *root.glob("tests/*.py")]
    table, all_tokens, all_lines = [], [], []
    for path in sorted(some):
        try:
            source = path.read_text(encoding="utf-8")
            tokens = tokens_a_line(source)
        except (OSError, SyntaxError, ValueError, tokenize.TokenError) as e:
            raise InputError(f"{path}: cannot be read as Python ({e})") from None
        lines = [line for line in source.split("\n") if line.strip()]
        name = path.relative_to(root) if path.is_relative_to(root) else path
        table.append(row(str(name), tokens, lines))
        all_tokens += tokens
        all_lines += lines
    table.append(row("all", all_tokens, all_lines))
    header = ["file", "code lines", "tokens, median", "90th percentile", "over 100 columns"]
    print(markdown(header, table))


if __name__ == "__main__":
    cli(main)
