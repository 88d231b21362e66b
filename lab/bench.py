"""How fast, how large, how precise: the figures of the README's speed table, from one command.

    python -m lab.bench                  two minutes on two CPU cores
    python -m lab.bench --device cuda    Qwen3-0.6B's shape in bf16, and a step at DeepSeek-8B's
    python -m lab.bench --memory         only a step's memory, at Qwen3-0.6B's and DeepSeek-8B's
                                         shapes, also on a CPU (21 GB, five minutes)
    python -m lab.bench --model DIR --data FILE
                                         a real checkpoint and tokens beside transformers and peft
                                         (135M parameters: four minutes on one core, 6 GB)

The baselines, plain SFT of the same model and carrier.py's slow definitions, are checked to give the
same loss and gradients before they are timed. A ratio is the median over rounds, A B C, C B A, …,
of the ratio within a round. Prints one JSON line last.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import copy
import json
import platform
import statistics
import time
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import eraser
import evaluate
import model
import training
from carrier import Carrier, Heaviside, gated_activations, masked_weight, penalty
from config import Config
from console import Parser, check_device, check_numbers, cli, duration, markdown
from run import EMBEDDED, chat_of, locate, prepare

DENSITIES = (1.0, 0.5, 0.2, 0.1)  # share of gates open
# Qwen3-0.6B
QWEN = Config(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, tie_word_embeddings=True, qk_norm=True)
# DeepSeek-R1-Distill-Llama-8B
DEEPSEEK = Config(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5,
                  rope_llama3=(8.0, 1.0, 4.0, 8192.0))
SMALL = Config(512, 256, 768, 4, 4, 4, 64)  # for precision, and where growth starts on the CPU
# batch: rows × tokens, and how many of a row are in the loss; a comparison takes `least` rounds, and
# `seconds` (the step ten times that)
SETTINGS = {
    "cpu": SimpleNamespace(
        config=Config(1024, 1024, 3072, 2, 16, 16, 64), batch=(8, 256, 128), dtype=torch.float32,
        slow_at=(0.2,), grow=SMALL, grow_batch=(4, 128, 32), steps=60, prompts=96, new_tokens=16,
        seconds=2, least=3, targets={1.0: 1.05, 0.2: 0.88, 0.1: 0.82}),
    "cuda": SimpleNamespace(
        config=QWEN, batch=(8, 512, 64), dtype=torch.bfloat16,
        slow_at=DENSITIES, grow=replace(QWEN, vocab_size=8192), grow_batch=(16, 256, 64),
        steps=300, prompts=32, new_tokens=16,
        seconds=2, least=3, targets={1.0: 1.10, 0.2: 0.90}),
    "quick": SimpleNamespace(
        config=Config(128, 64, 96, 2, 4, 2, 16, qk_norm=True), batch=(2, 24, 8),
        dtype=torch.float32, slow_at=(0.2,), grow=Config(64, 64, 96, 2, 4, 4, 16),
        grow_batch=(1, 16, 4), steps=2, prompts=3, new_tokens=2, seconds=0, least=1, targets={}),
}


def shape(c):
    """A configuration in words."""
    return (f"{c.num_hidden_layers} layers, d {c.hidden_size}, d_ff {c.intermediate_size}, "
            f"{c.num_attention_heads}/{c.num_key_value_heads} heads × {c.head_dim}, "
            f"vocabulary {c.vocab_size}")


# ---- random models, carriers, batches

def random_net(config, device, dtype):
    """A Llama with N(0, 0.02) weights and norms of 1, frozen."""
    with torch.device("meta"):
        net = model.Llama(config).to(dtype)
    net.to_empty(device=device).requires_grad_(False).eval()
    for p in net.parameters():
        if p.dim() == 1:
            p.fill_(1.0)
        else:
            p.normal_(0, 0.02)
    return net


def random_carrier(net, density=1.0, dtype=torch.float32):
    """Deltas of a tenth of the weights' size, `density` of the gates open."""
    c = Carrier(net.config, dtype, net.device)
    for p in c.delta.parameters():
        p.data.normal_(0, 0.002)
    return set_density(c, density)


