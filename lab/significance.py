"""Is a difference over seeds more than chance (Welch's and the paired t-test), and an overlap of carriers?"""
import math
import statistics

LEVEL = 0.05


def incomplete_beta(a, b, x):
    """I_x(a, b), the regularized incomplete beta function, by its continued fraction (Lentz)."""
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):                           # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    c, d, tiny = 1.0, 0.0, 1e-300
    fraction = 1.0
    for i in range(500):
        m = i // 2
        if i == 0:
            step = 1.0
        elif i % 2 == 0:
            step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + step * d or tiny)
        c = 1 + step / c or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * (fraction - 1)


def two_sided(t, df):
    """P(|T| ≥ |t|) of Student's t with `df` degrees of freedom, which need not be whole."""
    if math.isinf(t):
        return 0.0
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def paired(a, b):
    """(t, degrees of freedom, p) of the differences a_i − b_i: two models of the same seeds."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    return judged(statistics.mean(differences), statistics.variance(differences) / n, n - 1)


def welch(a, b):
    """(t, degrees of freedom, p) of two samples whose variances may differ (Welch, 1947)."""
    u, v = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    df = len(a) + len(b) - 2
    if u + v:
        df = (u + v) ** 2 / (u * u / (len(a) - 1) + v * v / (len(b) - 1))
    return judged(statistics.mean(a) - statistics.mean(b), u + v, df)


def judged(difference, variance, df):
    """(t, df, p) of a mean difference; without any spread p is 0, or 1 where there is none."""
    if variance == 0:
        t = math.copysign(math.inf, difference) if difference else 0.0
    else:
        t = difference / math.sqrt(variance)
    return t, df, two_sided(t, df)


def jaccard(a, b):
    """|A ∩ B| / |A ∪ B| of two bool tensors; 1 where both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def expected_overlap(parts):
    """
    The overlap that chance alone gives: E|A ∩ B| / E|A ∪ B| for sets as large as those that are
    given, drawn in each part by itself. parts: [(|A|, |B|, how many there are)].
    """
    common = sum(a * b / n for a, b, n in parts)
    union = sum(a + b for a, b, _ in parts) - common
    return common / union if union else 1.0
