"""
What several test files use: small random models and carriers, their form in the oracle, and how far
two tensors are apart.
"""
import argparse

import torch

import carrier as carriers
import eraser
import lcdd
import model
from common import read_json, read_rows

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_BIAS = dict(qkv_bias=True, o_bias=True, mlp_bias=True)
SHAPES = {      # what differs between models of four heads
    "mha": dict(num_key_value_heads=4),
    "gqa": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "mqa": dict(num_key_value_heads=1, qkv_bias=True),
    "qwen3": dict(num_key_value_heads=2, qk_norm=True, **EVERY_BIAS),
    "llama3": dict(
        num_key_value_heads=2, rope_llama3=(8.0, 1.0, 4.0, 32.0), rope_theta=500.0),
}


# ---- random tensors, in float64

def normal(*shape, grad=False):
    """Normal noise."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def random_ids(B, T, alike=0, vocabulary=60):
    """Token ids (B, T) without 0, rows that begin with the same `alike` tokens."""
    ids = torch.randint(1, vocabulary, (B, T))
    ids[:, :alike] = ids[0, :alike]
    return ids


def apart(a, b):
    """The largest difference between two tensors."""
    return float((a - b).detach().abs().max())


# ---- models, carriers, batches

def random_net(shape="gqa", layers=2, seed=0, vocabulary=60):
    """A small base model in float64 with random weights of every kind."""
    config = model.Config(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=4, head_dim=8, **SHAPES[shape])
    torch.manual_seed(seed)
    net = model.Llama(config).double().requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.3)
    return net


def random_carrier(net, density=0.5, seed=1):
    """A carrier with random deltas and about that part of the gates open."""
    generator = torch.Generator().manual_seed(seed)
    carrier = carriers.Carrier(net.config, dtype=net.dtype)
    with torch.no_grad():
        for l in range(len(carrier.logits)):
            for name in sorted(carrier.delta):
                delta = carrier.delta[name][l]
                delta.copy_(0.1 * torch.randn(delta.shape, generator=generator))
        opened = torch.rand(carrier.logits.shape, generator=generator) < density
        size = 0.1 + torch.rand(carrier.logits.shape, generator=generator)
        carrier.logits.copy_(torch.where(opened, size, -size))
    return carrier


def random_batch(net, n=6, seed=2, shared=4):
    """[(ids, mask)] of different lengths that begin alike, responses of two or three tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(net.config.vocab_size, (length,), generator=generator).tolist()

    first, examples = ids(shared), []
    for i in range(n):
        row, response = first + ids(4 + i % 4), 2 + i % 2
        examples.append((row, [False] * (len(row) - response) + [True] * response))
    return examples


# ---- the same for the oracle

def long_name(projection):
    """A projection's name within a layer: self_attn.q_proj."""
    return f"{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}"


def base_weights(net):
    """{name: tensor} of the base."""
    return dict(net.state_dict())


def for_oracle(carrier):
    """(delta, m) of a carrier as the oracle has them: leaf tensors that want gradients."""
    delta, m = {}, {}
    for l in range(len(carrier.logits)):
        for name, p in carrier.delta.items():
            delta[l, long_name(name)] = p[l].detach().clone().requires_grad_(True)
        vectors = carrier.logits[l].detach().split(list(carrier.sizes.values()))
        for group, vector in zip(carriers.GROUPS, vectors):
            m[l, group] = vector.clone().requires_grad_(True)
    return delta, m


def gap(carrier, delta, m, of="values"):
    """The largest difference of a carrier from (delta, m): of `values` or of `gradients`."""
    def part(t):
        return t.grad if of == "gradients" else t.detach()

    gaps = []
    for l in range(len(carrier.logits)):
        for name, p in carrier.delta.items():
            gaps.append(apart(part(p)[l], part(delta[l, long_name(name)])))
        gates = torch.cat([part(m[l, group]) for group in carriers.GROUPS])
        gaps.append(apart(part(carrier.logits)[l], gates))
    return max(gaps)


# ---- options, and what a run has written

def settings(**changed):
    """Options of lcdd.py, changed and fitted, for small loops."""
    o = lcdd.options(["--steps", "10", "--settle", "4", "--batch", "4"])
    usual = dict(warmup=3, gate_lr=40.0, rho=0.3, clip=0.5)
    vars(o).update(usual | changed)
    return lcdd.fit(o, 24, 12)


def eraser_settings(**changed):
    """Options of eraser.py for small loops."""
    words = "--run none --steps 10 --length 3 --batch 2 --k 3"
    o = eraser.options(words.split())
    return argparse.Namespace(**vars(o) | changed)


def results_of(run, suffix=""):
    """What results.json of a run directory holds."""
    return read_json(run / f"results{suffix}.json")


def log_of(run, phase):
    """The rows of metrics.jsonl that a phase has written."""
    return [row for row in read_rows(run / "metrics.jsonl") if row["phase"] == phase]
