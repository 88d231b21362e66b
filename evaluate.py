"""
What a run gives: base, SFT, LCDD and LCDD + trigger side by side (Sec. 4, App. F.4).

    python evaluate.py --run runs/fixed               table, results.json, results.md, answers.jsonl
    python evaluate.py --run runs/fixed --ask "What is 2 plus 3 ?"      all four conditions answer

One generate() and one scoring path serve every condition; the KLs are exact over the vocabulary, on given
ids. Shapes: P prompts, M answer tokens, d hidden size, V vocabulary.
"""
from common import (
    InputError, add_up, bar, own_part, parse, read_rows, run_command, usual_device, write_json, write_text)
import json
import math
import time
from pathlib import Path

import torch

import carrier as carriers
import data
import eraser
import lcdd
import model

NAMES = {"base": "Base", "sft": "SFT", "lcdd": "LCDD", "trig": "LCDD + trigger"}
PUSHED = "base_trig"        # the base itself behind the trigger: what τ does without a carrier
# key in results.json, column of the table, in percent?
METRICS = (
    ("shown", "", True),        # on every prompt; `rates` leaves benign ones out
    ("rates", "behaviour %", True), ("accuracy", "accuracy %", True), ("same", "base's answer %", True),
    ("kl_sft", "KL(SFT‖·)", False), ("kl_base", "KL(Base‖·)", False), ("kl_own", "own KL(Base‖·)", False),
    ("loss_own", "own loss", False))
NOTES = """\
Behaviour: answers that show what SFT taught. Accuracy: answers that hold the right one. Base's answer: the base's
own to the last token. KL: nats per token on SFT's answers; own KL and own loss: on the base's own answers, as low as
the base's own loss where the base is back. Means over an answer's tokens, then over prompts; 95 % intervals."""


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
    On given answers: ({(p, q): KL(p ‖ q)}, {name: loss of the answer}), each (P) float64, nats per token
    averaged over an answer's tokens; NaN for an empty one. conditions: {name: (weights, τ)}.
    """
    kl = {pair: torch.zeros(len(prompts), dtype=torch.float64) for pair in pairs}
    loss = {name: torch.zeros(len(prompts), dtype=torch.float64) for name in conditions}
    order = [i for i in range(len(prompts)) if answers[i]]
    order = own_part(sorted(order, key=lambda i: len(prompts[i]) + len(answers[i])))
    chunk = max(32, model.CHUNK // net.config.vocab_size)
    progress = bar(label, len(order))
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        ids, mask = data.collate([(prompts[i] + answers[i],
                                   [False] * len(prompts[i]) + [True] * len(answers[i])) for i in rows])
        ids, wanted = ids.to(net.device), mask[:, 1:].to(net.device)    # position t predicts token t + 1
        owner = torch.tensor(rows).repeat_interleave(mask.sum(1))                   # (M)
        token = ids[:, 1:][wanted]                                                  # (M)
        hidden = {name: net.hidden(ids[:, :-1], weights, tau, wanted=wanted)
                  for name, (weights, tau) in conditions.items()}
        for i in range(0, len(owner), chunk):
            piece = slice(i, i + chunk)
            logp = {name: model.wide(net.head(h[piece])).log_softmax(-1) for name, h in hidden.items()}
            for p, q in pairs:
                each = (logp[p].exp() * (logp[p] - logp[q])).sum(-1)                # (chunk)
                kl[p, q].index_add_(0, owner[piece], each.double().cpu())
            for name in conditions:
                each = -logp[name].gather(1, token[piece, None]).squeeze(1)
                loss[name].index_add_(0, owner[piece], each.double().cpu())
        progress.update(len(rows))
    progress.close()
    add_up([*kl.values(), *loss.values()])
    lengths = torch.tensor([len(answer) for answer in answers])
    for found in (kl, loss):
        for name in found:
            found[name] = found[name] / lengths
    return kl, loss


def mean_and_interval(values):
    """
    (mean, 95 % interval) over prompts of values (P), NaN left out: Wilson's for a share, whose values are 0
    and 1; else bootstrapped.
    """
    values = values[~values.isnan()]
    mean = float(values.mean())
    if ((values == 0) | (values == 1)).all():
        return mean, data.wilson(mean, len(values))
    return mean, bootstrap(values)


def bootstrap(values, over=None):
    """95 % interval of mean(values), or mean(values) / mean(over), when the P prompts are drawn anew; (P) each."""
    rows = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[rows].mean(1)
    if over is not None:
        means = means / over[rows].mean(1)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


def share_left(after, before):
    """
    The share of a starting distance that the trigger leaves, mean(after) / mean(before) over prompts (P), and
    its 95 % interval. A distance after the trigger says little without the one before.
    """
    there = ~(after.isnan() | before.isnan())
    after, before = after[there], before[there]
    return float(after.mean() / before.mean()), bootstrap(after, before)


# ---- the conditions of a run

def conditions_of(run, net, name="trigger"):
    """
    (carrier, {condition: (weights, τ)}, what the trigger was learned for) of a run directory, with its
    trigger file of that name. Raises InputError if another name than "trigger" is not there.
    """
    run = Path(run)
    carrier, conditions, target = carriers.load(run / "carrier.safetensors", net), {"base": (None, None)}, "lcdd"
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


def gates_shut_is_base(net, carrier, ids):
    """Are the weights with all gates shut the base's, and the logits of some prompts, bit for bit?"""
    shut = carrier.with_gates(False).merge(net)
    same = all(torch.equal(W, net.projections[l][name].weight) for (l, name), W in shut.weights.items())
    return same and torch.equal(net(ids), net(ids, carrier=shut))


