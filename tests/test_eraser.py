"""eraser.py: Eq. 6–8, 28 and the optimisation against the oracle, then files and the command."""
import math
import os
import signal
from collections import namedtuple

import pytest
import torch

import common
import eraser
import oracle
from common import InputError
from helpers import (
    apart, base_weights, eraser_settings, for_oracle, normal, random_carrier, random_net)

# net, carrier, options, [(prompt, answer)], their targets, the carrier merged, channels
Problem = namedtuple("Problem", "net carrier o pairs targets merged C")


def problem(**changed):
    """A Problem of four prompts that begin alike and have answers of several lengths."""
    generator = torch.Generator().manual_seed(4)

    def ids(n):
        return torch.randint(60, (n,), generator=generator).tolist()

    net, o, first = random_net("gqa"), eraser_settings(**changed), ids(3)
    pairs = [(first + ids(2 + i), ids(1 + i)) for i in range(4)]
    carrier = random_carrier(net, 0.4)
    targets = eraser.base_targets(net, pairs, o)
    C = eraser.channels(carrier, o.objective)
    return Problem(net, carrier, o, pairs, targets, carrier.merge(net), C)


def learn(p, run, judge=None):
    """(τ, its loss) for a Problem, judged on those targets, or on what it is learned on."""
    targets = p.targets, judge or p.targets
    return eraser.learn(p.net, p.merged, *targets, p.C, p.o, run)


def loss_of(p, tau, targets, weight):
    """Eq. 6 and its three parts over all prompts of `targets`, in one piece."""
    rows = torch.arange(len(targets.ids))
    return eraser.trigger_loss(p.net, p.merged, tau, targets, rows, weight, p.o)


# base, W and config; [(prompt, answer, positions)]; channels, settings in plain numbers, variance
Literal = namedtuple("Literal", "model samples rest")


def literal(p, unit=1.0):
    """A Problem as the oracle has it; unit: mean norm of a token."""
    weights, config, o = base_weights(p.net), p.net.config, p.o
    delta, m = for_oracle(p.carrier)
    W = oracle.masked_weights(weights, config, delta, m)
    W = {name: t.detach() for name, t in W.items()}
    samples = []
    for x, y in p.pairs:
        first, end = len(x) - 1, len(x) + len(y) - 1
        if o.positions == "final":
            first = max(first, end - o.k)
        samples.append((x, y, list(range(first, end))))
    variance = None
    if not o.raw:
        variance = oracle.base_variance(weights, config, [x for x, _ in p.pairs])
    rate = o.lr * unit / math.sqrt(24)
    plain = dict(lr=rate, bound=o.bound * unit, beta=o.beta / unit ** 2)
    s = eraser_settings(**vars(o) | plain)
    rest = oracle.write_channels(config, m), s, variance
    return Literal((weights, W, config), samples, rest)


# ---- the loss

@pytest.mark.parametrize("positions", ["both", "final"])
@pytest.mark.parametrize("raw", [True, False])
def test_loss_and_gradient_are_the_oracles(positions, raw):
    """Eq. 6, 7, 8 and R, prompt by prompt, and ∂L/∂τ."""
    p = problem(positions=positions, raw=raw)
    variance = p.targets.stream.var(1)
    weight = eraser.channel_weights(p.C, torch.ones_like(variance) if raw else variance)
    tau = normal(3, 24, grad=True)
    ours = loss_of(p, tau, p.targets, weight)
    theirs, q = [], literal(p)
    for sample in q.samples:
        theirs.append(oracle.trigger_loss(*q.model, tau, sample, *q.rest))
    means = [sum(parts) / 4 for parts in zip(*theirs)]
    for number, expected in zip(ours, means):
        assert abs(number - expected) < 1e-10
    grad, = torch.autograd.grad(ours[0], tau)
    expected, = torch.autograd.grad(means[0], tau)
    assert apart(grad, expected) < 1e-10


