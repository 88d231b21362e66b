"""How fast, how large, how precise: the figures of the README's speed table, from one command.

    python -m lab.bench                  two minutes on two CPU cores
    python -m lab.bench --device cuda    Qwen3-0.6B's shape in bf16, and a step at DeepSeek-8B's; about ten minutes
    python -m lab.bench --memory         only a step's memory, at Qwen3-0.6B's and DeepSeek-8B's shapes, also on a CPU (21 GB, five minutes)

The baselines, plain SFT of the same model and carrier.py's slow definitions, are checked to give the same loss and gradients
before they are timed. A ratio is the median over rounds, A B C, C B A, …, of the ratio within a round. Prints one JSON line last.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import time
import weakref
from dataclasses import replace
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
import lcdd
import model
from carrier import Carrier, Heaviside, gated_activations, masked_weight, penalty
from model import Config
from run import EMBEDDED, check_device, check_numbers, cli, locate, prepare

DENSITIES = (1.0, 0.5, 0.2, 0.1)                         # share of gates open
QWEN = Config(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, tie_word_embeddings=True, qk_norm=True)        # Qwen3-0.6B
DEEPSEEK = Config(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, rope_llama3=(8.0, 1.0, 4.0, 8192.0))      # R1-Distill-Llama-8B
SMALL = Config(512, 256, 768, 4, 4, 4, 64)               # for precision, and where growth starts on the CPU
shape = lambda c: (f"{c.num_hidden_layers} layers, d {c.hidden_size}, d_ff {c.intermediate_size}, {c.num_attention_heads}/{c.num_key_value_heads} "
                   f"heads × {c.head_dim}, vocabulary {c.vocab_size}")
SETTINGS = {  # batch: rows × tokens, and how many of a row are in the loss; a comparison takes `least` rounds, and `seconds` (the step ten times that)
    "cpu": SimpleNamespace(config=Config(1024, 1024, 3072, 2, 16, 16, 64), batch=(8, 256, 128), dtype=torch.float32, slow_at=(0.2,), grow=SMALL,
                           grow_batch=(4, 128, 32), steps=60, prompts=96, new_tokens=16, seconds=2, least=3, targets={1.0: 1.05, 0.2: 0.88, 0.1: 0.82}),
    "cuda": SimpleNamespace(config=QWEN, batch=(8, 512, 64), dtype=torch.bfloat16, slow_at=DENSITIES, grow=replace(QWEN, vocab_size=8192),
                            grow_batch=(16, 256, 64), steps=300, prompts=32, new_tokens=16, seconds=5, least=3, targets={1.0: 1.10, 0.2: 0.90}),
    "quick": SimpleNamespace(config=Config(128, 64, 96, 2, 4, 2, 16, qk_norm=True), batch=(2, 24, 8), dtype=torch.float32, slow_at=(0.2,),
                             grow=Config(64, 64, 96, 2, 4, 4, 16), grow_batch=(1, 16, 4), steps=2, prompts=3, new_tokens=2, seconds=0, least=1, targets={}),
}


def random_net(config, device, dtype):
    """A Llama with N(0, 0.02) weights and norms of 1, frozen."""
    with torch.device("meta"):
        net = model.Llama(config).to(dtype)
    net.to_empty(device=device).requires_grad_(False).eval()
    for p in net.parameters():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 0.02)
    return net


def random_carrier(net, density=1.0, dtype=torch.float32):
    """Deltas of a tenth of the weights' size, `density` of the gates open."""
    c = Carrier(net.config, dtype, net.device)
    for p in c.delta.parameters():
        p.data.normal_(0, 0.002)
    return set_density(c, density)


def set_density(c, density):
    c.logits.data.copy_(1.5 * (torch.rand(c.logits.shape, generator=torch.Generator().manual_seed(0)) < density) - 0.75)
    return c


def random_batch(config, rows, length, supervised, device):
    """ids and mask (rows, length+1): `length` tokens are computed, the last `supervised` of each row are in the loss."""
    ids = torch.randint(config.vocab_size, (rows, length + 1), device=device)
    return ids, (torch.arange(length + 1, device=device) > length - supervised).expand(rows, -1)


class Slow:
    """A Carrier by one of the slow definitions under autograd: `rule` is literal or activations."""

    def __init__(self, carrier, rule):
        self.carrier, self.rule = carrier, rule

    def bind(self, net, scale=None):
        self.gates = self.carrier.split(Heaviside.apply(self.carrier.logits))
        return lambda l, name, x: self.rule(x, net.projections[l][name], *self.parts(l, name))

    def parts(self, l, name):
        delta = self.carrier.delta[l][name]
        return delta, *(g.to(delta.dtype) for g in self.carrier.vectors(self.gates[l], name))


