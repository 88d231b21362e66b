"""
What a run gives: base, SFT, LCDD and LCDD + trigger side by side (Sec. 4, App. F.4).

    python evaluate.py --run runs/fixed               table, results.json, results.md, answers.jsonl
    python evaluate.py --run runs/fixed --ask "What is 2 plus 3 ?"      all four conditions answer

One generate() and one scoring path serve every condition; the KLs are exact over the vocabulary, on
given ids. Shapes: P prompts, M answer tokens, d hidden size, V vocabulary.
"""
from common import (
    InputError, add_up, bar, own_part, parse, read_results, read_rows, reading, run_command, usual_device,
    write_json, write_text)
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch

import carrier as carriers
import data
import eraser
import lcdd
import model

NAMES = {"base": "Base", "sft": "SFT", "lcdd": "LCDD", "trig": "LCDD + trigger"}
BEHIND = "base_tau"         # the base itself behind the trigger: what τ does without a carrier
COLUMNS = {                 # metric in results.json: column of the table
    "rates": "behaviour %", "accuracy": "accuracy %", "same": "base's answer %",
    "kl_sft": "KL(SFT‖·)", "kl_base": "KL(Base‖·)", "kl_own": "own KL(Base‖·)",
    "loss_own": "own loss"}
KEPT = "task", "model", "seed", "stopped", "validation", "seconds"     # of lcdd.py's results.json
NOTES = """Behaviour: what SFT taught is shown. Accuracy: the right answer is in it. KL: nats per
token on SFT's answers; own KL and own loss: on the base's own answers, whose loss under the base is
what a full return has. Means over an answer's tokens, then over prompts; 95 % intervals."""

OPTIONS = {
    "run": (str, "run directory that lcdd.py has finished"),
    "trigger": ("trigger", "name of the trigger file in it"),
    "ask": (str, "only print the conditions' answers to this prompt"),
    "test": (str, "a file of other test prompts; its table is results-FILE.md"),
    "no_end": (False, "leave the token that ends an answer out of KLs and losses"),
    "figure": (False, "draw figure.png, with matplotlib"),
    "device": (usual_device(), "cpu or cuda"),
}


# ---- teacher-forced measures

@torch.no_grad()
def teacher_forced(net, prompts, answers, conditions, pairs, label, batch_size=32):
    """
    What is measured on given answers, {(p, q): KL(p ‖ q), and name: loss of the answer}, each (P)
    float64, nats per token averaged over an answer's tokens; NaN for an empty one. conditions:
    {name: (weights, τ)}.
    """
    def piece(*parts):
        """Of some of the M positions, summed prompt by prompt: (P, number of measures)."""
        *hidden, token, owner = parts
        logp, nats = {}, []
        for name, h in zip(conditions, hidden):
            logp[name] = model.wide(net.head(h)).log_softmax(-1)                    # (chunk, V)
            nats.append(-logp[name].gather(1, token[:, None]).squeeze(1))
        for p, q in pairs:
            difference = logp[p] - logp[q]
            nats.append((logp[p].exp() * difference).sum(-1))                       # (chunk)
        return zeros.index_add(0, owner, torch.stack(nats, dim=1).double())

    names = [*conditions, *pairs]
    zeros = torch.zeros(len(prompts), len(names), device=net.device).double()
    order = [i for i, answer in enumerate(answers) if answer]
    order = own_part(sorted(order, key=lambda i: len(prompts[i] + answers[i])))
    total, progress = zeros.clone(), bar(label, len(order))
    for start in range(0, len(order), batch_size):
        rows, examples, hidden = order[start:start + batch_size], [], []
        for i in rows:
            mask = [False] * len(prompts[i]) + [True] * len(answers[i])
            examples.append((prompts[i] + answers[i], mask))
        ids, mask = (t.to(net.device) for t in data.collate(examples))              # (B, T)
        owner = torch.tensor(rows, device=net.device).repeat_interleave(mask.sum(1))    # (M)
        seen, wanted = ids[:, :-1], mask[:, 1:]
        token = ids[:, 1:][wanted]              # (M): position t predicts token t + 1
        for weights, tau in conditions.values():
            hidden.append(net.hidden(seen, weights, tau, wanted=wanted))            # (M, d)
        total += model.in_pieces(net, piece, *hidden, token, owner)
        progress.update(len(rows))
    progress.close()
    add_up([total])
    if not total.isfinite().all():              # NaN below is an empty answer, and nothing else
        raise InputError(f"{label}: a loss is not finite; the weights or the trigger are broken")
    lengths = torch.tensor([len(answer) for answer in answers])
    return dict(zip(names, total.cpu().t() / lengths))


