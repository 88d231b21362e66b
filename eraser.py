"""
SFT-Eraser (Sec. 3.3): a soft trigger τ (n, d) that, with every weight frozen, switches a carrier's behaviour
off again.

    L = L_mse + α·L_kl + β·R                                                             (Eq. 6)

L_mse pulls the residual stream on the carrier's write channels to the base's at the last prompt token
(Eq. 7), L_kl pulls the next-token distributions to the base's (Eq. 8), R keeps τ small, and a projection
bounds its tokens (Eq. 28). Ours, and not in the paper: Eq. 7 in units of the base's variance, a rate that
falls along a cosine, the τ that was judged best is kept, and Eq. 8 on two answers.

    python eraser.py --run runs/fixed
    python eraser.py --run runs/fixed --target sft --objective output      a cell of Table 4

Shapes: P prompts, B of them in a batch, M positions of Eq. 8, n trigger tokens, L layers, d hidden size.
"""
from common import (
    Failed, InputError, Phase, Stateful, add_up, load_tensors, parse, read_json, resumable,
    own_part, processes, resume_command, run_command, save_tensors, summed, usual_device, write_json)
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import carrier as carriers
import data
import lcdd
import model

# App. F.3 as the paper's text has it, and as the released code runs it
PAPER = dict(length=20, steps=2000, batch=16, lr=0.003, bound=1.0, absolute=True, schedule="constant",
             raw=True, alpha=0.7, k=8, beta=0.1, judge_every=25, positions="final", match="prompt")
PRESETS = {"paper": PAPER, "released": dict(PAPER, positions="prompt", match="mean")}
OPTIONS = {     # rates and bounds are in units of the model's own token norms
    "run": (str, "run directory that lcdd.py has finished"),
    "objective": (("circuit", "output", "random"), "circuit: all of Eq. 6; output: without Eq. 7; random: Eq. 7 on "
                                                   "as many random channels in each layer (circuit)"),
    "target": (("lcdd", "sft", "base"), "the model that the trigger is put before (lcdd)"),
    "name": (str, "the trigger's file name (trigger, or trigger-TARGET-OBJECTIVE)"),
    "preset": ((None, *PRESETS), "App. F.3: paper as its text has it, released as the code runs it"),
    "resume": (False, "go on with an interrupted optimisation"),
    "length": (int, "n, tokens of the trigger (16 at a width of 128, growing as its root; the paper: 20)"),
    "steps": (240, "optimizer steps; the paper: 2000"),
    "batch": (8, "prompts per step; the paper: 16"),
    "lr": (0.3, "Adam's rate in units of the embedding's root mean square; the paper's 0.003 on Qwen3-0.6B is 0.14"),
    "alpha": (2.0, "weight of L_kl; the paper: 0.7"),
    "beta": (0.1, "weight of R"),
    "k": (24, "positions of L_kl; the released README: 8"),
    "positions": (("both", "response", "final", "prompt"), "of L_kl: the first k of the base's answer, and of the one "
                  "to be undone (both); of the base's alone; its last k (the paper's text); the last k of the prompt "
                  "(the released code)"),
    "seed": (0, "of the first τ, the batches, the random channels"),
    "device": (usual_device(), "cpu or cuda"),
}
SETTINGS = dict(
    schedule="cosine",          # of Adam's rate, or "constant" (the paper)
    bound=1.5,                  # r of Eq. 28 in mean token norms: the paper's 1.0 on Qwen3-0.6B
    absolute=False,             # lr, bound and R as plain numbers, as the paper gives them
    match="prompt",             # Eq. 7 prompt by prompt, or "mean"s over prompts (the released code)
    raw=False,                  # Eq. 7 as it stands, not divided by the base's variance
    clip=1.0, judge_every=40)   # gradient norm; steps between judgements on the validation prompts
FINAL = 128                     # tokens of the base's answers of which "final" takes the last k


def options(argv=None):
    """The command line as a namespace."""
    o = parse(__doc__, OPTIONS, SETTINGS, argv, preset=lambda o: PRESETS.get(o.preset, {}))
    usual = (o.target, o.objective) == ("lcdd", "circuit")
    o.name = o.name or ("trigger" if usual else f"trigger-{o.target}-{o.objective}")
    if "/" in o.name or o.name in ("carrier", "sft", "lcdd", "settle", "evaluate"):
        raise InputError(f"--name {o.name}: choose a plain name that is no other file of the run")
    return o


