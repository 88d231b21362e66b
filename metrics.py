"""
The metrics of an evaluation, one line each, and the tables of results.json that show them.
"""
from dataclasses import dataclass

import behaviour
import eraser
from console import markdown
from files import COUNT, NUMBER, TEXT, InputError, check_fields
from run import read_results

NAMES = {
    "base": "Base", "sft": "SFT", "lcdd": "LCDD", "trig": "LCDD + trigger",
    "shut": "LCDD, gates shut",
}


# ---- the metrics: a new one is a line here, and its values in measure()

@dataclass(frozen=True)
class Metric:
    """
    key      in the rows of measure() and of lab/ablate.py
    header   of its column, and its label in the figure
    entry    of results.json that holds it, {prefix + condition: number}
    share    a share of prompts, shown in percent? Otherwise nats a token
    apart    shown for each kind of prompts too?
    """
    key: str
    header: str
    entry: str
    prefix: str = ""
    share: bool = False
    apart: bool = False

    def show(self, value, interval=None):
        """A number of this metric as a table's cell; – where there is none."""
        if value is None:
            return "–"
        if not self.share:
            return f"{value:.3f}"
        around = f" ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})" if interval else ""
        return f"{100 * value:.1f}{around}"


METRICS = (
    Metric("rate", "behaviour", "rates", share=True, apart=True),
    Metric("accuracy", "accuracy", "accuracy", share=True, apart=True),
    Metric("same", "base's answer", "same_as_base", share=True),
    Metric("kl_sft", "KL(SFT‖·)", "kl", "sft_", apart=True),
    Metric("kl_base", "KL(Base‖·)", "kl", "base_", apart=True),
    Metric("kl_own", "own KL(Base‖·)", "kl_own"),
    Metric("loss_own", "own loss", "loss_own"),
)
NOTES = """\
Behaviour: answers that show what SFT taught. Accuracy: answers that hold the right one.
Base's answer: the base's own, to the last token. KL: nats a token on SFT's answers; own KL and
own loss: nats a token on the base's own answers, the loss beside the base's. Means over a prompt's
tokens, then over prompts; the end-of-text token {eos}. Gates shut is Δ off."""


def columns(labels):
    """
    [(header, metric, kind)] of a table whose prompts are of the kinds `labels`; kind "" is all of
    them, which says nothing where one half is harmful and the other benign.
    """
    opposed = set(labels) == {"harmful", "benign"}
    found = []
    for metric in METRICS:
        unit = " %" if metric.share else ""
        if not (opposed and metric.apart):
            found.append((metric.header + unit, metric, ""))
        for kind in labels if metric.apart else ():
            found.append((f"{metric.header}, {behaviour.one_line(kind)}{unit}", metric, kind))
    return found


# ---- the table

def called(name, results):
    """What tables call a condition; a trigger stands before the model that it was learned for."""
    if name == "trig" and "trigger" in results:
        return f"{NAMES[results['trigger']['target']]} + trigger"
    return NAMES[name]


def kinds_of(results):
    """The kinds that a table shows apart: up to three; a dozen stand in results.json."""
    labels = list(next(iter(results.get("kinds", {}).values()), {}))
    return labels if len(labels) <= 3 else []


def cell(results, name, metric, kind):
    """One number of results.json for a table, a share with its confidence interval."""
    if kind:
        found = results.get("kinds", {}).get(name, {}).get(kind, {})
        return metric.show(found.get(metric.key))
    key = metric.prefix + name
    value = results.get(metric.entry, {}).get(key)
    return metric.show(value, results["ci"].get(metric.entry, {}).get(key))


def line(results, name, label, labels):
    """A table's row for one condition."""
    return [label] + [cell(results, name, metric, kind) for _, metric, kind in columns(labels)]


def table(results, title):
    """The four conditions, and the carrier with its gates shut, as Markdown."""
    labels = kinds_of(results)
    header = [title] + [head for head, *_ in columns(labels)]
    lines = []
    for name in NAMES:
        if name in results["rates"]:
            lines.append(line(results, name, called(name, results), labels))
    return markdown(header, lines)


def evaluated():
    """What results.json of an evaluated run has to be, for check_fields()."""
    entries = {metric.entry: (None, {"*": NUMBER}) for metric in METRICS}
    intervals = {metric.entry: (None, {"*": [NUMBER, NUMBER]}) for metric in METRICS}
    return entries | {
        "rates": {"*": NUMBER}, "ci": intervals, "kinds": (None, {"*": {"*": {"*": NUMBER}}}),
        "trigger": (None, {"name": TEXT, "target": eraser.TARGETS, "length": COUNT})}


def compare(runs):
    """Evaluated runs in one table, condition by condition. Raises InputError for others."""
    found = {}
    for run in runs:
        found[run] = read_results(run)
        if "ci" not in found[run]:
            raise InputError(f"{run}/results.json holds no evaluation; "
                             f"run python evaluate.py --run {run} first")
        check_fields(f"{run}/results.json", found[run], evaluated())
    labels = []
    for results in found.values():
        labels += [kind for kind in kinds_of(results) if kind not in labels]
    lines = []
    for name in NAMES:
        for run, results in found.items():
            if name in results["rates"]:
                lines.append(line(results, name, f"{called(name, results)}, {run}", labels))
    tasks = dict.fromkeys(str(results.get("task", "")) for results in found.values())
    header = [behaviour.one_line(", ".join(tasks))] + [head for head, *_ in columns(labels)]
    return markdown(header, lines)
