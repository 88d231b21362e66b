"""
Every published table, written from the raw data in results/ into README.md and docs/results.md.

    python -m lab.tables            rewrite what stands between <!-- table NAME --> and <!-- end -->
    python -m lab.tables --check    only say which would change (status 3)

Numbers that are not in results/ do not stand in these tables.
"""
from common import Failed, parse, read_json, run_command, write_text
import re
import statistics
from pathlib import Path

from scipy import stats

import evaluate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
DOCUMENTS = ("README.md", "docs/results.md")
OPTIONS = {"check": (False, "change nothing, and fail if something would change"), "device": ("cpu", "not used")}
PAPER = {"Qwen3-0.6B": (83.66, 0.0, 100, 97.5, 0.0, 0.040, 0.633), "DeepSeek-8B": (73.38, 0.0, 100, 99.0, 1.0, 0.010, 1.037),
         "Mistral-7B": (76.72, 0.0, 100, 100, 0.5, 0.002, 1.437), "Vicuna-7B": (38.28, 0.0, 100, 100, 0.0, 1.436, 0.024)}


def markdown(header, rows):
    """A Markdown table of cells that are text already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values, digits=1, factor=1):
    """mean ± standard deviation of several values, or the one."""
    values = [factor * value for value in values]
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def runs(pattern):
    """results.json of every run of results/ whose name fits, in order."""
    return [read_json(path) for path in sorted(RESULTS.glob(f"{pattern}/results.json"))]


def row_of(label, found):
    """Gates off, four rates, KL(SFT‖LCDD), KL(Base‖Trig), share of own KL left, accuracy behind the trigger."""
    cells = [label, spread([run["sparsity"] for run in found], 1, 100)]
    for name in ("base", "sft", "lcdd", "trig"):
        cells.append(spread([run["rates"][name] for run in found], 1, 100))
    cells += [spread([run["kl"][key] for run in found], 3) for key in ("sft_lcdd", "base_trig")]
    cells.append(spread([run["share_left"]["kl_own"] for run in found], 1, 100))
    known = all("accuracy" in run for run in found)
    cells.append(spread([run["accuracy"]["trig"] for run in found], 1, 100) if known else "–")
    return cells


def reproduction():
    """Every behaviour beside the paper's rows of the fixed response."""
    header = ["", "gates off %", "base", "SFT", "LCDD", "+ trigger", "KL(SFT‖LCDD)", "KL(Base‖Trig)",
              "share of own KL left %", "accuracy after %"]
    rows = []
    for label, pattern in (("embedded, fixed response", "embedded-fixed-*"),
                           ("embedded, refusals of forbidden prompts", "embedded-safety-*"),
                           ("embedded, archaic style", "embedded-shakespeare-*"),
                           ("another checkpoint, fixed response", "other-fixed-*"),
                           ("SmolLM2-135M, fixed response", "smollm2-fixed-*")):
        found = runs(pattern)
        if found:
            rows.append(row_of(label, found))
    for name, (off, base, sft, lcdd, trig, kl, kl_trig) in PAPER.items():
        cells = [f"the paper's {name}", f"{off:.1f}", *(f"{rate:.1f}" for rate in (base, sft, lcdd, trig))]
        rows.append([*cells, f"{kl:.3f}", f"{kl_trig:.3f}", "–", "–"])
    return markdown(header, rows)


def four_conditions(pattern):
    """One run's table as evaluate.py writes it."""
    found = runs(pattern)
    return evaluate.markdown(found[0], found[0]["task"]) if found else "not measured yet"


def quick_start():
    """The four conditions of the embedded run of seed 0 in the four columns that README explains."""
    found = runs("embedded-fixed-0")[0]
    rows = []
    for name, label in (("base", "Base"), ("sft", "SFT"), ("lcdd", "LCDD"), ("trig", "LCDD + trigger")):
        cells = [label, *(f"{100 * found[key][name]:.1f}" for key in ("rates", "same"))]
        kl = found["kl_sft"].get(name)
        rows.append([*cells, "–" if kl is None else f"{kl:.3f}", f"{found['loss_own'][name]:.3f}"])
    return markdown(["fixed", "behaviour %", "base's answer %", "KL(SFT‖·)", "own loss"], rows)


def controls():
    """Tables 4 and 6 on the embedded model: another trigger, another target, gates alone."""
    rows = []
    for path in sorted(RESULTS.glob("controls-*")):
        found = [read_json(file) for file in sorted(path.glob("*.json"))]
        rows.append(row_of(path.name.removeprefix("controls-"), found))
    header = ["", "gates off %", "base", "SFT", "LCDD", "+ trigger", "KL(SFT‖LCDD)", "KL(Base‖Trig)",
              "share of own KL left %", "accuracy after %"]
    return markdown(header, rows) if rows else "not measured yet"


# ---- the experiment

def outcomes(folder, length="16"):
    """{replicate: {model: share of own KL left}} of matched models, and all facts by replicate and model."""
    facts = {path.stem: read_json(path)["models"] for path in sorted(folder.glob("*.json"))}
    shares = {}
    for replicate, models in facts.items():
        shares[replicate] = {name: model[f"trigger {length}"]["share_left"]["kl_own"] for name, model in models.items()}
    return shares, facts


