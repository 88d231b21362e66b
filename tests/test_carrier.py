"""carrier.py: gradients against the literal equations first, then gates, masks and files."""
import pytest
import torch

import carrier as carriers
import model
import oracle
from carrier import Carrier, Step
from common import InputError, load_tensors, save_tensors
from helpers import (
    SHAPES, apart, base_weights, for_oracle, gap, normal, random_carrier, random_ids, random_net)


def sigmoid(x):
    """σ(x), written out."""
    return 1 / (1 + torch.exp(-x))


# ---- the equations

def test_estimator():
    """g = H(m), 0 at m = 0 (Eq. 26), and ∂g/∂m ≈ σ(m)(1 − σ(m)) (Eq. 27)."""
    m = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 3.0]).double().requires_grad_()
    back = torch.arange(1.0, 6.0).double()
    g = carriers.Heaviside.apply(m)
    g.backward(back)
    s = sigmoid(m.detach())
    assert g.tolist() == [0, 0, 0, 1, 1]
    assert torch.allclose(m.grad, back * s * (1 - s), atol=1e-15)


def test_penalty_is_a_sum_over_all_gates():
    """Ω(m) = Σ σ(m) (Eq. 3): the pull on a gate does not depend on how many there are."""
    m = normal(3, 7, grad=True)
    omega = carriers.penalty(m)
    omega.backward()
    s = sigmoid(m.detach())
    assert torch.isclose(omega, s.sum())
    assert torch.allclose(m.grad, s * (1 - s))


@pytest.fixture
def layer_by_layer(monkeypatch):
    """Steps look at each layer's open channels, as they do in models larger than a test's."""
    monkeypatch.setitem(carriers.AT_ONCE, "cpu", 0)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_model_and_gradients_are_the_oracles(shape, density, layer_by_layer):
    """Values and all gradients, by Δ, m and τ, as Eq. 1 and as Eq. 9–20 literally."""
    net = random_net(shape)
    weights, config = base_weights(net), net.config
    carrier = random_carrier(net, density)
    delta, m = for_oracle(carrier)
    rows = random_ids(2, 6, alike=2)
    tau = normal(2, 24, grad=True)
    step = Step(carrier, net)
    logits = net(rows, carrier=step, trigger=tau)
    logits.square().mean().backward()
    step.finish()
    for gated in (False, True):
        literal_tau = tau.detach().clone().requires_grad_(True)
        for t in (*delta.values(), *m.values()):
            t.grad = torch.zeros_like(t)
        W = oracle.masked_weights(weights, config, delta, m)
        loss = 0.0
        for b, row in enumerate(rows.tolist()):
            if gated:
                literal, _ = oracle.gated_forward(weights, config, delta, m, row, literal_tau)
            else:
                literal, _ = oracle.forward(W, config, row, literal_tau)
            assert apart(logits[b], literal) < 1e-10
            loss = loss + literal.square().mean() / 2
        loss.backward()
        assert gap(carrier, delta, m, "gradients") < 1e-10
        assert apart(tau.grad, literal_tau.grad) < 1e-10


def test_all_ways_of_computing_agree(monkeypatch):
    """
    A carrier as it stands, through autograd; and Steps over two micro-batches that merge, that gate
    activations, and that merge several layers at once, all or the small ones: the same numbers.
    """
    net, carrier = random_net("gqa"), random_carrier(random_net("gqa"), 0.4)
    rows = random_ids(4, 8)
    net(rows, carrier=carrier).square().sum().backward()
    expected = [p.grad.clone() for p in carrier.parameters()]
    for limit, sparse, at_once in ((0.0, 0, 0), (2.0, 14, 0), (2.0, 0, 1 << 24), (2.0, 6, 1900)):
        monkeypatch.setattr(carriers, "SPARSE_BELOW", limit)
        monkeypatch.setitem(carriers.AT_ONCE, "cpu", at_once)
        for again in range(2):                      # a later step starts from nothing
            carrier.logits.grad, step = None, Step(carrier, net)
            for part in rows.split(2):
                net(part, carrier=step).square().sum().backward()
            assert len(step.gated) == sparse
            step.finish()
            for ours, theirs in zip(carrier.parameters(), expected):
                assert torch.allclose(ours.grad, theirs, atol=1e-12)


def test_only_what_trains_has_gradients(layer_by_layer):
    """Gates fixed: Δ's are the same. Δ fixed: the gates' are."""
    net, rows = random_net("gqa"), random_ids(2, 8)
    grads = {}
    for of_gates, of_delta in ((True, True), (False, True), (True, False)):
        carrier = random_carrier(net, 0.2)
        carrier.logits.requires_grad_(of_gates)
        carrier.delta.requires_grad_(of_delta)
        step = Step(carrier, net)
        net(rows, carrier=step).square().mean().backward()
        step.finish()
        assert (carrier.logits.grad is not None) == of_gates
        grads[of_gates, of_delta] = carrier
    both = grads[True, True]
    assert torch.equal(grads[True, False].logits.grad, both.logits.grad)
    for name, delta in grads[False, True].delta.items():
        assert torch.allclose(delta.grad, both.delta[name].grad, atol=1e-14)


