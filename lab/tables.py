"""The tables of lab/ablate.py: rows over seeds as Markdown, the paper's numbers beside ours, and what
differs by more than chance.

A row is named MODEL [OBJECTIVE [LENGTH]]: "sft circuit 2" is plain SFT under a trigger of two tokens
that was learned with all of Eq. 6. seeds: one {row: {metric: number}} a seed.
"""
import statistics
from itertools import combinations

import torch

import metrics
from lab import significance
from console import markdown

CHOICES = ("noise circuit", "blind circuit", "floor-0 circuit",
           "lcdd circuit 2", "noise circuit 2", "blind circuit 2", "floor-0 circuit 2",
           "floor-0 circuit 1")
TABLE_4 = ("lcdd circuit", "lcdd output", "sft circuit", "sft output")
TABLE_6 = ("mask-ce circuit", "mask-kl circuit")
CONTROLS = ("lcdd random", "lcdd tokens", "sft tokens", "base trigger", "scaled circuit",
            "sft-long circuit")
# triggers with the paper's settings, with Eq. 7 and without
F_3 = ("lcdd paper", "lcdd paper-output", "sft paper", "sft paper-output", "mask-ce paper",
       "mask-kl paper")
CURVE = {
    "lcdd": "LCDD",
    "sft": "plain SFT",
    "sft-long": "SFT for as many steps as LCDD",
    "scaled": "SFT's delta scaled to LCDD's loss",
}

# What may be called a difference: (row, other row, metrics); lengths of the curve come on top
COMPARED = (
    # Table 4: is a carrier easier to undo than plain SFT, and is that its channels?
    ("lcdd circuit", "sft circuit", ("rate", "same", "kl_base", "drop kl_base", "kl_own", "drop kl_own")),
    ("lcdd circuit", "lcdd output", ("rate", "same", "kl_base", "kl_own")),
    ("lcdd circuit", "lcdd random", ("rate", "same", "kl_base", "kl_own")),
    ("lcdd circuit", "base trigger", ("same", "kl_own")),
    # Table 6, its findings 1 and 2, under our trigger and under the paper's
    ("lcdd", "mask-ce", ("sparsity",)),
    ("lcdd", "mask-kl", ("sparsity",)),
    *((f"lcdd {kind}", f"{mask} {kind}", ("rate", "same", "kl_base", "kl_own"))
      for kind in ("circuit", "paper") for mask in ("mask-ce", "mask-kl")),
    ("lcdd paper", "sft paper", ("rate", "same", "kl_base", "kl_own")),
    # Sec. 4.3's finding 2: is Eq. 7 what does it?
    ("lcdd paper", "lcdd paper-output", ("rate", "same", "kl_base", "kl_own")),
    ("sft paper", "sft paper-output", ("rate", "same", "kl_base", "kl_own")),
    # loss or sparsity? and who chose the gates?
    ("lcdd circuit", "scaled circuit", ("rate", "same", "kl_own")),
    ("lcdd", "noise", ("sparsity", "dice")),
    ("lcdd", "blind", ("sparsity",)),
    # a prefix that has learned nothing
    ("lcdd tokens", "lcdd", ("rate",)),
    ("sft tokens", "sft", ("rate",)),
)
SHORT = (("lcdd", "sft"), ("lcdd", "scaled"), ("scaled", "sft"), ("lcdd", "floor-0"), ("floor-0", "sft"),
         ("lcdd", "noise"), ("lcdd", "blind"))

