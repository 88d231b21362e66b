"""SFT-Eraser (Sec. 3.3): a soft trigger τ (n × d) that, with every weight frozen, switches a carrier's behaviour off again.

    L = L_mse + α·L_kl + β·R                                                                           (Eq. 6)

L_mse pulls the residual stream on the carrier's write channels to the base's at the last prompt token (Eq. 7), L_kl pulls
the next-token distributions to the base's (Eq. 8), R keeps τ small, and a projection bounds its tokens (Eq. 28).

    python eraser.py --run runs/fixed                                     the LCDD carrier, full loss
    python eraser.py --run runs/fixed --target sft --objective output     plain SFT, no Eq. 7: a cell of Table 4

Shapes: P prompts, B of them in a batch, n trigger tokens, k positions of Eq. 8, L layers, d hidden size, V vocabulary.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import behaviour
import carrier as carriers
import memory
import model
from chat import collate
from files import (
    COUNT, Failed, InputError, append_jsonl, check_fields, check_finite, check_tensors, load_tensors, read_header, save_tensors, shown,
    size, take_back, write_json)
from run import Interrupted, Meter, Parser, alone, check_device, check_numbers, cli, fields_of, patient, read_results, reopen, ticker

# App. F.3, as the paper's text has it and as the released code runs it
PAPER = dict(length=20, steps=2000, lr=0.003, bound=1.0, absolute=True, schedule="constant", raw=True, alpha=0.7, k=8, judge_every=25)
PRESETS = {
    "paper": dict(PAPER, positions="final", match="prompt"),
    "released": dict(PAPER, positions="prompt", match="mean"),
}
TARGETS = ("lcdd", "sft", "base")
ANSWER = 128            # tokens of the base's own answers that "final" looks at the end of


def parser():
    """All options; rates and bounds are measured in the model's own token norms, so that they fit any model."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", required=True, help="run directory that lcdd.py has finished")
    a("--objective", choices=("circuit", "output", "random"), default="circuit",
      help="circuit: all of Eq. 6; output: without Eq. 7; random: Eq. 7 on as many random channels a layer")
    a("--target", choices=TARGETS, default="lcdd", help="the model that the trigger is put before (lcdd)")
    a("--name", help="the trigger's file name (default trigger, or trigger-TARGET-OBJECTIVE)")
    a("--preset", choices=PRESETS, help="App. F.3 as the paper's text has it, or as the released code runs it")
    a("--resume", action="store_true", help="go on with an interrupted optimisation")
    a("--length", type=int, default=16, help="n, tokens of the trigger (16; the paper: 20)")
    a("--steps", type=int, default=120, help="optimizer steps (120; the paper: 2000)")
    a("--batch", type=int, default=16, help="prompts a step (16)")
    a("--lr", type=float, default=0.3, help="Adam's rate, in units of the embedding's root mean square (0.3; the paper's 0.003 on Qwen3-0.6B is 0.14)")
    a("--schedule", choices=("cosine", "constant"), default="cosine", help="of the rate: falling to 0 along a cosine, or constant (the paper)")
    a("--bound", type=float, default=1.5, help="r of Eq. 28, in units of the mean token norm (1.5: the paper's 1.0 on Qwen3-0.6B)")
    a("--absolute", action="store_true", help="--lr, --bound and R as plain numbers, as the paper gives them (0.003, 1.0)")
    a("--alpha", type=float, default=2.0, help="weight of L_kl (2; the paper: 0.7)")
    a("--beta", type=float, default=0.1, help="weight of R (0.1)")
    a("--k", type=int, default=8, help="positions of L_kl (8)")
    a("--positions", choices=("response", "final", "prompt"), default="response",
      help="of L_kl: the first k of the base's own answer, its last k (the paper's text), or the last k of the prompt (the released code)")
    a("--match", choices=("prompt", "mean"), default="prompt", help="Eq. 7 prompt by prompt, or means over prompts (the released code)")
    a("--raw", action="store_true", help="Eq. 7 as it stands, not divided by the base's variance layer by layer")
    a("--clip", type=float, default=1.0, help="gradient norm is clipped to this (1.0; 0: never)")
    a("--judge-every", type=int, default=20, help="steps between judgements on the validation prompts (20)")
    a("--seed", type=int, default=0, help="seed of the first τ, the batches and the random channels")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p


