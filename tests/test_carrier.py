"""carrier.py: gradients against the literal equations first, then gates, masks and files."""
import pytest
import torch

import carrier as carriers
import model
import oracle
from carrier import Carrier
from common import InputError, load_tensors, save_tensors
from helpers import SHAPES, for_oracle, gap, random_carrier, random_net


def test_estimator():
    """g = H(m), 0 at m = 0 (Eq. 26), and ∂g/∂m ≈ σ(m)(1 − σ(m)) (Eq. 27)."""
    m = torch.tensor([-2.0, -1e-9, 0.0, 1e-9, 3.0], dtype=torch.float64, requires_grad=True)
    g = carriers.Heaviside.apply(m)
    assert g.tolist() == [0, 0, 0, 1, 1]
    g.backward(torch.arange(1.0, 6.0, dtype=torch.float64))
    s = 1 / (1 + torch.exp(-m.detach()))
    assert torch.allclose(m.grad, torch.arange(1.0, 6.0) * s * (1 - s), atol=1e-15)


def test_penalty_is_a_sum_over_all_gates():
    m = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    omega = carriers.penalty(m)
    omega.backward()
    assert torch.isclose(omega, sum(1 / (1 + torch.exp(-x)) for x in m.detach().flatten()))
    assert torch.allclose(m.grad, torch.sigmoid(m) * (1 - torch.sigmoid(m)))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_model_and_gradients_are_the_oracles(shape, share):
    """Values and all gradients, by Δ, m and τ, at every density, as Eq. 1 and as Eq. 9–20 literally."""
    net = random_net(shape)
    weights, config = dict(net.state_dict()), net.config
    carrier = random_carrier(net, share)
    delta, m = for_oracle(carrier)
    rows = torch.randint(60, (2, 6))
    rows[:, :2] = rows[0, :2]
    ours = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    logits = net(rows, carrier=carrier, trigger=ours)
    logits.square().mean().backward()
    for gated in (False, True):
        tau = ours.detach().clone().requires_grad_(True)
        for t in (*delta.values(), *m.values()):
            t.grad = torch.zeros_like(t)
        W = oracle.masked_weights(weights, config, delta, m)
        loss = 0.0
        for b, row in enumerate(rows.tolist()):
            if gated:
                expected = oracle.gated_forward(weights, config, delta, m, row, tau)[0]
            else:
                expected = oracle.forward(W, config, row, tau)[0]
            assert (logits[b] - expected).abs().max() < 1e-10
            loss = loss + expected.square().mean() / 2
        loss.backward()
        assert gap(carrier, delta, m, "gradients") < 1e-10
        assert (ours.grad - tau.grad).abs().max() < 1e-10


def test_both_ways_of_computing_agree(monkeypatch):
    """Merged weights and gated activations: the same numbers at any density, one sample per way."""
    net = random_net("gqa")
    rows, found = torch.randint(60, (2, 8)), []
    for limit in (0.0, 3.0):
        monkeypatch.setattr(carriers, "SPARSE_BELOW", limit)
        carrier = random_carrier(net, 0.4)
        logits = net(rows, carrier=carrier)
        logits.square().mean().backward()
        used = len(carrier.open_channels())
        found.append((used, logits, carrier.logits.grad, *(p.grad for p in carrier.delta.parameters())))
    assert found[0][0] == 0 and found[1][0] == 14
    for merged, gated in zip(found[0][1:], found[1][1:]):
        assert torch.allclose(merged, gated, atol=1e-12)


def test_gradcheck_of_the_gated_layers():
    """Autograd's own check, by x, Δ, r and c."""
    torch.manual_seed(1)
    d = dict(dtype=torch.float64, requires_grad=True)
    x, delta, row, col = torch.randn(5, 6, **d), torch.randn(7, 6, **d), torch.rand(7, **d), torch.rand(6, **d)
    weight, bias = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    every = torch.arange(7), torch.arange(6)

    def gated(x, delta, row, col):
        return carriers.GatedActivations.apply(x, weight, delta, row, col, bias, *every)

    def merged(x, delta, row, col):
        W = carriers.masked_weight(weight, delta.detach(), row.detach(), col.detach())
        return carriers.MergedLinear.apply(x, W, delta, row, col, bias)

    assert torch.autograd.gradcheck(gated, (x, delta, row, col))
    for ours, theirs in zip(*(torch.autograd.grad(f(x, delta, row, col).square().sum(), (x, delta, row, col))
                              for f in (gated, merged))):
        assert torch.allclose(ours, theirs)


