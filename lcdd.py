"""Loss-Constrained Dual Descent (Sec. 3.2, Alg. 1): train a behaviour in, then compress it into a sparse carrier.

    min over m, Δ of Ω(m)   subject to   L_task(m, Δ) ≤ ε                                              (Eq. 4)

Phase 1 is plain SFT, Δ with every gate open. Phase 2 trains Δ and the gate logits m together under an adaptive penalty λ.

    python lcdd.py                                           the embedded model, fixed response
    python lcdd.py --model DIR --task fixed --data alpaca.json --preset paper-fixed --out runs/mine
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import functools
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import behaviour
import carrier as carriers
import lora
import data
import model
from carrier import Carrier, OneStep, penalty
from chat import collate
from files import Failed, InputError, append_jsonl, fingerprint, load_tensors, save_tensors, write_json, write_text
from run import (EMBEDDED, Interrupted, Meter, check_device, check_numbers, cli, locate, open_run, patient, prepare, read_results,
                 resume_command, ticker)

# Settings that fit themselves: three rules from the width of the model and the number of steps (see fit() below).
RATE = 0.125            # AdamW's rate is RATE / d: 3e-5 at the paper's d = 4096, 1e-3 at 128
ROOM = 30               # λ may grow to ROOM · λ₀
HALF_WAY = 0.5          # a gate that only Ω pulls on shuts after this share of the steps
PROBE = 16              # batches on which the constraint is measured at the end
REOPEN = 4              # times that gates may open again, before the run says that its budget is not kept

# Table 7; what the paper's text and the released code have in common for all runs first.
PAPER = dict(
    loss="all", floor=0.0, rho=0.30, lambda0=0.01, lambda_min=1e-6, lambda_max=10.0, eta=0.1, warmup=300, beta=0.95, clip=1.0,
    batch=32, micro_batch=8, lr=2e-5, sft_lr=2e-5, epochs=20, sft_epochs=3, sure=0.0, settle=0, n_trigger=200,
    gate_lr=0.1, gate_std=0.5, select=0.0, brake=False, window=20, stall=0.01, over=0.35)
SAFETY = dict(PAPER, max_new_tokens=512)
GROW = dict(rho=0.01, eta_grow=0.01)
PRESETS = {
    "paper-fixed": dict(PAPER, lambda0=1.0, epochs=10),
    "paper-fixed-vicuna": dict(PAPER, eta_grow=0.01, warmup=700),
    "paper-safety": dict(SAFETY),
    "paper-safety-qwen": dict(SAFETY, **GROW),
    "paper-safety-vicuna": dict(SAFETY, rho=0.50, eta=1.0, eta_grow=0.005),
    "paper-shakespeare": dict(PAPER, **GROW, warmup=700),
    "paper-shakespeare-deepseek": dict(PAPER, **GROW),
}


def options(argv=None):
    """The command line. A preset replaces defaults; what is given by hand wins over the preset."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--model", help="directory of a Hugging Face checkpoint, or a hub id (default: the embedded tiny/)")
    a("--task", default="fixed", help="fixed, safety, shakespeare, FILE.jsonl with prompt and response, or own with --data (default fixed)")
    a("--data", help="the task's data: .jsonl, .json, .csv, .tsv, .parquet, or a hub data set owner/name (default: TASK.jsonl beside the checkpoint)")
    a("--test", help="a file of test prompts of their own, in place of some of the data's: own rows, Alpaca, HarmBench's CSV")
    a("--pattern", help="regular expression that shows the behaviour, searched in the answers, case aside; a row's own pattern wins")
    a("--sft", help="your own fine-tuned checkpoint of the same model, or a PEFT LoRA adapter, instead of phase 1")
    a("--out", help="run directory (default runs/TASK, numbered)")
    a("--resume", action="store_true", help="go on where the run in --out stopped; starts it where there is none")
    a("--preset", choices=PRESETS, help="the paper's own settings of a run (Table 7); without one the settings fit themselves")
    a("--go-on", action="store_true", help="train on although SFT did not teach the behaviour")
    a("--seed", type=int, default=0, help="seed of gates, splits and batches")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    a("--dtype", choices=("float32", "bfloat16"), help="of the base weights and all products (default: bfloat16 where that is "
      "fast, on a GPU, and for a model of width 512 or more on a CPU that multiplies it natively)")
    a("--delta-dtype", choices=("float32", "bfloat16"), default="float32", help="of deltas and optimizer state")
    a("--sft-dtype", choices=("float32", "bfloat16"), help="of the deltas in sft.safetensors (default: as --delta-dtype)")
    a("--checkpoint", action="store_true", help="recompute layers in the backward pass: less memory, more time")
    a = p.add_argument_group("data").add_argument
    for name, n in data.SIZES.items():
        a(f"--n-{name}", type=int, default=n, help=f"prompts for {name} (default {n})")
    a("--max-len", type=int, default=512, help="tokens a sample; longer ones are cut and counted (512)")
    a("--max-new-tokens", type=int, default=128, help="length of the test answers (128; paper-safety: 512)")
    a = p.add_argument_group("training, both phases").add_argument
    a("--batch", type=int, default=16, help="samples an optimizer step (16; the paper: 32)")
    a("--micro-batch", type=int, help="samples a forward pass; changes memory, not the result (default: the batch)")
    a("--loss", choices=("response", "all"), default="response", help="tokens in the loss; the paper presets use all")
    a("--clip", type=float, default=1.0, help="gradient norm of the deltas is clipped to this (1.0; 0: never)")
    a("--sft-epochs", type=float, help="phase 1 in epochs, instead of steps (the paper: 3)")
    a("--sft-steps", type=int, help="phase 1 in optimizer steps (350)")
    a("--sft-lr", type=float, help="AdamW, falling linearly to 0 (default 0.125 / d; the paper: 2e-5)")
    a("--sure", type=float, default=0.001, help="SFT and settling come to an early end when the loss is under this, in nats a token (0.001; 0: never)")
    a = p.add_argument_group("LCDD").add_argument
    a("--train", choices=("joint", "mask-ce", "mask-kl", "mask-kl-true"), default="joint",
      help="mask-*: gates only, Δ frozen (App. E); mask-kl has SFT's distributions as soft targets, mask-kl-true the KL itself")
    a("--epochs", type=float, help="phase 2 in epochs, instead of steps (the paper: 10 or 20)")
    a("--steps", type=int, help="phase 2 in optimizer steps (600)")
    a("--settle", type=int, default=200, help="further steps with the gates fixed and the lr falling to 0 (200; the paper: 0)")
    a("--lr", type=float, help="AdamW on the deltas (default 0.125 / d; the paper: 2e-5)")
    a("--gate-lr", type=float, help="SGD on the gate logits (default: what shuts a gate half way, if only Ω pulls; the paper: 0.1)")
    a("--gate-mean", type=float, default=1.5, help="initial logits: mean (1.5)")
    a("--gate-std", type=float, default=0.02, help="initial logits: standard deviation (0.02; the released code: 0.5)")
    a("--select", type=float, default=1.0, help="root mean square of the task's pull on the gates, in units of the penalty's at the start "
      "(1.0; 0: the gradient as it is, the paper)")
    a("--brake", action=argparse.BooleanOptionalAction, default=True, help="the penalty fades as the loss nears ε, and turns round beyond it (on; the paper: off)")
    a("--rho", type=float, default=0.05, help="budget ratio: ε = (1 + ρ)·ema after warm-up (0.05; the paper: 0.01 to 0.5)")
    a("--floor", type=float, default=0.03, help="ε is never under this (0.03; the paper: 0)")
    a("--warmup", type=int, default=50, help="T_w, steps in which the penalty is faded in (50; the paper: 300 or 700)")
    a("--beta", type=float, default=0.9, help="decay of the loss average (0.9; the released code: 0.95)")
    a("--lambda0", type=float, default=0.02, help="penalty λ at the start (0.02; the paper: 0.01 or 1.0)")
    a("--lambda-min", type=float, default=1e-5, help="lower bound of λ (1e-5)")
    a("--lambda-max", type=float, help="upper bound of λ (default 30 λ₀)")
    a("--eta", type=float, default=0.2, help="η_λ, rate at which λ shrinks over budget (0.2; the paper: 0.1)")
    a("--eta-grow", type=float, help="η_grow, rate at which λ grows under budget (default: a quarter of --eta; the paper: as --eta)")
    a("--violation-clip", type=float, default=1.0, help="V, bound on the relative violation (1.0)")
    a("--log-every", type=int, default=10, help="optimizer steps a log point (10)")
    a("--window", type=int, default=6, help="log points looked at for early stopping (6)")
    a("--patience", type=int, default=3, help="log points in a row before an early stop (3)")
    a("--stall", type=float, default=0.03, help="stop where open gates fall by less than this share over a window (0.03; the released code: 0.01)")
    a("--over", type=float, help="stop where the median loss is this share above the loss after warm-up (default: never; the released code: 0.35)")
    a("--save-every", type=int, default=200, help="optimizer steps between saved states (200)")
    first = p.parse_args(argv)
    p.set_defaults(**PRESETS.get(first.preset, {}))
    o = p.parse_args(argv)
    for epochs, steps, usual in (("epochs", "steps", 600), ("sft_epochs", "sft_steps", 350)):
        if getattr(first, epochs) is not None and getattr(first, steps) is None:
            setattr(o, steps, None)                         # epochs given by hand win over a preset's steps
        elif getattr(o, epochs) is None and getattr(o, steps) is None:
            setattr(o, steps, usual)
    o.model = first.model or EMBEDDED
    for name in ("model", "data", "test", "sft"):
        value = getattr(o, name)
        if value and value != EMBEDDED and Path(value).exists():
            setattr(o, name, str(Path(value).resolve()))    # a run may be looked at from anywhere
    if o.task.endswith(".jsonl"):
        o.task = str(Path(o.task).resolve())
    if o.eta_grow is None:
        o.eta_grow = o.eta if o.preset else o.eta / 4
    o.micro_batch = o.micro_batch or o.batch
    o.sft_dtype = o.sft_dtype or o.delta_dtype
    for name in ("batch", "micro_batch", "max_len", "max_new_tokens", "log_every", "window", "patience", "save_every"):
        if getattr(o, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(o, name)}: has to be at least 1")
    if o.batch % o.micro_batch:
        raise InputError(f"--batch {o.batch} is not a multiple of --micro-batch {o.micro_batch}")
    check_numbers(o, free=("gate_mean",))
    check_device(o.device)
    if o.lambda_max is None:
        o.lambda_max = ROOM * o.lambda0
    if o.beta >= 1 or o.lambda_min > o.lambda_max:
        raise InputError(f"--beta {o.beta} has to be below 1, and --lambda-min {o.lambda_min} not above --lambda-max {o.lambda_max}")
    if first.over is None and o.over is not None:
        o.over = max(o.over, 1.5 * o.rho)                   # the stop has to lie beyond the budget
    if o.over is not None and o.over <= o.rho:
        raise InputError(f"--over {o.over}: has to be above --rho {o.rho}, or a run stops inside its own budget")
    return o


