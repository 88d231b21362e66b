"""Loss-Constrained Dual Descent (Sec. 3.2, Alg. 1): train a behaviour in, then compress it into a sparse carrier.

    min over m, Δ of Ω(m)   subject to   L_task(m, Δ) ≤ ε                                              (Eq. 4)

Phase 1 is plain SFT, Δ with every gate open. Phase 2 trains Δ and the gate logits m together under an adaptive penalty λ.

    python lcdd.py                                           the embedded model, fixed response
    python lcdd.py --model DIR --task fixed --data alpaca.json --preset paper-fixed --out runs/mine
"""
import argparse
import functools
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import behaviour
import carrier as carriers
import data
import model
from carrier import Carrier, penalty
from chat import collate
from files import InputError, append_jsonl, fingerprint, load_tensors, save_tensors, write_json
from run import EMBEDDED, check_device, check_numbers, cli, locate, open_run, patient, prepare, read_results, ticker

# Table 7, and what the embedded world wants: hundreds of steps instead of thousands, so a faster mask and controller.
PAPER = dict(loss="all", floor=0.0, rho=0.30, lambda0=0.01, eta=0.1, warmup=300, epochs=20, sft_epochs=3, n_trigger=200)   # 200: App. F.3
SAFETY = dict(PAPER, max_new_tokens=512)
GROW = dict(rho=0.01, eta_grow=0.01)
TINY = dict(loss="response", micro_batch=32, max_len=64, max_new_tokens=32, beta=0.9, gate_lr=2.0, lr=1e-3, rho=0.3, eta=0.2, eta_grow=0.05,
            lambda0=0.02, lambda_max=0.02, warmup=60, log_every=5)
