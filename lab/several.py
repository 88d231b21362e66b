"""
Two behaviours in one model: two carriers on one base, each with its own gates, Δ and trigger.

    python -m lab.several --runs runs/safety,runs/shakespeare

The runs are of lcdd.py and eraser.py on one base. Their changes are summed, W_b + Σ (r ⊗ c) ⊙ Δ,
and each behaviour is measured on its own run's test prompts: without a trigger, with its own, with
the other's, and with one behind the other. `own` is the behaviour that the prompts are for, `other`
the second one. If the own trigger undoes its own behaviour and nothing else, `other` alone is left:
KL(Other‖·), `kl_sft`, is taken on its answers.

Results: {"a", "b": what evaluate.py says of each behaviour by condition, and "switched", of a batch
in which each row has carriers of its own; "overlap" of the gates}.
"""
from common import InputError, parse, read_json, run_command, usual_device, write_json
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from scipy.stats import hypergeom

import carrier as carriers
import eraser
import evaluate
import lcdd
from carrier import GROUPS, Carrier, Merged, masked_weight

OPTIONS = {
    "runs": ("runs/safety,runs/shakespeare", "run directories of the two behaviours"),
    "prompts": (int, "at most so many test prompts of each (all)"),
    "out": ("results/several-embedded", "folder of the results, SEED.json of each pair"),
    "device": (usual_device(), "cpu or cuda"),
}
MEASURES = "rates", "accuracy", "same", "kl_own", "kl_sft", "loss_own", "ci"
SWITCHES = [[0, 0], [1, 0], [0, 1], [1, 1]]     # factors on the two carriers, row by row
SWITCHED = 16           # prompts of each behaviour that one batch answers under all four

# the options of a run, its chat and test prompts, its carrier and trigger
Behaviour = namedtuple("Behaviour", "config chat samples carrier tau")


def behaviours(o):
    """
    (base model, [Behaviour]) of the run directories. Raises InputError if their bases are not the
    same.
    """
    net, result = None, []
    for run in map(Path, o.runs):
        config, loaded, chat, splits = lcdd.load_run(run, o.device)
        net = net or loaded
        if result and config.base_fingerprint != result[0].config.base_fingerprint:
            raise InputError(f"{run}: is on another base model than {o.runs[0]}; only changes of "
                             "one base can be summed, so name two runs on one")
        carrier = carriers.load(run / "carrier.safetensors", net)
        tau, _ = eraser.load(run / "trigger.safetensors", net)
        result.append(Behaviour(config, chat, splits["test"][:o.prompts], carrier, tau))
    return net, result


# ---- the sum

def merged(net, several):
    """Frozen weights W_b + Σ (r ⊗ c) ⊙ Δ of any number of carriers; of none, the base's."""
    weights = Carrier(net.config, device=net.device).merge(net).weights        # with Δ = 0
    for carrier in several:
        for at, parts in carrier.each().items():
            weights[at] = masked_weight(weights[at], *parts)
    return Merged(weights)


def switched(net, own, other):
    """
    {rows, same}: one batch answers each prompt under all SWITCHES, row by row; the share of its
    answers that are, to the last token, those of the merged weights of the carriers that are on.
    """
    some, length = own.samples[:SWITCHED], own.config.max_new_tokens
    prompts = [own.chat.prompt(s.prompt, s.before, own.config.max_len) for s in some]
    both, rows = [own.carrier, other.carrier], prompts * len(SWITCHES)
    scale = [switch for switch in SWITCHES for _ in prompts]
    mixed = net.generate(rows, length, both, scale=scale, label="switched")
    alone = []
    for switch in SWITCHES:
        on = [carrier for carrier, factor in zip(both, switch) if factor]
        alone += net.generate(prompts, length, merged(net, on))
    same = [a == b for a, b in zip(mixed, alone)]
    return {"rows": len(rows), "same": sum(same) / len(rows)}


# ---- gates in common

@torch.no_grad()
def overlap(a, b):
    """
    How many open gates two carriers have in common, {a, b, both, expected, jaccard, p, groups}.
    Chance: as many open gates in every group of every layer, anywhere in it. Then what is common to
    a group of a layer is hypergeometric, and the whole is a sum of these; p is its exact chance of
    at least as many.
    """
    opened = [one.by_group(one.logits > 0) for one in (a, b)]
    groups, chance = {}, np.ones(1)
    for group in GROUPS:
        in_a, in_b = (by_group[group] for by_group in opened)                       # (L, length)
        n, expected = in_a.shape[1], 0.0
        for x, y in zip(in_a.sum(1).tolist(), in_b.sum(1).tolist()):
            chance = np.convolve(chance, hypergeom.pmf(np.arange(min(x, y) + 1), n, x, y))
            expected += x * y / n
        counts = {"a": in_a, "b": in_b, "both": in_a & in_b}
        groups[group] = {name: int(gates.sum()) for name, gates in counts.items()}
        groups[group]["expected"] = expected
    total = {}
    for name in ("a", "b", "both", "expected"):
        total[name] = sum(counts[name] for counts in groups.values())
    either = total["a"] + total["b"] - total["both"]
    total["jaccard"] = total["both"] / either
    total["p"] = float(chance[total["both"]:].sum())
    return total | {"gates": a.logits.numel(), "groups": groups}


# ---- conditions

def conditions_of(net, own, other):
    """{condition: (weights, τ)} for the behaviour `own`; `sft` is measure()'s second reference."""
    alone, with_both = own.carrier.merge(net), merged(net, [own.carrier, other.carrier])
    result = {"base": (None, None), "sft": (other.carrier.merge(net), None)}
    for name, weights in (("own", alone), ("both", with_both)):
        result[name] = weights, None
        result[f"{name}, own trigger"] = weights, own.tau
        result[f"{name}, other trigger"] = weights, other.tau
    result["both, own and other trigger"] = with_both, torch.cat((own.tau, other.tau))
    result["both, other and own trigger"] = with_both, torch.cat((other.tau, own.tau))
    return result


def measured(net, own, other):
    """What evaluate.py says of the behaviour `own` in every condition."""
    conditions = conditions_of(net, own, other)
    _, values = evaluate.measure(net, own.chat, own.config, own.samples, conditions)
    result = evaluate.results_of(values, own.samples)
    facts = {key: result[key] for key in MEASURES if key in result}
    if "benign" in result["kinds"]:
        facts["benign"] = result["kinds"]["benign"]["shown"]
    return {"task": Path(own.config.task).stem, "prompts": len(own.samples)} | facts


def main(argv=None):
    """Measure two runs together; what stands in the results' file already is not made again."""
    o = parse(__doc__, OPTIONS, {}, argv)
    o.runs = o.runs.split(",")
    if len(o.runs) != 2:
        raise InputError(f"--runs {','.join(o.runs)}: name two run directories, A,B")
    net, (a, b) = behaviours(o)
    file = Path(o.out) / f"{a.config.seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    made_for = [eraser.made_for(run, net)["carrier"] for run in o.runs]
    begun = {"carriers": made_for, "prompts": o.prompts, "overlap": overlap(a.carrier, b.carrier)}
    result = read_json(file) if file.is_file() else begun
    if not begun.items() <= result.items():
        result = begun
    for name, own, other in (("a", a, b), ("b", b, a)):
        if name not in result:
            result[name] = measured(net, own, other) | {"switched": switched(net, own, other)}
            write_json(file, result)
        for condition, rate in result[name]["rates"].items():
            print(f"{rate:7.1%}  {result[name]['task']}: {condition}")


if __name__ == "__main__":
    run_command(main)
