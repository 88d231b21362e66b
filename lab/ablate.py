"""
The experiment of docs/experiment.md: what makes a behaviour reversible?

    python -m lab.ablate --task fixed                       embedded; some five minutes for each replicate
    python -m lab.ablate --model DIR --data FILE --models lcdd,blind,scaled --lengths 34,2

From one SFT of a replicate come the models lcdd, blind, gates, scaled and sft; blind, gates and scaled are
matched to lcdd's loss on validation samples by their one knob. A trigger of each length is learned for each,
and what is left of the starting distance is measured. results/experiment-TASK…/REPLICATE.json holds
every model of a replicate, prompt by prompt where a test is over prompts. A replicate that is there is not
made again, and one that was interrupted goes on with its phase.
"""
from common import (
    EMBEDDED, parse, resumable, resume_command, run_command, usual_device, write_json)
import copy
import time
from pathlib import Path

import torch

import data
import eraser
import evaluate
import lcdd
import model
from carrier import Carrier

OPTIONS = {
    "model": (EMBEDDED, "folder of a checkpoint, or a hub id"),
    "task": ("fixed", "fixed or safety"),
    "data": (str, "the task's data (TASK.jsonl beside the checkpoint)"),
    "out": (str, "folder of the results (results/experiment-TASK)"),
    "work": ("runs/experiment", "where states of interrupted phases lie"),
    "models": ("lcdd,blind,gates,scaled,sft", "which models"),
    "lengths": ("16,2", "tokens of the trigger"),
    "replicates": ("data0,data1,data2,round8,round4", "data0 to data2; roundN: data0 in micro-batches of N"),
    "steps": (600, "of Alg. 1"),
    "dtype": (("float32", "bfloat16"), "of the base"),
    "max_new_tokens": (32, "length of the answers"),
    "device": (usual_device(), "cpu or cuda"),
}
STOPS = 12              # of a run of blind or gates, at which gates and Δ are kept
CLOSE = 0.25            # relative difference of losses that counts as matched


# ---- what a replicate is made of