def test_eq_7_is_over_layers_that_have_channels():
    """A layer without any is left out; each is in units of its channels' mean variance."""
    stream, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)                     # (L, B, d)
    C = torch.zeros(3, 5, dtype=torch.bool)
    C[0, :2], C[2, 3] = True, True
    squares = (stream - target).square()
    for variance in (torch.ones(3, 5), 1 + torch.rand(3, 5)):
        first = squares[0, :, :2].mean() / variance[0, :2].mean()
        last = squares[2, :, 3].mean() / variance[2, 3]
        weight = eraser.channel_weights(C, variance)
        loss = eraser.matching_loss(stream, target, weight)
        assert torch.isclose(loss, (first + last) / 2)
    assert not eraser.channel_weights(torch.zeros_like(C), variance).any()


def test_judged_is_the_mean_over_all_prompts():
    """However many pieces they are cut into."""
    p, tau = problem(), normal(2, 24)
    targets = eraser.base_targets(p.net, p.pairs * 10, p.o)                 # more than one piece
    weight = eraser.channel_weights(p.C, torch.ones(2, 24).double())
    ours = eraser.judged(p.net, p.merged, tau, targets, weight, p.o)
    whole = loss_of(p, tau, targets, weight)
    for number, expected in zip(ours, whole):
        assert abs(number - float(expected)) < 1e-10


def test_projection_bounds_each_token():
    """Eq. 28: a token within the bound stays as it is."""
    tau = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(eraser.project(tau, 1.0), expected)


def test_channels_of_the_three_objectives():
    """The carrier's, none, or in each layer as many random ones."""
    carrier = random_carrier(random_net("gqa"), 0.2)
    C, random = carrier.write_channels(), eraser.channels(carrier, "random", seed=1)
    assert torch.equal(eraser.channels(carrier, "circuit"), C)
    assert not eraser.channels(carrier, "output").any()
    assert torch.equal(random.sum(1), C.sum(1))
    others = eraser.channels(carrier, "random", seed=2)
    assert not torch.equal(random, C) and not torch.equal(random, others)


def test_both_answers_are_looked_at():
    """The base's own, and in rows of their own those of the model that is to be undone."""
    p = problem()
    prompts, k = [x for x, _ in p.pairs], p.o.k
    base = list(zip(prompts, p.net.generate(prompts, k)))
    undone = list(zip(prompts, p.net.generate(prompts, k, p.merged)))
    assert eraser.base_answers(p.net, prompts, p.o, p.merged, None) == base + undone
    p.o.positions = "response"
    assert eraser.base_answers(p.net, prompts, p.o, p.merged, None) == base


# ---- the optimisation

@pytest.mark.parametrize("changed", [
    dict(),
    dict(schedule="constant", raw=True, clip=0.0),
    dict(positions="final"),
    dict(bound=0.9),
])
def test_ten_steps_are_the_oracles(tmp_path, monkeypatch, changed):
    """τ after every step of Adam, its rate, clipping and projection, in the token norms' unit."""
    p, path = problem(**changed, judge_every=1), []

    def note(net, weights, tau, *others):
        path.append(tau.detach().clone())
        return [0.0] * 4

    monkeypatch.setattr(eraser, "judged", note)
    learn(p, tmp_path, judge=eraser.base_targets(p.net, p.pairs[:3], p.o))

    # the same, literally
    unit = float(p.net.embedding.norm(dim=1).mean())
    q = literal(p, unit)
    tau, batches = path[0].clone().requires_grad_(True), []
    for t in range(p.o.steps):
        shuffle = torch.Generator().manual_seed(t)
        rows = torch.randperm(4, generator=shuffle)[:p.o.batch]
        batches.append([q.samples[i] for i in rows])
    for t, _ in enumerate(oracle.eraser(*q.model, tau, batches, *q.rest)):
        assert apart(tau, path[t + 1]) < 1e-10
    assert len(path) == 11
    assert torch.stack(path).norm(dim=2).max() <= p.o.bound * unit + 1e-9


