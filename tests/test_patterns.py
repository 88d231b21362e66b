"""patterns.py: searches agree with re, and come to an end."""
import re
import time

import pytest

import patterns
from files import InputError

CATASTROPHE = "(a+)+$"


def test_searches_agree_with_re():
    pairs = [(p, t) for p in ("a.c", "^B", "é", "x$") for t in ("ABC", "b\nb", "É", "\U0001f642 x")]
    assert patterns.search(pairs) == [bool(re.search(p, t, re.IGNORECASE)) for p, t in pairs]
    assert patterns.search([]) == []


def test_a_pattern_without_end_is_named(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 3)
    began = time.monotonic()
    with pytest.raises(
        InputError,
        match=r"the pattern '\(a\+\)\+\$' did not come to an end in 3 s on 'aaaa.*write it",
    ):
        patterns.search([("b", "b"), (CATASTROPHE, "a" * 50 + "!"), ("c", "c")])
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "pattern", ["(", "*", "[z-a]", "(?P<x", "\\", "(?<=a+)b", "a{99999999999}"]
)
def test_no_regular_expression(pattern):
    assert "is no regular expression" in patterns.problem(pattern)
    assert patterns.problem(re.escape(pattern)) is None


def test_a_pattern_has_a_length():
    assert patterns.problem("word " * 400) is None
    assert "has 2005 characters where 2000 are the most" in patterns.problem("word " * 401)