# ---- what τ is pulled to

@dataclass
class Targets:
    """
    The base on P prompts, computed once.

    ids     (P, T) prompt and answer, right-padded
    last    (P) index of the last prompt token
    wanted  (P, T) bool, the positions of Eq. 8
    hidden  P tensors, the base's hidden states there, (number of them, d)
    stream  (L, P, d) the residual stream after each layer at the last prompt token
    """
    ids: torch.Tensor
    last: torch.Tensor
    wanted: torch.Tensor
    hidden: list
    stream: torch.Tensor


@torch.no_grad()
def base_answers(net, prompts, o, weights, label):
    """
    [(prompt, answer)] of ids that Eq. 8 looks at. positions "both": the base's own answer to each prompt,
    and in rows of its own that of the model to be undone: where the behaviour has begun, τ has to end it.
    """
    if o.positions == "prompt":
        return [(prompt, []) for prompt in prompts]
    length = FINAL if o.positions == "final" else o.k
    pairs = list(zip(prompts, net.generate(prompts, length, label=label)))
    if o.positions == "both" and weights is not None:
        pairs += zip(prompts, net.generate(prompts, length, carrier=weights))
    return pairs


@torch.no_grad()
def base_targets(net, pairs, o, batch_size=32):
    """Targets of Eq. 7 and 8 for [(prompt, answer)]: what the base makes of them."""
    rows = [prompt + answer[:-1] for prompt, answer in pairs]       # the last token only gets predicted
    ids, real = data.collate([(row, [True] * len(row)) for row in rows])            # (P, T)
    last = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])                   # (P)
    place, end = torch.arange(ids.shape[1]), real.sum(1)            # position t predicts token t + 1
    first, until = last, end
    if o.positions == "final":
        first = torch.maximum(last, end - o.k)
    elif o.positions == "prompt":
        first, until = (last - o.k + 1).clamp(min=0), last + 1
    wanted = (place >= first[:, None]) & (place < until[:, None])                   # (P, T)
    ids, last, wanted = ids.to(net.device), last.to(net.device), wanted.to(net.device)
    hidden, stream = [], []
    for i in range(0, len(ids), batch_size):
        piece = slice(i, i + batch_size)
        states, layers = states_at(net, None, None, ids[piece], wanted[piece], last[piece])
        hidden += states.split(wanted[piece].sum(1).tolist())
        stream.append(layers)                                                       # (L, B, d)
    return Targets(ids, last, wanted, hidden, torch.cat(stream, dim=1))


def states_at(net, weights, tau, ids, wanted, last):
    """
    The hidden states at the positions `wanted` (B, T) of Eq. 8, (M, d), and the residual stream after each
    layer at the last prompt token of Eq. 7, (L, B, d).
    """
    at_last = torch.arange(ids.shape[1], device=ids.device) == last[:, None]        # (B, T)
    both, streams = wanted | at_last, []
    hidden = net.hidden(ids, weights, tau, wanted=both, streams=streams)
    rows = at_last[both]
    return hidden[wanted[both]], torch.stack([x[rows] for x in streams])


def channels(carrier, objective, seed=0):
    """The channels of Eq. 7, (L, d) bool: the carrier's (Eq. 5), as many random ones a layer, or none."""
    C = carrier.write_channels()
    if objective == "output":
        return torch.zeros_like(C)
    if objective == "random":
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(C.shape, generator=generator).argsort(1).argsort(1).to(C.device)
        return order < C.sum(1, keepdim=True)
    return C


# ---- the loss

def matching_loss(stream, target, C, match="prompt", variance=None):
    """
    L_mse (Eq. 7): mean over layers with C_l ≠ ∅ of mean_{i ∈ C_l} (a_l,i(τ ⊕ x) − a_l,i^base(x))², averaged
    over prompts. stream, target (L, B, d); C (L, d) bool. Ours: divided layer by layer by the mean
    of `variance` (L, d) over C_l, for raw it is 40 to 340 beside a KL of 2. match="mean": of means over prompts.
    """
    if match == "mean":
        stream, target = stream.mean(1, keepdim=True), target.mean(1, keepdim=True)
    size = C.sum(1)                                                                 # (L)
    error = (model.wide(stream - target).square().mean(1) * C).sum(1)               # (L)
    if variance is not None:
        error = error / ((variance * C).sum(1) / size.clamp(min=1)).clamp(min=1e-12)
    return (error / size.clamp(min=1)).sum() / (size > 0).sum().clamp(min=1)


