"""
Every published table, written from the raw data in results/ into README.md and docs/results.md.

    python -m lab.tables            rewrite what stands between <!-- table NAME --> and <!-- end -->
    python -m lab.tables --check    only say which would change (status 3)

Numbers that are not in results/ do not stand in these tables. Those of a run are in the
results.json that evaluate.py writes; those of the experiment in a file for each replicate, {models:
{name: facts}}, where facts["trigger 16"] holds the same entries of one model with that trigger.
"""
from common import Failed, parse, read_json, read_rows, run_command, write_text
import re
import statistics
from functools import partial
from pathlib import Path

from scipy import stats

import evaluate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DOCUMENTS = ("README.md", "docs/results.md")
OPTIONS = {"check": (False, "fail if something would change"), "device": ("cpu", "not used")}
NOTHING = "not measured yet"
COLUMNS = [
    "", "gates off %", "base", "SFT", "LCDD", "+ trigger", "KL(SFT‖LCDD)", "KL(Base‖Trig)",
    "share of own KL left %", "accuracy after %"]
PAPER = {       # the first seven of these columns, fixed response
    "Qwen3-0.6B": (83.66, 0.0, 100, 97.5, 0.0, 0.040, 0.633),
    "DeepSeek-8B": (73.38, 0.0, 100, 99.0, 1.0, 0.010, 1.037),
    "Mistral-7B": (76.72, 0.0, 100, 100, 0.5, 0.002, 1.437),
    "Vicuna-7B": (38.28, 0.0, 100, 100, 0.0, 1.436, 0.024),
}
RUNS = {
    "embedded, fixed response": "embedded-fixed-*",
    "embedded, refusals": "embedded-safety-*",
    "embedded, archaic style": "embedded-shakespeare-*",
    "another checkpoint, fixed response": "other-fixed-*",
    "SmolLM2-135M, fixed response": "smollm2-fixed-*",
}


# ---- numbers and cells

def markdown(header, rows):
    """A Markdown table of cells that are text already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def numbers(objects, *path):
    """The number at a path of keys of each of several JSON objects."""
    values = []
    for value in objects:
        for key in path:
            value = value[key]
        values.append(value)
    return values


def spread(values, digits):
    """mean ± standard deviation of several values, or the one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def percent(values):
    """spread() of shares, in percent."""
    return spread([100 * value for value in values], 1)


def runs(pattern):
    """results.json of every run of results/ whose name fits, in order."""
    return [read_json(path) for path in sorted(RESULTS.glob(f"{pattern}/results.json"))]


# ---- runs

def row_of(label, results):
    """The COLUMNS of several runs that differ in their seed."""
    cells = [label, percent(numbers(results, "sparsity"))]
    for name in evaluate.NAMES:
        cells.append(percent(numbers(results, "rates", name)))
    for key in ("sft_lcdd", "base_trig"):
        cells.append(spread(numbers(results, "kl", key), 3))
    cells.append(percent(numbers(results, "share_left", "kl_own")))
    known = all("accuracy" in result for result in results)
    cells.append(percent(numbers(results, "accuracy", "trig")) if known else "–")
    return cells


def reproduction():
    """Every behaviour beside the paper's rows of the fixed response."""
    rows = []
    for label, pattern in RUNS.items():
        results = runs(pattern)
        if results:
            rows.append(row_of(label, results))
    for name, (*rates, kl, kl_trig) in PAPER.items():
        cells = [f"the paper's {name}", *(f"{rate:.1f}" for rate in rates)]
        rows.append([*cells, f"{kl:.3f}", f"{kl_trig:.3f}", "–", "–"])
    return markdown(COLUMNS, rows)


def beside_the_paper():
    """reproduction() without the paper's 7B and 8B models, and without KLs on SFT's answers."""
    lines = [line.split(" | ") for line in reproduction().splitlines()]
    wanted = [line for line in lines if "the paper's" not in line[0] or "Qwen3" in line[0]]
    return "\n".join(" | ".join([*line[:6], line[8]]) + " |" for line in wanted)


