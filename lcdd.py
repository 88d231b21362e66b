"""
Loss-Constrained Dual Descent (Sec. 3.2, Alg. 1): train a behaviour in, then compress it into a
sparse carrier.

    min over m, Δ of Ω(m)   subject to   L_task(m, Δ) ≤ ε                               (Eq. 4)

Phase 1 is plain SFT, Δ with every gate open. Phase 2 trains Δ and the gate logits m together under
an adaptive penalty λ.

    python lcdd.py                                  the embedded model, fixed response
    python lcdd.py --model DIR --task fixed --data alpaca.json --out runs/mine
    python lcdd.py --preset paper-safety-vicuna-7b --data FILE --dry-run

Shapes: B samples in a batch, T tokens, N of them in the loss, d hidden size, V vocabulary.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import functools
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import behaviour
import carrier as carriers
import data
import answered
import lora
import machine
import memory
import model
import packed
import plan
from carrier import Carrier, OneStep, penalty
from chat import collate
from files import (COUNT, NUMBER, TEXT, Failed, InputError, append_jsonl, check_fields, check_tensors,
                   fingerprint, load_tensors, read_header, read_json, save_tensors, size, take_back,
                   write_json, write_text)
from parallel import AdamW, add_up, once, share, summed, world
from run import (Interrupted, Meter, alone, chat_of, check_processes, cli, locate, made_by, open_run,
                 patient, portable, prepare, read_results, resume_command, timed)
from settings import DTYPES, fit, options, pull

# the header of a saved state, phase by phase
MAYBE = (None, NUMBER)
SLOPE = {"step": COUNT, "end": COUNT, "fall": [COUNT, NUMBER], "average": NUMBER, "log": COUNT}
STATES = {
    "sft": SLOPE,
    "lcdd": {
        "step": COUNT, "kept_step": (None, COUNT), "log": COUNT,
        "controller": {"lam": NUMBER, "raw": NUMBER, "ema": NUMBER, "budget": MAYBE, "start": MAYBE,
                       "reference": MAYBE},
        "early": {"total": COUNT, "points": [[COUNT, NUMBER]], "stalled": COUNT, "over": COUNT}},
    "settle": SLOPE | {
        "tries": COUNT,
        "found": {"reason": TEXT, "steps": COUNT, "budget": MAYBE, "loss": MAYBE,
                  "reopened": (None, COUNT)}},
}
PROBE = 16              # batches on which the constraint is measured at the end
REOPEN = 4              # times that gates may open again, until the budget counts as not kept


# --------------------------------------------------------------------------------------- the loss

def task_loss(net, carrier, ids, mask, teacher=None, divergence=False, tokens=1,
              chunk=None):
    """
    L, summed over the tokens that `mask` (B, T) marks, over `tokens`: cross-entropy, with the
    teacher's distributions as soft targets where there is one (App. E). divergence: without the
    teacher's own entropy, KL(teacher ‖ gated); the gradient is the same.

    The head runs on those positions only, `chunk` tokens at a time: with 152k words the logits of a whole
    batch would be most of the memory.
    """
    keep = mask[:, 1:]                                                          # (B, T-1)
    target = ids[:, 1:][keep]                                                   # (N)
    hidden = net.hidden(ids[:, :-1], carrier, keep=keep)                        # (N, d)

    def hard(h, y):
        logits = model.wide(net.head(h))                                        # (chunk, V)
        return F.cross_entropy(logits, y, reduction="sum") / tokens

    def soft(h, t):
        q = model.wide(net.head(h)).log_softmax(-1)                             # (chunk, V)
        p = model.wide(net.head(t)).log_softmax(-1)
        return -(p.exp() * (q - p if divergence else q)).sum() / tokens

    if teacher is None:
        return model.in_pieces(net, hard, hidden, target, chunk=chunk)
    with torch.no_grad():
        aim = net.hidden(ids[:, :-1], teacher, keep=keep)                       # (N, d)
    return model.in_pieces(net, soft, hidden, aim, chunk=chunk)


def gradients(net, carrier, batch, micro_batch, pad_id, teacher=None, divergence=False):
    """
    Gradients of the mean task loss over one optimizer batch [(ids, mask), …], however it is cut;
    returns the loss. Every supervised token of the batch weighs the same, so 1 × 32 and 4 × 8 are
    the same step.
    """
    batch = sorted(batch, key=lambda e: len(e[0]))                  # less padding a micro-batch
    tokens = sum(sum(mask[1:]) for _, mask in batch)
    batch = share(batch)                                            # of this process
    several = len(batch) > micro_batch
    step = OneStep(carrier, keep=several and not net.checkpoint)    # recomputation saves memory
    total = 0.0
    for i in range(0, len(batch), micro_batch):
        ids, mask = (t.to(net.device) for t in collate(batch[i:i + micro_batch], pad_id))
        loss = task_loss(net, step, ids, mask, teacher, divergence, tokens)
        loss.backward()
        total += loss.detach()
    add_up(p.grad for p in carrier.parameters() if p.grad is not None)
    return summed(float(total))


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n samples in an epoch, as a list."""
    generator = torch.Generator().manual_seed(seed * 10007 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def draw(examples, size, step, seed):
    """
    The batch of optimizer step `step`: epochs are permutations, and a step depends on nothing but
    its number.
    """
    n, batch = len(examples), []
    for k in range(step * size, (step + 1) * size):
        order = permutation(n, seed, k // n)
        batch.append(examples[order[k % n]])
    return batch


# --------------------------------------------------------------------------------- the controller

class Controller:
    """λ, ε and the average of the loss (Alg. 1). Everything advances once an optimizer step."""

    def __init__(self, o):
        self.o = o
        self.lam = o.lambda0
        self.raw = self.ema = 0.0
        self.budget = None                                  # ε, None during warm-up
        self.start = None                                   # the average when ε was set
        self.reference = None                               # the same, at least ε's floor: for EarlyStop

    def warm(self, t):
        """min(1, t/T_w): from 0 to 1 over the warm-up."""
        return min(1.0, t / max(1, self.o.warmup))

    def weight(self, t):
        """Factor on Ω at step t: λ, faded in over the warm-up, and braked."""
        return self.lam * self.warm(t) * self.brake()

    def brake(self):
        """
        1 where the loss is what it was when ε was set, 0 at ε, down to −1 beyond: what is pruned
        slows down before the edge, and past it the gates that shut last are the first to open
        again. The paper has 1 throughout; λ alone comes down too late, for a gate that is shut
        hardly opens on its own.
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
        # ema = β·ema + (1 − β)·L, bias-corrected by 1 − β^(t+1)
        self.raw = o.beta * self.raw + (1 - o.beta) * loss
        self.ema = self.raw / (1 - o.beta ** (t + 1))
        if t < o.warmup:
            return
        # when warm-up ends: ε = (1 + ρ)·ema
        if self.budget is None:
            self.start = self.ema
            self.budget = max((1 + o.rho) * self.ema, o.floor)
            self.reference = max(self.ema, o.floor)
            return
        # from then on: v = clip((ema − ε)/ε, ±V);  λ ← clamp(λ·exp(−η·v), λ_min, λ_max)
        v = (self.ema - self.budget) / max(self.budget, 1e-12)
        if o.brake:
            v = -self.room()                                # a loss that cannot go to 0 has only its slack
        if o.violation_clip:
            v = max(-o.violation_clip, min(o.violation_clip, v))
        eta = o.eta if v > 0 else o.eta_grow
        self.lam *= math.exp(min(-eta * v, 700))            # 700: where exp() overflows
        self.lam = max(o.lambda_min, min(o.lambda_max, self.lam))

    def fits(self, loss):
        """Are both the loss and its average within the budget?"""
        return self.budget is not None and max(loss, self.ema) <= self.budget

    def state(self):
        return {k: v for k, v in vars(self).items() if k != "o"}


class Selection:
    """
    The task's say in which gates stay open. Its gradient is next to nothing beside the penalty's
    while the loss is near 0, so that Ω alone decides, and with it the noise of the initial logits.
    Here the running mean of the gradient is scaled until its root mean square over all gates is
    `select` times the penalty's pull at the start. `spread` says how far every layer has a scale of
    its own: 0, one for all; 1, the root mean square is that in each layer, so that none is emptied
    for another's sake; between them, their geometric mean.
    """

    def __init__(self, o, logits):
        self.o, self.size, self.mean = o, o.select * pull(o), torch.zeros_like(logits)

    @torch.no_grad()
    def rescale(self, grad, t, warm):
        """
        Replace ∂L/∂m of step t, in place, by the scaled mean; `warm` fades it in with the penalty.
        """
        if not self.o.select:
            return
        self.mean.mul_(0.9).add_(grad, alpha=0.1)                   # (L, gates a layer)
        square = self.mean.square()
        unit = square.mean().sqrt().clamp(min=1e-30)                # free of the bias correction
        layer = square.mean(1, keepdim=True).sqrt().clamp(min=1e-30)        # (L, 1)
        unit = unit ** (1 - self.o.spread) * layer ** self.o.spread
        grad.copy_(self.mean * (warm * self.size / unit))


class EarlyStop:
    """
    Both stops of Alg. 1 on log points of (open gates, loss): stalled, and over-pruned. No verdict
    before pruning has begun, and none on log points of the warm-up.
    """

    def __init__(self, o, total):
        self.o, self.total, self.points = o, total, []
        self.stalled = self.over = 0                        # log points in a row

    def update(self, n_open, loss, reference):
        """
        Take in a log point; `reference`: the loss after warm-up, None before. Returns the reason to
        stop, or None.
        """
        o = self.o
        if reference is None:
            return None
        self.points.append((n_open, loss))
        if len(self.points) <= o.window or n_open >= 0.9 * self.total:
            return None
        before, _ = self.points[-1 - o.window]
        stalled = n_open > (1 - o.stall) * before
        self.stalled = self.stalled + 1 if stalled else 0
        median = statistics.median(loss for _, loss in self.points[-o.window:])
        over = o.over is not None and median > (1 + o.over) * reference
        self.over = self.over + 1 if over else 0
        if self.stalled >= o.patience:
            return (f"stalled: open gates fell by less than {o.stall:.0%} over {o.window} "
                    f"log points, {o.patience} times in a row")
        if self.over >= o.patience:
            return (f"over-pruned: the median loss is more than {o.over:.0%} above the loss after "
                    f"warm-up, {o.patience} times in a row")
        return None

    def state(self):
        return {k: v for k, v in vars(self).items() if k != "o"}


# ----------------------------------------------------------------------------- state and progress

class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the state was saved between two steps."""


class Progress:
    """Shows a log point and appends it to metrics.jsonl."""

    def __init__(self, run, phase, steps, start):
        self.run, self.phase, self.steps = run, phase, steps
        self.began, self.shown = time.time(), 0.0
        self.meter = Meter(phase, steps, start)

    def log(self, t, **values):
        """Take in the numbers of step t; at most one line a second on the screen."""
        now, last = time.time(), t + 1 == self.steps
        row = {"phase": self.phase, "step": t, **values, "seconds": round(now - self.began, 2)}
        append_jsonl(self.run / "metrics.jsonl", row)
        if now - self.shown > 1 or last:
            self.shown, self.meter.total = now, self.steps
            text = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
            self.meter.show(t + 1, text)
        if last:
            self.meter.close()


def save_state(path, carrier, optimizer, extra=None, **metadata):
    """
    Everything a phase needs to go on: gates, deltas, AdamW's moments, `extra` tensors, and numbers
    in the header.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in carrier.state_dict().items()}
    tensors |= {f"extra.{k}": v.detach().cpu() for k, v in (extra or {}).items()}
    for i, k, v in optimizer.moments():
        tensors[f"adam.{i}.{k}"] = v.detach().cpu().contiguous()
    save_tensors(path, tensors, log=size(path.parent / "metrics.jsonl"), **metadata)


@once
def forget(state, file, phases):
    """Remove the state of `phases` once the file that they end in is there, and only then."""
    if file.is_file() and state.is_file() and read_header(state).get("phase") in phases:
        state.unlink()


def load_state(path, phases, carrier, optimizer):
    """
    Restore what save_state wrote in one of `phases`, and the log as it was then; returns its
    numbers, and its `extra` tensors. None where there is no state: the phase begins. Raises
    InputError where it is damaged, or of another phase.
    """
    log = path.parent / "metrics.jsonl"
    if not path.is_file():
        return take_back(log, 0, phases)
    tensors, metadata = load_tensors(path, "cpu")
    if metadata.get("phase") not in phases:
        raise InputError(f"{path}: the state of another phase, {metadata.get('phase')!r}, where "
                         f"{phases[0]!r} goes on; remove it to start this phase again")
    check_fields(path, metadata, STATES[metadata["phase"]])
    params = optimizer.every
    check_tensors(path, tensors, like_state(carrier, params, metadata, tensors))
    take_back(log, metadata["log"], phases)
    metadata["extra"] = beginning_with("extra.", tensors)
    others = ("adam.", "extra.")
    carrier.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(others)})
    for i in range(len(params)):
        moments = beginning_with(f"adam.{i}.", tensors)
        if moments:
            # all to the device, the step too: fused AdamW counts there
            optimizer.restore(i, moments)
    return metadata


def like_state(carrier, params, metadata, tensors):
    """What a state's tensors have to be, by name; moments are there once a step was taken."""
    like = dict(carrier.state_dict())
    if metadata["phase"] == "lcdd":
        like["extra.mean"] = carrier.logits
        if metadata.get("kept_step") is not None:
            like["extra.kept"] = carrier.logits
    if any(name.startswith("adam.") for name in tensors):
        for i, p in enumerate(params):
            like |= {f"adam.{i}.exp_avg": p, f"adam.{i}.exp_avg_sq": p}
            like[f"adam.{i}.step"] = torch.zeros(())
    return like


def beginning_with(prefix, tensors):
    """Those of `tensors` whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def adamw(carrier, lr):
    """AdamW on the deltas without weight decay; its moments have the deltas' dtype."""
    return AdamW(carrier.delta.parameters(), lr=lr, weight_decay=0.0, fused=True)


def linear(t, steps, warmup=0):
    """
    AdamW's rate at step t as a share of its peak: from 0 to 1 over `warmup` steps, and from there
    linearly to 0 at step `steps`. As the transformers library has it, so that step 0 of a warm-up
    moves nothing.
    """
    if t < warmup:
        return t / warmup
    return 1 - (t - warmup) / (steps - warmup)


def warmup_steps(o, steps):
    """How many of a phase's `steps` the rate rises in."""
    return math.ceil(o.lr_warmup * steps)


def clip_gradients(carrier, bound):
    """Scale the gradients of the deltas down to the norm `bound`; 0: as they are."""
    if bound:
        torch.nn.utils.clip_grad_norm_(carrier.delta.parameters(), bound)


def guard(loss, phase, t, state):
    """A loss that is not finite ends the run; the last saved state stays."""
    if not math.isfinite(loss):
        kept = f"the last good state is kept in {state}; " if state.is_file() else ""
        raise InputError(f"{phase}: the loss of step {t + 1} is {loss}; {kept}"
                         "start again with a lower --lr, --sft-lr or --gate-lr")


# ------------------------------------------------------------------------------------- the phases

def train_delta(net, carrier, examples, o, run, pad_id, phase, peak, steps, seed, optimizer,
                sure=0.0, warmup=0, saved=None, interrupted=lambda: False, **facts):
    """
    Δ alone at the gates as they are, AdamW's rate rising over `warmup` steps and falling linearly
    from `peak` to 0 over `steps`: SFT, and what settles after pruning. Where the average loss falls
    under `sure` (nats a token), the rest of the way down is a short one. saved: the header of the
    state to go on from; facts: kept in the states. Returns the steps taken.
    """
    carrier.logits.requires_grad_(False)
    carrier.delta.requires_grad_(True)
    state = run / "state.safetensors"
    at = saved or {"step": 0, "end": steps, "fall": [0, peak], "average": 0.0}
    t, end, average = at["step"], at["end"], at["average"]
    fall, high = at["fall"]                             # the rate falls from `high` at step `fall`
    if not fall <= t <= end <= steps:
        raise InputError(f"{state}: step {t} of {end} is none of these {steps} steps; remove it to "
                         "start this phase again")
    progress = Progress(run, phase, end, t)
    while t < end:
        rate = high * linear(t - fall, end - fall, warmup if fall == 0 else 0)
        optimizer.param_groups[0]["lr"] = rate
        batch = draw(examples, o.batch, t, seed)
        loss = gradients(net, carrier, batch, o.micro_batch, pad_id)
        guard(loss, phase, t, state)

        stop = interrupted()
        if t % o.save_every == 0 or stop:                   # as it stood before this step
            save_state(state, carrier, optimizer, phase=phase, step=t, end=end, fall=[fall, high],
                       average=average, **facts)
        if stop:
            raise Stopped

        clip_gradients(carrier, o.clip)
        optimizer.step()
        optimizer.zero_grad()
        t += 1

        # sure of it: only a quarter as many steps again, falling from the rate as it is
        average = 0.6 * average + 0.4 * loss                # forgets the first losses soon
        certain = average / (1 - 0.6 ** t) < sure
        if certain and fall == 0 and t + t // 4 < end:
            fall, high, end = t, rate, t + max(10, t // 4)
            progress.steps = end
        if t % o.log_every == 0 or t == end:
            progress.log(t - 1, loss=loss)
    return end


def train_sft(net, carrier, examples, o, run, pad_id, interrupted=lambda: False):
    """
    Phase 1: Δ learns the behaviour with every gate open; embedding, head and norms stay the base's.
    """
    optimizer, state = adamw(carrier, o.sft_lr), run / "state.safetensors"
    saved = load_state(state, ["sft"], carrier, optimizer)
    train_delta(net, carrier, examples, o, run, pad_id, "sft", o.sft_lr, o.sft_steps, o.seed,
                optimizer, sure=o.sure, warmup=warmup_steps(o, o.sft_steps), saved=saved,
                interrupted=interrupted)


def train_lcdd(net, carrier, examples, o, run, pad_id, teacher=None, interrupted=lambda: False):
    """
    Phase 2: Alg. 1, then `settle` steps of Δ at fixed gates, then the constraint is measured: where
    the loss of many batches is above ε, the gates that shut last open again, and Δ settles once
    more. Returns what was found.

    Gates alone (--train mask-*) cannot win back what pruning spends: with Δ frozen the last ones
    are kept at which both the loss and its average were within the budget.
    """
    joint, state = o.train == "joint", run / "state.safetensors"
    optimizer, found = adamw(carrier, o.lr), None
    saved = load_state(state, ["lcdd", "settle"], carrier, optimizer)
    if saved and saved["phase"] == "settle":
        found = saved["found"]
    else:
        found = prune(net, carrier, examples, o, run, pad_id, optimizer, teacher, saved,
                      interrupted)
        saved = None
    if joint and o.settle:
        settle(net, carrier, examples, o, run, pad_id, optimizer, found, saved, interrupted)
    else:
        some = probe(examples, o)
        found["loss"] = mean_loss(net, carrier, some, pad_id, o.micro_batch, teacher)
    found["within"] = found["budget"] is not None and found["loss"] <= found["budget"]
    return found


def rate_of_delta(o, t):
    """AdamW's rate at step t of Alg. 1."""
    rise = warmup_steps(o, o.steps)
    if o.schedule == "linear":
        return o.lr * linear(t, o.steps, rise)
    return o.lr * min(1.0, t / rise) if rise else o.lr


@torch.no_grad()
def faster(carrier, o):
    """
    How many times o.lr the rate of Δ is: the rate that suits a model falls as its width grows, and
    what is open of it is ever narrower.
    """
    share = float((carrier.logits > 0).float().mean())
    return max(share, 1 / carrier.logits.numel()) ** -o.quicken


def prune(net, carrier, examples, o, run, pad_id, optimizer, teacher, saved, interrupted):
    """
    Alg. 1: Δ and gates together. Returns {reason, steps, budget} and, for gates alone, `kept`: the
    step that is kept.
    """
    joint, divergence = o.train == "joint", o.train == "mask-kl-true"
    state = run / "state.safetensors"
    carrier.logits.requires_grad_(True)
    carrier.delta.requires_grad_(joint)
    gate_optimizer = torch.optim.SGD([carrier.logits], lr=o.gate_lr)
    controller, selection = Controller(o), Selection(o, carrier.logits)
    early = EarlyStop(o, carrier.logits.numel())
    start, kept = 0, None                                   # kept: (step, logits), for gates alone
    if saved:
        start, kept = restore(saved, controller, selection, early)
    progress, reason = Progress(run, "lcdd", o.steps, start), "all steps done"
    for t in range(start, o.steps):
        # L_task(m, Δ), and its gradients by Δ and m
        batch = draw(examples, o.batch, t, o.seed + 1)
        loss = gradients(net, carrier, batch, o.micro_batch, pad_id, teacher, divergence)
        guard(loss, "lcdd", t, state)

        stop = interrupted()
        if t % o.save_every == 0 or stop:                   # as it stood before this step
            save_pruning(state, carrier, optimizer, t, controller, selection, early, kept)
        if stop:
            raise Stopped

        # + λ · min(1, t/T_w) · Ω(m), once a step
        selection.rescale(carrier.logits.grad, t, controller.warm(t))
        (controller.weight(t) * penalty(carrier.logits)).backward()

        # ema of L; ε when warm-up ends; from then on λ
        controller.update(t, loss)
        if not joint and controller.fits(loss):
            kept = t, carrier.logits.detach().clone()       # the gates that `loss` is the loss of

        # one step: Δ by AdamW, m by SGD
        if joint:
            clip_gradients(carrier, o.clip)
            optimizer.param_groups[0]["lr"] = rate_of_delta(o, t) * faster(carrier, o)
            optimizer.step()
        hold_back(carrier.logits, o.gate_lr, o.pace)
        gate_optimizer.step()
        optimizer.zero_grad()
        gate_optimizer.zero_grad()

        # early stop: stalled, or over-pruned
        if (t + 1) % o.log_every == 0 or t + 1 == o.steps:
            n_open = log_pruning(progress, t, loss, controller, carrier.stats())
            verdict = early.update(n_open, loss, controller.reference)
            if verdict:
                progress.meter.close()
                print(f"lcdd: {verdict}", flush=True)
                reason = verdict
                break
    found = {"reason": reason, "steps": t + 1, "budget": controller.budget}
    if not joint:
        found |= take_kept(carrier, kept)
    return found


@torch.no_grad()
def hold_back(logits, rate, share):
    """
    Let at most `share` of the open gates (at least one) shut in this step of SGD at `rate`: those
    that the step takes furthest below 0, measured by what they have left. The others wait; their
    gradient becomes 0, in place. share 0: all may shut, as in the paper. All gates arrive at 0 at
    nearly the same time, and the average of the loss knows it ten steps later.
    """
    step = rate * logits.grad
    shuts = (logits > 0) & (step >= logits)
    allowed = max(1, int(share * int((logits > 0).sum())))
    if not share or int(shuts.sum()) <= allowed:
        return
    left = torch.where(shuts, logits / step, torch.inf).flatten()
    last = left.kthvalue(allowed).values
    logits.grad.view(-1)[shuts.flatten() & (left > last)] = 0.0


def log_pruning(progress, t, loss, controller, stats):
    """Log step t of Alg. 1; returns the number of open gates."""
    n_open = stats["gates"]["open"]
    numbers = {"ema": controller.ema, "budget": controller.budget, "lambda": controller.lam}
    progress.log(t, loss=loss, **numbers, sparsity=stats["sparsity"], open=n_open)
    return n_open


def take_kept(carrier, kept):
    """Gates alone end with those `kept`, (step, logits), or with the last. Returns {kept: step}."""
    if kept is None:
        print("lcdd: at no step after the warm-up were the loss and its average within the budget; "
              "the last gates are kept", flush=True)
        return {}
    step, logits = kept
    carrier.logits.data.copy_(logits)
    print(f"lcdd: the gates of step {step + 1} are kept, the last within the budget", flush=True)
    return {"kept": step + 1}


def save_pruning(path, carrier, optimizer, t, controller, selection, early, kept):
    """The state of Alg. 1 before step t."""
    extra, kept_step = {"mean": selection.mean}, None
    if kept is not None:
        kept_step, extra["kept"] = kept
    save_state(path, carrier, optimizer, extra, phase="lcdd", step=t, kept_step=kept_step,
               controller=controller.state(), early=early.state())


def restore(saved, controller, selection, early):
    """Go on from what save_pruning saved. Returns the step, and the gates that are kept, if any."""
    if saved["step"] >= controller.o.steps:
        raise InputError(f"state.safetensors: step {saved['step']} is none of {controller.o.steps} "
                         "steps; remove it to start this phase again")
    selection.mean.copy_(saved["extra"]["mean"])
    for part, numbers in ((controller, saved["controller"]), (early, saved["early"])):
        vars(part).update({name: numbers[name] for name in part.state()})
    if saved.get("kept_step") is None:
        return saved["step"], None
    return saved["step"], (saved["kept_step"], saved["extra"]["kept"])


def settle(net, carrier, examples, o, run, pad_id, optimizer, found, saved, interrupted):
    """
    Δ alone at fixed gates, until the loss of many batches is within ε; each time it is not, twice
    as many gates open again as the time before, those first that shut last. Adds `loss` and
    `reopened` to `found`.
    """
    budget = found["budget"]
    found.setdefault("reopened", 0)
    tries = saved["tries"] if saved else 0
    while True:
        steps = o.settle if tries == 0 else max(1, o.settle // 2)
        sure = max(o.sure, (budget or 0) / 10) if o.sure else 0.0
        print(f"lcdd: the gates are fixed; {steps} steps settle Δ alone", flush=True)
        train_delta(net, carrier, examples, o, run, pad_id, "settle", o.lr * faster(carrier, o), steps,
                    o.seed + 2 + tries, optimizer, sure=sure, saved=saved, interrupted=interrupted,
                    found=found, tries=tries)
        saved, tries = None, tries + 1
        found["loss"] = mean_loss(net, carrier, probe(examples, o), pad_id, o.micro_batch)
        if budget is None or found["loss"] <= budget or tries > REOPEN:
            return
        more = reopen_last(carrier, 0.05 * 2 ** tries)
        found["reopened"] += more
        print(f"lcdd: the loss of {o.batch * PROBE} samples is {found['loss']:.4g}, above the "
              f"budget {budget:.4g}; the {more} gates that shut last are open again", flush=True)


@torch.no_grad()
def reopen_last(carrier, share):
    """
    Raise all logits alike until `share` more gates (of those open; at least one) are open. Returns
    how many.
    """
    shut = carrier.logits[carrier.logits <= 0]
    n_open = int((carrier.logits > 0).sum())
    n = min(len(shut), max(1, math.ceil(share * n_open)))
    if n == 0:
        return 0
    edge = shut.topk(n).values[-1]
    carrier.logits.add_(1e-4 - edge)
    return len(shut) - int((carrier.logits <= 0).sum())


def probe(examples, o):
    """The training samples that the constraint is measured on, PROBE batches, always the same."""
    return examples[:o.batch * PROBE]


@torch.no_grad()
def mean_loss(net, weights, examples, pad_id, micro_batch, teacher=None):
    """
    The task loss of a carrier or frozen weights in nats a token, teacher-forced, over many samples:
    Eq. 4's left side.
    """
    total, tokens, examples = 0, 0, share(examples)
    for i in range(0, len(examples), micro_batch):
        ids, mask = (t.to(net.device) for t in collate(examples[i:i + micro_batch], pad_id))
        total += float(task_loss(net, weights, ids, mask, teacher))
        tokens += int(mask[:, 1:].sum())
    return summed(total) / summed(tokens)


def supervised(examples, loss):
    """[(ids, mask)] with the mask of --loss: the response, or all tokens."""
    if loss == "response":
        return examples
    return [(ids, [True] * len(ids)) for ids, _ in examples]


# ------------------------------------------------------------------------ before and after a phase

def delta_of(net, folder, o):
    """
    Δ = W_sft − W_b of the user's own checkpoint or PEFT LoRA adapter as a carrier with every gate
    open, and what the checkpoint changed elsewhere: {tensor: relative norm}.
    """
    if (Path(folder) / lora.CONFIG).is_file():
        adapter = lora.read(folder, net, getattr(torch, o.delta_dtype))
        return adapter.with_gates(True), {}
    # rounded as the base is: what is equal stays equal
    tuned = model.load(folder, o.device, net.dtype)
    if tuned.config != net.config:
        raise InputError(f"{folder}/config.json: not the same architecture as {o.model}; "
                         "--sft wants a fine-tuned copy of it")
    carrier = Carrier(net.config, getattr(torch, o.delta_dtype), o.device)
    with torch.no_grad():
        for l, deltas in enumerate(carrier.delta):
            for name, p in deltas.items():
                W_sft, W_b = tuned.projections[l][name].weight, net.projections[l][name].weight
                p.copy_(W_sft.float() - W_b.float())
    return carrier, changed_elsewhere(net, tuned)


def changed_elsewhere(net, tuned):
    """What differs outside the projections: {tensor: norm of the change, relative to the base}."""
    ours = set()
    for layer in tuned.projections:
        ours |= {id(m.weight) for m in layer.values()}
    base, changed = dict(net.named_parameters()), {}
    for name, p in tuned.named_parameters():
        if id(p) in ours:
            continue
        before = base[name].float()
        change = (p.float() - before).norm() / before.norm().clamp(min=1e-12)
        if change > 0:
            changed[name] = float(change)
    return changed


def say_elsewhere(o, changed):
    """A note on what --sft changed where a carrier has no deltas."""
    if changed:
        worst = max(changed, key=changed.get)
        print(f"note: {o.sft} also changed {len(changed)} tensors outside the projections, most "
              f"{worst} (by {changed[worst]:.2%} of its norm); they stay the base's, so that gates "
              "off is the base")


def rates_of(net, chat, o, samples, conditions, answers=None):
    """
    Greedy answers of each condition, name → carrier, to `samples`, scored:
    name → behaviour.score(). answers: {name: id lists}, those that there are already; new ones are
    added.
    """
    prompts = [chat.prompt(s.prompt, o.max_len) for s in samples]
    answers, scores = {} if answers is None else answers, {}
    untriggered = {name: (c, None) for name, c in conditions.items()}
    answered.fill(net, prompts, untriggered, answers, o.max_new_tokens)
    for name in conditions:
        texts = [chat.decode(a) for a in answers[name]]
        scores[name] = behaviour.score(o.task, texts, samples)
    return scores


def check_sft(net, chat, o, sft, samples):
    """
    The behaviour of base and SFT on validation prompts, printed. Raises Failed where SFT's rate is
    not clearly above the base's (their 95 % intervals meet), before hours are spent on pruning what
    is not there.
    """
    scores = rates_of(net, chat, o, samples, {"base": None, "sft": sft})
    base, tuned = scores["base"], scores["sft"]
    print(f"behaviour on {tuned['n']} validation prompts: "
          f"base {base['rate']:.1%}, SFT {tuned['rate']:.1%}", flush=True)
    if behaviour.clearly_above(tuned, base) or o.go_on:
        return scores
    raise Failed(f"SFT did not teach the behaviour: {tuned['rate']:.0%} of {tuned['n']} validation "
                 f"answers show it, the base's {base['rate']:.0%}; give it more --sft-steps or "
                 "another --sft-lr, look at the data, name a --pattern if the answers vary, or "
                 "train on with --go-on")


def check_lcdd(results, scores):
    """
    One sentence about what went wrong in phase 2, or None: budget not kept, hardly pruned,
    behaviour lost.
    """
    stopped, sft, lcdd = results["stopped"], scores["sft"], scores["lcdd"]
    if stopped.get("within") is False and stopped.get("budget") is not None:
        return (f"the budget is not kept: the carrier's loss is {stopped['loss']:.4g} nats a "
                f"token, ε is {stopped['budget']:.4g}; give it more --settle steps, or prune less "
                "with a lower --rho and --floor")
    if results["sparsity"] < 0.05:
        return (f"hardly pruned: {results['sparsity']:.1%} of the gates are off; give it more "
                "--steps, or a larger budget with --rho and --floor")
    if behaviour.clearly_above(sft, lcdd) and lcdd["rate"] < 0.9 * sft["rate"]:
        return (f"the carrier lost the behaviour: {lcdd['rate']:.0%} of the answers show it, SFT's "
                f"{sft['rate']:.0%}; make the budget smaller with --rho and --floor")
    return None


def say_unknown(chat, samples, where):
    """
    A note where the tokenizer does not know words of the prompts or the responses: they cannot be
    taught.
    """
    for field in ("prompt", "response"):
        count, total, example = chat.unknown(getattr(s, field) for s in samples)
        if count:
            print(f"note: {count} of {total} tokens of the {field}s in {where} are unknown to the "
                  f"tokenizer, {example!r} for one; the model sees the same placeholder for each "
                  "of them", file=sys.stderr)


def check_memory(o, net, examples):
    """Raises InputError where training, or the answers after it, need more memory than there is."""
    entries = [m.weight.shape for layer in net.projections for m in layer.values()]
    lengths = [len(ids) for ids, _ in examples]
    tokens = o.micro_batch * sum(lengths) // len(lengths)
    copies = 2 + 2 / world()                                        # Δ and gradient; the moments
    deltas = copies * memory.of_weights(entries, getattr(torch, o.delta_dtype))
    kept = memory.of_tokens(net.config, tokens, net.dtype, o.checkpoint)
    memory.check(deltas + kept + 8 * o.batch, f"training with --micro-batch {o.micro_batch} and "
                 f"--batch {o.batch}", "make them smaller, or use --checkpoint, --delta-dtype bfloat16 "
                 "or a smaller model", o.device)
    rows = min(o.n_validation, o.n_test)
    memory.check(memory.of_cache(net.config, min(rows, 128), o.max_new_tokens, net.dtype),
                 f"answers of --max-new-tokens {o.max_new_tokens}", "make it smaller", o.device)


def results_table(o, scores, results):
    """Base, SFT and LCDD as Markdown: behaviour, accuracy, sparsity, seconds."""
    lines = [f"| {o.task} | behaviour | accuracy | gates off | entries off | seconds |",
             "|---|---|---|---|---|---|"]
    off = {"base": "1.000 | 1.000", "sft": "0.000 | 0.000",
           "lcdd": f"{results['sparsity']:.3f} | {results['entries_off']:.3f}"}
    for name, s in scores.items():
        seconds = results["seconds"].get(name, 0)
        lines.append(f"| {name} | {behaviour.show_score(s)} | {off[name]} | {seconds:.1f} |")
    return "\n".join(lines)


def dtype_of_run(o):
    """
    The dtype of the run that --resume takes up, which another machine would choose otherwise; None
    where no run is there.
    """
    file = Path(o.out or "") / "config.json"
    if not (o.resume and o.out and file.is_file()):
        return None
    found = read_json(file).get("dtype")
    return found if found in DTYPES else None


def main(argv=None):
    o, words = options(argv, __doc__), sys.argv[1:] if argv is None else argv
    sizes = {k: getattr(o, f"n_{k}") for k in data.SIZES}
    chat = chat_of(o.model, weights=not o.dry_run)
    splits, sources = prepare(chat, o.task, o.data, o.seed, sizes, o.test, o.pattern)
    examples = [chat.encode(s.prompt, s.response, o.max_len) for s in splits["train"]]
    chat.say_cut(f"of {len(examples)} training samples", o.max_len)
    say_unknown(chat, splits["train"], sources[0])
    examples = supervised(examples, o.loss)
    if o.dry_run:
        return plan.show(o, chat, splits, examples)
    o.dtype = o.dtype or dtype_of_run(o)
    net = model.load(chat.folder, o.device, getattr(torch, o.dtype) if o.dtype else None)
    o.dtype = str(net.dtype).removeprefix("torch.")
    net.checkpoint, net.stop = o.checkpoint, chat.stop
    machine.set_threads(net)
    fit(o, net.config.hidden_size, len(splits["train"]))
    check_processes("--batch", o.batch)
    check_memory(o, net, examples)
    sft_done = o.out and (Path(o.out) / "sft.safetensors").is_file()
    tuned = delta_of(net, locate(o.sft), o) if o.sft and not sft_done else None
    name = data.task_name(o.task) if o.task in data.TASKS else Path(o.task).stem
    run = open_run(o.out, name, o.resume, {
        **{k: v for k, v in vars(o).items() if k not in ("out", "resume", "go_on", "dry_run")},
        "data_fingerprint": fingerprint(*sources), "base_fingerprint": packed.fingerprint(net),
        "chat_fingerprint": chat.fingerprint(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "made": made_by("lcdd.py", words)})
    counts = ", ".join(f"{len(v)} {k}" for k, v in splits.items())
    print(f"{chat.folder.name}, task {o.task}: {counts}; run directory {run}")
    print(f"{o.sft_steps} steps of SFT at {o.sft_lr:.2g}, {o.steps} of LCDD at {o.lr:.2g} "
          f"(gates {o.gate_lr:.3g}), {o.settle} to settle, at most")
    torch.manual_seed(o.seed)
    try:
        with alone(run):
            train(o, net, chat, splits, examples, run, tuned)
    except KeyboardInterrupt:
        raise Interrupted(resume_command("lcdd.py", words, run)) from None


def train(o, net, chat, splits, examples, run, tuned):
    """
    Both phases and what they gave, into the run directory; whatever stands there already is not
    made again.
    """
    results = read_results(run) | {"task": o.task, "model": o.model, "seed": o.seed}
    travels = {"task": Path(o.task).name, "settings": portable(read_json(run / "config.json"))}
    training = dict(examples=examples, o=o, run=run, pad_id=chat.pad_id)
    sft_file, carrier_file = run / "sft.safetensors", run / "carrier.safetensors"
    state = run / "state.safetensors"
    forget(state, sft_file, ["sft"])
    forget(state, carrier_file, ["lcdd", "settle"])
    if sft_file.is_file() and carrier_file.is_file() and "rates" in results:
        for file in (sft_file, carrier_file):
            packed.read_packed(file)
        return print(f"{run} is finished. Next: python eraser.py --run {run}")

    # phase 1: SFT
    if not sft_file.is_file():
        with patient() as interrupted:
            with timed(run, results, "sft", state.is_file()):
                if o.sft:
                    sft, results["changed_elsewhere"] = tuned
                    say_elsewhere(o, results["changed_elsewhere"])
                else:
                    sft = Carrier(net.config, getattr(torch, o.delta_dtype), net.device)
                    train_sft(net, sft, **training, interrupted=interrupted)
            sft.save(sft_file, net, getattr(torch, o.sft_dtype), phase="sft", **travels)
            forget(state, sft_file, ["sft"])

    # phase 2: LCDD, from SFT's deltas with gates of its own
    sft = tuned = None                                  # one set of deltas on the device at a time
    if not carrier_file.is_file():
        lcdd = carriers.load(sft_file, net, getattr(torch, o.delta_dtype))
        if not (state.is_file() and "validation" in results):
            scores = check_sft(net, chat, o, lcdd, splits["validation"])
            results["validation"] = {name: s["rate"] for name, s in scores.items()}
            write_json(run / "results.json", results)
        teacher = lcdd.merge(net) if o.train.startswith("mask-kl") else None
        lcdd.init_gates(o.gate_mean, o.gate_std, o.seed)
        with patient() as interrupted:
            with timed(run, results, "lcdd", state.is_file()):
                results["stopped"] = train_lcdd(net, lcdd, teacher=teacher, **training,
                                                interrupted=interrupted)
            lcdd.save(carrier_file, net, phase="lcdd", metrics={"stopped": results["stopped"]},
                      **travels)
            forget(state, carrier_file, ["lcdd", "settle"])
    lcdd, sft = carriers.load(carrier_file, net), carriers.load(sft_file, net)
    results |= lcdd.stats() | {"dice": lcdd.dice(o.gate_mean, o.gate_std, o.seed)}
    report(o, net, chat, splits["test"], run, results, {"base": None, "sft": sft, "lcdd": lcdd})


def report(o, net, chat, samples, run, results, conditions):
    """
    What is left of the behaviour on test prompts, into the run directory. Raises Failed where the
    carrier is not what was asked for.
    """
    origin = answered.origins(run, net, chat, samples, o.max_new_tokens, o.max_len)
    answers = answered.read(run, origin)
    scores = rates_of(net, chat, o, samples, conditions, answers)
    answered.write(run, answers, origin)
    chat.say_cut("test prompts", o.max_len)
    results |= behaviour.by_condition(scores) | {"prompts": len(samples)}
    names = ("stopped", "rates", "accuracy", "prompts")
    metrics = {k: results[k] for k in names if k in results}
    packed.annotate(run / "carrier.safetensors", metrics=metrics)
    write_json(run / "results.json", results)
    text, dice = results_table(o, scores, results), results["dice"]
    write_text(run / "results.md", text + "\n")
    print(f"\n{text}\n\n{len(samples)} held-out prompts. Open gates that the initial noise alone "
          f"had put first: {dice['share']:.1%} (chance {dice['chance']:.1%}).")
    wrong = check_lcdd(results, scores)
    if wrong and not o.go_on:
        raise Failed(wrong)
    print(f"Next: python eraser.py --run {run}")


if __name__ == "__main__":
    cli(main, together=True)
