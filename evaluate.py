"""
What a run gives: base, SFT, LCDD and LCDD + trigger side by side (Sec. 4, App. F.4).

    python evaluate.py --run runs/fixed               table, results.json, results.md, figure.png
    python evaluate.py --run runs/fixed --ask "What is 2 plus 3 ?"      all four conditions answer
    python evaluate.py --run runs/fixed --dose        the behaviour against the size of the delta
    python evaluate.py --compare runs/a runs/b        two evaluated runs in one table

One greedy generate() and one scoring path serve every condition; the KLs are exact over the
vocabulary, on given ids. Shapes: P prompts, N response tokens, d hidden size, V vocabulary.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import copy
import io
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import behaviour
import carrier as carriers
import eraser
import answered
import model
from chat import collate
from files import (
    COUNT, NUMBER, TEXT, InputError, check_fields, read_jsonl, whole, write_json, write_text)
from parallel import add_up, once, share
from run import (
    Parser, check_device, check_numbers, cli, load_model, look_into, markdown, read_results, reopen,
    ticker)

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


# ---- teacher-forced measures

@torch.no_grad()
def log_probabilities(net, prompts, answers, conditions, batch_size=32, chunk=None, label="KLs"):
    """
    Yields (prompt, token, {condition: log p}) for the tokens of `answers`, `chunk` of them at a
    time: the prompt's number (N), the token's id (N), log-probabilities in its place (N, V).

    prompts, answers: lists of ids. conditions: name → (carrier, trigger). A batch's hidden states
    and a chunk's logits are all that is in memory; the net says how many where `chunk` does not.
    label: what the progress is called.
    """
    chunk = chunk or net.chunk
    order = [i for i in range(len(prompts)) if answers[i]]
    order.sort(key=lambda i: len(prompts[i]) + len(answers[i]))
    order = share(order)
    tell = ticker(label, len(order))
    for start in range(0, len(order), batch_size):
        tell(start)
        rows = order[start:start + batch_size]
        texts = []
        for i in rows:
            mask = [False] * len(prompts[i]) + [True] * len(answers[i])
            texts.append((prompts[i] + answers[i], mask))
        ids, mask = collate(texts, 0)                                        # (B, T)
        owner = torch.tensor(rows).repeat_interleave(mask.sum(1))            # (N)
        token = ids[mask]                                                    # (N)
        keep = mask[:, 1:].to(net.device)        # position t predicts token t + 1
        seen = ids[:, :-1].to(net.device)
        hidden = {}
        for name, (weights, trigger) in conditions.items():
            hidden[name] = net.hidden(seen, weights, trigger, keep=keep)     # (N, d)
        for i in range(0, len(owner), chunk):
            piece = slice(i, i + chunk)
            logp = {}
            for name, h in hidden.items():
                logp[name] = model.wide(net.head(h[piece])).log_softmax(-1)  # (chunk, V)
            yield owner[piece], token[piece], logp


def divergence(log_p, log_q):
    """KL(p ‖ q) token by token, exact over the vocabulary. (N, V), (N, V) → (N)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu()


def kl_divergences(net, prompts, answers, conditions, pairs, batch_size=32, chunk=None):
    """
    KL(p ‖ q) for pairs (p, q) of conditions, teacher-forced on `answers` (App. F.4):
    {pair: (P) means over a prompt's tokens}, NaN where an answer has none.
    """
    totals = {pair: torch.zeros(len(prompts), dtype=torch.float64) for pair in pairs}
    used = {name: conditions[name] for pair in pairs for name in pair}
    stream = log_probabilities(net, prompts, answers, used, batch_size, chunk, "KLs on answers")
    for owner, _, logp in stream:
        for p, q in pairs:
            totals[p, q].index_add_(0, owner, divergence(logp[p], logp[q]))
    add_up(totals.values())
    lengths = torch.tensor([len(a) for a in answers])
    return {pair: total / lengths for pair, total in totals.items()}


