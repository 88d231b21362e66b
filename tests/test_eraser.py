"""eraser.py: Eq. 6–8, 28 and the optimisation against the oracle, then files and the command."""
import math

import pytest
import torch

import common
import eraser
import oracle
from common import InputError
from helpers import eraser_settings, for_oracle, random_carrier, random_net


def problem(seed=0, **changed):
    """(net, carrier, options, pairs, C) with prompts that begin alike and have answers of several lengths."""
    net = random_net("gqa", seed=seed)
    generator = torch.Generator().manual_seed(4)

    def ids(n):
        return torch.randint(60, (n,), generator=generator).tolist()
    first = ids(3)
    pairs = [(first + ids(2 + i), ids(1 + i)) for i in range(4)]
    o = eraser_settings(**changed)
    carrier = random_carrier(net, 0.4)
    return net, carrier, o, pairs, eraser.channels(carrier, o.objective)


def literal(net, carrier, o, pairs, unit=1.0):
    """The same for the oracle: (weights, W, samples with their positions, C, settings)."""
    weights, (delta, m) = dict(net.state_dict()), for_oracle(carrier)
    W = {name: t.detach() for name, t in oracle.masked_weights(weights, net.config, delta, m).items()}
    samples = []
    for x, y in pairs:
        first, until = len(x) - 1, len(x) + len(y) - 1
        if o.positions == "final":
            first = max(first, until - o.k)
        samples.append((x, y, list(range(first, until))))
    C = list(oracle.write_channels(net.config, m))
    s = eraser_settings(**vars(o) | dict(lr=o.lr * unit / math.sqrt(24), bound=o.bound * unit, beta=o.beta / unit ** 2))
    return weights, W, samples, C, s


@pytest.mark.parametrize("positions", ["both", "final"])
@pytest.mark.parametrize("raw", [True, False])
def test_loss_and_gradient_are_the_oracles(positions, raw):
    """Eq. 6, 7, 8 and R, prompt by prompt, and ∂L/∂τ."""
    net, carrier, o, pairs, C = problem(positions=positions, raw=raw)
    weights, W, samples, C_literal, s = literal(net, carrier, o, pairs)
    targets = eraser.base_targets(net, pairs, o)
    variance = targets.stream.var(1)
    weight = eraser.channel_weights(C, torch.ones_like(variance) if raw else variance)
    tau = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    ours = eraser.trigger_loss(net, carrier.merge(net), tau, targets, torch.arange(4), weight, o)
    theirs, spread = [], None if raw else oracle.base_variance(weights, net.config, [x for x, _ in pairs])
    for sample in samples:
        theirs.append(oracle.trigger_loss(weights, W, net.config, tau, sample, C_literal, s, spread))
    for mine, parts in zip(ours, zip(*theirs)):
        assert abs(mine - sum(parts) / len(parts)) < 1e-10
    mine, = torch.autograd.grad(ours[0], tau)
    expected, = torch.autograd.grad(sum(parts[0] for parts in theirs) / 4, tau)
    assert (mine - expected).abs().max() < 1e-10


@pytest.mark.parametrize("changed", [dict(), dict(schedule="constant", raw=True, clip=0.0), dict(positions="final")])
def test_ten_steps_are_the_oracles(tmp_path, changed):
    """τ after every step of Adam, its rate, clipping and projection, in the token norms' unit."""
    net, carrier, o, pairs, C = problem(**changed)
    unit = float(net.embedding.norm(dim=1).mean())
    weights, W, samples, C_literal, s = literal(net, carrier, o, pairs, unit)
    targets, merged = eraser.base_targets(net, pairs, o), carrier.merge(net)
    seen = []

    def note(net, weights, tau, *rest):
        seen.append(tau.detach().clone())
        return [0.0] * 4
    o.judge_every = 1
    judged, eraser.judged = eraser.judged, note
    try:
        eraser.learn(net, merged, targets, targets, C, o, tmp_path)
    finally:
        eraser.judged = judged
    tau = seen[0].clone().requires_grad_(True)
    batches = []
    for t in range(o.steps):
        rows = torch.randperm(4, generator=torch.Generator().manual_seed(t))[:o.batch].tolist()
        batches.append([samples[i] for i in rows])
    spread = None if o.raw else oracle.base_variance(weights, net.config, [x for x, _ in pairs])
    for t, _ in enumerate(oracle.eraser(weights, W, net.config, tau, batches, C_literal, s, spread)):
        assert (tau - seen[t + 1]).abs().max() < 1e-10
    assert (tau.norm(dim=1) <= s.bound + 1e-9).all()


def test_the_trigger_that_was_judged_best_is_kept(tmp_path, monkeypatch):
    """τ as it stood when it was judged, not one step later, and judged on all of the validation prompts."""
    net, carrier, o, pairs, C = problem()
    targets, losses, seen = eraser.base_targets(net, pairs, o), iter([5.0, 3.0, 4.0, 6.0]), []

    def judged(net, weights, tau, judge, *rest):
        assert judge is targets
        seen.append(tau.detach().clone())
        return [next(losses), 0.0, 0.0, 0.0]
    monkeypatch.setattr(eraser, "judged", judged)
    o.judge_every, o.steps = 2, 6
    best, lowest = eraser.learn(net, carrier.merge(net), targets, targets, C, o, tmp_path)
    assert lowest == 3.0 and torch.equal(best, seen[1])