# The paper, Tables 1–3: sparsity %, behaviour (rate %, refusal %, judge's score 0–5) of base, SFT,
# LCDD and trigger, KL SFT‖LCDD, SFT‖Trig, Base‖Trig
PAPER = {
    "fixed": {
        "Qwen3-0.6B": (83.66, 0.0, 100, 97.5, 0.0, 0.040, 2.839, 0.633),
        "DeepSeek-8B": (73.38, 0.0, 100, 99.0, 1.0, 0.010, 1.811, 1.037),
        "Mistral-7B": (76.72, 0.0, 100, 100, 0.5, 0.002, 3.526, 1.437),
        "Vicuna-7B": (38.28, 0.0, 100, 100, 0.0, 1.436, 4.810, 0.024),
    },
    "safety": {
        "Qwen3-0.6B": (81.05, 32.0, 94.0, 88.5, 39.5, 0.069, 0.120, 0.196),
        "DeepSeek-8B": (81.38, 47.5, 100, 96.5, 56.5, 0.256, 0.391, 0.306),
        "Mistral-7B": (59.34, 25.5, 100, 97.5, 69.0, 0.269, 0.620, 1.282),
        "Vicuna-7B": (84.40, 76.5, 99.0, 98.0, 74.5, 0.192, 1.081, 0.014),
    },
    "shakespeare": {
        "Qwen3-0.6B": (56.34, 0.03, 0.79, 0.44, 0.04, 0.265, 2.405, 0.446),
        "DeepSeek-8B": (54.54, 0.01, 1.73, 0.98, 0.005, 1.520, 4.301, 0.531),
        "Mistral-7B": (50.46, 0.07, 1.75, 1.18, 0.07, 0.853, 2.643, 2.052),
        "Vicuna-7B": (29.88, 0.05, 0.80, 0.26, 0.04, 0.636, 1.702, 0.094),
    },
}
# Tables 4 and 6 (DeepSeek-8B, safety): refusal % without → with trigger, KL SFT‖Trig, Base‖Trig
PAPER_ROWS = {
    "lcdd circuit": (96.5, 56.5, 0.391, 0.306),
    "lcdd output": (96.5, 65.5, 0.440, 0.322),
    "sft circuit": (100, 78.5, 0.221, 0.539),
    "sft output": (100, 76.5, 0.208, 0.512),
    "mask-ce circuit": (99.0, 64.0, 0.262, 0.254),
    "mask-kl circuit": (98.0, 60.0, 0.319, 0.197),
}


# ---- pieces of a table

def cell(seeds, name, metric, scale=1.0, digits=2):
    """mean ± std over seeds of one number, or –."""
    values = [s[name][metric] * scale for s in seeds if name in s and metric in s[name]]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def percent(seeds, name, metric="rate"):
    return cell(seeds, name, metric, scale=100, digits=1)


def main_table(task, seeds):
    """
    Tables 1–3: ours, then the paper's four models. Shakespeare: ours is the archaic word rate, the
    paper's a judge's 0–5.
    """
    header = ["", "sparsity %", "Base", "SFT", "LCDD", "+ trigger",
              "KL(SFT‖LCDD)", "KL(SFT‖Trig)", "KL(Base‖Trig)"]
    ours = ["**ours**", percent(seeds, "lcdd", "sparsity")]
    ours += [percent(seeds, name) for name in ("base", "sft", "lcdd", "lcdd circuit")]
    ours += [cell(seeds, "lcdd", "kl_sft"), cell(seeds, "lcdd circuit", "kl_sft"),
             cell(seeds, "lcdd circuit", "kl_base")]
    lines = [ours]
    for name, numbers in PAPER.get(task, {}).items():
        lines.append([f"paper, {name}"] + [f"{x:g}" for x in numbers])
    return markdown(header, lines)


def row_table(seeds, names, paper=False):
    """
    Rows of one behaviour with all that is measured; `paper` adds the columns of Tables 4 and 6
    (DeepSeek-8B, safety).
    """
    opposed = any("benign rate" in row for s in seeds for row in s.values())
    columns = metrics.columns(["harmful", "benign"] if opposed else [])
    header = ["row", "gates off %", "dice %"] + [head for head, *_ in columns]
    if paper:
        header.append("paper: refusal %, KL(SFT‖·), KL(Base‖·)")
    lines = []
    for name in names:
        if not any(name in s for s in seeds):
            continue
        line = [name, percent(seeds, name, "sparsity"), percent(seeds, name, "dice")]
        for _, metric, kind in columns:
            show = percent if metric.share else cell
            line.append(show(seeds, name, f"{kind} {metric.key}".strip()))
        if paper:
            known = name in PAPER_ROWS
            line.append("{} → {}, {}, {}".format(*PAPER_ROWS[name]) if known else "")
        lines.append(line)
    return markdown(header, lines)


def curve_cell(seeds, name):
    """behaviour / accuracy / KL of one row, or –."""
    if not any(name in s for s in seeds):
        return "–"
    numbers = percent(seeds, name), percent(seeds, name, "accuracy"), cell(seeds, name, "kl_base")
    return " / ".join(numbers)