def interval(values):
    """
    95 % interval of the mean of values (P): Wilson's for a share, whose values are 0 and 1; else
    bootstrapped over the prompts.
    """
    if ((values == 0) | (values == 1)).all():
        return data.wilson(float(values.mean()), len(values))
    return bootstrap(values, torch.ones_like(values))


def bootstrap(values, over):
    """95 % interval of mean(values) / mean(over), (P) each, if the P prompts are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(values), (2000, len(values)), generator=generator)
    ratios = values[rows].mean(1) / over[rows].mean(1)                              # (2000)
    ratios = ratios[ratios.isfinite()]          # a draw may hold none of the prompts that differ
    return ratios.quantile(ratios.new_tensor([0.025, 0.975])).tolist()


def share_left(after, before):
    """
    The share of a starting distance that the trigger leaves, mean(after) / mean(before) over
    prompts (P), and its 95 % interval. A distance after the trigger says little without the one
    before.
    """
    there = ~(after.isnan() | before.isnan())
    after, before = after[there], before[there]
    return float(after.mean() / before.mean()), bootstrap(after, before)


# ---- the conditions of a run

def conditions_of(run, net, name="trigger"):
    """
    (carrier, {condition: (weights, τ)}, what the trigger was learned for) of a run directory, with
    its trigger file of that name. Raises InputError if another name than "trigger" is not there.
    """
    run, conditions, target = Path(run), {"base": (None, None)}, "lcdd"
    carrier = carriers.load(run / "carrier.safetensors", net)
    if (run / "sft.safetensors").is_file():
        conditions["sft"] = carriers.load(run / "sft.safetensors", net).merge(net), None
    conditions["lcdd"] = carrier.merge(net), None
    file = run / f"{name}.safetensors"
    if file.is_file():
        tau, settings = eraser.load(file, net)
        target = settings["target"]
        conditions["trig"] = conditions[target][0], tau
    elif name != "trigger":
        raise InputError(f"{file}: is not there; learn it with eraser.py --name {name}")
    return carrier, conditions, target


def names_of(target):
    """{condition: name}, with a trigger that was learned for the model `target`."""
    return NAMES | {"trig": f"{NAMES[target]} + trigger"}


def gates_shut_is_base(net, carrier, prompt):
    """Are the weights with all gates shut the base's, and the logits of a prompt, bit for bit?"""
    shut = carrier.with_gates(False).merge(net)
    same = all(torch.equal(W, net.projections[l][name].weight)
               for (l, name), W in shut.weights.items())
    return same and torch.equal(net([prompt]), net([prompt], carrier=shut))