def trigger_loss(net, weights, tau, targets, rows, C, o, unit=1.0, variance=None):
    """Eq. 6 for the prompts `rows` of `targets`: (L, L_mse, L_kl, R). unit: the token norm that R is measured in."""
    wanted, last = targets.wanted[rows], targets.last[rows]
    T = int(torch.maximum(last.max(), wanted.any(0).nonzero().max())) + 1
    hidden, stream = states_at(net, weights, tau, targets.ids[rows, :T], wanted[:, :T], last)
    mse = hidden.new_zeros(())
    if C.any():
        aim = targets.stream if o.match == "mean" else targets.stream[:, rows]
        mse = matching_loss(stream, aim, C, o.match, variance)
    # Eq. 8: L_kl = mean over a prompt's positions, then over prompts, of KL(p_base ‖ p)
    count = wanted.sum(1)                                                           # (B)
    weight = (1 / (len(rows) * model.wide(count.to(hidden.dtype)))).repeat_interleave(count)
    kl = model.kl_divergence(net, hidden, torch.cat([targets.hidden[i] for i in rows]), weight)
    R = (tau / unit).square().sum(1).mean()
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
    The trigger (n, d) for a model with frozen `weights` (a Merged; None: the base), and its loss on the prompts
    `judge`. train, judge: Targets. C (L, d): the channels of Eq. 7. Every `judge_every` steps τ as it stands is
    judged on all of `judge`; the lowest is returned.
    """
    C, tokens = C.to(net.device), model.wide(net.embedding)                         # (V, d)
    if len(train.ids) < 2 and not o.raw:
        raise InputError("one trigger prompt has no variance to divide Eq. 7 by; give more with --sizes")
    unit = 1.0 if o.absolute else float(tokens.norm(dim=1).mean())
    rate = o.lr if o.absolute else o.lr * unit / math.sqrt(tokens.shape[1])
    variance = None if o.raw else model.wide(train.stream).var(1)                   # (L, d)
    generator = torch.Generator().manual_seed(o.seed)
    first = torch.randint(len(tokens), (o.length,), generator=generator).to(net.device)
    tau = project(tokens[first].clone(), o.bound * unit)                            # (n, d)
    tau.requires_grad_(True)
    optimizer, kept = torch.optim.Adam([tau], lr=rate), Best(tau.detach().clone())
    with Phase(run, o.name, o.steps, o.judge_every, optimizer=optimizer, kept=kept) as loop:
        tau.data.copy_(kept.tau)
        for t in range(loop.start, o.steps + 1):
            kept.tau = tau.detach()
            loop.pause(t)
            if t % o.judge_every == 0 or t == o.steps:          # on prompts that τ is not learned on
                loss, mse, kl, R = judged(net, weights, tau, judge, C, o, unit, variance)
                if loss < kept.lowest:
                    kept.lowest, kept.best = loss, tau.detach().clone()
                loop.row(t, loss=loss, mse=mse, kl=kl, norm=R, best=kept.lowest)
            if t == o.steps:
                break

            # one step on a batch that depends on nothing but its number
            shuffle = torch.Generator().manual_seed(o.seed * 10007 + t)
            rows = torch.randperm(len(train.ids), generator=shuffle)[:o.batch].tolist()
            own = own_part(rows)
            loss = trigger_loss(net, weights, tau, train, own, C, o, unit, variance)[0]
            optimizer.zero_grad()
            (loss * (len(own) / len(rows))).backward()
            add_up([tau.grad])
            fall = 0.5 * (1 + math.cos(math.pi * t / o.steps)) if o.schedule == "cosine" else 1.0
            optimizer.param_groups[0]["lr"] = rate * fall
            if o.clip:
                torch.nn.utils.clip_grad_norm_([tau], o.clip)
            optimizer.step()
            project(tau, o.bound * unit)
            loop.done(t, float(loss))
    return kept.best.to(tau), kept.lowest


@torch.no_grad()
def judged(net, weights, tau, targets, C, o, unit=1.0, variance=None):
    """Eq. 6 over all prompts of `targets`, piece by piece: four numbers, as trigger_loss()."""
    P, total = len(targets.ids), [0.0] * 4
    own = own_part(list(range(P)))
    size = P if o.match == "mean" else 32           # a mean over prompts is none of pieces' means
    for i in range(0, len(own), size):
        rows = own[i:i + size]
        parts = trigger_loss(net, weights, tau, targets, rows, C, o, unit, variance)
        total = [t + float(part) * len(rows) / P for t, part in zip(total, parts)]
    return [summed(t) for t in total]


# ---- files and the command

def settings_of(o):
    """The options that make a trigger what it is."""
    return {name: value for name, value in vars(o).items() if name not in ("run", "resume", "device")}


def made_for(run, net):
    """{base, carrier}: hashes of the base and of the run's carrier, which a trigger belongs to."""
    _, header = load_tensors(Path(run) / "carrier.safetensors")
    return {"base": carriers.base_fingerprint(net), "carrier": header["content"]}


