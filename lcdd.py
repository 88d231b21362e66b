"""
Loss-Constrained Dual Descent (Sec. 3.2, Alg. 1): train a behaviour in, then compress it into a
sparse carrier.

    min over m, Δ of Ω(m)   subject to   L_task(m, Δ) ≤ ε                               (Eq. 4)

Phase 1 is plain SFT, Δ with every gate open. Phase 2 trains Δ and the gate logits m together under
an adaptive penalty λ.

    python lcdd.py                                  the embedded model, fixed response
    python lcdd.py --model DIR --task fixed --data alpaca.json --out runs/mine
    python lcdd.py --preset paper-safety-vicuna-7b --data FILE --dry-run
"""
import files  # noqa: F401, before torch: it sets how threads wait
import platform
import sys
from pathlib import Path

import torch

import answered
import behaviour
import carrier as carriers
import data
import lora
import machine
import model
import packed
import plan
import training
from carrier import Carrier, penalty
from checks import check_lcdd, check_memory, check_sft, rates_of, results_table, say_unknown
from controller import (Chance, Controller, EarlyStop, Selection, faster, hold_back, rate_of_delta,
                        reopen_last)
from files import Failed, InputError, fingerprint, read_json, write_json, write_text
from console import Interrupted, check_processes, cli, made_by, patient, resume_command
from run import alone, chat_of, locate, open_run, portable, prepare, read_results, timed
from settings import DTYPES, fit, options

REOPEN = 4              # times that gates may open again, until the budget counts as not kept


# ------------------------------------------------------------------------------------- the phases

