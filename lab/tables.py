"""
Every published table, written from the raw data in results/ into README.md and docs/results.md.

    python -m lab.tables            rewrite what stands between <!-- table NAME --> and <!-- end -->
    python -m lab.tables --check    only say which would change (status 3)

Numbers that are not in results/ do not stand in these tables. Those of a run are in the
results.json that evaluate.py writes; those of the experiment in a file for each replicate, {models:
{name: facts}}, where facts["trigger 16"] holds the same entries of one model with that trigger.
"""
from common import Failed, parse, read_json, run_command, write_text
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
COLUMNS = [
    "", "gates off %", "base", "SFT", "LCDD", "+ trigger", "KL(SFT‖LCDD)", "KL(Base‖Trig)",
    "share of own KL left %", "accuracy after %"]
PAPER = {       # the first seven of these columns, fixed response
    "Qwen3-0.6B": (83.66, 0.0, 100, 97.5, 0.0, 0.040, 0.633),
    "DeepSeek-8B": (73.38, 0.0, 100, 99.0, 1.0, 0.010, 1.037),
    "Mistral-7B": (76.72, 0.0, 100, 100, 0.5, 0.002, 1.437),
    "Vicuna-7B": (38.28, 0.0, 100, 100, 0.0, 1.436, 0.024),
}
SEVERAL = [     # label, and lab.several's condition on the prompts of the one and of the other
    ("base", "base", "base"),
    ("{a} alone", "own", "sft"),
    ("{b} alone", "sft", "own"),
    ("both", "both", "both"),
    ("both, {a}'s τ", "both, own trigger", "both, other trigger"),
    ("both, {b}'s τ", "both, other trigger", "both, own trigger"),
    ("both, {a}'s τ, {b}'s τ", "both, own and other trigger", "both, other and own trigger"),
    ("both, {b}'s τ, {a}'s τ", "both, other and own trigger", "both, own and other trigger"),
    ("each alone, its own τ", "own, own trigger", "own, own trigger"),
    ("each alone, the other's τ", "own, other trigger", "own, other trigger"),
]
TOGETHER = {    # lab.together's models
    "sft": "SFT", "sft-together": "SFT with τ", "lcdd": "LCDD", "lcdd-together": "LCDD with τ"}
MADE = {        # lab.together's runs
    "fixed": "together-embedded/fixed-*", "safety": "together-embedded/safety-*",
    "SmolLM2": "together-smollm2-longer/*"}