def curve_table(seeds, lengths, full):
    """Behaviour, accuracy and KL(Base ‖ Trig) after a trigger of 1 … n tokens, and controls."""
    header = ["behaviour % / accuracy % / KL(Base‖Trig)"]
    header += [f"{n} token{'s' * (n > 1)}" for n in [*lengths, full]]
    header.append("2 tokens, a tenth of the rate")
    lines = []
    for name, label in CURVE.items():
        rows = [f"{name} circuit {n}" for n in lengths] + [f"{name} circuit", f"{name} slow"]
        lines.append([label] + [curve_cell(seeds, row) for row in rows])
    return markdown(header, lines)


def losses_table(seeds):
    """
    The loss of held-out rows, harmful and benign ones apart: `scaled` is matched on the first
    (Run.make_scaled).
    """
    known = seeds[0].get("scaled", {})
    kinds = [key.removesuffix(" loss of scaled") for key in known if key.endswith(" loss of scaled")]
    lines = []
    for name in ("base", "sft", "lcdd", "scaled"):
        lines.append([name])
        for kind in kinds:
            lines[-1].append(cell(seeds, "scaled", f"{kind} loss of {name}", digits=4))
    return markdown(["loss, nats a token", *kinds], lines) if kinds else ""


def with_drops(seeds):
    """The rows with `drop METRIC` beside each metric of the base's distance: what a trigger takes off it."""
    found = []
    for rows in seeds:
        found.append({name: dict(row) for name, row in rows.items()})
        for name, row in found[-1].items():
            before = found[-1].get(name.split()[0])
            for key in [k for k in row if k.split()[-1] in ("kl_base", "kl_own")]:
                if " " in name and before and key in before:
                    row[f"drop {key}"] = before[key] - row[key]
    return found


def drop_table(seeds):
    """Where each model's distance from the base starts, where its trigger leaves it, and the drop."""
    kind = "harmful " if any("harmful rate" in row for s in seeds for row in s.values()) else ""
    keys = (f"{kind}kl_base", "kl_own")
    header = ["model", "behaviour % before", "after"]
    for title in ("KL(Base‖·)", "own KL(Base‖·)"):
        header += [f"{title} before", "after", "drop"]
    lines = []
    for name in ("lcdd", "sft", "scaled", "floor-0", "noise", "mask-ce", "mask-kl"):
        after = f"{name} circuit"
        if not any(after in s for s in seeds):
            continue
        line = [name, percent(seeds, name, f"{kind}rate"), percent(seeds, after, f"{kind}rate")]
        for key in keys:
            line += [cell(seeds, name, key), cell(seeds, after, key), cell(seeds, after, f"drop {key}")]
        lines.append(line)
    return markdown(header, lines)


def overlap_table(gates):
    """
    Open gates that two seeds share, as a mean over pairs of seeds. gates: {row: one
    {group: (L, n) bool} a seed}.
    """
    lines = []
    for name, seeds in gates.items():
        pairs = list(combinations(seeds, 2))
        if not pairs:
            continue
        found, chance, within = zip(*(overlap(a, b) for a, b in pairs))
        means = [f"{100 * statistics.mean(values):.1f}" for values in (found, chance, within)]
        n_open = statistics.mean(sum(int(g.sum()) for g in groups.values()) for groups in seeds)
        lines.append([name, f"{n_open:.0f}", *means])
    return markdown(["carrier", "open gates", "overlap of two seeds %", "by chance %",
                     "by chance within layer and group %"], lines) if lines else ""


def overlap(a, b):
    """(Jaccard index of two carriers' open gates, by chance, by chance within each layer and group)."""
    parts = []
    for group in a:
        for one, other in zip(a[group], b[group]):
            parts.append((int(one.sum()), int(other.sum()), len(one)))
    flat = [torch.cat([g.flatten() for g in groups.values()]) for groups in (a, b)]
    whole = [tuple(sum(column) for column in zip(*parts))]
    return (significance.jaccard(*flat), significance.expected_overlap(whole),
            significance.expected_overlap(parts))