@torch.no_grad()
def measure(net, chat, o, samples, conditions, end=True):
    """
    Every condition on the same prompts: ({name: [answer]}, {metric: {name: (P) float64}}), NaN if a
    prompt has no part in a metric. The metrics are COLUMNS, `shown`, which is the behaviour on
    every prompt (`rates` leaves benign ones out), and `mediation`. What needs SFT is left out
    without it. o: options of the run. end: whether the token that ends an answer counts in KLs and
    losses.
    """
    prompts = [chat.prompt(s.prompt, s.before, o.max_len) for s in samples]
    asked = torch.tensor([s.kind != "benign" for s in samples])
    known = torch.tensor([bool(s.answer) for s in samples])
    answers, texts, values = {}, {}, defaultdict(dict)
    for name, (weights, tau) in conditions.items():
        label = f"answers of {name}"
        answers[name] = net.generate(prompts, o.max_new_tokens, weights, tau, label=label)
        texts[name] = [chat.decode(answer) for answer in answers[name]]
        shown = torch.tensor(data.judge(o.task, texts[name], samples)).double()
        right = torch.tensor([*map(data.right, texts[name], samples)]).double()
        same = [answer == base for answer, base in zip(answers[name], answers["base"])]
        values["shown"][name] = shown
        values["rates"][name] = shown.where(asked | ~asked.any(), math.nan)
        values["accuracy"][name] = right.where(known, math.nan)
        values["same"][name] = torch.tensor(same).double()

    # teacher-forced, and the base itself behind the trigger: how far τ pushes without a carrier
    models, mediation = dict(conditions), []
    if "trig" in conditions:
        models[BEHIND] = None, conditions["trig"][1]
        mediation = [("base", BEHIND), (BEHIND, "trig")]
    for text in [name for name in ("base", "sft") if name in conditions]:
        given = "own" if text == "base" else text
        ids = answers[text] if end else [without_end(net, answer) for answer in answers[text]]
        pairs = [(p, q) for p in sorted({"base", text}) for q in conditions if p != q]
        nats = teacher_forced(net, prompts, ids, models, pairs + mediation, f"KL, {text}")
        for p, q in pairs:
            values["kl_own" if given == "own" else f"kl_{p}"][q] = nats[p, q]
        for p, q in mediation:
            values["mediation"][f"{given} {p} {q}"] = nats[p, q]
        if given == "own":
            values["loss_own"] = {name: nats[name] for name in conditions}
    return texts, values


def without_end(net, answer):
    """An answer (ids) without the token that ended it."""
    return answer[:-1] if answer and answer[-1] in net.stop else answer


def summary(values, rows=slice(None)):
    """(means, 95 % intervals), {metric: {name: …}} each, over the `rows` that have a part in it."""
    means, ci = defaultdict(dict), defaultdict(dict)
    for metric, by_name in values.items():
        for name, numbers in by_name.items():
            numbers = numbers[rows]
            numbers = numbers[~numbers.isnan()]
            if len(numbers):
                means[metric][name] = float(numbers.mean())
                ci[metric][name] = interval(numbers)
    return means, ci


def results_of(values, samples, target="lcdd"):
    """measure()'s values as entries of results.json: means over prompts, 95 % intervals as `ci`."""
    out, ci = summary(values)
    for p in ("sft", "base"):
        out["kl"] |= {f"{p}_{q}": value for q, value in out.get(f"kl_{p}", {}).items()}
    for kind in sorted({s.kind for s in samples} - {""}):
        rows = torch.tensor([s.kind == kind for s in samples])
        out["kinds"][kind], _ = summary(values, rows)

    # what the trigger leaves of each distance from the base that was there before it
    for metric in ("kl_base", "kl_own", "loss_own"):
        of = values.get(metric, {})
        if {"trig", target} <= of.keys() - {"base"}:
            floor = of.get("base", 0)           # the base's own loss; its KL from itself is 0
            after, before = of["trig"] - floor, of[target] - floor
            if before.nanmean() > 0:            # else there is nothing to be left
                out["share_left"][metric], ci["share_left"][metric] = share_left(after, before)
    return out | {"prompts": len(samples), "ci": ci}


# ---- what is shown

def percent(value, low, high):
    """A share and its interval in percent."""
    return f"{100 * value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def markdown(results, title):
    """The conditions as a Markdown table."""
    names = names_of(results.get("trigger", {}).get("target", "lcdd"))
    columns = [metric for metric in COLUMNS if metric in results]
    lines = [[title, *(COLUMNS[metric] for metric in columns)], ["---"] * (1 + len(columns))]
    for name in results["rates"]:
        cells = [names[name]]
        for metric in columns:
            value = results[metric].get(name)
            if value is None:
                cells.append("–")
            elif COLUMNS[metric].endswith("%"):
                cells.append(percent(value, *results["ci"][metric][name]))
            else:
                cells.append(f"{value:.3f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def below_the_table(results):
    """What the numbers are, by kinds of prompts, and the share that the trigger left."""
    lines, kinds = [NOTES], results.get("kinds", {})
    for kind, of in kinds.items() if len(kinds) <= 3 else ():       # a dozen: in results.json
        rates = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in of["shown"].items())
        lines.append(f"Behaviour on prompts of the kind {kind}: {rates}.")
    for metric, value in results.get("share_left", {}).items():
        share = percent(value, *results["ci"]["share_left"][metric])
        lines.append(f"Share of the starting {metric} that the trigger leaves, in %: {share}.")
    lines.append(f"{results['prompts']} held-out prompts; gates off {results['sparsity']:.3f}, "
                 f"entries of Δ off {results['entries_off']:.3f}; gates shut is the base bit for "
                 f"bit: {results['shut_is_base']}")
    return "\n".join(lines)