def own_answers(net, prompts, answers, conditions, batch_size=32, chunk=None):
    """
    What every condition makes of the base's own `answers`: ({name: KL(Base ‖ ·)}, {name: loss}),
    (P) means over a prompt's tokens, NaN where an answer has none. No KL of the base's own.
    """
    kl = {name: torch.zeros(len(prompts), dtype=torch.float64) for name in conditions}
    loss = {name: torch.zeros(len(prompts), dtype=torch.float64) for name in conditions}
    stream = log_probabilities(net, prompts, answers, conditions, batch_size, chunk,
                               "loss on the base's answers")
    for owner, token, logp in stream:
        for name, q in logp.items():
            kl[name].index_add_(0, owner, divergence(logp["base"], q))
            nll = -q.gather(1, token[:, None].to(q.device)).squeeze(1)       # (N)
            loss[name].index_add_(0, owner, nll.double().cpu())
    add_up([*kl.values(), *loss.values()])
    lengths = torch.tensor([len(a) for a in answers])
    kl.pop("base")
    return ({name: total / lengths for name, total in kl.items()},
            {name: total / lengths for name, total in loss.items()})


def without_end(answers, stop):
    """Answers without the end-of-text token that they may end in."""
    return [a[:-1] if a and a[-1] in stop else a for a in answers]


def measured(values):
    """Those prompts' values of a 1-D tensor that are not NaN."""
    return values[~values.isnan()]


def bootstrap(values, resamples=2000, seed=0):
    """
    95 % interval of the mean of `values` (P): of the means of P values drawn from them with
    replacement, again and again.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[rows].mean(1).double()                                    # (resamples)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


# ---- one row a condition

def teacher_forced(net, prompts, answers, conditions):
    """The METRICS in nats: {metric: {condition: (P)}}."""
    kl_own, loss_own = own_answers(net, prompts, answers["base"], conditions)
    nats = {"kl_sft": {}, "kl_base": {}, "kl_own": kl_own, "loss_own": loss_own}
    if "sft" in conditions:
        pairs = [(p, q) for p in ("sft", "base") for q in conditions if p != q]
        found = kl_divergences(net, prompts, answers["sft"], conditions, pairs)
        for (p, name), values in found.items():
            nats[f"kl_{p}"][name] = values
    return nats


def measure(net, chat, task, samples, conditions, max_new_tokens, max_len=None, answers=None,
            eos=True):
    """
    Every condition on the same prompts: {name: score() and the other METRICS}, (P) where they are
    nats. A divergence of a model from itself is left out.

    conditions: name → (Merged or None, trigger or None), "base" among them; what is measured against
    SFT is left out without it. answers: {name: id lists} already generated; new ones are added to
    it. eos: whether the end-of-text token counts in what is teacher-forced.
    """
    prompts = [chat.prompt(s.prompt, max_len) for s in samples]
    answers = {} if answers is None else answers
    answered.fill(net, prompts, conditions, answers, max_new_tokens)
    said = answers if eos else {name: without_end(a, net.stop) for name, a in answers.items()}
    nats = teacher_forced(net, prompts, said, conditions)
    rows = {}
    for name in conditions:
        row = behaviour.score(task, [chat.decode(a) for a in answers[name]], samples)
        equal = [a == b for a, b in zip(answers[name], answers["base"])]
        row["same"] = sum(equal) / len(samples)
        row |= {key: values[name] for key, values in nats.items() if name in values}
        add_kinds(row, samples)
        rows[name] = row
    return rows


def add_kinds(row, samples):
    """Into row["kinds"], beside the rates: the means of what is nats and shown apart."""
    for kind, found in row["kinds"].items():
        of_kind = torch.tensor([s.kind == kind for s in samples])
        for metric in METRICS:
            if metric.apart and not metric.share and metric.key in row:
                values = measured(row[metric.key][of_kind])
                if len(values):
                    found[metric.key] = float(values.mean())


def numbers(row):
    """A row of measure() as {metric: number}, with `KIND METRIC` for what is shown apart."""
    found = {}
    for metric in METRICS:
        if metric.key in row:
            value = row[metric.key]
            if metric.share:
                found[metric.key] = value
            elif len(measured(value)):
                found[metric.key] = float(measured(value).mean())
        for kind, of_kind in row["kinds"].items():
            if metric.apart and metric.key in of_kind:
                found[f"{kind} {metric.key}"] = of_kind[metric.key]
    return found


def interval(metric, row, samples):
    """95 % confidence interval of a metric over prompts."""
    if not metric.share:
        return bootstrap(measured(row[metric.key]))
    counts = {"rate": row["n"], "accuracy": sum(bool(s.answer) for s in samples)}
    return behaviour.wilson(row[metric.key], counts.get(metric.key, len(samples)))


def results_of(rows, samples):
    """measure()'s rows as entries of results.json, with 95 % intervals under `ci`."""
    out = behaviour.by_condition(rows) | {"prompts": len(samples), "ci": {}}
    for metric in METRICS:
        values, intervals = {}, {}
        for name, row in rows.items():
            found = numbers(row)
            if metric.key in found:
                values[metric.prefix + name] = found[metric.key]
                intervals[metric.prefix + name] = interval(metric, row, samples)
        if values:
            out.setdefault(metric.entry, {}).update(values)
            out["ci"].setdefault(metric.entry, {}).update(intervals)
    return out


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


