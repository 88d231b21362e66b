"""lab/significance.py: Student's t against published tables and examples, overlap against draws."""
import math

import pytest
import torch

from lab import significance

# hours of sleep gained with two drugs, the data of Student (1908), as R has them
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.mark.parametrize(
    "df, critical",
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_the_table_of_t(df, critical):
    assert significance.two_sided(critical, df) == pytest.approx(0.05, abs=5e-5)
    assert significance.two_sided(-critical, df) == pytest.approx(0.05, abs=5e-5)


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 5.0, 100.0])
def test_closed_forms(t):
    """
    With one and with two degrees of freedom t has them; with many it is the normal distribution.
    """
    assert significance.two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
    assert significance.two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    assert significance.two_sided(t, 1e6) == pytest.approx(math.erfc(t / math.sqrt(2)), abs=1e-6)


def test_students_sleep():
    """As R's help page of t.test has it."""
    t, df, p = significance.welch(FIRST, SECOND)
    assert (t, df, p) == (
        pytest.approx(-1.8608, abs=5e-5), pytest.approx(17.776, abs=5e-4),
        pytest.approx(0.07939, abs=5e-6)
    )
    t, df, p = significance.paired(FIRST, SECOND)
    assert (t, df, p) == (pytest.approx(-4.0621, abs=5e-5), 9, pytest.approx(0.002833, abs=5e-7))


@pytest.mark.parametrize("test", [significance.paired, significance.welch])
def test_without_spread(test):
    assert test([1.0, 1.0], [1.0, 1.0])[2] == 1
    assert test([1.0, 1.0], [2.0, 2.0])[2] == 0


def test_pairs_are_of_the_same_seeds():
    with pytest.raises(ValueError, match="shorter"):
        significance.paired([1.0, 2.0, 3.0], [1.0, 2.0])


def test_jaccard():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert significance.jaccard(a, b) == pytest.approx(1 / 3)
    assert significance.jaccard(a & False, b & False) == 1


def test_expected_overlap_is_that_of_draws():
    sizes = [(30, 20, 100), (5, 8, 10)]
    found = []
    for _ in range(300):
        draws = [[torch.randperm(n)[:size] for size in (a, b)] for a, b, n in sizes]
        sets = []
        for which in (0, 1):
            parts = [
                torch.zeros(n, dtype=torch.bool).index_fill(0, pair[which], True)
                for pair, (*_, n) in zip(draws, sizes)
            ]
            sets.append(torch.cat(parts))
        found.append(significance.jaccard(*sets))
    assert significance.expected_overlap(sizes) == pytest.approx(sum(found) / len(found), abs=0.01)
