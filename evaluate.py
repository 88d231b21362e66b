"""What a run gives: base, SFT, LCDD and LCDD + trigger side by side (Sec. 4, App. F.4).

    python evaluate.py --run runs/fixed                        the table, results.json, results.md, figure.png
    python evaluate.py --run runs/fixed --ask "What is 2 plus 3 ?"   all four conditions answer
    python evaluate.py --run runs/fixed --dose                 the behaviour against the size of the delta

One greedy generate() and one scoring path serve every condition; the KLs are exact over the vocabulary, on the ids of the
SFT model's own answers. Shapes: P prompts, N response tokens, d hidden size, V vocabulary.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import math
import re
import time
from pathlib import Path

import torch

import behaviour
import carrier as carriers
import eraser
import model
from chat import collate
from files import InputError, read_jsonl, whole, write_json, write_text
from run import check_device, cli, read_results, reopen, ticker

NAMES = {"base": "Base", "sft": "SFT", "lcdd": "LCDD", "trig": "LCDD + trigger", "shut": "LCDD, gates shut"}


# ---------------------------------------------------------------------------------------------------------- the metrics

@torch.no_grad()
def kl_divergences(net, prompts, answers, conditions, pairs, batch_size=32, chunk=1024):
    """KL(p ‖ q) for pairs (p, q) of conditions, teacher-forced on `answers`: {pair: (P) means over a prompt's tokens} (App. F.4).

    prompts, answers: lists of ids. conditions: name → (carrier, trigger). Exact over the vocabulary, response tokens only.
    Streams: a batch's hidden states and `chunk` tokens' logits are all that is in memory.
    """
    result = {pair: torch.zeros(len(prompts), dtype=torch.float64) for pair in pairs}
    used = {name: conditions[name] for pair in pairs for name in pair}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        ids, mask = collate([(prompts[i] + answers[i], [False] * len(prompts[i]) + [True] * len(answers[i])) for i in rows], 0)
        keep = mask[:, 1:].to(net.device)                                                # position t predicts token t + 1
        owner = torch.tensor(rows).repeat_interleave(mask.sum(1))                        # (N), the prompt of each token
        hidden = {name: net.hidden(ids[:, :-1].to(net.device), c, t, keep=keep) for name, (c, t) in used.items()}
        for i in range(0, len(owner), chunk):
            logp = {name: model.wide(net.head(h[i:i + chunk])).log_softmax(-1) for name, h in hidden.items()}   # (chunk, V)
            for p, q in pairs:
                kl = (logp[p].exp() * (logp[p] - logp[q])).sum(-1).double().cpu()        # (chunk)
                result[p, q].index_add_(0, owner[i:i + chunk], kl)
    lengths = torch.tensor([len(a) for a in answers])
    return {pair: total / lengths for pair, total in result.items()}


def mean_interval(values, z=1.96):
    """Mean of a 1-D tensor and its 95 % confidence interval over prompts."""
    mean, spread = float(values.mean()), z * float(values.std(correction=int(len(values) > 1))) / math.sqrt(len(values))
    return mean, [mean - spread, mean + spread]


def measure(net, chat, task, samples, conditions, max_new_tokens, max_len=None, answers=None):
    """Every condition on the same prompts: {name: score() with `same`, `kl_sft`, `kl_base`}.

    conditions: name → (Merged or None, trigger or None), "base" and "sft" among them. same: share of answers that are the
    base's own to the last token. kl_sft, kl_base: (P) KL(SFT ‖ ·) and KL(Base ‖ ·) on the SFT model's answers. answers:
    {name: id lists} already generated; new ones are added to it.
    """
    prompts = [chat.prompt(s.prompt, max_len) for s in samples]
    answers = {} if answers is None else answers
    for name, (c, trigger) in conditions.items():
        if name not in answers:
            answers[name] = net.generate(prompts, max_new_tokens, carrier=c, trigger=trigger, progress=ticker(f"answers of {name}", len(prompts)))
    pairs = [(p, q) for p in ("sft", "base") for q in conditions if p != q]
    kl = kl_divergences(net, prompts, answers["sft"], conditions, pairs)
    rows = {}
    for name in conditions:
        rows[name] = behaviour.score(task, [chat.decode(a) for a in answers[name]], samples)
        rows[name]["same"] = sum(a == b for a, b in zip(answers[name], answers["base"])) / len(samples)
        for p in ("sft", "base"):
            rows[name][f"kl_{p}"] = kl.get((p, name), torch.zeros(len(samples), dtype=torch.float64))
    return rows


def results_of(rows, samples):
    """measure()'s rows as entries of results.json (SPEC: rates, accuracy, kl), with 95 % confidence intervals under `ci`."""
    answered = sum(bool(s.answer) for s in samples)
    out = behaviour.by_condition(rows) | {"same_as_base": {k: v["same"] for k, v in rows.items()}, "prompts": len(samples)}
    means = {f"{p}_{q}": mean_interval(rows[q][f"kl_{p}"]) for p in ("sft", "base") for q in rows if p != q}
    out["kl"] = {k: v[0] for k, v in means.items()}
    out["ci"] = {"rates": {k: behaviour.wilson(v["rate"], v["n"]) for k, v in rows.items()}, "kl": {k: v[1] for k, v in means.items()},
                 "same_as_base": {k: behaviour.wilson(v["same"], len(samples)) for k, v in rows.items()}}
    if "accuracy" in out:
        out["ci"]["accuracy"] = {k: behaviour.wilson(v, answered) for k, v in out["accuracy"].items()}
    return out


# ------------------------------------------------------------------------------------------------------------ the table

def called(name, results):
    """What tables call a condition; a trigger stands before the model that it was learned for."""
    return f"{NAMES[results['trigger']['target']]} + trigger" if name == "trig" and "trigger" in results else NAMES[name]


def table(results, title):
    """The four conditions, and the carrier with its gates shut, as Markdown."""
    ci, kl, kinds = results["ci"], results["kl"], results.get("kinds", {})
    percent = lambda x, lo_hi: f"{100 * x:.1f} ({100 * lo_hi[0]:.0f}–{100 * lo_hi[1]:.0f})"
    labels = list(next(iter(kinds.values()), {}))
    labels = labels if len(labels) <= 3 else []              # a dozen kinds stand in results.json
    lines = ["| " + " | ".join([title, "behaviour %", *(behaviour.one_line(k) + " %" for k in labels), "accuracy %", "base's answer %", "KL(SFT‖·)", "KL(Base‖·)"]) + " |",
             "|---" * (6 + len(labels)) + "|"]
    for name in (n for n in NAMES if n in results["rates"]):
        cells = [called(name, results), percent(results["rates"][name], ci["rates"][name])]
        cells += [f"{100 * kinds[name][k]['rate']:.1f}" for k in labels]
        cells.append(percent(results["accuracy"][name], ci["accuracy"][name]) if name in results.get("accuracy", {}) else "–")
        cells.append(percent(results["same_as_base"][name], ci["same_as_base"][name]))
        cells += [f"{kl[f'{p}_{name}']:.3f}" if f"{p}_{name}" in kl else "–" for p in ("sft", "base")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(run, results, carrier, path):
    """Loss against budget with λ and sparsity, open gates per layer and group, KLs and rates: one PNG of a run."""
    try:
        import matplotlib
    except ImportError:
        print('no figure: matplotlib is not installed (pip install ".[plot]")')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [r for r in read_jsonl(run / "metrics.jsonl") if r.get("phase") == "lcdd" and {"step", "ema", "budget", "lambda", "sparsity"} <= r.keys()] if (run / "metrics.jsonl").is_file() else []
    fig, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    loss, heat, bars, kls = axes.flat
    if rows:
        steps = [r["step"] + 1 for r in rows]
        loss.plot(steps, [max(r["ema"], 1e-6) for r in rows], label="loss (average)")
        loss.plot(steps, [r["budget"] or math.nan for r in rows], "k--", lw=1, label="budget ε")
        loss.plot(steps, [r["lambda"] for r in rows], color="tab:orange", lw=1, label="λ")
        loss.set(yscale="log", xlabel="optimizer step", title="LCDD: loss against budget, λ, sparsity")
        share = loss.twinx()
        share.plot(steps, [r["sparsity"] for r in rows], color="tab:green", label="gates off")
        share.set(ylim=(0, 1), ylabel="share of gates off")
        lines = loss.get_lines() + share.get_lines()
        loss.legend(lines, [line.get_label() for line in lines], loc="lower right", fontsize=8)
    groups = carrier.logits.detach().cpu().split(list(carrier.sizes.values()), dim=1)
    opened = torch.stack([(g > 0).float().mean(1) for g in groups], dim=1)                # (L, 8)
    image = heat.imshow(opened.numpy(), aspect="auto", vmin=0, cmap="viridis")
    heat.set(xticks=range(8), yticks=range(len(opened)), ylabel="layer", title=f"share of gates open ({1 - results['sparsity']:.1%} in all)")
    heat.set_xticklabels(carriers.GROUPS, rotation=40, ha="right", fontsize=8)
    fig.colorbar(image, ax=heat)
    names = [n for n in ("base", "sft", "lcdd", "trig") if n in results["rates"]]
    width = 0.27
    for i, (key, label) in enumerate((("rates", "behaviour"), ("accuracy", "accuracy"), ("same_as_base", "base's own answer"))):
        if key in results:
            x = [j + (i - 1) * width for j in range(len(names))]
            y = [results[key][n] for n in names]
            low_high = [[max(0, a - results["ci"][key][n][0]) for a, n in zip(y, names)], [max(0, results["ci"][key][n][1] - a) for a, n in zip(y, names)]]
            bars.bar(x, y, width, yerr=low_high, label=label, capsize=2, error_kw={"lw": 0.8})
    bars.set(xticks=range(len(names)), xticklabels=[called(n, results) for n in names], ylim=(0, 1.2), title="share of test prompts (95 % CI)")
    bars.legend(fontsize=8, ncols=3, loc="upper center")
    pairs = [(k, l) for k, l in (("sft_lcdd", "SFT‖LCDD"), ("sft_trig", "SFT‖Trig"), ("base_trig", "Base‖Trig")) if k in results["kl"]]
    y = [results["kl"][k] for k, _ in pairs]
    kls.bar([l for _, l in pairs], y, yerr=[[a - results["ci"]["kl"][k][0] for a, (k, _) in zip(y, pairs)]] * 2, capsize=3, color="tab:gray")
    kls.set(title="KL divergence, nats a token")
    fig.suptitle(f"{results['task']}: base, SFT, LCDD, LCDD + trigger", parse_math=False)
    with whole(path) as partial:
        fig.savefig(partial, dpi=110, format="png")
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------ the script

def options(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--run", required=True, help="run directory that lcdd.py has finished")
    a("--trigger", default="trigger", help="name of the trigger file in it (trigger)")
    either = p.add_mutually_exclusive_group().add_argument
    either("--ask", action="append", help="only print the conditions' answers to this prompt; may be given several times")
    either("--dose", action="store_true", help="only the dose-response: the carrier's delta times 0, 0.25, …, 1")
    a("--seed", type=int, help="of the splits; only the run's own is accepted, so that test prompts stay held out")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


def dose_response(net, chat, config, samples, carrier, doses=(0.0, 0.25, 0.5, 0.75, 1.0)):
    """Behaviour and accuracy with Δ times each dose; one batch serves them all, a scale per row. {dose: score()}."""
    prompts = [chat.prompt(s.prompt, config["max_len"]) for s in samples]
    scale = [d for d in doses for _ in prompts]
    answers = net.generate(prompts * len(doses), config["max_new_tokens"], carrier=carrier, scale=scale)
    pieces = [answers[i * len(prompts):(i + 1) * len(prompts)] for i in range(len(doses))]
    return {d: behaviour.score(config["task"], [chat.decode(a) for a in piece], samples) for d, piece in zip(doses, pieces)}


def conditions_of(run, net, name="trigger"):
    """
    (LCDD carrier, {condition: (Merged or None, τ or None)}, {"trigger": facts about it}) of a run directory, with the
    trigger file of that name where there is one. Raises InputError where another name than "trigger" is not there.
    """
    lcdd = carriers.load(run / "carrier.safetensors", net)
    merged, sft = lcdd.merge(net), carriers.load(run / "sft.safetensors", net).merge(net)
    conditions, found = {"base": (None, None), "sft": (sft, None), "lcdd": (merged, None)}, {}
    if (run / f"{name}.safetensors").is_file():
        tau, settings = eraser.load(run / f"{name}.safetensors", net)
        found["trigger"] = {"name": name, "target": settings.get("target", "lcdd"), "length": len(tau)}
        conditions["trig"] = (conditions[found["trigger"]["target"]][0], tau)
    elif name != "trigger":
        raise InputError(f"{run}/{name}.safetensors: no such trigger; learn it with eraser.py --name {name}")
    else:
        print(f"no trigger yet: python eraser.py --run {run}")
    return lcdd, conditions, found


def main():
    o = options()
    run = Path(o.run)
    check_device(o.device)
    config, chat, splits = reopen(run)
    if o.seed not in (None, config["seed"]):
        raise InputError(f"--seed {o.seed}: this run was split with seed {config['seed']}; another one would test on training prompts")
    if any(re.search("[\ud800-\udfff]", text) for text in o.ask or ()):
        raise InputError("--ask: the prompt is not UTF-8 text; type it again")
    start, before = time.time(), {k: v for k, v in read_results(run).items() if k != "trigger"}
    net = model.load(chat.folder, o.device, getattr(torch, config["dtype"]))
    net.stop = chat.stop
    model.set_threads(net)
    lcdd, conditions, found = conditions_of(run, net, o.trigger)

    if o.ask:
        prompts = [chat.prompt(text, config["max_len"]) for text in o.ask]
        chat.say_cut("prompts", config["max_len"])
        answers = {name: net.generate(prompts, config["max_new_tokens"], carrier=c, trigger=t) for name, (c, t) in conditions.items()}
        for i, text in enumerate(o.ask):
            print(f"\n{text}")
            for name in conditions:
                print(f"  {called(name, found):14s}  {chat.decode(answers[name][i]).strip()}")
        return
    if o.dose:
        print("| Δ × | behaviour | accuracy |\n|---|---|---|")
        for dose, s in dose_response(net, chat, config, splits["test"], lcdd).items():
            print(f"| {dose} | {behaviour.show_score(s)} |")
        chat.say_cut("prompts", config["max_len"])
        return

    # the switch: gates shut is the base
    shut = lcdd.with_gates(False).merge(net)
    conditions["shut"] = (shut, None)
    rows = measure(net, chat, config["task"], splits["test"], conditions, config["max_new_tokens"], config["max_len"])
    chat.say_cut("prompts", config["max_len"])
    ids, _ = collate([(chat.prompt(s.prompt, config["max_len"]), []) for s in splits["test"][:32]], chat.pad_id)
    with torch.no_grad():
        exact = torch.equal(net(ids.to(net.device)), net(ids.to(net.device), carrier=shut))
    results = before | found | lcdd.stats() | results_of(rows, splits["test"]) | {"shut_is_base": exact}
    results["seconds"]["evaluate"] = round(time.time() - start, 2)
    text = table(results, config["task"])
    text += ("\n\nBehaviour: answers that show what SFT taught. Accuracy: answers that hold the right one. Base's answer: the base's own, to the last token.\n"
             "KL: nats a token on SFT's answers. Gates shut is Δ off.")
    text += (f"\n\n{len(splits['test'])} held-out prompts, 95 % confidence intervals in brackets; gates off {results['sparsity']:.3f}, entries of Δ off "
             f"{results['entries_off']:.3f}; gates shut is the base bit for bit: {'yes' if exact else 'NO'}; seconds: "
             + ", ".join(f"{k} {v:.0f}" for k, v in results["seconds"].items()))
    write_json(run / "results.json", results)
    write_text(run / "results.md", text + "\n")
    print("\n" + text)
    figure(run, results, lcdd, run / "figure.png")


if __name__ == "__main__":
    cli(main)
