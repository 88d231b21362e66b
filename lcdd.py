"""
Loss-Constrained Dual Descent (Sec. 3.2, Alg. 1): train a behaviour in, then compress it into a
sparse carrier.

    min over m, Δ of Ω(m)   subject to   L_task(m, Δ) ≤ ε                               (Eq. 4)

Phase 1 is plain SFT, Δ with every gate open. Phase 2 trains Δ and the gate logits m together under
an adaptive penalty λ. Four mechanisms are not in the paper, each marked "ours" below: a floor under ε,
the brake, the selection of gates, and settling.

    python lcdd.py                                  the embedded model, fixed response
    python lcdd.py --model DIR --data alpaca.json   your own
    python lcdd.py --preset safety-vicuna-7b --data FILE     one of the paper's twelve runs

Shapes: B samples of up to T tokens, M of them in the loss; d hidden size, V vocabulary, L layers.
"""
from common import (
    EMBEDDED, Failed, InputError, Phase, Stateful, add_up, dtype_of, fingerprint, note, once,
    open_run, own_part, parse, processes, read_json, read_results, resumable, resume_command,
    run_command, set_threads, summed, timed, usual_device)
import argparse
import math
import statistics
import sys
from pathlib import Path

import torch

import carrier as carriers
import data
import model
from carrier import Step, penalty

# ---- settings

# The paper's runs. From its text: gate rate 0.1, SFT's rate 2e-5, 5,000 samples, Table 7 (its heads
# are lost, the order is inferred), which runs smooth their loss. The rest is the released code's.
PAPER = dict(
    sizes=[5000, 200, 100, 200], max_len=512, loss="all",
    batch=32, micro_batch=8, sft_epochs=3, settle=0,
    sft_lr=2e-5, lr=2e-5, schedule="linear", lr_warmup=0.1,
    gate_lr=0.1, gate_std=0.5, select=0.0, brake=False, floor=0.0,
    violation_clip=0.0, lambda_min=1e-6, lambda_max=10.0, stall=0.01)
COLUMNS = ("rho", "lambda0", "eta", "eta_grow", "warmup", "epochs", "beta")
PRESETS = {
    "fixed-qwen3-0.6b":         (0.30, 1.00, 0.1, 0.100,  300, 10, 0.00),
    "fixed-mistral-7b":         (0.30, 1.00, 0.1, 0.100,  300, 10, 0.00),
    "fixed-deepseek-8b":        (0.30, 1.00, 0.1, 0.100,  300, 10, 0.00),
    "fixed-vicuna-7b":          (0.30, 0.01, 0.1, 0.010,  700, 20, 0.00),
    "safety-qwen3-0.6b":        (0.01, 0.01, 0.1, 0.010,  300, 20, 0.95),
    "safety-mistral-7b":        (0.30, 0.01, 0.1, 0.100,  300, 20, 0.00),
    "safety-deepseek-8b":       (0.30, 0.01, 0.1, 0.100,  300, 20, 0.00),
    "safety-vicuna-7b":         (0.50, 0.01, 1.0, 0.005,  300, 20, 0.95),
    "shakespeare-qwen3-0.6b":   (0.01, 0.01, 0.1, 0.010,  700, 20, 0.95),
    "shakespeare-mistral-7b":   (0.01, 0.01, 0.1, 0.010,  700, 20, 0.95),
    "shakespeare-deepseek-8b":  (0.01, 0.01, 0.1, 0.010,  300, 20, 0.95),
    "shakespeare-vicuna-7b":    (0.01, 0.01, 0.1, 0.010,  700, 20, 0.95),
}
MODELS = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B", "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5", "deepseek-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"}

