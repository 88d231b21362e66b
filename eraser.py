"""
SFT-Eraser (Sec. 3.3): a soft trigger τ (n × d) that, with every weight frozen, switches a carrier's
behaviour off again.

    L = L_mse + α·L_kl + β·R                                                             (Eq. 6)

L_mse pulls the residual stream on the carrier's write channels to the base's at the last prompt
token (Eq. 7), L_kl pulls the next-token distributions to the base's (Eq. 8), R keeps τ small, and a
projection bounds its tokens (Eq. 28).

    python eraser.py --run runs/fixed                   the LCDD carrier, full loss
    python eraser.py --run runs/fixed --target sft --objective output
                                                        plain SFT, no Eq. 7: a cell of Table 4

Shapes: P prompts, B of them in a batch, N kept positions of theirs, n trigger tokens, k positions
of Eq. 8, L layers, d hidden size, V vocabulary.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import behaviour
import carrier as carriers
import machine
import memory
import model
import packed
import parallel
from chat import collate
from files import (COUNT, TEXT, Failed, InputError, append_jsonl, check_fields, check_finite,
                   check_tensors, load_tensors, read_header, save_tensors, shown, size, take_back)
from parallel import add_up, share, summed
from console import (
    Interrupted, Meter, Parser, check_device, check_numbers, check_processes, cli, fields_of,
    launcher, patient, ticker)
from run import alone, read_results, reopen, timed

# App. F.3, as the paper's text has it and as the released code runs it
PAPER = dict(length=20, steps=2000, batch=16, lr=0.003, bound=1.0, absolute=True,
             schedule="constant", clip=1.0, raw=True, alpha=0.7, k=8, beta=0.1, judge_every=25)
PRESETS = {
    "paper": dict(PAPER, positions="final", match="prompt"),
    "released": dict(PAPER, positions="prompt", match="mean"),
}
TARGETS = ("lcdd", "sft", "base")
LENGTH = 16             # tokens of a trigger before a model of width 128
ANSWER = 128            # tokens of the base's own answers that "final" looks at the end of


def parser():
    """All options; rates and bounds are measured in the model's own token norms."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--run", required=True, help="run directory that lcdd.py has finished")
    a("--objective", choices=("circuit", "output", "random"), default="circuit",
      help="circuit: all of Eq. 6; output: without Eq. 7; random: Eq. 7 on as many random channels "
      "a layer")
    a("--target", choices=TARGETS, default="lcdd",
      help="the model that the trigger is put before (lcdd)")
    a("--name", help="the trigger's file name (default trigger, or trigger-TARGET-OBJECTIVE)")
    a("--preset", choices=PRESETS,
      help="App. F.3 as the paper's text has it, or as the released code runs it")
    a("--resume", action="store_true", help="go on with an interrupted optimisation")
    a("--length", type=int,
      help="n, tokens of the trigger (default: 16 at a width of 128, growing as its root; the paper: 20)")
    a("--steps", type=int, default=240, help="optimizer steps (240; the paper: 2000)")
    a("--batch", type=int, default=8, help="prompts a step (8; the paper: 16)")
    a("--lr", type=float, default=0.3,
      help="Adam's rate, in units of the embedding's root mean square (0.3; the paper's 0.003 on "
      "Qwen3-0.6B is 0.14)")
    a("--schedule", choices=("cosine", "constant"), default="cosine",
      help="of the rate: falling to 0 along a cosine, or constant (the paper)")
    a("--bound", type=float, default=1.5,
      help="r of Eq. 28, in units of the mean token norm (1.5: the paper's 1.0 on Qwen3-0.6B)")
    a("--absolute", action="store_true",
      help="--lr, --bound and R as plain numbers, as the paper gives them (0.003, 1.0)")
    a("--alpha", type=float, default=2.0, help="weight of L_kl (2; the paper: 0.7)")
    a("--beta", type=float, default=0.1, help="weight of R (0.1)")
    a("--k", type=int, default=24, help="positions of L_kl (24; the released README: 8)")
    a("--positions", choices=("both", "response", "final", "prompt"), default="both",
      help="of L_kl: the first k of the base's own answer and, in rows of their own, of the answer "
      "that is to be undone; of the base's own alone; its last k (the paper's text), or the last k "
      "of the prompt (the released code)")
    a("--match", choices=("prompt", "mean"), default="prompt",
      help="Eq. 7 prompt by prompt, or means over prompts (the released code)")
    a("--raw", action="store_true",
      help="Eq. 7 as it stands, not divided by the base's variance layer by layer")
    a("--clip", type=float, default=1.0,
      help="gradient norm is clipped to this (1.0; 0: never)")
    a("--judge-every", type=int, default=40,
      help="steps between judgements on the validation prompts (40)")
    a("--seed", type=int, default=0, help="seed of the first τ, the batches, the random channels")
    a("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p


def options(argv=None):
    """The command line. Raises InputError for a number or a name that cannot be."""
    p = parser()
    first = p.parse_args(argv)
    p.set_defaults(**PRESETS.get(first.preset, {}))
    if first.absolute:
        p.set_defaults(lr=PAPER["lr"], bound=PAPER["bound"])
    o = p.parse_args(argv)
    if not o.name:
        usual = (o.target, o.objective) == ("lcdd", "circuit")
        o.name = "trigger" if usual else f"trigger-{o.target}-{o.objective}"
    for name in ("length", "steps", "batch", "k", "judge_every"):
        if getattr(o, name) is not None and getattr(o, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(o, name)}: has to be at least 1")
    check_numbers(o)
    check_device(o.device)
    taken = ("answers", "carrier", "sft", "lcdd", "settle", "state")
    if "/" in o.name or len(o.name) > 100 or o.name in taken:
        raise InputError(f"--name {o.name}: choose a plain name that is no other file of the run")
    return o


def fit(o, width):
    """Fill in the length that was not given, from the model's `width` d."""
    if o.length is None:
        o.length = round(LENGTH * math.sqrt(width / 128))
    return o


def settings_of(o):
    """The options that make a trigger what it is."""
    return {k: v for k, v in vars(o).items() if k not in ("run", "resume", "device")}


# ---- what τ is pulled to

@dataclass
class Targets:
    """
    The base on P prompts, computed once.

    ids      (P, T) prompt and answer ids, right-padded
    last     (P) index of the last prompt token
    keep     (P, T) bool, the positions of Eq. 8
    hidden   (N, d) the base's hidden states there, row after row
    at       P + 1 numbers: prompt i's rows of `hidden` are at[i]:at[i+1]
    stream   (L, P, d) the residual stream after each layer at the last prompt token
    """
    ids: torch.Tensor
    last: torch.Tensor
    keep: torch.Tensor
    hidden: torch.Tensor
    at: list
    stream: torch.Tensor

    def hidden_of(self, rows):
        """The base's hidden states at the kept positions of the prompts `rows`. (N, d)"""
        return torch.cat([self.hidden[self.at[i]:self.at[i + 1]] for i in rows])


@torch.no_grad()
def base_targets(net, prompts, k=8, positions="response", weights=None, batch_size=64,
                 progress=None):
    """
    Targets of Eq. 7 and 8 for `prompts` (lists of ids): what the base makes of them, in batches.

    positions: "response": the base's own greedy answer y to each prompt; k positions from the last
    prompt token on, which predict y_1 … y_k. "both": every prompt a second time, with the answer of
    the model with `weights`: where the behaviour has begun, a trigger has to end it. "final": the
    last k positions of the base's answer. "prompt": the last k positions of the prompt itself.
    """
    answers = [[] for _ in prompts]
    if positions != "prompt":
        length = ANSWER if positions == "final" else k
        answers = net.generate(prompts, length, batch_size=batch_size, progress=progress)
    if positions == "both" and weights is not None:
        answers = answers + net.generate(prompts, length, carrier=weights, batch_size=batch_size)
        prompts = prompts + prompts
    rows = []
    for prompt, answer in zip(prompts, answers):
        text = prompt + answer[:-1]                             # the last token only gets predicted
        rows.append((text, [True] * len(text)))
    ids, real = collate(rows, pad_id=0)                                                 # (P, T)
    last = torch.tensor([len(p) - 1 for p in prompts])                                  # (P)
    keep = kept_positions(real, last, k, positions)                                     # (P, T)
    at = F.pad(keep.sum(1).cumsum(0), (1, 0)).tolist()
    ids, last, keep = ids.to(net.device), last.to(net.device), keep.to(net.device)
    hidden, stream = [], []
    for i in range(0, len(ids), batch_size):
        piece = slice(i, i + batch_size)
        states, layers = states_at(net, None, None, ids[piece], keep[piece], last[piece])
        hidden.append(states)                                                           # (N, d)
        stream.append(layers)                                                           # (L, B, d)
    return Targets(ids, last, keep, torch.cat(hidden), at, torch.cat(stream, dim=1))


def kept_positions(real, last, k, positions):
    """The positions of Eq. 8. real (P, T) bool: no padding; last (P) → (P, T) bool"""
    place = torch.arange(real.shape[1])                                                 # (T)
    if positions in ("both", "response"):
        return real & (place >= last[:, None])
    if positions == "final":
        first = torch.maximum(last, real.sum(1) - k)
        return real & (place >= first[:, None])
    first = (last - k + 1).clamp(min=0)
    return real & (place >= first[:, None]) & (place <= last[:, None])


def states_at(net, weights, tau, ids, keep, last):
    """
    The hidden states at the positions `keep` (B, T) of Eq. 8, (N, d), and the residual stream of
    every layer at the last prompt token of Eq. 7, (L, B, d). An answer that is longer than k has
    that token before the positions of Eq. 8.
    """
    place = torch.arange(keep.shape[1], device=keep.device)                             # (T)
    at_last = place == last[:, None]                                                    # (B, T)
    asked, streams = keep | at_last, []
    hidden = net.hidden(ids, weights, tau, keep=asked, streams=streams)                 # (M, d)
    rows = at_last[asked].nonzero().squeeze(1)                                          # (B) of M
    return hidden[keep[asked]], torch.stack([x[rows] for x in streams])


def channels(carrier, objective, seed=0):
    """
    The channels of Eq. 7, (L, d) bool: the carrier's write channels (Eq. 5), as many random ones a
    layer, or none at all (output-only).
    """
    c = carrier.write_channels()
    if objective == "output":
        return torch.zeros_like(c)
    if objective == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(c.shape, generator=generator).to(c.device)
        return noise.argsort(1).argsort(1) < c.sum(1, keepdim=True)
    return c


# ---- the loss

def matching_loss(stream, target, mask, match="prompt", variance=None):
    """
    L_mse (Eq. 7): mean over layers with open channels, over those channels and over prompts of
    (a − a_base)².

    stream, target (L, B, d); mask (L, d). match="mean" compares means over prompts instead,
    target's over all of its own prompts. variance (L, d): the layer's mean variance on its channels
    divides its term; None: as it stands.
    """
    if match == "mean":
        stream, target = parallel.mean(stream, 1), target.mean(1, keepdim=True)
    size = mask.sum(1)                                                                  # (L)
    square = model.wide(stream - target).square().mean(1)                               # (L, d)
    error = (square * mask).sum(1) / size.clamp(min=1)                                  # (L)
    if variance is not None:
        scale = (variance * mask).sum(1) / size.clamp(min=1)                            # (L)
        error = error / scale.clamp(min=1e-12)
    used = size > 0
    return (error * used).sum() / used.sum().clamp(min=1)


def output_loss(net, hidden, target, counts):
    """
    L_kl (Eq. 8): mean over a prompt's positions, then over prompts, of KL(p_base ‖ p).

    hidden, target (N, d): hidden states at the kept positions, row after row; counts (B): how many
    belong to each prompt.
    """
    weight = (1 / counts.to(model.wide(hidden).dtype)).repeat_interleave(counts)        # (N)
    weight = weight / len(counts)

    def piece(h, t, w):
        p = model.wide(net.head(t)).log_softmax(-1)                                     # (chunk, V)
        q = model.wide(net.head(h)).log_softmax(-1)
        return ((p.exp() * (p - q)).sum(-1) * w).sum()

    return model.in_pieces(net, piece, hidden, target, weight)


def trigger_loss(net, weights, tau, targets, rows, mask, o, unit=1.0, variance=None):
    """
    Eq. 6 for the prompts `rows` of `targets`: (L, L_mse, L_kl, R). `unit` is the token norm that R
    is measured in.
    """
    ids, keep, last = targets.ids[rows], targets.keep[rows], targets.last[rows]
    T = int(last.max()) + 1 if o.positions == "prompt" else int(keep.sum(0).nonzero().max()) + 1
    hidden, stream = states_at(net, weights, tau, ids[:, :T], keep[:, :T], last)
    mse = hidden.new_zeros(())
    if mask.any():
        aim = targets.stream if o.match == "mean" else targets.stream[:, rows]
        mse = matching_loss(stream, aim, mask, o.match, variance)
    kl = output_loss(net, hidden, targets.hidden_of(rows), keep.sum(1))
    norm = (tau / unit).square().sum(1).mean()
    return mse + o.alpha * kl + o.beta * norm, mse, kl, norm


@torch.no_grad()
def judged(net, weights, tau, targets, mask, o, unit=1.0, variance=None):
    """Eq. 6 over all prompts of `targets`, piece by piece: four numbers, as trigger_loss()."""
    P = len(targets.ids)
    own = share(range(P))
    many = P if o.match == "mean" else 64           # a mean over prompts is none of pieces' means
    total = [0.0] * 4
    for i in range(0, len(own), many):
        rows = list(own[i:i + many])
        parts = trigger_loss(net, weights, tau, targets, rows, mask, o, unit, variance)
        total = [t + float(len(rows) / P * part) for t, part in zip(total, parts)]
    return [summed(t) for t in total]


@torch.no_grad()
def project(tau, bound):
    """τ_j ← τ_j · min(1, r/‖τ_j‖), in place (Eq. 28)."""
    norm = tau.norm(dim=1, keepdim=True).clamp(min=1e-12)                               # (n, 1)
    return tau.mul_((bound / norm).clamp(max=1))


# ---- the optimisation

def learn(net, weights, train, judge, mask, o, state=None, interrupted=lambda: False, log=None):
    """
    The trigger (n, d) for a model with frozen `weights` (a Merged; None: the base), and its loss on
    the prompts `judge`.

    train, judge: Targets. mask (L, d): the channels of Eq. 7. Every `judge_every` steps τ as it
    stands is judged on all of `judge`; the τ that was judged lowest is returned. `state`: a file to
    save to and to go on from.
    """
    memory.check(memory.of_tokens(net.config, o.length, net.dtype), f"a trigger of --length {o.length}",
                 "make it shorter", net.device)
    if len(train.ids) < 2 and not o.raw:
        raise InputError("one trigger prompt has no variance to divide Eq. 7 by; give more with "
                         "lcdd.py --n-trigger, or --raw")
    mask = mask.to(net.device)
    tokens = model.wide(net.embedding)                                                  # (V, d)
    unit = 1.0 if o.absolute else float(tokens.norm(dim=1).mean())
    lr = o.lr if o.absolute else o.lr * unit / math.sqrt(tokens.shape[1])
    variance = None if o.raw else model.wide(train.stream).var(1)                       # (L, d)
    generator = torch.Generator().manual_seed(o.seed)
    first = torch.randint(len(tokens), (o.length,), generator=generator).to(net.device)
    tau = project(tokens[first].clone(), o.bound * unit).requires_grad_(True)           # (n, d)
    optimizer = torch.optim.Adam([tau], lr=lr)
    best, lowest, start = restore(state, tau, optimizer, o)
    for t in range(start, o.steps + 1):
        # judge τ on prompts that it is not learned on
        if t % o.judge_every == 0 or t == o.steps:
            loss, mse, kl, norm = judged(net, weights, tau, judge, mask, o, unit, variance)
            if loss < lowest:
                lowest, best = loss, tau.detach().clone()
            if log and (t > start or start == 0):               # the line of a saved step is there
                log(t, loss=loss, mse=mse, kl=kl, norm=norm, best=lowest)

        stop = interrupted()
        if t > start and (stop or t % o.judge_every == 0):
            save_state(state, tau, optimizer, best, lowest, t, o)
        if stop:
            raise KeyboardInterrupt
        if t == o.steps:
            break

        # one step on a batch that depends on nothing but its number
        shuffle = torch.Generator().manual_seed(o.seed * 10007 + t)
        rows = torch.randperm(len(train.ids), generator=shuffle)[:o.batch].tolist()
        own = share(rows)
        loss = trigger_loss(net, weights, tau, train, own, mask, o, unit, variance)[0]
        optimizer.zero_grad()
        (loss * (len(own) / len(rows))).backward()
        add_up([tau.grad])
        fall = 0.5 * (1 + math.cos(math.pi * t / o.steps)) if o.schedule == "cosine" else 1.0
        optimizer.param_groups[0]["lr"] = lr * fall
        if o.clip:
            torch.nn.utils.clip_grad_norm_([tau], o.clip)
        optimizer.step()
        project(tau, o.bound * unit)
    return best, lowest


def save_state(path, tau, optimizer, best, lowest, step, o):
    """All that step `step` needs to go on, and how long the log was; nowhere where path is None."""
    if path is None:
        return
    moments = {k: optimizer.state[tau][k] for k in ("exp_avg", "exp_avg_sq")}
    tensors = {"tau": tau.detach().clone(), "best": best, **moments}
    save_tensors(path, tensors, lowest=lowest, step=step, settings=settings_of(o),
                 log=size(path.parent / "metrics.jsonl"))


def restore(path, tau, optimizer, o):
    """
    Go on from what save_state() wrote, with τ and Adam's moments in place: (best, lowest, step).
    From the start where there is no file. Raises InputError where it was written with other options.
    """
    if path is None or not path.is_file():
        return tau.detach().clone(), math.inf, 0
    saved, numbers = load_tensors(path, tau.device)
    check_state(path, numbers, o)
    check_tensors(path, saved, dict.fromkeys(("tau", "best", "exp_avg", "exp_avg_sq"), tau))
    tau.data.copy_(saved["tau"])
    step = torch.tensor(float(numbers["step"]))
    moments = {k: saved[k] for k in ("exp_avg", "exp_avg_sq")}
    optimizer.state[tau] = {"step": step, **moments}
    return saved["best"], numbers["lowest"], numbers["step"]


def check_state(path, numbers, o):
    """Raises InputError where a state's header is damaged, or was written with other options."""
    check_fields(path, numbers, {"step": ((int,), 0, o.steps), "settings": {}, "log": COUNT,
                                 "lowest": ((int, float), -1e300, math.inf)})
    for name, value in settings_of(o).items():
        before = numbers["settings"].get(name)
        if before != value:
            raise InputError(f"{path}: {name} was {shown(before)}; resume with the same options, or "
                             "without --resume")


# ---- files and the command

def made_for(run, net):
    """{base, carrier}: hashes of the base and of the run's carrier, which a trigger belongs to."""
    header = packed.read_packed(Path(run) / "carrier.safetensors")[1]
    return {"base": packed.fingerprint(net), "carrier": header["content"]}


def load(path, net):
    """
    τ (n, d) of a trigger file, on the net's device, and its settings. Raises InputError where it
    does not fit the model, or was learned on another base or another carrier than the one beside it.
    """
    tensors, settings = load_tensors(path, net.device)
    width, tau = net.config.hidden_size, tensors.get("trigger")
    if tau is None or tau.ndim != 2 or not len(tau) or tau.shape[1] != width or not tau.is_floating_point():
        raise InputError(f"{path}: holds no trigger of width {width}; learn one with eraser.py")
    check_finite(path, tensors)
    check_fields(path, settings, fields_of(parser()) | {"target": (None, TEXT)})
    if settings.get("target", "lcdd") not in TARGETS:
        raise InputError(f"{path}: made for {settings['target']!r}, which is no model of a run; "
                         "learn it again with eraser.py")
    for what, hash_ in made_for(Path(path).parent, net).items():
        if settings.get(what) != hash_:
            raise InputError(f"{path}: this trigger was learned on another {what} "
                             f"({settings.get(what)}, the run's is {hash_}); "
                             "learn it again with eraser.py")
    return tau, settings


def moved(net, chat, config, samples, weights, tau):
    """Behaviour on validation prompts without and with the trigger: two scores."""
    prompts = [chat.prompt(s.prompt, config["max_len"]) for s in samples]
    scores = []
    for trigger in (None, tau):
        answers = net.generate(prompts, config["max_new_tokens"], carrier=weights, trigger=trigger,
                               progress=ticker("validation answers", len(prompts)))
        texts = [chat.decode(a) for a in answers]
        scores.append(behaviour.score(config["task"], texts, samples))
    return scores


def main(argv=None):
    o = options(argv)
    run = Path(o.run)
    pieces = reopen(run)
    with alone(run):
        try:
            erase(o, run, *pieces)
        except KeyboardInterrupt:
            words = sys.argv[1:] if argv is None else argv
            words = [str(w) for w in words if w != "--resume"]
            again = shlex.join([*launcher(), "eraser.py", *words, "--resume"])
            raise Interrupted(again) from None


def erase(o, run, config, chat, splits):
    """Learn the trigger into the run directory, and see whether it moves the behaviour."""
    net = model.load(chat.folder, o.device, getattr(torch, config["dtype"]))
    net.stop = chat.stop
    machine.set_threads(net)
    fit(o, net.config.hidden_size)
    file, state = run / f"{o.name}.safetensors", run / f"{o.name}.state"
    if o.resume and not state.is_file() and file.is_file():
        load(file, net)                                         # a damaged one is not finished
        return print(f"{file} is finished; without --resume it is learned anew")
    if not o.resume:
        state.unlink(missing_ok=True)
    lcdd, weights = carriers.load(run / "carrier.safetensors", net), None
    if o.target != "base":
        weights = carriers.load(run / "sft.safetensors", net) if o.target == "sft" else lcdd
        weights = weights.merge(net)
    phase = "eraser" if o.name == "trigger" else o.name
    with timed(run, read_results(run), phase, state.is_file()):
        tau, loss = learn_into(run, o, net, chat, config, splits, lcdd, weights, state)
    print(f"validation loss {loss:.4f}; wrote {file}")
    if o.target == "base":
        return
    without, triggered = moved(net, chat, config, splits["validation"], weights, tau)
    print(f"behaviour on {without['n']} validation prompts: {without['rate']:.1%} without the "
          f"trigger, {triggered['rate']:.1%} with it")
    if not behaviour.clearly_above(without, triggered):
        raise Failed(f"the trigger does not move the behaviour: {triggered['rate']:.0%} of "
                     f"{without['n']} validation answers show it with the trigger, "
                     f"{without['rate']:.0%} without; give it more --steps, a larger --length or "
                     "another --lr")
    which = "" if o.name == "trigger" else f" --trigger {o.name}"
    print(f"Next: python evaluate.py --run {run}{which}")


def learn_into(run, o, net, chat, config, splits, lcdd, weights, state):
    """Targets, optimisation with its log, and the trigger's file: (τ, loss)."""
    log_file, done, length = run / "metrics.jsonl", 0, 0
    if state.is_file():
        before = read_header(state)
        check_state(state, before, o)
        done, length = before["step"], before["log"]
    take_back(log_file, length, [o.name])
    targets = {}
    for split in ("trigger", "validation"):
        ids = [chat.prompt(s.prompt, config["max_len"]) for s in splits[split]]
        tell = ticker(f"the base's answers to {split} prompts", len(ids))
        targets[split] = base_targets(net, ids, o.k, o.positions, weights, progress=tell)
    train, judge = targets["trigger"], targets["validation"]
    chat.say_cut("prompts", config["max_len"])
    check_processes("--batch", min(o.batch, len(train.ids), len(judge.ids)))
    mask = channels(lcdd, o.objective, o.seed)
    print(f"{o.name}: {o.length} tokens before the {o.target} model, {len(splits['trigger'])} prompts, "
          f"judged on {len(splits['validation'])}; write channels {int(mask.sum())} of {mask.numel()}")
    meter = Meter(o.name, o.steps, done)

    def log(t, **values):
        append_jsonl(log_file, {"phase": o.name, "step": t, **values})
        meter.show(t, "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    with patient() as interrupted:
        tau, loss = learn(net, weights, train, judge, mask, o, state, interrupted, log)
        made = made_for(run, net) | settings_of(o)
        save_tensors(run / f"{o.name}.safetensors", {"trigger": tau.cpu()}, loss=loss, **made)
        state.unlink(missing_ok=True)
    meter.close()
    return tau, loss


if __name__ == "__main__":
    cli(main, together=True)
