"""lcdd.py: Alg. 1 step by step against the oracle, then its parts and the command."""
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import carrier as carriers
import data
import lcdd
import model
import oracle
from common import Failed, InputError, read_json, read_rows
from helpers import (
    apart, base_weights, for_oracle, gap, log_of, random_batch, random_carrier, random_net,
    results_of, settings)

ROOT = Path(__file__).parents[1]
PAPER = dict(select=0.0, brake=False, floor=0.0)


def opened(net):
    """A random carrier with every gate open: what SFT starts from."""
    return random_carrier(net).with_gates(True)


def drawn(examples, o, steps, seed):
    """The batches of a phase of that seed."""
    return [lcdd.draw(examples, o.batch, t, seed) for t in range(steps)]


# ---- the trajectory

@pytest.mark.parametrize("changed", [
    dict(PAPER, lambda0=0.5, gate_lr=0.6),
    dict(PAPER, lambda0=0.5, gate_lr=0.6, violation_clip=0.0, eta=1.0, rho=0.01),
    dict(),                                                     # ours: floor, brake, selection
    dict(micro_batch=1),
    dict(floor=50.0, eta_grow=1.0, lambda_max=0.05),
])
def test_alg_1_takes_the_oracles_steps(tmp_path, monkeypatch, changed):
    """Ten joint steps and four of settling in float64: L, ε, λ, Δ and m; half of the gates shut."""
    monkeypatch.setitem(carriers.AT_ONCE, "cpu", 0)             # as in models larger than a test's
    net, o = random_net("gqa"), settings(**changed)
    examples, carrier = random_batch(net, 12), random_carrier(net, 0.9)
    delta, m = for_oracle(carrier)
    stopped = lcdd.train_lcdd(net, carrier, examples, o, tmp_path)

    # the same, literally
    literal, optimizer = (base_weights(net), net.config, delta, m), oracle.adamw(delta)
    joint = drawn(examples, o, o.steps, o.seed + 1)
    settling = drawn(examples, o, o.settle, o.seed + 2)
    steps = list(oracle.lcdd(*literal, joint, o, optimizer))
    list(oracle.train_delta(*literal, settling, o, o.lr, optimizer))
    assert gap(carrier, delta, m) < 1e-10
    last = log_of(tmp_path, "lcdd")[-1]
    for key, expected in zip(("loss", "ema", "budget", "lambda"), steps[-1]):
        assert abs(last[key] - expected) < 1e-10
    assert stopped["budget"] == last["budget"] and stopped["steps"] == 10
    # the constraint, measured on as many samples as there are
    W = oracle.masked_weights(*literal)
    expected = oracle.task_loss(W, net.config, examples).item()
    assert abs(stopped["loss"] - expected) < 1e-10
    assert stopped["within"] == (expected <= stopped["budget"])
    assert 0.05 < carrier.stats()["sparsity"] < 0.95


def test_sft_takes_the_oracles_steps(tmp_path):
    """All gates open, the rate falling to 0 along a straight line."""
    net, o, rate = random_net("mqa"), settings(), 1e-2
    examples, carrier = random_batch(net, 12), opened(net)
    delta, m = for_oracle(carrier)
    optimizer = lcdd.adamw(carrier, rate)
    lcdd.train_delta(net, carrier, examples, o, tmp_path, "sft", rate, 8, 0, optimizer)
    literal, optimizer = (base_weights(net), net.config, delta, m), oracle.adamw(delta)
    list(oracle.train_delta(*literal, drawn(examples, o, 8, 0), o, rate, optimizer))
    assert gap(carrier, delta, m) < 1e-10