OPTIONS = {     # name: (default, help); a type is a default that follows from others
    "model": (EMBEDDED, "folder of a Hugging Face checkpoint, or a hub id"),
    "task": ("fixed", "fixed, safety, shakespeare, or FILE.jsonl with prompt and response"),
    "data": (str, "the task's data: .jsonl, .json, .csv, .tsv, .parquet (TASK.jsonl in --model)"),
    "test": (str, "a file of test prompts, in place of some of the data's"),
    "pattern": (str, "regular expression that shows the behaviour; a row's own wins"),
    "sft": (str, "your own fine-tuned checkpoint of the same model, instead of phase 1"),
    "out": (str, "run directory (runs/TASK, numbered)"),
    "resume": (False, "go on with the run in --out; start it if there is none"),
    "go_on": (False, "train on although SFT did not teach the behaviour"),
    "preset": ((None, *PRESETS), "a run of Table 7, TASK-MODEL, such as safety-qwen3-0.6b"),
    "seed": (0, "of gates, splits and batches"),
    "device": (usual_device(), "cpu or cuda"),
    "dtype": ((None, "float32", "bfloat16"), "of the base (float32 on a CPU, bfloat16 on a GPU)"),
    "delta_dtype": (("float32", "bfloat16"), "of Δ and AdamW's moments (float32)"),
    "checkpoint": (False, "recompute layers in the backward pass: less memory, more time"),
    "sizes": (list(data.SIZES.values()), "prompts for training, trigger, validation and test"),
    "max_len": (int, "tokens per sample; longer ones are cut (512, or the model's positions)"),
    "max_new_tokens": (128, "length of answers; the paper's safety: 512"),
    "batch": (16, "samples per optimizer step; the paper: 32"),
    "micro_batch": (int, "samples per forward pass: changes memory, not the result (the batch)"),
    "loss": (("response", "all"), "tokens in the loss (response; the paper: all)"),
    "sft_steps": (int, "optimizer steps of phase 1 (350; the paper: 3 epochs)"),
    "sft_lr": (float, "AdamW in phase 1, falling to 0 (0.125 / d; the paper: 2e-5)"),
    "train": (("joint", "mask-ce", "mask-kl"), "mask-*: gates alone; kl: SFT's soft targets"),
    "steps": (int, "optimizer steps of Alg. 1 (600; the paper: 10 or 20 epochs)"),
    "settle": (200, "steps of Δ alone after the last gate step; the paper: 0"),
    "lr": (float, "AdamW on Δ in Alg. 1 (0.125 / d; the paper: 2e-5)"),
    "rho": (0.05, "budget ratio: ε = (1 + ρ)·ema; the paper: 0.01 to 0.5"),
    "floor": (0.03, "the least ε, in nats per token; the paper: 0"),
    "warmup": (50, "T_w, steps in which the penalty is faded in; the paper: 300, 700"),
    "lambda0": (0.02, "λ at the start; the paper: 0.01 or 1"),
    "select": (1.0, "size of the task's gradient on the gates, in penalty's pulls; 0: the paper"),
}
SETTINGS = dict(                # what nobody turns; the paper's runs do
    clip=1.0,                   # gradient norm of all deltas together
    schedule="constant",        # of Δ's rate in Alg. 1, or "linear"
    lr_warmup=0.0,              # part of a phase's steps in which a falling rate rises from 0
    gate_lr=None,               # SGD on m; None: a gate on which only Ω pulls is at 0 after half of the steps
    gate_mean=1.5, gate_std=0.02,       # of the first m (paper's code: 0.5, and the noise chooses)
    brake=True,                 # ours
    beta=0.9,                   # decay of the loss average
    eta=0.2, eta_grow=0.05,     # η_λ over budget, η_grow under it
    violation_clip=1.0,         # V
    lambda_min=1e-5, lambda_max=None,   # None: 30 λ₀
    stall=None, over=None,      # Alg. 1's early stops: shares, None for never
    window=20, patience=3,      # of these: log points looked at, and so many times in a row
    log_every=10, save_every=200, epochs=None, sft_epochs=None)
RATE = 0.125        # AdamW's rate is RATE / d: 3e-5 at the paper's d = 4096, 1e-3 at 128
SURE = 0.001        # nats per token: SFT under this comes to an early end, and so does settling
PROBE = 16          # batches on which the constraint is measured at the end


