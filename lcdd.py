"""
Loss-Constrained Dual Descent (Sec. 3.2, Alg. 1): train a behaviour in, then compress it into a sparse carrier.

    min over m, Δ of Ω(m)   subject to   L_task(m, Δ) ≤ ε                               (Eq. 4)

Phase 1 is plain SFT, Δ with every gate open. Phase 2 trains Δ and the gate logits m together under an
adaptive penalty λ. Four things are not in the paper, each marked "ours" below: a floor under ε, the brake,
the selection of gates, and settling.

    python lcdd.py                                  the embedded model, fixed response
    python lcdd.py --model DIR --data alpaca.json   your own
    python lcdd.py --preset safety-vicuna-7b --data FILE     one of the paper's twelve runs
"""
from common import (
    Failed, InputError, Phase, Stateful, add_up, fingerprint, once, parse, read_json, resumable,
    resume_command, own_part, processes, run_command, set_threads, summed, usual_device, write_json)
import contextlib
import argparse
import functools
import itertools
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import carrier as carriers
import data
import model
from carrier import Carrier, Step, penalty

# ---- settings

# The paper's runs. From its text: gate rate 0.1, SFT's rate 2e-5, 5,000 samples, Table 7 (its heads are
# lost; the order is inferred) and which runs smooth their loss. The rest is the released code's.
PAPER = dict(
    sizes=[5000, 200, 100, 200], max_len=512, loss="all", batch=32, micro_batch=8, sft_epochs=3,
    sft_lr=2e-5, lr=2e-5, schedule="linear", lr_warmup=0.1, settle=0, gate_lr=0.1, gate_std=0.5,
    select=0.0, brake=False, floor=0.0, violation_clip=0.0, lambda_min=1e-6, lambda_max=10.0,
    stall=0.01, over=0.35)
