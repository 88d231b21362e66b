"""
The experiment of docs/experiment.md: what makes a behaviour reversible?

    python -m lab.ablate --task fixed       embedded; some five minutes for each replicate
    python -m lab.ablate --model DIR --data FILE --models lcdd,blind,scaled --lengths 34,2

From one SFT of a replicate come the models lcdd, blind, gates, scaled and sft; blind, gates and
scaled are matched to lcdd's loss on validation samples by their one knob. A trigger of each length
is learned for each, and what is left of the starting distance is measured.

results/experiment-TASK…/REPLICATE.json holds every model of a replicate, {name: facts}: its loss,
whether it is matched, where it stopped, and under "trigger LENGTH" what evaluate.py says of it with
that trigger, prompt by prompt for the primary outcome. A replicate that is there is not made again,
and one that was interrupted goes on with its phase.
"""
from common import EMBEDDED, parse, resumable, run_command, usual_device, write_json
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
    "replicates": (
        "data0,data1,data2,round8,round4",
        "data0 to data2; roundN: data0 in micro-batches of N"),
    "steps": (600, "of Alg. 1"),
    "dtype": (("float32", "bfloat16"), "of the base"),
    "max_new_tokens": (32, "length of the answers"),
    "device": (usual_device(), "cpu or cuda"),
}
CLOSE = 0.25            # relative difference of losses that counts as matched
PLAIN = dict(trigger=200, validation=50, test=200)      # sizes where the rows have no split
NOISE = 0.5             # of blind's first m: with lcdd's 0.02 all would shut within one step
# what a replicate's file holds of evaluate.py's results
MEASURES = ("rates", "kl_own", "kl_base", "loss_own", "share_left", "mediation", "ci")


# ---- what a replicate is made of

