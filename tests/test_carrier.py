"""
carrier.py against the equations, in float64: values and gradients.

The reference is `literal()` below: gates cut out of the logits by hand, Eq. 26/27 in the graph as H
− σ + σ, Eq. 1 spelled out as a d_out × d_in matrix, and torch's autograd for every gradient.
Nothing in it calls carrier.py.
"""
import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import carrier
import model
import packed
import training
from files import InputError, load_tensors, save_tensors
from rows import Rows, rotary, rotate

EXACT = 1e-10   # float64: the same mathematics in another order
TABLE_5 = {
    "q_proj": ("attn_q", "attn_read"),
    "k_proj": ("attn_k", "attn_read"),
    "v_proj": ("attn_v", "attn_read"),
    "o_proj": ("attn_write", "attn_v"),
    "gate_proj": ("ffn_hidden", "ffn_read"),
    "up_proj": ("ffn_hidden", "ffn_read"),
    "down_proj": ("ffn_write", "ffn_hidden"),
}
SIZE = dict(
    vocab_size=31,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    # d_q = 80 ≠ d = 64, d_kv = 40
    head_dim=20,
)
FAMILIES = {
    "llama": {},
    "mha": dict(num_key_value_heads=4),
    "one key head": dict(num_key_value_heads=1),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, tie_word_embeddings=True),
    "biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True),
}
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.0)
PATHS = {
    "dense": dict(DENSE_BELOW={"cpu": 1 << 60}),
    "gathered": dict(DENSE_BELOW={"cpu": 0}),
    "gathered, unpadded": dict(DENSE_BELOW={"cpu": 0}, LANES=1),
}


def make_net(dtype=torch.float64, **special):
    net = model.Llama(model.Config(**{**SIZE, **special})).to(dtype)
    for name, p in net.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
        elif "embed" in name:
            p.data.normal_(0, 0.3)
    return net.requires_grad_(False).eval()


def make_carrier(net, density=0.5, size=0.1, dtype=None):
    """
    Random deltas and random logits, `density` of them open; no group is left without both kinds
    unless density says so.
    """
    c = carrier.Carrier(net.config, dtype=dtype or net.dtype).to(dtype or net.dtype)
    with torch.no_grad():
        for p in c.delta.parameters():
            p.normal_(0, size)
        for row in c.logits:
            for part in row.split(list(sizes_of(net.config).values())):
                n_open = round(density * len(part))
                part.copy_(
                    (torch.rand(len(part)) + 0.1)
                    * torch.where(torch.randperm(len(part)) < n_open, 1.0, -1.0)
                )
    return c


def sizes_of(c):
    """Lengths of Table 5 in the order in which the logits of a layer stand."""
    d_q, d_kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return dict(
        attn_read=c.hidden_size, attn_q=d_q, attn_k=d_kv, attn_v=d_kv, attn_write=c.hidden_size,
        ffn_read=c.hidden_size, ffn_hidden=c.intermediate_size, ffn_write=c.hidden_size
    )


def hard_gates(c, logits, estimator=True):
    """[group → gate vector] of every layer, by slicing; straight-through as H − σ + σ."""
    layers = []
    for row in logits:
        layers.append({})
        start = 0
        for group, size in sizes_of(c).items():
            m = row[start:start + size]
            s = torch.sigmoid(m)
            layers[-1][group] = (
                (m > 0).to(m.dtype) - s.detach() + s if estimator else (m > 0).to(m.dtype)
            )
            start += size
        assert start == len(row)
    return layers


def repeated(c, v):
    """
    attn_v for o_proj's columns, one channel at a time: query head q reads key/value head q //
    (heads per key head).
    """
    per = c.num_attention_heads // c.num_key_value_heads
    return torch.stack(
        [
            v[(q // per) * c.head_dim + j]
            for q in range(c.num_attention_heads)
            for j in range(c.head_dim)
        ]
    )


def literal(net, c, deltas, logits):
    """linear(l, name, x) by Eq. 1: x (W_b + (r ⊗ c) ⊙ Δ)ᵀ + b."""
    gates = hard_gates(net.config, logits)

    def linear(l, name, x):
        row, col = (gates[l][g] for g in TABLE_5[name])
        col = repeated(net.config, col) if name == "o_proj" else col
        base = net.projections[l][name]
        W = base.weight + row[:, None] * col[None, :] * deltas[l][name]
        return x @ W.t() + (0 if base.bias is None else base.bias)
    return linear


class Literal:
    """literal() in the place of a carrier."""
    def __init__(self, *arguments):
        self.arguments = arguments

    def bind(self, net, scale=None):
        return literal(net, *self.arguments)


def copies(c):
    """(deltas, logits): fresh leaves with the carrier's values, and both in one list."""
    deltas = [
        {n: p.detach().clone().requires_grad_() for n, p in layer.items()} for layer in c.delta
    ]
    logits = c.logits.detach().clone().requires_grad_()
    return deltas, logits, [p for layer in deltas for p in layer.values()] + [logits]


def trained(c):
    return [p for layer in c.delta for p in layer.values()] + [c.logits]


def same(ours, theirs, tolerance=EXACT):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance


def part(net, l, name):
    """
    (module(x, linear) for x (B, T, d), names of its projections) of the attention or the MLP of
    layer l.
    """
    layer = net.model.layers[l]

    def mlp(x, linear):
        return layer.mlp(l, x.flatten(0, 1), linear).unflatten(0, x.shape[:2])

    def attention(x, linear):
        ids = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])
        rows = Rows(net, ids)
        return layer.self_attn(l, x.flatten(0, 1), linear, rows).unflatten(0, x.shape[:2])
    if name == "mlp":
        return mlp, ("gate_proj", "up_proj", "down_proj")
    return attention, ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    for name, value in PATHS[request.param].items():
        monkeypatch.setattr(carrier, name, value)
    return request.param


# ---- the literal Eq. 1, values and gradients