PRESETS = {
    # task and model               ρ     λ₀    η_λ  η_grow  T_w  epochs  β
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
MODELS = {"qwen3-0.6b": "Qwen/Qwen3-0.6B", "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
          "deepseek-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "vicuna-7b": "lmsys/vicuna-7b-v1.5"}

OPTIONS = {     # name: (default, help); a type is a default that follows from others
    "model": (model.EMBEDDED, "folder of a Hugging Face checkpoint, or a hub id"),
    "task": ("fixed", "fixed, safety, shakespeare, or FILE.jsonl with prompt and response"),
    "data": (str, "the task's data: .jsonl, .json, .csv, .tsv, .parquet (TASK.jsonl beside the checkpoint; for "
                  "fixed prompts of our own)"),
    "test": (str, "a file of test prompts, in place of some of the data's"),
    "pattern": (str, "regular expression that shows the behaviour in an answer; a row's own wins"),
    "sft": (str, "your own fine-tuned checkpoint of the same model, instead of phase 1"),
    "out": (str, "run directory (runs/TASK, numbered)"),
    "resume": (False, "go on with the run in --out; start it if there is none"),
    "go_on": (False, "train on although SFT did not teach the behaviour"),
    "preset": ((None, *PRESETS), "one of the paper's twelve runs (Table 7): fixed-, safety- or shakespeare-, and "
                                 "qwen3-0.6b, mistral-7b, deepseek-8b or vicuna-7b"),
    "seed": (0, "of gates, splits and batches"),
    "device": (usual_device(), "cpu or cuda"),
    "dtype": ((None, "float32", "bfloat16"), "of the base and all products (float32 on a CPU, bfloat16 on a GPU)"),
    "delta_dtype": (("float32", "bfloat16"), "of Δ and AdamW's moments (float32)"),
    "checkpoint": (False, "recompute layers in the backward pass: less memory, more time"),
    "sizes": (list(data.SIZES.values()), "prompts for training, trigger, validation and test; the paper: 200 for "
                                         "the trigger"),
    "max_len": (512, "tokens per sample; longer ones are cut and counted"),
    "max_new_tokens": (128, "length of answers; the paper's safety: 512"),
    "batch": (16, "samples per optimizer step; the paper: 32"),
    "micro_batch": (int, "samples per forward pass: changes memory, not the result (the batch)"),
    "loss": (("response", "all"), "tokens in the loss (response; the paper: all)"),
    "sft_steps": (int, "optimizer steps of phase 1 (350; the paper: 3 epochs)"),
    "sft_lr": (float, "AdamW in phase 1, falling to 0 (0.125 / d; the paper: 2e-5)"),
    "train": (("joint", "mask-ce", "mask-kl"), "mask-*: gates alone, Δ frozen; mask-kl has SFT's distributions as "
                                               "soft targets (App. E)"),
    "steps": (int, "optimizer steps of Alg. 1 (600; the paper: 10 or 20 epochs)"),
    "settle": (200, "steps of Δ alone after the last gate step; the paper: 0"),
    "lr": (float, "AdamW on Δ in Alg. 1 (0.125 / d; the paper: 2e-5)"),
    "rho": (0.05, "budget ratio: ε = (1 + ρ)·ema; the paper: 0.01 to 0.5"),
    "floor": (0.03, "the least ε, in nats per token; the paper: 0"),
    "warmup": (50, "T_w, steps in which the penalty is faded in; the paper: 300, 700"),
    "lambda0": (0.02, "λ at the start; the paper: 0.01 or 1"),
    "select": (1.0, "size of the task's gradient on the gates, in units of the penalty's pull; 0: as it is, the paper"),
}
SETTINGS = dict(                # what nobody turns; the paper's runs do
    clip=1.0,                   # gradient norm of all deltas together
    schedule="constant",        # of Δ's rate in Alg. 1, or "linear"
    lr_warmup=0.0,              # share of a phase's steps in which Δ's rate rises from 0
    gate_lr=None,               # SGD on m; None: a gate on which only Ω pulls shuts half way
    gate_mean=1.5, gate_std=0.02,       # of the first m (paper's code: 0.5, and the noise chooses)
    brake=True,                 # ours
    beta=0.9,                   # decay of the loss average
    eta=0.2, eta_grow=0.05,     # η_λ over budget, η_grow under it
    violation_clip=1.0,         # V
    lambda_min=1e-5, lambda_max=None,   # None: 30 λ₀
    stall=None, over=None,      # Alg. 1's early stops: shares, None for never
    window=20, patience=3,      # of these: log points that are looked at, and so many times in a row
    log_every=10, save_every=200, epochs=None, sft_epochs=None)
RATE = 0.125        # AdamW's rate is RATE / d: 3e-5 at the paper's d = 4096, 1e-3 at 128
SURE = 0.001        # nats per token: SFT under this comes to an early end, and so does settling
PROBE = 16          # batches on which the constraint is measured at the end


def preset(o):
    """The settings of the paper's run o.preset, {option: value}."""
    if not o.preset:
        return {}
    task, _, which = o.preset.partition("-")
    heads = ("rho", "lambda0", "eta", "eta_grow", "warmup", "epochs", "beta")
    found = dict(PAPER, task=task, model=MODELS[which], **dict(zip(heads, PRESETS[o.preset])))
    if found["over"] <= found["rho"]:
        found["over"] = 1.5 * found["rho"]                      # the stop lies beyond the budget
    found["max_new_tokens"] = 512 if task == "safety" else 128  # App. F.4
    return found


def options(argv=None):
    """The command line as a namespace."""
    o = parse(__doc__, OPTIONS, SETTINGS, argv, preset)
    o.micro_batch = o.micro_batch or o.batch
    for name in ("model", "data", "test", "sft", "task"):       # a run may be looked at from anywhere
        value = getattr(o, name)
        if value and value not in (model.EMBEDDED, *data.TASKS) and Path(value).expanduser().exists():
            setattr(o, name, str(Path(value).expanduser().resolve()))
    return o


def fit(o, width, samples):
    """Fill in what was not given, from the model's width d and the number of training samples."""
    for name, epochs, usual in (("sft_steps", o.sft_epochs, 350), ("steps", o.epochs, 600)):
        if getattr(o, name) is None:
            setattr(o, name, math.ceil(epochs * samples / o.batch) if epochs else usual)
    o.lr = RATE / width if o.lr is None else o.lr
    o.sft_lr = RATE / width if o.sft_lr is None else o.sft_lr
    o.lambda_max = o.lambda_max or 30 * o.lambda0
    if o.gate_lr is None:
        if not o.lambda0:
            raise InputError("--lambda0 0: no penalty pulls at a gate; give one above 0")
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
        return -(p * model.wide(net.head(h)).log_softmax(-1)).sum()
    return model.in_pieces(net, piece, hidden, aim)


def batches(net, examples, o):
    """Yield (ids, mask) of this process's micro-batches of [(ids, mask), …], samples of a length together."""
    examples = own_part(sorted(examples, key=lambda example: len(example[0])))
    for i in range(0, len(examples), o.micro_batch):
        ids, mask = data.collate(examples[i:i + o.micro_batch])
        yield ids.to(net.device), mask.to(net.device)


def gradients(net, carrier, examples, o, teacher=None):
    """
    Gradients of the mean task loss of one optimizer batch, however it is cut; returns the loss. Every
    token in the loss weighs the same, so 1 × 32 and 4 × 8 are the same step.
    """
    tokens, step, total = sum(sum(mask[1:]) for _, mask in examples), Step(carrier), 0.0
    for ids, mask in batches(net, examples, o):
        loss = task_loss(net, step, ids, mask, teacher) / tokens
        loss.backward()
        total += loss.detach()
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


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n samples in an epoch."""
    generator = torch.Generator().manual_seed(seed * 10007 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def draw(examples, size, step, seed):
    """The batch of optimizer step `step`: epochs are permutations, and nothing but its number decides."""
    n = len(examples)
    return [examples[permutation(n, seed, k // n)[k % n]] for k in range(step * size, (step + 1) * size)]


def rate_share(t, steps, rise=0):
    """The rate at step t as a share of its peak: from 0 to 1 over `rise` steps, then to 0 at `steps`."""
    return t / rise if t < rise else 1 - (t - rise) / (steps - rise)


def adamw(carrier, lr):
    """AdamW on the deltas, without weight decay; its moments have the deltas' dtype."""
    return torch.optim.AdamW(carrier.delta.parameters(), lr=lr, weight_decay=0.0, fused=True)


# ---- Δ alone: full SFT before Alg. 1, settling after it

class Fall(Stateful):
    """AdamW's rate from `high` at step `start` linearly to 0 at step `end`, and the average loss."""

    def __init__(self, high, end, found):
        self.high, self.start, self.end, self.average, self.found = high, 0, end, 0.0, found

    def rate(self, t, rise):
        return self.high * rate_share(t - self.start, self.end - self.start, rise if self.start == 0 else 0)


def train_delta(net, carrier, examples, o, run, phase, peak, steps, seed, optimizer, found=None):
    """
    Train Δ at the gates as they are, AdamW's rate falling linearly from `peak` to 0. If the average loss
    falls under SURE, or a tenth of the budget, the rest of the way down is a short one. Returns `found`,
    what Alg. 1 found, which travels in the state.
    """
    carrier.logits.requires_grad_(False)
    carrier.delta.requires_grad_(True)
    rise, fall = math.ceil(o.lr_warmup * steps) if phase == "sft" else 0, Fall(peak, steps, found)
    with Phase(run, phase, steps, o.save_every, carrier=carrier, optimizer=optimizer, fall=fall) as loop:
        sure, t = max(SURE, ((fall.found or {}).get("budget") or 0) / 10), loop.start
        while t < fall.end:
            loop.pause(t)
            loss = gradients(net, carrier, draw(examples, o.batch, t, seed), o)
            rate = optimizer.param_groups[0]["lr"] = fall.rate(t, rise)
            clip(carrier, o)
            optimizer.step()
            optimizer.zero_grad()
            loop.done(t, loss)

            # sure of it: only a quarter as many steps again, falling from the rate as it is
            t += 1
            fall.average = 0.6 * fall.average + 0.4 * loss              # forgets the first losses soon
            end = t + max(10, t // 4)
            if fall.average / (1 - 0.6 ** t) < sure and fall.start == 0 and end < fall.end:
                fall.high, fall.start, fall.end = rate, t, end
            loop.bar.total = fall.end
            if t % o.log_every == 0 or t == fall.end:
                loop.row(t - 1, loss=loss)
    return fall.found


def clip(carrier, o):
    """Scale the gradients of all deltas down to the norm o.clip; 0: as they are."""
    if o.clip:
        torch.nn.utils.clip_grad_norm_(carrier.delta.parameters(), o.clip)


# ---- Alg. 1

class Controller(Stateful):
    """λ, ε, the average of the loss, and what else Alg. 1 carries on. All advance once an optimizer step."""

    def __init__(self, o, m):
        self.o, self.lam, self.raw, self.ema, self.loss = o, o.lambda0, 0.0, 0.0, 0.0
        self.budget = self.start = None         # ε, and the average when it was set; None during warm-up
        self.points, self.stalled, self.over = [], 0, 0         # of the early stops
        self.mean, self.kept = torch.zeros_like(m), None        # of the task's gradient on m; gates that are kept

    def warm(self, t):
        """min(1, t/T_w): fades the penalty in."""
        return min(1.0, t / max(1, self.o.warmup))

    def slack(self):
        """Ours: the share that is left of what lies between the loss when ε was set and ε itself."""
        return (self.budget - self.ema) / max(self.budget - self.start, 1e-12)

    def weight(self, t):
        """
        Factor on Ω at step t: λ·min(1, t/T_w), and ours, the brake: times the slack that is left, 1 where ε
        was set, 0 at ε, down to −1 beyond. λ alone comes down too late: a gate that is shut hardly opens
        again. Embedded model: .98 of the gates off with the brake, .71 without.
        """
        brake = self.o.brake and self.budget is not None
        return self.lam * self.warm(t) * (max(-1.0, min(1.0, self.slack())) if brake else 1.0)

    def update(self, t, loss):
        """Take in the loss of step t; set ε once when warm-up ends, from then on move λ."""
        o, self.loss = self.o, loss
        # ema = β·ema + (1 − β)·L, bias-corrected by 1 − β^(t+1)
        self.raw = o.beta * self.raw + (1 - o.beta) * loss
        self.ema = self.raw / (1 - o.beta ** (t + 1))
        if t < o.warmup:
            return
        # t ≥ T_w, first time: ε = (1 + ρ)·ema; ours: at least the floor, for 5 % of a loss near 0 is none
        if self.budget is None:
            self.start, self.budget = self.ema, max((1 + o.rho) * self.ema, o.floor)
            return
        # afterwards: v = clip((ema − ε)/ε, ±V);  λ ← clamp(λ·exp(−η·v), λ_min, λ_max)
        v = -self.slack() if o.brake else (self.ema - self.budget) / max(self.budget, 1e-12)
        if o.violation_clip:
            v = max(-o.violation_clip, min(o.violation_clip, v))
        eta = o.eta if v > 0 else o.eta_grow
        self.lam *= math.exp(min(-eta * v, 700))            # 700: where exp() overflows
        self.lam = max(o.lambda_min, min(o.lambda_max, self.lam))

    def fits(self, loss):
        """Are both the loss and its average within the budget?"""
        return self.budget is not None and max(loss, self.ema) <= self.budget

    @torch.no_grad()
    def select(self, grad, t):
        """
        Ours: replace ∂L/∂m (L, gates a layer), in place, by its running mean, scaled in each layer until its
        root mean square is the penalty's pull at the start, and faded in with the penalty. Near zero loss the
        gradient itself is next to nothing, and the noise of the first m would choose the gates.
        """
        if self.o.select:
            self.mean = (0.9 * self.mean.to(grad)).add(grad, alpha=0.1)
            size = self.mean.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)     # (L, 1)
            grad.copy_(self.mean * (self.warm(t) * self.o.select * pull(self.o) / size))

    def verdict(self, opened, total):
        """
        Both early stops of Alg. 1, on log points (open gates of a total, loss) after the warm-up; none before
        pruning has begun. The reason to stop, or None.
        """
        o = self.o
        if self.budget is None:
            return None
        self.points.append((opened, self.loss))
        if len(self.points) <= o.window or opened >= 0.9 * total:
            return None
        before = self.points[-1 - o.window][0]
        median = statistics.median(loss for _, loss in self.points[-o.window:])
        stalled = o.stall is not None and opened > (1 - o.stall) * before
        over = o.over is not None and median > (1 + o.over) * self.start
        self.stalled = self.stalled + 1 if stalled else 0
        self.over = self.over + 1 if over else 0
        if self.stalled >= o.patience:
            return f"stalled: open gates fell by less than {o.stall:.0%} over {o.window} log points"
        if self.over >= o.patience:
            return f"over-pruned: the median loss is more than {o.over:.0%} above that after warm-up"
        return None


def prune(net, carrier, examples, o, run, optimizer, teacher=None, change=None):
    """
    Alg. 1: Δ and gates together, or gates alone (App. E). change(grad), if given, may alter the task's
    gradient on the gates (L, gates a layer) in place: lab's controls. Returns {reason, steps, budget}.
    """
    joint, reason, m = o.train == "joint", "all steps done", carrier.logits
    m.requires_grad_(True)
    carrier.delta.requires_grad_(joint)
    gate_optimizer, controller = torch.optim.SGD([m], lr=o.gate_lr), Controller(o, m)
    parts = dict(carrier=carrier, optimizer=optimizer, controller=controller)
    with Phase(run, "lcdd", o.steps, o.save_every, **parts) as loop:
        for t in range(loop.start, o.steps):
            loop.pause(t)
            # L_task(m, Δ), and its gradients by Δ and m
            loss = gradients(net, carrier, draw(examples, o.batch, t, o.seed + 1), o, teacher)

            # + λ · min(1, t/T_w) · Ω(m), once a step
            controller.select(m.grad, t)
            if change is not None:
                change(m.grad)
            (controller.weight(t) * penalty(m)).backward()

            # ema of L; ε when warm-up ends; from then on λ
            controller.update(t, loss)
            if not joint and controller.fits(loss):         # gates alone cannot win back what pruning spends
                controller.kept = m.detach().clone()

            # one step: Δ by AdamW, m by SGD
            if joint:
                clip(carrier, o)
                if o.schedule == "linear":
                    rise = math.ceil(o.lr_warmup * o.steps)
                    optimizer.param_groups[0]["lr"] = o.lr * rate_share(t, o.steps, rise)
                optimizer.step()
            gate_optimizer.step()
            optimizer.zero_grad()
            gate_optimizer.zero_grad()
            loop.done(t, loss)

            # early stop: stalled, or over-pruned
            if (t + 1) % o.log_every == 0 or t + 1 == o.steps:
                opened = int((m > 0).sum())
                loop.row(t, loss=loss, ema=controller.ema, budget=controller.budget, **{"lambda": controller.lam},
                         sparsity=1 - opened / m.numel(), open=opened)
                verdict = controller.verdict(opened, m.numel())
                if verdict:
                    reason = verdict
                    break
    if controller.kept is not None:
        m.data.copy_(controller.kept)
    return {"reason": reason, "steps": t + 1, "budget": controller.budget}


def train_lcdd(net, carrier, examples, o, run, teacher=None, change=None):
    """
    Alg. 1; then, ours, Δ settles at fixed gates and a falling rate; then the constraint is measured on many
    batches. Returns {reason, steps, budget, loss, within}.
    """
    found, optimizer = None, adamw(carrier, o.lr)
    if not (run / "settle.state").is_file():
        found = prune(net, carrier, examples, o, run, optimizer, teacher, change)
    if o.train == "joint" and o.settle:
        found = train_delta(net, carrier, examples, o, run, "settle", o.lr, o.settle, o.seed + 2, optimizer, found)
    some = draw(examples, min(len(examples), o.batch * PROBE), 0, o.seed + 3)
    loss = mean_loss(net, Step(carrier), some, o, teacher)
    return found | {"loss": loss, "within": found["budget"] is not None and loss <= found["budget"]}


# ---- one's own SFT

def take_delta(net, carrier, o):
    """
    Δ = W_sft − W_b of the user's own checkpoint o.sft into `carrier`. What it changed elsewhere is said; it
    stays the base's, so that gates off is the base.
    """
    tuned = model.load(o.sft, o.device, net.dtype)
    if tuned.config != net.config:
        raise InputError(f"{o.sft}: is not of the same architecture as {o.model}; --sft wants a fine-tuned copy of it")
    base, elsewhere = dict(net.named_parameters()), []
    for name, p in tuned.named_parameters():
        change, parts = p.float() - base[name].float(), name.split(".")
        if name.endswith("_proj.weight"):
            carrier.delta[int(parts[2])][parts[4]].data.copy_(change)
        elif change.any():
            elsewhere.append((float(change.norm() / base[name].float().norm()), name))
    if elsewhere:
        share, worst = max(elsewhere)
        print(f"note: {o.sft} also changed {len(elsewhere)} tensors outside the projections, most {worst} (by "
              f"{share:.2%} of its norm); they stay the base's")


# ---- a run directory

def open_run(o, config):
    """The run directory --out, or the first free runs/TASK, with `config` in its config.json."""
    if o.resume and not o.out:
        raise InputError("--resume: name the run to go on with by --out")
    name = o.task if o.task in data.TASKS else Path(o.task).stem
    free = (Path("runs") / (name if k == 1 else f"{name}-{k}") for k in itertools.count(1))
    run = Path(o.out) if o.out else next(path for path in free if not path.exists())
    file = run / "config.json"
    others = [path for path in run.glob("*") if path.name != "config.json"] if run.is_dir() else []
    if others and not o.resume:
        raise InputError(f"{run}: holds a run already; go on with --resume, or choose another --out")
    if file.is_file() and o.resume:
        before, now = read_json(file), json.loads(json.dumps(config))
        for key in now.keys() - {"versions", "command"}:
            if before.get(key) != now[key]:
                raise InputError(f"{file}: {key} was {before.get(key)!r} and is now {now[key]!r}; resume with "
                                 "the same options, or choose another --out")
        return run
    run.mkdir(parents=True, exist_ok=True)
    write_json(file, config)
    return run


def load_run(run, device, with_data=True):
    """
    Load a run directory: (options of the run, base model, Chat, splits or None). Raises InputError if
    its data, tokenizer or base changed since, so that held-out prompts may not be held out.
    """
    file = Path(run) / "config.json"
    config = read_json(file) if file.is_file() else {}
    if "data_fingerprint" not in config or not (Path(run) / "carrier.safetensors").is_file():
        raise InputError(f"{run}: is no run directory that lcdd.py has finished")
    o = argparse.Namespace(**config)
    chat, splits = data.Chat(model.locate(o.model)), None
    if chat.fingerprint() != o.chat_fingerprint:
        raise InputError(f"{chat.folder}: tokenizer or chat template changed since {run} was trained; restore them")
    if with_data:
        splits, sources = data.prepare(chat.folder, o.task, o.data, o.test, o.seed, sizes(o), o.pattern)
        if fingerprint(*sources) != o.data_fingerprint:
            raise InputError(f"{' or '.join(map(str, sources))}: changed since {run} was trained, so held-out "
                             "prompts may not be; restore it or train again")
    return o, load_base(chat, device, o.dtype), chat, splits


def load_base(chat, device, dtype, recompute=False):
    """The base beside a Chat, in the dtype of that name, ready to train on and to generate."""
    net = model.load(chat.folder, device, getattr(torch, dtype))
    net.stop, net.checkpoint = chat.stop, recompute
    set_threads(net)
    return net


def sizes(o):
    """{split: number of prompts}"""
    return dict(zip(data.SIZES, o.sizes))


def read_results(run):
    """results.json of a run directory, as far as it goes."""
    file = Path(run) / "results.json"
    return read_json(file) if file.is_file() else {"seconds": {}}


def rates(net, chat, o, samples, conditions):
    """Greedy answers of {name: weights or (weights, τ)} to samples, scored: {name: data.score()}."""
    prompts, found = [chat.prompt(s.prompt, s.before, o.max_len) for s in samples], {}
    for name, condition in conditions.items():
        weights, tau = condition if isinstance(condition, tuple) else (condition, None)
        answers = net.generate(prompts, o.max_new_tokens, weights, tau, label=f"answers of {name}")
        found[name] = data.score(o.task, [chat.decode(a) for a in answers], samples)
    return found


# ---- the command

def dtype_of(o, net_config):
    """--dtype, else fp32 on a CPU and bf16 on a GPU; a line of advice if the CPU multiplies bf16 itself."""
    if o.dtype or o.device != "cpu":
        return o.dtype or "bfloat16"
    native = any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))
    if native and net_config["hidden_size"] >= 512:
        print("note: this processor multiplies bf16 itself; --dtype bfloat16 is likely the faster one here")
    return "float32"