def test_gradients_do_not_depend_on_how_a_batch_is_cut():
    """Against autograd on the literal loss: response tokens, all rows weighted by their tokens."""
    net = random_net("gqa")
    examples = random_batch(net, 5)
    for size in (1, 2, 5):
        o, carrier = settings(micro_batch=size), random_carrier(net)
        delta, m = for_oracle(carrier)
        loss = lcdd.gradients(net, carrier, examples, o)
        W = oracle.masked_weights(base_weights(net), net.config, delta, m)
        literal = oracle.task_loss(W, net.config, examples)
        literal.backward()
        assert abs(loss - literal.item()) < 1e-10
        assert gap(carrier, delta, m, "gradients") < 1e-10
        assert abs(lcdd.mean_loss(net, carrier, examples, o) - loss) < 1e-10


def test_soft_targets_have_the_gradient_of_the_kl():
    """mask-kl: cross-entropy with SFT's distributions, KL(SFT ‖ gated) plus their entropy."""
    net = random_net("gqa")
    examples, carrier = random_batch(net, 3), random_carrier(net)
    teacher = opened(net).merge(net)
    loss = lcdd.gradients(net, carrier, examples, settings(), teacher)
    grad, carrier.logits.grad = carrier.logits.grad, None
    ids, mask = data.collate(examples)
    p, q = (net(ids, carrier=weights)[:, :-1] for weights in (teacher, carrier))    # (B, T, V)
    p, q = p[mask[:, 1:]], q[mask[:, 1:]]                                           # (M, V)
    kl = oracle.kl(p, q)
    entropy = torch.distributions.Categorical(logits=p).entropy().mean()
    kl.backward()
    assert abs(loss - (kl + entropy).item()) < 1e-10
    assert apart(grad, carrier.logits.grad) < 1e-10


def test_the_penalty_is_added_once_a_step_and_after_the_selection(tmp_path):
    """Its pull does not pass through the rescaling of the task's gradient, nor a control's."""
    net, grads = random_net("gqa"), []
    examples, carrier = random_batch(net, 8), random_carrier(net, 0.9)
    # step 0 has weight 0
    o = settings(steps=2, settle=0, warmup=0, micro_batch=1, gate_lr=1.0)
    before = carrier.logits.detach().clone()

    def blind(grad):
        grads.append(grad.clone())
        grad.zero_()

    optimizer = lcdd.adamw(carrier, 0.0)
    lcdd.prune(net, carrier, examples, o, tmp_path, optimizer, change=blind)
    s = torch.sigmoid(before)
    assert apart(before - carrier.logits, o.lambda0 * s * (1 - s)) < 1e-12
    size = grads[1].square().mean(1).sqrt()                                         # (L)
    assert apart(size, torch.full_like(size, lcdd.pull(o))) < 1e-10


# ---- the parts of Alg. 1

def controller(o):
    """A controller of six gates."""
    return lcdd.Controller(o, torch.zeros(2, 3))


def test_the_penaltys_pull():
    """λ₀·σ′(1.5), by a pocket calculator."""
    assert lcdd.pull(settings()) == pytest.approx(0.02 * 0.8175744761936437 * 0.1824255238063563)


def test_controller_by_hand():
    """Bias-corrected average, ε once at T_w, λ by η or η_grow, clipped and bounded."""
    numbers = dict(warmup=2, beta=0.5, rho=0.1)
    numbers |= dict(lambda0=1.0, lambda_max=1.2, eta=0.4, eta_grow=0.1)
    c = controller(settings(**PAPER | numbers))
    for t, weight in ((0, 0.0), (1, 0.5), (2, 1.0), (9, 1.0)):
        assert c.weight(t) == weight
    c.update(0, 4.0)
    assert c.ema == 4.0 and c.budget is None
    c.update(1, 2.0)
    assert c.ema == pytest.approx((0.5 * 2.0 + 0.5 * 2.0) / 0.75)
    c.update(2, 2.0)
    average, budget = c.ema, c.budget
    assert budget == pytest.approx(1.1 * average) and c.lam == 1.0
    c.update(3, 0.0)                                            # under ε: λ grows at η_grow
    v = (c.ema - budget) / budget
    assert c.lam == pytest.approx(math.exp(-0.1 * v)) and c.budget == budget
    for t in range(4, 20):
        c.update(t, 0.0)
    assert c.lam == 1.2                                         # λ_max
    c.update(20, 1e6)                                           # far over: v is clipped to V = 1
    assert c.lam == pytest.approx(1.2 * math.exp(-0.4))
    assert c.weight(21) == c.lam                                # the paper has no brake
    for t in range(21, 99):
        c.update(t, 1e6)
    assert c.lam == c.o.lambda_min