# ---- the figure

def draw_training(axes, rows):
    """LCDD's loss against its budget, with λ and the share of gates off, step by step."""
    steps = [r["step"] + 1 for r in rows]
    axes.plot(steps, [max(r["ema"], 1e-6) for r in rows], label="loss (average)")
    axes.plot(steps, [r.get("budget") or math.nan for r in rows], "k--", lw=1, label="budget ε")
    axes.plot(steps, [r["lambda"] for r in rows], color="tab:orange", lw=1, label="λ")
    title = "LCDD: loss against budget, λ, sparsity"
    axes.set(yscale="log", xlabel="optimizer step", title=title)
    share = axes.twinx()
    share.plot(steps, [r["sparsity"] for r in rows], color="tab:green", label="gates off")
    share.set(ylim=(0, 1), ylabel="share of gates off")
    lines = axes.get_lines() + share.get_lines()
    axes.legend(lines, [x.get_label() for x in lines], loc="lower right", fontsize=8)


def is_point(row):
    """Has a line of the log all numbers that draw_training() needs?"""
    needed = [row.get(name) for name in ("step", "ema", "lambda", "sparsity")]
    if row.get("budget") is not None:
        needed.append(row["budget"])
    return all(type(x) in (int, float) and abs(x) < 1e300 for x in needed)


def draw_gates(axes, carrier, sparsity):
    """The share of open gates, layer by group."""
    groups = carrier.logits.detach().cpu().split(list(carrier.sizes.values()), dim=1)
    opened = torch.stack([(g > 0).float().mean(1) for g in groups], dim=1)   # (L, 8)
    image = axes.imshow(opened.numpy(), aspect="auto", vmin=0, cmap="viridis")
    title = f"share of gates open ({1 - sparsity:.1%} in all)"
    axes.set(xticks=range(len(groups)), yticks=range(len(opened)), ylabel="layer", title=title)
    axes.set_xticklabels(carriers.GROUPS, rotation=40, ha="right", fontsize=8)
    axes.figure.colorbar(image, ax=axes)


def draw_bars(axes, results, metrics, title):
    """Metrics as bars beside each other for every condition, with their confidence intervals."""
    names = [n for n in ("base", "sft", "lcdd", "trig") if n in results["rates"]]
    width = 0.8 / len(metrics)
    for i, metric in enumerate(metrics):
        values, intervals = results.get(metric.entry, {}), results["ci"].get(metric.entry, {})
        x, y, below, above = [], [], [], []
        for j, name in enumerate(names):
            key = metric.prefix + name
            if key in values:
                low, high = intervals[key]
                x.append(j + (i - (len(metrics) - 1) / 2) * width)
                y.append(values[key])
                below.append(max(0, values[key] - low))
                above.append(max(0, high - values[key]))
        if x:
            axes.bar(x, y, width, yerr=[below, above], label=metric.header, capsize=2,
                     error_kw={"lw": 0.8})
    axes.set(xticks=range(len(names)), title=f"{title} (95 % CI)")
    axes.set_xticklabels([called(n, results) for n in names])
    axes.legend(fontsize=8, ncols=2, loc="upper center")