def set_density(c, density):
    """Open that share of the gates, always the same ones."""
    noise = torch.rand(c.logits.shape, generator=torch.Generator().manual_seed(0))
    c.logits.data.copy_(1.5 * (noise < density) - 0.75)
    return c


def random_batch(config, rows, length, supervised, device, prefix=0):
    """
    ids and mask (rows, length+1): `length` tokens are computed, the last `supervised` of each row
    are in the loss, and the first `prefix` are the same in every row.
    """
    ids = torch.randint(config.vocab_size, (rows, length + 1), device=device)
    ids[:, :prefix] = ids[0, :prefix]
    mask = torch.arange(length + 1, device=device) > length - supervised
    return ids, mask.expand(rows, -1)


# ---- one model, five ways to compute a step

class Slow:
    """A Carrier by one of the slow definitions under autograd: `rule` is literal or activations."""

    def __init__(self, carrier, rule):
        self.carrier, self.rule = carrier, rule

    def bind(self, net, scale=None):
        self.gates = self.carrier.split(Heaviside.apply(self.carrier.logits))

        def linear(l, name, x):
            return self.rule(x, net.projections[l][name], *self.parts(l, name))
        return linear

    def parts(self, l, name):
        """Δ, row and column gates of a projection."""
        delta = self.carrier.delta[l][name]
        row, col = self.carrier.vectors(self.gates[l], name)
        return delta, row.to(delta.dtype), col.to(delta.dtype)


def literal(x, base, delta, row, col):
    """y by Eq. 1, its mask and masked weight made as matrices."""
    weight = masked_weight(base.weight, delta, row, col)
    return F.linear(x, weight.to(x.dtype), base.bias)


def activations(x, base, delta, row, col):
    """y by Eq. 9–20: both products, and the gates on what goes in and comes out of Δ's."""
    return gated_activations(x, base.weight, delta, row.to(x.dtype), col.to(x.dtype), base.bias)


class Eq1(nn.Module):
    """Eq. 1 in the form that torch.nn.utils.parametrize needs: weight → weight."""

    def __init__(self, *where):
        super().__init__()
        self.where = where

    def forward(self, weight):
        slow, l, name = self.where
        return masked_weight(weight, *slow.parts(l, name)).to(weight.dtype)


def ways(net, carrier):
    """
    {name: (net, carrier, parameters that get gradients)}: one model, five ways. Plain SFT has
    W_b + (r ⊗ c) ⊙ Δ, gates as they stand now, for ordinary weights. With parametrize, too, the
    gates are built once a forward pass.
    """
    sft, eq1, slow = copy.deepcopy(net), copy.deepcopy(net), Slow(carrier, literal)
    merged, ours = carrier.merge(net).weights, list(carrier.parameters())
    slow.bind(eq1)

    def build_gates(layer, args):
        slow.bind(eq1)

    eq1.model.layers[0].register_forward_pre_hook(build_gates)
    weights = []
    for l, layer in enumerate(carrier.delta):
        for name in layer:
            weights.append(nn.Parameter(merged[l][name].clone()))
            sft.projections[l][name].weight = weights[-1]
            rule = Eq1(slow, l, name)
            parametrize.register_parametrization(eq1.projections[l][name], "weight", rule)
    return {
        "plain SFT": (sft, None, weights),
        "LCDD": (net, carrier, ours),
        "literal Eq. 1": (net, slow, ours),
        "literal Eq. 1, parametrize": (eq1, None, ours),
        "gated activations": (net, Slow(carrier, activations), ours),
    }


def step(way, ids, mask, chunk=None):
    """Forward and backward of one batch; the loss."""
    net, carrier, trained = way
    for p in trained:
        p.grad = None
    loss = training.task_loss(net, carrier, ids, mask, chunk=chunk) / mask[:, 1:].sum()
    loss.backward()
    return float(loss.detach())