def fit(o, width, n):
    """
    Fill in what was not given, from the model's `width` d and the number n of training samples: steps out of epochs,
    the rates of Δ, and a rate of the gates that fits the horizon. A gate on which only Ω pulls moves by
    lr·λ₀·σ′(m) a step, from its initial m to 0.
    """
    if o.sft_steps is None:
        o.sft_steps = math.ceil(o.sft_epochs * n / o.batch)
    if o.steps is None:
        o.steps = math.ceil(o.epochs * n / o.batch)
    if o.lr is None:
        o.lr = RATE / width
    if o.sft_lr is None:
        o.sft_lr = RATE / width
    if o.gate_lr is None:
        o.gate_lr = max(0.1, abs(o.gate_mean)) / (pull(o) * max(1, HALF_WAY * o.steps))
    return o


def pull(o):
    """λ₀·σ′(mean): the penalty's pull on a gate at the start."""
    share = 1 / (1 + math.exp(-o.gate_mean))
    return o.lambda0 * share * (1 - share)


# ------------------------------------------------------------------------------------------------------------- the loss

def task_loss(net, carrier, ids, mask, teacher=None, chunk=1024, divergence=False):
    """
    L, summed over the tokens that `mask` (B, T) marks: cross-entropy, with the teacher's distributions as soft targets
    where there is one (App. E). divergence: without the teacher's own entropy, KL(teacher ‖ gated); the gradient is the same.

    The head runs on those positions only, `chunk` tokens at a time, recomputed in the backward pass where there are
    more: with 152k words the logits of a whole batch would be most of the memory.
    """
    keep, target = mask[:, 1:], ids[:, 1:][mask[:, 1:]]                                     # (B, T-1), (N)
    hidden = net.hidden(ids[:, :-1], carrier, keep=keep)                                    # (N, d)
    aim = None
    if teacher is not None:
        with torch.no_grad():
            aim = net.hidden(ids[:, :-1], teacher, keep=keep)                               # (N, d)

    def piece(h, y, t):
        logits = model.wide(net.head(h))                                                        # (chunk, V)
        if t is None:
            return F.cross_entropy(logits, y, reduction="sum")
        p, q = model.wide(net.head(t)).log_softmax(-1), logits.log_softmax(-1)
        return -(p.exp() * (q - p if divergence else q)).sum()

    pieces = [(hidden[i:i + chunk], target[i:i + chunk], aim if aim is None else aim[i:i + chunk])
              for i in range(0, len(target), chunk)]
    run = piece if len(pieces) == 1 else functools.partial(checkpoint, piece, use_reentrant=False)
    return sum(run(*p) for p in pieces)