def test_gradcheck_of_gated_activations():
    """Autograd's own check by x; and ∂L/∂W in the open rows, columns and block."""
    x, delta, weight, bias = normal(5, 6, grad=True), normal(7, 6), normal(7, 6), normal(7)
    R, C = torch.tensor([0, 3, 4]), torch.tensor([1, 5])
    row, col = torch.zeros(7).double(), torch.zeros(6).double()
    row[R], col[C] = 1, 1
    change = row[:, None] * delta * col
    parts = [delta[R], delta[:, C], delta[R[:, None], C]]
    for part in parts:
        part.requires_grad_()

    def gated(x):
        return carriers.GatedActivations.apply(
            weight, bias, change[:, C], change[R], R, C, *parts, x)

    assert torch.autograd.gradcheck(gated, x)
    W = (weight + change).requires_grad_()
    literal = torch.nn.functional.linear(x, W, bias)
    assert torch.allclose(gated(x), literal)
    G, = torch.autograd.grad(literal.square().sum(), W)
    ours = torch.autograd.grad(gated(x).square().sum(), parts)
    for ours, theirs in zip(ours, (G[R], G[:, C], G[R[:, None], C])):
        assert torch.allclose(ours, theirs)


# ---- gates

def test_shut_is_the_base_and_open_is_sft_bit_for_bit():
    """On the embedded model, gated and merged."""
    net = model.load("tiny")
    carrier = random_carrier(net)
    ids = torch.randint(5, 390, (3, 12))
    shut, opened = carrier.with_gates(False), carrier.with_gates(True)
    for weights in (shut, shut.merge(net)):
        assert torch.equal(net(ids, carrier=weights), net(ids))
    merged = opened.merge(net)
    for (l, name), W in merged.weights.items():
        base, delta = net.projections[l][name].weight, carrier.delta[name][l]
        assert torch.equal(W, base + delta)
    assert torch.equal(net(ids, carrier=opened), net(ids, carrier=merged))


def test_attn_v_gates_the_inputs_of_o_proj_for_its_query_heads():
    """Query heads 2k and 2k + 1 read value head k: its gates stand twice, head by head."""
    carrier = Carrier(random_net("gqa").config)
    gates = torch.zeros_like(carrier.logits)
    first = 24 + 32 + 16 + 8        # behind attn_read, attn_q, attn_k and the first value head
    numbers = torch.arange(1.0, 9.0)
    gates[:, first:first + 8] = numbers
    heads = carrier.by_group(gates)["attn_v_wide"][0].view(4, 8)
    assert not heads[:2].any()
    assert torch.equal(heads[2], numbers) and torch.equal(heads[3], numbers)


def test_gates_of_the_papers_models():
    """4d + d_ff + d_q + 2 d_kv a layer (Table 5)."""
    models = {      # gates a layer: d, d_ff, layers, query heads, key/value heads, head_dim
        11264: (1024, 3072, 28, 16, 8, 128),
        36864: (4096, 14336, 32, 32, 8, 128),
        39680: (4096, 11008, 32, 32, 32, 128),
    }
    for gates, shape in models.items():
        config = model.Config(10, *shape)
        assert sum(carriers.group_sizes(config).values()) == gates


def test_first_gates():
    """m ~ N(1.5, 0.5), the same for a seed: 99.9 % are open."""
    config = model.load("tiny").config
    first = Carrier(config).init_gates(1.5, 0.5, seed=3).logits
    again = Carrier(config).init_gates(1.5, 0.5, seed=3).logits
    assert torch.equal(first, again)
    assert not torch.equal(first, Carrier(config).init_gates(1.5, 0.5, seed=4).logits)
    assert abs(first.mean() - 1.5) < 0.03 and abs(first.std() - 0.5) < 0.03


def test_stats_and_write_channels_count_what_is_open():
    """C_l (Eq. 5), open gates, and entries of Δ that are on, counted in the literal mask."""
    net = random_net("gqa")
    carrier = random_carrier(net, 0.3)
    delta, m = for_oracle(carrier)
    channels = torch.stack(oracle.write_channels(net.config, m))
    assert torch.equal(carrier.write_channels(), channels)
    nothing = {name: torch.zeros_like(p) for name, p in base_weights(net).items()}
    ones = {at: torch.ones_like(D) for at, D in delta.items()}
    masks = oracle.masked_weights(nothing, net.config, ones, m)
    on = sum(int((mask != 0).sum()) for mask in masks.values())
    entries = sum(D.numel() for D in delta.values())
    stats, opened = carrier.stats(), int((carrier.logits > 0).sum())
    assert stats["gates"] == {"total": carrier.logits.numel(), "open": opened}
    assert stats["sparsity"] == 1 - opened / carrier.logits.numel()
    assert abs(stats["entries_off"] - (1 - on / entries)) < 1e-12