def train_sft(net, carrier, examples, o, run, pad_id, interrupted=lambda: False):
    """
    Phase 1: Δ learns the behaviour with every gate open; embedding, head and norms stay the base's.
    """
    optimizer, state = training.adamw(carrier, o.sft_lr), run / "state.safetensors"
    saved = training.load_state(state, ["sft"], carrier, optimizer)
    training.train_delta(
        net, carrier, examples, o, run, pad_id, "sft", o.sft_lr, o.sft_steps, o.seed, optimizer,
        sure=o.sure, warmup=training.warmup_steps(o, o.sft_steps), saved=saved,
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
    optimizer, found = training.adamw(carrier, o.lr), None
    saved = training.load_state(state, ["lcdd", "settle"], carrier, optimizer)
    if saved and saved["phase"] == "settle":
        found = saved["found"]
    else:
        found = prune(net, carrier, examples, o, run, pad_id, optimizer, teacher, saved,
                      interrupted)
        saved = None
    if joint and o.settle:
        settle(net, carrier, examples, o, run, pad_id, optimizer, found, saved, interrupted)
    else:
        some = training.probe(examples, o)
        found["loss"] = training.mean_loss(net, carrier, some, pad_id, o.micro_batch, teacher,
                                           o.train == "mask-kl-true")
    found["within"] = found["budget"] is not None and found["loss"] <= found["budget"]
    return found


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
        chance = chance_of(saved, len(examples))
    else:
        chance = Chance.measured(net, carrier, examples, o, pad_id) if joint else Chance()
    progress, reason = training.Progress(run, "lcdd", o.steps, start), "all steps done"
    for t in range(start, o.steps):
        # L_task(m, Δ), and its gradients by Δ and m
        samples = training.draw(range(len(examples)), o.batch, t, o.seed + 1)
        batch = [examples[i] for i in samples]
        loss = training.gradients(net, carrier, batch, o.micro_batch, pad_id, teacher, divergence)
        training.guard(loss, "lcdd", t, state)

        stop = interrupted()
        if t % o.save_every == 0 or stop:                   # as it stood before this step
            save_pruning(state, carrier, optimizer, t, controller, selection, early, chance, kept)
        if stop:
            raise training.Stopped

        # + λ · min(1, t/T_w) · Ω(m), once a step
        selection.rescale(carrier.logits.grad, t, controller.warm(t))
        (controller.weight(t) * penalty(carrier.logits)).backward()

        # ema of L; ε when warm-up ends; from then on λ
        controller.update(t, loss - chance.of(samples))
        if not joint and controller.fits(loss):
            kept = t, carrier.logits.detach().clone()       # the gates that `loss` is the loss of

        # one step: Δ by AdamW, m by SGD
        if joint:
            training.clip_gradients(carrier, o.clip)
            optimizer.param_groups[0]["lr"] = rate_of_delta(o, t) * faster(carrier, o)
            optimizer.step()
        hold_back(carrier.logits, o.gate_lr, o.pace)
        gate_optimizer.step()
        optimizer.zero_grad()
        gate_optimizer.zero_grad()

        # early stop: stalled, or over-pruned
        if (t + 1) % o.log_every == 0 or t + 1 == o.steps:
            n_open = log_pruning(progress, t, loss, controller, carrier.stats())
            verdict = early.update(n_open, loss, controller.reference, controller.recovers())
            if verdict:
                progress.meter.close()
                print(f"lcdd: {verdict}", flush=True)
                reason = verdict
                break
    found = {"reason": reason, "steps": t + 1, "budget": controller.budget}
    if not joint:
        found |= take_kept(carrier, kept)
    return found


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
    print(f"lcdd: the gates of step {step + 1} are kept, the last whose batch was within the budget",
          flush=True)
    return {"kept": step + 1}


def save_pruning(path, carrier, optimizer, t, controller, selection, early, chance, kept):
    """The state of Alg. 1 before step t."""
    extra, kept_step = {"mean": selection.mean}, None
    n_chance = None
    if chance.losses is not None:
        n_chance, extra["chance"] = len(chance.losses), chance.losses
    if kept is not None:
        kept_step, extra["kept"] = kept
    training.save_state(
        path, carrier, optimizer, extra, phase="lcdd", step=t, kept_step=kept_step, chance=n_chance,
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


def chance_of(saved, n):
    """The Chance of a saved state, for n samples."""
    losses = saved["extra"].get("chance")
    if losses is not None and len(losses) != n:
        raise InputError(f"state.safetensors: chance has {len(losses)} samples, and there are {n}; remove "
                         "it to start this phase again")
    return Chance(losses)


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
        training.train_delta(
            net, carrier, examples, o, run, pad_id, "settle", o.lr * faster(carrier, o), steps,
            o.seed + 2 + tries, optimizer, sure=sure, saved=saved, interrupted=interrupted,
            found=found, tries=tries)
        saved, tries = None, tries + 1
        some = training.probe(examples, o)
        found["loss"] = training.mean_loss(net, carrier, some, pad_id, o.micro_batch)
        if budget is None or found["loss"] <= budget or tries > REOPEN:
            return
        more = reopen_last(carrier, 0.05 * 2 ** tries)
        found["reopened"] += more
        print(f"lcdd: the loss of {o.batch * training.PROBE} samples is {found['loss']:.4g}, "
              f"above the budget {budget:.4g}; the {more} gates that shut last are open again",
              flush=True)


# ---------------------------------------------------------------------------------- one's own SFT

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


# ------------------------------------------------------------------------------------------ a run

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


def load_base(o, chat):
    """The base on its device, in --dtype or else what is fast there; o.dtype is filled in."""
    o.dtype = o.dtype or dtype_of_run(o)
    net = model.load(chat.folder, o.device, getattr(torch, o.dtype) if o.dtype else None)
    o.dtype = str(net.dtype).removeprefix("torch.")
    net.checkpoint, net.stop = o.checkpoint, chat.stop
    machine.set_threads(net)
    return net


def recorded(o, net, chat, sources, words):
    """What config.json keeps: the settings, and what they were used on and with."""
    kept = {k: v for k, v in vars(o).items() if k not in ("out", "resume", "go_on", "dry_run")}
    return {
        **kept, "data_fingerprint": fingerprint(*sources), "base_fingerprint": packed.fingerprint(net),
        "chat_fingerprint": chat.fingerprint(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "made": made_by("lcdd.py", words)}


def main(argv=None):
    """The command: read the options and the data, load the model, and train in a run directory."""
    o, words = options(argv, __doc__), sys.argv[1:] if argv is None else argv
    sizes = {k: getattr(o, f"n_{k}") for k in data.SIZES}
    chat = chat_of(o.model, weights=not o.dry_run)
    splits, sources = prepare(chat, o.task, o.data, o.seed, sizes, o.test, o.pattern)
    examples = [chat.encode(s.prompt, s.response, o.max_len) for s in splits["train"]]
    chat.say_cut(f"of {len(examples)} training samples", o.max_len)
    say_unknown(chat, splits["train"], sources[0])
    examples = training.supervised(examples, o.loss)
    if o.dry_run:
        return plan.show(o, chat, splits, examples)
    net = load_base(o, chat)
    fit(o, net.config.hidden_size, len(splits["train"]))
    check_processes("--batch", o.batch)
    check_memory(o, net, examples)
    sft_done = o.out and (Path(o.out) / "sft.safetensors").is_file()
    tuned = delta_of(net, locate(o.sft), o) if o.sft and not sft_done else None
    name = data.task_name(o.task) if o.task in data.TASKS else Path(o.task).stem
    run = open_run(o.out, name, o.resume, recorded(o, net, chat, sources, words))
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
    common = dict(examples=examples, o=o, run=run, pad_id=chat.pad_id)
    sft_file, carrier_file = run / "sft.safetensors", run / "carrier.safetensors"
    state = run / "state.safetensors"
    training.forget(state, sft_file, ["sft"])
    training.forget(state, carrier_file, ["lcdd", "settle"])
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
                    train_sft(net, sft, **common, interrupted=interrupted)
            sft.save(sft_file, net, getattr(torch, o.sft_dtype), phase="sft", **travels)
            training.forget(state, sft_file, ["sft"])

    # phase 2: LCDD, from SFT's deltas with gates of its own
    machine.set_threads(net)
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
                results["stopped"] = train_lcdd(net, lcdd, teacher=teacher, **common,
                                                interrupted=interrupted)
            lcdd.save(carrier_file, net, phase="lcdd", metrics={"stopped": results["stopped"]},
                      **travels)
            training.forget(state, carrier_file, ["lcdd", "settle"])
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
    wrong = check_lcdd(results, scores, o.train == "joint")
    if wrong and not o.go_on:
        raise Failed(wrong)
    print(f"Next: python eraser.py --run {run}")


if __name__ == "__main__":
    cli(main, together=True)