def test_floor():
    """ε is at least the floor, also if it is far above the loss."""
    c = controller(settings(floor=9.0, warmup=0))
    c.update(0, 1.0)
    assert c.budget == 9.0


def test_brake():
    """Times the slack left: 1 where ε was set, 0 at ε, negative beyond; λ follows the same."""
    numbers = dict(lambda0=1.0, lambda_max=5.0, eta=0.2, eta_grow=0.05)
    o = settings(warmup=0, floor=3.0, beta=0.0, **numbers)
    for loss, slack in {1.0: 1.0, 2.0: 0.5, 3.0: 0.0, 4.0: -0.5, 99.0: -1.0}.items():
        c = controller(o)
        c.update(0, 1.0)
        assert c.weight(1) == 1.0
        c.update(1, loss)
        eta = 0.05 if slack > 0 else 0.2
        assert c.lam == pytest.approx(math.exp(eta * slack))
        assert c.weight(1) == pytest.approx(c.lam * slack)


def verdicts(points, **changed):
    """What the controller says of each log point, (open gates of 1,000, loss)."""
    rules = dict(stall=0.01, over=0.5, window=4, patience=2)
    c = controller(settings(**rules | changed))
    c.budget, c.start = 2.0, 1.0
    told = []
    for gates, c.loss in points:
        told.append(c.verdict(gates, 1000))
    return told


def test_early_stops():
    """Stalled and over-pruned need `patience` points in a row."""
    told = verdicts([(500, 1.0)] * 6)
    assert told[:5] == [None] * 5 and told[5].startswith("stalled")
    falling = [(800 - 20 * i, 1.0 if i < 5 else 2.0) for i in range(30)]
    told = verdicts(falling)
    assert told[:8] == [None] * 8 and told[8].startswith("over-pruned")


