"""
The carrier: weight deltas and binary gates beside a base model that is never changed (Sec. 3.1).

    W = W_b + M ⊙ Δ,  M = r ⊗ c          Eq. 1, 2: r gates the rows (outputs) of Δ, c its columns (inputs)

Shapes: L layers, d hidden size, d_q = heads·head_dim, d_kv = key/value heads·head_dim, f = d_ff; N tokens.
R and C are a projection's open rows and open columns.
"""
from common import InputError, digest, load_tensors, save_tensors
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# Table 5: 8 gate vectors a layer, shared between projections
GROUPS = ("attn_read", "attn_q", "attn_k", "attn_v", "attn_write", "ffn_read", "ffn_hidden", "ffn_write")
# Table 5: the Δ of each projection has a row gate and a column gate. o_proj reads the context, and that is
# made of values: attn_v, repeated where several query heads share a value head
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
FORMAT = 3              # of a carrier's file
SPARSE_BELOW = 0.8      # |R|/d_out + |C|/d_in below which gating activations is cheaper than merging
LANES = 8               # open channels are taken in eights: 16 bytes of bf16, what matrix units want


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


# ---- the gated linear layer: the definition, and two ways to compute it

def masked_weight(weight, delta, row, col, scale=1.0):
    """
    W_b + s·(r ⊗ c) ⊙ Δ (Eq. 1, 2): the definition. weight, delta (d_out, d_in), row (d_out), col (d_in).
    Rounded once, to the weight's dtype.
    """
    change = delta * (scale * row)[:, None]                             # (d_out, d_in)
    return torch.addcmul(weight.to(change.dtype), change, col).to(weight.dtype)