def four_conditions(pattern):
    """One run's table as evaluate.py writes it."""
    results = runs(pattern)
    return evaluate.markdown(results[0], results[0]["task"]) if results else NOTHING


def quick_start():
    """The conditions of the embedded run of seed 0 in the four columns that README explains."""
    result, rows = runs("embedded-fixed-0")[0], []
    for name, label in evaluate.NAMES.items():
        rate, same = result["rates"][name], result["same"][name]
        kl, loss = result["kl_sft"].get(name), result["loss_own"][name]
        cells = [label, f"{100 * rate:.1f}", f"{100 * same:.1f}"]
        rows.append([*cells, "–" if kl is None else f"{kl:.3f}", f"{loss:.3f}"])
    header = ["fixed", "behaviour %", "base's answer %", "KL(SFT‖·)", "own loss"]
    return markdown(header, rows)


def controls():
    """Tables 4 and 6 on the embedded model: another trigger, another target, gates alone."""
    rows = []
    for path in sorted(RESULTS.glob("controls-*")):
        results = [read_json(file) for file in sorted(path.glob("*.json"))]
        rows.append(row_of(path.name.removeprefix("controls-"), results))
    return markdown(COLUMNS, rows) if rows else NOTHING


# ---- the experiment

def outcomes(folder, length):
    """{replicate: {model: share of own KL left}}, and {replicate: {model: facts}}."""
    left, facts = {}, {}
    for path in sorted(folder.glob("*.json")):
        models = facts[path.stem] = read_json(path)["models"]
        shares = numbers(models.values(), f"trigger {length}", "share_left", "kl_own")
        left[path.stem] = dict(zip(models, shares))
    return left, facts


def data_and_rounding(facts):
    """The names of the replicates in data, and of those that differ in rounding only."""
    data = [name for name in facts if name.startswith("data")]
    return data, [name for name in facts if name == "data0" or name.startswith("round")]


def experiment(folder, length="16", second="2"):
    """Loss, starting distance and shares left of each model, and the noise of rounding."""
    left, facts = outcomes(RESULTS / folder, length)
    data, rounding = data_and_rounding(facts)
    if not data:
        return NOTHING
    rows = []
    for name in facts[data[0]]:
        each = [facts[replicate][name] for replicate in data]
        around = [left[replicate][name] for replicate in rounding]
        trigger = numbers(each, f"trigger {length}")
        cells = [name, spread(numbers(each, "loss"), 4)]
        cells.append(f"{sum(numbers(each, 'matched'))}/{len(each)}")
        cells.append(spread(numbers(trigger, "kl_own", "lcdd"), 3))
        for metric in ("kl_own", "kl_base", "loss_own"):
            cells.append(percent(numbers(trigger, "share_left", metric)))
        for pair in ("own base base_tau", "own base_tau trig"):
            cells.append(spread(numbers(trigger, "mediation", pair), 3))
        cells.append(percent(numbers(each, f"trigger {second}", "share_left", "kl_own")))
        cells.append(f"{100 * (max(around) - min(around)):.1f}")
        rows.append(cells)
    header = [
        "model", "loss", "matched", "own KL", "left %", "KL(Base‖·) left %", "own loss left %",
        "b‖b+τ", "b+τ‖m+τ", f"left by {second} %", "rounding"]
    return markdown(header, rows) + "\n\n" + verdict(left, facts, data)


def holm(pvalues):
    """{name: p corrected by Holm} of two comparisons."""
    first, second = sorted(pvalues, key=pvalues.get)
    smaller = min(1, 2 * pvalues[first])
    return {first: smaller, second: max(smaller, pvalues[second])}