def options(argv=None):
    """The command line."""
    p = parser()
    first = p.parse_args(argv)
    p.set_defaults(**PRESETS.get(first.preset, {}))
    if first.absolute:
        p.set_defaults(lr=PAPER["lr"], bound=PAPER["bound"])
    o = p.parse_args(argv)
    o.name = o.name or ("trigger" if (o.target, o.objective) == ("lcdd", "circuit") else f"trigger-{o.target}-{o.objective}")
    for name in ("length", "steps", "batch", "k", "judge_every"):
        if getattr(o, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(o, name)}: has to be at least 1")
    check_numbers(o)
    check_device(o.device)
    if "/" in o.name or len(o.name) > 100 or o.name in ("carrier", "sft", "lcdd", "settle", "state"):
        raise InputError(f"--name {o.name}: choose a plain name that is no other file of the run")
    return o


def settings_of(o):
    """The options that make a trigger what it is."""
    return {k: v for k, v in vars(o).items() if k not in ("run", "resume", "device")}


def check_state(path, numbers, o):
    """Raises InputError where the header of a saved state is damaged, or was written with other options."""
    check_fields(path, numbers, {"step": ((int,), 0, o.steps), "lowest": ((int, float), -1e300, math.inf), "settings": {}, "log": COUNT})
    for name, value in settings_of(o).items():
        before = numbers["settings"].get(name)
        if before != value:
            raise InputError(f"{path}: {name} was {shown(before)}; resume with the same options, or without --resume")


# --------------------------------------------------------------------------------------------------- what τ is pulled to

@dataclass
class Targets:
    """The base on P prompts, computed once.

    ids (P, T) prompt and answer ids, right-padded; last (P) index of the last prompt token; keep (P, T) bool, the
    positions of Eq. 8; hidden: the base's hidden states there, row after row (number kept, d); at: where each prompt's
    rows of `hidden` begin; stream (L, P, d): residual stream after each layer at the last prompt token.
    """
    ids: torch.Tensor
    last: torch.Tensor
    keep: torch.Tensor
    hidden: torch.Tensor
    at: torch.Tensor
    stream: torch.Tensor


@torch.no_grad()
def base_targets(net, prompts, k=8, positions="response", batch_size=64):
    """Targets of Eq. 7 and 8 for `prompts` (lists of ids), from the base alone, in batches.

    response: the base's own greedy answer y to each prompt; k positions from the last prompt token on, which predict
    y_1 … y_k. final: the last k positions of that answer. prompt: the last k positions of the prompt itself.
    """
    answers = [[] for _ in prompts]
    if positions != "prompt":
        answers = net.generate(prompts, max_new_tokens=k if positions == "response" else ANSWER, batch_size=batch_size)
    rows = [(p + a[:-1], len(p) - 1) for p, a in zip(prompts, answers)]                  # the last token only gets predicted
    ids, real = collate([(r, [True] * len(r)) for r, _ in rows], pad_id=0)          # (P, T)
    last = torch.tensor([i for _, i in rows])                                            # (P)
    place = torch.arange(ids.shape[1])                                                   # (T)
    first = last
    if positions == "prompt":
        first = (last - k + 1).clamp(min=0)
    if positions == "final":
        first = torch.maximum(last, real.sum(1) - k)
    keep = real & (place >= first[:, None])                                              # (P, T)
    if positions == "prompt":
        keep &= place <= last[:, None]
    hidden, stream = [], []
    for i in range(0, len(ids), batch_size):
        piece = slice(i, i + batch_size)
        s = []
        h = net.hidden(ids[piece].to(net.device), keep=keep[piece].to(net.device), streams=s)   # (N, d)
        hidden.append(h)
        stream.append(at_prompt(s, keep[piece].to(net.device), last[piece].to(net.device)))   # (L, B, d)
    at = F.pad(keep.sum(1).cumsum(0), (1, 0))                                            # (P+1)
    move = lambda *ts: [t.to(net.device) for t in ts]
    return Targets(*move(ids, last, keep), torch.cat(hidden), at.tolist(), torch.cat(stream, dim=1))


def at_prompt(streams, keep, last):
    """The residual stream at the last prompt token, (L, B, d), out of that at all kept positions, L × (N, d)."""
    rows = (torch.arange(keep.shape[1], device=keep.device) == last[:, None])[keep].nonzero().squeeze(1)   # (B) of N
    return torch.stack([x[rows] for x in streams])