PRESETS = {
    "tiny-fixed": dict(TINY, sft_steps=150, sft_lr=5e-4, floor=0.06, steps=500, settle=100),
    "tiny-safety": dict(TINY, sft_steps=250, sft_lr=7e-4, floor=0.03, steps=500, settle=100),
    "tiny-shakespeare": dict(TINY, sft_steps=350, sft_lr=1e-3, floor=0.03, steps=425, settle=300, beta=0.8, lr=2e-3, gate_lr=8.0,
                             lambda0=0.005, lambda_max=0.005, over=1.0),
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
    a("--task", default="fixed", help="fixed, safety, shakespeare, or FILE.jsonl with prompt and response (default fixed)")
    a("--data", help="the task's data; default: TASK.jsonl beside the checkpoint")
    a("--sft", help="your own fine-tuned checkpoint of the same model, instead of phase 1")
    a("--out", help="run directory (default runs/TASK, numbered)")
    a("--resume", action="store_true", help="go on where the run in --out stopped; starts it where there is none")
    a("--preset", choices=PRESETS, help="named settings: tiny-* (default without --model), paper-* (Table 7)")
    a("--seed", type=int, default=0, help="seed of gates, splits and batches")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    a("--dtype", choices=("float32", "bfloat16"), help="of the base weights (default bfloat16 on cuda, float32 on cpu)")
    a("--delta-dtype", choices=("float32", "bfloat16"), default="float32", help="of deltas and optimizer state")
    a("--checkpoint", action="store_true", help="recompute layers in the backward pass: less memory, more time")
    a = p.add_argument_group("data").add_argument
    for name, n in data.SIZES.items():
        a(f"--n-{name}", type=int, default=n, help=f"prompts for {name} (default {n})")
    a("--max-len", type=int, default=512, help="tokens a sample; longer ones are cut and counted (512)")
    a("--max-new-tokens", type=int, default=128, help="length of the test answers (128; paper-safety: 512)")
    a = p.add_argument_group("training, both phases").add_argument
    a("--batch", type=int, default=32, help="samples an optimizer step (32)")
    a("--micro-batch", type=int, default=8, help="samples a forward pass; changes memory, not the result (8)")
    a("--loss", choices=("response", "all"), default="response", help="tokens in the loss; the paper presets use all")
    a("--clip", type=float, default=1.0, help="gradient norm of the deltas is clipped to this (1.0; 0: never)")
    a("--sft-epochs", type=float, help="phase 1 (3)")
    a("--sft-steps", type=int, help="phase 1 in optimizer steps, instead of epochs")
    a("--sft-lr", type=float, default=2e-5, help="AdamW, falling linearly to 0 (2e-5)")
    a = p.add_argument_group("LCDD").add_argument
    a("--train", choices=("joint", "mask-ce", "mask-kl"), default="joint", help="mask-*: gates only, Δ frozen (App. E)")
    a("--epochs", type=float, help="phase 2 (20)")
    a("--steps", type=int, help="phase 2 in optimizer steps, instead of epochs")
    a("--settle", type=int, default=0, help="further steps with the gates fixed and the lr falling to 0 (0)")
    a("--lr", type=float, default=2e-5, help="AdamW on the deltas (2e-5)")
    a("--gate-lr", type=float, default=0.1, help="SGD on the gate logits (0.1)")
    a("--gate-mean", type=float, default=1.5, help="initial logits: mean (1.5)")
    a("--gate-std", type=float, default=0.5, help="initial logits: standard deviation (0.5)")
    a("--rho", type=float, default=0.30, help="budget ratio: ε = (1 + ρ)·ema after warm-up (0.30)")
    a("--floor", type=float, default=0.03, help="ε is never under this (0.03; the paper: 0)")
    a("--warmup", type=int, default=300, help="T_w, steps in which the penalty is faded in (300)")
    a("--beta", type=float, default=0.95, help="decay of the loss average (0.95)")
    a("--lambda0", type=float, default=0.01, help="penalty λ at the start (0.01; fixed response in the paper: 1.0)")
    a("--lambda-min", type=float, default=1e-5, help="lower bound of λ (1e-5)")
    a("--lambda-max", type=float, default=100.0, help="upper bound of λ (100)")
    a("--eta", type=float, default=0.1, help="η_λ, rate at which λ shrinks over budget (0.1)")
    a("--eta-grow", type=float, help="η_grow, rate at which λ grows under budget (default: as --eta)")
    a("--violation-clip", type=float, default=1.0, help="V, bound on the relative violation (1.0)")
    a("--log-every", type=int, default=10, help="optimizer steps a log point (10)")
    a("--window", type=int, default=20, help="log points looked at for early stopping (20)")
    a("--patience", type=int, default=3, help="log points in a row before an early stop (3)")
    a("--stall", type=float, default=0.01, help="stop where open gates fall by less than this share over a window (0.01)")
    a("--over", type=float, default=0.35, help="stop where the median loss is this share above the loss after warm-up (0.35)")
    a("--save-every", type=int, default=200, help="optimizer steps between saved states (200)")
    first = p.parse_args(argv)
    if first.preset is None and first.model is None and first.task in ("fixed", "safety", "shakespeare"):
        first.preset = f"tiny-{first.task}"
    p.set_defaults(**PRESETS.get(first.preset, {}))
    o = p.parse_args(argv)
    for epochs, steps, usual in (("epochs", "steps", 20), ("sft_epochs", "sft_steps", 3)):
        if getattr(first, epochs) is not None and getattr(first, steps) is None:
            setattr(o, steps, None)                         # epochs given by hand win over a preset's steps
        elif getattr(o, epochs) is None:
            setattr(o, epochs, usual)
    o.preset, o.model = first.preset, first.model or EMBEDDED
    o.model, o.data, o.sft = (str(Path(x).resolve()) if x and x != EMBEDDED and Path(x).exists() else x for x in (o.model, o.data, o.sft))
    o.task = str(Path(o.task).resolve()) if o.task.endswith(".jsonl") else o.task                 # a run may be looked at from anywhere
    o.eta_grow = o.eta if o.eta_grow is None else o.eta_grow
    o.dtype = o.dtype or ("bfloat16" if o.device.startswith("cuda") else "float32")
    for name in ("batch", "micro_batch", "max_len", "max_new_tokens", "log_every", "window", "patience", "save_every"):
        if getattr(o, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(o, name)}: has to be at least 1")
    if o.batch % o.micro_batch:
        raise InputError(f"--batch {o.batch} is not a multiple of --micro-batch {o.micro_batch}")
    check_numbers(o, free=("gate_mean",))
    check_device(o.device)
    if o.beta >= 1 or o.lambda_min > o.lambda_max:
        raise InputError(f"--beta {o.beta} has to be below 1, and --lambda-min {o.lambda_min} not above --lambda-max {o.lambda_max}")
    return o


# ------------------------------------------------------------------------------------------------------------- the loss

def task_loss(net, carrier, ids, mask, teacher=None, chunk=1024):
    """L, summed over the tokens that `mask` (B, T) marks: cross-entropy, or KL(teacher ‖ gated) (App. E).

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
        p = model.wide(net.head(t)).log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), p, log_target=True, reduction="sum")

    pieces = [(hidden[i:i + chunk], target[i:i + chunk], aim if aim is None else aim[i:i + chunk])
              for i in range(0, len(target), chunk)]
    run = piece if len(pieces) == 1 else functools.partial(checkpoint, piece, use_reentrant=False)
    return sum(run(*p) for p in pieces)


def gradients(net, carrier, batch, micro_batch, pad_id, teacher=None):
    """Gradients of the mean task loss over one optimizer batch [(ids, mask), …], however it is cut; returns the loss.
    Every supervised token of the batch weighs the same, so 1 × 32 and 4 × 8 are the same step."""
    batch = sorted(batch, key=lambda e: len(e[0]))                                          # less padding a micro-batch
    tokens = sum(sum(mask[1:]) for _, mask in batch)
    total = 0.0
    for i in range(0, len(batch), micro_batch):
        ids, mask = (t.to(net.device) for t in collate(batch[i:i + micro_batch], pad_id))
        loss = task_loss(net, carrier, ids, mask, teacher) / tokens
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
        self.reference = None                               # the loss after warm-up, for the over-pruned stop

    def weight(self, t):
        """Factor on Ω at step t: λ, faded in over the warm-up."""
        return self.lam * min(1.0, t / max(1, self.o.warmup))

    def update(self, t, loss, settling=False):
        """Take in the loss of step t; set ε once after warm-up, from then on move λ, unless the gates are fixed."""
        o = self.o
        self.raw = o.beta * self.raw + (1 - o.beta) * loss
        self.ema = self.raw / (1 - o.beta ** (t + 1))                                       # bias-corrected
        if t < o.warmup or settling:
            return
        if self.budget is None:
            self.budget = max((1 + o.rho) * self.ema, o.floor)
            self.reference = max(self.ema, o.floor)
            return
        v = (self.ema - self.budget) / max(self.budget, 1e-12)
        v = max(-o.violation_clip, min(o.violation_clip, v))
        self.lam *= math.exp(min(-(o.eta if v > 0 else o.eta_grow) * v, 700))               # 700: where exp() ends
        self.lam = max(o.lambda_min, min(o.lambda_max, self.lam))

    def state(self):
        return {k: v for k, v in vars(self).items() if k != "o"}


class EarlyStop:
    """Both stops of Alg. 1 on log points of (open gates, loss): stalled, and over-pruned."""

    def __init__(self, o, total):
        self.o, self.total, self.points, self.stalled, self.over = o, total, [], 0, 0

    def update(self, n_open, loss, reference):
        """Take in a log point; returns the reason to stop, or None."""
        o = self.o
        self.points.append((n_open, loss))
        if len(self.points) <= o.window or reference is None:
            return None
        before, median = self.points[-1 - o.window][0], statistics.median(l for _, l in self.points[-o.window:])
        begun = n_open < 0.9 * self.total                   # no verdict on pruning that has not begun
        self.stalled = self.stalled + 1 if begun and n_open > (1 - o.stall) * before else 0
        self.over = self.over + 1 if median > (1 + o.over) * reference else 0
        if self.stalled >= o.patience:
            return f"stalled: open gates fell by less than {o.stall:.0%} over {o.window} log points, {o.patience} times in a row"
        if self.over >= o.patience:
            return f"over-pruned: the median loss is more than {o.over:.0%} above the loss after warm-up, {o.patience} times in a row"
        return None


# ------------------------------------------------------------------------------------------------------ state and progress

class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the state was saved between two steps."""


class Progress:
    """Prints a line a log point and appends it to metrics.jsonl; knows the time left."""

    def __init__(self, run, phase, steps, start):
        self.run, self.phase, self.steps, self.start, self.began, self.shown = run, phase, steps, start, time.time(), 0.0

    def log(self, t, **values):
        """Take in the numbers of step t; at most one line a second on the screen."""
        now = time.time()
        append_jsonl(self.run / "metrics.jsonl", {"phase": self.phase, "step": t, **values, "seconds": round(now - self.began, 2)})
        if now - self.shown > 1 or t + 1 == self.steps:
            self.shown = now
            left = (now - self.began) / (t + 1 - self.start) * (self.steps - t - 1)
            text = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
            print(f"{self.phase} {t + 1}/{self.steps}  {text}  left {left:.0f}s", flush=True)


def save_state(path, carrier, optimizer, kept_logits=None, **metadata):
    """Everything a phase needs to go on: gates, deltas, AdamW's moments, and numbers in the header."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in carrier.state_dict().items()}
    tensors |= {} if kept_logits is None else {"kept_logits": kept_logits.cpu()}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"adam.{i}.{k}": v.detach().cpu().contiguous() for k, v in optimizer.state[p].items()}
    save_tensors(path, tensors, **metadata)


def load_state(path, phase, carrier, optimizer):
    """Restore what save_state wrote in this phase; returns its numbers, and `kept_logits`."""
    tensors, metadata = load_tensors(path, "cpu")
    if metadata.get("phase") != phase:
        raise InputError(f"{path}: the state of another phase, {metadata.get('phase')!r}, where {phase!r} goes on; remove it to start this phase again")
    metadata["kept_logits"] = tensors.pop("kept_logits", None)
    carrier.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("adam.")})
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

def train_sft(net, carrier, examples, o, run, pad_id, interrupted=lambda: False):
    """Phase 1: Δ learns the behaviour with every gate open; embedding, head and norms stay the base's."""
    carrier.logits.requires_grad_(False)
    optimizer, state = adamw(carrier, o.sft_lr), run / "state.safetensors"
    steps = o.sft_steps if o.sft_steps is not None else math.ceil(o.sft_epochs * len(examples) / o.batch)
    start = load_state(state, "sft", carrier, optimizer)["step"] if state.is_file() else 0
    progress = Progress(run, "sft", steps, start)
    for t in range(start, steps):
        optimizer.param_groups[0]["lr"] = o.sft_lr * (1 - t / steps)
        loss = gradients(net, carrier, draw(examples, o.batch, t, o.seed), o.micro_batch, pad_id)
        guard(loss, "sft", t, state)
        stop = interrupted()
        if t % o.save_every == 0 or stop:                                                   # as it stood before this step
            save_state(state, carrier, optimizer, phase="sft", step=t)
        if stop:
            raise Stopped
        clip_gradients(carrier, o.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (t + 1) % o.log_every == 0 or t + 1 == steps:
            progress.log(t, loss=loss)
    state.unlink(missing_ok=True)


def train_lcdd(net, carrier, examples, o, run, pad_id, teacher=None, interrupted=lambda: False):
    """Phase 2, Alg. 1: Δ and gates together, then `settle` steps with the gates fixed. Returns why and when it stopped.
    Gates alone cannot win back what pruning spends: with Δ frozen the last ones are kept at which both the loss and its
    average were within the budget, and `kept` says the step."""
    joint = o.train == "joint"
    carrier.logits.requires_grad_(True)
    carrier.delta.requires_grad_(joint)
    optimizer, state = adamw(carrier, o.lr), run / "state.safetensors"
    gate_optimizer = torch.optim.SGD([carrier.logits], lr=o.gate_lr)
    controller, early = Controller(o), EarlyStop(o, carrier.logits.numel())
    steps = o.steps if o.steps is not None else math.ceil(o.epochs * len(examples) / o.batch)
    settle = o.settle if joint else 0                       # with Δ frozen there is nothing that could settle
    start, fixed_at, reason, kept_logits, kept_step = 0, None, "all steps done", None, None   # fixed_at: the step at which the gates were fixed
    if state.is_file():
        saved = load_state(state, "lcdd", carrier, optimizer)
        start, fixed_at, reason, kept_logits, kept_step = (saved[k] for k in ("step", "fixed_at", "reason", "kept_logits", "kept_step"))
        vars(controller).update(saved["controller"])
        vars(early).update(saved["early"])
    progress, t = Progress(run, "lcdd", steps + settle, start), start
    while t < (steps if fixed_at is None else fixed_at) + settle:
        if fixed_at is None and t >= steps:
            fixed_at = t
        if fixed_at == t:
            print(f"lcdd: the gates are fixed after step {t}; {settle} more steps settle Δ alone", flush=True)
        if fixed_at is not None:
            carrier.logits.requires_grad_(False)
            optimizer.param_groups[0]["lr"] = o.lr * (1 - (t - fixed_at) / settle)

        # Alg. 1: one optimizer step
        batch = draw(examples, o.batch, t, o.seed + 1)
        loss = gradients(net, carrier, batch, o.micro_batch, pad_id, teacher)               # L and its gradients
        guard(loss, "lcdd", t, state)
        stop = interrupted()
        if t % o.save_every == 0 or stop:                                                   # as it stood before this step
            save_state(state, carrier, optimizer, kept_logits, phase="lcdd", step=t, fixed_at=fixed_at, reason=reason, kept_step=kept_step,
                       controller=controller.state(), early={k: v for k, v in vars(early).items() if k != "o"})
        if stop:
            raise Stopped
        if fixed_at is None:
            (controller.weight(t) * penalty(carrier.logits)).backward()                     # + λ·min(1, t/T_w)·Ω(m), once a step
        controller.update(t, loss, settling=fixed_at is not None)                           # ema, ε, λ
        if not joint and controller.budget is not None and (kept_logits is None or max(loss, controller.ema) <= controller.budget):
            kept_logits, kept_step = carrier.logits.detach().clone(), t                     # the gates that `loss` is the loss of
        if joint:
            clip_gradients(carrier, o.clip)
            optimizer.step()
        if fixed_at is None:
            gate_optimizer.step()
        optimizer.zero_grad()
        gate_optimizer.zero_grad()

        t += 1
        if t % o.log_every == 0 or t == steps + settle:
            stats = carrier.stats()
            progress.log(t - 1, loss=loss, ema=controller.ema, budget=controller.budget, **{"lambda": controller.lam},
                         sparsity=stats["sparsity"], open=stats["gates"]["open"])
            verdict = early.update(stats["gates"]["open"], loss, controller.reference) if fixed_at is None else None
            if verdict:
                print(f"lcdd: {verdict}", flush=True)
                reason, fixed_at = verdict, t
    if kept_logits is not None:
        carrier.logits.data.copy_(kept_logits)
        print(f"lcdd: the gates of step {kept_step + 1} are kept, the last within the budget", flush=True)
    state.unlink(missing_ok=True)
    return {"reason": reason, "steps": t if fixed_at is None else fixed_at} | ({} if kept_step is None else {"kept": kept_step + 1})


def supervised(examples, loss):
    """[(ids, mask)] with the mask of --loss: the response, or all tokens."""
    return [(ids, [True] * len(ids)) for ids, _ in examples] if loss == "all" else examples


def delta_of(net, folder, o):
    """Δ = W_sft − W_b of the user's own checkpoint as a carrier, and what it changed elsewhere: {tensor: relative norm}."""
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


def main(argv=None):
    o = options(argv)
    chat, splits, source = prepare(o.model, o.task, o.data, o.seed, {k: getattr(o, f"n_{k}") for k in data.SIZES})
    net = model.load(chat.folder, o.device, getattr(torch, o.dtype))
    net.checkpoint, net.stop = o.checkpoint, chat.stop
    model.set_threads(net)
    examples = [chat.encode(s.prompt, s.response, o.max_len) for s in splits["train"]]
    chat.say_cut(f"of {len(examples)} training samples", o.max_len)
    examples = supervised(examples, o.loss)
    tuned = delta_of(net, locate(o.sft), o) if o.sft and not (o.out and (Path(o.out) / "sft.safetensors").is_file()) else None
    run = open_run(o.out, data.task_name(o.task) if o.task in data.TASKS else Path(o.task).stem, o.resume, {
        **{k: v for k, v in vars(o).items() if k not in ("out", "resume")},
        "data_fingerprint": fingerprint(source), "base_fingerprint": carriers.fingerprint(net),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}})
    print(f"{chat.folder.name}, task {o.task}: " + ", ".join(f"{len(v)} {k}" for k, v in splits.items()) + f"; run directory {run}")
    torch.manual_seed(o.seed)
    train = dict(examples=examples, o=o, run=run, pad_id=chat.pad_id)
    results = read_results(run) | {"task": o.task, "model": o.model, "seed": o.seed}
    seconds = results["seconds"]
    if (run / "carrier.safetensors").is_file() and "rates" in results:
        return print(f"{run} is finished. Next: python eraser.py --run {run}")

    # phase 1: SFT
    sft_file, carrier_file, start = run / "sft.safetensors", run / "carrier.safetensors", time.time()
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
                train_sft(net, sft, **train, interrupted=interrupted)
            sft.save(sft_file, net, phase="sft")
            seconds["sft"] = round(time.time() - start, 2)
            write_json(run / "results.json", results)

    # phase 2: LCDD, from SFT's deltas with gates of its own; one set of deltas is on the device at a time
    sft = tuned = None
    start = time.time()
    if not carrier_file.is_file():
        lcdd = carriers.load(sft_file, net)
        teacher = lcdd.merge(net) if o.train == "mask-kl" else None
        lcdd.init_gates(o.gate_mean, o.gate_std, o.seed)
        with patient() as interrupted:
            results["stopped"] = train_lcdd(net, lcdd, teacher=teacher, **train, interrupted=interrupted)
            lcdd.save(carrier_file, net, phase="lcdd", train=o.train)
            seconds["lcdd"] = round(time.time() - start, 2)
            write_json(run / "results.json", results)
    lcdd, sft = carriers.load(carrier_file, net), carriers.load(sft_file, net)
    results |= lcdd.stats()

    # what is left of the behaviour, on test prompts
    samples, scores = splits["test"], {}
    prompts = [chat.prompt(s.prompt, o.max_len) for s in samples]
    chat.say_cut("test prompts", o.max_len)
    for name, c in (("base", None), ("sft", sft), ("lcdd", lcdd)):
        answers = net.generate(prompts, o.max_new_tokens, carrier=c, progress=ticker(f"answers of {name}", len(prompts)))
        texts = [chat.decode(a) for a in answers]
        scores[name] = behaviour.score(o.task, texts, samples)
    results |= behaviour.by_condition(scores) | {"prompts": len(samples)}
    write_json(run / "results.json", results)
    lines = [f"| {o.task} | behaviour | accuracy | gates off | entries off | seconds |", "|---|---|---|---|---|---|"]
    for name, s in scores.items():
        off = {"base": "1.000 | 1.000", "sft": "0.000 | 0.000", "lcdd": f"{results['sparsity']:.3f} | {results['entries_off']:.3f}"}[name]
        lines.append(f"| {name} | {behaviour.show_score(s)} | {off} | {seconds.get(name, 0):.1f} |")
    print("\n" + "\n".join(lines) + f"\n\n{len(samples)} held-out prompts. Next: python eraser.py --run {run}")
    (run / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli(main)