class MergedLinear(torch.autograd.Function):
    """
    x (N, d_in) → (N, d_out) through the masked weight W (Eq. 1): one product forward, two backward. With
    G = ∂L/∂W,

        ∂L/∂Δ = (r ⊗ c) ⊙ G        ∂L/∂r = (G ⊙ Δ) c        ∂L/∂c = (G ⊙ Δ)ᵀ r

    What is cheaper while many gates are open. Saves no d_out × d_in tensor but W.
    """

    @staticmethod
    def forward(ctx, x, W, delta, row, col, bias):
        ctx.save_for_backward(x, W, delta, row, col)
        return F.linear(x, W, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, W, delta, row, col = ctx.saved_tensors
        of_x, _, of_delta, of_gates, *_ = ctx.needs_input_grad
        grad_x = grad @ W if of_x else None
        grad_delta = grad_row = grad_col = None
        if of_delta or of_gates:
            G = (grad.t() @ x).to(delta.dtype)                          # (d_out, d_in)
        if of_gates:
            P = G * delta
            grad_row, grad_col = P @ col, row @ P                       # (d_out), (d_in)
        if of_delta:
            grad_delta = G.mul_(row[:, None]).mul_(col)
        return grad_x, None, grad_delta, grad_row, grad_col, None


class GatedActivations(torch.autograd.Function):
    """
    The same by gating activations, W_b x + r ⊙ Δ(c ⊙ x) (Eq. 9, 10 and 16–20; equal to Eq. 1 by 11–15 and
    21–25): of Δ only the open block R × C is read. With y the gradient of the output,

        ∂L/∂c = Σ_N x ⊙ Δᵀ(r ⊙ y)        ∂L/∂r = Σ_N y ⊙ Δ(c ⊙ x)        ∂L/∂Δ = (r ⊙ y)(c ⊙ x)ᵀ

    need no more than the open rows of Δ, its open columns, and the block: shut gates have their
    straight-through gradient too. What is cheaper once few gates are open.
    """

    @staticmethod
    def forward(ctx, x, weight, delta, row, col, bias, R, C):
        ctx.save_for_backward(x, weight, delta, row, col, R, C)
        block = delta.index_select(0, R).index_select(1, C).to(x.dtype)             # (|R|, |C|)
        change = (x.index_select(1, C) * col[C].to(x.dtype)) @ block.t()            # (N, |R|)
        return F.linear(x, weight, bias).index_add_(1, R, change * row[R].to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, delta, row, col, R, C = ctx.saved_tensors
        of_x, _, of_delta, of_gates, *_ = ctx.needs_input_grad
        x_open = x.index_select(1, C) * col[C].to(x.dtype)                          # (N, |C|)
        y_open = grad.index_select(1, R) * row[R].to(x.dtype)                       # (N, |R|)
        grad_x = grad_delta = grad_row = grad_col = None
        back = y_open @ delta.index_select(0, R).to(x.dtype)                        # (N, d_in)
        if of_gates:
            grad_col = (x * back).sum(0, dtype=col.dtype)                           # (d_in)
            ahead = x_open @ delta.index_select(1, C).to(x.dtype).t()               # (N, d_out)
            grad_row = (grad * ahead).sum(0, dtype=row.dtype)                       # (d_out)
        if of_x:
            grad_x = torch.addcmul(grad @ weight, back, col.to(x.dtype))
        if of_delta:
            grad_delta = torch.zeros_like(delta)
            grad_delta[R[:, None], C] = (y_open.t() @ x_open).to(delta.dtype)
        return grad_x, None, grad_delta, grad_row, grad_col, None, None, None


# ---- the carrier

class Carrier(nn.Module):
    """
    Gate logits `logits` (L, gates a layer) and deltas `delta[l][name]` (d_out, d_in) for a model of this
    `config`. Starts with Δ = 0 and every gate open. Deltas keep their own dtype (fp32 by default): steps of
    2e-5 survive there.
    """

    def __init__(self, config, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.config, self.sizes = config, group_sizes(config)
        gates = config.num_hidden_layers, sum(self.sizes.values())
        self.logits = nn.Parameter(torch.ones(gates, device=device, dtype=torch.promote_types(dtype, torch.float32)))
        lengths = {**self.sizes, "attn_v_wide": self.sizes["attn_q"]}
        self.delta = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            deltas = {}
            for name, (row, col) in PROJECTIONS.items():
                deltas[name] = torch.zeros(lengths[row], lengths[col], dtype=dtype, device=device)
            self.delta.append(nn.ParameterDict(deltas))

    @torch.no_grad()
    def init_gates(self, mean=1.5, std=0.5, seed=0):
        """m ~ N(1.5, 0.5): 99.9 % of the gates open, so that training starts from all of SFT (App. B)."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.logits.shape, generator=generator)
        self.logits.copy_(mean + std * noise)
        return self

    # -- which gate is where

    def by_group(self, gates):
        """
        (L, gates a layer) → {group: (L, length)}, and `attn_v_wide`: attn_v repeated for the query heads of
        each value head, as o_proj reads them.
        """
        c = self.config
        groups = dict(zip(GROUPS, gates.split(list(self.sizes.values()), dim=1)))
        v = groups["attn_v"].unflatten(1, (c.num_key_value_heads, 1, c.head_dim))   # (L, K, 1, h)
        queries = c.num_attention_heads // c.num_key_value_heads
        groups["attn_v_wide"] = v.expand(-1, -1, queries, -1).flatten(1)            # (L, d_q)
        return groups

    def projections(self, gates):
        """Yield (l, name, row (d_out), col (d_in)) of every projection, out of (L, gates a layer)."""
        groups = {name: part.unbind(0) for name, part in self.by_group(gates).items()}
        for l in range(len(gates)):
            for name, (row, col) in PROJECTIONS.items():
                yield l, name, groups[row][l], groups[col][l]

    @torch.no_grad()
    def open_channels(self):
        """
        {(l, name): (R, C)} as indices, for the projections where few gates are open; open channels first,
        then shut ones, whose gates are 0 anyway, up to a multiple of LANES. One sync with the device.
        """
        groups = self.by_group(self.logits > 0)
        counts = torch.stack([part.sum(1) for part in groups.values()], dim=1).tolist()     # (L, 9)
        orders = {name: part.byte().argsort(dim=1, descending=True, stable=True)
                  for name, part in groups.items()}
        found = {}
        for l, opened in enumerate(counts):
            sizes = {name: math.ceil(n / LANES) * LANES for name, n in zip(groups, opened)}
            for name, (row, col) in PROJECTIONS.items():
                R, C = orders[row][l, :sizes[row]], orders[col][l, :sizes[col]]
                if len(R) / orders[row].shape[1] + len(C) / orders[col].shape[1] < SPARSE_BELOW:
                    found[l, name] = R, C
        return found

    # -- in the forward pass

    def bind(self, net, rows):
        """linear(l, name, x), every projection of one forward pass; `rows` are model.Rows."""
        return Step(self).bind(net, rows)

    @torch.no_grad()
    def merge(self, net, scale=1.0):
        """Frozen weights W_b + s·(r ⊗ c) ⊙ Δ of every projection as a Merged. The base stays as it is."""
        weights = {}
        for l, name, row, col in self.projections((self.logits > 0).to(self.logits.dtype)):
            delta = self.delta[l][name]
            weight = net.projections[l][name].weight
            weights[l, name] = masked_weight(weight, delta, row.to(delta.dtype), col.to(delta.dtype), scale)
        return Merged(weights)

    # -- what it says of itself

    @torch.no_grad()
    def stats(self):
        """
        {"gates": {total, open}, sparsity, entries_off}: the share of gates that are off, and that of the
        entries of Δ, 1 − Σ |R||C| / Σ d_out·d_in.
        """
        total, opened, on, entries = self.logits.numel(), int((self.logits > 0).sum()), 0, 0
        for l, name, row, col in self.projections(self.logits > 0):
            on = on + row.sum() * col.sum()
            entries += self.delta[l][name].numel()
        return {"gates": {"total": total, "open": opened}, "sparsity": 1 - opened / total,
                "entries_off": 1 - float(on) / entries}

    @torch.no_grad()
    def write_channels(self):
        """C_l = {i : ffn_write_i open} ∪ {i : attn_write_i open} (Eq. 5): bool (L, d)."""
        groups = self.by_group(self.logits > 0)
        return groups["ffn_write"] | groups["attn_write"]

    def with_gates(self, value):
        """The same deltas with every gate open (True) or shut (False)."""
        other = copy.copy(self)
        other._parameters = {"logits": nn.Parameter(torch.full_like(self.logits, 1.0 if value else -1.0))}
        return other

    @torch.no_grad()
    def open_blocks(self):
        """Yield (l, name, Δ, R, C) of every projection in which an entry is on."""
        for l, name, row, col in self.projections(self.logits > 0):
            R, C = row.nonzero().squeeze(1), col.nonzero().squeeze(1)
            if len(R) and len(C):
                yield l, name, self.delta[l][name].detach(), R, C

    def save(self, path, net, **metadata):
        """
        Write a carrier's file: the logits, rounded to bf16, which keeps their signs; Δ where both gates are
        open; and in the header the base that it belongs to, stats(), and metadata (JSON values).
        """
        tensors = {"logits": self.logits.to(torch.bfloat16)}
        for l, name, delta, R, C in self.open_blocks():
            tensors[f"delta.{l}.{name}"] = delta[R[:, None], C]
        save_tensors(path, tensors, format=FORMAT, base=base_fingerprint(net), content=digest(tensors),
                     **self.stats(), **metadata)


class Step:
    """
    A carrier within one optimizer step, in its place: which channels are open, and the merged weights,
    follow from gates and deltas alone, so several micro-batches share them.
    """

    def __init__(self, carrier):
        self.carrier, self.merged = carrier, {}
        self.open = carrier.open_channels()

    def bind(self, net, rows):
        """linear(l, name, x) for one forward pass. Raises no errors of its own."""
        carrier, gates = self.carrier, {}
        for l, name, row, col in carrier.projections(Heaviside.apply(carrier.logits)):
            gates[l, name] = row, col

        def linear(l, name, x):
            base, delta, at = net.projections[l][name], carrier.delta[l][name], (l, name)
            row, col = (gate.to(delta.dtype) for gate in gates[at])
            if rows.scale is not None:
                scale = rows.scale if len(x) == len(rows.scale) else rows.scale[rows.at]    # (N, 1)
                return base(x) + scale * (row.to(x.dtype) * F.linear(x * col.to(x.dtype), delta.to(x.dtype)))
            if at in self.open:
                return GatedActivations.apply(x, base.weight, delta, row, col, base.bias, *self.open[at])
            if at not in self.merged:
                with torch.no_grad():
                    self.merged[at] = masked_weight(base.weight, delta, row, col)
            return MergedLinear.apply(x, self.merged[at], delta, row, col, base.bias)
        return linear


class Merged:
    """Frozen merged weights, {(l, name): (d_out, d_in)}, in the place of a carrier."""

    def __init__(self, weights):
        self.weights = weights

    def bind(self, net, rows):
        """linear(l, name, x) by these weights. Raises InputError for a scale: Δ is no longer apart."""
        if rows.scale is not None:
            raise InputError("a merged carrier has no scale left: give the Carrier itself")

        def linear(l, name, x):
            return F.linear(x, self.weights[l, name], net.projections[l][name].bias)
        return linear


# ---- out of a file

def base_fingerprint(net):
    """A short hash of the base that a carrier belongs to, the same in every precision of a checkpoint."""
    if not hasattr(net, "fingerprint"):
        net.fingerprint = digest(net.state_dict(), torch.bfloat16)
    return net.fingerprint


@torch.no_grad()
def load(path, net, dtype=None):
    """
    The carrier in `path`, on the base `net`; Δ in `dtype` (None: as in the file). Raises InputError if it
    was made on another base, or is damaged or of another format.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != FORMAT or header.get("content") != digest(tensors):
        raise InputError(f"{path}: is no carrier of format {FORMAT}, or damaged; run the command that writes it")
    if header["base"] != base_fingerprint(net):
        raise InputError(f"{path}: this carrier was made on another base model; load the one that its "
                         "config.json names")
    blocks = {name: t for name, t in tensors.items() if name.startswith("delta.")}
    stored = next(iter(blocks.values())).dtype if blocks else torch.float32
    carrier = Carrier(net.config, dtype or stored, net.device)
    carrier.logits.copy_(tensors["logits"])
    for l, name, delta, R, C in carrier.open_blocks():
        delta[R[:, None], C] = blocks[f"delta.{l}.{name}"].to(delta.device, delta.dtype)
    return carrier