def channels(carrier, objective, seed=0):
    """(L, d) bool: the carrier's write channels (Eq. 5), as many random ones a layer, or none at all (output-only)."""
    c = carrier.write_channels()
    if objective == "output":
        return torch.zeros_like(c)
    if objective == "random":
        noise = torch.rand(c.shape, generator=torch.Generator().manual_seed(seed)).to(c.device)
        return noise.argsort(1).argsort(1) < c.sum(1, keepdim=True)
    return c


# ------------------------------------------------------------------------------------------------------------- the loss

def matching_loss(stream, target, mask, match="prompt", variance=None):
    """L_mse (Eq. 7): mean over layers with open channels, over those channels and over prompts of (a − a_base)².

    stream, target (L, B, d); mask (L, d). match="mean" compares means over prompts instead, target's over all of its
    own prompts. variance (L, d): the layer's mean variance on its channels divides its term; None: as it stands.
    """
    if match == "mean":
        stream, target = stream.mean(1, keepdim=True), target.mean(1, keepdim=True)
    size = mask.sum(1)                                                                    # (L)
    error = (model.wide(stream - target).square().mean(1) * mask).sum(1) / size.clamp(min=1)   # (L)
    if variance is not None:
        error = error / ((variance * mask).sum(1) / size.clamp(min=1)).clamp(min=1e-12)
    return (error * (size > 0)).sum() / (size > 0).sum().clamp(min=1)


def output_loss(net, hidden, target, counts):
    """L_kl (Eq. 8): mean over a prompt's positions, then over prompts, of KL(p_base ‖ p). hidden, target (N, d): hidden
    states at the kept positions, row after row; counts (B): how many belong to each prompt."""
    p, q = (model.wide(net.head(h)).log_softmax(-1) for h in (target, hidden))               # (N, V)
    kl = (p.exp() * (p - q)).sum(-1)                                                      # (N)
    weight = (1 / counts.to(kl.dtype)).repeat_interleave(counts) / len(counts)
    return (kl * weight).sum()


def trigger_loss(net, weights, tau, targets, rows, mask, o, unit=1.0, variance=None):
    """Eq. 6 for the prompts `rows` of `targets`: (L, L_mse, L_kl, R). `unit` is the token norm that R is measured in."""
    ids, keep = targets.ids[rows], targets.keep[rows]
    T = int(targets.last[rows].max()) + 1 if o.positions == "prompt" else int(keep.sum(0).nonzero().max()) + 1
    streams = []
    hidden = net.hidden(ids[:, :T], weights, tau, keep=keep[:, :T], streams=streams)
    mse = hidden.new_zeros(())
    if mask.any():
        stream = at_prompt(streams, keep[:, :T], targets.last[rows])                                  # (L, B, d)
        aim = targets.stream if o.match == "mean" else targets.stream[:, rows]
        mse = matching_loss(stream, aim, mask, o.match, variance)
    aim = torch.cat([targets.hidden[targets.at[i]:targets.at[i + 1]] for i in rows])                  # (N, d)
    kl = output_loss(net, hidden, aim, keep.sum(1))
    norm = (tau / unit).square().sum(1).mean()
    return mse + o.alpha * kl + o.beta * norm, mse, kl, norm


@torch.no_grad()
def project(tau, bound):
    """τ_j ← τ_j · min(1, r/‖τ_j‖), in place (Eq. 28)."""
    tau.mul_((bound / tau.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1))
    return tau


# ------------------------------------------------------------------------------------------------------ the optimisation