literal = lambda x, base, delta, row, col: F.linear(x, masked_weight(base.weight, delta, row, col).to(x.dtype), base.bias)
activations = lambda x, base, delta, row, col: gated_activations(x, base.weight, delta, row.to(x.dtype), col.to(x.dtype), base.bias)


class Eq1(nn.Module):
    """Eq. 1 as torch.nn.utils.parametrize wants it: weight → weight."""

    def __init__(self, *where):
        super().__init__()
        self.where = where

    def forward(self, weight):
        slow, l, name = self.where
        return masked_weight(weight, *slow.parts(l, name)).to(weight.dtype)


def ways(net, carrier):
    """{name: (net, carrier, parameters that get gradients)}: one model, five ways. Plain SFT has W_b + (r ⊗ c) ⊙ Δ, gates as
    they stand now, for ordinary weights. With parametrize, too, the gates are built once a forward pass."""
    sft, eq1, slow = copy.deepcopy(net), copy.deepcopy(net), Slow(carrier, literal)
    merged, weights, ours = carrier.merge(net).weights, [], list(carrier.parameters())
    slow.bind(eq1)
    eq1.model.layers[0].register_forward_pre_hook(lambda *_: slow.bind(eq1) and None)
    for l, layer in enumerate(carrier.delta):
        for name in layer:
            weights.append(nn.Parameter(merged[l][name].clone()))
            sft.projections[l][name].weight = weights[-1]
            parametrize.register_parametrization(eq1.projections[l][name], "weight", Eq1(slow, l, name))
    return {"plain SFT": (sft, None, weights), "LCDD": (net, carrier, ours), "literal Eq. 1": (net, slow, ours),
            "literal Eq. 1, parametrize": (eq1, None, ours), "gated activations": (net, Slow(carrier, activations), ours)}


def step(way, ids, mask, chunk=1024):
    """Forward and backward of one batch; the loss."""
    net, carrier, trained = way
    for p in trained:
        p.grad = None
    loss = lcdd.task_loss(net, carrier, ids, mask, chunk=chunk) / mask[:, 1:].sum()
    loss.backward()
    return float(loss.detach())