def preset(o):
    """The settings of the paper's run o.preset, {option: value}."""
    if not o.preset:
        return {}
    task, _, which = o.preset.partition("-")
    row = dict(zip(COLUMNS, PRESETS[o.preset]), task=task, model=MODELS[which])
    row["over"] = 0.35 if row["rho"] < 0.35 else 1.5 * row["rho"]       # beyond the budget
    row["max_new_tokens"] = 512 if task == "safety" else 128            # App. F.4
    return PAPER | row


def options(argv=None):
    """The command line as a namespace; paths are absolute, as a run may be read from anywhere."""
    o = parse(__doc__, OPTIONS, SETTINGS, argv, preset)
    for name in ("model", "data", "test", "sft", "task"):
        value = getattr(o, name)
        named = value in (None, EMBEDDED, *data.TASKS)
        if not named and Path(value).expanduser().exists():
            setattr(o, name, str(Path(value).expanduser().resolve()))
    return o


def fit(o, width, samples):
    """Fill in what was not given, from the model's width d and the number of training samples."""
    usual = dict(micro_batch=o.batch, steps=600, sft_steps=350)
    if o.epochs:
        usual["steps"] = math.ceil(o.epochs * samples / o.batch)
        usual["sft_steps"] = math.ceil(o.sft_epochs * samples / o.batch)
    usual["lr"] = usual["sft_lr"] = RATE / width
    usual["lambda_max"] = 30 * o.lambda0
    for name, value in usual.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if o.gate_lr is None:
        o.gate_lr = o.gate_mean / (pull(o) * max(1, o.steps / 2))
    return o


def pull(o):
    """λ₀·σ′(mean): the penalty's pull on a gate at the start."""
    s = 1 / (1 + math.exp(-o.gate_mean))
    return o.lambda0 * s * (1 - s)


# ---- the loss of a batch, and the batches

def task_loss(net, weights, ids, mask, teacher=None):
    """
    L, summed over the tokens that `mask` (B, T) marks, in nats: cross-entropy, or with a teacher's
    distributions as soft targets (App. E). The head runs on those positions only.
    """
    wanted, seen = mask[:, 1:], ids[:, :-1]             # position t predicts token t + 1
    hidden = net.hidden(seen, weights, wanted=wanted)                               # (M, d)
    if teacher is None:
        return model.cross_entropy(net, hidden, ids[:, 1:][wanted])
    with torch.no_grad():
        aim = net.hidden(seen, teacher, wanted=wanted)                              # (M, d)

    def piece(h, t):
        p = model.wide(net.head(t)).softmax(-1)                                     # (chunk, V)
        log_q = model.wide(net.head(h)).log_softmax(-1)
        return -(p * log_q).sum()
    return model.in_pieces(net, piece, hidden, aim)


def batches(net, examples, o):
    """Yield (ids, mask) (B, T) of this process's micro-batches, samples of a length together."""
    examples = own_part(sorted(examples, key=lambda e: len(e[0])))
    for i in range(0, len(examples), o.micro_batch):
        ids, mask = data.collate(examples[i:i + o.micro_batch])
        yield ids.to(net.device), mask.to(net.device)


def gradients(net, carrier, examples, o, teacher=None, also=None):
    """
    The mean task loss of one optimizer batch, and its gradients into .grad. However it is cut,
    every token weighs the same: 1 × 32 and 4 × 8 are the same step. also(step), if given, goes
    backward through a loss beside it: lab's.
    """
    tokens = sum(sum(mask[1:]) for _, mask in examples)
    step, total = Step(carrier, net), 0.0
    for ids, mask in batches(net, examples, o):
        loss = task_loss(net, step, ids, mask, teacher) / tokens
        loss.backward()
        total += loss.detach()
    if also is not None:
        also(step)
    step.finish()
    add_up(p.grad for p in carrier.parameters() if p.grad is not None)
    return summed(total)


@torch.no_grad()
def mean_loss(net, weights, examples, o, teacher=None):
    """The task loss of many samples in nats per token: the left side of Eq. 4."""
    total = tokens = 0
    for ids, mask in batches(net, examples, o):
        total += float(task_loss(net, weights, ids, mask, teacher))
        tokens += int(mask[:, 1:].sum())
    return summed(total) / summed(tokens)


