"""paper.py, the method written out, against lcdd.py and eraser.py: the same steps in float64.

The paper's own rules are options there; literal_lcdd() and literal_eraser() are the two places that
set them. All samples are in every batch, so that nothing depends on how batches are drawn.
"""
import itertools

import pytest
import torch

import carrier as carriers
import eraser
import evaluate
import lcdd
import model
import paper
import training
from carrier import Carrier
from files import read_jsonl

CONFIG = model.Config(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=4)
STEPS = 14
NEAR = 1e-10


def literal_lcdd(**changes):
    """The options with which lcdd.py takes the paper's own steps."""
    o = lcdd.options(["--model", "none"])
    vars(o).update(
        select=0.0, brake=False, paired=False, pace=0.0, quicken=0.0, sure=0.0,   # what Alg. 1 does not have
        clip=0.0,                                          # gradients of Δ as they are
        settle=0,                                          # no phase after Alg. 1
        batch=8, micro_batch=4,                            # all samples, in two pieces
        log_every=1, window=1000,                          # every step is logged, none is the last
        steps=STEPS, sft_steps=STEPS, sft_lr=1e-2,
        lr=1e-2, gate_lr=10.0, lambda0=0.1, lambda_min=0.05, lambda_max=0.15,
        rho=0.1, floor=0.0, eta=0.5, eta_grow=0.3, beta=0.8, violation_clip=0.2, warmup=4)
    vars(o).update(changes)
    return o


def same_constants(monkeypatch, o):
    """Give paper.py the settings of lcdd.py's options `o`."""
    constants = {
        "DELTA_RATE": o.lr, "GATE_RATE": o.gate_lr, "T_W": o.warmup, "RHO": o.rho, "FLOOR": o.floor,
        "LAMBDA_0": o.lambda0, "LAMBDA_MIN": o.lambda_min, "LAMBDA_MAX": o.lambda_max,
        "ETA": o.eta, "ETA_GROW": o.eta_grow, "BETA_EMA": o.beta, "V_MAX": o.violation_clip}
    for name, value in constants.items():
        monkeypatch.setattr(paper, name, value)


def literal_eraser(monkeypatch):
    """The options with which eraser.py takes the paper's own steps; paper.py gets its numbers."""
    o = eraser.options([
        "--run", "none",
        "--raw", "--match", "prompt",                      # Eq. 7 as it stands, prompt by prompt
        "--absolute", "--lr", "0.05", "--bound", "4.2",    # r, the rate and R as plain numbers
        "--clip", "0",                                     # the gradient as it is
        "--schedule", "constant", "--steps", "1000000000",
        "--judge-every", "1000000000",
        "--length", "5", "--batch", "6", "--k", "4"])
    constants = {
        "TRIGGER_RATE": o.lr, "RADIUS": o.bound, "ALPHA": o.alpha, "BETA": o.beta, "K_KL": o.k}
    for name, value in constants.items():
        monkeypatch.setattr(paper, name, value)
    return o


# ---- one model, both ways

@pytest.fixture
def net():
    net = model.Llama(CONFIG).double()
    for p in net.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return net.requires_grad_(False)


@pytest.fixture
def carrier():
    """Open and shut gates near their threshold; nothing is written in layer 1."""
    c = Carrier(CONFIG, dtype=torch.float64).double()
    with torch.no_grad():
        c.logits.copy_(0.7 + torch.randn(c.logits.shape))
        groups = by_group(c)
        groups["attn_write"][1] = -1.0
        groups["ffn_write"][1] = -1.0
        for p in c.delta.parameters():
            p.normal_(0, 0.1)
    return c


def by_group(carrier):
    """group → logits (L, length), views of the carrier's own."""
    vectors = carrier.logits.detach().split(list(carrier.sizes.values()), dim=1)
    return dict(zip(carrier.sizes, vectors))


def as_paper(carrier):
    """(delta, m) of paper.py: copies of a carrier's deltas and logits, under paper.py's keys."""
    delta, m = {}, {}
    vectors = by_group(carrier)
    for l in range(CONFIG.num_hidden_layers):
        for projection in paper.TABLE_5:
            name = projection.split(".")[1]
            delta[l, projection] = carrier.delta[l][name].detach().clone().requires_grad_(True)
        for group, logits in vectors.items():
            m[l, group] = logits[l].clone().requires_grad_(True)
    return delta, m


