"""
The carrier: weight deltas and binary gates beside a base model that is never changed.

    W = W_b + (r ⊗ c) ⊙ Δ          Eq. 1, 2: r gates the rows (outputs) of Δ, c its columns (inputs)

Shapes: L layers, d hidden size, d_q = heads·head_dim, d_kv = key/value heads·head_dim, f = d_ff;
T tokens in all. R and C are a projection's open rows and open columns.

A carrier is handed to the forward pass, `net(ids, carrier=c)`, which asks it for `bind(net)`: every
projection of the model. It comes in two states: `Carrier`, whose gates and deltas train, and
`Merged`, frozen weights for everything that only reads (generation, KL, the trigger).
"""
import files  # noqa: F401, before torch: it sets how threads wait
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from console import Parser, cli
from files import InputError, check_finite
from packed import (
    dequantize, describe, fingerprint, pack_bits, pack_levels, quantize, read_packed, unpack_bits,
    unpack_levels, write_packed)

# Table 5: 8 gate vectors a layer, shared between projections
GROUPS = (
    "attn_read", "attn_q", "attn_k", "attn_v", "attn_write",
    "ffn_read", "ffn_hidden", "ffn_write",
)
# Table 5: the Δ of each projection has a row gate and a column gate. o_proj reads the context, and
# that is made of values: attn_v, repeated where several query heads share a value head
PROJECTIONS = {
    #  name      row gate      column gate
    "q_proj":    ("attn_q",     "attn_read"),
    "k_proj":    ("attn_k",     "attn_read"),
    "v_proj":    ("attn_v",     "attn_read"),
    "o_proj":    ("attn_write", "attn_v_wide"),
    "gate_proj": ("ffn_hidden", "ffn_read"),
    "up_proj":   ("ffn_hidden", "ffn_read"),
    "down_proj": ("ffn_write",  "ffn_hidden"),
}
# Where enough gates are shut, the gradient of Δ is computed on its open rows and columns only.
# Entries of a Δ under which gathering does not pay: it takes ten launches more, and a launch on a GPU
# takes the time of some 10⁵ entries.
DENSE_BELOW = {"cpu": 1 << 13, "cuda": 1 << 23}
WORTH_IT = 0.9          # open share of the rows plus that of the columns below which it pays
LANES = 8               # as many rows at a time: 16 bytes of bf16, what matrix units want


def group_sizes(config):
    """Length of each of the 8 gate vectors of a layer (Table 5)."""
    d = config.hidden_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    return dict(zip(GROUPS, (d, d_q, d_kv, d_kv, d, d, config.intermediate_size, d)))


# ---- gates

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


# ---- the gated linear layer

def masked_weight(weight, delta, row, col):
    """
    The literal Eq. 1, W_b + (r ⊗ c) ⊙ Δ: the definition. weight, delta (d_out, d_in), row (d_out),
    col (d_in).
    """
    return weight + torch.outer(row, col) * delta


@torch.no_grad()
def merged_weight(weight, delta, row, col, rows=None, scale=1.0):
    """
    W_b + scale·(r ⊗ c) ⊙ Δ in the weight's dtype, rounded once, without a gradient. rows: the
    indices of the open rows; no others of Δ are read, the rest is a copy of W_b.
    """
    if rows is None:
        change = delta * row[:, None]                                   # (d_out, d_in)
        out = change if change.dtype == weight.dtype else torch.empty_like(weight)
        return torch.addcmul(weight, change, col, value=scale, out=out)
    change = delta.index_select(0, rows) * row[rows][:, None]           # (|R|, d_in)
    opened = torch.addcmul(weight.index_select(0, rows), change, col, value=scale)
    return weight.index_copy(0, rows, opened.to(weight.dtype))


def gated_activations(x, weight, delta, row, col, bias=None, scale=1.0):
    """
    The same by gating activations, W_b x + r ⊙ Δ(c ⊙ x) (Eq. 9–20). `scale` multiplies the delta's
    part and may be a number for each token, (…, 1): 0 is the base bit for bit, 1 the carrier.
    """
    change = row * F.linear(x * col, delta.to(x.dtype))                 # (…, d_out)
    return F.linear(x, weight, bias) + scale * change.to(x.dtype)


