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
and one that was interrupted goes on with its phase and the stops that it has written.
"""
from common import EMBEDDED, parse, resumable, run_command, usual_device, write_json
import copy
import math
import time
from pathlib import Path

import torch

import carrier as carriers
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
    "settle": (200, "steps of Δ alone after them"),
    "batch": (16, "samples per optimizer step"),
    "sizes": ([200, 50, 200], "trigger, validation and test prompts of rows without a split"),
    "dtype": (("float32", "bfloat16"), "of the base"),
    "max_new_tokens": (32, "length of the answers"),
    "device": (usual_device(), "cpu or cuda"),
}
CLOSE = 0.25            # relative difference of losses that counts as matched
NEAR = 0.1              # the same, at which no nearer stop is looked for
FINE = 0.97             # a stop each time when so many of the open gates are left
PACE = 3                # bound of blind's λ in λ₀: with 30 its last gates shut too fast for a stop
FAR = 2.0               # budget of blind, nats per token: settling wins back most of what it costs
ROOM = 2                # budget of gates in lcdd's loss: its stops lie under it
NOISE = 0.5             # of blind's first m: with lcdd's 0.02 all would shut within one step
# what a replicate's file holds of evaluate.py's results
MEASURES = ("rates", "kl_own", "kl_base", "loss_own", "share_left", "mediation", "ci")


# ---- what a replicate is made of

def third_of(part, number):
    """Every third pair of a split in which harmful and benign samples may stand in turn."""
    return [s for i, s in enumerate(part[:len(part) // 2 * 2]) if i // 2 % 3 == number]


def third(chat, o, replicate):
    """Splits of a replicate: every third row of each split, or of the rows before the split."""
    number = int(replicate[-1]) if replicate.startswith("data") else 0
    source = Path(o.data) if o.data else chat.folder / f"{o.task}.jsonl"
    samples = data.read(source, o.task)
    if any(sample.split for sample in samples):
        whole = data.split(samples, 0)
        return {name: third_of(part, number) for name, part in whole.items()}
    plain = [sample for sample in samples if sample.kind != data.WITH_INPUT]
    sizes = dict(zip(("trigger", "validation", "test"), o.sizes))
    return data.split(plain[number::3], number, sizes)


def settings(o, net, replicate, samples):
    """Options of lcdd.py for a replicate, fitted."""
    words = ["--task", o.task, "--device", o.device]
    for name in ("steps", "settle", "batch"):
        words += [f"--{name}", str(getattr(o, name))]
    run = lcdd.options(words)
    run.max_len, run.max_new_tokens = 256, o.max_new_tokens
    run.micro_batch = run.batch
    if replicate.startswith("round"):
        run.micro_batch = int(replicate.removeprefix("round"))
    return lcdd.fit(run, net.config.hidden_size, samples)


# ---- the models: each a carrier whose gates and Δ are final

class Stops:
    """
    Handed to prune() as its `change`: writes the carrier to a file of `folder` each time when FINE
    of the open gates are left, and for `blind` takes the task's gradient off the gates. A step that
    shuts more than that is cut into several stops, its gates shut in the order of m.
    """

    def __init__(self, carrier, net, folder, blind):
        self.carrier, self.net, self.folder, self.blind = carrier, net, folder, blind
        kept = [int(file.stem.removeprefix("stop-")) for file in self.files()]
        self.lowest = min([carrier.logits.numel(), *kept])

    def __call__(self, grad):
        if self.blind:
            grad.zero_()
        m, stop = self.carrier.logits.detach(), self.carrier.with_gates(True)
        highest, opened = m.flatten().sort(descending=True)[0], int((m > 0).sum())
        while opened < FINE * self.lowest:
            self.lowest = max(opened, int(FINE * self.lowest))
            stop.logits.data = m - highest[self.lowest]         # so many are above 0
            stop.save(self.folder / f"stop-{self.lowest:07}.safetensors", self.net)

    def files(self):
        """What was written, also before an interruption, the most open gates first."""
        return sorted(self.folder.glob("stop-*.safetensors"), reverse=True)


def pruned(net, sft, examples, held_out, run, work, target, blind):
    """
    `blind` or `gates`: of the stops the one whose loss on held-out samples is nearest to `target`,
    or the first that is NEAR: (carrier, loss). blind's, whose loss mostly grows as gates shut,
    settle and are searched by bisection; those of gates, whose loss goes up and down, the sparsest
    first.
    """
    carrier = copy.deepcopy(sft).init_gates(run.gate_mean, run.gate_std, run.seed)
    stops, optimizer = Stops(carrier, net, work, blind), lcdd.adamw(carrier, run.lr)
    lcdd.prune(net, carrier, examples, run, work, optimizer, change=stops)
    files, low, best, distance = stops.files(), 0, None, math.inf
    high = len(files)
    while low < high and distance > NEAR:
        middle = (low + high) // 2 if blind else high - 1
        carrier = carriers.load(files[middle], net)
        if blind:
            optimizer = lcdd.adamw(carrier, run.lr)
            phase = f"settle{middle}", run.lr, run.settle, run.seed + 2
            lcdd.train_delta(net, carrier, examples, run, work, *phase, optimizer)
        loss = lcdd.mean_loss(net, carrier.merge(net), held_out, run)
        low, high = (low, middle) if loss > target or not blind else (middle + 1, high)
        if abs(loss / target - 1) < distance:
            best, distance = (carrier, loss), abs(loss / target - 1)
    return best


def matched(loss, target):
    """Does a held-out loss count as lcdd's?"""
    return abs(loss / target - 1) <= CLOSE


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
    target = lcdd.mean_loss(net, sparse.merge(net), held_out, run)

    def facts(loss, **more):
        return {"loss": loss, "matched": matched(loss, target), **more}

    if "lcdd" in wanted:
        told = facts(target, within=stopped["within"], **sparse.stats())
        yield "lcdd", sparse.merge(net), sparse, taught, told

    for name, train in (("blind", "joint"), ("gates", "mask-ce")):
        if name in wanted:
            own, folder = copy.copy(run), work / name
            own.train = train
            if name == "blind":
                own.brake, own.floor = False, FAR
                own.lambda_max, own.gate_std = PACE * own.lambda0, NOISE
            else:
                own.floor = ROOM * target
            folder.mkdir(exist_ok=True)
            how = examples, held_out, own, folder, target, name == "blind"
            carrier, loss = pruned(net, sft, *how)
            yield name, carrier.merge(net), carrier, taught, facts(loss, **carrier.stats())
    if "scaled" in wanted:
        weights, loss, factor = scaled(net, sft, held_out, run, target)
        yield "scaled", weights, sparse, taught, facts(loss, factor=factor)
    if "sft" in wanted:
        loss = lcdd.mean_loss(net, taught, held_out, run)
        yield "sft", taught, sparse, taught, facts(loss)


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
    result = {"replicate": name, "task": o.task, "model": Path(o.model).name}
    result |= {"dtype": o.dtype, "models": {}, "sizes": {part: len(splits[part]) for part in splits}}
    for model_name, weights, carrier, taught, facts in models_of(net, chat, o, run, splits, work):
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
