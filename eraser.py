"""
SFT-Eraser (Sec. 3.3): a soft trigger τ (n, d) that, with every weight frozen, switches a carrier's
behaviour off again.

    L = L_mse + α·L_kl + β·R                                                            (Eq. 6)

L_mse pulls the residual stream on the carrier's write channels to the base's at the last prompt
token (Eq. 7), L_kl pulls the next-token distributions to the base's (Eq. 8), R keeps τ small, and a
projection bounds its tokens (Eq. 28). Ours, and not in the paper: Eq. 7 in units of the base's
variance, a rate that falls along a cosine, the τ that was judged best is kept, and Eq. 8 on two
answers.

    python eraser.py --run runs/fixed
    python eraser.py --run runs/fixed --target sft --objective output      a cell of Table 4

Shapes: P pairs of prompt and answer (with positions "both" a prompt is in two of them), B pairs in a
batch, T tokens of the longest, M positions of Eq. 8, n trigger tokens, L layers, d hidden size,
V vocabulary.
"""
from common import (
    Failed, InputError, Phase, Stateful, add_up, load_tensors, own_part, parse, processes, read_json,
    resumable, resume_command, run_command, save_tensors, timed, usual_device, write_json)
import argparse
import math
from collections import namedtuple
from pathlib import Path

import torch

import carrier as carriers
import data
import lcdd
import model

PRESETS = {"paper": dict(       # App. F.3; α, k, β, r are lost and the released README's
    length=20, steps=2000, batch=16, lr=0.003, schedule="constant",
    absolute=True, bound=1.0, beta=0.1, raw=True,
    positions="final", k=8, alpha=0.7, judge_every=25)}
OPTIONS = {     # rates and bounds are in units of the model's own token norms
    "run": (str, "run directory that lcdd.py has finished"),
    "objective": (("circuit", "output", "random"),
                  "Eq. 7 on the carrier's channels, on none, or on as many random ones (circuit)"),
    "target": (("lcdd", "sft", "base"), "the model that the trigger is put before (lcdd)"),
    "name": (str, "the trigger's file name (trigger, or trigger-TARGET-OBJECTIVE)"),
    "preset": ((None, *PRESETS), "paper: App. F.3 as its text has it"),
    "resume": (False, "go on with an interrupted optimisation"),
    "length": (int, "n, tokens of the trigger (16 at d = 128, growing as its root; the paper: 20)"),
    "steps": (240, "optimizer steps; the paper: 2000"),
    "batch": (8, "pairs of prompt and answer per step; the paper: 16"),
    "lr": (0.3, "Adam's rate in root mean squares of the embedding; the paper's, on Qwen3: 0.14"),
    "alpha": (2.0, "weight of L_kl; the paper: 0.7"),
    "beta": (0.1, "weight of R"),
    "k": (24, "positions of L_kl; the released README: 8"),
    "positions": (("both", "response", "final"), "of L_kl: the first k of the base's and of the "
                  "target's answer (both), of the base's, or its last k (the paper)"),
    "seed": (0, "of the first τ, the batches, the random channels"),
    "device": (usual_device(), "cpu or cuda"),
}
SETTINGS = dict(
    schedule="cosine",          # of Adam's rate, or "constant" (the paper)
    bound=1.5,                  # r of Eq. 28 in mean token norms: the paper's 1.0 on Qwen3-0.6B
    absolute=False,             # lr, bound and R as plain numbers, as the paper gives them
    raw=False,                  # Eq. 7 as it stands, not divided by the base's variance
    clip=1.0, judge_every=40)   # gradient norm; steps between judgements on the validation prompts
FINAL = 128                     # tokens of the base's answers of which "final" takes the last k
PIECE = 32                      # prompts at a time if no gradient is wanted
UNSAVED = ("run", "resume", "device")       # options that are no part of what a trigger is


def options(argv=None):
    """The command line as a namespace. Raises InputError for a --name that another file has."""
    o = parse(__doc__, OPTIONS, SETTINGS, argv, preset=lambda o: PRESETS.get(o.preset, {}))
    usual = (o.target, o.objective) == ("lcdd", "circuit")
    o.name = o.name or ("trigger" if usual else f"trigger-{o.target}-{o.objective}")
    if "/" in o.name or o.name in ("carrier", "sft", "lcdd", "settle", "evaluate"):
        raise InputError(f"--name {o.name}: choose a plain name that is no other file of the run")
    return o