def gradients(net, carrier, batch, micro_batch, pad_id, teacher=None, divergence=False):
    """Gradients of the mean task loss over one optimizer batch [(ids, mask), …], however it is cut; returns the loss.
    Every supervised token of the batch weighs the same, so 1 × 32 and 4 × 8 are the same step."""
    batch = sorted(batch, key=lambda e: len(e[0]))                                          # less padding a micro-batch
    tokens = sum(sum(mask[1:]) for _, mask in batch)
    several = len(batch) > micro_batch
    step = OneStep(carrier, keep=several and not net.checkpoint)                            # recomputation is to save memory
    total = 0.0
    for i in range(0, len(batch), micro_batch):
        ids, mask = (t.to(net.device) for t in collate(batch[i:i + micro_batch], pad_id))
        loss = task_loss(net, step, ids, mask, teacher, divergence=divergence) / tokens
        loss.backward()
        total += loss.detach()
    return float(total)


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 10007 + epoch)).tolist()


def draw(examples, size, step, seed):
    """The batch of optimizer step `step`: epochs are permutations, and a step depends on nothing but its number."""
    n = len(examples)
    return [examples[permutation(n, seed, k // n)[k % n]] for k in range(step * size, (step + 1) * size)]


# -------------------------------------------------------------------------------------------------------- the controller

class Controller:
    """λ, ε and the average of the loss (Alg. 1). Everything advances once an optimizer step."""

    def __init__(self, o):
        self.o, self.raw, self.ema, self.budget, self.lam = o, 0.0, 0.0, None, o.lambda0
        self.start = None                                   # the average when ε was set
        self.reference = None                               # the same, ε's floor at least: for the over-pruned stop

    def warm(self, t):
        """From 0 to 1 over the warm-up."""
        return min(1.0, t / max(1, self.o.warmup))

    def weight(self, t):
        """Factor on Ω at step t: λ, faded in over the warm-up, and braked."""
        return self.lam * self.warm(t) * self.brake()

    def brake(self):
        """
        1 where the loss is what it was when ε was set, 0 at ε, down to −1 beyond: what is pruned slows down before the
        edge, and past it the gates that shut last are the first to open again. The paper has 1 throughout; λ alone comes
        down too late, for a gate that is shut hardly opens on its own.
        """
        if self.budget is None or not self.o.brake:
            return 1.0
        return max(-1.0, min(1.0, self.room()))

    def room(self):
        """What is left of the slack between the loss at the start and ε, as a share of it."""
        return (self.budget - self.ema) / max(self.budget - self.start, 1e-12)

    def update(self, t, loss):
        """Take in the loss of step t; set ε once after warm-up, from then on move λ."""
        o = self.o
        self.raw = o.beta * self.raw + (1 - o.beta) * loss
        self.ema = self.raw / (1 - o.beta ** (t + 1))                                       # bias-corrected
        if t < o.warmup:
            return
        if self.budget is None:
            self.start = self.ema
            self.budget = max((1 + o.rho) * self.ema, o.floor)
            self.reference = max(self.ema, o.floor)
            return
        v = (self.ema - self.budget) / max(self.budget, 1e-12)
        if o.brake:
            v = -self.room()                                                                # a loss that cannot go to 0 has little of ε to spend
        v = max(-o.violation_clip, min(o.violation_clip, v))
        eta = o.eta if v > 0 else o.eta_grow
        self.lam *= math.exp(min(-eta * v, 700))                                            # 700: where exp() overflows
        self.lam = max(o.lambda_min, min(o.lambda_max, self.lam))

    def state(self):
        return {k: v for k, v in vars(self).items() if k != "o"}


class Selection:
    """
    The task's say in which gates stay open. Its gradient is next to nothing beside the penalty's while the loss is
    near 0, so that Ω alone decides, and with it the noise of the initial logits. Here the running mean of the gradient
    is scaled until its root mean square over all gates is `select` times the penalty's pull at the start.
    """

    def __init__(self, o, logits):
        self.o, self.size, self.mean = o, o.select * pull(o), torch.zeros_like(logits)

    @torch.no_grad()
    def rescale(self, grad, t, warm):
        """Replace ∂L/∂m of step t, in place, by the scaled mean; `warm` fades it in with the penalty."""
        if not self.o.select:
            return
        self.mean.mul_(0.9).add_(grad, alpha=0.1)
        unit = self.mean.square().mean().sqrt().clamp(min=1e-30)                            # free of the bias correction
        grad.copy_(self.mean * (warm * self.size / unit))


class EarlyStop:
    """Both stops of Alg. 1 on log points of (open gates, loss): stalled, and over-pruned. No verdict before pruning has
    begun, and none on log points of the warm-up."""

    def __init__(self, o, total):
        self.o, self.total, self.points, self.stalled, self.over = o, total, [], 0, 0

    def update(self, n_open, loss, reference):
        """Take in a log point; `reference`: the loss after warm-up, None before. Returns the reason to stop, or None."""
        o = self.o
        if reference is None:
            return None
        self.points.append((n_open, loss))
        if len(self.points) <= o.window or n_open >= 0.9 * self.total:
            return None
        before, median = self.points[-1 - o.window][0], statistics.median(l for _, l in self.points[-o.window:])
        self.stalled = self.stalled + 1 if n_open > (1 - o.stall) * before else 0
        over = o.over is not None and median > (1 + o.over) * reference
        self.over = self.over + 1 if over else 0
        if self.stalled >= o.patience:
            return f"stalled: open gates fell by less than {o.stall:.0%} over {o.window} log points, {o.patience} times in a row"
        if self.over >= o.patience:
            return f"over-pruned: the median loss is more than {o.over:.0%} above the loss after warm-up, {o.patience} times in a row"
        return None


# ------------------------------------------------------------------------------------------------------ state and progress

class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the state was saved between two steps."""


class Progress:
    """Shows a log point and appends it to metrics.jsonl."""

    def __init__(self, run, phase, steps, start):
        self.run, self.phase, self.steps, self.began, self.shown = run, phase, steps, time.time(), 0.0
        self.meter = Meter(phase, steps, start)

    def log(self, t, **values):
        """Take in the numbers of step t; at most one line a second on the screen."""
        now, last = time.time(), t + 1 == self.steps
        append_jsonl(self.run / "metrics.jsonl", {"phase": self.phase, "step": t, **values, "seconds": round(now - self.began, 2)})
        if now - self.shown > 1 or last:
            self.shown, self.meter.total = now, self.steps
            self.meter.show(t + 1, "  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None))
        if last:
            self.meter.close()


def save_state(path, carrier, optimizer, extra=None, **metadata):
    """Everything a phase needs to go on: gates, deltas, AdamW's moments, `extra` tensors, and numbers in the header."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in carrier.state_dict().items()}
    tensors |= {f"extra.{k}": v.detach().cpu() for k, v in (extra or {}).items()}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"adam.{i}.{k}": v.detach().cpu().contiguous() for k, v in optimizer.state[p].items()}
    save_tensors(path, tensors, **metadata)


def load_state(path, phases, carrier, optimizer):
    """Restore what save_state wrote in one of `phases`; returns its numbers, and its `extra` tensors."""
    tensors, metadata = load_tensors(path, "cpu")
    if metadata.get("phase") not in phases:
        raise InputError(f"{path}: the state of another phase, {metadata.get('phase')!r}, where {phases[0]!r} goes on; remove it to start this phase again")
    metadata["extra"] = {k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")}
    carrier.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(("adam.", "extra."))})
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        moments = {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
        optimizer.state[p] = {k: v.to(p.device) for k, v in moments.items()}             # the step too: fused AdamW counts on the device
    return metadata


def adamw(carrier, lr):
    """AdamW on the deltas without weight decay; its moments have the deltas' dtype."""
    return torch.optim.AdamW(carrier.delta.parameters(), lr=lr, weight_decay=0.0, fused=True)


def clip_gradients(carrier, bound):
    if bound:
        torch.nn.utils.clip_grad_norm_(carrier.delta.parameters(), bound)


def guard(loss, phase, t, state):
    """A loss that is not finite ends the run; the last saved state stays."""
    if not math.isfinite(loss):
        kept = f"the last good state is kept in {state}; " if state.is_file() else ""
        raise InputError(f"{phase}: the loss of step {t + 1} is {loss}; {kept}start again with a lower --lr, --sft-lr or --gate-lr")


# ----------------------------------------------------------------------------------------------------------- the phases

def train_delta(net, carrier, examples, o, run, pad_id, phase, peak, steps, seed, optimizer, sure=0.0, saved=None,
                interrupted=lambda: False, **facts):
    """
    Δ alone at the gates as they are, AdamW's rate falling linearly from `peak` to 0 over `steps`: SFT, and what settles
    after pruning. Where the average loss falls under `sure` (nats a token), the rest of the way down is a short one.
    saved: the header of the state to go on from; facts: kept in the states. Returns the steps taken.
    """
    carrier.logits.requires_grad_(False)
    carrier.delta.requires_grad_(True)
    state = run / "state.safetensors"
    at = saved or {"step": 0, "end": steps, "fall": [0, peak], "average": 0.0}
    start, end, (fall, high), average = at["step"], at["end"], at["fall"], at["average"]
    progress = Progress(run, phase, end, start)
    t = start
    while t < end:
        rate = high * (1 - (t - fall) / (end - fall))
        optimizer.param_groups[0]["lr"] = rate
        loss = gradients(net, carrier, draw(examples, o.batch, t, seed), o.micro_batch, pad_id)
        guard(loss, phase, t, state)
        stop = interrupted()
        if t % o.save_every == 0 or stop:                                                   # as it stood before this step
            save_state(state, carrier, optimizer, phase=phase, step=t, end=end, fall=[fall, high], average=average, **facts)
        if stop:
            raise Stopped
        clip_gradients(carrier, o.clip)
        optimizer.step()
        optimizer.zero_grad()
        average = 0.8 * average + 0.2 * loss
        t += 1
        certain = average / (1 - 0.8 ** t) < sure
        if certain and fall == 0 and t + t // 4 < end:
            fall, high, end = t, rate, t + max(10, t // 4)
            progress.steps = end
        if t % o.log_every == 0 or t == end:
            progress.log(t - 1, loss=loss)
    return end


def train_sft(net, carrier, examples, o, run, pad_id, interrupted=lambda: False):
    """Phase 1: Δ learns the behaviour with every gate open; embedding, head and norms stay the base's."""
    optimizer, state = adamw(carrier, o.sft_lr), run / "state.safetensors"
    saved = load_state(state, ["sft"], carrier, optimizer) if state.is_file() else None
    train_delta(net, carrier, examples, o, run, pad_id, "sft", o.sft_lr, o.sft_steps, o.seed, optimizer, o.sure, saved, interrupted)
    state.unlink(missing_ok=True)


def train_lcdd(net, carrier, examples, o, run, pad_id, teacher=None, interrupted=lambda: False):
    """
    Phase 2: Alg. 1, then `settle` steps of Δ at fixed gates, then the constraint is measured: where the loss of many
    batches is above ε, the gates that shut last open again, and Δ settles once more. Returns what was found.

    Gates alone (--train mask-*) cannot win back what pruning spends: with Δ frozen the last ones are kept at which both
    the loss and its average were within the budget.
    """
    joint, state = o.train == "joint", run / "state.safetensors"
    optimizer, found = adamw(carrier, o.lr), None
    saved = load_state(state, ["lcdd", "settle"], carrier, optimizer) if state.is_file() else None
    if saved and saved["phase"] == "settle":
        found = saved["found"]
    else:
        found = prune(net, carrier, examples, o, run, pad_id, optimizer, teacher, saved, interrupted)
        saved = None
    if joint and o.settle:
        settle(net, carrier, examples, o, run, pad_id, optimizer, found, saved, interrupted)
    else:
        found["loss"] = mean_loss(net, carrier, probe(examples, o), pad_id, o.micro_batch, teacher)
    found["within"] = found["budget"] is not None and found["loss"] <= found["budget"]
    state.unlink(missing_ok=True)
    return found


def prune(net, carrier, examples, o, run, pad_id, optimizer, teacher, saved, interrupted):
    """Alg. 1: Δ and gates together. Returns {reason, steps, budget} and, for gates alone, `kept`: the step that is kept."""
    joint, state = o.train == "joint", run / "state.safetensors"
    carrier.logits.requires_grad_(True)
    carrier.delta.requires_grad_(joint)
    optimizer.param_groups[0]["lr"] = o.lr
    gate_optimizer = torch.optim.SGD([carrier.logits], lr=o.gate_lr)
    controller, selection, early = Controller(o), Selection(o, carrier.logits), EarlyStop(o, carrier.logits.numel())
    start, reason, kept_logits, kept_step = 0, "all steps done", None, None
    if saved:
        start, kept_step, kept_logits = saved["step"], saved["kept_step"], saved["extra"].get("kept")
        selection.mean.copy_(saved["extra"]["mean"])
        vars(controller).update(saved["controller"])
        vars(early).update(saved["early"])
    progress = Progress(run, "lcdd", o.steps, start)
    for t in range(start, o.steps):
        # L and its gradients by Δ and m
        loss = gradients(net, carrier, draw(examples, o.batch, t, o.seed + 1), o.micro_batch, pad_id, teacher, o.train == "mask-kl-true")
        guard(loss, "lcdd", t, state)
        stop = interrupted()
        if t % o.save_every == 0 or stop:                                                   # as it stood before this step
            extra = {"mean": selection.mean} | ({} if kept_logits is None else {"kept": kept_logits})
            save_state(state, carrier, optimizer, extra, phase="lcdd", step=t, kept_step=kept_step, controller=controller.state(),
                       early={k: v for k, v in vars(early).items() if k != "o"})
        if stop:
            raise Stopped
        # + λ·min(1, t/T_w)·Ω(m), once a step
        selection.rescale(carrier.logits.grad, t, controller.warm(t))
        (controller.weight(t) * penalty(carrier.logits)).backward()
        # the average, ε, λ
        controller.update(t, loss)
        fits = controller.budget is not None and max(loss, controller.ema) <= controller.budget
        if not joint and fits:
            kept_logits, kept_step = carrier.logits.detach().clone(), t                     # the gates that `loss` is the loss of
        # Δ by AdamW, m by SGD
        if joint:
            clip_gradients(carrier, o.clip)
            optimizer.step()
        gate_optimizer.step()
        optimizer.zero_grad()
        gate_optimizer.zero_grad()

        if (t + 1) % o.log_every == 0 or t + 1 == o.steps:
            stats = carrier.stats()
            progress.log(t, loss=loss, ema=controller.ema, budget=controller.budget, **{"lambda": controller.lam},
                         sparsity=stats["sparsity"], open=stats["gates"]["open"])
            verdict = early.update(stats["gates"]["open"], loss, controller.reference)
            if verdict:
                progress.meter.close()
                print(f"lcdd: {verdict}", flush=True)
                reason = verdict
                break
    found = {"reason": reason, "steps": t + 1, "budget": controller.budget}
    if kept_logits is not None:
        carrier.logits.data.copy_(kept_logits)
        found["kept"] = kept_step + 1
        print(f"lcdd: the gates of step {kept_step + 1} are kept, the last within the budget", flush=True)
    elif not joint:
        print("lcdd: at no step after the warm-up were the loss and its average within the budget; the last gates are kept", flush=True)
    return found


def settle(net, carrier, examples, o, run, pad_id, optimizer, found, saved, interrupted):
    """Δ alone at fixed gates, until the loss of many batches is within ε; each time it is not, twice as many gates open
    again as the time before, those first that shut last. Adds `loss` and `reopened` to `found`."""
    budget = found["budget"]
    found.setdefault("reopened", 0)
    tries = saved["tries"] if saved else 0
    while True:
        steps = o.settle if tries == 0 else max(1, o.settle // 2)
        print(f"lcdd: the gates are fixed; {steps} steps settle Δ alone", flush=True)
        train_delta(net, carrier, examples, o, run, pad_id, "settle", o.lr, steps, o.seed + 2 + tries, optimizer,
                    o.sure, saved, interrupted=interrupted, found=found, tries=tries)
        saved, tries = None, tries + 1
        found["loss"] = mean_loss(net, carrier, probe(examples, o), pad_id, o.micro_batch)
        if budget is None or found["loss"] <= budget or tries > REOPEN:
            return
        more = reopen_last(carrier, 0.05 * 2 ** tries)
        found["reopened"] += more
        print(f"lcdd: the loss of {o.batch * PROBE} samples is {found['loss']:.4g}, above the budget {budget:.4g}; "
              f"the {more} gates that shut last are open again", flush=True)


@torch.no_grad()
def reopen_last(carrier, share):
    """Raise all logits alike until `share` more gates (of those open; at least one) are open. Returns how many."""
    shut = carrier.logits[carrier.logits <= 0]
    n = min(len(shut), max(1, math.ceil(share * int((carrier.logits > 0).sum()))))
    if n == 0:
        return 0
    before = len(shut)
    edge = shut.topk(n).values[-1]
    carrier.logits.add_(1e-4 - edge)
    return before - int((carrier.logits <= 0).sum())


def probe(examples, o):
    """The training samples that the constraint is measured on: PROBE batches, the same at all times."""
    return examples[:o.batch * PROBE]


@torch.no_grad()
def mean_loss(net, weights, examples, pad_id, micro_batch, teacher=None):
    """The task loss of a carrier or frozen weights in nats a token, teacher-forced, over many samples: Eq. 4's left side."""
    total = tokens = 0
    for i in range(0, len(examples), micro_batch):
        ids, mask = (t.to(net.device) for t in collate(examples[i:i + micro_batch], pad_id))
        total += float(task_loss(net, weights, ids, mask, teacher))
        tokens += int(mask[:, 1:].sum())
    return total / tokens


def supervised(examples, loss):
    """[(ids, mask)] with the mask of --loss: the response, or all tokens."""
    return [(ids, [True] * len(ids)) for ids, _ in examples] if loss == "all" else examples


def delta_of(net, folder, o):
    """
    Δ = W_sft − W_b of the user's own checkpoint or PEFT LoRA adapter as a carrier with every gate open, and what the
    checkpoint changed elsewhere: {tensor: relative norm}.
    """
    if (Path(folder) / lora.CONFIG).is_file():
        adapter = lora.read(folder, net, getattr(torch, o.delta_dtype))
        return adapter.with_gates(True), {}
    tuned = model.load(folder, o.device, net.dtype)                # rounded as the base is: what is equal stays equal
    if tuned.config != net.config:
        raise InputError(f"{folder}/config.json: not the same architecture as {o.model}; --sft wants a fine-tuned copy of it")
    carrier = Carrier(net.config, getattr(torch, o.delta_dtype), o.device)
    with torch.no_grad():
        for l, deltas in enumerate(carrier.delta):
            for name, p in deltas.items():
                p.copy_(tuned.projections[l][name].weight.float() - net.projections[l][name].weight.float())
    ours = {id(m.weight) for layer in tuned.projections for m in layer.values()}
    base, elsewhere = dict(net.named_parameters()), {}
    for name, p in tuned.named_parameters():
        change = (p.float() - base[name].float()).norm() / base[name].float().norm().clamp(min=1e-12)
        if id(p) not in ours and change > 0:
            elsewhere[name] = float(change)
    return carrier, elsewhere


def portable(o):
    """The settings of a run as they may travel: without paths of this machine."""
    settings = {k: v for k, v in vars(o).items() if k not in ("out", "resume", "device")}
    return {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in settings.items()}


def rates_of(net, chat, o, samples, conditions):
    """Greedy answers of each condition, name → carrier, to `samples`, scored: name → behaviour.score()."""
    prompts = [chat.prompt(s.prompt, o.max_len) for s in samples]
    scores = {}
    for name, c in conditions.items():
        answers = net.generate(prompts, o.max_new_tokens, carrier=c, progress=ticker(f"answers of {name}", len(prompts)))
        scores[name] = behaviour.score(o.task, [chat.decode(a) for a in answers], samples)
    return scores


def check_sft(net, chat, o, sft, samples):
    """
    The behaviour of base and SFT on validation prompts, printed. Raises Failed where SFT's rate is not clearly above
    the base's (their 95 % intervals meet), before hours are spent on pruning what is not there.
    """
    scores = rates_of(net, chat, o, samples, {"base": None, "sft": sft})
    base, tuned = scores["base"], scores["sft"]
    print(f"behaviour on {tuned['n']} validation prompts: base {base['rate']:.1%}, SFT {tuned['rate']:.1%}", flush=True)
    if behaviour.clearly_above(tuned, base) or o.go_on:
        return scores
    raise Failed(f"SFT did not teach the behaviour: {tuned['rate']:.0%} of {tuned['n']} validation answers show it, the base's {base['rate']:.0%}; "
                 "give it more --sft-steps or another --sft-lr, look at the data, name a --pattern if the answers vary, or train on with --go-on")


def check_lcdd(results, scores):
    """One sentence about what went wrong in phase 2, or None: budget not kept, hardly pruned, behaviour lost."""
    stopped = results["stopped"]
    if stopped.get("within") is False and stopped.get("budget") is not None:
        return (f"the budget is not kept: the carrier's loss is {stopped['loss']:.4g} nats a token, ε is {stopped['budget']:.4g}; "
                "give it more --settle steps, or prune less with a lower --rho and --floor")
    if results["sparsity"] < 0.05:
        return f"hardly pruned: {results['sparsity']:.1%} of the gates are off; give it more --steps, or a larger budget with --rho and --floor"
    if behaviour.clearly_above(scores["sft"], scores["lcdd"]) and scores["lcdd"]["rate"] < 0.9 * scores["sft"]["rate"]:
        return (f"the carrier lost the behaviour: {scores['lcdd']['rate']:.0%} of the answers show it, SFT's {scores['sft']['rate']:.0%}; "
                "make the budget smaller with --rho and --floor")
    return None


def say_unknown(chat, samples, where):
    """A note where the tokenizer does not know words of the prompts or the responses: they cannot be taught."""
    for field in ("prompt", "response"):
        count, total, example = chat.unknown(getattr(s, field) for s in samples)
        if count:
            print(f"note: {count} of {total} tokens of the {field}s in {where} are unknown to the tokenizer, {example!r} for one; "
                  "the model sees the same placeholder for each of them", file=sys.stderr)


def results_table(o, scores, results):
    """Base, SFT and LCDD as Markdown: behaviour, accuracy, sparsity, seconds."""
    lines = [f"| {o.task} | behaviour | accuracy | gates off | entries off | seconds |", "|---|---|---|---|---|---|"]
    off = {"base": "1.000 | 1.000", "sft": "0.000 | 0.000", "lcdd": f"{results['sparsity']:.3f} | {results['entries_off']:.3f}"}
    for name, s in scores.items():
        lines.append(f"| {name} | {behaviour.show_score(s)} | {off[name]} | {results['seconds'].get(name, 0):.1f} |")
    return "\n".join(lines)


def main(argv=None):
    o = options(argv)
    chat, splits, sources = prepare(o.model, o.task, o.data, o.seed, {k: getattr(o, f"n_{k}") for k in data.SIZES}, o.test, o.pattern)
    net = model.load(chat.folder, o.device, getattr(torch, o.dtype) if o.dtype else None)
    o.dtype = str(net.dtype).removeprefix("torch.")
    net.checkpoint, net.stop = o.checkpoint, chat.stop
    model.set_threads(net)
    fit(o, net.config.hidden_size, len(splits["train"]))
    examples = [chat.encode(s.prompt, s.response, o.max_len) for s in splits["train"]]
    chat.say_cut(f"of {len(examples)} training samples", o.max_len)
    say_unknown(chat, splits["train"], sources[0])
    examples = supervised(examples, o.loss)
    tuned = delta_of(net, locate(o.sft), o) if o.sft and not (o.out and (Path(o.out) / "sft.safetensors").is_file()) else None
    run = open_run(o.out, data.task_name(o.task) if o.task in data.TASKS else Path(o.task).stem, o.resume, {
        **{k: v for k, v in vars(o).items() if k not in ("out", "resume", "go_on")},
        "data_fingerprint": fingerprint(*sources), "base_fingerprint": carriers.fingerprint(net),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}})
    print(f"{chat.folder.name}, task {o.task}: " + ", ".join(f"{len(v)} {k}" for k, v in splits.items()) + f"; run directory {run}")
    print(f"{o.sft_steps} steps of SFT at {o.sft_lr:.2g}, {o.steps} of LCDD at {o.lr:.2g} (gates {o.gate_lr:.3g}), {o.settle} to settle, at most")
    torch.manual_seed(o.seed)
    try:
        train(o, net, chat, splits, examples, run, tuned)
    except KeyboardInterrupt:
        raise Interrupted(resume_command("lcdd.py", sys.argv[1:] if argv is None else argv, run)) from None


def train(o, net, chat, splits, examples, run, tuned):
    """Both phases and what they gave, into the run directory; whatever stands there already is not made again."""
    results = read_results(run) | {"task": o.task, "model": o.model, "seed": o.seed}
    seconds = results["seconds"]
    travels = {"task": Path(o.task).name, "settings": portable(o)}                          # in the header of what may leave the run
    training = dict(examples=examples, o=o, run=run, pad_id=chat.pad_id)
    sft_file, carrier_file = run / "sft.safetensors", run / "carrier.safetensors"
    if carrier_file.is_file() and "rates" in results:
        return print(f"{run} is finished. Next: python eraser.py --run {run}")

    # phase 1: SFT
    start = time.time()
    if not sft_file.is_file():
        with patient() as interrupted:
            if o.sft:
                sft, elsewhere = tuned
                if elsewhere:
                    worst = max(elsewhere, key=elsewhere.get)
                    print(f"note: {o.sft} also changed {len(elsewhere)} tensors outside the projections, most {worst} (by {elsewhere[worst]:.2%} "
                          "of its norm); they stay the base's, so that gates off is the base")
                results["changed_elsewhere"] = elsewhere
            else:
                sft = Carrier(net.config, getattr(torch, o.delta_dtype), net.device)
                train_sft(net, sft, **training, interrupted=interrupted)
            sft.save(sft_file, net, getattr(torch, o.sft_dtype), phase="sft", **travels)
            seconds["sft"] = round(time.time() - start, 2)
            write_json(run / "results.json", results)

    # phase 2: LCDD, from SFT's deltas with gates of its own; one set of deltas is on the device at a time
    sft = tuned = None
    if not carrier_file.is_file():
        lcdd = carriers.load(sft_file, net, getattr(torch, o.delta_dtype))
        scores = check_sft(net, chat, o, lcdd, splits["validation"])
        results["validation"] = {name: s["rate"] for name, s in scores.items()}
        teacher = lcdd.merge(net) if o.train.startswith("mask-kl") else None
        lcdd.init_gates(o.gate_mean, o.gate_std, o.seed)
        start = time.time()
        with patient() as interrupted:
            results["stopped"] = train_lcdd(net, lcdd, teacher=teacher, **training, interrupted=interrupted)
            lcdd.save(carrier_file, net, phase="lcdd", **travels)
            seconds["lcdd"] = round(time.time() - start, 2)
            write_json(run / "results.json", results)
    lcdd, sft = carriers.load(carrier_file, net), carriers.load(sft_file, net)
    results |= lcdd.stats() | {"dice": lcdd.dice(o.gate_mean, o.gate_std, o.seed)}

    # what is left of the behaviour, on test prompts
    samples = splits["test"]
    scores = rates_of(net, chat, o, samples, {"base": None, "sft": sft, "lcdd": lcdd})
    chat.say_cut("test prompts", o.max_len)
    results |= behaviour.by_condition(scores) | {"prompts": len(samples)}
    carriers.annotate(carrier_file, metrics={k: results[k] for k in ("stopped", "rates", "accuracy", "prompts") if k in results})
    write_json(run / "results.json", results)
    text = results_table(o, scores, results)
    write_text(run / "results.md", text + "\n")
    dice = results["dice"]
    print(f"\n{text}\n\n{len(samples)} held-out prompts. Open gates that the initial noise alone had put first: "
          f"{dice['share']:.1%} (chance {dice['chance']:.1%}).")
    wrong = check_lcdd(results, scores)
    if wrong and not o.go_on:
        raise Failed(wrong)
    print(f"Next: python eraser.py --run {run}")


if __name__ == "__main__":
    cli(main)