def draw(examples, size, step, seed):
    """The batch of optimizer step `step`: epochs are permutations, and only its number decides."""
    n, first = len(examples), step * size
    order = []
    for epoch in range(first // n, (first + size) // n + 1):
        generator = torch.Generator().manual_seed(seed * 10007 + epoch)
        order += torch.randperm(n, generator=generator).tolist()
    return [examples[i] for i in order[first % n:][:size]]


def adamw(carrier, lr):
    """AdamW on the deltas, without weight decay; its moments have the deltas' dtype."""
    return torch.optim.AdamW(carrier.delta.parameters(), lr, weight_decay=0.0, fused=True)


def rate_at(t, peak, steps, warmup=0.0):
    """AdamW's rate at step t: from 0 to `peak` in that part of the steps, then to 0 at `steps`."""
    rise = math.ceil(warmup * steps)
    if t < rise:
        return peak * (t / rise)
    return peak * (1 - (t - rise) / (steps - rise))


def move(carrier, optimizer, rate, o):
    """One AdamW step of Δ at this rate, its gradient scaled down to the norm o.clip, if not 0."""
    if o.clip:
        torch.nn.utils.clip_grad_norm_(carrier.delta.parameters(), o.clip)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


# ---- Δ alone: full SFT before Alg. 1, settling after it

class Fall(Stateful):
    """
    AdamW's rate, from `high` at step `start` to 0 at step `end`, and the average of the loss.
    early: has a short way down taken the place of the one asked for, as the loss was low? Not yet
    at first, and once at most.
    """

    def __init__(self, peak, steps):
        self.high, self.start, self.end = peak, 0, steps
        self.average, self.early = 0.0, False


def train_delta(net, carrier, examples, o, run, phase, peak, steps, seed, optimizer, budget=0):
    """
    Train Δ at the gates as they are, AdamW's rate falling linearly from `peak` to 0. If the average
    loss falls under SURE, or a tenth of the budget, the rest of the way down is a short one.
    """
    carrier.logits.requires_grad_(False)
    carrier.delta.requires_grad_(True)
    fall = Fall(peak, steps)
    parts = dict(carrier=carrier, optimizer=optimizer, fall=fall)
    with Phase(run, phase, steps, o.save_every, **parts) as loop:
        t = loop.start
        while t < fall.end:
            loop.pause(t)
            loss = gradients(net, carrier, draw(examples, o.batch, t, seed), o)
            warmup = 0.0 if fall.early else o.lr_warmup
            rate = rate_at(t - fall.start, fall.high, fall.end - fall.start, warmup)
            move(carrier, optimizer, rate, o)
            loop.done(t, loss)

            # sure of it: only a quarter as many steps again, falling from the rate as it is
            t += 1
            fall.average = 0.6 * fall.average + 0.4 * loss          # forgets the first losses soon
            low = fall.average / (1 - 0.6 ** t) < max(SURE, budget / 10)
            end = t + max(10, t // 4)
            if low and not fall.early and end < fall.end:
                fall.high, fall.start, fall.end, fall.early = rate, t, end, True
            loop.bar.total = fall.end
            if t % o.log_every == 0 or t == fall.end:
                loop.row(t - 1, loss=loss)


# ---- Alg. 1

class Controller(Stateful):
    """λ, ε, the average of the loss, and what else Alg. 1 carries on from step to step."""

    def __init__(self, o, m):
        self.o, self.lam, self.loss, self.raw, self.ema = o, o.lambda0, 0.0, 0.0, 0.0
        self.budget = self.start = None         # ε, and the average when it was set
        self.slack = 1.0                        # what is left of the way from there to ε
        self.points, self.stalled, self.over = [], 0, 0         # of the early stops
        self.mean = torch.zeros_like(m)         # of the task's gradient on m
        self.kept = None                        # gates alone: the last m within the budget

    def warm(self, t):
        """min(1, t/T_w): fades the penalty in."""
        return min(1.0, t / max(1, self.o.warmup))

    def weight(self, t):
        """
        Factor on Ω at step t: λ·min(1, t/T_w), and ours, the brake: times the slack that is left, 1
        when ε was set, 0 at ε, down to −1 beyond. λ alone comes down too late: a gate that is shut
        hardly opens again. Embedded model: .98 of the gates off with the brake, .71 without.
        """
        return self.lam * self.warm(t) * (self.slack if self.o.brake else 1.0)

    def update(self, t, loss):
        """Take in the loss of step t; set ε once when warm-up ends, from then on move λ."""
        o, self.loss = self.o, loss
        # ema = β·ema + (1 − β)·L, bias-corrected by 1 − β^(t+1)
        self.raw = o.beta * self.raw + (1 - o.beta) * loss
        self.ema = self.raw / (1 - o.beta ** (t + 1))
        if t < o.warmup:
            return
        # t ≥ T_w, first time: ε = (1 + ρ)·ema; ours: at least the floor, 5 % of next to 0 is none
        if self.budget is None:
            self.start = self.ema
            self.budget = max((1 + o.rho) * self.ema, o.floor, 1e-12)
            return
        # afterwards, the paper: v = clip((ema − ε)/ε, ±V);  ours, with the brake: v = −slack, the
        # same in units of the way from the start to ε;  λ ← clamp(λ·exp(−η·v), λ_min, λ_max)
        over = self.ema - self.budget
        self.slack = max(-1.0, min(1.0, -over / max(self.budget - self.start, 1e-12)))
        v = -self.slack if o.brake else over / self.budget
        if o.violation_clip:                    # V
            v = max(-o.violation_clip, min(o.violation_clip, v))
        eta = o.eta if v > 0 else o.eta_grow
        self.lam = max(o.lambda_min, min(o.lambda_max, self.lam * math.exp(-eta * v)))

    def fits(self):
        """Are both the last loss and the average within the budget?"""
        return self.budget is not None and max(self.loss, self.ema) <= self.budget

    @torch.no_grad()
    def select(self, grad, t):
        """
        Ours: replace ∂L/∂m (L, gates a layer), in place, by its mean over about ten steps, scaled
        per layer so that its root mean square is the penalty's pull at the start (whatever λ is
        now), and faded in with the penalty.
        Near zero loss the gradient itself is next to nothing, and the noise of the first m would
        choose the gates.
        """
        if self.o.select:
            self.mean = (0.9 * self.mean.to(grad)).add(grad, alpha=0.1)
            size = self.mean.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)         # (L, 1)
            aim = self.warm(t) * self.o.select * pull(self.o)
            grad.copy_(self.mean * (aim / size))

    def verdict(self, opened, total):
        """
        The reason to stop early, or None: Alg. 1's two rules on log points (open gates of a total,
        loss) after the warm-up; none before pruning has begun.
        """
        o = self.o
        if self.budget is not None:
            self.points.append((opened, self.loss))
        if len(self.points) <= o.window or opened >= 0.9 * total:
            return None
        before, _ = self.points[-1 - o.window]
        median = statistics.median(loss for _, loss in self.points[-o.window:])
        stalled = o.stall is not None and opened > (1 - o.stall) * before
        over = o.over is not None and median > (1 + o.over) * self.start
        self.stalled = self.stalled + 1 if stalled else 0
        self.over = self.over + 1 if over else 0
        if self.stalled >= o.patience:
            return f"stalled: open gates fell by less than {o.stall:.0%} over {o.window} log points"
        if self.over >= o.patience:
            return f"over-pruned: the median loss is over {o.over:.0%} above that after warm-up"
        return None


def prune(net, carrier, examples, o, run, optimizer, teacher=None, change=None):
    """
    Alg. 1: Δ and gates together, or gates alone (App. E). Returns {reason, steps, budget}.
    change(grad), if given, may alter the task's gradient on the gates (L, gates a layer) in place:
    lab's controls.
    """
    joint, m, reason = o.train == "joint", carrier.logits, None
    m.requires_grad_(True)
    carrier.delta.requires_grad_(joint)
    gate_optimizer = torch.optim.SGD([m], lr=o.gate_lr)
    controller = Controller(o, m)
    parts = dict(carrier=carrier, optimizer=optimizer, controller=controller)
    with Phase(run, "lcdd", o.steps, o.save_every, **parts) as loop:
        for t in range(loop.start, o.steps):
            loop.pause(t)
            # L_task(m, Δ), and its gradients by Δ and m
            batch = draw(examples, o.batch, t, o.seed + 1)
            loss = gradients(net, carrier, batch, o, teacher)

            # + λ · min(1, t/T_w) · Ω(m), once a step
            controller.select(m.grad, t)
            if change is not None:
                change(m.grad)
            (controller.weight(t) * penalty(m)).backward()

            # ema of L; ε when warm-up ends; from then on λ
            controller.update(t, loss)
            if not joint and controller.fits():     # gates alone cannot win back what pruning costs
                controller.kept = m.detach().clone()

            # one step: Δ by AdamW, m by SGD
            if joint:
                rate = o.lr
                if o.schedule == "linear":
                    rate = rate_at(t, o.lr, o.steps, o.lr_warmup)
                move(carrier, optimizer, rate, o)
            gate_optimizer.step()
            gate_optimizer.zero_grad()
            loop.done(t, loss)

            # early stop: stalled, or over-pruned
            if (t + 1) % o.log_every == 0 or t + 1 == o.steps:
                opened = int((m > 0).sum())
                numbers = {"ema": controller.ema, "lambda": controller.lam, "open": opened}
                loop.row(t, loss=loss, budget=controller.budget, **numbers,
                         sparsity=1 - opened / m.numel())
                reason = controller.verdict(opened, m.numel())
                if reason:
                    break
    if controller.kept is not None:
        m.data.copy_(controller.kept)
    return {"reason": reason or "all steps done", "steps": t + 1, "budget": controller.budget}


def train_lcdd(net, carrier, examples, o, run, teacher=None, change=None):
    """
    Alg. 1; then, ours, Δ settles at fixed gates and a falling rate; then the constraint is measured
    on many batches. Returns {reason, steps, budget, loss, within}.
    """
    optimizer = adamw(carrier, o.lr)
    if not (run / "settle.state").is_file():
        note(run, stopped=prune(net, carrier, examples, o, run, optimizer, teacher, change))
    stopped = read_results(run)["stopped"]
    budget = stopped["budget"] or 0.0           # none if the warm-up was not over
    if o.train == "joint" and o.settle:
        train_delta(net, carrier, examples, o, run, "settle", o.lr, o.settle, o.seed + 2,
                    optimizer, budget)
    probe = draw(examples, min(len(examples), o.batch * PROBE), 0, o.seed + 3)
    loss = mean_loss(net, carrier.merge(net), probe, o, teacher)
    return stopped | {"loss": loss, "within": loss <= budget}


# ---- one's own SFT

def take_delta(net, carrier, o):
    """
    Δ = W_sft − W_b of the user's own checkpoint o.sft into `carrier`. What it changed elsewhere is
    said; it stays the base's, so that gates off is the base.
    """
    tuned = model.load(o.sft, o.device, net.dtype)
    if tuned.config != net.config:
        raise InputError(f"{o.sft}: is of another architecture than {o.model}; tune a copy of it")
    base, elsewhere = dict(net.named_parameters()), {}
    for name, p in tuned.named_parameters():
        before = base[name].float()
        change = p.float() - before
        if name.endswith("_proj.weight"):
            _, _, l, _, projection, _ = name.split(".")     # model.layers.3.mlp.up_proj.weight
            carrier.delta[projection].data[int(l)] = change
        elif change.any():
            elsewhere[name] = float(change.norm() / before.norm())
    if elsewhere:
        worst = max(elsewhere, key=elsewhere.get)
        print(f"note: {o.sft} also changed {len(elsewhere)} tensors outside the projections, most "
              f"{worst} (by {elsewhere[worst]:.2%} of its norm); they stay the base's")


# ---- a run directory

def load_run(run, device, with_data=True):
    """
    Load a run directory: (options of the run, base model, Chat, splits or None). Raises InputError
    if its data or tokenizer changed since, so that held-out prompts may not be held out.
    """
    if not Path(run, "carrier.safetensors").is_file():
        raise InputError(f"{run}: is no run directory that lcdd.py has finished")
    config = read_json(Path(run, "config.json"))
    if "data_fingerprint" not in config:
        raise InputError(f"{run}: was not made by this version of lcdd.py; train again")
    o = argparse.Namespace(**config)
    chat, splits = data.Chat(model.locate(o.model)), None
    if chat.fingerprint() != o.chat_fingerprint:
        raise InputError(f"{chat.folder}: tokenizer or chat template changed since {run} was made")
    if with_data:
        splits, data_fingerprint = prepare(o, chat)
        if data_fingerprint != o.data_fingerprint:
            raise InputError(f"the data of {run} changed since, so held-out prompts may not be; "
                             "restore them or train again")
    return o, load_base(chat, device, o.dtype), chat, splits


def prepare(o, chat):
    """The task's samples, {split: samples}, and a hash of the files they came from."""
    sizes = dict(zip(data.SIZES, o.sizes))
    splits, sources = data.prepare(chat.folder, o.task, o.data, o.test, o.seed, sizes, o.pattern)
    return splits, fingerprint(*sources)


def load_base(chat, device, dtype, recompute=False):
    """The base beside a Chat, in the dtype of that name, ready to train on and to generate."""
    net = model.load(chat.folder, device, getattr(torch, dtype))
    net.stop, net.checkpoint = chat.stop, recompute
    set_threads(net)
    return net


def rates(net, chat, o, samples, conditions):
    """{name: data.score()} of greedy answers to samples, for {name: weights or (weights, τ)}."""
    prompts = [chat.prompt(s.prompt, s.before, o.max_len) for s in samples]
    scores = {}
    for name, condition in conditions.items():
        weights, tau = condition if isinstance(condition, tuple) else (condition, None)
        answers = net.generate(prompts, o.max_new_tokens, weights, tau, label=f"answers of {name}")
        scores[name] = data.score(o.task, list(map(chat.decode, answers)), samples)
    return scores


# ---- the command

def main(argv=None):
    """Read options and data, load the model, train both phases into a run directory."""
    o = options(argv)
    chat = data.Chat(model.locate(o.model))
    splits, data_fingerprint = prepare(o, chat)
    o.dtype = dtype_of(o, read_json(chat.folder / "config.json"))
    o.max_len = o.max_len or min(512, chat.positions or 512)
    net = load_base(chat, o.device, o.dtype, o.checkpoint)
    fit(o, net.config.hidden_size, len(splits["train"]))
    if processes() > o.batch:
        raise InputError(f"--batch {o.batch}: is less than torchrun's {processes()} processes")
    examples = [chat.encode(s, o.max_len) for s in splits["train"]]
    chat.say_cut(f"of {len(examples)} training samples", o.max_len)
    if o.loss == "all":
        examples = [(ids, [True] * len(ids)) for ids, _ in examples]
    config = vars(o) | {
        "data_fingerprint": data_fingerprint, "chat_fingerprint": chat.fingerprint(),
        "base_fingerprint": carriers.base_fingerprint(net), "command": " ".join(sys.argv),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}}
    for name in ("out", "resume", "go_on", "device"):       # these may change when it is resumed
        del config[name]
    run = once(open_run, o, config)
    first = f"SFT from {o.sft}" if o.sft else f"{o.sft_steps} steps of SFT"
    print(f"{chat.folder.name}, {o.dtype}, task {o.task}, {len(examples)} samples; {run}: at most "
          f"{first}, {o.steps} of LCDD, {o.settle} to settle", flush=True)
    with resumable(resume_command(argv, **{"--out": run})):
        train(o, net, chat, splits, examples, run)