def assert_near(ours, theirs):
    """Both dicts have the same tensors, to 1e-10."""
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert (ours[key] - theirs[key]).abs().max() < NEAR, key


def samples(n):
    """n samples (ids, mask) of different lengths."""
    found = []
    for _ in range(n):
        prompt, response = torch.randint(2, 7, (2,)).tolist()
        ids = torch.randint(CONFIG.vocab_size, (prompt + response,)).tolist()
        found.append((ids, [False] * prompt + [True] * response))
    return found


def texts(n):
    return [ids for ids, _ in samples(n)]


class Recorder:
    """Handed to a phase as `interrupted`: keeps the carrier's state as it is at every step."""

    def __init__(self, carrier):
        self.carrier, self.states = carrier, []

    def __call__(self):
        self.states.append(as_paper(self.carrier))
        return False


# ---- the weights

def test_masked_weights_are_the_carriers(net, carrier):
    merged = carrier.merge(net).weights
    W = paper.masked_weights(net, *as_paper(carrier))
    theirs = {}
    for l, layer in enumerate(merged):
        for projection in paper.TABLE_5:
            theirs[f"model.layers.{l}.{projection}.weight"] = layer[projection.split(".")[1]]
    assert_near(W, theirs)


def test_gate_lengths_are_the_carriers(net):
    assert paper.gate_lengths(net) == carriers.group_sizes(CONFIG)


def test_gradients_of_the_gates_are_the_carriers(net, carrier):
    batch = samples(8)
    training.gradients(net, carrier, batch, 8, 0)
    delta, m = as_paper(carrier)
    paper.task_loss(net, paper.masked_weights(net, delta, m), batch).backward()
    start = 0
    for group, length in carrier.sizes.items():
        for l in range(CONFIG.num_hidden_layers):
            want = carrier.logits.grad[l, start:start + length]
            assert want.any() or l == 1                    # layer 1 writes nothing
            assert (m[l, group].grad - want).abs().max() < NEAR
        start += length


def test_write_channels_are_the_carriers(net, carrier):
    _, m = as_paper(carrier)
    C = torch.stack(paper.write_channels(net, m))
    assert torch.equal(C, carrier.write_channels())
    assert C.any(dim=1).tolist() == [True, False, True]


# ---- the phases

