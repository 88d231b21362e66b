"""
training.py, controller.py, checks.py and lcdd.py: the loss, the decisions and the loop of Alg. 1,
resuming, and the command line.
"""
import functools
import gc
import json
import math
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SMALL as CONFIG, Seen, brief, examples, fresh, make_net, state
from helpers import training_settings as settings
from safetensors.torch import load_file, save_file

import carrier as carriers
import checks
import controller as controllers
import lcdd
import model
import training
from carrier import Carrier
from chat import collate
from controller import Chance, Controller, EarlyStop, Selection, faster, hold_back, reopen_last
from files import InputError, fingerprint, load_tensors, read_json, read_jsonl, write_json
from run import read_results, reopen
from settings import PRESETS, fit, pull

# ---- the loss

def test_task_loss_is_cross_entropy_on_the_marked_tokens():
    net, c = fresh()
    batch = examples(5)
    ids, mask = collate(batch, 0)
    want = 0.0
    for row, marks in batch:                                     # one by one, position by position
        logits = net(torch.tensor([row]), carrier=c)[0]
        want += sum(-logits[t - 1].log_softmax(-1)[row[t]] for t in range(1, len(row)) if marks[t])
    for chunk in (1024, 7, 1):
        assert torch.allclose(
            training.task_loss(net, c, ids, mask, chunk=chunk).double(), want, atol=1e-10
        )


def test_chunked_head_has_the_same_gradients():
    net, c = fresh()
    ids, mask = collate(examples(6), 0)
    grads = []
    for chunk in (1024, 5):
        c.zero_grad()
        training.task_loss(net, c, ids, mask, chunk=chunk).backward()
        grads.append([p.grad.clone() for p in c.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads))
    assert grads[0][0].abs().max() > 1e-4


def test_soft_targets_are_the_divergence_and_the_teachers_entropy():
    net, c = fresh()
    _, other = fresh(seed=1)
    teacher = other.with_gates(True).merge(net)
    ids, mask = collate(examples(4), 0)
    p = net(ids[:, :-1], carrier=teacher).log_softmax(-1)[mask[:, 1:]]
    entropy = -(p.exp() * p).sum()
    soft = training.task_loss(net, c, ids, mask, teacher).double()
    true = training.task_loss(net, c, ids, mask, teacher, divergence=True).double()
    assert torch.allclose(soft - true, entropy, atol=1e-10)


def test_kl_loss_is_the_divergence_from_the_teacher():
    net, c = fresh()
    _, other = fresh(seed=1)
    teacher = other.with_gates(True).merge(net)
    ids, mask = collate(examples(4), 0)
    p = net(ids[:, :-1], carrier=teacher).log_softmax(-1)[mask[:, 1:]]
    q = net(ids[:, :-1], carrier=c).log_softmax(-1)[mask[:, 1:]]
    want = (p.exp() * (p - q)).sum()
    assert torch.allclose(
        training.task_loss(net, c, ids, mask, teacher, divergence=True).double(), want, atol=1e-10
    )
    assert want > 1e-3
    assert abs(float(training.task_loss(net, teacher, ids, mask, teacher, divergence=True))) < 1e-12


# ---- the controller

def controller(**changes):
    return Controller(
        settings(
            **{
                **dict(
                    beta=0.5, warmup=3, rho=0.5, floor=0.0, lambda0=1.0, eta=0.2, eta_grow=0.05,
                    violation_clip=0.5, lambda_min=0.5, lambda_max=1.5
                ),
                **changes,
            }
        )
    )


def test_average_is_bias_corrected():
    c, losses, ema = controller(), [3.0, 1.0, 2.0, 5.0], 0.0
    for t, loss in enumerate(losses):
        c.update(t, loss)
        ema = 0.5 * ema + 0.5 * loss
        assert c.ema == pytest.approx(ema / (1 - 0.5 ** (t + 1)))
    c = controller()
    c.update(0, 3.0)
    # without the correction it would be 1.5
    assert c.ema == pytest.approx(3.0)