TITLES = {metric.key: metric.header for metric in metrics.METRICS}
TITLES |= {"sparsity": "gates off", "dice": "dice"}
SHARES = {metric.key for metric in metrics.METRICS if metric.share} | {"sparsity", "dice"}


def compared(lengths):
    """COMPARED, and the curve's models at each length."""
    metrics_of = ("rate", "accuracy", "same")
    short = [(f"{a} circuit {n}", f"{b} circuit {n}", metrics_of) for n in lengths for a, b in SHORT]
    return [*COMPARED, *short]


def difference_table(seeds, lengths):
    """
    Differences between rows over seeds: the mean, and the chance of one as large where there is
    none, by the paired test (the rows of a seed come from the same SFT) and by Welch's.
    """
    n, lines = len(seeds), []
    for name, other, shown in compared(lengths):
        for metric in shown:
            key = found_as(seeds, name, metric)
            if n < 2 or not all(key in s.get(row, {}) for s in seeds for row in (name, other)):
                continue
            a, b = ([s[row][key] for s in seeds] for row in (name, other))
            lines.append([f"{name} − {other}", *difference(key, a, b), str(n)])
    if not lines:
        return ""
    header = ["difference", "of", "mean", "paired p", "Welch p", f"at {significance.LEVEL:.0%}", "seeds"]
    return markdown(header, lines)


def difference(key, a, b):
    """[metric, mean difference, paired p, Welch p, verdict] of two rows' numbers over seeds."""
    *before, metric = key.split()
    scale, digits = (100, 1) if metric in SHARES else (1, 2)
    title = f"{TITLES[metric]} %" if metric in SHARES else TITLES[metric]
    *_, p = significance.paired(a, b)
    *_, q = significance.welch(a, b)
    verdict = "significant" if p < significance.LEVEL else "not significant"
    mean = scale * (statistics.mean(a) - statistics.mean(b))
    return [", ".join([title, *before]), f"{mean:+.{digits}f}", f"{p:.3f}", f"{q:.3f}", verdict]


def found_as(seeds, name, metric):
    """The key of a metric: that of the harmful prompts where the others say something else."""
    *drop, plain = metric.split()
    apart = " ".join([*drop, "harmful", plain])
    return apart if all(apart in s.get(name, {}) for s in seeds) else metric


def report(task, seeds, o, full, gates):
    """
    All tables of one behaviour as Markdown; `full` is the trigger's usual length, gates: {row: one
    {group: (L, n) bool} a seed}.
    """
    seeds = with_drops(seeds)
    paper = task == "safety"
    gates_only = ["lcdd", "mask-ce", "mask-kl", "lcdd circuit", *TABLE_6]
    parts = [
        f"## {task}",
        main_table(task, seeds),
        "The switch and the models without a trigger:",
        row_table(seeds, ["base", "sft", "lcdd", "sft-long", "scaled"]),
        "Table 4, structure against trigger design:",
        row_table(seeds, TABLE_4, paper),
        "What the trigger takes away, beside where it starts:",
        drop_table(seeds),
        "Table 6, gates only:",
        row_table(seeds, gates_only, paper),
        "The trigger with the paper's own settings (F.3):",
        row_table(seeds, F_3, paper),
        "Controls:",
        row_table(seeds, ["lcdd circuit", *CONTROLS]),
        "Held-out rows (validation; `scaled` is matched on the first kind, which are the harmful ones of "
        "safety, and cannot be where LCDD's loss is below SFT's):",
        losses_table(seeds),
        "What chooses the gates (dice: open gates that the initial noise alone would have kept):",
        row_table(seeds, ["lcdd", "noise", "blind", "floor-0", "lcdd circuit", *CHOICES]),
        "Do two seeds open the same gates?",
        overlap_table(gates),
    ]
    curve = o.lengths if task in o.curve_tasks else []
    if curve:
        parts += ["The trigger's length:", curve_table(seeds, o.lengths, full)]
    parts += ["What differs, each test by itself and not corrected for their number:",
              difference_table(seeds, sorted({*curve, 2}))]
    return "\n\n".join(without_empty(parts))


def without_empty(parts):
    """The parts without tables that have no rows, and without the line above them."""
    kept = []
    for part in parts:
        if part.count("\n") < 2 and (not part or part.startswith("|")):
            kept.pop()
        else:
            kept.append(part)
    return kept