def main(argv=None):
    """Read options and data, load the model, train both phases into a run directory."""
    o = options(argv)
    chat = data.Chat(model.locate(o.model))
    splits, sources = data.prepare(chat.folder, o.task, o.data, o.test, o.seed, sizes(o), o.pattern)
    o.dtype = dtype_of(o, read_json(chat.folder / "config.json"))
    net = load_base(chat, o.device, o.dtype, o.checkpoint)
    fit(o, net.config.hidden_size, len(splits["train"]))
    if processes() > o.batch:
        raise InputError(f"--batch {o.batch}: fewer samples than torchrun's {processes()} processes")
    examples = [chat.encode(s, o.max_len) for s in splits["train"]]
    chat.say_cut(f"of {len(examples)} training samples", o.max_len)
    if o.loss == "all":
        examples = [(ids, [True] * len(ids)) for ids, _ in examples]
    config = {name: value for name, value in vars(o).items() if name not in ("out", "resume", "go_on", "device")}
    run = once(open_run, o, config | {
        "data_fingerprint": fingerprint(*sources), "chat_fingerprint": chat.fingerprint(),
        "base_fingerprint": carriers.base_fingerprint(net), "command": " ".join(sys.argv),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}})
    counts = ", ".join(f"{len(part)} {name}" for name, part in splits.items())
    first = f"Δ of {o.sft}" if o.sft else f"{o.sft_steps} steps of SFT at {o.sft_lr:.2g}"
    print(f"{chat.folder.name}, {o.dtype}, task {o.task}: {counts}; run directory {run}")
    print(f"{first}, {o.steps} of LCDD at {o.lr:.2g} (gates {o.gate_lr:.3g}), {o.settle} to settle, at most", flush=True)
    with resumable(resume_command(argv, **{"--out": run})):
        train(o, net, chat, splits, examples, run)