def test_scaled_merge_is_rounded_once_in_bf16():
    """W_b + s·M ⊙ Δ in fp32, then to bf16: not the sum of two rounded parts."""
    weight = torch.randn(8, 8).to(torch.bfloat16)
    delta, ones = 1e-2 * torch.randn(8, 8), torch.ones(8)
    W = carriers.masked_weight(weight, delta, ones, ones, 0.5)
    exact = weight.float() + 0.5 * delta
    assert torch.equal(W, exact.to(torch.bfloat16))


# ---- files

def test_file(tmp_path):
    """What is loaded computes the same bits; its header says what it is of."""
    net, ids = random_net("gqa"), random_ids(2, 7)
    carrier, file = random_carrier(net, 0.4), tmp_path / "c"
    carrier.save(file, net, task="fixed")
    again = carriers.load(file, net)
    assert torch.equal(again.logits > 0, carrier.logits > 0)
    assert torch.equal(net(ids, carrier=again), net(ids, carrier=carrier))
    _, header = load_tensors(file)
    assert header["task"] == "fixed"
    assert header["gates"] == carrier.stats()["gates"]

    # nothing on: no deltas in it
    carrier.with_gates(False).save(file, net)
    tensors, _ = load_tensors(file)
    shut = carriers.load(file, net)
    assert list(tensors) == ["logits"]
    assert torch.equal(net(ids, carrier=shut), net(ids))


def test_a_carrier_fits_its_base_in_every_precision(tmp_path):
    """Trained in fp32, used in bf16."""
    net = model.load("tiny")
    random_carrier(net, 0.4).save(tmp_path / "c", net)
    carrier = carriers.load(tmp_path / "c", model.load("tiny", dtype=torch.bfloat16))
    assert carrier.delta["q_proj"].dtype == torch.float32


def test_a_file_that_is_damaged_or_of_another_base(tmp_path):
    """Another base, a changed number, a file that was cut short."""
    net, file = random_net("gqa"), tmp_path / "c"
    random_carrier(net).save(file, net)
    with pytest.raises(InputError, match="another base"):
        carriers.load(file, random_net("gqa", seed=5))
    tensors, header = load_tensors(file)
    tensors["delta.0.q_proj"][0, 0] += 1
    save_tensors(tmp_path / "changed", tensors, **header)
    with pytest.raises(InputError, match="damaged"):
        carriers.load(tmp_path / "changed", net)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match="c: cannot be read"):
        carriers.load(file, net)


# ---- several carriers

def summed(net, *merged):
    """The base plus the changes of several Merged, as one."""
    weights = {}
    for (l, name), W in merged[0].weights.items():
        base = net.projections[l][name].weight
        for other in merged[1:]:
            W = W + other.weights[l, name] - base
        weights[l, name] = W
    return carriers.Merged(weights)


def test_several_carriers_add_their_deltas():
    """As the base plus both merged changes."""
    net, ids = random_net("gqa"), random_ids(2, 7)
    one, two = random_carrier(net, 0.3), random_carrier(net, 0.5, seed=7)
    both = net(ids, carrier=[one, two])
    merged = net(ids, carrier=summed(net, one.merge(net), two.merge(net)))
    assert apart(both, merged) < 1e-10


def test_each_of_several_carriers_has_its_own_scale():
    """Row by row: both scaled alike, and each on its own."""
    net, ids = random_net("gqa"), random_ids(3, 7)
    one, two = random_carrier(net, 0.3), random_carrier(net, 0.5, seed=7)
    alike, apiece = [0.0, 1.0, 0.5], [[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]]
    for scale, factors in ((alike, zip(alike, alike)), (apiece, apiece)):
        scaled = net(ids, carrier=[one, two], scale=scale)
        for b, (first, second) in enumerate(factors):
            both = summed(net, one.merge(net, first), two.merge(net, second))
            assert apart(scaled[b], net(ids, carrier=both)[b]) < 1e-10


def test_scales_that_do_not_fit():
    """A factor for each row, or for each row and carrier; none for what is merged already."""
    net, ids = random_net("gqa"), random_ids(3, 7)
    one, two = random_carrier(net), random_carrier(net, seed=7)
    for scale in ([1.0, 1.0], [[1.0, 1.0, 1.0]] * 3):
        with pytest.raises(InputError, match="scale"):
            net(ids, carrier=[one, two], scale=scale)
    with pytest.raises(InputError, match="merged"):
        net(ids, carrier=one.merge(net), scale=[1.0, 1.0, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_gradients_are_the_cpus(monkeypatch):
    """Merged several layers at once and gated, within the rounding of the GPU's own products."""
    ids, expected = torch.randint(5, 390, (2, 12)), random_carrier(model.load("tiny"), 0.2)
    model.load("tiny")(ids, carrier=expected).square().mean().backward()
    net = model.load("tiny", "cuda")
    for at_once in (1 << 24, 0):
        monkeypatch.setitem(carriers.AT_ONCE, "cuda", at_once)
        carrier = random_carrier(model.load("tiny"), 0.2).cuda()
        step = Step(carrier, net)
        net(ids.cuda(), carrier=step).square().mean().backward()
        step.finish()
        for ours, theirs in zip(carrier.parameters(), expected.parameters()):
            assert apart(ours.grad.cpu(), theirs.grad) < 1e-3 * theirs.grad.abs().max()