def verdict(left, facts, data):
    """The test of docs/experiment.md: paired over data replicates, Holm over two comparisons."""
    _, rounding = data_and_rounding(facts)
    noise, means, intervals, pvalues = 0.0, {}, {}, {}
    for other in ("blind", "scaled"):
        matched = [other in facts[name] and facts[name][other]["matched"] for name in data]
        if not all(matched) or len(data) < 3:
            return (f"No test: `{other}` is not matched in three data replicates, and the outcome "
                    "is undecided.")
        differences = {name: left[name]["lcdd"] - left[name][other] for name in facts}
        around = [differences[name] for name in rounding]
        noise = max(noise, max(around) - min(around))
        paired = [differences[name] for name in data]
        test = stats.ttest_1samp(paired, 0.0)
        means[other], pvalues[other] = statistics.mean(paired), test.pvalue
        intervals[other] = test.confidence_interval()
    corrected, lines = holm(pvalues), []
    for other, mean in means.items():
        low, high = intervals[other]
        points = f"{100 * mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}"
        lines.append(f"`lcdd` − `{other}`: {points}, corrected p = {corrected[other]:.2f}).")
    sure = [other for other in means if corrected[other] < 0.05]
    below = [other for other in sure if means[other] < -noise]
    above = [other for other in sure if means[other] > noise]
    word = "stands" if len(below) == 2 else "falls" if above else "is undecided"
    lines.append(f"Noise of rounding: {100 * noise:.1f} points.")
    lines.append(f'"Structure makes it reversible" {word} here.')
    return " ".join(lines)


# ---- the benchmark

def beside_the_revision_before():
    """CPU seconds of the same work by revision 297e9f0 and by this code, and their ratio."""
    measured, rows = read_rows(RESULTS / "beside-297e9f0.jsonl"), []
    for before, after in zip(measured[::2], measured[1::2]):
        for case in sorted(before.keys() - {"which", "dtype"}):
            old, new = before[case], after[case]
            cells = [f"{old:.2f}", f"{new:.2f}", f"{new / old:.2f}"]
            rows.append([before["dtype"], case, *cells])
    return markdown(["dtype", "case", "297e9f0", "now", "ratio"], rows)


def bench():
    """Seconds of each case by dtype, and its ratio to transformers or peft."""
    file = RESULTS / "bench.json"
    if not file.is_file():
        return NOTHING
    measured, rows = read_json(file), []
    theirs = {"trigger": "peft trigger", "generate": "transformers generate"}
    for dtype, seconds in measured["seconds"].items():
        for case, spent in seconds.items():
            ratio = spent / seconds[theirs.get(case, "transformers sft")]
            memory = measured["bytes"][dtype].get(case)
            peak = f"{memory / 1e9:.2f}" if memory else "–"
            rows.append([dtype, case, f"{spent:.2f}", f"{ratio:.2f}", peak])
    table = markdown(["dtype", "case", "seconds", "ratio to theirs", "peak GB"], rows)
    return f"{table}\n\n{measured['machine']}, torch {measured['torch']}."


# ---- documents

TABLES = {
    "beside the paper": beside_the_paper, "revision": beside_the_revision_before,
    "quick start": quick_start, "reproduction": reproduction,
    "embedded fixed": partial(four_conditions, "embedded-fixed-0"),
    "embedded safety": partial(four_conditions, "embedded-safety-0"),
    "embedded style": partial(four_conditions, "embedded-shakespeare-0"),
    "smollm2 fixed": partial(four_conditions, "smollm2-fixed-*"),
    "experiment fixed": partial(experiment, "experiment-fixed"),
    "experiment safety": partial(experiment, "experiment-safety"),
    "controls": controls, "bench": bench,
}


def rewritten(text):
    """A document with every table between its marks made anew."""
    def new(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    marks = r"<!-- table ([\w ]+) -->\n.*?<!-- end -->"
    return re.sub(marks, new, text, flags=re.DOTALL)


def main(argv=None):
    """Rewrite the documents whose tables are others by now."""
    o = parse(__doc__, OPTIONS, {}, argv)
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if rewritten(text) == text:
            continue
        if o.check:
            raise Failed(f"{name}: has other tables than results/; run python -m lab.tables")
        write_text(ROOT / name, rewritten(text))
        print(f"{name} rewritten")


if __name__ == "__main__":
    run_command(main)