# ---- what τ is pulled to

# The base on P prompts, computed once:
#   ids     (P, T) prompt and answer, right-padded
#   last    (P) index of the last prompt token
#   wanted  (P, T) bool, the positions of Eq. 8
#   hidden  P tensors, the base's hidden states there, (number of them, d)
#   stream  (L, P, d) the residual stream after each layer at the last prompt token
Targets = namedtuple("Targets", "ids last wanted hidden stream")


@torch.no_grad()
def base_answers(net, prompts, o, weights, label):
    """
    [(prompt, answer)] of ids that Eq. 8 looks at. positions "both": the base's own answer to each
    prompt, and in rows of its own that of the model to be undone: where the behaviour has begun,
    τ has to end it.
    """
    length = FINAL if o.positions == "final" else o.k
    pairs = list(zip(prompts, net.generate(prompts, length, label=label)))
    if o.positions == "both" and weights is not None:
        pairs += zip(prompts, net.generate(prompts, length, carrier=weights))
    return pairs


@torch.no_grad()
def base_targets(net, pairs, o):
    """Targets of Eq. 7 and 8 for [(prompt, answer)]: what the base makes of them."""
    rows = [prompt + answer[:-1] for prompt, answer in pairs]   # the last token only gets predicted
    ids, real = data.collate([(row, [True] * len(row)) for row in rows])            # (P, T)
    ids, real = ids.to(net.device), real.to(net.device)
    last = torch.tensor([len(prompt) - 1 for prompt, _ in pairs], device=net.device)    # (P)
    end = real.sum(1)                                           # position t predicts token t + 1
    first = torch.maximum(last, end - o.k) if o.positions == "final" else last
    wanted = real & (real.cumsum(1) > first[:, None])                               # (P, T)
    hidden, stream = [], []
    for rows in torch.arange(len(ids)).split(PIECE):
        states, layers = states_at(net, None, None, ids[rows], wanted[rows], last[rows])
        hidden += states.split(wanted[rows].sum(1).tolist())
        stream.append(layers)                                                       # (L, B, d)
    return Targets(ids, last, wanted, hidden, torch.cat(stream, dim=1))


def states_at(net, weights, tau, ids, wanted, last):
    """
    The hidden states at the positions `wanted` (B, T) of Eq. 8, (M, d), and the residual stream
    after each layer at the last prompt token of Eq. 7, (L, B, d).
    """
    at_last = torch.arange(ids.shape[1], device=ids.device) == last[:, None]        # (B, T)
    both, streams = wanted | at_last, []
    hidden = net.hidden(ids, weights, tau, wanted=both, streams=streams)
    rows = at_last[both]
    return hidden[wanted[both]], torch.stack([x[rows] for x in streams])


def channels(carrier, objective, seed=0):
    """The channels of Eq. 7, (L, d) bool: the carrier's (Eq. 5), as many random ones, or none."""
    C = carrier.write_channels()
    if objective == "output":
        return torch.zeros_like(C)
    if objective == "random":
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(C.shape, generator=generator).argsort(1).argsort(1)
        return place.to(C.device) < C.sum(1, keepdim=True)
    return C


# ---- the loss

def channel_weights(C, variance):
    """
    The weights (L, d) with which Eq. 7 is a sum: the mean over layers with C_l ≠ ∅ of that over
    C_l. C (L, d) bool. Ours: each layer in units of the mean of `variance` (L, d) over C_l, for as
    it stands the loss is 40 to 340 beside a KL of 2. Ones leave it so.
    """
    total = (variance * C).sum(1, keepdim=True).clamp(min=1e-12)                    # (L, 1)
    return C / total / C.any(1).sum().clamp(min=1)


def matching_loss(stream, target, channel_weight):
    """
    L_mse (Eq. 7): mean over layers with C_l ≠ ∅ of mean_{i ∈ C_l} (a_l,i(τ ⊕ x) − a_l,i^base(x))²,
    averaged over prompts. stream, target (L, B, d); channel_weight (L, d).
    """
    squares = model.wide(stream - target).square().mean(1)                          # (L, d)
    return (squares * channel_weight).sum()