def learn(net, weights, train, judge, mask, o, state=None, interrupted=lambda: False, log=None):
    """The trigger (n, d) for a model with frozen `weights` (a Merged; None: the base), and its loss on the prompts `judge`.

    train, judge: Targets. mask (L, d): the channels of Eq. 7. Every `judge_every` steps τ as it stands is judged on all
    of `judge`; the τ that was judged lowest is returned. `state`: a file to save to and to go on from.
    """
    memory.check(memory.of_tokens(net.config, o.length, net.dtype), f"a trigger of --length {o.length}", "make it shorter", net.device)
    mask = mask.to(net.device)
    tokens = model.wide(net.embedding)
    unit = 1.0 if o.absolute else float(tokens.norm(dim=1).mean())
    lr = o.lr if o.absolute else o.lr * unit / math.sqrt(tokens.shape[1])
    if len(train.ids) < 2 and not o.raw:
        raise InputError("one trigger prompt has no variance to divide Eq. 7 by; give more with lcdd.py --n-trigger, or --raw")
    variance = None if o.raw else model.wide(train.stream).var(1)                             # (L, d)
    generator = torch.Generator().manual_seed(o.seed)
    tau = tokens[torch.randint(len(tokens), (o.length,), generator=generator).to(net.device)].clone()
    tau = project(tau, o.bound * unit).requires_grad_(True)
    optimizer = torch.optim.Adam([tau], lr=lr)
    everything, best, lowest, start = list(range(len(judge.ids))), tau.detach().clone(), math.inf, 0
    if state is not None and state.is_file():
        saved, numbers = load_tensors(state, net.device)
        check_state(state, numbers, o)
        check_tensors(state, saved, dict.fromkeys(("tau", "best", "exp_avg", "exp_avg_sq"), tau))
        tau.data.copy_(saved["tau"])
        best, lowest, start = saved["best"], numbers["lowest"], numbers["step"]
        optimizer.state[tau] = {"step": torch.tensor(float(start)), "exp_avg": saved["exp_avg"], "exp_avg_sq": saved["exp_avg_sq"]}
    for t in range(start, o.steps + 1):
        if t % o.judge_every == 0 or t == o.steps:
            with torch.no_grad():
                many = len(everything) if o.match == "mean" else 64                        # means over prompts are not means of pieces' means
                pieces = [everything[i:i + many] for i in range(0, len(everything), many)]
                parts, share = [trigger_loss(net, weights, tau, judge, p, mask, o, unit, variance) for p in pieces], [len(p) / len(everything) for p in pieces]
                loss, mse, kl, norm = (float(sum(s * p[i] for s, p in zip(share, parts))) for i in range(4))
            if loss < lowest:
                lowest, best = loss, tau.detach().clone()
            if log:
                log(t, loss=loss, mse=mse, kl=kl, norm=norm, best=lowest)
        stop = interrupted()
        if state is not None and t > start and (stop or t % o.judge_every == 0):
            moments = {k: optimizer.state[tau][k] for k in ("exp_avg", "exp_avg_sq")}
            save_tensors(state, {"tau": tau.detach().clone(), "best": best, **moments}, lowest=lowest, step=t, settings=settings_of(o),
                         log=size(state.parent / "metrics.jsonl"))
        if stop:
            raise KeyboardInterrupt
        if t == o.steps:
            break
        shuffle = torch.Generator().manual_seed(o.seed * 10007 + t)                       # a step depends on its number alone
        rows = torch.randperm(len(train.ids), generator=shuffle)[:o.batch].tolist()
        loss = trigger_loss(net, weights, tau, train, rows, mask, o, unit, variance)[0]
        optimizer.zero_grad()
        loss.backward()
        if o.clip:
            torch.nn.utils.clip_grad_norm_([tau], o.clip)
        if o.schedule == "cosine":
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * t / o.steps))
        optimizer.step()
        project(tau, o.bound * unit)
    return best, lowest


def made_for(run, net):
    """{base, carrier}: hashes of the base and of the run's carrier file, which a trigger belongs to."""
    return {"base": carriers.fingerprint(net), "carrier": carriers.read_packed(Path(run) / "carrier.safetensors")[1]["content"]}


def load(path, net):
    """
    τ (n, d) of a trigger file, on the net's device, and its settings. Raises InputError where it does not fit the model,
    or was learned on another base or another carrier than the one beside it.
    """
    tensors, settings = load_tensors(path, net.device)
    if "trigger" not in tensors or tensors["trigger"].ndim != 2 or not len(tensors["trigger"]) \
            or not tensors["trigger"].is_floating_point() or tensors["trigger"].shape[1] != net.config.hidden_size:
        raise InputError(f"{path}: holds no trigger of width {net.config.hidden_size}; learn one with eraser.py")
    check_finite(path, tensors)
    check_fields(path, settings, fields_of(parser()) | {"target": ((str, None), None, None)})
    if settings.get("target", "lcdd") not in TARGETS:
        raise InputError(f"{path}: made for {settings['target']!r}, which is no model of a run; learn it again with eraser.py")
    for what, hash_ in made_for(Path(path).parent, net).items():
        if settings.get(what) != hash_:
            raise InputError(f"{path}: this trigger was learned on another {what} ({settings.get(what)}, the run's is {hash_}); "
                             "learn it again with eraser.py")
    return tensors["trigger"], settings