def write_answers(path, samples, texts, values):
    """Every prompt with each condition's answer and its value of each metric, as JSON lines."""
    lines = []
    for i, sample in enumerate(samples):
        row = {"prompt": sample.prompt, "kind": sample.kind}
        for name in texts:
            row[name] = {"text": texts[name][i]}
            for metric, by_name in values.items():
                if name in by_name and not by_name[name][i].isnan():
                    row[name][metric] = round(float(by_name[name][i]), 6)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def draw(run, path):
    """The figure of a run: Alg. 1 step by step."""
    with reading("--figure", "pip install matplotlib"):
        from matplotlib.figure import Figure
    log = [row for row in read_rows(run / "metrics.jsonl") if row["phase"] == "lcdd"]
    steps = [row["step"] + 1 for row in log]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key in ("ema", "budget", "lambda"):                 # there is no budget in the warm-up
        axes.plot(steps, [row[key] for row in log], label=key)
    axes.plot(steps, [1 - row["sparsity"] for row in log], label="share of gates open")
    axes.set(yscale="log", xlabel="optimizer step", title="LCDD: loss against budget")
    axes.legend()
    figure.savefig(path, dpi=120)


# ---- the command

def ask(net, chat, o, config):
    """Print every condition's answer to --ask."""
    prompt = chat.prompt(o.ask, max_len=config.max_len)
    chat.say_cut("prompts", config.max_len)
    _, conditions, target = conditions_of(o.run, net, o.trigger)
    for name, (weights, tau) in conditions.items():
        answer, = net.generate([prompt], config.max_new_tokens, weights, tau)
        print(f"{names_of(target)[name]:14s}  {chat.decode(answer).strip()}")


def main(argv=None):
    """Measure a run directory, and write the results into it."""
    o, start = parse(__doc__, OPTIONS, {}, argv), time.time()
    config, net, chat, splits = lcdd.load_run(o.run, o.device, with_data=not o.ask)
    if o.ask:
        return ask(net, chat, o, config)
    run, samples, suffix = Path(o.run), splits["test"], ""
    if o.test:
        size, suffix = config.sizes[-1], f"-{Path(o.test).stem}"
        samples = data.other_tests(o.test, config.task, splits, config.seed, size, config.pattern)
    carrier, conditions, target = conditions_of(run, net, o.trigger)
    texts, values = measure(net, chat, config, samples, conditions, end=not o.no_end)
    chat.say_cut("prompts", config.max_len)
    results = read_results(run)
    results = {key: results[key] for key in KEPT if key in results}
    results |= carrier.stats() | results_of(values, samples, target)
    prompt = chat.prompt(samples[0].prompt, max_len=config.max_len)
    results["shut_is_base"] = gates_shut_is_base(net, carrier, prompt)
    if "trig" in conditions:
        tau = conditions["trig"][1]
        results["trigger"] = {"name": o.trigger, "target": target, "length": len(tau)}
    results["seconds"]["evaluate"] = round(time.time() - start, 2)
    table = markdown(results, config.task) + "\n\n" + below_the_table(results)
    write_json(run / f"results{suffix}.json", results)
    write_text(run / f"results{suffix}.md", table + "\n")
    write_answers(run / f"answers{suffix}.jsonl", samples, texts, values)
    print("\n" + table)
    if o.figure:
        draw(run, run / "figure.png")


if __name__ == "__main__":
    run_command(main, together=True)