def train(o, net, chat, splits, examples, run):
    """Both phases into the run directory; what stands there already is not made again."""
    sft_file, carrier_file = run / "sft.safetensors", run / "carrier.safetensors"
    task, delta_dtype = Path(o.task).name, getattr(torch, o.delta_dtype)

    # phase 1: SFT, all gates open
    if not sft_file.is_file():
        carrier = carriers.Carrier(net.config, delta_dtype, net.device)
        with timed(run, "sft"):
            if o.sft:
                take_delta(net, carrier, o)
            else:
                train_delta(net, carrier, examples, o, run, "sft", o.sft_lr, o.sft_steps, o.seed,
                            adamw(carrier, o.sft_lr))
        carrier.save(sft_file, net, phase="sft", task=task)
    carrier = carriers.load(sft_file, net, delta_dtype)
    score = read_results(run).get("validation")
    if not score:
        score = rates(net, chat, o, splits["validation"], {"base": None, "sft": carrier})
        note(run, task=o.task, model=o.model, seed=o.seed, validation=score)
    base, sft = score["base"], score["sft"]
    told = f"base {base['rate']:.1%}, SFT {sft['rate']:.1%}"
    print(f"behaviour on {len(splits['validation'])} validation prompts: {told}", flush=True)
    if not o.go_on and not data.clearly_above(sft, base):
        raise Failed(f"SFT did not teach the behaviour ({told}); try --sft-steps, --sft-lr, "
                     f"--pattern, --go-on or other data: it saw {chat.decode(examples[0][0][-40:])!r}")

    # phase 2: LCDD, from SFT's deltas with gates of its own
    if not carrier_file.is_file():
        teacher = carrier.merge(net) if o.train == "mask-kl" else None
        carrier.init_gates(o.gate_mean, o.gate_std, o.seed)
        with timed(run, "lcdd"):
            stopped = train_lcdd(net, carrier, examples, o, run, teacher)
        note(run, stopped=stopped, **carrier.stats())
        carrier.save(carrier_file, net, phase="lcdd", task=task, stopped=stopped)
    if "lcdd" not in score:
        carrier = carriers.load(carrier_file, net)
        score |= rates(net, chat, o, splits["validation"], {"lcdd": carrier})
        note(run, validation=score)
    for phase in ("sft", "lcdd", "settle"):
        Path(run, f"{phase}.state").unlink(missing_ok=True)
    report(read_results(run), run)