def test_shut_is_the_base_and_open_is_sft_bit_for_bit():
    net = model.load("tiny")
    carrier = random_carrier(net)
    ids = torch.randint(5, 390, (3, 12))
    shut, opened = carrier.with_gates(False), carrier.with_gates(True)
    assert torch.equal(net(ids, carrier=shut), net(ids))
    assert torch.equal(net(ids, carrier=shut.merge(net)), net(ids))
    for (l, name), W in opened.merge(net).weights.items():
        assert torch.equal(W, net.projections[l][name].weight + carrier.delta[l][name])
    assert torch.equal(net(ids, carrier=opened), net(ids, carrier=opened.merge(net)))


def test_attn_v_gates_the_inputs_of_o_proj_for_its_query_heads():
    """Query heads 2k and 2k + 1 read value head k: its gates stand twice, head by head."""
    net = random_net("gqa")
    carrier = Carrier(net.config)
    gates = torch.zeros_like(carrier.logits)
    start = 24 + 32 + 16                                        # behind attn_read, attn_q, attn_k
    gates[:, start + 8:start + 16] = torch.arange(1.0, 9.0)     # of the second value head
    wide = carrier.by_group(gates)["attn_v_wide"][0].view(4, 8)
    assert wide[:2].sum() == 0
    assert torch.equal(wide[2], torch.arange(1.0, 9.0)) and torch.equal(wide[3], wide[2])


def test_gates_of_the_papers_models():
    """4d + d_ff + d_q + 2 d_kv a layer (Table 5)."""
    shapes = {11264 * 28: (1024, 3072, 28, 16, 8, 128), 36864 * 32: (4096, 14336, 32, 32, 8, 128),
              39680 * 32: (4096, 11008, 32, 32, 32, 128)}
    for gates, (d, f, layers, heads, kv_heads, h) in shapes.items():
        config = model.Config(10, d, f, layers, heads, kv_heads, h)
        assert layers * sum(carriers.group_sizes(config).values()) == gates


def test_first_gates():
    """m ~ N(1.5, 0.5), the same for a seed: 99.9 % are open."""
    first = Carrier(model.load("tiny").config).init_gates(1.5, 0.5, seed=3).logits
    again = Carrier(model.load("tiny").config).init_gates(1.5, 0.5, seed=3).logits
    assert torch.equal(first, again)
    assert abs(first.mean() - 1.5) < 0.03 and abs(first.std() - 0.5) < 0.03


def test_stats_and_write_channels_count_what_is_open():
    net = random_net("gqa")
    carrier = random_carrier(net, 0.3)
    delta, m = for_oracle(carrier)
    C = carrier.write_channels()
    for l, expected in enumerate(oracle.write_channels(net.config, m)):
        assert torch.equal(C[l], expected)
    W = oracle.masked_weights({name: torch.zeros_like(p) for name, p in net.state_dict().items()}, net.config,
                              {key: torch.ones_like(D) for key, D in delta.items()}, m)
    on = sum(int((t != 0).sum()) for t in W.values())
    stats = carrier.stats()
    assert stats["gates"]["open"] == int((carrier.logits > 0).sum())
    assert stats["sparsity"] == 1 - stats["gates"]["open"] / carrier.logits.numel()
    assert abs(stats["entries_off"] - (1 - on / sum(D.numel() for D in delta.values()))) < 1e-12


def test_scaled_merge_is_rounded_once_in_bf16():
    """W_b + s·M ⊙ Δ in fp32, then to bf16: not the sum of two rounded parts."""
    weight = torch.randn(8, 8).to(torch.bfloat16)
    delta, row, col = 1e-2 * torch.randn(8, 8), torch.ones(8), torch.ones(8)
    W = carriers.masked_weight(weight, delta, row, col, 0.5)
    assert torch.equal(W, (weight.float() + 0.5 * delta).to(torch.bfloat16))