@once
def figure(run, results, carrier, path):
    """Training, open gates, and the metrics of the four conditions: one PNG of a run."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    file = run / "metrics.jsonl"
    logged = read_jsonl(file) if file.is_file() else []
    steps = [row for row in logged if row.get("phase") == "lcdd" and is_point(row)]
    fig, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    training, gates, shares, nats = axes.flat
    if steps:
        draw_training(training, steps)
    draw_gates(gates, carrier, results["sparsity"])
    draw_bars(shares, results, [m for m in METRICS if m.share], "share of test prompts")
    shares.set(ylim=(0, 1.3))
    draw_bars(nats, results, [m for m in METRICS if not m.share], "nats a token")
    nats.set_yscale("symlog", linthresh=0.1)
    nats.set_ylim(0, 4 * nats.get_ylim()[1])                 # room for the legend
    fig.suptitle(f"{results['task']}: base, SFT, LCDD, LCDD + trigger", parse_math=False)
    picture = io.BytesIO()
    try:
        fig.savefig(picture, dpi=110, format="png")
    except ValueError as e:                     # of numbers in a damaged log, say
        return print(f"no figure: {e}", file=sys.stderr)
    finally:
        plt.close(fig)
    with whole(path) as partial:
        partial.write_bytes(picture.getvalue())


# ---- the script

def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", help="run directory that lcdd.py has finished")
    a("--trigger", default="trigger", help="name of the trigger file in it (trigger)")
    either = p.add_mutually_exclusive_group().add_argument
    either("--ask", action="append",
           help="only print the conditions' answers to this prompt; may be given several times")
    either("--dose", action="store_true",
           help="only the dose-response: the carrier's delta times 0, 0.25, …, 1")
    either("--compare", nargs="+", metavar="RUN", help="only print evaluated runs in one table")
    a("--no-eos", action="store_true",
      help="leave the end-of-text token out of the KLs and losses (it counts)")
    a("--seed", type=int,
      help="of the splits; only the run's own is accepted, so that test prompts stay held out")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    o = p.parse_args(argv)
    if bool(o.run) == bool(o.compare):
        raise InputError("give either --run or --compare")
    check_numbers(o)
    check_device(o.device)
    return o


def conditions_of(run, net, name="trigger"):
    """
    (LCDD carrier, {condition: (Merged or None, trigger or None)}, {"trigger": facts about it}) of a
    run directory, with its trigger file of that name where there is one. Raises InputError where
    another name than "trigger" is not there.
    """
    carrier, conditions = carriers.load(run / "carrier.safetensors", net), {"base": (None, None)}
    if (run / "sft.safetensors").is_file():
        conditions["sft"] = carriers.load(run / "sft.safetensors", net).merge(net), None
    else:
        print(f"note: {run} holds no sft.safetensors, and SFT is left out; where its data are, lcdd.py "
              "--resume makes it again", file=sys.stderr)
    conditions["lcdd"] = carrier.merge(net), None
    file = run / f"{name}.safetensors"
    if file.is_file():
        tau, settings = eraser.load(file, net)
        target = settings.get("target", "lcdd")
        if target not in conditions:
            raise InputError(f"{file}: was learned for {NAMES[target]}, which is not there")
        conditions["trig"] = (conditions[target][0], tau)
        found = {"trigger": {"name": name, "target": target, "length": len(tau)}}
        return carrier, conditions, found
    if name != "trigger":
        raise InputError(f"{file}: no such trigger; learn it with eraser.py --name {name}")
    print(f"no trigger yet: python eraser.py --run {run}")
    return carrier, conditions, {}


def ask(run, o):
    """Print every condition's answer to every text of --ask."""
    config, chat = look_into(run)
    net = load_model(chat, o.device, config["dtype"])
    _, conditions, found = conditions_of(run, net, o.trigger)
    prompts, answers = [chat.prompt(text, config["max_len"]) for text in o.ask], {}
    chat.say_cut("prompts", config["max_len"])
    for name, (weights, trigger) in conditions.items():
        answers[name] = net.generate(prompts, config["max_new_tokens"], carrier=weights,
                                     trigger=trigger)
    for i, text in enumerate(o.ask):
        print(f"\n{text}")
        for name in conditions:
            print(f"  {called(name, found):14s}  {chat.decode(answers[name][i]).strip()}")