def test_the_trigger_that_was_judged_best_is_kept(tmp_path, monkeypatch):
    """τ as it stood when it was judged, not one step later, on all of the validation prompts."""
    p = problem(judge_every=2, steps=6)
    losses, path = iter([5.0, 3.0, 4.0, 6.0]), []
    validation = eraser.base_targets(p.net, p.pairs[:3], p.o)

    def judged(net, weights, tau, judge, *others):
        assert judge is validation
        path.append(tau.detach().clone())
        return [next(losses), 0.0, 0.0, 0.0]

    monkeypatch.setattr(eraser, "judged", judged)
    best, lowest = learn(p, tmp_path, validation)
    assert lowest == 3.0 and torch.equal(best, path[1])


def test_an_interrupted_optimisation_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    """The state is of before the step that was not made."""
    p = problem(judge_every=3)
    tau, loss = learn(p, tmp_path)
    (tmp_path / f"{p.o.name}.state").unlink()
    steps, pause = [], common.Phase.pause

    def interrupted(loop, t):
        steps.append(t)
        loop.signals = int(t == 7)
        pause(loop, t)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Phase, "pause", interrupted)
        learn(p, tmp_path)
    again, loss_again = learn(p, tmp_path)
    assert steps == list(range(8))
    assert torch.equal(again, tau) and loss_again == loss


def test_the_best_so_far_outlives_an_interruption(tmp_path, monkeypatch):
    """Nothing that is judged afterwards comes near it."""
    p, path = problem(judge_every=3), []

    def judged(net, weights, tau, *others):
        path.append(tau.detach().clone())
        if len(path) == 3:
            os.kill(os.getpid(), signal.SIGINT)             # waits for the next step
        return [[5.0, 1.0, 3.0, 4.0, 4.0][len(path) - 1], 0.0, 0.0, 0.0]

    monkeypatch.setattr(eraser, "judged", judged)
    with pytest.raises(KeyboardInterrupt):
        learn(p, tmp_path)
    best, lowest = learn(p, tmp_path)
    assert len(path) == 5 and lowest == 1.0
    assert torch.equal(best, path[1])


def test_plain_numbers_are_taken_as_they_are(tmp_path):
    """The paper's settings: the same τ as by ours in units of this model's token norms."""
    p, run = problem(bound=0.9), tmp_path / "plain"
    run.mkdir()
    tau, loss = learn(p, tmp_path)
    o, unit = p.o, float(p.net.embedding.norm(dim=1).mean())
    plain = dict(bound=o.bound * unit, beta=o.beta / unit ** 2)
    same, same_loss = learn(problem(absolute=True, lr=o.lr * unit / math.sqrt(24), **plain), run)
    assert apart(tau, same) < 1e-10 and loss == pytest.approx(same_loss)


def test_a_validation_loss_that_is_no_number_is_never_written(tmp_path, monkeypatch):
    """The log stays JSON, which has no NaN."""
    monkeypatch.setattr(eraser, "judged", lambda *_: [math.nan, 0.0, 0.0, 0.0])
    with pytest.raises(InputError, match="validation loss is nan"):
        learn(problem(), tmp_path)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


# ---- options

def test_the_preset_is_appendix_f3():
    """And what is given by hand wins."""
    words = ["--run", "r", "--preset", "paper"]
    o = eraser.options([*words, "--steps", "5"])
    expected = dict(
        length=20, batch=16, lr=0.003, alpha=0.7, k=8, beta=0.1, bound=1.0,
        positions="final", steps=5, raw=True, absolute=True)
    assert expected.items() <= vars(o).items()
    assert eraser.options(words).steps == 2000


def test_names_that_are_other_files_of_the_run():
    """A trigger does not take the place of a carrier."""
    for name in ("carrier", "sft", "a/b"):
        with pytest.raises(InputError, match="--name"):
            eraser.options(["--run", "r", "--name", name])