def third_of(part, number):
    """Every third pair of a split in which harmful and benign samples may stand in turn."""
    pairs = len(part) // 2
    return [s for i, s in enumerate(part[:2 * pairs]) if i // 2 % 3 == number]


def third(chat, o, replicate):
    """Splits of a replicate: every third row of each split, or of the rows before the split."""
    number = int(replicate[-1]) if replicate.startswith("data") else 0
    source = Path(o.data) if o.data else chat.folder / f"{o.task}.jsonl"
    samples = data.read(source, o.task)
    if any(sample.split for sample in samples):
        whole = data.split(samples, 0)
        return {name: third_of(part, number) for name, part in whole.items()}
    plain = [sample for sample in samples if sample.kind != data.WITH_INPUT]
    return data.split(plain[number::3], number, PLAIN)


def settings(o, net, replicate, samples):
    """Options of lcdd.py for a replicate, fitted."""
    words = ["--task", o.task, "--steps", str(o.steps), "--device", o.device]
    run = lcdd.options(words)
    run.max_len, run.max_new_tokens = 256, o.max_new_tokens
    run.micro_batch = run.batch
    if replicate.startswith("round"):
        run.micro_batch = int(replicate.removeprefix("round"))
    return lcdd.fit(run, net.config.hidden_size, samples)


# ---- the models: each a carrier whose gates and Δ are final

def state_of(carrier):
    """A copy of gates and Δ as they stand."""
    return {name: t.detach().clone() for name, t in carrier.state_dict().items()}


class Stops:
    """
    Handed to prune() as its `change`: keeps (open gates, state) each time another tenth of the open
    gates is shut, and for `blind` takes the task's gradient off the gates.
    """

    def __init__(self, carrier, blind):
        self.carrier, self.blind, self.kept = carrier, blind, []
        self.lowest = carrier.logits.numel()

    def __call__(self, grad):
        if self.blind:
            grad.zero_()
        opened = int((self.carrier.logits > 0).sum())
        if opened < 0.9 * self.lowest:
            self.lowest = opened
            self.kept.append((opened, state_of(self.carrier)))


def pruned(net, sft, examples, held_out, run, work, target, blind):
    """
    `blind` or `gates`: of the stops, settled if Δ may move, the one whose loss on held-out samples
    is nearest to `target`, by bisection, for the loss grows as gates shut: (carrier, loss, open
    gates).
    """
    carrier = copy.deepcopy(sft).init_gates(run.gate_mean, run.gate_std, run.seed)
    stops, optimizer = Stops(carrier, blind), lcdd.adamw(carrier, run.lr)
    lcdd.prune(net, carrier, examples, run, work, optimizer, change=stops)
    low, high, best, nearest = 0, len(stops.kept), None, None
    while low < high:
        middle = (low + high) // 2
        opened, state = stops.kept[middle]
        carrier.load_state_dict(state)
        if blind:
            optimizer = lcdd.adamw(carrier, run.lr)
            phase = f"settle{middle}", run.lr, run.settle, run.seed + 2
            lcdd.train_delta(net, carrier, examples, run, work, *phase, optimizer)
        loss = lcdd.mean_loss(net, carrier, held_out, run)
        low, high = (low, middle) if loss > target else (middle + 1, high)
        if best is None or abs(loss / target - 1) < nearest:
            best, nearest = (state_of(carrier), loss, opened), abs(loss / target - 1)
    state, loss, opened = best
    carrier.load_state_dict(state)
    return carrier, loss, opened


def scaled(net, sft, held_out, run, target):
    """Plain SFT's Δ times the factor at which the loss is `target`: (weights, loss, factor)."""
    low, high = 0.0, 1.0                                        # the loss falls as the factor grows
    for _ in range(12):
        factor = (low + high) / 2
        weights = sft.merge(net, factor)
        loss = lcdd.mean_loss(net, weights, held_out, run)
        if loss > target:
            low = factor
        else:
            high = factor
    return weights, loss, factor


def models_of(net, chat, o, run, splits, work):
    """Yield (name, weights, carrier of the trigger's channels, SFT's weights, facts) of each."""
    examples = [chat.encode(sample, run.max_len) for sample in splits["train"]]
    held_out = [chat.encode(sample, run.max_len) for sample in splits["validation"]]
    wanted = o.models.split(",")

    # one SFT for all, and lcdd, which the others are matched to
    sft = Carrier(net.config, device=net.device)
    optimizer = lcdd.adamw(sft, run.sft_lr)
    phase = "sft", run.sft_lr, run.sft_steps, run.seed
    lcdd.train_delta(net, sft, examples, run, work, *phase, optimizer)
    taught = sft.merge(net)
    sparse = copy.deepcopy(sft).init_gates(run.gate_mean, run.gate_std, run.seed)
    stopped = lcdd.train_lcdd(net, sparse, examples, run, work)
    target = lcdd.mean_loss(net, sparse, held_out, run)
    if "lcdd" in wanted:
        facts = {"loss": target, "within": stopped["within"], **sparse.stats()}
        yield "lcdd", sparse.merge(net), sparse, taught, facts

    for name, train in (("blind", "joint"), ("gates", "mask-ce")):
        if name in wanted:
            own, folder = copy.copy(run), work / name
            own.train, own.brake = train, False     # past the budget, so that a stop can match lcdd
            if name == "blind":
                own.gate_std = NOISE
            folder.mkdir(exist_ok=True)
            how = examples, held_out, own, folder, target, name == "blind"
            carrier, loss, opened = pruned(net, sft, *how)
            facts = {"loss": loss, "stop": opened, **carrier.stats()}
            yield name, carrier.merge(net), carrier, taught, facts
    if "scaled" in wanted:
        weights, loss, factor = scaled(net, sft, held_out, run, target)
        yield "scaled", weights, sparse, taught, {"loss": loss, "factor": factor}
    if "sft" in wanted:
        loss = lcdd.mean_loss(net, sft, held_out, run)
        yield "sft", taught, sparse, taught, {"loss": loss}


# ---- a trigger for each, and what it leaves

def trigger_for(net, chat, weights, carrier, splits, length, run, work, name):
    """τ of `length` tokens by eraser.py's defaults."""
    o = eraser.options(["--run", "none", "--length", str(length)])
    o.name, targets = name, []
    for part in ("trigger", "validation"):
        prompts = [chat.prompt(s.prompt, s.before, run.max_len) for s in splits[part]]
        pairs = eraser.base_answers(net, prompts, o, weights, None)
        targets.append(eraser.base_targets(net, pairs, o))
    tau, _ = eraser.learn(net, weights, *targets, carrier.write_channels(), o, work)
    return tau


def left_behind(net, chat, weights, sft, tau, splits, run):
    """What evaluate.py says of one model with its trigger, and own KL prompt by prompt."""
    conditions = {"base": (None, None), "sft": (sft, None)}
    conditions |= {"lcdd": (weights, None), "trig": (weights, tau)}
    _, values = evaluate.measure(net, chat, run, splits["test"], conditions)
    result = evaluate.results_of(values, splits["test"])
    left = {key: result[key] for key in MEASURES if key in result}
    left["own_kl_by_prompt"] = {}
    for name in ("lcdd", "trig"):
        nats = [round(float(value), 6) for value in values["kl_own"][name]]
        left["own_kl_by_prompt"][name] = nats
    return left


def replicate(net, chat, o, name, work):
    """All models of one replicate, as its JSON file holds them."""
    splits = third(chat, o, name)
    run = settings(o, net, name, len(splits["train"]))
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = {part: len(samples) for part, samples in splits.items()}
    result = {"replicate": name, "task": o.task, "model": Path(o.model).name}
    result |= {"dtype": o.dtype, "models": {}, "sizes": sizes}
    target = None
    for model_name, weights, carrier, taught, facts in models_of(net, chat, o, run, splits, work):
        target = target or facts["loss"]
        close = abs(facts["loss"] / target - 1) <= CLOSE
        facts["matched"] = model_name == "lcdd" or close
        label = f"{name} {model_name}: loss {facts['loss']:.4f}"
        for length in map(int, o.lengths.split(",")):
            start, phase = time.time(), f"{model_name}-{length}"
            tau = trigger_for(net, chat, weights, carrier, splits, length, run, work, phase)
            left = left_behind(net, chat, weights, taught, tau, splits, run)
            left["seconds"] = round(time.time() - start, 1)
            facts[f"trigger {length}"] = left
            told = f"share of own KL left by {length} tokens {left['share_left']['kl_own']:.3f}"
            print(f"{label}, {told}", flush=True)
        result["models"][model_name] = facts
    return result


def main(argv=None):
    """Make every replicate that is not there."""
    o = parse(__doc__, OPTIONS, {}, argv)
    chat = data.Chat(model.locate(o.model))
    net = lcdd.load_base(chat, o.device, o.dtype)
    out = Path(o.out or f"results/experiment-{o.task}")
    out.mkdir(parents=True, exist_ok=True)
    with resumable("the same command"):
        for name in o.replicates.split(","):
            file, work = out / f"{name}.json", Path(o.work) / f"{out.name}-{name}"
            if not file.is_file():
                write_json(file, replicate(net, chat, o, name, work))


if __name__ == "__main__":
    run_command(main)