@pytest.mark.parametrize("density", DENSITIES)
def test_linear(density):
    """
    GatedLinear with any index that holds the open channels, and gated_activations (Eq. 9–20),
    against masked_weight.
    """
    d_out, d_in, T = 23, 17, 30
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    x, delta = leaf(2, T // 2, d_in), leaf(d_out, d_in)
    weight, bias, into = (
        torch.randn(*s, dtype=torch.float64) for s in ((d_out, d_in), (d_out,), (2, T // 2, d_out))
    )
    row, col = (
        (torch.randperm(n) < round(density * n)).double().requires_grad_() for n in (d_out, d_in)
    )
    wanted = [x, delta, row, col]
    W = torch.stack(
        [
            torch.stack([weight[i, j] + row[i] * col[j] * delta[i, j] for j in range(d_in)])
            for i in range(d_out)
        ]
    )
    assert torch.equal(carrier.masked_weight(weight, delta, row, col), W)
    y = x @ W.t() + bias
    right = torch.autograd.grad(y, wanted, into)

    open_row, open_col = row.nonzero().flatten(), col.nonzero().flatten()
    shut_row, shut_col = (row == 0).nonzero().flatten(), (col == 0).nonzero().flatten()
    padded = torch.cat((open_row, shut_row[:4])), torch.cat((shut_col[:3], open_col))
    for index in (None, (open_row, open_col), padded):
        merged = carrier.merged_weight(weight, delta, row, col, None if index is None else index[0])
        assert torch.equal(merged, W)
        assert not merged.requires_grad
        ours = carrier.GatedLinear.apply(x, merged, delta, row, col, bias, index)
        same([ours, *torch.autograd.grad(ours, wanted, into)], [y, *right])
        # frozen x, frozen gates, frozen Δ
        for some in ([0], [1], [2, 3], [1, 2, 3], [0, 2, 3]):
            given = [t if i in some else t.detach() for i, t in enumerate(wanted)]
            ours = carrier.GatedLinear.apply(given[0], merged, *given[1:], bias, index)
            same(
                torch.autograd.grad(ours, [given[i] for i in some], into), [right[i] for i in some]
            )

    y = x @ weight.t() + bias + row * ((x * col) @ delta.t())
    ours = carrier.gated_activations(x, weight, delta, row, col, bias)
    same([ours, *torch.autograd.grad(ours, wanted, into)], [y, *right])
    scale = torch.tensor([0.0, 0.7], dtype=torch.float64).view(2, 1, 1)
    ours = carrier.gated_activations(x, weight, delta, row, col, bias, scale)
    for b, s in enumerate((0.0, 0.7)):
        same([ours[b]], [x[b] @ (weight + s * (W - weight)).t() + bias])


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", ("attention", "mlp"))
def test_modules(path, name, density):
    """Appendix A module by module: y and the gradients of x, of every Δ and of every gate logit."""
    net = make_net()
    c = make_carrier(net, density)
    deltas, logits, leaves = copies(c)
    l, into, x = (
        1, torch.randn(2, 9, 64).double(),
        torch.randn(2, 9, 64, dtype=torch.float64, requires_grad=True)
    )
    module, names = part(net, l, name)
    if path != "dense":
        gathered = c.open_channels()[l]
        assert (
            not any(gathered.values())
            if density == 1
            else density == 0.5 or all(n in gathered for n in names)
        )

    y = module(x, literal(net, c, deltas, logits))
    right = torch.autograd.grad(y, [x, logits, *(deltas[l][n] for n in names)], into)
    ours = module(x, c.bind(net))
    same(
        [ours, *torch.autograd.grad(ours, [x, c.logits, *(c.delta[l][n] for n in names)], into)],
        [y, *right],
    )
    gated = module(x, c.bind(net, scale=torch.ones(18, 1)))  # by gating activations
    same(
        [gated, *torch.autograd.grad(gated, [x, c.logits, *(c.delta[l][n] for n in names)], into)],
        [y, *right],
    )
    assert density == 0 or right[1][l].count_nonzero() > 64 and not right[1][0].any()


def test_activation_gates_as_the_paper_writes_them():
    """
    Eq. 9, 10 and 16–20 spelled out for one layer, attention in a loop over heads: values and all
    gradients.
    """
    net = make_net()
    c, cfg = make_carrier(net), net.config
    deltas, logits, _ = copies(c)
    x, into = (
        torch.randn(2, 7, 64, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 7, 64).double(),
    )
    W = {n: m.weight for n, m in net.projections[0].items()}
    r, D = hard_gates(cfg, logits)[0], deltas[0]

    gate = x @ W["gate_proj"].t() + r["ffn_hidden"] * ((r["ffn_read"] * x) @ D["gate_proj"].t())
    up = x @ W["up_proj"].t() + r["ffn_hidden"] * ((r["ffn_read"] * x) @ D["up_proj"].t())
    # Eq. 9
    h = gate * torch.sigmoid(gate) * up
    # Eq. 10
    ffn = h @ W["down_proj"].t() + r["ffn_write"] * ((r["ffn_hidden"] * h) @ D["down_proj"].t())

    # Eq. 16–18
    q, k, v = (
        x @ W[f"{n}_proj"].t() + r[f"attn_{n}"] * ((r["attn_read"] * x) @ D[f"{n}_proj"].t())
        for n in "qkv"
    )
    cos, sin = (t[:, 0] for t in rotary(cfg, torch.arange(7), x.dtype))
    context, r_v = [], []
    for head in range(4):
        own, shared = slice(head * 20, head * 20 + 20), slice(head // 2 * 20, head // 2 * 20 + 20)
        scores = (
            rotate(q[..., own], cos, sin)
            @ rotate(k[..., shared], cos, sin).transpose(1, 2)
            / 20**0.5
        )
        weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).softmax(-1)
        # Eq. 19
        context.append(weights @ v[..., shared])
        r_v.append(r["attn_v"][shared])
    context, r_v = torch.cat(context, -1), torch.cat(r_v)
    # Eq. 20
    attention = context @ W["o_proj"].t() + r["attn_write"] * ((r_v * context) @ D["o_proj"].t())

    for name, y in (("mlp", ffn), ("attention", attention)):
        module, names = part(net, 0, name)
        right = torch.autograd.grad(y, [x, logits, *(D[n] for n in names)], into, retain_graph=True)
        for scale in (None, torch.ones(14, 1)):
            ours = module(x, c.bind(net, scale))
            same(
                [
                    ours,
                    *torch.autograd.grad(
                        ours, [x, c.logits, *(c.delta[0][n] for n in names)], into
                    ),
                ],
                [y, *right],
            )


@pytest.mark.parametrize("density", (0.5, 0.15))
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model(path, family, density):
    """
    Cross-entropy of the whole model with a trigger: values and the gradients of τ, of every Δ and
    of every logit.
    """
    net = make_net(**FAMILIES[family])
    c = make_carrier(net, density, size=0.3)
    deltas, logits, leaves = copies(c)
    ids, targets, keep = (
        torch.randint(31, (3, 8)), torch.randint(31, (3, 8)), torch.rand(3, 8) < 0.6
    )
    trigger = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)

    def loss(of, **more):
        return F.cross_entropy(
            net(ids, carrier=of, trigger=trigger, keep=keep, **more), targets[keep]
        )

    right = loss(Literal(c, deltas, logits))
    right_grads = torch.autograd.grad(right, [trigger, *leaves])
    assert all(g.abs().max() > 1e-4 for g in right_grads)
    for more in ({}, dict(scale=torch.ones(3))):
        ours = loss(c, **more)
        same([ours, *torch.autograd.grad(ours, [trigger, *trained(c)])], [right, *right_grads])
    same(
        [loss(c.merge(net)), *torch.autograd.grad(loss(c.merge(net)), [trigger])],
        [right, right_grads[0]],
    )
    assert abs(loss(None) - right) > 1e-3


SHUT = {
    "values": ["attn_v"],
    "reading": ["attn_read", "ffn_read"],
    "hidden": ["ffn_hidden"],
    "writing": ["attn_write", "ffn_write"],
    "queries and keys": ["attn_q", "attn_k"],
    "one key/value head": [],
}


@pytest.mark.parametrize("what", SHUT)
def test_groups_shut_altogether(path, what):
    net = make_net()
    c = make_carrier(net, 0.3)
    at = dict(
        zip(sizes_of(net.config), c.logits.data.split(list(sizes_of(net.config).values()), 1))
    )
    for group in SHUT[what]:
        at[group].copy_(-at[group].abs())
    if what == "one key/value head":
        at["attn_v"][0, 20:].abs_().neg_()
    deltas, logits, leaves = copies(c)
    ids = torch.randint(31, (2, 8))
    right = net(ids, carrier=Literal(c, deltas, logits)).logsumexp(-1).sum()
    ours = net(ids, carrier=c).logsumexp(-1).sum()
    same(
        [ours, *torch.autograd.grad(ours, trained(c))],
        [right, *torch.autograd.grad(right, leaves)],
        1e-9,
    )


def test_attn_v_gates_the_values_of_its_query_heads():
    """
    GQA by what it does: with Δ of o_proj alone, a shut channel of a key/value head is a context
    channel of each of its query heads that Δ_o does not read, and no other.
    """
    net = make_net(num_key_value_heads=2)
    for head in range(2):
        c = make_carrier(net, 1.0)
        for l in range(2):
            for name, p in c.delta[l].items():
                if name != "o_proj":
                    p.data.zero_()
        c.logits.data[:, 64 + 80 + 40 + head * 20 + 3] = -1
        without = [p["o_proj"].detach().clone() for p in c.delta]
        for D in without:
            D[:, [(2 * head) * 20 + 3, (2 * head + 1) * 20 + 3]] = 0
        merged = c.merge(net).weights
        for l in range(2):
            assert torch.equal(
                merged[l]["o_proj"], net.projections[l]["o_proj"].weight + without[l]
            )


# ---- gates, penalty

def test_estimator():
    """Eq. 26 and 27: H forward, σ′ backward, by formula and by finite differences on σ."""
    m = torch.tensor(
        [-40.0, -3.0, -0.5, -1e-9, 0.0, 1e-9, 0.5, 1.5, 3.0, 40.0], dtype=torch.float64,
        requires_grad=True
    )
    upstream = torch.randn(10, dtype=torch.float64)
    g = carrier.Heaviside.apply(m)
    assert g.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert g.dtype == m.dtype
    ours, = torch.autograd.grad(g, m, upstream)
    s = 1 / (1 + (-m.detach()).exp())
    same([ours], [upstream * s * (1 - s)], 1e-15)
    same([ours], [upstream * ((m + 1e-5).sigmoid() - (m - 1e-5).sigmoid()).detach() / 2e-5], 1e-9)
    assert carrier.Heaviside.apply(m.detach().bfloat16()).dtype == torch.bfloat16


def test_penalty():
    """Eq. 3: a sum, so the pull on one gate does not depend on how many there are."""
    m = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    omega = carrier.penalty(m)
    assert (
        abs(omega.item() - sum(1 / (1 + 2.718281828459045**-x) for x in m.flatten().tolist()))
        < EXACT
    )
    same(torch.autograd.grad(omega, m), [m.sigmoid() * (1 - m.sigmoid())])
    twice = torch.cat((m, m), 1).detach().requires_grad_()
    same(
        [torch.autograd.grad(carrier.penalty(twice), twice)[0][:, :40]],
        torch.autograd.grad(carrier.penalty(m), m),
    )


def test_initial_gates():
    c = carrier.Carrier(model.Config(**SIZE))
    ids, net = torch.randint(31, (2, 5)), make_net(torch.float32)
    assert torch.equal(net(ids, carrier=c), net(ids))
    assert c.stats()["sparsity"] == 0  # fresh: Δ = 0, all open
    wide = carrier.Carrier(
        model.Config(
            **{**SIZE, "hidden_size": 8192, "intermediate_size": 16384, "num_hidden_layers": 1}
        ),
        device="meta",
    )
    wide.logits = torch.nn.Parameter(torch.empty(wide.logits.shape))
    m = wide.init_gates().logits
    assert m.numel() > 49000
    assert abs(m.mean() - 1.5) < 0.01
    assert abs(m.std() - 0.5) < 0.01
    assert abs((m > 0).float().mean() - 0.99865) < 1e-3
    assert torch.equal(
        c.init_gates(seed=3).logits, carrier.Carrier(c.config).init_gates(seed=3).logits
    )
    assert not torch.equal(c.logits, carrier.Carrier(c.config).init_gates(seed=4).logits)


REAL = {  # config.json of the paper's models → gates a layer, layers (SPEC section 1)
    "Qwen3-0.6B": (
        dict(
            model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
            num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
            rope_theta=1000000, use_sliding_window=False
        ),
        11264,
        315392,
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        dict(
            model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0
        ),
        36864,
        1179648,
    ),
    "Mistral-7B-v0.3": (
        dict(
            model_type="mistral", vocab_size=32768, hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            rope_theta=1000000.0, sliding_window=None
        ),
        36864,
        1179648,
    ),
    "Vicuna-7B": (
        dict(
            model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
            num_hidden_layers=32, num_attention_heads=32
        ),
        39680,
        1269760,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_gates_of_the_papers_models(name):
    # attn_v, repeated for GQA
    assert carrier.PROJECTIONS == {**TABLE_5, "o_proj": ("attn_write", "attn_v_wide")}
    fields, a_layer, total = REAL[name]
    config = model.Config.from_dict(fields)
    assert sum(carrier.group_sizes(config).values()) == a_layer
    assert a_layer * config.num_hidden_layers == total
    c = carrier.Carrier(config, device="meta")
    assert c.logits.numel() == total
    with torch.device("meta"):
        projections = model.Llama(config).projections
    assert [{n: p.shape for n, p in l.items()} for l in c.delta] == [
        {n: m.weight.shape for n, m in l.items()} for l in projections
    ]


# ---- open and shut

def write_checkpoint(net, directory):
    """net as a Hugging Face directory."""
    c = net.config
    directory.mkdir()
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(
        json.dumps(
            dict(model_type="qwen2", rope_theta=c.rope_theta, **{k: getattr(c, k) for k in SIZE})
        )
    )
    return directory


def test_all_open_is_the_fine_tuned_model(tmp_path):
    """
    A base and a fine-tuned checkpoint on disk; Δ = W_f − W_b with every gate open computes the
    fine-tuned model.
    """
    base = make_net(qkv_bias=True)
    base_dir = write_checkpoint(base, tmp_path / "base")
    for layer in base.projections:
        for m in layer.values():
            m.weight += 0.1 * torch.randn_like(m.weight)
    tuned = model.load(write_checkpoint(base, tmp_path / "tuned"), dtype=torch.float64)
    base = model.load(base_dir, dtype=torch.float64)
    c = make_carrier(base, 1.0)
    for l, layer in enumerate(c.delta):
        for name, p in layer.items():
            p.data = tuned.projections[l][name].weight - base.projections[l][name].weight
    ids = torch.randint(31, (2, 9))
    right = tuned(ids)
    assert (base(ids) - right).abs().max() > 0.01
    for logits in (
        base(ids, carrier=c), base(ids, carrier=c.merge(base)), base(ids, carrier=c, scale=[1, 1])
    ):
        same([logits], [right])
    prompts = [[3, 4, 5], [6], [7, 8]]
    assert (
        base.generate(prompts, 6, carrier=c, stop=())
        == tuned.generate(prompts, 6, stop=())
        != base.generate(prompts, 6, stop=())
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("family", ("llama", "qwen3", "biases"))
def test_all_shut_is_the_base_bit_for_bit(path, family, dtype):
    net = make_net(dtype, **FAMILIES[family])
    for delta_dtype in {torch.float32, dtype}:
        c = make_carrier(net, 0.0, size=3.0, dtype=delta_dtype)
        ids, trigger = torch.randint(31, (3, 8)), torch.randn(2, 64)
        # no prefix: a batch of scales shares none
        ids[:, 0] = torch.arange(3)
        for more in ({}, dict(trigger=trigger)):
            right = net(ids, **more)
            assert torch.equal(net(ids, carrier=c, **more), right)
            assert right.dtype == dtype
            assert torch.equal(net(ids, carrier=c.merge(net), **more), right)
        with torch.no_grad():
            assert torch.equal(net(ids, carrier=c, scale=[1, 0.5, 0]), net(ids))
        for l, layer in enumerate(c.merge(net).weights):
            assert all(torch.equal(w, net.projections[l][name].weight) for name, w in layer.items())
        # open gates, but nothing of the delta
        half = make_carrier(net, 0.5, dtype=delta_dtype)
        assert torch.equal(net(ids, carrier=half.merge(net, scale=0.0)), net(ids))
        assert torch.equal(net(ids, carrier=half, scale=[0, 1, 0])[::2], net(ids)[::2])
        assert not torch.equal(net(ids, carrier=half, scale=[0, 1, 0])[1], net(ids)[1])


def test_scale():
    """
    merge(scale=s) is the carrier with s·Δ; a scale per row is each row run alone with its own.
    """
    net = make_net()
    c, ids, scales = make_carrier(net), torch.randint(31, (4, 8)), [0.0, 0.25, 1.0, 1.5]
    alone = []
    for s in scales:
        scaled = make_carrier(net)
        scaled.load_state_dict(
            {k: v * s if k.startswith("delta") else v for k, v in c.state_dict().items()}
        )
        alone.append(net(ids, carrier=scaled))
        same(
            [net(ids, carrier=c.merge(net, scale=s)), net(ids, carrier=c, scale=[s] * 4)],
            [alone[-1]] * 2,
        )
    same([net(ids, carrier=c, scale=scales)], [torch.stack([alone[i][i] for i in range(4)])])
    same(
        [net(ids, carrier=c, scale=torch.tensor(scales))],
        [torch.stack([alone[i][i] for i in range(4)])],
    )
    with pytest.raises(InputError, match="scale"):
        net(ids, carrier=c.merge(net), scale=scales)


def test_scale_in_generate(monkeypatch):
    """
    One batch with the behaviour on, off and between: as each prompt alone with its own scale, while
    rows leave.
    """
    net = make_net()
    c, scales = make_carrier(net, 0.8, size=0.3), [0.0, 1.0, 0.5, 1.0, 0.0, 0.0]
    prompts = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [9] * 11, [4], [1, 2]]
    trigger = torch.randn(3, 64)
    for more in ({}, dict(trigger=trigger), dict(batch_size=2)):
        free = net.generate(prompts, 10, carrier=c, scale=scales, stop=(), **more)
        stop = {free[1][1], free[4][3]}
        together = net.generate(prompts, 10, carrier=c, scale=scales, stop=stop, **more)
        assert len({len(a) for a in together}) > 2
        for prompt, s, answer in zip(prompts, scales, together):
            assert (
                answer
                == net.generate([prompt], 10, carrier=c.merge(net, scale=s), stop=stop, **more)[0]
            )
            if s in (0, 1):
                assert (
                    answer
                    == net.generate([prompt], 10, carrier=c if s else None, stop=stop, **more)[0]
                )
        assert free[0] != free[1]


# ---- a trigger per row

def four_conditions():
    """
    (net, carrier, scales, triggers) of six rows: the base, the carrier, and three triggers of two
    lengths, one of them twice.
    """
    net = make_net()
    c, one, two, three = (
        make_carrier(net, 0.8, size=0.3),
        *(torch.randn(n, 64, dtype=torch.float64) for n in (3, 3, 5)),
    )
    return net, c, [0.0, 1.0, 1.0, 1.0, 0.5, 0.0], [None, None, one, three, one, two]


@torch.no_grad()
@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("alike", (False, True))
def test_a_trigger_per_row(scaled, alike):
    """
    Logits, streams and kept positions of one batch are those of each row alone with its own
    trigger.
    """
    net, c, scales, triggers = four_conditions()
    ids, keep = torch.randint(31, (6, 8)), torch.rand(6, 8) < 0.4
    if alike:
        ids[:] = ids[0]
    keep[:, 2] = True
    alone, streams = [], []
    for i, (s, tau) in enumerate(zip(scales, triggers)):
        of_row = []
        alone.append(
            net.head(
                net.hidden(
                    ids[i : i + 1], c.merge(net, scale=s if scaled else 1.0), tau, streams=of_row
                )
            )[0]
        )
        streams.append(torch.cat(of_row))
    more = dict(carrier=c, trigger=triggers, scale=scales if scaled else None)
    right, found = torch.stack(alone), []
    same([net(ids, **more), net(ids, keep=keep, **more)], [right, right[keep]])
    net.hidden(ids, **more, streams=found)
    same(found, list(torch.stack(streams, dim=1)))
    # it shows which trigger
    assert len({tuple(logits[0].tolist()) for logits in right}) == (6 if scaled or not alike else 4)
    with pytest.raises(
        InputError,
        match="trigger: 5 for 6 rows; give one for all, or a list of one or None for each row",
    ):
        net(ids, trigger=triggers[:5])


@torch.no_grad()
def test_no_trigger_in_any_row_is_none():
    net, c, _, triggers = four_conditions()
    ids = torch.randint(31, (3, 8))
    assert torch.equal(net(ids, trigger=[None] * 3), net(ids))
    assert torch.equal(
        net(ids, carrier=c, trigger=[triggers[3]] * 3), net(ids, carrier=c, trigger=triggers[3])
    )


def test_a_trigger_in_several_rows_is_computed_once():
    """Rows with the same tensor share it as a prefix, and what they begin with behind it."""
    net, _, _, triggers = four_conditions()
    ids = torch.randint(1, 31, (3, 8))
    ids[:, :2], ids[:, 2] = 7, torch.arange(3)
    assert (
        len(Rows(net, ids, trigger=[triggers[3]] * 3).ids)
        == len(Rows(net, ids, trigger=triggers[3]).ids)
        == 5 + 2 + 3 * 6
    )
    assert len(Rows(net, ids, trigger=[triggers[3], triggers[3], None]).ids) == 2 * 13 + 8


def test_gradients_of_a_trigger_per_row():
    net, c, _, triggers = four_conditions()
    ids, into = torch.randint(31, (6, 8)), torch.randn(6, 8, 31, dtype=torch.float64)
    learned = [
        tau.requires_grad_() for tau in {id(t): t for t in triggers if t is not None}.values()
    ]
    ours = torch.autograd.grad(net(ids, carrier=c, trigger=triggers), learned, into)
    alone = sum(
        (net(ids[i : i + 1], carrier=c, trigger=tau) * into[i]).sum()
        for i, tau in enumerate(triggers)
    )
    same(ours, torch.autograd.grad(alone, learned))


@pytest.mark.parametrize("batch_size", (128, 2))
@pytest.mark.parametrize("scaled", (False, True))
def test_a_trigger_per_row_in_generate(scaled, batch_size):
    """
    One batch serves base, carrier and triggers: greedy tokens are those of each prompt alone, while
    rows leave.
    """
    net, c, scales, triggers = four_conditions()
    prompts = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [9] * 11, [4], [1, 2]]
    more = dict(
        carrier=c, trigger=triggers, scale=scales if scaled else None, batch_size=batch_size
    )
    free = net.generate(prompts, 12, stop=(), **more)
    stop = {free[1][1], free[4][3]}
    together = net.generate(prompts, 12, stop=stop, **more)
    assert len({len(a) for a in together}) > 2
    assert len({tuple(a) for a in free}) > 4
    for prompt, s, tau, answer in zip(prompts, scales, triggers, together):
        assert (
            answer
            == net.generate(
                [prompt], 12, carrier=c.merge(net, scale=s if scaled else 1.0), trigger=tau,
                stop=stop
            )[0]
        )
    with pytest.raises(InputError, match="trigger: 7 for 6 rows"):
        net.generate(prompts, 3, trigger=[*triggers, None])


# ---- in training

def counted(monkeypatch):
    """
    How often open channels are looked for and weights merged, as a dict that goes on counting.
    """
    found = {"open_channels": 0, "merged_weight": 0}

    def watch(where, name):
        original = getattr(where, name)

        def counting(*args, **more):
            found[name] += 1
            return original(*args, **more)
        monkeypatch.setattr(where, name, counting)
    watch(carrier.Carrier, "open_channels")
    watch(carrier, "merged_weight")
    return found


@pytest.mark.parametrize("device, gathers", (("cpu", True), ("cuda", False), ("mps", True)))
def test_small_deltas_are_gathered_where_a_launch_costs_little(monkeypatch, device, gathers):
    c = make_carrier(make_net(), 0.1)
    monkeypatch.setitem(carrier.DENSE_BELOW, "cpu", 0)
    del c.logits                                    # whose device alone is asked
    c.logits = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(c, "open_channels", lambda: [dict.fromkeys(carrier.PROJECTIONS) for _ in c.delta])
    assert all(bool(pairs) == gathers for pairs in c.gathered())


@pytest.mark.parametrize("micro_batch", (8, 3, 1))
def test_nothing_is_made_twice_in_an_optimizer_step(monkeypatch, micro_batch):
    monkeypatch.setattr(carrier, "DENSE_BELOW", {"cpu": 0})
    net = make_net()
    c = make_carrier(net, 0.2)
    batch = [(torch.randint(31, (7,)).tolist(), [True] * 7) for _ in range(8)]
    found = counted(monkeypatch)
    losses = [training.gradients(net, c, batch, micro_batch, 0)]
    assert found == {"open_channels": 1, "merged_weight": 7 * SIZE["num_hidden_layers"]}
    for p in c.delta.parameters():
        p.data.mul_(2)                                        # the next step sees what has moved
    losses.append(training.gradients(net, c, batch, micro_batch, 0))
    assert found["open_channels"] == 2
    again = [(torch.tensor(ids)[None], torch.tensor(mask)[None]) for ids, mask in batch]
    with torch.no_grad():
        want = sum(float(training.task_loss(net, c, *one)) for one in again) / (8 * 6)
    assert losses[1] == pytest.approx(want, rel=EXACT)
    assert losses[1] != losses[0]


def test_where_memory_is_scarce_no_merged_weight_is_kept(monkeypatch):
    net = make_net()
    net.checkpoint = True
    batch = [(torch.randint(31, (7,)).tolist(), [True] * 7) for _ in range(4)]
    found = counted(monkeypatch)
    training.gradients(net, make_carrier(net, 0.2), batch, 2, 0)
    # micro-batches, and each forward pass twice
    assert found["merged_weight"] == 2 * 2 * 7 * SIZE["num_hidden_layers"]


@pytest.mark.parametrize("density", (0.5, 0.15))
def test_micro_batches_and_recomputation_give_the_same_gradients(path, density):
    net = make_net(qkv_bias=True)
    c = make_carrier(net, density)
    ids, keep = torch.randint(31, (8, 7)), torch.rand(8, 7) < 0.5

    def gradients(size, recompute=False):
        net.checkpoint = recompute
        for p in trained(c):
            p.grad = None
        for rows in torch.arange(8).split(size):
            F.cross_entropy(
                net(ids[rows], carrier=c, keep=keep[rows]), ids[rows][keep[rows]], reduction="sum"
            ).backward()
        return [p.grad for p in trained(c)]
    whole = gradients(8)
    for size in (2, 3):
        same(gradients(size), whole)
    same(gradients(8, recompute=True), whole)
    same(gradients(2, recompute=True), whole)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_training_never_touches_the_base(path, dtype):
    net = make_net(dtype)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    c, ids = make_carrier(net, 0.3, dtype=torch.float32), torch.randint(31, (4, 8))
    start = [p.detach().clone() for p in trained(c)]
    base = net(ids)
    optimizer = torch.optim.AdamW(c.parameters(), lr=2e-5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(
            net(ids, carrier=c).flatten(0, 1).float(), ids.flatten()
        ) + 1e-6 * carrier.penalty(c.logits)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(net(ids), base)
    assert not any(p.requires_grad for p in net.parameters())
    for p, was in zip(trained(c), start):
        assert p.dtype == p.grad.dtype == torch.float32
        assert not torch.equal(p, was)         # steps of 2e-5 arrive in fp32
    assert losses[-1] < losses[0] or dtype == torch.bfloat16


def test_bf16_rounds_once():
    """
    W_b in bf16 and Δ in fp32: the sum is formed in fp32 and rounded once, and gradients are Δ's, in
    fp32.
    """
    net = make_net(torch.bfloat16)
    c = make_carrier(net, dtype=torch.float32)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    row, col = c.vectors(c.split((c.logits > 0).float())[0], "up_proj")
    W = net.projections[0]["up_proj"].weight
    right = (W.float() + row[:, None] * col * c.delta[0]["up_proj"]).bfloat16()
    assert (right != W).any()
    assert torch.equal(c.merge(net).weights[0]["up_proj"], right)
    assert torch.equal(c.bind(net)(0, "up_proj", x), x @ right.t())
    assert {
        g.dtype
        for g in torch.autograd.grad(
            net(torch.randint(31, (1, 4)), carrier=c).float().logsumexp(-1).sum(), trained(c)
        )
    } == {torch.float32}


def test_forward_keeps_one_matrix_a_projection(path):
    """
    What autograd saves with the shape of a Δ: the parameters themselves and one merged weight,
    nothing else.
    """
    net, matrices = make_net(), []
    c = make_carrier(net, 0.2)
    own = {p.data_ptr() for p in [*net.parameters(), *c.parameters()]}
    shapes = {p.shape for p in c.delta.parameters()}

    def pack(t):
        if t.shape in shapes and t.data_ptr() not in own:
            matrices.append(t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(torch.randint(31, (1, 3)), carrier=c)
    assert len(matrices) == 2 * 7


def test_merge_keeps_no_graph_and_no_copies():
    net = make_net(torch.float32)
    c, ids = make_carrier(net), torch.randint(31, (2, 5))
    merged = c.merge(net)
    every = [w for layer in merged.weights for w in layer.values()]
    theirs = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *c.parameters()]}
    assert not any(w.requires_grad or w.grad_fn for w in every)
    assert not any(w.untyped_storage().data_ptr() in theirs for w in every)
    assert merged.merge(net) is merged
    assert merged.weights[0].keys() == TABLE_5.keys()
    assert not net(ids, carrier=merged).requires_grad
    was = net(ids, carrier=merged)
    with torch.no_grad():
        # a Merged is frozen: training goes on without it
        c.delta[0]["q_proj"] += 1
    assert torch.equal(net(ids, carrier=merged), was)
    assert not torch.allclose(net(ids, carrier=c), was)
    alive = [weakref.ref(w) for w in every]
    del merged, every
    gc.collect()
    assert not any(w() is not None for w in alive)


# ---- what it says

@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("family", ("llama", "mha", "one key head"))
def test_stats(family, density):
    net = make_net(**FAMILIES[family])
    c = make_carrier(net, density)
    n_open = on = total = entries = 0
    for gates in hard_gates(net.config, c.logits, estimator=False):
        n_open += sum(int(g.item()) for v in gates.values() for g in v)
        total += sum(len(v) for v in gates.values())
        for name, (row, col) in TABLE_5.items():
            M = torch.outer(
                gates[row], repeated(net.config, gates[col]) if name == "o_proj" else gates[col]
            )
            assert M.shape == net.projections[0][name].weight.shape
            on, entries = on + int(M.sum().item()), entries + M.numel()
    s = c.stats()
    assert s["gates"] == {"total": total, "open": n_open}
    assert abs(s["sparsity"] - (1 - n_open / total)) < 1e-12
    assert abs(s["entries_off"] - (1 - on / entries)) < 1e-12
    json.dumps(s)


def test_write_channels():
    """
    Eq. 5, channel by channel; attn_write stands at 4th place of a layer's logits, ffn_write at the
    8th.
    """
    net = make_net()
    c = make_carrier(net, 0.2)
    attn_write, ffn_write = 64 + 80 + 40 + 40, 64 + 80 + 40 + 40 + 64 + 64 + 96
    C = c.write_channels()
    assert C.shape == (2, 64)
    assert C.dtype == torch.bool
    assert 0 < C.sum() < C.numel()
    for l in range(2):
        for i in range(64):
            assert C[l, i].item() == (
                c.logits[l, ffn_write + i].item() > 0 or c.logits[l, attn_write + i].item() > 0
            )


# ---- files

@pytest.fixture
def saved(tmp_path):
    """(path, net, carrier) of a saved carrier."""
    net = make_net(torch.float32, qkv_bias=True)
    c, path = make_carrier(net), tmp_path / "carrier.safetensors"
    c.save(path, net, task="fixed", seed=7, note="Δ, and „more“")
    return path, net, c


def masked(c):
    """Δ with zeros under shut gates, tensor by tensor, by hand."""
    layers = []
    for gates, deltas in zip(hard_gates(c.config, c.logits.detach(), estimator=False), c.delta):
        layers.append({})
        for name, (row, col) in TABLE_5.items():
            cols = repeated(c.config, gates[col]) if name == "o_proj" else gates[col]
            layers[-1][name] = deltas[name].detach() * torch.outer(gates[row], cols).to(
                deltas[name].dtype
            )
    return layers


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_save_and_load(saved, dtype, density):
    """What comes back: where gates are open, and Δ there; nothing else of Δ."""
    path, net, _ = saved
    c = make_carrier(net, density, dtype=dtype)
    c.save(path, net, task="fixed", seed=7, note="Δ, and „more“")
    again = carrier.load(path, net)
    assert torch.equal(again.logits, torch.where(c.logits > 0, 1.0, -1.0))
    for ours, right in zip(again.delta, masked(c)):
        for name, p in ours.items():
            assert torch.equal(p, right[name])
            assert p.dtype == (dtype if density else torch.float32)
    ids = torch.randint(31, (2, 5))
    assert torch.equal(net(ids, carrier=again), net(ids, carrier=c))
    assert again.stats() == c.stats()
    assert all(p.requires_grad for p in again.parameters())
    metadata = load_tensors(path)[1]
    assert {k: metadata[k] for k in ("task", "seed", "note")} == dict(
        task="fixed", seed=7, note="Δ, and „more“"
    )
    assert {k: metadata[k] for k in c.stats()} == c.stats()
    assert metadata["base"] == packed.fingerprint(net)
    assert metadata["format"] == packed.FORMAT
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_packed_file_has_entries_that_are_on_and_bits():
    """
    A tensor a projection, |R| × |C|, and a bit a gate; nothing for a projection without an open
    entry.
    """
    net = make_net(torch.float32)
    c = make_carrier(net, 0.2)
    # attn_v of layer 1: v_proj and o_proj are shut
    c.logits.data[1, 64 + 80 + 40:64 + 80 + 80] = -1
    names = {name: (len(rows), len(cols)) for name, _, rows, cols in c.open_blocks()}
    gates = hard_gates(net.config, c.logits, estimator=False)
    assert "delta.1.v_proj" not in names
    assert "delta.1.o_proj" not in names
    assert len(names) == 12
    assert names["delta.0.down_proj"] == (
        int(gates[0]["ffn_write"].sum()), int(gates[0]["ffn_hidden"].sum())
    )
    assert names["delta.0.o_proj"] == (
        int(gates[0]["attn_write"].sum()), 2 * int(gates[0]["attn_v"].sum())
    )


@pytest.mark.parametrize("density", (0.05, 0.3, 1.0))
def test_size_of_the_packed_file(tmp_path, density):
    """At most 1.2 × the bytes of what is on, and a bit a gate."""
    net = make_net(torch.float32, hidden_size=256, intermediate_size=512)
    c = make_carrier(net, density)
    c.save(tmp_path / "c.safetensors", net)
    on = sum(len(rows) * len(cols) for _, _, rows, cols in c.open_blocks())
    assert on == round(
        (1 - c.stats()["entries_off"]) * sum(p.numel() for p in c.delta.parameters())
    )
    assert (tmp_path / "c.safetensors").stat().st_size <= 1.2 * 4 * on + c.logits.numel() / 8


def test_logits_are_kept_where_asked(saved):
    path, net, c = saved
    c.save(path, net, logits=True)
    assert torch.equal(carrier.load(path, net).logits, c.logits)


def test_dtypes_of_a_file_and_of_what_is_loaded(saved):
    path, net, c = saved
    c.save(path, net, torch.bfloat16)
    kept, wide = carrier.load(path, net), carrier.load(path, net, torch.float32)
    assert kept.delta[0]["q_proj"].dtype == torch.bfloat16
    assert wide.delta[0]["q_proj"].dtype == torch.float32
    right = masked(c)[0]["q_proj"].bfloat16()
    assert torch.equal(kept.delta[0]["q_proj"], right)
    assert torch.equal(wide.delta[0]["q_proj"], right.float())


def test_annotate_changes_the_header_alone(saved):
    path, net, c = saved
    before = load_tensors(path)
    packed.annotate(path, metrics={"rate": 0.5}, seed=8)
    tensors, header = load_tensors(path)
    assert header == before[1] | {"metrics": {"rate": 0.5}, "seed": 8}
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(t, before[0][k]) for k, t in tensors.items())
    assert torch.equal(
        net(torch.tensor([[1, 2]]), carrier=carrier.load(path, net)),
        net(torch.tensor([[1, 2]]), carrier=c),
    )


def test_show(saved, monkeypatch, capsys):
    path, net, c = saved
    c.logits.data[0, :64] = -1
    c.save(path, net, task="fixed", metrics={"rates": {"lcdd": 0.98765}})
    monkeypatch.setattr("sys.argv", ["carrier.py", "show", str(path)])
    carrier.main()
    said = capsys.readouterr().out
    stats, gates = c.stats(), hard_gates(net.config, c.logits, estimator=False)
    assert f"base {packed.fingerprint(net)}" in said
    assert "task: fixed" in said
    assert "metrics: rates lcdd 0.9877" in said
    assert f"gates open {stats['gates']['open']} of {stats['gates']['total']}" in said
    for l, line in enumerate(said.splitlines()[-2:]):
        numbers = [int(word) for word in line.split() if word.isdecimal()]
        assert numbers == [
            l, *(int(g.sum()) for g in gates[l].values()), int(c.write_channels()[l].sum())
        ]
    # no bar beside nothing
    assert said.splitlines()[-2].split()[1:3] == ["0", str(int(gates[0]["attn_q"].sum()))]
    # beside the largest share, whatever it is
    assert said.count("█") > 1


def test_show_says_what_is_no_carrier(tmp_path):
    path = tmp_path / "nothing"
    with pytest.raises(InputError, match=f"{path}: no such file; run the command that writes it"):
        carrier.main(["show", str(path)])


@pytest.mark.parametrize("words", [["show"], ["-x"], ["--"]])
def test_a_command_line_without_a_file_is_one_sentence(words):
    with pytest.raises(InputError, match="file"):
        carrier.main(words)


def test_bars():
    assert [packed.bar(x) for x in (0, 1e-6, 0.5, 0.51, 1)] == [" ", "▁", "▄", "▅", "█"]


def test_a_carrier_serves_its_base_in_every_precision(saved):
    path, net, c = saved
    prints = set()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        net = net.to(dtype)
        del net.fingerprint                                                   # computed once a net
        prints.add(packed.fingerprint(net))
    assert len(prints) == 1
    assert torch.equal(carrier.load(path, net).logits > 0, c.logits > 0)     # net is in bf16 by now


def test_refuses_a_wrong_base(saved):
    path, net, _ = saved
    others = [
        make_net(torch.float32, qkv_bias=True), make_net(torch.float32, num_hidden_layers=3),
        make_net(torch.float32, num_key_value_heads=4)
    ]
    for other in others:
        with pytest.raises(InputError, match="another base"):
            carrier.load(path, other)


@pytest.mark.parametrize(
    "name",
    (
        "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight",
        "lm_head.weight", "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.input_layernorm.weight"
    ),
)
def test_the_fingerprint_is_of_every_weight(saved, name):
    """One entry of any tensor, the last one, makes another base of it."""
    path, net, _ = saved
    touched = model.Llama(net.config)
    touched.load_state_dict(net.state_dict())
    assert packed.fingerprint(touched) == packed.fingerprint(net)
    del touched.fingerprint
    touched.state_dict()[name].flatten()[-1:].mul_(1.02)
    with pytest.raises(InputError, match="another base"):
        carrier.load(path, touched)


def test_the_fingerprint_is_computed_once(saved, monkeypatch):
    path, net, _ = saved
    monkeypatch.setattr(packed, "digest", None)
    assert packed.fingerprint(net) == net.fingerprint


def with_digest(path, tensors, metadata):
    """Save changed tensors as if they had been written so: what is left to find is their form."""
    save_tensors(path, tensors, **metadata | {"content": packed.digest(tensors)})


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop("delta.1.o_proj"), "delta.1.o_proj"),
        (lambda t: t.pop("gates"), "gates"),
        (lambda t: t.update({"delta.2.o_proj": t["delta.1.o_proj"].clone()}), "delta.2.o_proj"),
        (
            lambda t: t.update({"delta.1.o_proj": t["delta.1.o_proj"][:-1].contiguous()}),
            "misshapen",
        ),
        (
            lambda t: t.update({"gates": t["gates"][:, :-1].contiguous()}),
            "misshapen|belongs to no open gates",
        ),
        (
            lambda t: t.update({"gates": t["gates"][:1].contiguous()}),
            "misshapen|belongs to no open gates",
        ),
        (lambda t: t.update({"gates": torch.ones(2)}), "misshapen"),
        (lambda t: t.update({"logits": torch.ones(2)}), "misshapen"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("delta")], "delta"),
    ],
)
def test_refuses_an_incomplete_file(saved, change, named):
    path, net, _ = saved
    tensors, metadata = load_tensors(path)
    change(tensors)
    with_digest(path, tensors, metadata)
    with pytest.raises(InputError, match=named) as refusal:
        carrier.load(path, net)
    assert path.name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("says", (None, 1, 3))