def load(path, net):
    """
    τ (n, d) of a trigger file on the net's device, and its settings. Raises InputError if it does not fit
    the model, or was learned on another base or another carrier than the one beside it.
    """
    tensors, settings = load_tensors(path, net.device)
    tau = tensors.get("trigger")
    if tau is None or tau.ndim != 2 or tau.shape[1] != net.config.hidden_size:
        raise InputError(f"{path}: holds no trigger of width {net.config.hidden_size}; learn one with eraser.py")
    for what, known in made_for(Path(path).parent, net).items():
        if settings.get(what) != known:
            raise InputError(f"{path}: this trigger was learned on another {what} ({settings.get(what)}, the "
                             f"run's is {known}); learn it again with eraser.py")
    return tau, settings


def main(argv=None):
    """Learn a trigger into the run directory, and see whether it moves the behaviour."""
    o = options(argv)
    config, net, chat, splits = lcdd.load_run(o.run, o.device)
    run, file = Path(o.run), Path(o.run) / f"{o.name}.safetensors"
    state, kept = run / f"{o.name}.state", run / f"{o.name}.answers.json"
    o.length = o.length or round(16 * math.sqrt(net.config.hidden_size / 128))
    if processes() > (1 if o.match == "mean" else o.batch):
        raise InputError(f"--batch {o.batch}: is shared by {processes()} processes; with means over prompts only one can run")
    if o.resume and file.is_file() and not kept.is_file():
        return print(f"{file} is finished; without --resume it is learned anew")
    if not o.resume:
        state.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)
    before = read_json(kept) if kept.is_file() else {"settings": settings_of(o), "answers": {}}
    if before["settings"] != settings_of(o):
        raise InputError(f"{kept}: was begun with other options; resume with the same, or without --resume")
    carrier, weights, targets = carriers.load(run / "carrier.safetensors", net), None, []
    C = channels(carrier, o.objective, o.seed)
    if o.target != "base":
        weights = (carriers.load(run / "sft.safetensors", net) if o.target == "sft" else carrier).merge(net)
    print(f"{o.name}: {o.length} tokens before the {o.target} model, {len(splits['trigger'])} prompts, judged on "
          f"{len(splits['validation'])}; {int(C.sum())} of {C.numel()} write channels", flush=True)
    with resumable(resume_command(argv)), lcdd.timed(run, "eraser" if o.name == "trigger" else o.name):
        for name in ("trigger", "validation"):
            if name not in before["answers"]:
                prompts = [chat.prompt(s.prompt, s.before, config.max_len) for s in splits[name]]
                before["answers"][name] = base_answers(net, prompts, o, weights, f"base's answers, {name}")
                write_json(kept, before)
            targets.append(base_targets(net, before["answers"][name], o))
        chat.say_cut("prompts", config.max_len)
        tau, loss = learn(net, weights, *targets, C, o, run)
    save_tensors(file, {"trigger": tau}, loss=loss, **made_for(run, net), **settings_of(o))
    state.unlink(missing_ok=True)
    kept.unlink(missing_ok=True)
    print(f"validation loss {loss:.4f}; wrote {file}")
    if weights is None:
        return None
    score = lcdd.rates(net, chat, config, splits["validation"], {"without": weights, "with": (weights, tau)})
    print(f"behaviour on {score['with']['n']} validation prompts: {score['without']['rate']:.1%} without the trigger, "
          f"{score['with']['rate']:.1%} with it")
    if not data.clearly_above(score["without"], score["with"]):
        raise Failed(f"the trigger does not move the behaviour: {score['with']['rate']:.0%} of the validation answers "
                     "show it with the trigger; give it more --steps, a larger --length or another --lr")
    print(f"Next: python evaluate.py --run {run}" + (f" --trigger {o.name}" if o.name != "trigger" else ""))


if __name__ == "__main__":
    run_command(main, together=True)