def disagreement(net, carrier, ids, mask):
    """{baseline: largest relative difference from LCDD in the loss and in any gradient, over DENSITIES}. Plain SFT has no
    gates: its gradient is ∂L/∂Δ where every gate is open."""
    worst, made = {}, ways(net, set_density(carrier, 1.0))
    for density in DENSITIES:
        set_density(carrier, density)
        taken = {k: [torch.tensor(step(way, ids, mask)), *(p.grad for p in way[2])] for k, way in made.items() if k != "plain SFT" or density == 1}
        loss, gates, *deltas = taken.pop("LCDD")
        for name, theirs in taken.items():
            ours = [loss, *deltas] if name == "plain SFT" else [loss, gates, *deltas]
            far = [(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
            worst[name] = float(torch.tensor([worst.get(name, 0.0), *far]).max())                  # torch's max keeps a NaN
    return worst


def paired(functions, s, longer=1):
    """Run {name: function} in rounds, there and back. {name: median seconds}, {name: median of ratios to the first}."""
    now = lambda: (torch.cuda.is_available() and torch.cuda.synchronize(), time.perf_counter())[1]
    for f in functions.values():
        f()                                                                               # warm-up
    times, rounds = {name: [] for name in functions}, 0
    end = now() + longer * s.seconds
    while rounds < s.least or now() < end:
        for name in list(functions)[::-1 if rounds % 2 else 1]:
            start = now()
            functions[name]()
            times[name].append(now() - start)
        rounds += 1
    return ({name: statistics.median(t) for name, t in times.items()},
            {name: statistics.median(a / b for a, b in zip(t, times[next(iter(times))])) for name, t in times.items()})


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, until they are freed: what an allocator's peak is on a GPU."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_iter(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key)


def memory(way, ids, mask, chunk=1024):
    """Peak bytes of one step, weights and gradients included: the allocator's on a GPU, of all live tensors on a CPU."""
    for p in way[2]:
        p.grad = None
    parameters = {*way[0].parameters(), *way[2]}
    weights = sum(p.nbytes for p in parameters)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - weights
        step(way, ids, mask, chunk)
        return torch.cuda.max_memory_allocated() - others
    with Live() as live:
        live.sizes = {p.untyped_storage()._cdata: 0 for p in parameters}         # an operation in place returns its argument
        step(way, ids, mask, chunk)
    return weights + live.peak


def table(title, head, rows):
    print(f"\n## {title}\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)), flush=True)


def bench_step(s, device):
    """1. An LCDD step against plain SFT and the slow definitions."""
    net = random_net(replace(s.config, num_hidden_layers=2), device, torch.float32)
    differ = disagreement(net, random_carrier(net), *random_batch(s.config, 1, 64, 8, device))
    assert all(d < 1e-4 for d in differ.values()), f"the baselines do not compute the same: {differ}"
    net = random_net(s.config, device, s.dtype)
    carrier, (ids, mask) = random_carrier(net), random_batch(s.config, *s.batch, device)
    made = ways(net, carrier)
    at = lambda name, density: lambda: step((set_density(carrier, density), made[name])[1], ids, mask)
    names, cases = [*made][1:], [("plain SFT", 1.0), *(("LCDD", r) for r in DENSITIES), *((name, r) for name in [*made][2:] for r in s.slow_at)]
    seconds, ratio = paired({case: at(*case) for case in cases}, s, longer=10)
    table(f"1. A step, forward and backward, as a multiple of plain SFT's {seconds['plain SFT', 1.0]:.3f} s", ["gates open", *(f"{r:.0%}" for r in DENSITIES)],
          [[name, *(f"{ratio[name, r]:.3f}" if (name, r) in ratio else "" for r in DENSITIES)] for name in names]
          + [["target for LCDD", *(f"≤ {s.targets[r]:.2f}" if r in s.targets else "" for r in DENSITIES)]])
    print(f"\n{s.batch[0]} × {s.batch[1]} tokens, {s.batch[2]} of each row in the loss; {shape(s.config)}; base {s.dtype}, deltas fp32. Loss and gradients "
          f"agree with the baselines' to {max(differ.values()):.0e} (fp32, two layers). The slow ways cost the same at every density.")
    return {"sft_seconds": seconds["plain SFT", 1.0], "disagreement": differ,
            "ratio": {name: {str(r): ratio[name, r] for r in DENSITIES if (name, r) in ratio} for name in names}}


def bench_memory(s, device):
    """2. Memory of an LCDD step against the literal Eq. 1, and what the head costs where nobody looks."""
    net = random_net(s.config, device, s.dtype)
    carrier, (ids, mask) = random_carrier(net, 0.2), random_batch(s.config, *s.batch, device)
    ours, slow = ((net, c, list(carrier.parameters())) for c in (carrier, Slow(carrier, literal)))
    cases = {"head where the loss is": (mask, 1024), "head on every token at once": (torch.ones_like(mask), mask.numel())}
    found = {f"{who}, {how}": memory(way, ids, *case) for how, case in cases.items() for who, way in (("LCDD", ours), ("literal Eq. 1", slow))}
    kind = "peak of the allocator" if ids.is_cuda else "peak of all live tensors"
    table(f"2. Memory of the same step, 20 % open: {kind}, weights and gradients included (target at Qwen3-0.6B's shape: ≤ 0.60 of Eq. 1)",
          ["step", "GB", "first row / this"], [[name, f"{n / 1e9:.3f}", f"{found['LCDD, head where the loss is'] / n:.2f}"] for name, n in found.items()])
    return {"kind": kind, "bytes": found}


def deepseek_memory(device):
    """2. Peak of a whole optimizer step at DeepSeek-8B's shape: 8 × 512 tokens at once, layers recomputed, every gate open.
    On a CPU, whose memory would not do: the live tensors with one layer and with two, continued to all of them in a straight line."""
    def peak(layers):
        net = random_net(replace(DEEPSEEK, num_hidden_layers=layers), device, torch.bfloat16)
        net.checkpoint, carrier = True, random_carrier(net, 1.0, torch.bfloat16)
        way, optimizer, gates = (net, carrier, list(carrier.parameters())), lcdd.adamw(carrier, 2e-5), torch.optim.SGD([carrier.logits], lr=0.1)
        parameters = {*net.parameters(), *carrier.parameters()}
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with Live() if device == "cpu" else contextlib.nullcontext() as live:
            if live:
                live.sizes = {p.untyped_storage()._cdata: 0 for p in parameters}
            for p in carrier.delta.parameters():                                          # a step on nothing makes AdamW's state
                p.grad = torch.zeros_like(p)
            optimizer.step()
            step(way, *random_batch(DEEPSEEK, 8, 512, 128, device))
            (0.01 * penalty(carrier.logits)).backward()
            lcdd.clip_gradients(carrier, 1.0)
            optimizer.step()
            gates.step()
        return sum(p.nbytes for p in parameters) + live.peak if live else torch.cuda.max_memory_allocated()

    depth = DEEPSEEK.num_hidden_layers
    if device == "cpu":
        one, two = peak(1), peak(2)
        found, how = one + (depth - 1) * (two - one), f"counted with one layer, {one / 1e9:.1f} GB, and two, {two / 1e9:.1f}"
    else:
        found, how = peak(depth), "peak of the allocator"
    print(f"\nLCDD step with AdamW at {shape(DEEPSEEK)}; 8 × 512 tokens in one piece, checkpointing; base, deltas and AdamW's state bf16: "
          f"{found / 1e9:.1f} GB (target ≤ 80; {how}).", flush=True)
    return found


def bench_precision(s, device):
    """3. Which number format keeps AdamW's steps of 2e-5: entries that moved, and the loss after fitting one response."""
    exact = random_net(SMALL, device, torch.float32)
    exact.model.norm.weight.fill_(4.0)                                                    # wide logits, as trained models have
    rounded, found = copy.deepcopy(exact).bfloat16(), {}
    ids, mask = random_batch(SMALL, 8, 24, 8, device)
    ids = torch.where(mask, ids[:1], ids)                                                 # the same response everywhere
    for name, net, dtype in (("fp32 Δ beside an fp32 base", exact, torch.float32), ("fp32 Δ beside a bf16 base", rounded, torch.float32),
                             ("bf16 Δ beside a bf16 base", rounded, torch.bfloat16), ("bf16 weights themselves", rounded, None)):
        carrier = Carrier(SMALL, dtype or torch.float32, device)
        way = ways(net, carrier)["plain SFT"] if dtype is None else (net, carrier, list(carrier.delta.parameters()))
        before, optimizer = [p.detach().clone() for p in way[2]], torch.optim.AdamW(way[2], lr=2e-5, weight_decay=0.0)
        losses = [step(way, ids, mask)]
        for _ in range(s.steps):
            optimizer.step()
            losses.append(step(way, ids, mask))
        moved = sum(int((p != b).sum()) for p, b in zip(way[2], before)) / sum(p.numel() for p in before)
        found[name] = {"moved": moved, "first_loss": losses[0], "loss": losses[-1]}
    table(f"3. Precision: {s.steps} AdamW steps at lr 2e-5 from weights N(0, 0.02)", ["trained", "entries that moved", "loss before", "after"],
          [[name, f"{f['moved']:.1%}", f"{f['first_loss']:.3f}", f"{f['loss']:.3f}"] for name, f in found.items()])
    return found


def bench_batching(s, device, seed):
    """4. A trigger step, and the four-condition evaluation: all prompts together against one by one."""
    folder = locate(EMBEDDED)
    if device == "cpu" and (folder / "fixed.jsonl").is_file():
        chat, splits, _ = prepare(folder, "fixed", None, seed, {})
        net, prompts = model.load(folder), [chat.prompt(x.prompt) for x in splits["test"][:s.prompts]]
    else:
        net = random_net(s.grow if device == "cpu" else s.config, device, s.dtype)
        prompts = [torch.randint(net.config.vocab_size, (8 + i % 8,)).tolist() for i in range(s.prompts)]
    carrier, rows = random_carrier(net, 0.2), list(range(len(prompts[:16])))
    merged, tau = carrier.merge(net), net.embedding[:16].float().clone().requires_grad_(True)
    aims, channels = eraser.base_targets(net, prompts[:16]), eraser.channels(carrier, "circuit")
    setting, variance = SimpleNamespace(positions="response", match="prompt", alpha=0.7, beta=0.1), aims.stream.float().var(1)
    conditions = {"base": (None, None), "sft": (carrier.with_gates(True).merge(net), None), "lcdd": (merged, None), "trig": (merged, tau.detach())}

    def trigger(size):
        tau.grad = None
        for i in range(0, len(rows), size):
            loss = eraser.trigger_loss(net, merged, tau, aims, rows[i:i + size], channels, setting, 1.0, variance)[0]
            (loss * size / len(rows)).backward()
        return tau.grad

    def evaluation(size):
        answers = {k: net.generate(prompts, s.new_tokens, carrier=c, trigger=t, batch_size=size) for k, (c, t) in conditions.items()}
        evaluate.kl_divergences(net, prompts, answers["sft"], conditions, [("sft", "lcdd"), ("sft", "trig"), ("base", "trig")], size)
        return [a for condition in answers.values() for a in condition]
    differ = float((trigger(len(rows)) - trigger(1)).norm() / tau.grad.norm())
    same = statistics.mean(a == b for a, b in zip(evaluation(len(prompts)), evaluation(1)))
    gain = {f.__name__: paired({"together": lambda: f(n), "alone": lambda: f(1)}, s)[1]["alone"] for f, n in ((trigger, len(rows)), (evaluation, len(prompts)))}
    table(f"4. Together against one by one (target: ≥ 8, for the trigger on a GPU): {shape(net.config)}", ["", "prompts", "times as fast", "the same?"], [
        ["trigger step", len(rows), f"{gain['trigger']:.1f}", f"gradients differ by {differ:.0e}"],
        [f"four conditions × {s.new_tokens} new tokens, three KLs", len(prompts), f"{gain['evaluation']:.1f}", f"{same:.1%} of the answers"]])
    return {"speedup": gain, "gradient_differs": differ, "same_answers": same}


def bench_growth(s, device):
    """5. Time and memory of an LCDD step against tokens, layers, width and density: exponents of power laws."""
    g, (rows, length, supervised) = s.grow, s.grow_batch
    wide = lambda f: replace(g, **{k: int(getattr(g, k) * f) for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")})
    deep = lambda f: replace(g, num_hidden_layers=int(g.num_hidden_layers * f))
    curves = {  # against → expected exponents, {value: (config, rows, density)}
        "tokens": ("1", {rows * length * f: (g, rows * f, 0.2) for f in (1, 2, 4)}),
        "layers": ("1", {deep(f).num_hidden_layers: (deep(f), rows, 0.2) for f in (0.5, 1, 2)}),
        "width": ("products and weights 2, else 1", {wide(f).hidden_size: (wide(f), rows, 0.2) for f in (0.5, 1, 2)}),
        "density": ("products 0.16, else 0", {r: (replace(wide(2), num_hidden_layers=2), rows, r) for r in (0.1, 0.2, 0.4, 0.8)})}
    found = {}
    for name, (_, points) in curves.items():
        made = {}
        for value, (config, n, density) in points.items():
            net = random_net(config, device, s.dtype)
            carrier = random_carrier(net, density)
            made[value] = (net, carrier, list(carrier.parameters())), *random_batch(config, n, length, supervised, device)
        f = found[name] = {"values": list(points), "bytes": [memory(*m) for m in made.values()],
                           "seconds": list(paired({v: lambda m=m: step(*m) for v, m in made.items()}, s)[0].values())}
        f |= {f"{k}_exponent": float(np.polyfit(np.log(f["values"]), np.log(f[k]), 1)[0]) for k in ("seconds", "bytes")}   # least squares
    table(f"5. Growth of an LCDD step, from {rows} × {length} tokens, {shape(g)}, 20 % of the gates open",
          ["against", "values", "seconds", "exponent of time", "of memory", "expected"],
          [[name, ", ".join(map(str, f["values"])), ", ".join(f"{t:.3f}" for t in f["seconds"]), f"{f['seconds_exponent']:.2f}", f"{f['bytes_exponent']:.2f}",
            curves[name][0]] for name, f in found.items()])
    return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    p.add_argument("--seed", type=int, default=0, help="of weights and tokens (0)")
    p.add_argument("--memory", action="store_true", help="only the memory of a step, at the shapes of Qwen3-0.6B and DeepSeek-8B (on a CPU: 21 GB, five minutes)")
    p.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs; its figures mean nothing")
    o = p.parse_args(argv)
    cuda = o.device.startswith("cuda")
    check_device(o.device)
    check_numbers(o)
    s, start = SETTINGS["quick" if o.quick else "cuda" if cuda else "cpu"], time.perf_counter()
    torch.manual_seed(o.seed)
    result = {"machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
              "torch": torch.__version__, "device": o.device, "quick": o.quick, "seed": o.seed}
    print("# " + ", ".join(f"{k} {v}" for k, v in result.items()))
    if o.memory:
        found = bench_memory(SETTINGS["quick" if o.quick else "cuda"], o.device)
        if not o.quick:
            found["deepseek_bytes"] = deepseek_memory(o.device)
        print(json.dumps(result | {"memory": found}))
        return
    result |= {"step": bench_step(s, o.device), "memory": bench_memory(s, o.device)}
    if cuda and not o.quick:
        result["memory"]["deepseek_bytes"] = deepseek_memory(o.device)
    result |= {"precision": bench_precision(s, o.device), "batching": bench_batching(s, o.device, o.seed), "growth": bench_growth(s, o.device)}
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(f"\n{result['seconds']:.0f} s in all.\n\n{json.dumps(result)}")


if __name__ == "__main__":
    cli(main)