def test_warm_up_fades_the_penalty_in_and_lambda_rests():
    c = controller()
    assert [c.weight(t) for t in range(5)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    for t in range(3):
        c.update(t, 100.0 * t)
        assert c.lam == 1.0
        assert c.budget is None


def test_budget_is_set_once():
    c = controller()
    for t in range(4):
        c.update(t, 2.0)
    assert c.budget == pytest.approx(3.0)
    assert c.lam == 1.0        # (1 + ρ)·ema; the step that sets it does not move λ
    for t in range(4, 9):
        c.update(t, 20.0)
    assert c.budget == pytest.approx(3.0)


def test_floor_on_the_budget():
    c = controller(floor=0.3)
    for t in range(4):
        c.update(t, 1e-4)
    assert c.budget == 0.3


def test_lambda_grows_under_and_shrinks_over_budget():
    c = controller()
    for t in range(4):
        c.update(t, 2.0)
    c.update(4, 2.0)                                              # v = (2 − 3)/3 = −1/3
    assert c.lam == pytest.approx(math.exp(0.05 / 3))
    before = c.lam
    c.update(5, 8.0)                                              # smooth > 3
    v = min(0.5, (c.ema - 3) / 3)
    assert v > 0
    assert c.lam == pytest.approx(before * math.exp(-0.2 * v))


def test_violation_is_clipped_and_lambda_bounded():
    c = controller()
    for t in range(4):
        c.update(t, 2.0)
    c.update(4, 1e6)
    assert c.lam == pytest.approx(math.exp(-0.2 * 0.5))           # V
    for t in range(5, 40):
        c.update(t, 1e6)
    assert c.lam == 0.5                                           # λ_min
    c.ema = 0.0
    for t in range(40, 400):
        c.update(t, 0.0)
    assert c.lam == 1.5                                           # λ_max


def braked(ema):
    c = controller(brake=True, rho=0.5)
    for t in range(4):
        c.update(t, 2.0)                                          # it starts at 2, ε = 3
    c.ema = ema
    return c.weight(100) / c.lam


def test_the_penalty_fades_as_the_loss_nears_the_budget():
    assert braked(2.0) == pytest.approx(1.0)
    assert braked(2.5) == pytest.approx(0.5)
    assert braked(3.0) == 0.0


def test_a_loss_below_its_start_is_no_more_than_room():
    assert braked(0.5) == 1.0


def test_beyond_the_budget_the_penalty_turns_round():
    assert braked(3.25) == pytest.approx(-0.25)
    assert braked(99.0) == -1.0


def test_lambda_on_its_way_back_is_no_stall():
    c = controller(brake=True, rho=0.5, beta=0.0, lambda_min=0.1)
    for t in range(4):
        c.update(t, 2.0)
    assert not c.recovers()
    for t in range(4, 14):
        c.update(t, 9.0)                                          # far over ε = 3: λ falls to e⁻¹
    assert c.lam < c.highest / 2
    assert not c.recovers()                                       # and is still falling
    c.update(14, 2.0)
    assert c.recovers()
    c.lam = 0.6 * c.highest
    assert not c.recovers()
    c.lam, c.o.brake = 0.1, False
    assert not c.recovers()


def test_with_the_brake_lambda_moves_by_what_is_left_of_the_slack():
    c = controller(brake=True, rho=0.5, beta=0.0, violation_clip=1.0)
    for t in range(4):
        c.update(t, 2.0)
    c.update(4, 2.5)
    assert c.lam == pytest.approx(math.exp(0.05 * 0.5))
    c.update(5, 3.5)
    assert c.lam == pytest.approx(math.exp(0.05 * 0.5 - 0.2 * 0.5))


def test_no_brake_without_a_budget_or_where_it_is_off():
    assert controller(brake=True).brake() == 1.0
    c = controller(brake=False)
    for t in range(4):
        c.update(t, 2.0)
    c.ema = 9.0
    assert c.brake() == 1.0


def test_selection_scales_the_mean_gradient_to_the_penaltys_pull():
    o = settings(select=2.0, spread=0.0, lambda0=0.05, gate_mean=1.5)
    g = [torch.randn(2, 30, dtype=torch.float64) * 1e-9 for _ in range(3)]
    selection, mean = Selection(o, g[0]), torch.zeros(2, 30, dtype=torch.float64)
    for grad in g:
        mean = 0.9 * mean + 0.1 * grad
        got = grad.clone()
        selection.rescale(got, 5, warm=0.5)
    s = 1 / (1 + math.exp(-1.5))
    size = 0.5 * 2.0 * 0.05 * s * (1 - s)
    assert torch.allclose(got, mean / mean.square().mean().sqrt() * size, rtol=1e-10)


@pytest.mark.parametrize("spread, sizes", [(0.0, (1, 100)), (0.5, (1, 10)), (1.0, (1, 1))])
def test_spread_evens_out_the_layers_say(spread, sizes):
    """Of two layers, one with 100 times the gradient of the other: ratio of what they are given."""
    o = settings(select=1.0, spread=spread)
    grad = torch.randn(1, 30, dtype=torch.float64).repeat(2, 1) * torch.tensor([[1e-9], [1e-7]])
    Selection(o, grad).rescale(grad, 0, warm=1.0)
    small, large = grad.square().mean(1).sqrt()
    assert float(large / small) == pytest.approx(sizes[1] / sizes[0])
    # a scale a layer: each has the penalty's pull
    if spread == 1.0:
        assert float(large) == pytest.approx(pull(o))


@pytest.mark.parametrize("sure, budget, want", [
    (1e-3, 0.03, 3e-3), (1e-3, 0.005, 1e-3), (0.0, 0.03, 0.0), (1e-3, None, 1e-3)])
def test_settling_ends_at_a_tenth_of_the_budget(sure, budget, want, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train_delta", lambda *a, **named: seen.append(named["sure"]))
    monkeypatch.setattr(training, "mean_loss", lambda *a: 0.0)
    found = {"budget": budget}
    lcdd.settle(None, fresh()[1], [], settings(sure=sure), None, 0, None, found, None, None)
    assert seen == [pytest.approx(want)]


def shut_by(logits, grad, share, rate=1.0):
    """The numbers of the gates that one step of SGD shuts."""
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    logits.grad = torch.tensor(grad, dtype=torch.float64)
    before = logits.detach() > 0
    hold_back(logits, rate, share)
    torch.optim.SGD([logits], lr=rate).step()
    return (before & (logits.detach() <= 0)).nonzero().flatten().tolist()


def test_no_more_gates_shut_in_a_step_than_the_pace_allows():
    logits, grad = [0.4, 0.1, 0.3, 0.2, 5.0, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert shut_by(logits, grad, 0.0) == [0, 1, 2, 3]
    assert shut_by(logits, grad, 0.4) == [1, 3]                  # 2 of 5: those with the least left
    assert shut_by(logits, grad, 0.01) == [1]                    # at least one
    assert shut_by(logits, [4.0, 0.2, 1.0, 1.0, 1.0, 1.0], 0.2, rate=0.5) == [0]


def test_pruning_keeps_the_pace(tmp_path):
    """In a run: without a pace many gates shut at once, with one no more than its share."""
    worst = {}
    for pace in (0.0, 0.1):
        run = tmp_path / str(pace)
        run.mkdir()
        net, c = fresh()
        c.init_gates(1.5, 0.02)
        o = settings(pace=pace, gate_lr=20.0, settle=0, log_every=1, floor=100.0)
        lcdd.train_lcdd(net, c, examples(), o, run, 0)
        counts = [r["open"] for r in read_jsonl(run / "metrics.jsonl") if r["phase"] == "lcdd"]
        worst[pace] = max(1 - b / a for a, b in zip(counts, counts[1:]) if a)
    assert worst[0.0] > 0.2
    assert worst[0.1] <= 0.1


@pytest.mark.parametrize("beta, pace", [(0.9, 0.05), (0.95, 0.025), (0.0, 0.5)])
def test_the_pace_waits_for_the_average(beta, pace):
    o = lcdd.options(["--beta", str(beta)])
    assert fit(o, 128, 1000).pace == pace
    o.pace = 0.0
    assert fit(o, 128, 1000).pace == 0.0


def test_gates_that_need_not_wait_move_as_without_a_pace():
    logits = torch.tensor([0.1, 0.2, 3.0, -0.5], requires_grad=True)
    logits.grad = torch.tensor([1.0, 1.0, 1.0, -2.0])
    hold_back(logits, 1.0, 0.1)
    assert logits.grad.tolist() == [1.0, 0.0, 1.0, -2.0]


def test_without_selection_the_gradient_is_the_tasks_own():
    grad = torch.randn(2, 30)
    before = grad.clone()
    Selection(settings(select=0.0), grad).rescale(grad, 0, 1.0)
    assert torch.equal(grad, before)


def test_gates_that_shut_last_open_first():
    net, c = fresh()
    flat = c.logits.data.view(-1)
    flat.copy_(torch.linspace(-1, 1, len(flat), dtype=torch.float64))
    was_open = flat > 0
    more = reopen_last(c, 0.1)
    assert more == math.ceil(0.1 * int(was_open.sum()))
    assert torch.equal(flat > 0, torch.arange(len(flat)) >= int((~was_open).sum()) - more)


def test_where_the_budget_is_not_kept_gates_open_again(tmp_path, capsys):
    net, c = fresh()
    found = lcdd.train_lcdd(
        net, c, examples(), settings(settle=2, floor=0.0, rho=-0.5, steps=20), tmp_path, 0
    )
    assert found["reopened"] > 0
    assert not found["within"]
    assert found["loss"] == pytest.approx(training.mean_loss(net, c, examples(), 0, 8))
    assert "above the budget" in capsys.readouterr().out


def test_a_budget_that_is_kept_opens_nothing(tmp_path):
    net, c = fresh()
    found = lcdd.train_lcdd(net, c, examples(), settings(settle=2, floor=100.0), tmp_path, 0)
    assert found["reopened"] == 0
    assert found["within"]


def test_sft_ends_early_where_the_model_is_sure(tmp_path):
    net, c = fresh()
    o = settings(sft_steps=400, sure=1e9, log_every=1)
    lcdd.train_sft(net, c, examples(), o, tmp_path, 0)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    # sure after one step, ten more to come down
    assert len(rows) == 11


def test_settings_follow_from_width_and_steps():
    o = lcdd.fit(lcdd.options(["--model", "x"]), width=500, n=10)
    assert (o.lr, o.sft_lr) == (0.125 / 500, 0.125 / 500)
    assert (o.steps, o.sft_steps) == (600, 350)
    s = 1 / (1 + math.exp(-o.gate_mean))
    assert o.gate_lr * o.lambda0 * s * (1 - s) * o.steps / 2 == pytest.approx(o.gate_mean)


def test_steps_do_not_depend_on_the_number_of_rows():
    few, many = (lcdd.fit(lcdd.options(["--model", "x"]), 64, n) for n in (50, 50000))
    assert (few.steps, few.sft_steps) == (many.steps, many.sft_steps)


def test_a_stop_inside_the_budget_is_refused():
    with pytest.raises(InputError, match="--over 0.3"):
        lcdd.options(["--model", "x", "--rho", "0.5", "--over", "0.3"])


def test_the_papers_stop_follows_its_budget():
    o = lcdd.options(["--model", "x", "--preset", "paper-safety-vicuna-7b"])
    assert o.over > o.rho == 0.5


def test_log_points_of_the_warm_up_do_not_count():
    early = EarlyStop(settings(window=2, patience=1, over=0.5), total=1000)
    for _ in range(10):
        assert early.update(1000, 50.0, None) is None             # still warming up
    assert early.points == []
    for _ in range(4):
        assert early.update(990, 50.0, 1.0) is None               # hardly a gate has moved


def test_early_stop_when_stalled_but_not_before_pruning_begins():
    o = settings(window=4, patience=3, stall=0.01, over=0.35)
    early = EarlyStop(o, total=1000)
    assert [early.update(950, 1.0, 1.0) for _ in range(20)] == [None] * 20
    early = EarlyStop(o, total=1000)
    said = [early.update(500, 1.0, 1.0) for _ in range(7)]
    assert said[:6] == [None] * 6
    assert "stalled" in said[6]        # points 5, 6 and 7 look back over a whole window
    early = EarlyStop(o, total=1000)
    assert not any(early.update(800 - 10 * k, 1.0, 1.0) for k in range(30))


def test_gates_that_rest_while_lambda_recovers_do_not_stall():
    early = EarlyStop(settings(window=4, patience=3, stall=0.01), total=1000)
    assert not any(early.update(500, 1.0, 1.0, recovers=True) for _ in range(20))
    assert "stalled" in [early.update(500, 1.0, 1.0) for _ in range(3)][2]


def test_early_stop_when_over_pruned():
    early = EarlyStop(settings(window=4, patience=3, over=0.35), total=1000)
    said = [early.update(900 - 50 * k, 1.3 if k < 5 else 1.4, 1.0) for k in range(12)]
    assert said.index(next(s for s in said if s)) == 9
    assert "over-pruned" in said[9]   # medians at points 8, 9, 10 exceed 1.35


# ---- what of a loss comes of the choice of samples

def test_losses_are_those_of_single_samples():
    net, c = fresh()
    some = examples(7)
    found = training.losses(net, c, some, 0, micro_batch=3)
    assert found.shape == (7, 2)
    for (loss, tokens), sample in zip(found.tolist(), some):
        assert loss / tokens == pytest.approx(training.mean_loss(net, c, [sample], 0, 1), abs=1e-12)
        assert tokens == sum(sample[1][1:])


def of_chance(**changes):
    net, c = fresh()
    o = settings(paired=True, floor=1e-3, batch=4, steps=2, **changes)
    return net, c, o, Chance.measured(net, c, examples(11), o, 0)


def test_chance_is_sfts_loss_of_a_batch_beyond_its_loss_on_all():
    net, c, o, chance = of_chance()
    drawn = training.draw(range(11), 8, 0, o.seed + 1)            # two batches of four
    assert sorted(set(drawn)) == chance.losses[:, 1].nonzero().squeeze(1).tolist()
    every = training.mean_loss(net, c, [examples(11)[i] for i in drawn], 0, 8)
    batch = training.mean_loss(net, c, [examples(11)[i] for i in drawn[:4]], 0, 8)
    assert chance.of(drawn[:4]) == pytest.approx(batch - every, abs=1e-12)
    assert abs(chance.of(drawn[:4])) > 1e-3


@pytest.mark.parametrize("changes", [dict(floor=99.0), dict(paired=False), dict(floor=0.0)])
def test_no_chance_is_measured_without_need(changes, monkeypatch):
    """Where ε is absolute or all is off; and near 0, where what is left would fall below 0."""
    net, c = fresh()
    if changes == dict(floor=0.0):
        monkeypatch.setattr(controllers, "NEAR_0", 99.0)
    o = settings(**{"paired": True, "floor": 1e-3} | changes)
    chance = Chance.measured(net, c, examples(), o, 0)
    assert chance.losses is None
    assert chance.of([1, 2]) == 0.0


def test_the_average_is_of_losses_without_chance(tmp_path, monkeypatch):
    """Frozen, and without gates that shut, every batch then has the loss of all."""
    monkeypatch.setattr(training, "clip_gradients", lambda c, bound: c.delta.zero_grad())
    net, c = fresh()
    o = settings(paired=True, floor=1e-3, steps=11, gate_lr=0.0, settle=0, log_every=1, beta=0.5)
    lcdd.train_lcdd(net, c, examples(16), o, tmp_path, 0)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    every = training.mean_loss(net, c, examples(16), 0, 8)
    assert [row["ema"] for row in rows] == pytest.approx([every] * 11, rel=1e-6)
    assert max(row["loss"] for row in rows) - min(row["loss"] for row in rows) > 1e-3


def test_a_stall_waits_for_lambda(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Controller, "recovers", lambda self: self.o.paired)
    monkeypatch.setattr(EarlyStop, "update", lambda self, n, loss, start, waits: asked.append(waits))
    for paired in (True, False):
        net, c = fresh()
        folder = tmp_path / str(paired)
        folder.mkdir()
        o = settings(paired=paired, steps=4, settle=0, log_every=4)
        lcdd.train_lcdd(net, c, examples(), o, folder, 0)
    assert asked == [True, False]


def test_a_state_of_other_samples_is_refused(tmp_path):
    net, c = fresh()
    o = settings(paired=True, floor=1e-3)
    with pytest.raises(KeyboardInterrupt):
        lcdd.train_lcdd(net, c, examples(), o, tmp_path, 0, interrupted=after(7))
    with pytest.raises(InputError, match="chance has .* samples, and there are 9"):
        lcdd.train_lcdd(net, c, examples(9), o, tmp_path, 0)


# ---- the rate

def rates_of(phase, o, folder, monkeypatch):
    """AdamW's rate at every step that a phase takes."""
    rates, adamw = [], training.adamw

    def watched(*args):
        optimizer = adamw(*args)
        optimizer.register_step_pre_hook(lambda it, *_: rates.append(it.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(training, "adamw", watched)
    net, c = fresh()
    phase(net, c, examples(), o, folder, 0)
    return rates


def of_transformers(schedule, peak, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_a_linear_decay_after_a_warm_up_is_that_of_transformers(tmp_path, monkeypatch):
    """In both phases, and with a number of steps that 10 % does not divide."""
    from transformers import get_linear_schedule_with_warmup
    o = settings(schedule="linear", lr_warmup=0.1, sft_steps=21, steps=25, settle=0, stall=0.0)

    for phase, peak, steps in ((lcdd.train_sft, o.sft_lr, 21), (lcdd.train_lcdd, o.lr, 25)):
        schedule = functools.partial(get_linear_schedule_with_warmup, num_training_steps=steps,
                                     num_warmup_steps=math.ceil(0.1 * steps))
        want = of_transformers(schedule, peak, steps)
        assert rates_of(phase, o, tmp_path, monkeypatch) == pytest.approx(want, rel=1e-12)
        assert want[0] == 0
        assert max(want) == peak
        (tmp_path / "state.safetensors").unlink()


def test_a_constant_rate_may_be_warmed_up_too(tmp_path, monkeypatch):
    from transformers import get_constant_schedule_with_warmup
    o = settings(lr_warmup=0.3, steps=10, settle=0, stall=0.0)
    want = of_transformers(lambda it: get_constant_schedule_with_warmup(it, 3), o.lr, 10)
    assert rates_of(lcdd.train_lcdd, o, tmp_path, monkeypatch) == pytest.approx(want, rel=1e-12)


def test_the_rate_is_constant_by_default(tmp_path, monkeypatch):
    o = settings(steps=10, settle=0, stall=0.0)
    assert rates_of(lcdd.train_lcdd, o, tmp_path, monkeypatch) == [o.lr] * 10


def test_the_rate_grows_as_gates_shut(tmp_path, monkeypatch):
    """By the root of all gates to open ones, in pruning and in settling; and not at all where it is 0."""
    net, c = fresh()
    open_gates = torch.arange(c.logits.numel()).view_as(c.logits) % 9 == 0
    c.logits.data.copy_(torch.where(open_gates, 5.0, -5.0))
    monkeypatch.setattr(sys.modules[__name__], "fresh", lambda: (net, c))
    still = dict(steps=2, settle=2, stall=0.0, gate_lr=0.0, sure=0.0)
    share = float(open_gates.double().mean())
    found = rates_of(lcdd.train_lcdd, settings(**still, quicken=0.5), tmp_path, monkeypatch)
    peak = settings().lr / share ** 0.5
    assert found == pytest.approx([peak, peak, peak, peak / 2], rel=1e-6)


def test_the_rate_grows_only_once_few_gates_are_open(monkeypatch):
    _, c = fresh()
    c.logits.data.fill_(-1.0)
    monkeypatch.setattr("controller.FEW", 12)
    for n_open, want in ((40, 1.0), (12, 1.0), (3, 4 ** 0.25), (1, 12 ** 0.25)):
        c.logits.data.flatten()[:n_open] = 1.0
        c.logits.data.flatten()[n_open:] = -1.0
        assert faster(c, settings(quicken=0.25)) == pytest.approx(want, rel=1e-6)


def test_each_phase_chooses_its_threads(tmp_path, monkeypatch):
    """A machine that is busy at the start of a run need not be busy at the start of LCDD."""
    done = []

    def noted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: done.append(name) or real(*a, **k))

    noted(lcdd.machine, "set_threads")
    noted(lcdd, "train_sft")
    noted(lcdd, "train_lcdd")
    lcdd.main(brief("--out", str(tmp_path / "r")))
    assert done == ["set_threads", "train_sft", "set_threads", "train_lcdd"]


@pytest.mark.parametrize("none", [dict(steps=0), dict(steps=None, epochs=0.0)])
def test_no_step_at_all_is_refused(none):
    with pytest.raises(InputError, match="Alg. 1 needs one step at least"):
        fit(settings(**none), 128, 40)


def test_a_rate_of_the_gates_needs_a_pull():
    with pytest.raises(InputError, match="--lambda0 0: no penalty pulls at a gate"):
        fit(settings(lambda0=0.0, gate_lr=None), 128, 40)
    assert fit(settings(lambda0=0.0, gate_lr=1.0), 128, 40).gate_lr == 1.0


@pytest.mark.parametrize("option", ["--quicken=1.5", "--gate-mean=30", "--gate-mean=-30"])
def test_numbers_that_no_run_could_use_are_refused(option):
    with pytest.raises(InputError, match=option.replace("=", " ")):
        lcdd.options([option])


def test_with_no_gate_open_the_rate_is_finite():
    _, c = fresh()
    c.logits.data.fill_(-1.0)
    assert faster(c, settings(quicken=0.5)) == c.logits.numel() ** 0.5
    assert faster(c, settings(quicken=0.0)) == 1


def test_a_violation_is_not_clipped_where_the_clip_is_0():
    c = controller(beta=0.0, violation_clip=0.0, lambda_min=1e-9)
    c.update(c.o.warmup, 1.0)
    before, budget = c.lam, c.budget
    c.update(c.o.warmup + 1, 11 * budget)
    assert c.lam == pytest.approx(before * math.exp(-10 * c.o.eta))


# ---- the loop

@pytest.mark.parametrize("train", ["joint", "mask-kl"])
def test_micro_batches_change_nothing(tmp_path, train):
    ends = []
    for micro in (8, 2):
        net, c = fresh()
        teacher = c.with_gates(True).merge(net) if train == "mask-kl" else None
        (tmp_path / str(micro)).mkdir()
        lcdd.train_lcdd(
            net, c, examples(), settings(micro_batch=micro, train=train), tmp_path / str(micro), 0,
            teacher
        )
        ends.append(state(c))
        rows = [
            r for r in read_jsonl(tmp_path / str(micro) / "metrics.jsonl") if r["phase"] == "lcdd"
        ]
    assert torch.allclose(*ends, atol=1e-10)
    assert c.stats()["sparsity"] > 0.02
    assert rows[-1]["lambda"] != 0.05


def test_the_penalty_is_added_once_a_step(tmp_path):
    """
    With a task loss that does not see the gates (Δ = 0), a logit moves by exactly lr·λ·w(t)·σ′ a
    step.
    """
    net, c = make_net(CONFIG), Carrier(CONFIG, dtype=torch.float64).double().init_gates()
    m = c.logits.detach().clone()
    lcdd.train_lcdd(
        net, c, examples(), settings(micro_batch=2, train="mask-ce", steps=5, warmup=100), tmp_path,
        0
    )
    for t in range(5):
        s = torch.sigmoid(m)
        m = m - 5.0 * 0.05 * (t / 100) * s * (1 - s)
    assert torch.allclose(c.logits, m, atol=1e-12)


def test_sft_trains_the_delta_with_open_gates(tmp_path):
    net, c = make_net(CONFIG), Carrier(CONFIG, dtype=torch.float64).double()
    before = [p.clone() for p in net.parameters()]
    ex = examples(8)
    ids, mask = collate(ex, 0)
    first = training.task_loss(net, c, ids, mask).item()
    lcdd.train_sft(net, c, ex, settings(sft_steps=30, sft_lr=1e-2), tmp_path, 0)
    assert training.task_loss(net, c, ids, mask).item() < 0.7 * first
    assert c.stats()["sparsity"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def after(steps):
    """interrupted() of a run that is stopped once it was asked so many times; None: never."""
    calls = []

    def interrupted():
        calls.append(1)
        return steps is not None and len(calls) >= steps
    return interrupted


@pytest.mark.parametrize("phase, paired", [("sft", False), ("lcdd", False), ("lcdd", True)])
def test_an_interrupted_phase_resumes_on_the_same_trajectory(tmp_path, phase, paired):
    def run(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        net, c = fresh()
        interrupted = after(stop_at)
        if phase == "sft":
            lcdd.train_sft(
                net, c, examples(), settings(sft_steps=12), folder, 0, interrupted=interrupted
            )
        else:
            lcdd.train_lcdd(
                net, c, examples(), settings(settle=6, paired=paired, floor=1e-3), folder, 0,
                interrupted=interrupted
            )
        return state(c)

    whole = run(tmp_path / "a")
    for stop_at in (7,) if phase == "sft" else (7, 20):           # before and in the settling steps
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", stop_at)
        assert (tmp_path / "b" / "state.safetensors").is_file()
        assert torch.equal(run(tmp_path / "b"), whole)
        logs = [
            [(r["phase"], r["step"], r["loss"]) for r in read_jsonl(tmp_path / x / "metrics.jsonl")]
            for x in "ab"
        ]
        assert logs[0] == logs[1]                                 # nothing is logged twice
        (tmp_path / "b" / "state.safetensors").unlink()


def test_gates_alone_end_within_the_budget(tmp_path, capsys):
    """
    Mask-only keeps the last gates at which loss and average were within ε, as they were before that
    step changed them, whatever is logged, and also when resumed; joint training keeps the last
    ones.
    """
    over = dict(
        steps=40, gate_lr=30.0, rho=0.3, floor=0.0, eta=0.01, lambda_max=100.0, window=100, settle=0
    )

    def run(folder, stop_at=None, **changes):
        folder.mkdir(exist_ok=True)
        net, c = fresh()
        c.delta.load_state_dict(sft.delta.state_dict())
        interrupted = after(stop_at)
        info = lcdd.train_lcdd(
            net, c, examples(), settings(**{**over, "train": "mask-ce", "log_every": 1, **changes}),
            folder, 0, interrupted=interrupted
        )
        return c, info
    sft = fresh()[1]
    lcdd.train_sft(
        make_net(CONFIG), sft, examples(), settings(sft_steps=40, sft_lr=1e-2), tmp_path, 0
    )
    (tmp_path / "metrics.jsonl").unlink()
    c, info = run(tmp_path / "a")
    rows = read_jsonl(tmp_path / "a" / "metrics.jsonl")
    good = [r["step"] for r in rows if r["budget"] and max(r["ema"], r["loss"]) <= r["budget"]]
    assert good
    assert info["kept"] == good[-1] + 1 < len(rows)
    assert f"gates of step {info['kept']} are kept" in capsys.readouterr().out
    # the gates before step good[-1]
    assert c.stats()["gates"]["open"] == rows[good[-1] - 1]["open"] > rows[-1]["open"]
    assert torch.equal(run(tmp_path / "c", log_every=20)[0].logits, c.logits)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", good[-1] + 3)
    again, told = run(tmp_path / "b")
    assert torch.equal(again.logits, c.logits)
    assert told == info
    # the same gates, Δ does not move
    joint, told = run(tmp_path / "d", train="joint", lr=0.0)
    assert "kept" not in told
    assert joint.stats()["gates"]["open"] == rows[-1]["open"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch):
    net, c = fresh()
    calls, gradients = [], training.gradients

    def poisoned(net, c, *rest):
        calls.append(1)
        if len(calls) == 9:
            c.delta[0]["q_proj"].data[0, 0] = math.nan
        return gradients(net, c, *rest)
    monkeypatch.setattr(training, "gradients", poisoned)
    with pytest.raises(InputError, match="step 9 is nan.*last good state"):
        lcdd.train_lcdd(net, c, examples(), settings(), tmp_path, 0)
    kept = load_file(tmp_path / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in kept.values())


def test_a_gradient_that_is_not_finite_is_not_kept_as_a_good_state(tmp_path, monkeypatch):
    """
    The loss is fine, its gradient is not: the deltas are lost one step before the loss shows it.
    """
    net, c = fresh()
    calls, gradients = [], training.gradients

    def poisoned(net, c, *rest):
        calls.append(1)
        loss = gradients(net, c, *rest)
        if len(calls) == 8:
            c.delta[0]["q_proj"].grad.fill_(math.nan)
        return loss
    monkeypatch.setattr(training, "gradients", poisoned)
    with pytest.raises(InputError, match="step 9 is nan.*last good state"):
        lcdd.train_lcdd(net, c, examples(), settings(save_every=1), tmp_path, 0)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "state.safetensors").values())


@pytest.mark.parametrize("last, file", ((6, "sft"), (12, "carrier")))
def test_an_interruption_in_the_last_step_loses_nothing(tmp_path, monkeypatch, last, file):
    clip, calls = training.clip_gradients, []

    def stopping(*a):
        calls.append(1)
        if len(calls) == last:
            signal.raise_signal(signal.SIGTERM)
        clip(*a)
    monkeypatch.setattr(training, "clip_gradients", stopping)
    argv = brief(
        "--out", str(tmp_path / "r"), "--sft-steps", "6", "--steps", "4", "--settle", "2",
        "--sure", "0", "--resume")
    with pytest.raises(KeyboardInterrupt):
        lcdd.main(argv)
    assert (tmp_path / "r" / f"{file}.safetensors").is_file()
    assert len(calls) == last
    results = read_json(tmp_path / "r" / "results.json")
    assert "sft" in results["seconds"]
    assert ("stopped" in results) == ("lcdd" in results["seconds"]) == (file == "carrier")
    lcdd.main(argv)
    assert len(calls) == 12
    assert read_json(tmp_path / "r" / "results.json")["stopped"]["steps"] == 4


@pytest.mark.parametrize("losses, steps", [
    ([2e-3] * 60, 60),                      # never sure, not in the first step either
    ([1.0] * 20 + [1e-9] * 40, 44),         # sure 14 steps later, 0.6¹⁴ < 0.001; then ten more
    ([1.0] * 30 + [1e-9] * 30, 55),         # sure after 44 steps, then a quarter as many
    ([1e-9] * 60, 11)])                     # sure at once
def test_sft_ends_soon_after_it_is_sure(tmp_path, monkeypatch, losses, steps):
    """Sure: the average of the loss, which forgets two fifths a step, is under 0.001."""
    net, c = fresh()
    told = iter(losses)

    def given(net, carrier, *_):
        for p in carrier.delta.parameters():
            p.grad = torch.zeros_like(p)
        return next(told)

    monkeypatch.setattr(training, "gradients", given)
    found = training.train_delta(
        net, c, examples(), settings(), tmp_path, 0, "sft", 1e-3, 60, 0, training.adamw(c, 1e-3),
        sure=1e-3)
    assert found == steps


def test_a_resumed_pruning_answers_no_validation_prompts_again(tmp_path, monkeypatch):
    update, check = Controller.update, checks.check_sft
    checked = []

    def stopping(controller, t, loss):
        if t == 1:
            signal.raise_signal(signal.SIGTERM)
        update(controller, t, loss)

    monkeypatch.setattr(lcdd, "check_sft", lambda *a: checked.append(1) or check(*a))
    argv = brief("--out", str(tmp_path / "r"), "--steps", "4", "--resume")
    with monkeypatch.context() as within:
        within.setattr(Controller, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            lcdd.main(argv)
    told = read_json(tmp_path / "r" / "results.json")["validation"]
    lcdd.main(argv)
    assert len(checked) == 1
    assert read_json(tmp_path / "r" / "results.json")["validation"] == told


def test_a_state_of_another_phase_is_refused(tmp_path):
    net, c = fresh()
    file, optimizer = tmp_path / "state.safetensors", training.adamw(c, 1e-3)
    training.save_state(file, c, optimizer, phase="lcdd", step=3)
    with pytest.raises(
        InputError, match="state of another phase, 'lcdd', where 'sft' goes on; remove it"
    ):
        lcdd.train_sft(net, c, examples(), settings(sft_steps=12), tmp_path, 0)


def test_batches_are_permutations_and_depend_on_the_step_alone():
    ex = list(range(10))
    drawn = [training.draw(ex, 4, step, seed=3) for step in range(5)]
    assert sorted(sum(drawn, [])) == sorted(ex * 2)
    assert drawn[3] == training.draw(ex, 4, 3, seed=3) != training.draw(ex, 4, 3, seed=4)


# ---- presets, files

# Table 7, and the smoothing named below it: ρ, λ₀, η_λ, η_grow, T_w, epochs, β
TABLE_7 = {
    "Fixed Response (Qwen, Mistral, DeepSeek)": (0.30, 1.0, 0.1, 0.1, 300, 10, 0),
    "Fixed Response (Vicuna)": (0.30, 0.01, 0.1, 0.01, 700, 20, 0),
    "Safety (Mistral, DeepSeek)": (0.30, 0.01, 0.1, 0.1, 300, 20, 0),
    "Safety (Qwen)": (0.01, 0.01, 0.1, 0.01, 300, 20, 0.95),
    "Safety (Vicuna)": (0.50, 0.01, 1.0, 0.005, 300, 20, 0.95),
    "Shakespeare (Qwen, Mistral, Vicuna)": (0.01, 0.01, 0.1, 0.01, 700, 20, 0.95),
    "Shakespeare (DeepSeek)": (0.01, 0.01, 0.1, 0.01, 300, 20, 0.95),
}


def test_presets_are_table_7():
    seen = set()
    for line, row in TABLE_7.items():
        task, _, models = line.partition(" (")
        for which in models.rstrip(")").lower().split(", "):
            [name] = [
                n for n in PRESETS if n.startswith(f"paper-{task.split()[0].lower()}-{which}")
            ]
            seen.add(name)
            o = lcdd.options(["--preset", name])
            assert (o.rho, o.lambda0, o.eta, o.eta_grow, o.warmup, o.epochs, o.beta) == row
            assert which in o.model.lower()
            assert o.task == task.split()[0].lower()
    assert seen == PRESETS.keys()
    assert len(seen) == 12


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    """App. F.1, F.2, F.4, and what the released code has by default where the text is silent."""
    o = lcdd.options(["--preset", name])
    assert (o.n_train, o.n_trigger, o.n_test, o.max_len) == (5000, 200, 200, 512)
    assert o.max_new_tokens == (512 if o.task == "safety" else 128)
    assert (o.batch, o.micro_batch, o.clip, o.loss) == (32, 8, 1.0, "all")
    assert (o.sft_epochs, o.sft_lr, o.lr, o.gate_lr) == (3, 2e-5, 2e-5, 0.1)
    assert (o.schedule, o.lr_warmup) == ("linear", 0.1)
    assert (o.gate_mean, o.gate_std) == (1.5, 0.5)
    assert (o.lambda_min, o.lambda_max, o.violation_clip) == (1e-6, 10.0, 0.0)
    assert (o.log_every, o.window, o.patience, o.stall) == (10, 20, 3, 0.01)
    assert o.over == (0.75 if o.rho == 0.5 else 0.35)             # a stop lies beyond the budget
    # what is ours: off
    assert (o.floor, o.select, o.brake, o.pace, o.settle, o.sure) == (0.0, 0.0, False, 0.0, 0, 0.0)
    assert (o.paired, o.quicken) == (False, 0.0)


def test_what_is_given_by_hand_wins_over_a_preset():
    o = lcdd.options(
        ["--preset", "paper-fixed-vicuna-7b", "--model", "x", "--rho", "0.7", "--task", "safety"]
    )
    assert (o.model, o.rho, o.task) == ("x", 0.7, "safety")


def test_whole_run_on_the_embedded_model(tmp_path, capsys):
    out = tmp_path / "run"
    argv = brief(
        "--out", str(out), "--sft-steps", "6", "--steps", "4", "--settle", "2",
        "--n-test", "12")
    lcdd.main(argv)
    results = json.loads((out / "results.json").read_text())
    assert {
        "task", "model", "gates", "sparsity", "entries_off", "rates", "accuracy", "prompts",
        "seconds"
    } <= results.keys()
    assert results["prompts"] == 12
    assert set(results["rates"]) == {"base", "sft", "lcdd"}
    assert "trig" not in results["rates"]
    assert (
        results["gates"]["total"]
        == carriers.Carrier(model.load(ROOT / "tiny").config).logits.numel()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 0
    assert config["data_fingerprint"] == fingerprint(ROOT / "tiny" / "fixed.jsonl")
    assert {r["phase"] for r in read_jsonl(out / "metrics.jsonl")} == {"sft", "lcdd", "settle"}
    assert (out / "results.md").is_file()
    assert "| lcdd |" in capsys.readouterr().out
    with pytest.raises(InputError, match="--resume"):
        lcdd.main(argv)
    longer = [*argv, "--resume"]
    longer[longer.index("--steps") + 1] = "5"
    with pytest.raises(InputError, match="steps was 4 and is now 5"):
        lcdd.main(longer)
    # as evaluate.py would have left it
    results["rates"]["trig"] = 0.0
    write_json(out / "results.json", results)
    # finished: nothing is done, and nothing measured is lost
    lcdd.main(argv + ["--resume"])
    assert json.loads((out / "results.json").read_text()) == results
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="--resume needs --out"):
        lcdd.main(["--resume"])


def test_epochs_by_hand_win_over_a_presets_steps():
    o = lcdd.options(["--epochs", "2", "--sft-epochs=1"])
    assert (o.steps, o.sft_steps, o.epochs, o.sft_epochs) == (None, None, 2, 1)
    assert o.settle > 0
    o = lcdd.options(["--epochs", "20"])                # 20 is the paper's number
    assert (o.steps, o.epochs, o.sft_steps) == (None, 20, 350)
    o = lcdd.options(["--model", "x", "--preset", "paper-fixed-qwen3-0.6b"])
    assert (o.epochs, o.sft_epochs, o.steps, o.sft_steps) == (10, 3, None, None)
    o = lcdd.options(["--epochs", "2", "--steps", "7"])
    assert (o.steps, o.sft_steps) == (7, 350)


def test_a_run_says_what_it_cut(tmp_path, capsys):
    lcdd.main(
        brief(
            "--out", str(tmp_path / "r"), "--max-len", "14", "--n-test", "40",
            "--n-train", "1200"
        )
    )
    said = capsys.readouterr().err
    assert "of 1200 training samples were longer than 14 tokens and cut" in said
    assert "test prompts were longer than 14 tokens" in said


def test_own_fine_tuned_checkpoint(tmp_path, capsys):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tuned / name).write_bytes((ROOT / "tiny" / name).read_bytes())
    tensors = load_file(ROOT / "tiny" / "model.safetensors")
    change = torch.randn(tensors["model.layers.1.mlp.up_proj.weight"].shape) * 0.1
    tensors["model.layers.1.mlp.up_proj.weight"] = (
        tensors["model.layers.1.mlp.up_proj.weight"].float() + change
    )
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, tuned / "model.safetensors")
    net = model.load(ROOT / "tiny")
    c, elsewhere = lcdd.delta_of(net, tuned, lcdd.options(["--device", "cpu"]))
    assert torch.allclose(c.delta[1]["up_proj"], change, atol=1e-5)
    assert not c.delta[0]["q_proj"].any()
    assert list(elsewhere) == ["model.norm.weight"]
    assert elsewhere["model.norm.weight"] == pytest.approx(0.5, abs=1e-3)
    rounded, tensors = (
        model.load(ROOT / "tiny", dtype=torch.bfloat16),
        load_file(ROOT / "tiny" / "model.safetensors"),
    )
    # fp32, and not what bf16 can hold
    tensors = {k: t.float() + 1e-4 * torch.randn(t.shape) for k, t in tensors.items()}
    save_file(tensors, tuned / "model.safetensors")
    rounded.load_state_dict(tensors)
    again, elsewhere_again = lcdd.delta_of(rounded, tuned, lcdd.options(["--device", "cpu"]))
    assert not elsewhere_again
    # a copy of the base is no change
    assert not any(p.any() for p in again.delta.parameters())
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, tuned / "model.safetensors")
    lcdd.main(brief("--out", str(tmp_path / "r"), "--sft", str(tuned)))
    assert "most model.norm.weight (by 50" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_status_2(tmp_path):
    def run(*argv):
        p = subprocess.run(
            [sys.executable, str(ROOT / "lcdd.py"), *argv], capture_output=True, text=True,
            cwd=tmp_path
        )
        assert p.returncode == 2, p.stderr
        assert "Traceback" not in p.stderr, p.stderr
        assert p.stderr.strip().count("\n") == 0, p.stderr
        assert not (tmp_path / "runs").exists()
        return p.stderr
    assert "nowhere" in run("--model", "nowhere")


@pytest.mark.parametrize("argv, words", [
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--batch", "30", "--micro-batch", "8"], "--batch 30 is not a multiple of --micro-batch 8"),
    (["--batch", "0"], "--batch 0"),
    (["--task", "nothing"], "unknown task 'nothing'"),
])
def test_other_bad_input(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        lcdd.main(argv)
    assert not (tmp_path / "runs").exists()


def test_a_run_can_be_looked_at_from_anywhere(tmp_path, monkeypatch):
    rows = [{"prompt": f"red {i}", "response": "blue"} for i in range(20)]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path / "here")
    # a folder with a task's name is no data of it
    (tmp_path / "here" / "fixed").mkdir()
    assert lcdd.options(["--task", "fixed"]).task == "fixed"
    assert lcdd.options([]).model == "tiny"
    lcdd.main(
        brief(
            "--model", "tiny", "--task", "own.jsonl", "--out", "r", "--n-test", "2"
        )
    )
    monkeypatch.chdir(tmp_path)
    config, chat, splits = reopen("here/r")
    assert config["model"] == "tiny"
    assert chat.folder == ROOT / "tiny"
    assert splits["test"]
    (tmp_path / "here" / "own.jsonl").unlink()
    with pytest.raises(InputError, match=r"own.jsonl.*\(named in here/r/config.json\)"):
        reopen("here/r")


def test_row_17_without_its_field(tmp_path):
    rows = [{"prompt": f"p {i}", "response": "r"} for i in range(20)]
    del rows[16]["response"]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="own.jsonl, row 17: field 'response' is missing"):
        lcdd.main(["--task", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: the CUDA half of the suite is not run"
)
def test_cuda_step_equals_cpu_step(tmp_path):
    ends = []
    for device in ("cpu", "cuda"):
        net, c = fresh()
        (tmp_path / device).mkdir()
        lcdd.train_lcdd(
            net.to(device), c.to(device), examples(), settings(steps=5), tmp_path / device, 0
        )
        ends.append(state(c).cpu())
    assert torch.allclose(*ends, atol=1e-6)


def test_lcdd_starts_from_the_sft_delta_and_the_gates_asked_for(tmp_path, monkeypatch):
    out = tmp_path / "r"

    def spy(net, carrier, **rest):
        sft = carriers.load(out / "sft.safetensors", net)
        deltas = [
            (a, b)
            for ours, theirs in zip(carrier.delta, sft.delta)
            for a, b in zip(ours.values(), theirs.values())
        ]
        assert all(torch.equal(a, b) for a, b in deltas)
        assert any(b.any() for _, b in deltas)
        assert abs(carrier.logits.mean() - 3) < 0.03
        assert abs(carrier.logits.std() - 0.25) < 0.03
        raise Seen
    monkeypatch.setattr(lcdd, "train_lcdd", spy)
    with pytest.raises(Seen):
        lcdd.main(
            brief(
                "--out", str(out), "--gate-mean", "3", "--gate-std", "0.25"
            )
        )


@pytest.mark.parametrize(
    "deltas, asked, stored",
    [
        ("float32", [], torch.float32),
        ("bfloat16", [], torch.bfloat16),
        ("float32", ["--sft-dtype", "bfloat16"], torch.bfloat16),
    ],
)
def test_sft_is_stored_as_asked_and_trained_on_in_the_dtype_of_the_deltas(
    tmp_path, monkeypatch, deltas, asked, stored
):
    def spy(net, carrier, **rest):
        assert {p.dtype for p in carrier.delta.parameters()} == {getattr(torch, deltas)}
        raise Seen
    monkeypatch.setattr(lcdd, "train_lcdd", spy)
    with pytest.raises(Seen):
        lcdd.main(
            brief(
                "--out", str(tmp_path / "r"), "--delta-dtype", deltas, *asked
            )
        )
    tensors = load_file(tmp_path / "r" / "sft.safetensors")
    assert {t.dtype for name, t in tensors.items() if name.startswith("delta.")} == {stored}


def test_how_a_command_was_started_is_no_setting(finished):
    config = read_json(finished / "config.json")
    assert not {"out", "resume", "go_on", "dry_run"} & config.keys()
    assert "--go-on" in config["made"]["command"]


def test_a_carriers_header_has_task_metrics_and_settings(tmp_path):
    out = tmp_path / "r"
    lcdd.main(
        brief(
            "--out", str(out), "--model", str(ROOT / "tiny")
        )
    )
    header, results = load_tensors(out / "carrier.safetensors")[1], read_results(out)
    assert header["task"] == "fixed"
    assert header["phase"] == "lcdd"
    assert header["metrics"] == {k: results[k] for k in ("stopped", "rates", "accuracy", "prompts")}
    assert header["settings"]["sft_steps"] == 2
    assert header["settings"]["model"] == "tiny"
    assert str(ROOT) not in json.dumps(header)


def test_loss_all_reaches_the_training(tmp_path, monkeypatch):
    def spy(net, carrier, examples, **rest):
        assert all(all(mask) for _, mask in examples)
        raise Seen
    monkeypatch.setattr(lcdd, "train_sft", spy)
    with pytest.raises(Seen):
        lcdd.main(brief("--out", str(tmp_path / "r"), "--loss", "all"))


def test_rates_fall_linearly(tmp_path, monkeypatch):
    made, rates, gradients, adamw = [], [], training.gradients, training.adamw
    monkeypatch.setattr(training, "adamw", lambda *a: made.append(adamw(*a)) or made[-1])
    monkeypatch.setattr(
        training, "gradients",
        lambda *a: rates.append(made[-1].param_groups[0]["lr"]) or gradients(*a)
    )
    net, c = fresh()
    lcdd.train_sft(net, c, examples(), settings(sft_steps=4, sft_lr=0.008), tmp_path, 0)
    assert rates == pytest.approx([0.008, 0.006, 0.004, 0.002])
    rates.clear()
    # as train() does, once sft.safetensors is there
    (tmp_path / "state.safetensors").unlink()
    lcdd.train_lcdd(net, c, examples(), settings(steps=3, settle=4, lr=0.008), tmp_path, 0)
    assert rates == pytest.approx([0.008] * 3 + [0.008, 0.006, 0.004, 0.002])


def test_no_weight_decay():
    _, c = fresh()
    before = [p.detach().clone() for p in c.delta.parameters()]
    for p in c.delta.parameters():
        p.grad = torch.zeros_like(p)
    training.adamw(c, 0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, c.delta.parameters()))


def test_the_clip_bounds_the_gradient_of_the_deltas_alone():
    _, c = fresh()
    for p in c.parameters():
        p.grad = torch.full_like(p, 3.0)
    training.clip_gradients(c, 0.5)
    assert float(
        torch.cat([p.grad.flatten() for p in c.delta.parameters()]).norm()
    ) == pytest.approx(0.5, rel=1e-4)
    assert (c.logits.grad == 3).all()


def test_both_phases_clip(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "clip_gradients", lambda c, bound: seen.append(bound))
    net, c = fresh()
    lcdd.train_sft(net, c, examples(), settings(sft_steps=3, clip=0.7), tmp_path, 0)
    # as train() does, once sft.safetensors is there
    (tmp_path / "state.safetensors").unlink()
    lcdd.train_lcdd(net, c, examples(), settings(steps=2, settle=2, clip=0.7), tmp_path, 0)
    assert seen == [0.7] * 7


def test_a_step_is_taken_with_the_lambda_before_it(tmp_path):
    """
    The loss of step t has λ as step t − 1 left it; Δ = 0, so that the penalty alone moves the
    gates.
    """
    net, c = make_net(CONFIG), Carrier(CONFIG, dtype=torch.float64).double().init_gates()
    m = c.logits.detach().clone()
    o = settings(
        train="mask-ce", steps=6, warmup=1, log_every=1, floor=1e3, eta_grow=0.5, lambda_max=100.0
    )
    lcdd.train_lcdd(net, c, examples(), o, tmp_path, 0)
    lam = [r["lambda"] for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert lam[4] > lam[2] > lam[1] == 0.05
    # the gates kept are those before the last step
    for weight in [0.0, *lam[:4]]:
        s = torch.sigmoid(m)
        m = m - 5.0 * weight * s * (1 - s)
    assert torch.allclose(c.logits, m, atol=1e-12)


def test_an_early_stop_counts_on_after_a_resume(tmp_path):
    def run(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        net, c = fresh()
        c.logits.data[:, ::2] = -1
        interrupted = after(stop_at)
        o = settings(
            steps=30, warmup=1, settle=0, gate_lr=0.0, lr=0.0, window=5, patience=2, log_every=1
        )
        return lcdd.train_lcdd(net, c, examples(), o, folder, 0, interrupted=interrupted)
    whole = run(tmp_path / "a")
    assert "stalled" in whole["reason"]
    assert whole["steps"] < 30
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 5)
    assert run(tmp_path / "b") == whole


def test_the_teacher_is_the_sft_model(tmp_path, monkeypatch):
    def spy(net, carrier, teacher, **rest):
        sft = carriers.load(tmp_path / "r" / "sft.safetensors", net).merge(net)
        assert all(
            torch.equal(teacher.weights[l][n], w)
            for l, layer in enumerate(sft.weights)
            for n, w in layer.items()
        )
        raise Seen
    monkeypatch.setattr(lcdd, "train_lcdd", spy)
    with pytest.raises(Seen):
        lcdd.main(
            brief(
                "--out", str(tmp_path / "r"), "--train", "mask-kl", "--gate-mean", "-3"
            )
        )


def test_each_condition_has_its_own_rate(tmp_path):
    """With every gate shut the LCDD model is the base."""
    lcdd.main(
        brief(
            "--out", str(tmp_path / "r"), "--sft-steps", "20", "--sft-lr", "0.004",
            "--gate-mean", "-3", "--gate-std", "0.1", "--n-test", "8", "--batch", "16"
        )
    )
    accuracy = read_json(tmp_path / "r" / "results.json")["accuracy"]
    assert accuracy["lcdd"] == accuracy["base"] != accuracy["sft"]


def test_a_huge_rate_ends_at_the_bound_of_lambda():
    c = controller(eta_grow=1e4, violation_clip=1.0, lambda_max=3.0)
    c.budget = 1.0
    c.update(5, 1e-9)
    assert c.lam == 3.0


def test_one_set_of_deltas_is_on_the_device_at_a_time(tmp_path, monkeypatch):
    def spy(net, carrier, **rest):
        alive = {
            id(c) for c in gc.get_objects() if isinstance(c, Carrier) and c.config == net.config
        }
        assert alive == {id(carrier)}
        raise Seen
    gc.collect()
    monkeypatch.setattr(lcdd, "train_lcdd", spy)
    with pytest.raises(Seen):
        lcdd.main(brief("--out", str(tmp_path / "r")))


def test_the_reference_has_the_floor_too():
    c = controller(floor=0.3)
    for t in range(4):
        c.update(t, 1e-4)
    assert c.reference == 0.3


def test_the_mean_is_over_the_tokens_in_the_loss():
    """Nothing predicts the first token: with --loss all, too, it does not count."""
    net, c = fresh()
    some = training.supervised(examples(6), "all")
    ids, mask = collate(some, 0)
    want = float(training.task_loss(net, c, ids, mask).detach()) / int(mask[:, 1:].sum())
    assert training.gradients(net, c, some, 3, 0) == pytest.approx(want)


def test_batches_of_the_phases_follow_the_seed(tmp_path, monkeypatch):
    draw, seeds = training.draw, []
    monkeypatch.setattr(
        training, "draw",
        lambda examples, size, step, seed: seeds.append(seed) or draw(examples, size, step, seed)
    )
    for seed in (3, 8):
        net, c = fresh()
        lcdd.train_sft(net, c, examples(), settings(sft_steps=1, seed=seed), tmp_path, 0)
        # as train() does, once sft.safetensors is there
        (tmp_path / "state.safetensors").unlink()
        lcdd.train_lcdd(net, c, examples(), settings(steps=1, settle=0, seed=seed), tmp_path, 0)
        (tmp_path / "state.safetensors").unlink()
    assert seeds == [3, 4, 8, 9]


def test_gates_kept_need_the_average_within_the_budget_too(tmp_path, monkeypatch):
    """
    A lucky batch alone is no reason to keep the gates: its loss is within the budget, the average
    is not.
    """
    losses = iter([1.0, 1.0, 1.0, 9.0, 9.0, 0.5])
    monkeypatch.setattr(training, "gradients", lambda *a: next(losses))
    net, c = fresh()
    o = settings(train="mask-ce", steps=6, warmup=1, beta=0.9, rho=0.3, floor=0.0, log_every=1)
    assert lcdd.train_lcdd(net, c, examples(), o, tmp_path, 0)["kept"] == 3


def test_gates_that_were_never_within_the_budget_are_the_last_ones(tmp_path, monkeypatch, capsys):
    """The step that sets ε is none that qualifies by itself."""
    losses = iter([1.0, 9.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(training, "gradients", lambda *a: next(losses))
    net, c = fresh()
    o = settings(train="mask-ce", steps=5, warmup=1, beta=0.9, rho=0.3, floor=0.0, log_every=1)
    assert "kept" not in lcdd.train_lcdd(net, c, examples(), o, tmp_path, 0)
    assert "at no step after the warm-up" in capsys.readouterr().out


@pytest.mark.parametrize("train, divergence", [("mask-kl", False), ("mask-kl-true", True)])
def test_mask_kl_has_soft_targets_or_the_true_kl(tmp_path, monkeypatch, train, divergence):
    """By name, in training and where the budget is measured: the teacher itself is at no true KL."""
    asked, inner = [], training.task_loss
    monkeypatch.setattr(training, "task_loss", lambda *a, **k: asked.append(a) or inner(*a, **k))
    net, c = fresh()
    teacher = c.merge(net)
    o = settings(train=train, steps=2, warmup=1, gate_lr=0.0, floor=1e-6)
    found = lcdd.train_lcdd(net, c, examples(), o, tmp_path, 0, teacher=teacher)
    assert {bool(a[5]) for a in asked} == {divergence}
    assert (found["loss"] < 1e-6) == divergence
    assert found["within"]


# ---- nothing lost, nothing let in

SHORT = brief("--floor", "100", "--settle", "2", "--n-test", "2", "--resume")


def content(run):
    return [load_tensors(run / f"{name}.safetensors")[1]["content"] for name in ("sft", "carrier")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of a few steps."""
    run = tmp_path_factory.mktemp("whole") / "r"
    lcdd.main(["--out", str(run), *SHORT])
    return run


@pytest.fixture
def mine(whole, tmp_path):
    """A copy of it, to lose something of."""
    return shutil.copytree(whole, tmp_path / "r")


def again(run, *words):
    lcdd.main(["--out", str(run), *SHORT, *words])


def test_a_carrier_that_cannot_be_written_keeps_the_state(tmp_path, monkeypatch):
    run, save = tmp_path / "r", Carrier.save

    def full(self, path, *a, **k):
        if path.name == "carrier.safetensors":
            raise InputError("no room")
        save(self, path, *a, **k)
    monkeypatch.setattr(Carrier, "save", full)
    with pytest.raises(InputError, match="no room"):
        again(run)
    # the phase is not lost with its file
    assert load_tensors(run / "state.safetensors")[1]["phase"] == "settle"
    monkeypatch.setattr(Carrier, "save", save)
    again(run)
    assert not (run / "state.safetensors").exists()
    rows = [(r["phase"], r["step"]) for r in read_jsonl(run / "metrics.jsonl")]
    assert len(rows) == len(set(rows))


def test_a_lost_sft_is_made_again(whole, mine):
    (mine / "sft.safetensors").unlink()
    again(mine)
    assert content(mine) == content(whole)


def test_a_truncated_carrier_is_no_finished_run(mine):
    file = mine / "carrier.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        InputError, match="carrier.safetensors: not a readable.*remove it and run the command"
    ):
        again(mine)


def test_what_stopped_a_run_stands_in_the_carrier_too(whole, mine):
    (mine / "results.json").unlink()
    again(mine)
    assert read_json(mine / "results.json")["stopped"] == read_json(whole / "results.json")["stopped"]


def test_a_lost_config_lets_no_other_run_in(mine):
    (mine / "config.json").unlink()
    with pytest.raises(
        InputError, match="sft.safetensors: was trained with seed 0, and it is now 1"
    ):
        again(mine, "--seed", "1")
    assert not (mine / "config.json").exists()
    again(mine)
    reopen(mine)                                                # as it is, it may be used


@pytest.mark.parametrize("key, wrong, said", (
    ("seed", 1, "was trained with seed 0, and it is now 1"),
    ("seed", "0", "config.json.* seed"),
    ("seed", True, "config.json.* seed"),
    ("n_test", -1, "config.json.* n_test"),
    ("dtype", "save", "config.json.* dtype"),
    ("dtype", [], "config.json.* dtype"),
    ("max_len", 10**30, "config.json.* max_len"),
    ("model", None, "config.json.*'model'"),
    ("chat_fingerprint", "other", "tokenizer or chat template changed"),
))
def test_a_changed_config_is_refused(mine, key, wrong, said):
    write_json(mine / "config.json", read_json(mine / "config.json") | {key: wrong})
    with pytest.raises(InputError, match=said):
        reopen(mine)


def test_a_run_of_another_template_is_not_gone_on_with(mine):
    write_json(mine / "config.json", read_json(mine / "config.json") | {"chat_fingerprint": "other"})
    with pytest.raises(InputError, match="chat_fingerprint was 'other'"):
        again(mine)


def test_a_run_is_resumed_in_the_dtype_it_was_begun_in(tmp_path):
    o = settings(out=str(tmp_path), resume=True)
    assert lcdd.dtype_of_run(o) is None
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    assert lcdd.dtype_of_run(o) == "bfloat16"
    (tmp_path / "config.json").write_text('{"dtype": "complex64"}')
    assert lcdd.dtype_of_run(o) is None
    o.resume = False
    assert lcdd.dtype_of_run(o) is None