def trigger_loss(net, weights, tau, targets, rows, channel_weight, o):
    """
    Eq. 6 for the prompts `rows` of `targets`: (L, L_mse, L_kl, R), means over these prompts.
    channel_weight (L, d): channel_weights(). o.beta: a plain number.
    """
    T = int(targets.wanted[rows].any(0).nonzero().max()) + 1
    ids, wanted = targets.ids[rows, :T], targets.wanted[rows, :T]
    hidden, stream = states_at(net, weights, tau, ids, wanted, targets.last[rows])
    mse = matching_loss(stream, targets.stream[:, rows], channel_weight)

    # Eq. 8: L_kl = mean over a prompt's positions, then over prompts, of KL(p_base ‖ p)
    share = model.wide(wanted.to(hidden.dtype))                                     # (B, T)
    share = share / share.sum(1, keepdim=True) / len(rows)
    base = torch.cat([targets.hidden[i] for i in rows])                             # (M, d)
    kl = model.kl_divergence(net, hidden, base, share[wanted])

    R = tau.square().sum(1).mean()
    return mse + o.alpha * kl + o.beta * R, mse, kl, R


@torch.no_grad()
def project(tau, bound):
    """τ_j ← τ_j · min(1, r/‖τ_j‖), in place (Eq. 28)."""
    norm = tau.norm(dim=1, keepdim=True).clamp(min=1e-12)                           # (n, 1)
    return tau.mul_((bound / norm).clamp(max=1))


# ---- the optimisation

class Best(Stateful):
    """The trigger as it stands, and the one that was judged best."""

    def __init__(self, tau):
        self.tau, self.best, self.lowest = tau, tau, math.inf


def learn(net, weights, train, judge, C, o, run):
    """
    The trigger (n, d) for a model with frozen `weights` (a Merged; None: the base), and its loss on
    the prompts `judge`. train, judge: Targets. C (L, d): the channels of Eq. 7. Every `judge_every`
    steps τ as it stands is judged on all of `judge`; the lowest is returned.
    """
    tokens = model.wide(net.embedding)                                              # (V, d)
    if not o.absolute:                          # out of units of token norms into plain numbers
        unit = float(tokens.norm(dim=1).mean())
        rate = o.lr * unit / math.sqrt(tokens.shape[1])
        plain = dict(lr=rate, bound=o.bound * unit, beta=o.beta / unit ** 2)
        o = argparse.Namespace(**vars(o) | plain)
    variance = model.wide(train.stream).var(1)                                      # (L, d)
    weight = channel_weights(C, torch.ones_like(variance) if o.raw else variance)

    # τ starts as the embeddings of random tokens
    generator = torch.Generator().manual_seed(o.seed)
    first = torch.randint(len(tokens), (o.length,), generator=generator)
    tau = project(tokens[first.to(net.device)], o.bound).requires_grad_()           # (n, d)
    optimizer, kept = torch.optim.Adam([tau], lr=o.lr), Best(tau.detach().clone())
    with Phase(run, o.name, o.steps, o.judge_every, optimizer=optimizer, kept=kept) as loop:
        tau.data.copy_(kept.tau)
        for t in range(loop.start, o.steps + 1):
            kept.tau = tau.detach()
            loop.pause(t)

            # judge τ as it stands, on prompts that it is not learned on
            if t % o.judge_every == 0 or t == o.steps:
                loss, mse, kl, R = judged(net, weights, tau, judge, weight, o)
                if not math.isfinite(loss):
                    raise InputError(f"{o.name}: the validation loss is {loss}; lower --lr")
                if loss < kept.lowest:
                    kept.lowest, kept.best = loss, tau.detach().clone()
                loop.row(t, loss=loss, mse=mse, kl=kl, norm=R, best=kept.lowest)
            if t == o.steps:
                break

            # one step on a batch that depends on nothing but its number
            shuffle = torch.Generator().manual_seed(o.seed * 10007 + t)
            rows = torch.randperm(len(train.ids), generator=shuffle)[:o.batch]
            own = own_part(rows)
            loss = trigger_loss(net, weights, tau, train, own, weight, o)[0]
            optimizer.zero_grad()
            (loss * (len(own) / len(rows))).backward()
            add_up([tau.grad])
            if o.schedule == "cosine":
                fall = 0.5 * (1 + math.cos(math.pi * t / o.steps))
                optimizer.param_groups[0]["lr"] = o.lr * fall
            torch.nn.utils.clip_grad_norm_([tau], o.clip or math.inf)
            optimizer.step()
            project(tau, o.bound)
            loop.done(t, loss.item())
    return kept.best.to(tau), kept.lowest


