"""The carrier: weight deltas and binary gates beside a base model that is never changed.

    W = W_b + (r ⊗ c) ⊙ Δ          Eq. 1, 2: r gates the rows (outputs) of Δ, c its columns (inputs)

Shapes: L layers, d hidden size, d_q = heads·head_dim, d_kv = key/value heads·head_dim, f = d_ff; T tokens in all.
A carrier is handed to the forward pass (`net(ids, carrier=c)`). It comes in two states: `Carrier`, whose gates and
deltas train, and `Merged`, frozen weights for everything that only reads (generation, KL, the trigger).
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import copy
import functools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from files import COUNT, TEXT, InputError, check_fields, check_finite, digest, load_tensors, save_tensors

# Table 5: 8 gate vectors a layer, shared between projections; Δ of each projection has a row gate and a column gate.
GROUPS = ("attn_read", "attn_q", "attn_k", "attn_v", "attn_write", "ffn_read", "ffn_hidden", "ffn_write")
PROJECTIONS = {
    #  name      row gate      column gate
    "q_proj":    ("attn_q",     "attn_read"),
    "k_proj":    ("attn_k",     "attn_read"),
    "v_proj":    ("attn_v",     "attn_read"),
    "o_proj":    ("attn_write", "attn_v_wide"),  # o_proj reads the context, made of values: attn_v, repeated for GQA
    "gate_proj": ("ffn_hidden", "ffn_read"),
    "up_proj":   ("ffn_hidden", "ffn_read"),
    "down_proj": ("ffn_write",  "ffn_hidden"),
}
DENSE_BELOW = 1 << 13   # a Δ with fewer entries than this is not worth gathering open rows and columns for
FORMAT = 2              # of the packed carrier file
SHARE = ((int, float), 0, 1)
HEADER = {              # of that file
    "base": TEXT, "content": TEXT, "groups": {group: ((int,), 1, 1 << 24) for group in GROUPS},
    "gates": {"total": ((int,), 1, 2**53), "open": COUNT}, "sparsity": SHARE, "entries_off": SHARE}
LANES = 8               # gathered rows and columns are padded to a multiple of this: 16 bytes of bf16, what matrix units want


def group_sizes(config):
    """Length of each of the 8 gate vectors of a layer (Table 5)."""
    d, f = config.hidden_size, config.intermediate_size
    d_q, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return dict(zip(GROUPS, (d, d_q, d_kv, d_kv, d, d, f, d)))


# ---------------------------------------------------------------------------------------------------------------- gates

class Heaviside(torch.autograd.Function):
    """g = H(m): 1 if m > 0 else 0 (Eq. 26); backward ∂g/∂m ≈ σ(m)(1 − σ(m)) (Eq. 27)."""

    @staticmethod
    def forward(ctx, m):
        ctx.save_for_backward(m)
        return (m > 0).to(m.dtype)

    @staticmethod
    def backward(ctx, grad):
        s = torch.sigmoid(ctx.saved_tensors[0])
        return grad * s * (1 - s)


def penalty(logits):
    """Ω(m) = Σ σ(m) over all gates, a sum and not a mean (Eq. 3)."""
    return torch.sigmoid(logits).sum()


# ----------------------------------------------------------------------------------------------- the gated linear layer

def masked_weight(weight, delta, row, col):
    """The literal Eq. 1, W_b + (r ⊗ c) ⊙ Δ: the definition. weight, delta (d_out, d_in), row (d_out), col (d_in)."""
    return weight + torch.outer(row, col) * delta


@torch.no_grad()
def merged_weight(weight, delta, row, col, rows=None, scale=1.0):
    """
    W_b + scale·(r ⊗ c) ⊙ Δ in the weight's dtype, without a gradient. rows: the indices of the open rows; no others of Δ
    are read, the rest is a copy of W_b.
    """
    if rows is None:
        change = delta * row[:, None]                                                        # (d_out, d_in)
        out = change if change.dtype == weight.dtype else torch.empty_like(weight)
        return torch.addcmul(weight, change, col, value=scale, out=out)
    change = delta.index_select(0, rows) * row[rows][:, None]                                # (|R|, d_in)
    opened = torch.addcmul(weight.index_select(0, rows), change, col, value=scale)
    return weight.index_copy(0, rows, opened.to(weight.dtype))


def gated_activations(x, weight, delta, row, col, bias=None, scale=1.0):
    """The same by gating activations, W_b x + r ⊙ Δ(c ⊙ x) (Eq. 9–20). `scale` multiplies the delta's part and may be
    a number for each token, (…, 1): 0 is the base bit for bit, 1 the carrier."""
    return F.linear(x, weight, bias) + scale * (row * F.linear(x * col, delta.to(x.dtype))).to(x.dtype)


class GatedLinear(torch.autograd.Function):
    """x (…, d_in) → (…, d_out) through `merged` = masked_weight(): one product forward, and backward, with G = ∂L/∂W,

        ∂L/∂Δ = (r ⊗ c) ⊙ G        ∂L/∂r = (G ⊙ Δ) c        ∂L/∂c = (G ⊙ Δ)ᵀ r

    G is needed on open rows and open columns only: with `index` = (open rows, open columns) just those are computed, and
    where the gates are fixed only the block in which they cross.
    Saves the merged weight and no other d_out × d_in tensor; gradients have Δ's dtype whatever x computes in.
    """

    @staticmethod
    def forward(ctx, x, merged, delta, row, col, bias, index):
        ctx.save_for_backward(x, merged, delta, row, col)
        ctx.index = index
        return F.linear(x, merged, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, merged, delta, row, col = ctx.saved_tensors
        grad_x = grad @ merged if ctx.needs_input_grad[0] else None
        X, Y = x.flatten(0, -2), grad.flatten(0, -2)                                         # (T, d_in), (T, d_out)
        if not any(ctx.needs_input_grad[2:5]):
            return grad_x, None, None, None, None, None, None
        if ctx.index is None:
            G = (Y.t() @ X).to(delta.dtype)                                                  # (d_out, d_in)
            grad_row = grad_col = None
            if ctx.needs_input_grad[3]:
                P = G * delta
                grad_row, grad_col = P @ col, row @ P
            grad_delta = G.mul_(row[:, None]).mul_(col) if ctx.needs_input_grad[2] else None
        else:
            rows, cols = ctx.index
            open_row, Y_rows, X_cols = row[rows], Y.index_select(1, rows), X.index_select(1, cols)
            grad_row = grad_col = grad_delta = None
            if ctx.needs_input_grad[3]:                                # shut gates too have a straight-through gradient
                G_rows = (Y_rows.t() @ X).to(delta.dtype)                                    # (|R|, d_in)
                G_cols = (Y.t() @ X_cols).to(delta.dtype)                                    # (d_out, |C|)
                grad_col = open_row @ (G_rows * delta.index_select(0, rows))                 # (d_in)
                grad_row = (G_cols * delta.index_select(1, cols)) @ col[cols]                # (d_out)
                if ctx.needs_input_grad[2]:
                    G_rows.mul_(open_row[:, None]).mul_(col)
                    grad_delta = torch.zeros_like(delta).index_copy_(0, rows, G_rows)
            else:                                                      # gates fixed: the open block is all that moves
                block = (Y_rows.t() @ X_cols).to(delta.dtype).mul_(open_row[:, None]).mul_(col[cols])   # (|R|, |C|)
                grad_delta = torch.zeros_like(delta)
                grad_delta[rows[:, None], cols] = block
        return grad_x, None, grad_delta, grad_row, grad_col, None, None


# ----------------------------------------------------------------------------------------------------------- the carrier

class Carrier(nn.Module):
    """Gate logits `logits` (L, gates a layer) and deltas `delta[l][name]` (d_out, d_in) for a model of this `config`.

    Starts with Δ = 0 and every gate open. Deltas keep their own dtype (fp32 by default): steps of 2e-5 survive there.
    """

    def __init__(self, config, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.config, self.sizes = config, group_sizes(config)
        wide = {**self.sizes, "attn_v_wide": self.sizes["attn_q"]}
        shapes = {name: (wide[row], wide[col]) for name, (row, col) in PROJECTIONS.items()}
        self.logits = nn.Parameter(torch.ones(config.num_hidden_layers, sum(self.sizes.values()), device=device))
        self.delta = nn.ModuleList(nn.ParameterDict({name: torch.zeros(s, dtype=dtype, device=device)
                                                     for name, s in shapes.items()}) for _ in range(len(self.logits)))

    def init_gates(self, mean=1.5, std=0.5, seed=0):
        """m ~ N(1.5, 0.5): about 99.9 % of the gates open, so that training starts from the whole SFT model (App. B)."""
        with torch.no_grad():
            noise = torch.randn(self.logits.shape, generator=torch.Generator().manual_seed(seed))
            self.logits.copy_(mean + std * noise)
        return self

    @torch.no_grad()
    def dice(self, mean, std, seed):
        """{share, chance}: of the open gates, those among the as many highest initial logits that init_gates() drew; by
        chance it would be their share of all gates. Near 1 the noise has chosen the carrier, not the task."""
        drawn = Carrier(self.config, device="meta").to_empty(device="cpu").init_gates(mean, std, seed).logits.flatten()
        is_open = (self.logits > 0).flatten().cpu()
        n = int(is_open.sum())
        hits = int(is_open[drawn.topk(n).indices].sum())
        return {"share": hits / max(1, n), "chance": n / len(drawn)}

    def by_group(self, gates):
        """(L, gates a layer) → group → (L, length), and `attn_v_wide`, attn_v repeated for o_proj (GQA)."""
        c, groups = self.config, dict(zip(GROUPS, gates.split(list(self.sizes.values()), dim=1)))
        v = groups["attn_v"].unflatten(1, (c.num_key_value_heads, 1, c.head_dim))                # (L, K, 1, h)
        groups["attn_v_wide"] = v.expand(-1, -1, c.num_attention_heads // c.num_key_value_heads, -1).flatten(1)
        return groups

    def split(self, gates):
        """The same layer by layer: one dict a layer, group → vector."""
        groups = self.by_group(gates)
        return [dict(zip(groups, vectors)) for vectors in zip(*(g.unbind(0) for g in groups.values()))]

    def vectors(self, layer, name):
        """The row and the column vector of a projection, out of one of split()'s dicts."""
        row, col = PROJECTIONS[name]
        return layer[row], layer[col]

    @torch.no_grad()
    def open_channels(self):
        """Per layer: name → (open rows, open columns) as index tensors, for the projections where enough gates are shut
        to pay. Padded with shut channels, whose gates are 0 anyway, to a multiple of LANES. One sync with the device."""
        groups, found = self.by_group(self.logits > 0), []
        length = {g: v.shape[1] for g, v in groups.items()}
        counts = torch.stack([v.sum(1) for v in groups.values()], dim=1).tolist()                # (L, 9)
        open_first = functools.cache(lambda g: groups[g].byte().argsort(descending=True, stable=True).unbind(0))
        for l, n_open in enumerate(counts):
            size = {g: min(length[g], -(-n // LANES) * LANES) for g, n in zip(groups, n_open)}
            found.append({name: (open_first(row)[l][:size[row]], open_first(col)[l][:size[col]]) for name, (row, col) in PROJECTIONS.items()
                          if size[row] / length[row] + size[col] / length[col] < 0.9})
        return found

    def gathered(self):
        """open_channels() for the deltas that are large enough for it."""
        sizes = {name: p.numel() for name, p in self.delta[0].items()}
        if not torch.is_grad_enabled() or max(sizes.values()) < DENSE_BELOW:
            return [{} for _ in self.delta]
        return [{name: pair for name, pair in layer.items() if sizes[name] >= DENSE_BELOW} for layer in self.open_channels()]

    def bind(self, net, scale=None, step=None):
        """linear(l, name, x) for one forward pass: the gates are built here, once. `scale`: None, or factors (…, 1) on the
        delta's part for each token of x (…, d), so that one batch serves the behaviour on and off. `step`: a OneStep,
        which has what other forward passes have made already."""
        gates = self.split(Heaviside.apply(self.logits))
        step = step or OneStep(self, keep=False)

        def linear(l, name, x):
            base, delta = net.projections[l][name], self.delta[l][name]
            row, col = (g.to(delta.dtype) for g in self.vectors(gates[l], name))
            if scale is not None:
                return gated_activations(x, base.weight, delta, row.to(x.dtype), col.to(x.dtype), base.bias, scale)
            index = step.index[l].get(name)
            merged = step.weight(l, name, base.weight, row, col)
            return GatedLinear.apply(x, merged, delta, row, col, base.bias, index)
        return linear

    @torch.no_grad()
    def merge(self, net, scale=1.0):
        """Frozen weights W_b + scale·(r ⊗ c) ⊙ Δ of every projection (Eq. 1) as a `Merged`. The base stays as it is."""
        gates = self.split((self.logits > 0).float())
        weights = []
        for l, layer in enumerate(gates):
            weights.append({})
            for name, delta in self.delta[l].items():
                row, col = (g.to(delta.dtype) for g in self.vectors(layer, name))
                weights[l][name] = merged_weight(net.projections[l][name].weight, delta, row, col, scale=scale)
        return Merged(weights)

    @torch.no_grad()
    def stats(self):
        """{"total", "open"} gates, `sparsity` = share of gates off, `entries_off` = 1 − Σ|R||C| / Σ d_out·d_in."""
        total, n_open = self.logits.numel(), int((self.logits > 0).sum())
        layers = self.split((self.logits > 0).double())
        on = float(sum(r.sum() * c.sum() for layer in layers for r, c in (self.vectors(layer, n) for n in PROJECTIONS)))
        entries = sum(p.numel() for layer in self.delta for p in layer.values())
        return {"gates": {"total": total, "open": n_open}, "sparsity": 1 - n_open / total, "entries_off": 1 - on / entries}

    @torch.no_grad()
    def write_channels(self):
        """C_l = {i : ffn_write_i open} ∪ {i : attn_write_i open} (Eq. 5): a bool mask (L, d)."""
        groups = self.by_group(self.logits > 0)
        return groups["ffn_write"] | groups["attn_write"]

    def with_gates(self, value):
        """The same deltas with every gate open (True) or shut (False)."""
        other = copy.copy(self)
        other._parameters = {"logits": nn.Parameter(torch.full_like(self.logits, 1.0 if value else -1.0))}
        return other

    def open_blocks(self):
        """
        (name of the tensor, Δ, its open rows, its open columns) of every projection in which any
        entry is on.
        """
        for l, layer in enumerate(self.split(self.logits > 0)):
            for name, delta in self.delta[l].items():
                rows, cols = (gate.nonzero().squeeze(1) for gate in self.vectors(layer, name))
                if len(rows) and len(cols):
                    yield f"delta.{l}.{name}", delta, rows, cols

    @torch.no_grad()
    def save(self, path, net, dtype=None, logits=False, **metadata):
        """
        Write the packed file, whole or not at all: Δ where both gates are open, and the gates at
        one bit each.

        dtype of the entries of Δ (None: as they are); logits: also keep the gate logits, for
        training that is to go on. metadata: JSON values for the header. What Δ holds under shut
        gates is dropped.
        """
        tensors = {"gates": pack_bits(self.logits > 0)}                                  # (L, ⌈gates / 8⌉)
        if logits:
            tensors["logits"] = self.logits.detach().cpu()
        for name, delta, rows, cols in self.open_blocks():
            block = delta.detach()
            if (len(rows), len(cols)) != block.shape:
                block = block[rows[:, None], cols]                                           # (|R|, |C|)
            tensors[name] = block.to("cpu", dtype or delta.dtype).contiguous()
        save_tensors(path, tensors, format=FORMAT, base=fingerprint(net), content=digest(tensors), groups=self.sizes,
                     **self.stats(), **metadata)


class OneStep:
    """
    A Carrier within one optimizer step, in its place: open channels and merged weights depend on gates and deltas alone,
    so they are made once for all micro-batches. keep=False: weights are made at each use, and live no longer than that.
    """

    def __init__(self, carrier, keep=True):
        self.carrier, self.keep = carrier, keep
        self.index, self.weights = carrier.gathered(), {}

    def bind(self, net, scale=None):
        return self.carrier.bind(net, scale, self)

    def weight(self, l, name, base, row, col):
        """The merged weight of a projection (d_out, d_in)."""
        if (l, name) in self.weights:
            return self.weights[l, name]
        rows, _ = self.index[l].get(name, (None, None))
        merged = merged_weight(base, self.carrier.delta[l][name], row, col, rows)
        if self.keep:
            self.weights[l, name] = merged
        return merged


class Merged:
    """Frozen merged projection weights, `weights[l][name]` (d_out, d_in), in the place of a carrier."""

    def __init__(self, weights):
        self.weights = weights

    def merge(self, net):
        return self

    def bind(self, net, scale=None):
        if scale is not None:
            raise InputError("a merged carrier has no scale left: hand the Carrier itself to the forward pass")
        return lambda l, name, x: F.linear(x, self.weights[l][name], net.projections[l][name].bias)


# ------------------------------------------------------------------------------- the carrier's file

def fingerprint(net):
    """
    A short hash of the base that a carrier belongs to: of all its weights, rounded to bf16, so that
    one checkpoint has one fingerprint in every precision. Computed once a net: the base's weights
    are never changed.
    """
    if not hasattr(net, "fingerprint"):
        net.fingerprint = digest(net.state_dict(), torch.bfloat16)
    return net.fingerprint


def pack_bits(gates):
    """
    (L, gates a layer) bool → (L, ⌈gates a layer / 8⌉) uint8, the first gate in the highest bit.
    """
    return torch.from_numpy(np.packbits(gates.cpu().numpy(), axis=1))


def unpack_bits(packed, count):
    """pack_bits() undone, for `count` gates a layer."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=count)).bool()


def read_packed(path):
    """
    (tensors, header) of a packed carrier file. Raises InputError where it has another format or is
    damaged.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: no carrier of format {FORMAT} (its header says "
                         f"{header.get('format')}); run the command that writes it again")
    if header.get("content") != digest(tensors):
        raise InputError(f"{path}: damaged, its tensors are not those that were written; restore it, "
                         "or run the command that writes it again")
    check_fields(path, header, HEADER)
    gates, per_layer = tensors.get("gates"), sum(header["groups"].values())
    if gates is None or gates.dtype != torch.uint8 or gates.shape[1:] != (-(-per_layer // 8),) or not len(gates):
        raise InputError(f"{path}: its gates are missing or misshapen; run the command that writes it again")
    return tensors, header


def load(path, net, dtype=None):
    """
    The carrier in `path`, on the base `net`; Δ in `dtype` (None: as in the file). Logits are +1 and
    −1 where the file has gates only. Raises InputError if it was made on another base, has another
    format, is damaged or incomplete.
    """
    tensors, header = read_packed(path)
    if header.get("base") != fingerprint(net):
        raise InputError(f"{path}: this carrier was made on another base model; load the one named in "
                         "its config.json")
    stored = [t.dtype for name, t in tensors.items() if name.startswith("delta.")]
    for odd in (t for t in stored if not t.is_floating_point or t.itemsize < 2):
        raise InputError(f"{path}: deltas of {odd}, which is no dtype to compute in; restore the file")
    carrier = Carrier(net.config, dtype or (stored or [torch.float32])[0], net.device)
    try:
        gates = unpack_bits(tensors.pop("gates"), carrier.logits.shape[1])
        logits = tensors.pop("logits", gates.float() * 2 - 1)
        with torch.no_grad():
            carrier.logits.copy_(logits.view_as(carrier.logits))
            for name, delta, rows, cols in carrier.open_blocks():
                block = tensors.pop(name).to(delta.device, delta.dtype)
                if block.shape == delta.shape:
                    delta.copy_(block)
                else:
                    delta[rows[:, None], cols] = block.view(len(rows), len(cols))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: incomplete or misshapen carrier ({said})") from None
    check_finite(path, carrier.state_dict())
    if tensors:
        raise InputError(f"{path}: tensor {next(iter(tensors))} belongs to no open gates; restore the "
                         "file")
    return carrier


def annotate(path, **metadata):
    """Write more metadata into the header of a packed carrier file; its tensors stay."""
    tensors, header = read_packed(path)
    save_tensors(path, tensors, **(header | metadata))


# --------------------------------------------------------------------------------- a look at a file

def describe(path):
    """
    What a packed carrier file holds, as text: base, task, sizes; a layer a line, how many gates of
    each group are open, their share as a bar (full height: the largest share in the file), and the
    layer's write channels (Eq. 5).
    """
    tensors, header = read_packed(path)
    groups = header["groups"]
    gates = unpack_bits(tensors["gates"], sum(groups.values()))
    parts = dict(zip(groups, gates.split(list(groups.values()), dim=1)))                     # group → (L, length)
    largest = max(float(part.float().mean(1).max()) for part in parts.values())
    writes = (parts["attn_write"] | parts["ffn_write"]).sum(1).tolist()
    blocks = [t for name, t in tensors.items() if name.startswith("delta.")]
    entries = sum(t.numel() for t in blocks)
    size = sum(t.numel() * t.element_size() for t in blocks)
    dtype = str(blocks[0].dtype).removeprefix("torch.") if blocks else "no dtype"
    n_open, total = header["gates"]["open"], header["gates"]["total"]

    lines = [f"{path}: format {header['format']}, base {header['base']}, content {header['content']}"]
    for key in ("task", "phase", "metrics", "settings"):
        if key in header:
            lines.append(f"{key}: {show_value(header[key])}")
    lines.append(f"gates open {n_open} of {total} ({n_open / total:.1%}); "
                 f"entries of Δ on {entries} ({1 - header['entries_off']:.2%}), "
                 f"{dtype}, {size:,} bytes of the file's {Path(path).stat().st_size:,}")
    lines.append("")
    lines.append("layer " + "".join(f"{group:>12}" for group in groups) + "   writes to")
    for l, write in enumerate(writes):
        cells = []
        for group, part in parts.items():
            count = int(part[l].sum())
            cells.append(f"{count:>10} {bar(count / part.shape[1] / largest if count else 0)}")
        lines.append(f"{l:>5} " + "".join(cells) + f"{write:>12}")
    return "\n".join(lines)


def show_value(value):
    """A header's value on a line: numbers short, an object as name value, …"""
    if isinstance(value, dict):
        return ", ".join(f"{k} {show_value(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bar(share):
    """A share from 0 to 1 as one character; a space is exactly nothing."""
    marks = " ▁▂▃▄▅▆▇█"
    return marks[min(len(marks) - 1, math.ceil(share * (len(marks) - 1)))]


def main():
    p = argparse.ArgumentParser(description="What a carrier file holds: python carrier.py show FILE")
    p.add_argument("command", choices=["show"])
    p.add_argument("file", help="carrier.safetensors or sft.safetensors of a run")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(describe(p.parse_args().file), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                      # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