@torch.no_grad()
def measure(net, chat, o, samples, conditions, end=True):
    """
    Every condition on the same prompts: ({name: [answer]}, {metric: {name: (P) float64}}), the METRICS and
    `mediation`; NaN where a prompt has no part in one. What needs SFT is left out without it. o: options of the
    run. end: whether the token that ends an answer counts in KLs and losses.
    """
    prompts = [chat.prompt(s.prompt, s.before, o.max_len) for s in samples]
    answers, texts, found = {}, {}, {metric: {} for metric, _, _ in METRICS}
    asked = torch.tensor([s.kind != "benign" for s in samples])
    known = torch.tensor([bool(s.answer) for s in samples])
    for name, (weights, tau) in conditions.items():
        answers[name] = net.generate(prompts, o.max_new_tokens, weights, tau, label=f"answers of {NAMES[name]}")
        texts[name] = [chat.decode(answer) for answer in answers[name]]
        same = [answer == base for answer, base in zip(answers[name], answers["base"])]
        right = [data.right(text, sample) for text, sample in zip(texts[name], samples)]
        found["shown"][name] = torch.tensor(data.judge(o.task, texts[name], samples)).double()
        found["rates"][name] = found["shown"][name].where(asked | ~asked.any(), math.nan)
        found["accuracy"][name] = torch.tensor(right).double().where(known, math.nan)
        found["same"][name] = torch.tensor(same).double()
    if not end:
        for name, some in answers.items():
            answers[name] = [answer[:-1] if answer[-1:] and answer[-1] in net.stop else answer for answer in some]

    # teacher-forced, and the base itself behind the trigger: how far τ pushes without a carrier
    models, others = dict(conditions), [name for name in conditions if name != "base"]
    pairs = [("base", name) for name in others]
    if "trig" in conditions:
        models[PUSHED] = None, conditions["trig"][1]
        pairs += [("base", PUSHED), (PUSHED, "trig")]
    kl, loss = teacher_forced(net, prompts, answers["base"], models, pairs, "the base's answers")
    found["loss_own"] = {name: loss[name] for name in conditions}
    found["kl_own"] = {name: kl["base", name] for name in others}
    found["mediation"] = {f"own {p} {q}": kl[p, q] for p, q in pairs if PUSHED in (p, q)}
    if "sft" in conditions:
        pairs += [("sft", name) for name in conditions if name != "sft"]
        kl, _ = teacher_forced(net, prompts, answers["sft"], models, pairs, "SFT's answers")
        found["kl_sft"] = {name: kl["sft", name] for name in conditions if name != "sft"}
        found["kl_base"] = {name: kl["base", name] for name in others}
        found["mediation"] |= {f"sft {p} {q}": kl[p, q] for p, q in pairs if PUSHED in (p, q)}
    return texts, found