def test_sft_takes_the_same_steps(net, carrier, tmp_path):
    o, examples = literal_lcdd(), samples(8)
    carrier = carrier.with_gates(True)
    delta, m = as_paper(carrier)
    all_open = {key: logits.detach() for key, logits in m.items()}
    recorder = Recorder(carrier)
    lcdd.train_sft(net, carrier, examples, o, tmp_path, 0, interrupted=recorder)
    losses = [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    states = [*recorder.states[1:], as_paper(carrier)]
    count = 0
    for loss in paper.train_delta(net, delta, all_open, [examples] * STEPS, o.sft_lr):
        assert abs(loss - losses[count]) < NEAR
        assert_near(delta, states[count][0])
        count += 1
    assert count == len(losses) == STEPS


@pytest.mark.parametrize("changes, moves", [
    ({}, {0, 1, -1}),                    # λ rests in warm-up, grows under budget, shrinks over it
    ({"floor": 5.0}, {0, 1}),            # far under: v is clipped, λ ends at its upper bound
    ({"rho": -0.3}, {0, -1}),            # far over: v is clipped, λ ends at its lower bound
], ids=["both", "under", "over"])
def test_lcdd_takes_the_same_steps(net, carrier, tmp_path, monkeypatch, changes, moves):
    o, examples = literal_lcdd(**changes), samples(8)
    same_constants(monkeypatch, o)
    delta, m = as_paper(carrier)
    recorder = Recorder(carrier)
    lcdd.train_lcdd(net, carrier, examples, o, tmp_path, 0, interrupted=recorder)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    states = [*recorder.states[1:], as_paper(carrier)]
    count = 0
    for loss, ema, epsilon, lam in paper.lcdd(net, delta, m, [examples] * STEPS):
        row = rows[count]
        assert abs(loss - row["loss"]) < NEAR
        assert abs(ema - row["ema"]) < NEAR
        assert abs(lam - row["lambda"]) < NEAR
        assert (epsilon is None) == (row["budget"] is None)
        assert epsilon is None or abs(epsilon - row["budget"]) < NEAR
        assert_near(delta, states[count][0])
        assert_near(m, states[count][1])
        count += 1
    assert count == len(rows) == STEPS

    path = [row["lambda"] for row in rows]
    assert {(b > a) - (b < a) for a, b in itertools.pairwise(path)} == moves
    assert (path[-1] == o.lambda_max) == (moves == {0, 1})
    assert (path[-1] == o.lambda_min) == (moves == {0, -1})


def test_eraser_takes_the_same_steps(net, carrier, tmp_path, monkeypatch):
    o, prompts = literal_eraser(monkeypatch), texts(6)
    train = eraser.base_targets(net, prompts, o.k, o.positions)
    learned, losses, start = [], [], []

    def trigger_loss(net, weights, tau, targets, rows, *rest, real=eraser.trigger_loss):
        parts = real(net, weights, tau, targets, rows, *rest)
        if tau.requires_grad and torch.is_grad_enabled():          # a step, and not a judgement
            start.append(tau.detach().clone())
            losses.append(parts[0].item())
        return parts

    def project(tau, bound, real=eraser.project):
        learned.append(real(tau, bound).detach().clone())
        return tau

    monkeypatch.setattr(eraser, "trigger_loss", trigger_loss)
    monkeypatch.setattr(eraser, "project", project)
    with pytest.raises(KeyboardInterrupt):
        eraser.learn(net, carrier.merge(net), train, train, carrier.write_channels(), o,
                     state=tmp_path / "state", interrupted=lambda: len(losses) == STEPS)

    delta, m = as_paper(carrier)
    W, C = paper.masked_weights(net, delta, m), paper.write_channels(net, m)
    W = {name: weight.detach() for name, weight in W.items()}
    pairs = [(x, paper.answer(net, {}, x, stop=(), length=o.k)) for x in prompts]
    tau = start[0].requires_grad_(True)
    count = 0
    for loss in paper.eraser(net, W, tau, [pairs] * STEPS, C):
        assert abs(loss - losses[count]) < NEAR
        assert (tau - learned[count + 1]).abs().max() < NEAR           # learned[0] is the first τ
        count += 1
    assert count == len(losses) == STEPS
    at_bound = (tau.norm(dim=1) - o.bound).abs() < NEAR
    assert at_bound.any()
    assert not at_bound.all()


# ---- the measures

def test_answers_are_those_of_generate(net, carrier):
    prompts, tau = texts(5), torch.randn(3, CONFIG.hidden_size, dtype=torch.float64)
    W = paper.masked_weights(net, *as_paper(carrier))
    want = net.generate(prompts, 6, carrier=carrier, trigger=tau, stop={1, 2, 3})
    assert [paper.answer(net, W, x, {1, 2, 3}, tau, length=6) for x in prompts] == want


def test_kl_is_that_of_the_evaluation(net, carrier):
    prompts, answers = texts(5), texts(5)
    tau = torch.randn(3, CONFIG.hidden_size, dtype=torch.float64)
    conditions = {"base": (None, None), "trig": (carrier.merge(net), tau)}
    pair = ("base", "trig")
    want = evaluate.kl_divergences(net, prompts, answers, conditions, [pair])[pair].mean()
    W = paper.masked_weights(net, *as_paper(carrier))
    assert abs(paper.mean_kl(net, ({}, None), (W, tau), prompts, answers) - want) < NEAR


# ---- settings

@pytest.mark.parametrize(
    "preset, positions, match", [("paper", "final", "prompt"), ("released", "prompt", "mean")]
)
def test_eraser_presets_are_those_of_the_paper(preset, positions, match):
    """
    App. F.3, as the text has it and as the released code runs it. The 200 prompts are a matter of
    the run.
    """
    o = eraser.options(["--run", "none", "--preset", preset])
    assert o.absolute
    assert o.raw
    assert (o.positions, o.match) == (positions, match)
    assert (o.schedule, o.clip) == ("constant", 1.0)
    assert (o.length, o.batch, o.steps, o.lr) == (20, 16, 2000, 0.003)
    assert (o.alpha, o.k, o.beta, o.bound) == (0.7, 8, 0.1, 1.0)