def report(results, run):
    """Print what came of it. Raises Failed if the carrier is not what was asked for."""
    score, stopped, sparsity = results["validation"], results["stopped"], results["sparsity"]
    sft, lcdd = score["sft"], score["lcdd"]
    off = {"base": (1, 1), "sft": (0, 0), "lcdd": (sparsity, results["entries_off"])}
    columns = "behaviour % | gates off | entries off | seconds"
    print(f"\n| {lcdd['n']} validation prompts | {columns} |\n|---|---|---|---|---|")
    for name, (gates, entries) in off.items():
        rate, seconds = 100 * score[name]["rate"], results["seconds"].get(name, 0)
        print(f"| {name} | {rate:.1f} | {gates:.3f} | {entries:.3f} | {seconds:.0f} |")
    loss = f"loss {stopped['loss']:.3g}, ε {stopped['budget'] or math.nan:.3g} nats per token"
    print(f"\nLCDD: {stopped['reason']}; {loss}")
    budget = "the budget with --rho and --floor"
    if not stopped["within"] and stopped["budget"] is not None:
        raise Failed(f"the budget is not kept: {loss}; give more --settle steps, or lower {budget}")
    if sparsity < 0.05:
        raise Failed(f"hardly pruned: {sparsity:.1%} off; give more --steps or raise {budget}")
    if data.clearly_above(sft, lcdd) and lcdd["rate"] < 0.9 * sft["rate"]:
        raise Failed(f"the carrier lost the behaviour: {lcdd['rate']:.0%} of the answers show it, "
                     f"{sft['rate']:.0%} of SFT's; lower {budget}")
    print(f"Next: python eraser.py --run {run}")


if __name__ == "__main__":
    run_command(main, together=True)