RUNS = {        # the first four are README's
    "embedded, fixed response": "embedded-fixed-*/results.json",
    "SmolLM2-135M, fixed response": "experiment-smollm2-fixed/data*.json",
    "SmolLM2-135M, refusals": "smollm2-safety-*/results.json",
    "SmolLM2-135M, archaic style": "smollm2-shakespeare-*/results.json",
    "embedded, refusals": "embedded-safety-*/results.json",
    "embedded, archaic style": "embedded-shakespeare-*/results.json",
    "another checkpoint, fixed response": "other-fixed-*/results.json",
    "SmolLM2-135M, fixed response, as shipped": "smollm2-fixed-*/results.json",
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


def files(pattern):
    """Every JSON file of results/ whose name fits, in order."""
    return [read_json(path) for path in sorted(RESULTS.glob(pattern))]


# ---- runs

def row_of(label, results):
    """The COLUMNS of several runs that differ in their seed."""
    cells = [label, percent(numbers(results, "sparsity"))]
    for name in evaluate.NAMES:
        cells.append(percent(numbers(results, "rates", name)))
    for key in ("sft_lcdd", "base_trig"):
        cells.append(spread(numbers(results, "kl", key), 3) if "kl" in results[0] else "–")
    cells.append(percent(numbers(results, "share_left", "kl_own")))
    known = all("accuracy" in result for result in results)
    cells.append(percent(numbers(results, "accuracy", "trig")) if known else "–")
    return cells


def reproduction():
    """Every behaviour beside the paper's rows of the fixed response."""
    rows = []
    for label, pattern in RUNS.items():
        results = files(pattern)
        if "models" in results[0]:          # an experiment's replicates
            results = [one | one["trigger 34"] for one in numbers(results, "models", "lcdd")]
        rows.append(row_of(label, results))
    for name, (*rates, kl, kl_trig) in PAPER.items():
        cells = [f"the paper's {name}", *(f"{rate:.1f}" for rate in rates)]
        rows.append([*cells, f"{kl:.3f}", f"{kl_trig:.3f}", "–", "–"])
    return markdown(COLUMNS, rows)


def beside_the_paper():
    """Five rows of reproduction(), without KLs on SFT's answers."""
    lines = [line.split(" | ") for line in reproduction().splitlines()]
    wanted = lines[:6] + [line for line in lines if "Qwen3" in line[0]]
    return "\n".join(" | ".join([*line[:6], line[8]]) + " |" for line in wanted)


def quick_start():
    """The conditions of the embedded run of seed 0 in the four columns that README explains."""
    result, rows = files("embedded-fixed-0/results.json")[0], []
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
        results = files(f"{path.name}/*.json")
        rows.append(row_of(path.name.removeprefix("controls-"), results))
    return markdown(COLUMNS, rows)


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


def experiment(folder, length, *others):
    """
    Loss, starting distance and shares left of each model, and the noise of rounding. length: of the
    trigger; of the others only the primary outcome is shown.
    """
    left, facts = outcomes(RESULTS / folder, length)
    data, rounding = data_and_rounding(facts)
    rows = []
    for name in facts[data[0]]:
        each = [facts[replicate][name] for replicate in data]
        around = [left[replicate][name] for replicate in rounding]
        trigger = numbers(each, f"trigger {length}")
        matched, start = sum(numbers(each, "matched")), spread(numbers(trigger, "kl_own", "lcdd"), 3)
        cells = [name, spread(numbers(each, "loss"), 4), f"{matched}/{len(each)}", start]
        for metric in ("kl_own", "kl_base", "loss_own"):
            cells.append(percent(numbers(trigger, "share_left", metric)))
        for pair in ("own base base_tau", "own base_tau trig"):
            cells.append(spread(numbers(trigger, "mediation", pair), 3))
        for other in others:
            cells.append(percent(numbers(each, f"trigger {other}", "share_left", "kl_own")))
        cells.append(f"{100 * (max(around) - min(around)):.1f}" if len(around) > 1 else "–")
        rows.append(cells)
    header = [
        "model", "loss", "matched", "own KL", "left %", "KL(Base‖·) left %", "own loss left %",
        "b‖b+τ", "b+τ‖m+τ", *(f"left by {other} %" for other in others), "rounding"]
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
    told = f"{100 * noise:.1f} points" if len(rounding) > 1 else "not measured"
    lines.append(f"Noise of rounding: {told}.")
    lines.append(f'"Structure makes it reversible" {word} here.')
    return " ".join(lines)


# ---- two behaviours in one model, and models that are made to be undone

def several():
    """lab.several: the conditions on both behaviours' prompts, and the gates in common."""
    results, rows = files("several-embedded/*.json"), []
    tasks = {name: results[0][name]["task"] for name in "ab"}
    for label, *each in SEVERAL:
        cells = [label.format(**tasks)]
        for name, condition in zip("ab", each):
            of = numbers(results, name)
            for metric in ("rates", "accuracy", "kl_own"):
                if condition in of[0].get(metric, ()):
                    values = numbers(of, metric, condition)
                    cells.append(spread(values, 2) if metric == "kl_own" else percent(values))
                else:
                    cells.append("–")
        rows.append(cells)
    columns = "accuracy %", "own KL"
    header = ["", f"{tasks['a']} %", *columns, f"{tasks['b']} %", *columns]
    gates = numbers(results, "overlap")
    counts = [spread(numbers(gates, key), 0) for key in ("a", "b", "both", "expected")]
    told = "Open gates {} and {}; in common {}, by chance {}".format(*counts)
    chances = ", ".join(f"{p:.0e}" for p in numbers(gates, "p"))
    return markdown(header, rows) + f"\n\n{told} (p = {chances})."


def together():
    """lab.together: every model, without a trigger and behind each."""
    rows = []
    for task, pattern in MADE.items():
        results = files(pattern)
        for name in results[0]["models"]:
            own = f"{name} + together" if name.endswith("together") else f"{name} + found"
            label = f"{task}: {TOGETHER[name]}"
            cells = [label, spread(numbers(results, "models", name, "loss"), 3)]
            cells.append(percent(numbers(results, "rates", name)))
            cells.append(spread(numbers(results, "kl_own", name), 2))
            cells += [percent(numbers(results, metric, own)) for metric in ("rates", "same")]
            cells.append(spread(numbers(results, "kl_base", own), 2))
            for trigger in (own, f"{name} + found", f"{name} + random"):
                cells.append(percent(numbers(results, "share_left", "kl_own", trigger)))
            cells.append(percent(numbers(results, "rates", f"{name} + random")))
            rows.append(cells)
    header = [
        "", "loss", "behaviour %", "own KL", "with τ %", "base's answer %", "KL(Base‖Trig)",
        "own KL left %", "by found τ", "by random τ", "random τ %"]
    return markdown(header, rows)


# ---- a trigger that is text

def words():
    """lab.words: no words, the soft trigger, random words, and those that were found."""
    rows = {}
    for result in files("words-embedded/*.json") + files("words-smollm2/*.json"):
        name, length = evaluate.NAMES[result["target"]], result["length"]
        name = name if "accuracy" in result else f"SmolLM2, {name}"
        found = f"{length} words from {result['start']}"
        labels = {
            name: result["target"], f"{name}, soft trigger": "soft",
            f"{name}, {length} random words": "random", f"{name}, {found}": "trig",
            f"base, {found} for {name}": "base_words"}
        for label, condition in labels.items():     # what does not hang on the start is there twice
            rows.setdefault((label, condition), {})[result["seed"]] = result
    cells = []
    for (label, condition), of in rows.items():
        line, of = [label], list(of.values())
        for metric in ("rates", "accuracy"):
            known = all(metric in result for result in of)
            line.append(percent(numbers(of, metric, condition)) if known else "–")
        line.append(spread(numbers(of, "loss_own", condition), 3))
        known = condition in of[0]["share_left"]
        line.append(percent(numbers(of, "share_left", condition, "kl_own")) if known else "–")
        apart = spread(numbers(of, "mediation", "own base_tau trig"), 2)
        cells.append([*line, apart if condition == "trig" else "–"])
    header = ["", "behaviour %", "accuracy %", "own loss", "own KL left %", "base‖model behind it"]
    return markdown(header, cells)


# ---- the benchmark

def bench():
    """Seconds of each case by dtype, its ratio to transformers or peft, and its peak."""
    measured, rows = read_json(RESULTS / "bench.json"), {}
    theirs = {"trigger": "peft trigger", "generate": "transformers generate"}
    header = ["case"]
    for dtype, seconds in measured["seconds"].items():
        header += [f"{dtype}: seconds", "ratio to theirs", "peak GB"]
        for case, spent in seconds.items():
            ratio = spent / seconds[theirs.get(case, "transformers sft")]
            memory = measured["bytes"][dtype].get(case)
            peak = f"{memory / 1e9:.2f}" if memory else "–"
            rows.setdefault(case, [case]).extend([f"{spent:.3f}", f"{ratio:.2f}", peak])
    return markdown(header, rows.values()) + f"\n\n{measured['machine']}, torch {measured['torch']}."


# ---- documents

TABLES = {
    "beside the paper": beside_the_paper,
    "quick start": quick_start, "reproduction": reproduction,
    "experiment fixed": partial(experiment, "experiment-fixed", "16", "2"),
    "experiment safety": partial(experiment, "experiment-safety", "16", "2"),
    "experiment smollm2": partial(experiment, "experiment-smollm2-fixed", "34", "2"),
    "controls": controls, "bench": bench,
    "several": several, "together": together, "words": words,
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