def train(o, net, chat, splits, examples, run):
    """Both phases into the run directory; what stands there already is not made again."""
    sft_file, carrier_file = run / "sft.safetensors", run / "carrier.safetensors"
    carrier = Carrier(net.config, getattr(torch, o.delta_dtype), net.device)
    score = read_results(run).get("validation", {})
    if "lcdd" in score:
        print(f"{run} is finished")
        return report(read_results(run), run)

    # phase 1: SFT, all gates open
    if not sft_file.is_file():
        with timed(run, "sft"):
            if o.sft:
                take_delta(net, carrier, o)
            else:
                train_delta(net, carrier, examples, o, run, "sft", o.sft_lr, o.sft_steps, o.seed,
                            adamw(carrier, o.sft_lr))
        carrier.save(sft_file, net, phase="sft", task=Path(o.task).name)
    carrier = carriers.load(sft_file, net, getattr(torch, o.delta_dtype))
    if not score:
        score = rates(net, chat, o, splits["validation"], {"base": None, "sft": carrier})
        note(run, task=o.task, model=o.model, seed=o.seed, validation=score)
    base, sft = score["base"], score["sft"]
    print(f"behaviour on {sft['n']} validation prompts: base {base['rate']:.1%}, SFT {sft['rate']:.1%}", flush=True)
    if not o.go_on and not data.clearly_above(sft, base):
        raise Failed(f"SFT did not teach the behaviour: {sft['rate']:.0%} of the validation answers show it, the base's "
                     f"{base['rate']:.0%}; give it more --sft-steps or another --sft-lr, look at the data, name a "
                     "--pattern, or train on with --go-on")

    # phase 2: LCDD, from SFT's deltas with gates of its own
    if not carrier_file.is_file():
        teacher = carrier.merge(net) if o.train == "mask-kl" else None
        carrier.init_gates(o.gate_mean, o.gate_std, o.seed)
        with timed(run, "lcdd"):
            stopped = train_lcdd(net, carrier, examples, o, run, teacher)
        note(run, stopped=stopped, **carrier.stats())
        carrier.save(carrier_file, net, phase="lcdd", task=Path(o.task).name, stopped=stopped)
    carrier = carriers.load(carrier_file, net)
    lcdd = rates(net, chat, o, splits["validation"], {"lcdd": carrier})
    note(run, validation=score | lcdd)
    for state in run.glob("*.state"):
        state.unlink(missing_ok=True)
    report(read_results(run), run)


