"""
What SFT and LCDD share: the task loss and its gradients, batches, steps, the state that is saved,
and the loop that moves Δ alone.

A step depends on its number, the seed and the state, so that a run that was stopped goes on as if
it had not been.

Shapes: B samples in a batch, T tokens, N of them in the loss, d hidden size, V vocabulary.
"""
import functools
import math
import time

import torch
import torch.nn.functional as F

import model
from carrier import OneStep
from chat import collate
from files import (COUNT, NUMBER, TEXT, InputError, append_jsonl, check_fields, check_tensors,
                   load_tensors, read_header, save_tensors, size, take_back)
from parallel import AdamW, add_up, once, share, summed
from console import Meter

# the header of a saved state, phase by phase
MAYBE = (None, NUMBER)
SLOPE = {"step": COUNT, "end": COUNT, "fall": [COUNT, NUMBER], "average": NUMBER, "log": COUNT}
STATES = {
    "sft": SLOPE,
    "lcdd": {
        "step": COUNT, "kept_step": (None, COUNT), "chance": (None, COUNT), "log": COUNT,
        "controller": {"lam": NUMBER, "raw": NUMBER, "ema": NUMBER, "budget": MAYBE, "start": MAYBE,
                       "reference": MAYBE, "highest": NUMBER},
        "early": {"total": COUNT, "points": [[COUNT, NUMBER]], "stalled": COUNT, "over": COUNT}},
    "settle": SLOPE | {
        "tries": COUNT,
        "found": {"reason": TEXT, "steps": COUNT, "budget": MAYBE, "loss": MAYBE,
                  "reopened": (None, COUNT)}},
}
PROBE = 16              # batches on which the constraint is measured at the end


# --------------------------------------------------------------------------------------- the loss

def task_loss(net, carrier, ids, mask, teacher=None, divergence=False, tokens=1, chunk=None):
    """
    L, summed over the tokens that `mask` (B, T) marks, over `tokens`: cross-entropy, with the
    teacher's distributions as soft targets where there is one (App. E). divergence: without the
    teacher's own entropy, KL(teacher ‖ gated); the gradient is the same.

    The head runs on those positions only, `chunk` tokens at a time: with 152k words the logits of a
    whole batch would be most of the memory.
    """
    keep = mask[:, 1:]                                                          # (B, T-1)
    target = ids[:, 1:][keep]                                                   # (N)
    hidden = net.hidden(ids[:, :-1], carrier, keep=keep)                        # (N, d)

    def hard(h, y):
        """Cross-entropy with the tokens y (chunk), after hidden states h (chunk, d)."""
        logits = model.wide(net.head(h))                                        # (chunk, V)
        return F.cross_entropy(logits, y, reduction="sum") / tokens

    def soft(h, t):
        """The same with the distributions of the teacher's hidden states t (chunk, d)."""
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


@torch.no_grad()
def mean_loss(net, weights, examples, pad_id, micro_batch, teacher=None, divergence=False):
    """
    The task loss of a carrier or frozen weights in nats a token, teacher-forced, over many samples:
    Eq. 4's left side. teacher, divergence: as in task_loss().
    """
    total, tokens, examples = 0, 0, share(examples)
    for i in range(0, len(examples), micro_batch):
        ids, mask = (t.to(net.device) for t in collate(examples[i:i + micro_batch], pad_id))
        total += float(task_loss(net, weights, ids, mask, teacher, divergence))
        tokens += int(mask[:, 1:].sum())
    return summed(total) / summed(tokens)


@torch.no_grad()
def losses(net, weights, examples, pad_id, micro_batch, progress=None):
    """
    Sample by sample: the task loss summed over its tokens, and how many these are. (n, 2), float64
    """
    found = torch.zeros(len(examples), 2, dtype=torch.float64)
    for i in range(0, len(examples), micro_batch):
        ids, mask = (t.to(net.device) for t in collate(examples[i:i + micro_batch], pad_id))
        keep = mask[:, 1:]                                                              # (B, T-1)
        hidden = net.hidden(ids[:, :-1], weights, keep=keep)                            # (N, d)
        each = []
        for h, y in zip(hidden.split(net.chunk), ids[:, 1:][keep].split(net.chunk)):
            each.append(F.cross_entropy(model.wide(net.head(h)), y, reduction="none"))  # (chunk)
        row = i + keep.nonzero()[:, 0].cpu()                                            # (N)
        found[:, 0].index_add_(0, row, torch.cat(each).double().cpu())
        found[i:i + len(ids), 1] = keep.sum(1).double().cpu()
        if progress:
            progress(min(i + micro_batch, len(examples)))
    return found


# ------------------------------------------------------------------------------------ the batches

def supervised(examples, loss):
    """[(ids, mask)] with the mask of --loss: the response, or all tokens."""
    if loss == "response":
        return examples
    return [(ids, [True] * len(ids)) for ids, _ in examples]


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


def probe(examples, o):
    """The training samples that the constraint is measured on, PROBE batches, always the same."""
    return examples[:o.batch * PROBE]


# -------------------------------------------------------------------------------------- the steps

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


# ----------------------------------------------------------------------------- state and progress

class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the state was saved between two steps."""


class Progress:
    """Shows a log point and appends it to metrics.jsonl."""

    def __init__(self, run, phase, steps, start):
        """`start`: the step that a phase of `steps` begins or goes on with, for the time left."""
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
        if metadata.get("chance"):
            size_of = metadata["chance"], 2
            like["extra.chance"] = torch.empty(size_of, dtype=torch.float64, device="meta")
    if any(name.startswith("adam.") for name in tensors):
        for i, p in enumerate(params):
            like |= {f"adam.{i}.exp_avg": p, f"adam.{i}.exp_avg_sq": p}
            like[f"adam.{i}.step"] = torch.zeros(())
    return like


def beginning_with(prefix, tensors):
    """Those of `tensors` whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@once
def forget(state, file, phases):
    """Remove the state of `phases` once the file that they end in is there, and only then."""
    if file.is_file() and state.is_file() and read_header(state).get("phase") in phases:
        state.unlink()


# --------------------------------------------------------------------------------------- the loop

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