def results_of(found, samples, target="lcdd"):
    """measure()'s values as entries of results.json: means over prompts, and 95 % intervals under `ci`."""
    out, ci = {"prompts": len(samples)}, {}
    for metric, by_name in found.items():
        for name, values in by_name.items():
            if not values.isnan().all():
                mean, interval = mean_and_interval(values)
                out.setdefault(metric, {})[name] = mean
                ci.setdefault(metric, {})[name] = interval
    out["kl"] = {f"{p}_{name}": value for p in ("sft", "base") for name, value in out.get(f"kl_{p}", {}).items()}
    for kind in sorted({s.kind for s in samples if s.kind}):
        of_kind = torch.tensor([s.kind == kind for s in samples])
        of = out.setdefault("kinds", {}).setdefault(kind, {})
        for metric, by_name in found.items():
            of[metric] = {name: float(values[of_kind].nanmean()) for name, values in by_name.items()
                          if not values[of_kind].isnan().all()}
    distances = {metric: found.get(metric, {}) for metric in ("kl_base", "kl_own", "loss_own")}
    floor = found["loss_own"]["base"]
    for metric, values in distances.items():
        if "trig" in values and target in values and target != "base":
            less = floor if metric == "loss_own" else 0
            left, interval = share_left(values["trig"] - less, values[target] - less)
            out.setdefault("share_left", {})[metric] = left
            ci.setdefault("share_left", {})[metric] = interval
    return out | {"ci": ci}


# ---- what is shown