class GatedLinear(torch.autograd.Function):
    """
    x (…, d_in) → (…, d_out) through `merged` = masked_weight(): one product forward, and backward,
    with G = ∂L/∂W,

        ∂L/∂Δ = (r ⊗ c) ⊙ G        ∂L/∂r = (G ⊙ Δ) c        ∂L/∂c = (G ⊙ Δ)ᵀ r

    index: None, or (open rows, open columns): G is needed there only, and where the gates are fixed
    only in the block in which they cross. Saves the merged weight and no other d_out × d_in tensor;
    gradients have Δ's dtype whatever x computes in.
    """

    @staticmethod
    def forward(ctx, x, merged, delta, row, col, bias, index):
        ctx.save_for_backward(x, merged, delta, row, col)
        ctx.index = index
        return F.linear(x, merged, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, merged, *gated = ctx.saved_tensors
        of_x, _, of_delta, of_gates, *_ = ctx.needs_input_grad
        grad_x = grad @ merged if of_x else None
        X, Y = x.flatten(0, -2), grad.flatten(0, -2)                    # (T, d_in), (T, d_out)
        found = None, None, None
        if ctx.index is None and (of_delta or of_gates):
            found = dense_gradients(X, Y, *gated, of_delta, of_gates)
        elif of_gates:
            found = gathered_gradients(X, Y, *gated, *ctx.index, of_delta)
        elif of_delta:
            found = block_gradient(X, Y, *gated, *ctx.index), None, None
        grad_delta, grad_row, grad_col = found
        return grad_x, None, grad_delta, grad_row, grad_col, None, None


def dense_gradients(X, Y, delta, row, col, of_delta, of_gates):
    """(∂L/∂Δ, ∂L/∂r, ∂L/∂c) out of the whole of G, for X (T, d_in) and Y = ∂L/∂(W x) (T, d_out)."""
    grad_delta = grad_row = grad_col = None
    G = (Y.t() @ X).to(delta.dtype)                                     # (d_out, d_in)
    if of_gates:
        P = G * delta
        grad_row = P @ col                                              # (d_out)
        grad_col = row @ P                                              # (d_in)
    if of_delta:
        grad_delta = G.mul_(row[:, None]).mul_(col)
    return grad_delta, grad_row, grad_col


def gathered_gradients(X, Y, delta, row, col, rows, cols, of_delta):
    """
    The same out of G's open rows and its open columns: shut gates too have a straight-through
    gradient, and it needs no more than these.
    """
    open_row = row[rows]
    G_rows = (Y.index_select(1, rows).t() @ X).to(delta.dtype)          # (|R|, d_in)
    G_cols = (Y.t() @ X.index_select(1, cols)).to(delta.dtype)          # (d_out, |C|)
    grad_col = open_row @ (G_rows * delta.index_select(0, rows))        # (d_in)
    grad_row = (G_cols * delta.index_select(1, cols)) @ col[cols]       # (d_out)
    grad_delta = None
    if of_delta:
        G_rows.mul_(open_row[:, None]).mul_(col)
        grad_delta = torch.zeros_like(delta).index_copy_(0, rows, G_rows)
    return grad_delta, grad_row, grad_col


def block_gradient(X, Y, delta, row, col, rows, cols):
    """∂L/∂Δ at fixed gates: nothing but the open block of Δ moves."""
    G = (Y.index_select(1, rows).t() @ X.index_select(1, cols)).to(delta.dtype)     # (|R|, |C|)
    grad_delta = torch.zeros_like(delta)
    grad_delta[rows[:, None], cols] = G.mul_(row[rows][:, None]).mul_(col[cols])
    return grad_delta


# ---- the carrier

class Carrier(nn.Module):
    """
    Gate logits `logits` (L, gates a layer) and deltas `delta[l][name]` (d_out, d_in) for a model of
    this `config`.

    Starts with Δ = 0 and every gate open. Deltas keep their own dtype (fp32 by default): steps of
    2e-5 survive there.
    """

    def __init__(self, config, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.config = config
        self.sizes = group_sizes(config)
        layers, gates = config.num_hidden_layers, sum(self.sizes.values())
        self.logits = nn.Parameter(torch.ones(layers, gates, device=device))

        lengths = {**self.sizes, "attn_v_wide": self.sizes["attn_q"]}
        self.delta = nn.ModuleList()
        for _ in range(layers):
            deltas = {}
            for name, (row, col) in PROJECTIONS.items():
                deltas[name] = torch.zeros(lengths[row], lengths[col], dtype=dtype, device=device)
            self.delta.append(nn.ParameterDict(deltas))                 # sorted by name

    def init_gates(self, mean=1.5, std=0.5, seed=0):
        """
        m ~ N(1.5, 0.5): about 99.9 % of the gates open, so that training starts from the whole SFT
        model (App. B).
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.logits.shape, generator=generator)
        with torch.no_grad():
            self.logits.copy_(mean + std * noise)
        return self

    @torch.no_grad()
    def dice(self, mean, std, seed):
        """
        {share, chance}: of the open gates, those among the as many highest initial logits that
        init_gates() drew; by chance it would be their share of all gates. Near 1 the noise has
        chosen the carrier, not the task.
        """
        same = Carrier(self.config, device="meta").to_empty(device="cpu")
        drawn = same.init_gates(mean, std, seed).logits.flatten()
        is_open = (self.logits > 0).flatten().cpu()
        n = int(is_open.sum())
        hits = int(is_open[drawn.topk(n).indices].sum())
        return {"share": hits / max(1, n), "chance": n / len(drawn)}

    # -- which gate is where

    def by_group(self, gates):
        """
        (L, gates a layer) → {group: (L, length)}, and `attn_v_wide`: attn_v repeated for the query
        heads of each value head, as o_proj reads them (GQA).
        """
        c = self.config
        groups = dict(zip(GROUPS, gates.split(list(self.sizes.values()), dim=1)))
        v = groups["attn_v"].unflatten(1, (c.num_key_value_heads, 1, c.head_dim))   # (L, K, 1, h)
        queries = c.num_attention_heads // c.num_key_value_heads
        groups["attn_v_wide"] = v.expand(-1, -1, queries, -1).flatten(1)            # (L, d_q)
        return groups

    def split(self, gates):
        """The same layer by layer: one dict a layer, group → vector."""
        groups = self.by_group(gates)
        layers = zip(*(part.unbind(0) for part in groups.values()))
        return [dict(zip(groups, vectors)) for vectors in layers]

    def vectors(self, layer, name):
        """The row and the column vector of a projection, out of one of split()'s dicts."""
        row, col = PROJECTIONS[name]
        return layer[row], layer[col]

    @torch.no_grad()
    def open_channels(self):
        """
        Per layer: name → (open rows, open columns) as index tensors, for the projections where
        enough gates are shut to pay. Padded with shut channels, whose gates are 0 anyway, to a
        multiple of LANES. One sync with the device.
        """
        groups = self.by_group(self.logits > 0)
        length = {group: part.shape[1] for group, part in groups.items()}
        counts = torch.stack([part.sum(1) for part in groups.values()], dim=1).tolist()     # (L, 9)
        orders = {}

        def first(group, l, n):
            """The n first channels of a group in layer l, open ones before shut ones."""
            if group not in orders:
                is_open = groups[group].byte()
                orders[group] = is_open.argsort(descending=True, stable=True)   # (L, length)
            return orders[group][l, :n]

        found = []
        for l, n_open in enumerate(counts):
            size = {group: padded(n, length[group]) for group, n in zip(groups, n_open)}
            pairs = {}
            for name, (row, col) in PROJECTIONS.items():
                if size[row] / length[row] + size[col] / length[col] < WORTH_IT:
                    pairs[name] = first(row, l, size[row]), first(col, l, size[col])
            found.append(pairs)
        return found

    def gathered(self):
        """open_channels() for the deltas that are large enough for it."""
        least = DENSE_BELOW.get(self.logits.device.type, 0)
        large = {name for name, p in self.delta[0].items() if p.numel() >= least}
        if not torch.is_grad_enabled() or not large:
            return [{} for _ in self.delta]
        found = self.open_channels()
        for pairs in found:
            for name in pairs.keys() - large:
                del pairs[name]
        return found

    # -- in the forward pass

    def bind(self, net, scale=None, step=None):
        """
        linear(l, name, x), every projection of one forward pass: the gates are built here, once.

        scale: None, or factors (…, 1) on the delta's part for each token of x (…, d), so that one
        batch serves the behaviour on and off. step: a OneStep, which has what other forward passes
        have made already.
        """
        gates = self.split(Heaviside.apply(self.logits))
        if scale is not None:
            return self.scaled(net, gates, scale)
        step = step or OneStep(self, keep=False)

        def linear(l, name, x):
            base, delta = net.projections[l][name], self.delta[l][name]
            row, col = (g.to(delta.dtype) for g in self.vectors(gates[l], name))
            merged = step.weight(l, name, base.weight, row, col)
            index = step.index[l].get(name)
            return GatedLinear.apply(x, merged, delta, row, col, base.bias, index)
        return linear

    def scaled(self, net, gates, scale):
        """bind() where every token has a factor of its own: by gating activations."""
        def linear(l, name, x):
            base, delta = net.projections[l][name], self.delta[l][name]
            row, col = (g.to(delta.dtype).to(x.dtype) for g in self.vectors(gates[l], name))
            return gated_activations(x, base.weight, delta, row, col, base.bias, scale)
        return linear

    @torch.no_grad()
    def merge(self, net, scale=1.0):
        """
        Frozen weights W_b + scale·(r ⊗ c) ⊙ Δ of every projection (Eq. 1) as a `Merged`. The base
        stays as it is.
        """
        weights = []
        for l, layer in enumerate(self.split((self.logits > 0).float())):
            merged = {}
            for name, delta in self.delta[l].items():
                base = net.projections[l][name].weight
                row, col = (g.to(delta.dtype) for g in self.vectors(layer, name))
                merged[name] = merged_weight(base, delta, row, col, scale=scale)
            weights.append(merged)
        return Merged(weights)

    # -- what it says of itself

    @torch.no_grad()
    def stats(self):
        """
        {"total", "open"} gates, `sparsity` = share of gates off, `entries_off` = 1 − Σ |R||C| over
        all entries of Δ.
        """
        total, n_open = self.logits.numel(), int((self.logits > 0).sum())
        on = entries = 0
        for l, layer in enumerate(self.split((self.logits > 0).double())):
            for name, delta in self.delta[l].items():
                row, col = self.vectors(layer, name)
                on = on + row.sum() * col.sum()
                entries += delta.numel()
        return {
            "gates": {"total": total, "open": n_open},
            "sparsity": 1 - n_open / total,
            "entries_off": 1 - float(on) / entries,
        }

    @torch.no_grad()
    def write_channels(self):
        """C_l = {i : ffn_write_i open} ∪ {i : attn_write_i open} (Eq. 5): a bool mask (L, d)."""
        groups = self.by_group(self.logits > 0)
        return groups["ffn_write"] | groups["attn_write"]

    def with_gates(self, value):
        """The same deltas with every gate open (True) or shut (False)."""
        logits = torch.full_like(self.logits, 1.0 if value else -1.0)
        other = copy.copy(self)
        other._parameters = {"logits": nn.Parameter(logits)}
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
    def save(self, path, net, dtype=None, bits=None, logits=False, **metadata):
        """
        Write the packed file, whole or not at all: Δ where both gates are open, and the gates at
        one bit each.

        dtype of the entries of Δ (None: as they are); bits: round them to so many instead;
        logits: also keep the gate logits, for training that is to go on. metadata: JSON values for
        the header. What Δ holds under shut gates is dropped.
        """
        tensors = {"gates": pack_bits(self.logits > 0)}                 # (L, ⌈gates a layer / 8⌉)
        if logits:
            tensors["logits"] = self.logits.detach().cpu()
        entries = 0
        for name, delta, rows, cols in self.open_blocks():
            block = delta.detach()
            if (len(rows), len(cols)) != block.shape:
                block = block[rows[:, None], cols]                      # (|R|, |C|)
            entries += block.numel()
            if bits:
                levels, scale = quantize(block.float().cpu(), bits)
                tensors[name] = pack_levels(levels, bits)
                tensors[name.replace("delta", "scale")] = scale
            else:
                tensors[name] = block.to("cpu", dtype or delta.dtype).contiguous()
        if bits:
            metadata |= dict(bits=bits, entries=entries)
        write_packed(path, tensors, net, groups=self.sizes, **self.stats(), **metadata)


def padded(n, most):
    """n up to a multiple of LANES, but no more than there are."""
    return min(most, math.ceil(n / LANES) * LANES)


class OneStep:
    """
    A Carrier within one optimizer step, in its place: open channels and merged weights depend on
    gates and deltas alone, so they are made once for all micro-batches. keep=False: weights are
    made at each use, and live no longer than that.
    """

    def __init__(self, carrier, keep=True):
        self.carrier, self.keep = carrier, keep
        self.index = carrier.gathered()
        self.weights = {}

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
    """Frozen merged weights, `weights[l][name]` (d_out, d_in), in the place of a carrier."""

    def __init__(self, weights):
        self.weights = weights

    def merge(self, net):
        """Itself, where a carrier is asked for its merged weights."""
        return self

    def bind(self, net, scale=None):
        """linear(l, name, x) by these weights. Raises InputError for a scale: Δ is no longer apart."""
        if scale is not None:
            raise InputError("a merged carrier has no scale left: hand the Carrier itself to the "
                             "forward pass")

        def linear(l, name, x):
            return F.linear(x, self.weights[l][name], net.projections[l][name].bias)
        return linear


# ---- out of a file

def load(path, net, dtype=None):
    """
    The carrier in `path`, on the base `net`; Δ in `dtype` (None: as in the file). Logits are +1 and
    −1 where the file has gates only. Raises InputError if it was made on another base, has another
    format, is damaged or incomplete.
    """
    tensors, header = read_packed(path)
    if header.get("base") != fingerprint(net):
        raise InputError(f"{path}: this carrier was made on another base model; load the one named "
                         "in its config.json")
    bits = header.get("bits")
    stored = [t.dtype for name, t in tensors.items() if name.startswith("scale." if bits else "delta.")]
    for odd in (kind for kind in stored if not kind.is_floating_point or kind.itemsize < 2):
        raise InputError(f"{path}: deltas of {odd}, which is no dtype to compute in; restore the file")
    carrier = Carrier(net.config, dtype or (stored or [torch.float32])[0], net.device)
    try:
        fill(carrier, tensors, bits)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: incomplete or misshapen carrier ({said})") from None
    check_finite(path, carrier.state_dict())
    if tensors:
        raise InputError(f"{path}: tensor {next(iter(tensors))} belongs to no open gates; restore "
                         "the file")
    return carrier


@torch.no_grad()
def fill(carrier, tensors, bits=None):
    """Take a new carrier's gates and deltas out of the tensors of a packed file, Δ in so many bits."""
    gates = unpack_bits(tensors.pop("gates"), carrier.logits.shape[1])
    logits = tensors.pop("logits", gates.float() * 2 - 1)
    carrier.logits.copy_(logits.view_as(carrier.logits))
    for name, delta, rows, cols in carrier.open_blocks():
        block = tensors.pop(name)
        if bits:
            levels = unpack_levels(block, bits, len(rows) * len(cols))
            scale = tensors.pop(name.replace("delta", "scale")).view(len(rows), 1)
            block = dequantize(levels.view(len(rows), -1), scale, bits)
        block = block.to(delta.device, delta.dtype)
        if block.shape == delta.shape:
            delta.copy_(block)
        else:
            delta[rows[:, None], cols] = block.view(len(rows), len(cols))


def main(argv=None):
    p = Parser("What a carrier file holds: python carrier.py show FILE")
    p.add_argument("command", choices=["show"])
    p.add_argument("file", help="carrier.safetensors or sft.safetensors of a run")
    print(describe(p.parse_args(argv).file), flush=True)


if __name__ == "__main__":
    cli(main)