def test_judged_is_the_mean_over_all_prompts():
    net, carrier, o, pairs, C = problem()
    targets, merged = eraser.base_targets(net, pairs * 10, o), carrier.merge(net)      # more than one piece
    tau = torch.randn(2, 24, dtype=torch.float64)
    weight = eraser.channel_weights(C, torch.ones(C.shape, dtype=torch.float64))
    ours = eraser.judged(net, merged, tau, targets, weight, o)
    whole = eraser.trigger_loss(net, merged, tau, targets, torch.arange(40), weight, o)
    assert all(abs(a - float(b)) < 1e-10 for a, b in zip(ours, whole))


def test_eq_7_is_over_layers_that_have_channels():
    """A layer without any is left out of the mean; each layer in units of its channels' variance."""
    stream, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    C = torch.zeros(3, 5, dtype=torch.bool)
    C[0, :2], C[2, 3] = True, True
    squares = (stream - target).square()
    expected = (squares[0, :, :2].mean() + squares[2, :, 3].mean()) / 2
    weight = eraser.channel_weights(C, torch.ones(3, 5))
    assert torch.isclose(eraser.matching_loss(stream, target, weight), expected)
    variance = 1 + torch.rand(3, 5)
    expected = (squares[0, :, :2].mean() / variance[0, :2].mean() + squares[2, :, 3].mean() / variance[2, 3]) / 2
    weight = eraser.channel_weights(C, variance)
    assert torch.isclose(eraser.matching_loss(stream, target, weight), expected)
    assert not eraser.channel_weights(torch.zeros_like(C), variance).any()


def test_projection_bounds_each_token():
    tau = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(eraser.project(tau, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_channels_of_the_three_objectives():
    carrier = random_carrier(random_net("gqa"), 0.2)
    C = carrier.write_channels()
    random = eraser.channels(carrier, "random", seed=1)
    assert torch.equal(eraser.channels(carrier, "circuit"), C) and not eraser.channels(carrier, "output").any()
    assert torch.equal(random.sum(1), C.sum(1)) and not torch.equal(random, C)


def test_both_answers_are_looked_at():
    """The base's own, and in rows of their own those of the model that is to be undone."""
    net, carrier, o, pairs, _ = problem()
    prompts, merged = [x for x, _ in pairs], carrier.merge(net)
    both = eraser.base_answers(net, prompts, o, merged, None)
    assert both == [*zip(prompts, net.generate(prompts, o.k)), *zip(prompts, net.generate(prompts, o.k, merged))]
    o.positions = "response"
    assert eraser.base_answers(net, prompts, o, merged, None) == both[:4]


def test_an_interrupted_optimisation_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    net, carrier, o, pairs, C = problem()
    targets, merged, o.judge_every = eraser.base_targets(net, pairs, o), carrier.merge(net), 3
    whole = eraser.learn(net, merged, targets, targets, C, o, tmp_path)
    (tmp_path / f"{o.name}.state").unlink()
    calls, pause = [], common.Phase.pause

    def interrupted(loop, t):
        calls.append(t)
        loop.signals = int(t == 7)
        pause(loop, t)
    monkeypatch.setattr(common.Phase, "pause", interrupted)
    with pytest.raises(KeyboardInterrupt):
        eraser.learn(net, merged, targets, targets, C, o, tmp_path)
    monkeypatch.setattr(common.Phase, "pause", pause)
    again = eraser.learn(net, merged, targets, targets, C, o, tmp_path)
    assert calls == list(range(8)) and torch.equal(again[0], whole[0]) and again[1] == whole[1]


def test_the_preset_is_appendix_f3():
    o = eraser.options(["--run", "r", "--preset", "paper", "--steps", "5"])
    assert (o.length, o.batch, o.lr, o.alpha, o.k, o.beta, o.bound) == (20, 16, 0.003, 0.7, 8, 0.1, 1.0)
    assert (o.positions, o.steps, o.raw, o.absolute) == ("final", 5, True, True)
    assert eraser.options(["--run", "r", "--preset", "paper"]).steps == 2000


def test_a_validation_loss_that_is_no_number_is_never_written(tmp_path, monkeypatch):
    net, carrier, o, pairs, C = problem()
    targets = eraser.base_targets(net, pairs, o)
    monkeypatch.setattr(eraser, "judged", lambda *_: [math.nan, 0.0, 0.0, 0.0])
    with pytest.raises(InputError, match="validation loss is nan"):
        eraser.learn(net, carrier.merge(net), targets, targets, C, o, tmp_path)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_names_that_are_other_files_of_the_run():
    for name in ("carrier", "sft", "a/b"):
        with pytest.raises(InputError, match="--name"):
            eraser.options(["--run", "r", "--name", name])
