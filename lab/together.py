"""
Made to be undone: Δ and trigger trained together, at a carrier's gates and with every gate open.

    python -m lab.together --run runs/fixed

Of a finished run of lcdd.py, whose gates stay as they are, Δ goes on learning the behaviour while a
trigger τ is learned before it, and Δ itself answers as the base does behind τ:

    L = L_task(Δ)  +  α·KL(base ‖ Δ behind τ)  +  β·R        over Δ and τ            (Eq. 4, 8)

Once from LCDD's carrier, and once from plain SFT, all gates open: a password-locked model. Both
stand beside the same models with Δ frozen and a trigger learned afterwards, by as many steps of
eraser.py. A `random` trigger has the norms of τ. One is `found` with the weights frozen: if it does
as well as the τ that Δ was trained with, that is no password.

Results: the "models", by name, their loss and gates off; evaluate.py's metrics by condition, which
are MODEL, MODEL + together (its own τ), + found and + random; "share_left" of the distance that
MODEL has.
"""
from common import Phase, parse, resumable, run_command, usual_device, write_json
import math
import shutil
from functools import partial
from pathlib import Path

import torch

import carrier as carriers
import eraser
import evaluate
import lcdd
import model

OPTIONS = {
    "run": (str, "run directory that lcdd.py has finished"),
    "starts": ("sft,lcdd", "the models that Δ is taken from"),
    "steps": (240, "of Δ and τ together, and of each trigger that is found"),
    "length": (16, "tokens of the triggers"),
    "batch": (8, "pairs of prompt and answer per step of a trigger"),
    "prompts": (int, "at most so many test prompts (all)"),
    "out": ("results/together-embedded", "folder of the results, TASK-SEED.json of each run"),
    "device": (usual_device(), "cpu or cuda"),
}
STARTS = {"sft": "sft.safetensors", "lcdd": "carrier.safetensors"}
METRICS = "rates", "accuracy", "same", "kl_own", "kl_base", "loss_own"


def trigger_options(net, o, seed):
    """
    eraser.py's options in plain numbers. Eq. 8 alone: the channels of Eq. 7 would be another thing
    in which a carrier differs from all gates open.
    """
    e = eraser.options(["--run", o.run, "--objective", "output", "--seed", str(seed)])
    e.steps, e.length, e.batch = o.steps, o.length, o.batch
    unit = float(model.wide(net.embedding).norm(dim=1).mean())
    e.lr, e.bound = e.lr * unit / math.sqrt(net.config.hidden_size), e.bound * unit
    e.absolute, e.beta = True, e.beta / unit ** 2
    return e


def train_together(net, carrier, examples, targets, config, e, work, name):
    """
    Train Δ at the carrier's gates and a trigger together; returns τ (n, d). Both rates fall
    linearly to 0. An interrupted training goes on.
    """
    carrier.logits.requires_grad_(False)
    carrier.delta.requires_grad_(True)
    none = eraser.channels(carrier, "output")                           # (L, d): no Eq. 7

    # τ starts as the embeddings of random tokens, as in eraser.py
    generator = torch.Generator().manual_seed(e.seed)
    first = torch.randint(len(net.embedding), (e.length,), generator=generator)
    tau = torch.nn.Parameter(model.wide(net.embedding[first.to(net.device)]))       # (n, d)
    of_delta, of_tau = lcdd.adamw(carrier, config.lr), torch.optim.Adam([tau], e.lr)
    kept = torch.nn.ParameterList([tau])

    def erase(rows, told, step):
        behind, _, kl, _ = eraser.trigger_loss(net, step, tau, targets, rows, none, e)
        behind.backward()
        told.update(behind=behind.item(), kl=kl.item())

    parts = dict(carrier=carrier, kept=kept, of_delta=of_delta, of_tau=of_tau)
    with Phase(work, name, e.steps, e.judge_every, **parts) as loop:
        for t in range(loop.start, e.steps):
            loop.pause(t)
            # without τ the behaviour, and behind τ the base
            batch = lcdd.draw(examples, config.batch, t, config.seed + 4)
            shuffle = torch.Generator().manual_seed(e.seed * 10007 + t)
            rows = torch.randperm(len(targets.ids), generator=shuffle)[:e.batch]
            told = {}
            loss = lcdd.gradients(net, carrier, batch, config, also=partial(erase, rows, told))

            # one step of both
            lcdd.move(carrier, of_delta, lcdd.rate_at(t, config.lr, e.steps), config)
            torch.nn.utils.clip_grad_norm_([tau], e.clip)
            of_tau.param_groups[0]["lr"] = lcdd.rate_at(t, e.lr, e.steps)
            of_tau.step()
            of_tau.zero_grad()
            eraser.project(tau.data, e.bound)
            loop.done(t, loss + told["behind"])
            if (t + 1) % config.log_every == 0:
                loop.row(t, loss=loss, kl=told["kl"])
        loop.pause(e.steps)
    return tau.detach()