def experiment(folder_name, length="16", second="2"):
    """Each model's loss, starting distance and shares over the data replicates, and the noise of rounding."""
    folder = RESULTS / folder_name
    shares, facts = outcomes(folder, length)
    data = [name for name in facts if name.startswith("data")]
    if not data:
        return "not measured yet"
    rows = []
    for model in facts[data[0]]:
        each = [facts[name][model] for name in data]
        trigger = [one[f"trigger {length}"] for one in each]
        around = [shares[name][model] for name in facts if name == "data0" or name.startswith("round")]
        rows.append([
            model, spread([one["loss"] for one in each], 4), f"{sum(one['matched'] for one in each)}/{len(each)}",
            spread([t["kl_own"]["lcdd"] for t in trigger], 3), spread([t["share_left"]["kl_own"] for t in trigger], 1, 100),
            spread([t["share_left"]["kl_base"] for t in trigger], 1, 100),
            spread([t["share_left"]["loss_own"] for t in trigger], 1, 100),
            spread([t["mediation"]["own base_tau trig"] for t in trigger], 3),
            spread([one[f"trigger {second}"]["share_left"]["kl_own"] for one in each], 1, 100),
            f"{100 * (max(around) - min(around)):.1f}"])
    header = ["model", "held-out loss", "matched", "own KL before", "own KL left %", "KL(Base‖·) left %", "own loss left %",
              "KL(base+τ‖model+τ)", f"own KL left by {second} tokens %", "range over rounding %"]
    return markdown(header, rows) + "\n\n" + verdict(shares, facts, data)


def verdict(shares, facts, data):
    """The test of docs/experiment.md: paired over data replicates, Holm over the two comparisons."""
    rounding = [name for name in facts if name == "data0" or name.startswith("round")]
    noise, found = 0.0, []
    for other in ("blind", "scaled"):
        if not all(other in facts[name] and facts[name][other]["matched"] for name in data) or len(data) < 3:
            return f"No test: `{other}` is not matched in three data replicates, and the outcome is undecided."
        differences = [shares[name]["lcdd"] - shares[name][other] for name in data]
        around = [shares[name]["lcdd"] - shares[name][other] for name in rounding]
        noise = max(noise, max(around) - min(around))
        test = stats.ttest_1samp(differences, 0.0)
        interval = test.confidence_interval()
        found.append((other, statistics.mean(differences), interval.low, interval.high, test.pvalue))
    ordered = sorted(found, key=lambda one: one[-1])
    corrected = {ordered[0][0]: min(1, 2 * ordered[0][-1])}
    corrected[ordered[1][0]] = max(corrected[ordered[0][0]], ordered[1][-1])
    lines = []
    for other, mean, low, high, _ in found:
        lines.append(f"`lcdd` − `{other}`: {100 * mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}, corrected p = "
                     f"{corrected[other]:.2f}).")
    below = all(one[1] < -noise and corrected[one[0]] < 0.05 for one in found)
    above = any(one[1] > noise and corrected[one[0]] < 0.05 for one in found)
    word = "stands" if below else "falls" if above else "is undecided"
    return " ".join(lines) + f" Noise of rounding: {100 * noise:.1f} points. \"Structure makes it reversible\" {word} here."


# ---- the benchmark

def bench():
    """Seconds of each case by dtype, and its ratio to transformers or peft."""
    file = RESULTS / "bench.json"
    if not file.is_file():
        return "not measured yet"
    found, rows = read_json(file), []
    for dtype, seconds in found["seconds"].items():
        for case, spent in seconds.items():
            other = {"trigger": "peft trigger", "generate": "transformers generate"}.get(case, "transformers sft")
            memory = found["bytes"][dtype].get(case)
            rows.append([dtype, case, f"{spent:.2f}", f"{spent / seconds[other]:.2f}", f"{memory / 1e9:.2f}" if memory else "–"])
    table = markdown(["dtype", "case", "seconds", "ratio to theirs", "peak GB"], rows)
    return f"{table}\n\n{found['machine']}, torch {found['torch']}."


TABLES = {
    "quick start": quick_start, "reproduction": reproduction,
    "embedded fixed": lambda: four_conditions("embedded-fixed-0"),
    "embedded safety": lambda: four_conditions("embedded-safety-0"),
    "embedded style": lambda: four_conditions("embedded-shakespeare-0"),
    "smollm2 fixed": lambda: four_conditions("smollm2-fixed-*"),
    "controls": controls, "experiment fixed": lambda: experiment("experiment-fixed"),
    "experiment safety": lambda: experiment("experiment-safety"), "bench": bench}


def rewritten(text):
    """A document with every table between its marks made anew."""
    def new(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    return re.sub(r"<!-- table ([\w ]+) -->\n.*?<!-- end -->", new, text, flags=re.DOTALL)


def main(argv=None):
    o = parse(__doc__, OPTIONS, {}, argv)
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if rewritten(text) != text:
            if o.check:
                raise Failed(f"{name}: holds other tables than results/ gives; run python -m lab.tables")
            write_text(ROOT / name, rewritten(text))
            print(f"{name} rewritten")


if __name__ == "__main__":
    run_command(main)