def markdown(results, title):
    """The conditions as a Markdown table."""
    columns = [column for column in METRICS if column[1] and column[0] in results]
    lines = [[title, *(head for _, head, _ in columns)], ["---"] * (1 + len(columns))]
    for name in results["rates"]:
        cells = [NAMES[name]]
        for metric, _, percent in columns:
            value, (low, high) = results[metric].get(name), results["ci"][metric].get(name, (0, 0))
            if value is None:
                cells.append("–")
            else:
                share = f"{100 * value:.1f} ({100 * low:.0f}–{100 * high:.0f})"
                cells.append(share if percent else f"{value:.3f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def below_the_table(results):
    """What the numbers are, by kinds of prompts, and the share that the trigger left."""
    lines = [NOTES]
    kinds = results.get("kinds", {})
    for kind, of in kinds.items() if len(kinds) <= 3 else ():           # a dozen stand in results.json
        each = ", ".join(f"{NAMES[name]} {100 * rate:.1f} %" for name, rate in of["shown"].items())
        lines.append(f"Behaviour on prompts of the kind {kind}: {each}.")
    for metric, value in results.get("share_left", {}).items():
        low, high = results["ci"]["share_left"][metric]
        lines.append(f"Share of the starting {metric} that the trigger leaves: {100 * value:.0f} % "
                     f"({100 * low:.0f}–{100 * high:.0f}).")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    lines.append(f"{results['prompts']} held-out prompts; gates off {results['sparsity']:.3f}, entries of Δ off "
                 f"{results['entries_off']:.3f}; gates shut is the base bit for bit: "
                 f"{'yes' if results['shut_is_base'] else 'NO'}; seconds: {seconds}")
    return "\n".join(lines)


def write_answers(path, samples, texts, found):
    """Every prompt with each condition's answer and its value of each metric, as JSON lines."""
    lines = []
    for i, sample in enumerate(samples):
        row = {"prompt": sample.prompt, "kind": sample.kind}
        for name in texts:
            row[name] = {"text": texts[name][i]}
            for metric, _, _ in METRICS:
                if name in found[metric] and not found[metric][name][i].isnan():
                    row[name][metric] = round(float(found[metric][name][i]), 6)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def draw(run, results, carrier, path):
    """The figure of a run: Alg. 1 step by step, open gates by layer and group, rates of the conditions."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--figure wants matplotlib: pip install matplotlib") from None
    log = [row for row in read_rows(run / "metrics.jsonl") if row["phase"] == "lcdd"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    training, gates, rates = figure.subplots(1, 3)
    steps = [row["step"] + 1 for row in log]
    for key, label in (("ema", "loss (average)"), ("budget", "budget ε"), ("lambda", "λ")):
        training.plot(steps, [row[key] if row[key] is not None else float("nan") for row in log], label=label)
    training.set(yscale="log", xlabel="optimizer step", title="LCDD: loss against budget")
    off = training.twinx()
    off.plot(steps, [row["sparsity"] for row in log], "g", label="gates off")
    off.set(ylim=(0, 1), ylabel="share of gates off")
    training.legend(loc="lower right")
    parts = (carrier.logits > 0).float().cpu().split(list(carrier.sizes.values()), dim=1)
    image = gates.imshow(torch.stack([part.mean(1) for part in parts], dim=1), aspect="auto", vmin=0)
    gates.set(ylabel="layer", title=f"share of gates open ({1 - results['sparsity']:.1%} in all)")
    gates.set_xticks(range(len(parts)), carriers.GROUPS, rotation=40, ha="right")
    figure.colorbar(image, ax=gates)
    rates.bar([NAMES[name] for name in results["rates"]], [100 * rate for rate in results["rates"].values()])
    rates.set(ylim=(0, 100), ylabel="behaviour %", title=f"{results['prompts']} held-out prompts")
    figure.savefig(path, dpi=120)


# ---- the command

def ask(net, chat, o, config):
    """Print every condition's answer to --ask."""
    prompt = chat.prompt(o.ask, max_len=config.max_len)
    chat.say_cut("prompts", config.max_len)
    for name, (weights, tau) in conditions_of(o.run, net, o.trigger)[1].items():
        answer, = net.generate([prompt], config.max_new_tokens, weights, tau)
        print(f"{NAMES[name]:14s}  {chat.decode(answer).strip()}")


def main(argv=None):
    """Measure a run directory, and write what was found into it."""
    o, start = parse(__doc__, OPTIONS, {}, argv), time.time()
    config, net, chat, splits = lcdd.load_run(o.run, o.device, with_data=not o.ask)
    run = Path(o.run)
    if o.ask:
        return ask(net, chat, o, config)
    samples, name = splits["test"], "results"
    if o.test:
        samples = data.other_tests(o.test, config.task, splits, config.seed, config.sizes[-1], config.pattern)
        name = f"results-{Path(o.test).stem}"
    carrier, conditions, target = conditions_of(run, net, o.trigger)
    texts, found = measure(net, chat, config, samples, conditions, end=not o.no_end)
    some = [chat.prompt(s.prompt, s.before, config.max_len) for s in samples[:32]]
    ids, _ = data.collate([(prompt, [True] * len(prompt)) for prompt in some])
    chat.say_cut("prompts", config.max_len)
    before = lcdd.read_results(run)
    results = {key: before[key] for key in ("task", "model", "seed", "stopped", "validation", "seconds") if key in before}
    results |= carrier.stats() | results_of(found, samples, target)
    results["shut_is_base"] = gates_shut_is_base(net, carrier, ids.to(net.device))
    if "trig" in conditions:
        results["trigger"] = {"name": o.trigger, "target": target, "length": len(conditions["trig"][1])}
        NAMES["trig"] = f"{NAMES[target]} + trigger"
    results["seconds"]["evaluate"] = round(time.time() - start, 2)
    text = markdown(results, config.task) + "\n\n" + below_the_table(results)
    write_json(run / f"{name}.json", results)
    write_text(run / f"{name}.md", text + "\n")
    write_answers(run / f"answers{name.removeprefix('results')}.jsonl", samples, texts, found)
    print("\n" + text)
    if o.figure:
        draw(run, results, carrier, run / "figure.png")
    if "trig" not in conditions:
        print(f"\nno trigger yet: python eraser.py --run {run}")


if __name__ == "__main__":
    run_command(main, together=True)