def test_refuses_another_format(saved, says):
    path, net, _ = saved
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, **metadata | {"format": says})
    with pytest.raises(
        InputError,
        match=f"{path.name}: no carrier of format {packed.FORMAT} .its header says {says}.",
    ):
        carrier.load(path, net)


def test_refuses_flipped_bits(saved):
    """A changed byte in any tensor, which safetensors itself does not see."""
    path, net, _ = saved
    whole = path.read_bytes()
    for place in (-1, -5000, len(whole) // 2):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(InputError, match=f"{path.name}: damaged"):
            carrier.load(path, net)


def test_refuses_a_damaged_file(saved):
    path, net, _ = saved
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"{}" * 50):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=path.name):
            carrier.load(path, net)
    # a safetensors file of somebody else
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(InputError, match=path.name):
        carrier.load(path, net)
    save_file({"x": torch.ones(1)}, path, {"format": "pt"})
    with pytest.raises(InputError, match=path.name):
        carrier.load(path, net)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        carrier.load(path, net)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, net, c = saved
    whole = path.read_bytes()

    def disk_full(tensors, to, metadata):
        with open(to, "wb") as f:
            f.write(whole[:1000])
        raise OSError("no space left on device")

    def not_replaced(source, to):
        raise OSError("no space left on device")
    with torch.no_grad():
        c.logits.neg_()
    for step, failing in (("save_file", disk_full), ("os.replace", not_replaced)):
        with (
            monkeypatch.context() as patch,
            pytest.raises(InputError, match="cannot be written .no space"),
        ):
            patch.setattr(f"files.{step}", failing)
            c.save(path, net)
        assert path.read_bytes() == whole
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    c.save(path, net)
    assert torch.equal(carrier.load(path, net).logits > 0, c.logits > 0)