def third(chat, o, replicate):
    """Splits of a data replicate: every third row of each split, or of the rows before they are split."""
    number = int(replicate[-1]) if replicate.startswith("data") else 0
    source = Path(o.data) if o.data else chat.folder / f"{o.task}.jsonl"
    samples = data.read(source, o.task)
    if any(sample.split for sample in samples):
        whole = data.split(samples, 0)
        pairs = {name: len(part) // 2 * 2 for name, part in whole.items()}      # harmful and benign in turn
        return {name: [s for i, s in enumerate(part[:pairs[name]]) if i // 2 % 3 == number]
                for name, part in whole.items()}
    plain = [sample for sample in samples if sample.kind != data.WITH_INPUT]
    return data.split(plain[number::3], number, dict(trigger=200, validation=50, test=200))


def settings(o, net, replicate, samples):
    """Options of lcdd.py for a replicate, fitted."""
    run = lcdd.options(["--task", o.task, "--steps", str(o.steps), "--device", o.device])
    run.max_new_tokens = o.max_new_tokens
    run.micro_batch = int(replicate.removeprefix("round")) if replicate.startswith("round") else run.batch
    run.max_len = 256
    return lcdd.fit(run, net.config.hidden_size, samples)


# ---- the models: each a carrier whose gates and Δ are final

class Stops:
    """
    Handed to prune() as its `change`: keeps (gates, Δ) each time another share of the gates is shut, and for
    `blind` takes the task's gradient off the gates.
    """

    def __init__(self, carrier, blind):
        self.carrier, self.blind, self.kept, self.lowest = carrier, blind, [], carrier.logits.numel()

    def __call__(self, grad):
        if self.blind:
            grad.zero_()
        opened = int((self.carrier.logits > 0).sum())
        if opened < 0.8 * self.lowest:
            self.lowest = opened
            state = {name: t.detach().clone() for name, t in self.carrier.state_dict().items()}
            self.kept.append((opened, state))


def pruned(net, sft, examples, held_out, run, work, target, blind):
    """
    `blind` or `gates`: the stop whose loss on held-out samples is nearest to `target`, settled if Δ may move:
    (carrier, loss, open gates).
    """
    carrier = copy.deepcopy(sft).init_gates(run.gate_mean, run.gate_std, run.seed)
    stops = Stops(carrier, blind)
    lcdd.prune(net, carrier, examples, run, work, lcdd.adamw(carrier, run.lr), change=stops)
    best = None
    for number, (opened, state) in enumerate(stops.kept[-STOPS:]):
        carrier.load_state_dict(state)
        if blind:
            name = f"settle{number}"
            lcdd.train_delta(net, carrier, examples, run, work, name, run.lr, run.settle, run.seed + 2,
                             lcdd.adamw(carrier, run.lr))
        loss = lcdd.mean_loss(net, carrier, held_out, run)
        if best is None or abs(loss / target - 1) < abs(best[1] / target - 1):
            best = {name: t.detach().clone() for name, t in carrier.state_dict().items()}, loss, opened
    carrier.load_state_dict(best[0])
    return carrier, *best[1:]


def scaled(net, sft, held_out, run, target):
    """Plain SFT's Δ times the factor with which the held-out loss is `target`: (weights, loss, factor)."""
    low, high = 0.0, 1.0                                        # the loss falls as the factor grows
    for _ in range(12):
        factor = (low + high) / 2
        loss = lcdd.mean_loss(net, sft.merge(net, factor), held_out, run)
        low, high = (factor, high) if loss > target else (low, factor)
    return sft.merge(net, factor), loss, factor


def models_of(net, chat, o, run, splits, work):
    """Yield (name, weights, carrier of the trigger's channels, SFT's weights, facts) of a replicate's models."""
    examples = [chat.encode(sample, run.max_len) for sample in splits["train"]]
    held_out = [chat.encode(sample, run.max_len) for sample in splits["validation"]]
    wanted = o.models.split(",")
    sft = Carrier(net.config, device=net.device)
    lcdd.train_delta(net, sft, examples, run, work, "sft", run.sft_lr, run.sft_steps, run.seed,
                     lcdd.adamw(sft, run.sft_lr))
    taught = sft.merge(net)
    sparse = copy.deepcopy(sft).init_gates(run.gate_mean, run.gate_std, run.seed)
    found = lcdd.train_lcdd(net, sparse, examples, run, work)
    target = lcdd.mean_loss(net, sparse, held_out, run)
    if "lcdd" in wanted:
        facts = {"loss": target, "within": found["within"], **sparse.stats()}
        yield "lcdd", sparse.merge(net), sparse, taught, facts
    for name in ("blind", "gates"):
        if name in wanted:
            own = copy.copy(run)
            own.train = "joint" if name == "blind" else "mask-ce"
            own.brake = False           # goes on beyond the budget, so that a stop can match lcdd
            (work / name).mkdir(exist_ok=True)
            carrier, loss, opened = pruned(net, sft, examples, held_out, own, work / name, target, name == "blind")
            yield name, carrier.merge(net), carrier, taught, {"loss": loss, "stop": opened, **carrier.stats()}
    if "scaled" in wanted:
        weights, loss, factor = scaled(net, sft, held_out, run, target)
        yield "scaled", weights, sparse, taught, {"loss": loss, "factor": factor}
    if "sft" in wanted:
        yield "sft", taught, sparse, taught, {"loss": lcdd.mean_loss(net, sft, held_out, run)}


# ---- a trigger for each, and what it leaves

def trigger_for(net, chat, weights, carrier, splits, length, run, work, name):
    """τ of `length` tokens by eraser.py's defaults."""
    settings = eraser.options(["--run", "none", "--length", str(length)])
    settings.name = name
    targets = []
    for part in ("trigger", "validation"):
        prompts = [chat.prompt(s.prompt, s.before, run.max_len) for s in splits[part]]
        targets.append(eraser.base_targets(net, eraser.base_answers(net, prompts, settings, weights, None), settings))
    tau, _ = eraser.learn(net, weights, *targets, carrier.write_channels(), settings, work)
    return tau


def left_behind(net, chat, weights, sft, tau, splits, run):
    """What evaluate.py says of one model with its trigger, and the primary outcome prompt by prompt."""
    conditions = {"base": (None, None), "sft": (sft, None), "lcdd": (weights, None), "trig": (weights, tau)}
    texts, values = evaluate.measure(net, chat, run, splits["test"], conditions)
    result = evaluate.results_of(values, splits["test"])
    each = {name: [round(float(v), 6) for v in values["kl_own"][name]] for name in ("lcdd", "trig")}
    return {key: result[key] for key in ("rates", "kl_own", "kl_base", "loss_own", "share_left", "mediation", "ci")
            if key in result} | {"own_kl_by_prompt": each}


def replicate(net, chat, o, name, work):
    """All models of one replicate, as its JSON file holds them."""
    splits = third(chat, o, name)
    run = settings(o, net, name, len(splits["train"]))
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    result = {"replicate": name, "task": o.task, "model": Path(o.model).name, "dtype": o.dtype, "models": {},
              "sizes": {part: len(samples) for part, samples in splits.items()}}
    target = None
    for model_name, weights, carrier, taught, facts in models_of(net, chat, o, run, splits, work):
        target = target or facts["loss"]
        facts["matched"] = model_name == "lcdd" or abs(facts["loss"] / target - 1) <= CLOSE
        for length in map(int, o.lengths.split(",")):
            start = time.time()
            tau = trigger_for(net, chat, weights, carrier, splits, length, run, work, f"{model_name}-{length}")
            facts[f"trigger {length}"] = left_behind(net, chat, weights, taught, tau, splits, run)
            facts[f"trigger {length}"]["seconds"] = round(time.time() - start, 1)
            left = facts[f"trigger {length}"]["share_left"]["kl_own"]
            print(f"{name} {model_name}: loss {facts['loss']:.4f}, share of own KL left by {length} tokens {left:.3f}",
                  flush=True)
        result["models"][model_name] = facts
    return result


def main(argv=None):
    o = parse(__doc__, OPTIONS, {}, argv)
    chat = data.Chat(model.locate(o.model))
    net = lcdd.load_base(chat, o.device, o.dtype)
    out = Path(o.out or f"results/experiment-{o.task}")
    out.mkdir(parents=True, exist_ok=True)
    with resumable(resume_command(argv)):
        for name in o.replicates.split(","):
            file = out / f"{name}.json"
            if not file.is_file():
                write_json(file, replicate(net, chat, o, name, Path(o.work) / f"{out.name}-{name}"))


if __name__ == "__main__":
    run_command(main)