def step_at(density, carrier, way, ids, mask):
    """A step with that share of the carrier's gates open."""
    set_density(carrier, density)
    return step(way, ids, mask)


def disagreement(net, carrier, ids, mask):
    """
    {baseline: largest relative difference from LCDD in the loss and in any gradient, over
    DENSITIES}. Plain SFT has no gates: its gradient is ∂L/∂Δ where every gate is open.
    """
    worst, made = {}, ways(net, set_density(carrier, 1.0))
    for density in DENSITIES:
        set_density(carrier, density)
        taken = {}
        for name, way in made.items():
            if name != "plain SFT" or density == 1:
                loss = torch.tensor(step(way, ids, mask))
                taken[name] = [loss, *(p.grad for p in way[2])]
        loss, gates, *deltas = taken.pop("LCDD")
        for name, theirs in taken.items():
            ours = [loss, *deltas] if name == "plain SFT" else [loss, gates, *deltas]
            far = [(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
            worst[name] = float(torch.tensor([worst.get(name, 0.0), *far]).max())  # keeps a NaN
    return worst


# ---- time and memory

def now():
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternated(functions, s, longer=1, clock=now):
    """Run {name: function}, warm already, in rounds, there and back: {name: seconds of each}."""
    times = {name: [] for name in functions}
    order, rounds, end = list(functions), 0, now() + longer * s.seconds
    while rounds < s.least or now() < end:
        for name in order:
            start = clock()
            functions[name]()
            times[name].append(clock() - start)
        order.reverse()
        rounds += 1
    return times


def medians(times):
    """{name: median seconds} of what alternated() measured."""
    return {name: statistics.median(own) for name, own in times.items()}


def ratios_to(first, times):
    """{name: median over rounds of the ratio to `first` within a round}."""
    return {name: statistics.median(a / b for a, b in zip(own, times[first]))
            for name, own in times.items()}


def paired(functions, s, longer=1):
    """
    Run {name: function} in rounds, there and back. Returns {name: median seconds} and
    {name: median of the ratios to the first}.
    """
    for f in functions.values():
        f()  # warm-up
    times = alternated(functions, s, longer)
    return medians(times), ratios_to(next(iter(functions)), times)


class Live(TorchDispatchMode):
    """
    Counts the bytes of all tensors that operations make, until they are freed: what an
    allocator's peak is on a GPU.
    """

    def __init__(self, known=()):
        super().__init__()
        # `known` tensors count as nothing: an operation in place returns its argument
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.count(t.untyped_storage())
        return out

    def count(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, storage._cdata)

    def freed(self, key):
        self.now -= self.sizes.pop(key)


def memory(way, ids, mask, chunk=None):
    """
    Peak bytes of one step, weights and gradients included: the allocator's on a GPU, of all live
    tensors on a CPU.
    """
    net, _, trained = way
    for p in trained:
        p.grad = None
    parameters = {*net.parameters(), *trained}
    weights = sum(p.nbytes for p in parameters)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - weights
        step(way, ids, mask, chunk)
        return torch.cuda.max_memory_allocated() - others
    with Live(parameters) as live:
        step(way, ids, mask, chunk)
    return weights + live.peak


# ---- the figures

def table(title, header, rows):
    cells = [[str(cell) for cell in row] for row in rows]
    print(f"\n## {title}\n\n" + markdown(header, cells), flush=True)


def bench_step(s, device):
    """1. An LCDD step against plain SFT and the slow definitions."""
    net = random_net(replace(s.config, num_hidden_layers=2), device, torch.float32)
    small = random_batch(s.config, 1, 64, 8, device)
    differ = disagreement(net, random_carrier(net), *small)
    assert all(d < 1e-4 for d in differ.values()), f"the baselines do not compute the same: {differ}"

    net = random_net(s.config, device, s.dtype)
    carrier = random_carrier(net)
    ids, mask = random_batch(s.config, *s.batch, device)
    made = ways(net, carrier)
    _, ours, *slow = made
    cases = [("plain SFT", 1.0)]
    cases += [(ours, density) for density in DENSITIES]
    for name in slow:
        cases += [(name, density) for density in s.slow_at]
    functions = {}
    for name, density in cases:
        functions[name, density] = partial(step_at, density, carrier, made[name], ids, mask)
    seconds, ratio = paired(functions, s, longer=10)

    plain = seconds["plain SFT", 1.0]
    rows, ratios = [], {}
    for name in (ours, *slow):
        ratios[name] = {str(d): ratio[name, d] for d in DENSITIES if (name, d) in ratio}
        cells = [f"{ratio[name, d]:.3f}" if (name, d) in ratio else "" for d in DENSITIES]
        rows.append([name, *cells])
    targets = [f"≤ {s.targets[d]:.2f}" if d in s.targets else "" for d in DENSITIES]
    rows.append(["target for LCDD", *targets])
    table(f"1. A step, forward and backward, as a multiple of plain SFT's {plain:.3f} s",
          ["gates open", *(f"{density:.0%}" for density in DENSITIES)], rows)
    n, length, supervised = s.batch
    print(f"\n{n} × {length} tokens, {supervised} of each row in the loss; {shape(s.config)}; base "
          f"{s.dtype}, deltas fp32. Loss and gradients agree with the baselines' to "
          f"{max(differ.values()):.0e} (fp32, two layers). The slow ways cost the same at every "
          "density.")
    return {"sft_seconds": plain, "disagreement": differ, "ratio": ratios}


def bench_memory(s, device):
    """2. Memory of an LCDD step against literal Eq. 1, and of the head where nobody looks."""
    net = random_net(s.config, device, s.dtype)
    carrier = random_carrier(net, 0.2)
    ids, mask = random_batch(s.config, *s.batch, device)
    trained = list(carrier.parameters())
    compared = {
        "LCDD": (net, carrier, trained),
        "literal Eq. 1": (net, Slow(carrier, literal), trained),
    }
    cases = {
        "head where the loss is": (mask, None),
        "head on every token at once": (torch.ones_like(mask), mask.numel()),
    }
    found = {}
    for how, (where, chunk) in cases.items():
        for who, way in compared.items():
            found[f"{who}, {how}"] = memory(way, ids, where, chunk)
    kind = "peak of the allocator" if ids.is_cuda else "peak of all live tensors"
    first = found["LCDD, head where the loss is"]
    table(f"2. Memory of the same step, 20 % open: {kind}, weights and gradients included "
          "(target at Qwen3-0.6B's shape: ≤ 0.60 of Eq. 1)",
          ["step", "GB", "first row / this"],
          [[name, f"{n / 1e9:.3f}", f"{first / n:.2f}"] for name, n in found.items()])
    return {"kind": kind, "bytes": found}


def deepseek_peak(layers, device):
    """Peak bytes of an optimizer step at DeepSeek-8B's shape with so many layers."""
    net = random_net(replace(DEEPSEEK, num_hidden_layers=layers), device, torch.bfloat16)
    net.checkpoint = True
    carrier = random_carrier(net, 1.0, torch.bfloat16)
    parameters = {*net.parameters(), *carrier.parameters()}
    optimizer = training.adamw(carrier, 2e-5)
    gates = torch.optim.SGD([carrier.logits], lr=0.1)

    def whole_step():
        """AdamW's state made, then forward, backward, penalty, clipping and both optimizers."""
        for p in carrier.delta.parameters():  # a step on nothing makes AdamW's state
            p.grad = torch.zeros_like(p)
        optimizer.step()
        way = (net, carrier, list(carrier.parameters()))
        step(way, *random_batch(DEEPSEEK, 8, 512, 128, device))
        (0.01 * penalty(carrier.logits)).backward()
        training.clip_gradients(carrier, 1.0)
        optimizer.step()
        gates.step()

    if device == "cpu":
        with Live(parameters) as live:
            whole_step()
        return sum(p.nbytes for p in parameters) + live.peak
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole_step()
    return torch.cuda.max_memory_allocated()


def deepseek_memory(device):
    """
    2. Peak of a whole optimizer step at DeepSeek-8B's shape: 8 × 512 tokens at once, layers
    recomputed, every gate open. On a CPU, whose memory would not do: the live tensors with one
    layer and with two, continued to all of them in a straight line.
    """
    depth = DEEPSEEK.num_hidden_layers
    if device == "cpu":
        one, two = deepseek_peak(1, device), deepseek_peak(2, device)
        found = one + (depth - 1) * (two - one)
        how = f"counted with one layer, {one / 1e9:.1f} GB, and two, {two / 1e9:.1f}"
    else:
        found, how = deepseek_peak(depth, device), "peak of the allocator"
    print(f"\nLCDD step with AdamW at {shape(DEEPSEEK)}; 8 × 512 tokens in one piece, "
          f"checkpointing; base, deltas and AdamW's state bf16: {found / 1e9:.1f} GB "
          f"(target ≤ 80; {how}).", flush=True)
    return found


def fit(way, ids, mask, steps):
    """{moved, first_loss, loss} of AdamW steps at 2e-5; moved: share of entries that changed."""
    trained = way[2]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0)
    losses = [step(way, ids, mask)]
    for _ in range(steps):
        optimizer.step()
        losses.append(step(way, ids, mask))
    moved = sum(int((p != b).sum()) for p, b in zip(trained, before))
    entries = sum(p.numel() for p in before)
    return {"moved": moved / entries, "first_loss": losses[0], "loss": losses[-1]}


def bench_precision(s, device):
    """3. Which number format keeps AdamW's steps of 2e-5, and the loss after fitting a response."""
    exact = random_net(SMALL, device, torch.float32)
    exact.model.norm.weight.fill_(4.0)     # wide logits, as trained models have
    rounded = copy.deepcopy(exact).bfloat16()
    ids, mask = random_batch(SMALL, 8, 24, 8, device)
    ids = torch.where(mask, ids[:1], ids)  # the same response everywhere
    cases = {
        "fp32 Δ beside an fp32 base": (exact, torch.float32),
        "fp32 Δ beside a bf16 base": (rounded, torch.float32),
        "bf16 Δ beside a bf16 base": (rounded, torch.bfloat16),
        "bf16 weights themselves": (rounded, None),
    }
    found, rows = {}, []
    for name, (net, dtype) in cases.items():
        carrier = Carrier(SMALL, dtype or torch.float32, device)
        way = net, carrier, list(carrier.delta.parameters())
        if dtype is None:
            way = ways(net, carrier)["plain SFT"]
        f = found[name] = fit(way, ids, mask, s.steps)
        rows.append([name, f"{f['moved']:.1%}", f"{f['first_loss']:.3f}", f"{f['loss']:.3f}"])
    table(f"3. Precision: {s.steps} AdamW steps at lr 2e-5 from weights N(0, 0.02)",
          ["trained", "entries that moved", "loss before", "after"], rows)
    return found


def model_and_prompts(s, device, seed):
    """The embedded model with its own prompts on a CPU, else a random one with random prompts."""
    folder = locate(EMBEDDED)
    if device == "cpu" and (folder / "fixed.jsonl").is_file():
        chat = chat_of(folder)
        splits, _ = prepare(chat, "fixed", None, seed, {})
        net = model.load(folder)
        return net, [chat.prompt(x.prompt) for x in splits["test"][:s.prompts]]
    net = random_net(s.grow if device == "cpu" else s.config, device, s.dtype)
    lengths = [8 + i % 8 for i in range(s.prompts)]
    return net, [torch.randint(net.config.vocab_size, (n,)).tolist() for n in lengths]


def bench_batching(s, device, seed):
    """4. A trigger step, and the four-condition evaluation: all prompts together, or one by one."""
    net, prompts = model_and_prompts(s, device, seed)
    carrier = random_carrier(net, 0.2)
    merged, every = carrier.merge(net), carrier.with_gates(True).merge(net)
    tau = net.embedding[:16].float().clone().requires_grad_(True)
    rows = list(range(len(prompts[:16])))
    aims, channels = eraser.base_targets(net, prompts[:16]), eraser.channels(carrier, "circuit")
    variance = aims.stream.float().var(1)
    setting = SimpleNamespace(positions="response", match="prompt", alpha=0.7, beta=0.1)
    conditions = {
        "base": (None, None),
        "sft": (every, None),
        "lcdd": (merged, None),
        "trig": (merged, tau.detach()),
    }
    pairs = [("sft", "lcdd"), ("sft", "trig"), ("base", "trig")]

    def trigger(size):
        """∂L/∂τ over all prompts (Eq. 6), `size` of them at a time."""
        tau.grad = None
        for i in range(0, len(rows), size):
            piece = rows[i:i + size]
            loss = eraser.trigger_loss(net, merged, tau, aims, piece, channels, setting, 1.0,
                                       variance)[0]
            (loss * size / len(rows)).backward()
        return tau.grad

    def evaluation(size):
        """The answers of all conditions, `size` prompts at a time; the KLs are measured as well."""
        answers, together = {}, []
        for name, (c, t) in conditions.items():
            answers[name] = net.generate(prompts, s.new_tokens, carrier=c, trigger=t,
                                         batch_size=size)
            together += answers[name]
        evaluate.kl_divergences(net, prompts, answers["sft"], conditions, pairs, size)
        return together

    def times_as_fast(f, n):
        """Seconds of one prompt at a time over those of n."""
        return paired({"together": partial(f, n), "alone": partial(f, 1)}, s)[1]["alone"]

    differ = float((trigger(len(rows)) - trigger(1)).norm() / tau.grad.norm())
    both = zip(evaluation(len(prompts)), evaluation(1))
    same = statistics.mean(a == b for a, b in both)
    gain = {
        "trigger": times_as_fast(trigger, len(rows)),
        "evaluation": times_as_fast(evaluation, len(prompts)),
    }
    table("4. Together against one by one (target: ≥ 8, for the trigger on a GPU): "
          + shape(net.config),
          ["", "prompts", "times as fast", "the same?"], [
              ["trigger step", len(rows), f"{gain['trigger']:.1f}",
               f"gradients differ by {differ:.0e}"],
              [f"four conditions × {s.new_tokens} new tokens, three KLs", len(prompts),
               f"{gain['evaluation']:.1f}", f"{same:.1%} of the answers"]])
    return {"speedup": gain, "gradient_differs": differ, "same_answers": same}


def wider(config, factor):
    """The config with `factor` times its width and heads."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return replace(config, **{name: int(getattr(config, name) * factor) for name in names})


def deeper(config, factor):
    """The config with `factor` times its layers."""
    return replace(config, num_hidden_layers=int(config.num_hidden_layers * factor))


def growth_curves(g, rows, length):
    """{against: (expected exponents, {value: (config, rows, density, shared prefix)})}."""
    tokens = {rows * length * f: (g, rows * f, 0.2, 0) for f in (1, 2, 4)}
    shared = {}
    for prefix in (0, length // 4, length // 2):
        shared[prefix + 4 * rows * (length - prefix)] = g, 4 * rows, 0.2, prefix
    deep = [deeper(g, f) for f in (0.5, 1, 2)]
    wide = [wider(g, f) for f in (0.5, 1, 2)]
    two_layers = replace(wider(g, 2), num_hidden_layers=2)
    return {
        "tokens": ("1", tokens),
        "tokens that a shared prefix leaves": ("1", shared),
        "layers": ("1", {c.num_hidden_layers: (c, rows, 0.2, 0) for c in deep}),
        "width": ("products and weights 2, else 1", {c.hidden_size: (c, rows, 0.2, 0) for c in wide}),
        "density": ("products 0.16, else 0", {d: (two_layers, rows, d, 0) for d in (0.1, 0.2, 0.4, 0.8)}),
    }


def exponent(values, numbers):
    """Of the power law through the points, by least squares of their logarithms."""
    return float(np.polyfit(np.log(values), np.log(numbers), 1)[0])


def bench_growth(s, device):
    """5. Time and memory of an LCDD step against tokens, shared prefix, layers, width and density."""
    rows, length, supervised = s.grow_batch
    found, lines = {}, []
    for name, (expected, points) in growth_curves(s.grow, rows, length).items():
        steps, sizes = {}, []
        for value, (config, n, density, prefix) in points.items():
            net = random_net(config, device, s.dtype)
            carrier = random_carrier(net, density)
            way = net, carrier, list(carrier.parameters())
            batch = random_batch(config, n, length, supervised, device, prefix)
            steps[value] = partial(step, way, *batch)
            sizes.append(memory(way, *batch))
        values, seconds = list(points), list(paired(steps, s)[0].values())
        f = found[name] = {
            "values": values,
            "bytes": sizes,
            "seconds": seconds,
            "seconds_exponent": exponent(values, seconds),
            "bytes_exponent": exponent(values, sizes),
        }
        lines.append([name, ", ".join(map(str, values)), ", ".join(f"{t:.3f}" for t in seconds),
                      f"{f['seconds_exponent']:.2f}", f"{f['bytes_exponent']:.2f}", expected])
    table(f"5. Growth of an LCDD step, from {rows} × {length} tokens, {shape(s.grow)}, "
          "20 % of the gates open",
          ["against", "values", "seconds", "exponent of time", "of memory", "expected"], lines)
    return found


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--model", help="only beside transformers and peft, on this checkpoint (a folder or a hub id)")
    a("--data", help="the prompts for that; default: fixed.jsonl beside the checkpoint")
    a("--rounds", type=int, default=3, help="rounds of it at least (3)")
    a("--device", default="cpu", help="cpu or cuda (cpu)")
    a("--seed", type=int, default=0, help="of weights and tokens (0)")
    a("--memory", action="store_true",
      help="only the memory of a step, at the shapes of Qwen3-0.6B and DeepSeek-8B "
           "(on a CPU: 21 GB, five minutes)")
    a("--quick", action="store_true",
      help="tiny sizes: shows that everything runs; its figures mean nothing")
    o = p.parse_args(argv)
    check_device(o.device)
    check_numbers(o)
    return o


def only_memory(o):
    """Part 2 at the paper's shapes."""
    found = bench_memory(SETTINGS["quick" if o.quick else "cuda"], o.device)
    if not o.quick:
        found["deepseek_bytes"] = deepseek_memory(o.device)
    return found


def everything(o):
    """All five parts; DeepSeek-8B's step last, for it may not fit."""
    cuda = o.device.startswith("cuda")
    s = SETTINGS["quick" if o.quick else "cuda" if cuda else "cpu"]
    found = {
        "step": bench_step(s, o.device),
        "memory": bench_memory(s, o.device),
        "precision": bench_precision(s, o.device),
        "batching": bench_batching(s, o.device, o.seed),
        "growth": bench_growth(s, o.device),
    }
    if cuda and not o.quick:
        found["memory"]["deepseek_bytes"] = deepseek_memory(o.device)
    return found


def main(argv=None):
    o, start = options(argv), time.perf_counter()
    torch.manual_seed(o.seed)
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if o.device.startswith("cuda"):
        machine = torch.cuda.get_device_name()
    result = {"machine": machine, "torch": torch.__version__, "device": o.device,
              "quick": o.quick, "seed": o.seed}
    print("# " + ", ".join(f"{k} {v}" for k, v in result.items()))
    if o.model:
        from lab import peers  # it measures by what stands here
        result["peers"] = peers.measure(o)
    elif o.memory:
        result["memory"] = only_memory(o)
    else:
        result |= everything(o)
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(f"\n{duration(result['seconds'])} in all.\n\n{json.dumps(result)}")


if __name__ == "__main__":
    cli(main)