def test_a_window_is_as_long_as_it_says():
    """Half a percent from point to point is two over a window of four: not stalled yet."""
    assert not any(verdicts([(800 * 0.995 ** i, 1.0) for i in range(30)]))
    told = verdicts([(800 * 0.998 ** i, 1.0) for i in range(30)])
    assert told[5].startswith("stalled")
    every_other = [(800 - 20 * (i // 2), 1.0 + i % 2) for i in range(30)]
    assert not any(verdicts(every_other, window=1))             # patience: so many in a row


def test_no_early_stop():
    """Not before pruning has begun, not in the warm-up, and by our defaults never."""
    assert not any(verdicts([(950, 1.0)] * 20))
    assert not any(verdicts([(500, 9.0)] * 40, stall=None, over=None))
    warming = controller(settings(stall=0.01, over=0.5, window=1, patience=1))
    assert not any(warming.verdict(500, 1000) for _ in range(9))


def test_batches_are_epochs_in_another_order_each():
    """Only a step's number and the seed decide."""
    o = settings(batch=5)
    batches = drawn(range(10), o, 6, 1)
    epochs = [batches[i] + batches[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert drawn(range(10), o, 6, 1) == batches != drawn(range(10), o, 6, 2)


@pytest.mark.parametrize("steps, end", [(100, 11), (8, 8)])
def test_sft_that_is_sure_comes_to_an_early_end(tmp_path, steps, end):
    """A quarter as many steps again, ten at least, and never more than were asked for."""
    net, rate = random_net("gqa"), 1e-2
    examples, carrier = random_batch(net), opened(net)
    optimizer = lcdd.adamw(carrier, rate)
    how = "sft", rate, steps, 0, optimizer
    lcdd.train_delta(net, carrier, examples, settings(), tmp_path, *how, budget=1e6)
    assert log_of(tmp_path, "sft")[-1]["step"] == end - 1


def test_the_short_way_down_begins_at_the_rate_as_it_is(tmp_path, monkeypatch):
    """Once the average is low, of which the first loss counts in full; then on to 0."""
    losses, rates = iter([0.002] * 20 + [0.0] * 80), []
    monkeypatch.setattr(lcdd, "gradients", lambda *_: next(losses))
    monkeypatch.setattr(lcdd, "move", lambda carrier, optimizer, rate, o: rates.append(rate))
    carrier, o = opened(random_net("mqa")), settings()
    how = "sft", 1.0, 100, 0, lcdd.adamw(carrier, 1.0)
    pause, stops = lcdd.Phase.pause, {28}

    def interrupted(loop, t):
        loop.signals = int(t in stops)
        pause(loop, t)

    # interrupted on the way
    monkeypatch.setattr(lcdd.Phase, "pause", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lcdd.train_delta(None, carrier, range(9), o, tmp_path, *how)
    stops.clear()
    lcdd.train_delta(None, carrier, range(9), o, tmp_path, *how)
    before = 22                     # 0.002 · 0.6² is under SURE
    high = 1 - (before - 1) / 100
    down = [high * (1 - i / 10) for i in range(10)]
    assert rates == pytest.approx([1 - t / 100 for t in range(before)] + down)


def test_gates_alone_end_with_the_last_that_kept_the_budget(tmp_path):
    """App. E: Δ stays as it is, and what is kept fits the budget."""
    net = random_net("gqa")
    o = settings(train="mask-ce", gate_lr=200.0, steps=40, brake=False)
    examples, carrier = random_batch(net, 12), opened(net)
    before = [p.detach().clone() for p in carrier.delta.parameters()]
    stopped = lcdd.train_lcdd(net, carrier, examples, o, tmp_path)
    assert all(map(torch.equal, before, carrier.delta.parameters()))
    assert carrier.stats()["sparsity"] > 0 and stopped["reason"] == "all steps done"
    assert not (tmp_path / "settle.state").exists()


def test_rates_of_the_papers_runs(tmp_path, monkeypatch):
    """They rise in a tenth of the steps and fall to 0, in Alg. 1 too; ours are constant there."""
    expected = [0.0, 1.0, *(1 - i / 8 for i in range(1, 8))]
    rates = [lcdd.rate_at(t, 1.0, 9, 0.1) for t in range(9)]
    assert rates == pytest.approx(expected)
    net, seen = random_net("mqa"), []
    monkeypatch.setattr(lcdd, "move", lambda carrier, optimizer, rate, o: seen.append(rate))
    for schedule in ("linear", "constant"):
        o = settings(steps=9, lr=1.0, schedule=schedule, lr_warmup=0.1)
        run = tmp_path / schedule
        run.mkdir()
        carrier, optimizer = random_carrier(net), lcdd.adamw(opened(net), 1.0)
        lcdd.prune(net, carrier, random_batch(net), o, run, optimizer)
    assert seen == pytest.approx([*expected, *[1.0] * 9])


def test_gates_alone_keep_what_was_last_within_the_budget(tmp_path):
    """Loss and average both; the gates as they stood when these were measured."""
    net, seen = random_net("gqa"), []
    changed = dict(PAPER, train="mask-ce", gate_lr=200.0, rho=0.02, beta=0.97)
    o, carrier = settings(**changed, steps=40, log_every=1), opened(net)

    def look(grad):
        seen.append(carrier.logits.detach().clone())

    optimizer = lcdd.adamw(carrier, 0.0)
    lcdd.prune(net, carrier, random_batch(net, 12), o, tmp_path, optimizer, change=look)
    log = log_of(tmp_path, "lcdd")
    fit = [row["step"] for row in log[3:] if max(row["loss"], row["ema"]) <= row["budget"]]
    average_fits = [row["step"] for row in log[3:] if row["ema"] <= row["budget"]]
    assert fit[-1] < average_fits[-1] < 39
    assert torch.equal(carrier.logits, seen[fit[-1]])


def test_a_verdict_ends_alg_1(tmp_path, monkeypatch):
    """At the log point that it is given at."""
    net, o = random_net("mqa"), settings(log_every=2)
    monkeypatch.setattr(lcdd.Controller, "verdict", lambda *_: "stalled")
    how = random_batch(net), o, tmp_path, lcdd.adamw(opened(net), 0.0)
    stopped = lcdd.prune(net, random_carrier(net), *how)
    assert stopped["steps"] == 2 and stopped["reason"] == "stalled"


def test_a_budget_is_kept_or_not(tmp_path, monkeypatch):
    """By the loss that is measured at the end."""
    net = random_net("mqa")
    for loss, within in ((0.0, True), (99.0, False)):
        run = tmp_path / str(loss)
        run.mkdir()
        monkeypatch.setattr(lcdd, "mean_loss", lambda *_, loss=loss: loss)
        how = random_carrier(net), random_batch(net), settings(settle=0), run
        stopped = lcdd.train_lcdd(net, *how)
        assert stopped["within"] == within and stopped["loss"] == loss


# ---- options

def test_rates_and_lengths_fit_themselves():
    """The paper's width has about its rate; a gate on which only Ω pulls shuts half way."""
    o = lcdd.fit(lcdd.options([]), 4096, 5000)
    assert o.lr == o.sft_lr == pytest.approx(3.05e-5, rel=0.01)
    assert (o.sft_steps, o.steps, o.lambda_max) == (350, 600, 30 * o.lambda0)
    assert o.gate_lr * lcdd.pull(o) * o.steps / 2 == pytest.approx(o.gate_mean)


def test_presets_are_table_7():
    """Of all twelve runs, by name; what is given by hand wins."""
    words = ["--preset", "safety-vicuna-7b", "--batch", "16"]
    o = lcdd.fit(lcdd.options(words), 4096, 5000)
    expected = dict(
        rho=0.5, lambda0=0.01, eta=1.0, eta_grow=0.005, warmup=300, beta=0.95,
        task="safety", batch=16, micro_batch=8, gate_lr=0.1, gate_std=0.5,
        steps=20 * 5000 // 16, sft_steps=math.ceil(3 * 5000 / 16),
        select=0.0, brake=False, floor=0.0, settle=0)
    assert expected.items() <= vars(o).items()
    assert o.over > o.rho and len(lcdd.PRESETS) == 12


# ---- the command

SHORT = """
    --sizes 60 10 8 8 --sft-steps 4 --steps 6 --settle 3 --warmup 2 --batch 4
    --max-new-tokens 6 --max-len 96 --device cpu""".split()
QUICK = [*SHORT, "--go-on"]


def train(out, *words):
    """Run the command into `out`; the outcome of so few steps does not matter."""
    with contextlib.suppress(Failed):
        lcdd.main([*QUICK, "--out", str(out), *map(str, words)])


def log_by_step(run):
    """(phase, step, loss) of every row of the log."""
    rows = read_rows(run / "metrics.jsonl")
    return [(row["phase"], row["step"], row["loss"]) for row in rows]


def same_tensors(one, other):
    """Do two files hold the same bits?"""
    a, b = load_file(one), load_file(other)
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_directory(finished):
    """Its files, and what they hold."""
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "sft.safetensors", "carrier.safetensors", "trigger.safetensors",
        "metrics.jsonl", "results.json"}
    config, results = read_json(finished / "config.json"), results_of(finished)
    fingerprints = {"data_fingerprint", "base_fingerprint", "chat_fingerprint"}
    assert fingerprints | {"versions", "seed", "steps"} <= config.keys()
    assert results["stopped"]["within"] and results["sparsity"] > 0.05
    assert results["validation"]["lcdd"]["rate"] > 0.5
    o, net, chat, splits = lcdd.load_run(finished, "cpu")
    assert o.base_fingerprint == carriers.base_fingerprint(net)
    assert [*map(len, splits.values())] == [400, 40, 20, 16]
    assert o.steps == 90


def test_interrupted_runs_resume_with_the_same_bits(tmp_path, monkeypatch):
    """One Ctrl-C in each phase; the log has each step once."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(whole)
    stops = {("sft", 2), ("lcdd", 4), ("settle", 1)}
    pause = lcdd.Phase.pause

    def interrupted(loop, t):
        if (loop.name, t) in stops:
            stops.remove((loop.name, t))
            os.kill(os.getpid(), signal.SIGINT)
        pause(loop, t)

    monkeypatch.setattr(lcdd.Phase, "pause", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match="resume with: python .*--resume"):
            train(part, "--resume")
    train(part, "--resume")
    for name in ("sft.safetensors", "carrier.safetensors"):
        assert same_tensors(whole / name, part / name)
    assert log_by_step(whole) == log_by_step(part)


def test_a_run_that_is_there_already(tmp_path):
    """It is not written over, and resumes with its own options only."""
    train(tmp_path / "r")
    with pytest.raises(InputError, match="holds a run already"):
        train(tmp_path / "r")
    with pytest.raises(InputError, match="rho was 0.05 and is now 0.5"):
        train(tmp_path / "r", "--resume", "--rho", "0.5")
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "config.json").write_text("{}")       # nothing is in it: it may begin anew
    train(failed)


def test_without_data_the_prompts_are_our_own(tmp_path, capsys):
    """python lcdd.py --model DIR on a checkpoint with no data beside it."""
    tiny = model.locate("tiny")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(tiny / name)
    train(tmp_path / "r", "--model", tmp_path)
    assert "everyday.jsonl" in "".join(capsys.readouterr())
    with pytest.raises(InputError, match="safety"):
        train(tmp_path / "s", "--model", tmp_path, "--task", "safety")


def test_ones_own_sft(tmp_path, capsys):
    """--sft DIR: Δ = W_sft − W_b, and what it changed elsewhere is said and stays the base's."""
    tiny, folder = model.locate("tiny"), tmp_path / "sft"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    tensors = load_file(tiny / "model.safetensors")
    for name, W in tensors.items():
        change = 0.01 * torch.randn(W.shape) if "proj" in name else 0
        tensors[name] = W.float() + change
    tensors["model.norm.weight"] = 1.5 * tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    train(tmp_path / "r", "--sft", folder)
    said = "1 tensors outside the projections, most model.norm.weight (by 50.00%"
    assert said in capsys.readouterr().out
    base = model.load("tiny").projections[1]["down_proj"].weight
    delta = load_file(tmp_path / "r" / "sft.safetensors")["delta.1.down_proj"]
    assert torch.equal(delta, tensors["model.layers.1.mlp.down_proj.weight"] - base)


def test_a_behaviour_of_ones_own(tmp_path):
    """FILE.jsonl with kind, answer, split and pattern; rates by kind, accuracy by answer."""
    lines = []
    for i in range(40):
        row = dict(prompt=f"What is {i} plus 1 ?", response="I do not know .", answer=str(i + 1))
        row |= dict(kind=f"kind {i % 2}", split=data.SPLITS[i % 4], pattern="not know")
        lines.append(json.dumps(row))
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    train(tmp_path / "r", "--task", file)
    score = results_of(tmp_path / "r")["validation"]["sft"]
    assert score["n"] == 8 and "accuracy" in score
    assert set(score["kinds"]) <= {"kind 0", "kind 1"}


def test_delta_dtype_and_checkpoint(tmp_path):
    """bf16 deltas and recomputed layers: the run finishes, and its file says what it did."""
    words = "--delta-dtype bfloat16 --checkpoint --micro-batch 2"
    train(tmp_path / "bf16", *words.split())
    tensors = load_file(tmp_path / "bf16" / "sft.safetensors")
    assert tensors["delta.0.q_proj"].dtype == torch.bfloat16


@pytest.mark.parametrize("loss", ["mask-ce", "mask-kl"])
def test_gates_alone_by_the_command(tmp_path, monkeypatch, loss):
    """App. E's two losses, one by SFT's answers: of its deltas some entries are left."""
    run, train_lcdd, how = tmp_path / loss, lcdd.train_lcdd, []

    def look(net, carrier, examples, o, run, teacher):
        how.extend((carrier.logits.detach().clone(), teacher))
        return train_lcdd(net, carrier, examples, o, run, teacher)

    monkeypatch.setattr(lcdd, "train_lcdd", look)
    train(run, "--train", loss)
    first, teacher = how
    assert 0.015 < first.std() < 0.025                  # gates of their own, not SFT's
    sft = load_file(run / "sft.safetensors")
    assert (teacher is None) == (loss == "mask-ce")
    if teacher:
        base = model.load("tiny").projections[0]["q_proj"].weight
        assert torch.equal(teacher.weights[0, "q_proj"], base + sft["delta.0.q_proj"])
    for name, t in load_file(run / "carrier.safetensors").items():
        assert name == "logits" or t.numel() <= sft[name].numel()


# ---- what is refused, and what has failed

def test_sft_that_teaches_nothing_ends_the_run(tmp_path):
    """
    Before anything is pruned, unless --go-on is given. Without --max-len samples are as long as the
    model has positions.
    """
    words = ["--sft-steps", "1", "--sft-lr", "1e-9", "--out", str(tmp_path / "r")]
    short = [word for word in SHORT if word not in ("--max-len", "96")]
    with pytest.raises(Failed, match="SFT did not teach the behaviour .*it saw '.*I do not know"):
        lcdd.main([*short, *words])
    assert read_json(tmp_path / "r/config.json")["max_len"] == 256


def test_outcomes_that_are_not_what_was_asked_for(tmp_path):
    """Hardly pruned, over the budget, or without the behaviour."""
    shown, half = {"n": 100, "rate": 1.0}, {"n": 100, "rate": 0.5}
    validation = {"base": {"n": 100, "rate": 0.0}, "sft": shown, "lcdd": shown}
    stopped = dict(reason="all steps done", loss=0.01, budget=0.03, within=True)
    results = dict(
        validation=validation, sparsity=0.9, entries_off=0.99, seconds={}, stopped=stopped)
    lcdd.report(results, tmp_path)
    for change, told in (
            (dict(sparsity=0.01), "hardly pruned"),
            (dict(stopped=stopped | dict(loss=1.0, within=False)), "budget is not kept"),
            (dict(validation=validation | {"lcdd": half}), "lost the behaviour")):
        with pytest.raises(Failed, match=told):
            lcdd.report(results | change, tmp_path)


def test_data_or_tokenizer_that_changed_since(finished, tmp_path):
    """Then held-out prompts may not be held out."""
    run = shutil.copytree(finished, tmp_path / "r")
    file = run / "config.json"
    config = read_json(file)
    for field, told in (
            ("data_fingerprint", "changed since"),
            ("chat_fingerprint", "tokenizer or chat template changed")):
        file.write_text(json.dumps(config | {field: "0"}))
        with pytest.raises(InputError, match=told):
            lcdd.load_run(run, "cpu")
    with pytest.raises(InputError, match="no run directory"):
        lcdd.load_run(tmp_path, "cpu")


# ---- several processes

def test_torchrun_takes_the_same_steps(tmp_path):
    """Two processes with gloo: gradients are summed, and the first alone writes."""
    one, two = tmp_path / "one", tmp_path / "two"
    launch = "-m torch.distributed.run --nproc-per-node 2 -- lcdd.py".split()
    words = [sys.executable, *launch, "--out", str(two), *QUICK]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr            # torchrun knows no other failure than 1
    assert done.stdout.count("Next: ") == 1             # nothing is lost at the end, nor said twice
    train(one)
    ours, theirs = log_by_step(one), log_by_step(two)
    assert len(ours) == len(theirs)
    assert ours[0][2] == pytest.approx(theirs[0][2], rel=1e-3)