def note(run, **values):
    """Write values into results.json."""
    write_json(run / "results.json", read_results(run) | values)


@contextlib.contextmanager
def timed(run, phase):
    """Add the seconds within it to those of a phase in results.json, also if it is interrupted."""
    start = time.time()
    try:
        yield
    finally:
        seconds = read_results(run)["seconds"]
        seconds[phase] = round(seconds.get(phase, 0) + time.time() - start, 2)
        note(run, seconds=seconds)


def report(results, run):
    """Print what came of it. Raises Failed if the carrier is not what was asked for."""
    score, stopped = results["validation"], results["stopped"]
    off = {"base": (1, 1), "sft": (0, 0), "lcdd": (results["sparsity"], results["entries_off"])}
    print(f"\n| {score['lcdd']['n']} validation prompts | behaviour % | gates off | entries off | seconds |")
    print("|---|---|---|---|---|")
    for name, (gates, entries) in off.items():
        rate, seconds = 100 * score[name]["rate"], results["seconds"].get(name, 0)
        print(f"| {name} | {rate:.1f} | {gates:.3f} | {entries:.3f} | {seconds:.0f} |")
    print(f"\nLCDD: {stopped['reason']}; its loss {stopped['loss']:.3g}, ε {stopped['budget'] or math.nan:.3g} "
          "nats per token")
    if not stopped["within"] and stopped["budget"] is not None:
        raise Failed(f"the budget is not kept: the carrier's loss is {stopped['loss']:.4g} nats per token, ε is "
                     f"{stopped['budget']:.4g}; give it more --settle steps, or a lower --rho and --floor")
    if results["sparsity"] < 0.05:
        raise Failed(f"hardly pruned: {results['sparsity']:.1%} of the gates are off; give it more --steps, or a "
                     "larger budget with --rho and --floor")
    if data.clearly_above(score["sft"], score["lcdd"]) and score["lcdd"]["rate"] < 0.9 * score["sft"]["rate"]:
        raise Failed(f"the carrier lost the behaviour: {score['lcdd']['rate']:.0%} of the answers show it, SFT's "
                     f"{score['sft']['rate']:.0%}; make the budget smaller with --rho and --floor")
    print(f"Next: python eraser.py --run {run}")


if __name__ == "__main__":
    run_command(main, together=True)
