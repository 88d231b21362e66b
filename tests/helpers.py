"""What several test files use: small random models and carriers, and their form in the oracle."""
import argparse

import torch

import carrier as carriers
import lcdd
import model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPES = {      # heads, key/value heads, tied head, more of Config
    "mha": (4, 4, False, {}),
    "gqa": (4, 2, True, {}),
    "mqa": (4, 1, False, dict(qkv_bias=True)),
    "qwen3": (4, 2, False, dict(qk_norm=True, o_bias=True, mlp_bias=True, qkv_bias=True)),
    "llama3": (4, 2, False, dict(rope_llama3=(8.0, 1.0, 4.0, 32.0), rope_theta=500.0)),
}


def random_net(shape="gqa", layers=2, seed=0, vocabulary=60):
    """A small base model in float64 with random weights of every kind."""
    heads, kv_heads, tied, more = SHAPES[shape]
    config = model.Config(vocab_size=vocabulary, hidden_size=24, intermediate_size=40, num_hidden_layers=layers,
                          num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8,
                          tie_word_embeddings=tied, **more)
    torch.manual_seed(seed)
    net = model.Llama(config).double().requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.3)
    return net


def random_carrier(net, share=0.5, seed=1):
    """A carrier with random deltas and about that share of the gates open."""
    generator = torch.Generator().manual_seed(seed)
    carrier = carriers.Carrier(net.config, dtype=net.dtype)
    with torch.no_grad():
        for delta in carrier.delta.parameters():
            delta.copy_(0.1 * torch.randn(delta.shape, generator=generator))
        opened = torch.rand(carrier.logits.shape, generator=generator) < share
        size = 0.1 + torch.rand(carrier.logits.shape, generator=generator)
        carrier.logits.copy_(torch.where(opened, size, -size))
    return carrier


def for_oracle(carrier):
    """(delta, m) of a carrier as the oracle has them: leaf tensors that want gradients."""
    delta, m = {}, {}
    for l, deltas in enumerate(carrier.delta):
        for name, p in deltas.items():
            part = "self_attn" if name in ATTENTION else "mlp"
            delta[l, f"{part}.{name}"] = p.detach().clone().requires_grad_(True)
        vectors = carrier.logits[l].detach().split(list(carrier.sizes.values()))
        for group, vector in zip(carriers.GROUPS, vectors):
            m[l, group] = vector.clone().requires_grad_(True)
    return delta, m


def gap(carrier, delta, m, of="values"):
    """The largest difference between a carrier and the oracle's (delta, m), of values or of gradients."""
    def part(t):
        return t.grad if of == "gradients" else t.detach()
    found = []
    for l, deltas in enumerate(carrier.delta):
        for name, p in deltas.items():
            projection = f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            found.append((part(p) - part(delta[l, projection])).abs().max())
        ours = part(carrier.logits)[l]
        found.append((ours - torch.cat([part(m[l, group]) for group in carriers.GROUPS])).abs().max())
    return float(max(found))


def random_batch(net, n=6, seed=2, shared=4):
    """[(ids, mask)] of different lengths that begin alike, with responses of two or three tokens."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(net.config.vocab_size, (shared,), generator=generator).tolist()
    examples = []
    for i in range(n):
        ids = first + torch.randint(net.config.vocab_size, (4 + i % 4,), generator=generator).tolist()
        response = 2 + i % 2
        examples.append((ids, [False] * (len(ids) - response) + [True] * response))
    return examples


def settings(**changed):
    """Options of lcdd.py, changed and fitted, for small loops."""
    o = lcdd.options(["--steps", "10", "--settle", "4", "--batch", "4"])
    vars(o).update(warmup=3, gate_lr=40.0, rho=0.3, clip=0.5)
    vars(o).update(changed)
    o.micro_batch = o.micro_batch if "micro_batch" in changed else o.batch
    return lcdd.fit(o, 24, 12)


def eraser_settings(**changed):
    """Options of eraser.py for small loops."""
    import eraser
    o = eraser.options(["--run", "none", "--steps", "10", "--length", "3", "--batch", "2", "--k", "3"])
    return argparse.Namespace(**vars(o) | changed)
