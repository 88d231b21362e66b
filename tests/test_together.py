"""lab/together.py: the joint step against the oracle, interruption, what is left, the command."""
import shutil

import pytest
import torch

import common
import eraser
import oracle
from helpers import apart, base_weights, eraser_settings, for_oracle, long_name, random_batch
from helpers import random_carrier, random_net, settings
from lab import together

PAIRS = [([3, 4, 5 + i], [7, 8 + i, 9][:1 + i % 3]) for i in range(4)]      # prompt and answer


def train(folder, steps):
    """(the carrier, τ, options of the trigger, samples) after so many steps on a small net."""
    net, o = random_net("gqa"), eraser_settings(steps=steps, batch=4, lr=0.1, judge_every=3)
    carrier, samples = random_carrier(net), random_batch(net, 8)
    how = eraser.base_targets(net, PAIRS, o), settings(batch=8), o, folder, "both"
    return carrier, together.train_together(net, carrier, samples, *how), o, samples


def test_a_step_goes_down_the_gradients_of_both_losses(tmp_path, monkeypatch):
    """Of cross-entropy without τ, and of α·KL + β·R behind it, as the oracle has them; no Eq. 7."""
    seen = []

    def clipped(parameters, bound):
        seen.extend((p.detach().clone(), p.grad.clone()) for p in parameters)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    _, _, o, samples = train(tmp_path, 1)
    net, tau = random_net("gqa"), seen[-1][0].requires_grad_()
    weights, (delta, m) = base_weights(net), for_oracle(random_carrier(net))
    W = oracle.masked_weights(weights, net.config, delta, m)
    C = oracle.write_channels(net.config, m)
    loss = oracle.task_loss(W, net.config, samples)
    for x, y in PAIRS:
        sample = x, y, list(range(len(x) - 1, len(x) + len(y) - 1))
        _, _, kl, R = oracle.trigger_loss(weights, W, net.config, tau, sample, C, o)
        loss = loss + (o.alpha * kl + o.beta * R) / len(PAIRS)
    loss.backward()
    names = random_carrier(net).delta
    literal = [torch.stack([delta[l, long_name(name)].grad for l in range(2)]) for name in names]
    for (_, grad), expected in zip(seen, [*literal, tau.grad], strict=True):
        assert apart(grad, expected) < 1e-10


def test_gates_stay_shut_and_an_interruption_changes_no_bit(tmp_path, monkeypatch):
    carrier, *_ = train(tmp_path, 8)
    before, pause = random_carrier(random_net("gqa")), common.Phase.pause
    for name, (row, col) in carrier.projections((carrier.logits > 0).double()).items():
        moved = before.delta[name] != carrier.delta[name]                       # (L, d_out, d_in)
        mask = row[:, :, None] * col[:, None]
        assert moved.flatten(1).any(1).all() and not (moved & (mask == 0)).any()

    def interrupted(loop, t):
        loop.signals = int(t == 5)
        pause(loop, t)

    (tmp_path / "both.state").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Phase, "pause", interrupted)
        train(tmp_path, 8)
    again, *_ = train(tmp_path, 8)          # Δ follows τ, so it shows a τ that is another
    assert all(map(torch.equal, again.parameters(), carrier.parameters()))


def test_shares_are_of_each_models_own_distance():
    """Above the base's, whose own loss is no distance."""
    of = {"base": 1.0, "a": 4.0, "a + t": 2.0, "b": 2.0, "b + t": 3.0}
    of = {name: torch.tensor([nats]) for name, nats in of.items()}
    left = together.shares_left({"kl_own": {}, "kl_base": {}, "loss_own": of})
    assert left["loss_own"] == pytest.approx({"a + t": 1 / 3, "b + t": 2.0})


def test_the_command_measures_four_models_and_clears_up(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "r")
    words = f"--run {run} --out {tmp_path} --steps 4 --length 2 --prompts 8 --device cpu"
    together.main(words.split())
    result = common.read_json(tmp_path / "fixed-0.json")
    assert len(result["rates"]) == 1 + 4 * 3 + 2 and result["rates"]["sft"] == 1
    assert {path.name for path in run.glob("*")} == {path.name for path in finished.glob("*")}