@torch.no_grad()
def judged(net, weights, tau, targets, channel_weight, o):
    """Eq. 6 over all prompts of `targets`, piece by piece: four numbers, as trigger_loss()."""
    total, P = torch.zeros(4).double(), len(targets.ids)
    for rows in own_part(torch.arange(P)).split(PIECE):
        parts = trigger_loss(net, weights, tau, targets, rows, channel_weight, o)
        total += len(rows) / P * torch.stack(parts).cpu()
    add_up([total])
    return total.tolist()


# ---- files and the command

def made_for(run, net):
    """{base, carrier}: hashes of the base and of the run's carrier, which a trigger belongs to."""
    _, header = load_tensors(Path(run) / "carrier.safetensors")
    return {"base": carriers.base_fingerprint(net), "carrier": header["content"]}


def load(path, net):
    """
    τ (n, d) of a trigger file on the net's device, and its settings. Raises InputError if it does
    not fit the model, or was learned on another base or another carrier than the one beside it.
    """
    tensors, settings = load_tensors(path, net.device)
    tau, width = tensors.get("trigger"), net.config.hidden_size
    if tau is None or tau.shape[1:] != (width,):
        raise InputError(f"{path}: holds no trigger of width {width}; learn one with eraser.py")
    for what, known in made_for(Path(path).parent, net).items():
        if settings.get(what) != known:
            raise InputError(f"{path}: was learned on another {what}; learn it with eraser.py")
    return tau, settings


def main(argv=None):
    """Learn a trigger into the run directory, and see whether it moves the behaviour."""
    o = options(argv)
    config, net, chat, splits = lcdd.load_run(o.run, o.device)
    run = Path(o.run)
    file, state = run / f"{o.name}.safetensors", run / f"{o.name}.state"
    begun = run / f"{o.name}.answers.json"
    o.length = o.length or round(16 * math.sqrt(net.config.hidden_size / 128))
    if processes() > min(o.batch, len(splits["trigger"]), len(splits["validation"])):
        raise InputError(f"{processes()} processes: more than the prompts of --batch or --sizes")
    if o.resume and file.is_file() and not begun.is_file():
        return print(f"{file} is finished; without --resume it is learned anew")

    # what an interrupted optimisation has left: answers here, τ in the Phase's state
    for old in () if o.resume else (state, begun):
        old.unlink(missing_ok=True)
    settings = {name: value for name, value in vars(o).items() if name not in UNSAVED}
    answers = read_json(begun) if begun.is_file() else {"settings": settings}
    if answers["settings"] != settings:
        raise InputError(f"{begun}: was begun with other options; resume with the same")

    carrier, targets = carriers.load(run / "carrier.safetensors", net), []
    C = channels(carrier, o.objective, o.seed)
    if o.target == "sft":
        carrier = carriers.load(run / "sft.safetensors", net)
    weights = None if o.target == "base" else carrier.merge(net)
    print(f"{o.length} tokens before {o.target}, {int(C.sum())} write channels", flush=True)
    phase = "eraser" if o.name == "trigger" else o.name         # of `seconds` in results.json
    with resumable(resume_command(argv)), timed(run, phase):
        for name in ("trigger", "validation"):
            if name not in answers:
                prompts = [chat.prompt(s.prompt, s.before, config.max_len) for s in splits[name]]
                answers[name] = base_answers(net, prompts, o, weights, f"base's answers, {name}")
                write_json(begun, answers)
            targets.append(base_targets(net, answers[name], o))
        chat.say_cut("prompts", config.max_len)
        tau, loss = learn(net, weights, *targets, C, o, run)
    save_tensors(file, {"trigger": tau}, loss=loss, **made_for(run, net), **settings)
    for done in (state, begun):
        done.unlink(missing_ok=True)
    print(f"validation loss {loss:.4f}; wrote {file}")
    if weights is None:                         # the base has no behaviour to be undone
        return None
    conditions = {"without": weights, "with": (weights, tau)}
    score = lcdd.rates(net, chat, config, splits["validation"], conditions)
    before, after = score.values()
    print(f"behaviour: {before['rate']:.1%} of the validation answers, {after['rate']:.1%} with it")
    if not data.clearly_above(before, after):
        raise Failed("the trigger does not move the behaviour; give it more --steps or --length")
    print(f"Next: python evaluate.py --run {run} --trigger {o.name}")


if __name__ == "__main__":
    run_command(main, together=True)