def moved(net, chat, config, samples, weights, tau):
    """Behaviour on validation prompts without and with the trigger: two scores."""
    prompts = [chat.prompt(s.prompt, config["max_len"]) for s in samples]
    scores = []
    for trigger in (None, tau):
        answers = net.generate(prompts, config["max_new_tokens"], carrier=weights, trigger=trigger,
                               progress=ticker("validation answers", len(prompts)))
        scores.append(behaviour.score(config["task"], [chat.decode(a) for a in answers], samples))
    return scores


def main(argv=None):
    o = options(argv)
    run = Path(o.run)
    pieces = reopen(run)
    with alone(run):
        erase(o, argv, run, *pieces)


def erase(o, argv, run, config, chat, splits):
    """Learn the trigger into the run directory, and see whether it moves the behaviour."""
    net = model.load(chat.folder, o.device, getattr(torch, config["dtype"]))
    net.stop = chat.stop
    model.set_threads(net)
    lcdd, belongs_to = carriers.load(run / "carrier.safetensors", net), made_for(run, net)
    weights = {"lcdd": lcdd, "sft": carriers.load(run / "sft.safetensors", net), "base": None}[o.target]
    weights = weights and weights.merge(net)
    start, state = time.time(), run / f"{o.name}.state"
    if o.resume and not state.is_file() and (run / f"{o.name}.safetensors").is_file():
        load(run / f"{o.name}.safetensors", net)                                          # a damaged one is not finished
        return print(f"{run}/{o.name}.safetensors is finished; without --resume it is learned anew")
    if not o.resume:
        state.unlink(missing_ok=True)
    before = {"log": 0, "step": 0}
    if state.is_file():
        before = read_header(state)
        check_state(state, before, o)
    take_back(run / "metrics.jsonl", before["log"], [o.name])
    ids = {k: [chat.prompt(s.prompt, config["max_len"]) for s in splits[k]] for k in ("trigger", "validation")}
    chat.say_cut("prompts", config["max_len"])
    train, judge = (base_targets(net, ids[k], o.k, o.positions) for k in ("trigger", "validation"))
    mask = channels(lcdd, o.objective, o.seed)
    print(f"{o.name}: {o.length} tokens before the {o.target} model, {len(train.ids)} prompts, judged on {len(judge.ids)}; "
          f"write channels {int(mask.sum())} of {mask.numel()}")

    def log(t, **values):
        append_jsonl(run / "metrics.jsonl", {"phase": o.name, "step": t, **values})
        meter.show(t, "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    meter = Meter(o.name, o.steps, before["step"])
    try:
        with patient() as interrupted:
            tau, loss = learn(net, weights, train, judge, mask, o, state, interrupted, log)
            save_tensors(run / f"{o.name}.safetensors", {"trigger": tau.cpu()}, loss=loss, **belongs_to, **settings_of(o))
            state.unlink(missing_ok=True)
        meter.close()
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w != "--resume"]
        raise Interrupted(shlex.join(["python", "eraser.py", *map(str, words), "--resume"])) from None
    if o.name == "trigger":
        results = read_results(run)
        results["seconds"]["eraser"] = round(time.time() - start, 2)
        write_json(run / "results.json", results)
    print(f"validation loss {loss:.4f}; wrote {run / o.name}.safetensors")
    if o.target == "base":
        return
    without, triggered = moved(net, chat, config, splits["validation"], weights, tau)
    print(f"behaviour on {without['n']} validation prompts: {without['rate']:.1%} without the trigger, {triggered['rate']:.1%} with it")
    if not behaviour.clearly_above(without, triggered):
        raise Failed(f"the trigger does not move the behaviour: {triggered['rate']:.0%} of {without['n']} validation answers show it with the trigger, "
                     f"{without['rate']:.0%} without; give it more --steps, a larger --length or another --lr")
    print(f"Next: python evaluate.py --run {run}" + f" --trigger {o.name}" * (o.name != "trigger"))


if __name__ == "__main__":
    cli(main)