def same_norms(tau, seed):
    """A trigger (n, d) of random directions whose tokens are as long as those of τ."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tau.shape, generator=generator).to(tau)
    return noise * (tau.norm(dim=1) / noise.norm(dim=1))[:, None]


def shares_left(values):
    """{metric: {MODEL + TRIGGER: share of MODEL's distance from the base that is left}}."""
    result = {}
    for metric in ("kl_own", "kl_base", "loss_own"):
        of, result[metric] = values[metric], {}
        for name, after in of.items():
            start, behind, _ = name.partition(" + ")
            if behind:
                floor = of.get("base", 0)           # the base's own loss; its KL from itself is 0
                result[metric][name], _ = evaluate.share_left(after - floor, of[start] - floor)
    return result


def compare(net, chat, config, splits, o, work):
    """Train and measure the four models: what the results' file holds."""
    examples = [chat.encode(s, config.max_len) for s in splits["train"]]
    held_out = [chat.encode(s, config.max_len) for s in splits["validation"]]

    # Eq. 8's targets, the same for all: the base on its own answers and on those of SFT
    sft = carriers.load(Path(o.run) / STARTS["sft"], net).merge(net)
    targets, e = [], trigger_options(net, o, config.seed)
    for part in ("trigger", "validation"):
        prompts = [chat.prompt(s.prompt, s.before, config.max_len) for s in splits[part]]
        pairs = eraser.base_answers(net, prompts, e, sft, "base's answers")
        targets.append(eraser.base_targets(net, pairs, e))

    models, conditions = {}, {"base": (None, None)}
    for start in o.starts.split(","):
        for name in (start, f"{start}-together"):
            carrier, taus = carriers.load(Path(o.run) / STARTS[start], net), {}
            if name != start:
                how = examples, targets[0], config, e, work, name
                taus["together"] = train_together(net, carrier, *how)
            weights, none = carrier.merge(net), eraser.channels(carrier, "output")
            # found from other first tokens than those of the τ that Δ was trained with
            own = trigger_options(net, o, config.seed + len(taus))
            own.name = f"{name}-found"
            taus["found"], _ = eraser.learn(net, weights, *targets, none, own, work)
            taus["random"] = same_norms(next(iter(taus.values())), config.seed)
            loss = lcdd.mean_loss(net, weights, held_out, config)
            models[name] = {"loss": loss, "sparsity": carrier.stats()["sparsity"]}
            conditions[name] = weights, None
            for trigger, tau in taus.items():
                conditions[f"{name} + {trigger}"] = weights, tau

    samples = splits["test"][:o.prompts]
    _, values = evaluate.measure(net, chat, config, samples, conditions)
    means, ci = evaluate.summary({metric: values[metric] for metric in METRICS})
    about = {"task": Path(config.task).stem, "seed": config.seed, "steps": o.steps}
    about |= {"prompts": len(samples), "models": models}
    return about | means | {"share_left": shares_left(values), "ci": ci}


def main(argv=None):
    """Compare the models of a run, and write the results."""
    o = parse(__doc__, OPTIONS, {}, argv)
    config, net, chat, splits = lcdd.load_run(o.run, o.device)
    file = Path(o.out) / f"{Path(config.task).stem}-{config.seed}.json"
    work = Path(o.run) / f"together-{o.steps}"
    for folder in (file.parent, work):
        folder.mkdir(parents=True, exist_ok=True)
    with resumable("the same command"):
        result = compare(net, chat, config, splits, o, work)
    write_json(file, result)
    shutil.rmtree(work)
    for condition, rate in result["rates"].items():
        print(f"{rate:7.1%}  {condition}")


if __name__ == "__main__":
    run_command(main)