def test_file(tmp_path):
    net = random_net("gqa")
    carrier, ids = random_carrier(net, 0.4), torch.randint(60, (2, 7))
    carrier.save(tmp_path / "c", net, task="fixed")
    again = carriers.load(tmp_path / "c", net)
    assert torch.equal(again.logits > 0, carrier.logits > 0)
    assert torch.equal(net(ids, carrier=again), net(ids, carrier=carrier))
    header = load_tensors(tmp_path / "c")[1]
    assert header["task"] == "fixed" and header["gates"] == carrier.stats()["gates"]
    carrier.with_gates(False).save(tmp_path / "shut", net)      # nothing on: no deltas in it
    assert list(load_tensors(tmp_path / "shut")[0]) == ["logits"]
    assert torch.equal(net(ids, carrier=carriers.load(tmp_path / "shut", net)), net(ids))


def test_a_file_that_is_damaged_or_of_another_base(tmp_path):
    net, other = random_net("gqa"), random_net("gqa", seed=5)
    random_carrier(net).save(tmp_path / "c", net)
    with pytest.raises(InputError, match="another base"):
        carriers.load(tmp_path / "c", other)
    tensors, header = load_tensors(tmp_path / "c")
    tensors["delta.0.q_proj"][0, 0] += 1
    save_tensors(tmp_path / "changed", tensors, **header)
    with pytest.raises(InputError, match="damaged"):
        carriers.load(tmp_path / "changed", net)
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-40])
    with pytest.raises(InputError, match="c: cannot be read"):
        carriers.load(tmp_path / "c", net)


def test_several_carriers_add_their_deltas():
    net, ids = random_net("gqa"), torch.randint(60, (2, 7))
    one, two = random_carrier(net, 0.3), random_carrier(net, 0.5, seed=7)
    both = random_carrier(net).with_gates(True)
    for l in range(2):
        for name in carriers.PROJECTIONS:
            parts = [c.merge(net).weights[l, name] - net.projections[l][name].weight for c in (one, two)]
            both.delta[l][name].data.copy_(sum(parts))
    assert (net(ids, carrier=[one, two]) - net(ids, carrier=both)).abs().max() < 1e-10


def test_each_of_several_carriers_has_its_own_scale():
    """Row by row: both scaled alike, and each on its own, as the merged sum of their scaled changes."""
    net, ids = random_net("gqa"), torch.randint(60, (3, 7))
    one, two = random_carrier(net, 0.3), random_carrier(net, 0.5, seed=7)
    for scale in ([0.0, 1.0, 0.5], [[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]]):
        got = net(ids, carrier=[one, two], scale=scale)
        for b, s in enumerate(scale):
            first, second = s if isinstance(s, list) else (s, s)
            first, second = one.merge(net, scale=first), two.merge(net, scale=second)
            both = {at: W + second.weights[at] - net.projections[at[0]][at[1]].weight
                    for at, W in first.weights.items()}
            assert (got[b] - net(ids[b:b + 1], carrier=carriers.Merged(both))[0]).abs().max() < 1e-10
    for scale in ([1.0, 1.0], [[1.0, 1.0, 1.0]] * 3):
        with pytest.raises(InputError, match="scale"):
            net(ids, carrier=[one, two], scale=scale)
    with pytest.raises(InputError, match="merged"):
        net(ids, carrier=one.merge(net), scale=[1.0, 1.0, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_gradients_are_the_cpus():
    ids, found = torch.randint(5, 390, (2, 12)), []
    for device in ("cpu", "cuda"):
        net = model.load("tiny", device)
        carrier = random_carrier(model.load("tiny"), 0.2).to(device)
        net(ids.to(device), carrier=carrier).square().mean().backward()
        found.append(carrier.logits.grad.cpu())
    assert (found[0] - found[1]).abs().max() < 1e-3 * found[0].abs().max()