def dose_response(net, chat, config, samples, carrier, doses=(0.0, 0.25, 0.5, 0.75, 1.0)):
    """
    {dose: score()} with Δ times each dose; one batch serves them all, a scale per row.
    """
    prompts = [chat.prompt(s.prompt, config["max_len"]) for s in samples]
    scale = [dose for dose in doses for _ in prompts]
    answers = net.generate(prompts * len(doses), config["max_new_tokens"], carrier=carrier,
                           scale=scale)
    texts = [chat.decode(a) for a in answers]
    scores = {}
    for i, dose in enumerate(doses):
        piece = texts[i * len(prompts):(i + 1) * len(prompts)]
        scores[dose] = behaviour.score(config["task"], piece, samples)
    return scores


def show_doses(net, chat, config, samples, carrier):
    """Print dose_response() as a table."""
    scores = dose_response(net, chat, config, samples, carrier)
    lines = [[f"{dose}", *behaviour.cells(score)] for dose, score in scores.items()]
    print(markdown(["Δ ×", "behaviour", "accuracy"], lines))
    chat.say_cut("prompts", config["max_len"])


def as_base(row, samples):
    """The row of measure() for a model that is the base bit for bit, out of the base's own."""
    row = copy.deepcopy(row)
    row["kl_own"] = torch.zeros_like(row["loss_own"])
    if "kl_sft" in row:
        row["kl_base"] = row["kl_own"]
    add_kinds(row, samples)
    return row


@torch.no_grad()
def is_base(net, chat, config, samples, shut):
    """Is `shut` the base bit for bit: every weight, and the logits of some prompts?"""
    for layer, merged in zip(net.projections, shut.weights):
        if not all(torch.equal(merged[name], linear.weight) for name, linear in layer.items()):
            return False
    rows = [(chat.prompt(s.prompt, config["max_len"]), []) for s in samples]
    ids = collate(rows, chat.pad_id)[0].to(net.device)
    return torch.equal(net(ids), net(ids, carrier=shut))


def below_the_table(results):
    """What the numbers are, and the run's other ones."""
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    eos = "counts" if results["eos"] else "is left out"
    return NOTES.format(eos=eos) + (
        f"\n\n{results['prompts']} held-out prompts, 95 % confidence intervals in brackets; "
        f"gates off {results['sparsity']:.3f}, entries of Δ off {results['entries_off']:.3f}; "
        f"gates shut is the base bit for bit: {'yes' if results['shut_is_base'] else 'NO'}; "
        f"seconds: {seconds}")


def main(argv=None):
    o = options(argv)
    if o.compare:
        return print(compare(o.compare))
    run, start = Path(o.run), time.time()
    if o.ask:
        return ask(run, o)
    config, chat, splits = reopen(run)
    if o.seed not in (None, config["seed"]):
        raise InputError(f"--seed {o.seed}: this run was split with seed {config['seed']}; "
                         "another one would test on training prompts")
    samples, before = splits["test"], read_results(run)
    for entry in ("trigger", *(metric.entry for metric in METRICS)):    # of an evaluation before
        before.pop(entry, None)
    net = load_model(chat, o.device, config["dtype"])
    carrier, conditions, found = conditions_of(run, net, o.trigger)
    if o.dose:
        return show_doses(net, chat, config, samples, carrier)

    length = config["max_new_tokens"]
    origin = answered.origins(run, net, chat, samples, length, config["max_len"])
    answers = answered.read(run, origin)
    # the switch: gates shut is the base
    shut = carrier.with_gates(False).merge(net)
    same = is_base(net, chat, config, samples[:32], shut)
    if not same:
        conditions["shut"] = (shut, None)
    rows = measure(net, chat, config["task"], samples, conditions, length, config["max_len"], answers,
                   eos=not o.no_eos)
    answered.write(run, answers, origin)
    if same:
        rows["shut"] = as_base(rows["base"], samples)
    chat.say_cut("prompts", config["max_len"])
    results = {"task": config["task"]} | before | found | carrier.stats() | results_of(rows, samples)
    results["shut_is_base"] = same
    results["eos"] = not o.no_eos
    results["seconds"]["evaluate"] = round(time.time() - start, 2)
    text = table(results, config["task"]) + "\n\n" + below_the_table(results)
    write_json(run / "results.json", results)
    write_text(run / "results.md", text + "\n")
    print("\n" + text)
    figure(run, results, carrier, run / "figure.png")


if __name__ == "__main__":
    cli(main, together=True)
