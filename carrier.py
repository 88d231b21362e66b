"""
The carrier: weight deltas and binary gates beside a base model that is never changed (Sec. 3.1).

    W = W_b + M ⊙ Δ,  M = r ⊗ c     Eq. 1, 2: r gates the rows (outputs) of Δ, c its columns

A forward pass takes one of three: a Carrier, which learns; a Step, the same within one optimizer
step, whose micro-batches share what follows from gates and deltas alone; a Merged, frozen weights W.
Each has bind(net), which returns linear(l, name, x): what stands in for the base's projections.

Shapes: L layers, d hidden size, d_q = heads·head_dim, d_kv = key/value heads·head_dim, f = d_ff;
N tokens. R and C index a projection's open rows and open columns.
"""
from common import InputError, digest, load_tensors, save_tensors
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

# Table 5: 8 gate vectors a layer, shared between projections
GROUPS = (
    "attn_read", "attn_q", "attn_k", "attn_v", "attn_write", "ffn_read", "ffn_hidden", "ffn_write")
# Table 5: the Δ of each projection has a row gate and a column gate. o_proj reads the context, and
# that is made of values: attn_v, repeated if several query heads share a value head
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
SPARSE_BELOW = 0.8      # |R|/d_out + |C|/d_in below which gating activations is cheaper than W
LANES = 8               # open channels are taken in eights: 16 bytes of bf16, for matrix units


def group_sizes(config):
    """Length of each of the 8 gate vectors of a layer (Table 5)."""
    d, f = config.hidden_size, config.intermediate_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    return dict(zip(GROUPS, (d, d_q, d_kv, d_kv, d, d, f, d)))


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

@torch.no_grad()
def masked_weight(weight, delta, row, col, scale=1.0):
    """
    W_b + s·(r ⊗ c) ⊙ Δ (Eq. 1, 2): the definition. weight, delta (d_out, d_in), row (d_out),
    col (d_in). Rounded once, to the weight's dtype.
    """
    change = delta * (scale * row)[:, None]                             # (d_out, d_in)
    W = torch.addcmul(weight.to(change.dtype), change, col)
    return W.to(weight.dtype)


class MergedLinear(torch.autograd.Function):
    """
    x (N, d_in) → (N, d_out) through the masked weight W (Eq. 1): one product forward, two backward.
    With G = ∂L/∂W,

        ∂L/∂Δ = (r ⊗ c) ⊙ G        ∂L/∂r = (G ⊙ Δ) c        ∂L/∂c = (G ⊙ Δ)ᵀ r

    What is cheaper while many gates are open. Of the size of Δ only G is made on the way back.
    """

    @staticmethod
    def forward(ctx, x, W, delta, row, col, bias):
        ctx.save_for_backward(x, W, delta, row, col)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx, grad):
        x, W, delta, row, col = ctx.saved_tensors
        of_x, _, of_delta, of_gates, *_ = ctx.needs_input_grad
        grad_x = grad @ W if of_x else None
        grad_delta = grad_row = grad_col = None
        if of_delta or of_gates:
            G = (grad.t() @ x).to(row.dtype)                            # (d_out, d_in)
        if of_gates:
            G_delta = G * delta
            grad_row, grad_col = G_delta @ col, row @ G_delta                       # (d_out), (d_in)
        if of_delta:
            grad_delta = G.mul_(row[:, None]).mul_(col)
        return grad_x, None, grad_delta, grad_row, grad_col, None


class GatedActivations(torch.autograd.Function):
    """
    The same by gating activations, W_b x + r ⊙ Δ(c ⊙ x) (Eq. 9, 10 and 16–20; equal to Eq. 1 by
    11–15 and 21–25): of Δ only the open block R × C is read. With y the gradient of the output,

        ∂L/∂c = Σ_N x ⊙ Δᵀ(r ⊙ y)        ∂L/∂r = Σ_N y ⊙ Δ(c ⊙ x)        ∂L/∂Δ = (r ⊙ y)(c ⊙ x)ᵀ

    need no more than the open rows of Δ, its open columns, and the block: shut gates have their
    straight-through gradient too. What is cheaper once few gates are open.
    """

    @staticmethod
    def forward(ctx, x, weight, delta, row, col, bias, R, C):
        row, col = row.to(x.dtype), col.to(x.dtype)
        ctx.save_for_backward(x, weight, delta, row, col, R, C)
        block = delta.index_select(0, R).index_select(1, C)                         # (|R|, |C|)
        x_open = x.index_select(1, C) * col[C]                                      # (N, |C|)
        change = x_open @ block.to(x.dtype).t() * row[R]                            # (N, |R|)
        return F.linear(x, weight, bias).index_add_(1, R, change)

    @staticmethod
    def backward(ctx, grad):
        x, weight, delta, row, col, R, C = ctx.saved_tensors
        of_x, _, of_delta, of_gates, *_ = ctx.needs_input_grad
        x_open = x.index_select(1, C) * col[C]                                      # (N, |C|)
        y_open = grad.index_select(1, R) * row[R]                                   # (N, |R|)
        grad_delta = grad_row = grad_col = None
        back = y_open @ delta.index_select(0, R).to(x.dtype)                        # (N, d_in)
        if of_gates:
            columns = delta.index_select(1, C).to(x.dtype)                          # (d_out, |C|)
            grad_col = (x * back).sum(0, dtype=delta.dtype)                         # (d_in)
            grad_row = (grad * (x_open @ columns.t())).sum(0, dtype=delta.dtype)    # (d_out)
        grad_x = torch.addcmul(grad @ weight, back, col) if of_x else None
        if of_delta:
            block = y_open.t() @ x_open
            grad_delta = torch.zeros_like(delta)
            grad_delta[R[:, None], C] = block.to(delta.dtype)
        return grad_x, None, grad_delta, grad_row, grad_col, None, None, None


# ---- the carrier

class Carrier(nn.Module):
    """
    Gate logits `logits` (L, gates a layer) and deltas `delta[l][name]` (d_out, d_in) for a model of
    this `config`. Starts with Δ = 0 and every gate open. Deltas keep their own dtype (fp32 by
    default): steps of 2e-5 survive there.
    """

    def __init__(self, config, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.config, self.sizes = config, group_sizes(config)
        gates = config.num_hidden_layers, sum(self.sizes.values())
        logits = torch.ones(gates, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.logits = nn.Parameter(logits)
        lengths = {**self.sizes, "attn_v_wide": self.sizes["attn_q"]}
        self.delta = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            deltas = {}
            for name, (row, col) in PROJECTIONS.items():
                deltas[name] = torch.zeros(lengths[row], lengths[col], dtype=dtype, device=device)
            self.delta.append(nn.ParameterDict(deltas))     # sorted by name

    @torch.no_grad()
    def init_gates(self, mean, std, seed=0):
        """m ~ N(mean, std): with 1.5 and 0.5 (released) 99.9 % of the gates are open at the start."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.logits.shape, generator=generator)
        self.logits.copy_(mean + std * noise)
        return self

    # -- which gate is where

    def by_group(self, gates):
        """
        (L, gates a layer) → {group: (L, length)}, and `attn_v_wide`: attn_v repeated for the query
        heads of each value head, as o_proj reads them.
        """
        c = self.config
        groups = dict(zip(GROUPS, gates.split(list(self.sizes.values()), dim=1)))
        v = groups["attn_v"].unflatten(1, (-1, c.head_dim))                         # (L, K, h)
        queries = c.num_attention_heads // c.num_key_value_heads
        groups["attn_v_wide"] = v.repeat_interleave(queries, dim=1).flatten(1)      # (L, d_q)
        return groups

    def projections(self, gates):
        """Yield (l, name, row (d_out), col (d_in)) of every projection, of (L, gates a layer)."""
        groups = self.by_group(gates)
        for l in range(len(gates)):
            for name, (row, col) in PROJECTIONS.items():
                yield l, name, groups[row][l], groups[col][l]

    @torch.no_grad()
    def open_channels(self):
        """
        {(l, name): (R, C)} as indices, for the projections of which few gates are open; open
        channels first, then shut ones, whose gates are 0 anyway, up to a multiple of LANES.
        """
        channels, result = {}, {}
        for group, gates in self.by_group(self.logits > 0).items():
            order = gates.byte().argsort(dim=1, descending=True, stable=True)       # (L, length)
            counts = (gates.sum(1) + LANES - 1) // LANES * LANES                    # (L)
            channels[group] = [row[:n] for row, n in zip(order, counts.tolist())]
        for l, deltas in enumerate(self.delta):
            for name, (row, col) in PROJECTIONS.items():
                R, C = channels[row][l], channels[col][l]
                d_out, d_in = deltas[name].shape
                if len(R) / d_out + len(C) / d_in < SPARSE_BELOW:
                    result[l, name] = R, C
        return result

    # -- in the forward pass

    def gates(self):
        """{(l, name): (r, c)}, 0 or 1; their gradient is the straight-through one (Eq. 26, 27)."""
        gates = Heaviside.apply(self.logits)
        return {(l, name): (row, col) for l, name, row, col in self.projections(gates)}

    def bind(self, net):
        """linear(l, name, x), every projection of one forward pass, with this carrier."""
        return Step(self).bind(net)

    def changes(self):
        """
        change(l, name, x): r ⊙ Δ(c ⊙ x), what the carrier adds to a projection's output (Eq. 9).
        """
        gates = self.gates()

        def change(l, name, x):
            row, col = gates[l, name]
            delta = self.delta[l][name].to(x.dtype)
            return F.linear(x * col.to(x.dtype), delta) * row.to(x.dtype)
        return change

    @torch.no_grad()
    def merge(self, net, scale=1.0):
        """
        Frozen weights W_b + s·(r ⊗ c) ⊙ Δ of every projection as a Merged. The base stays as it is.
        """
        weights = {}
        for (l, name), gates in self.gates().items():
            weight, delta = net.projections[l][name].weight, self.delta[l][name]
            weights[l, name] = masked_weight(weight, delta, *gates, scale)
        return Merged(weights)

    # -- what it says of itself

    @torch.no_grad()
    def stats(self):
        """
        {"gates": {total, open}, sparsity, entries_off}: the share of gates that are off, and that
        of the entries of Δ, 1 − Σ |R||C| / Σ d_out·d_in.
        """
        total, opened = self.logits.numel(), int((self.logits > 0).sum())
        on = entries = 0
        for l, name, row, col in self.projections(self.logits > 0):
            on = on + row.sum() * col.sum()
            entries += self.delta[l][name].numel()
        return {"gates": {"total": total, "open": opened},
                "sparsity": 1 - opened / total,
                "entries_off": 1 - float(on) / entries}

    @torch.no_grad()
    def write_channels(self):
        """C_l = {i : ffn_write_i open} ∪ {i : attn_write_i open} (Eq. 5): bool (L, d)."""
        groups = self.by_group(self.logits > 0)
        return groups["ffn_write"] | groups["attn_write"]

    def with_gates(self, value):
        """The same deltas with every gate open (True) or shut (False)."""
        other = copy.copy(self)
        logits = torch.full_like(self.logits, 1.0 if value else -1.0)
        other._parameters = {"logits": nn.Parameter(logits)}
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
        Write a carrier's file: the logits, rounded to bf16, which keeps their signs; Δ at the
        entries of which both gates are open; and in the header the base that it belongs to,
        stats(), and metadata (JSON values).
        """
        tensors = {"logits": self.logits.to(torch.bfloat16)}
        for l, name, delta, R, C in self.open_blocks():
            tensors[f"delta.{l}.{name}"] = delta[R[:, None], C]
        header = {"format": FORMAT, "base": base_fingerprint(net), "content": digest(tensors)}
        save_tensors(path, tensors, **header, **self.stats(), **metadata)


class Step:
    """
    A carrier within one optimizer step, in its place: which channels are open, and the merged
    weights, follow from gates and deltas alone, so several micro-batches share them. After the
    optimizer has moved either, a new one is needed.
    """

    def __init__(self, carrier):
        self.carrier, self.merged = carrier, {}
        self.open = carrier.open_channels()

    def bind(self, net):
        """linear(l, name, x) for one forward pass: whichever of the two ways is cheaper."""
        gates = self.carrier.gates()

        def linear(l, name, x):
            at, base, delta = (l, name), net.projections[l][name], self.carrier.delta[l][name]
            parts = delta, *gates[at], base.bias
            if at in self.open:
                return GatedActivations.apply(x, base.weight, *parts, *self.open[at])
            if at not in self.merged:
                self.merged[at] = masked_weight(base.weight, delta, *gates[at])
            return MergedLinear.apply(x, self.merged[at], *parts)
        return linear


class Merged:
    """Frozen merged weights, {(l, name): (d_out, d_in)}, in the place of a carrier."""

    def __init__(self, weights):
        self.weights = weights

    def bind(self, net):
        """linear(l, name, x) by these weights."""
        def linear(l, name, x):
            return F.linear(x, self.weights[l, name], net.projections[l][name].bias)
        return linear

    def changes(self):
        """Raises InputError: Δ is no longer apart."""
        raise InputError("a merged carrier has no change apart: give the Carrier itself")


# ---- out of a file

def base_fingerprint(net):
    """A short hash of a carrier's base, the same in every precision of a checkpoint."""
    if not hasattr(net, "fingerprint"):
        net.fingerprint = digest(net.state_dict(), torch.bfloat16)
    return net.fingerprint


@torch.no_grad()
def load(path, net, dtype=None):
    """
    The carrier in `path`, on the base `net`; Δ in `dtype` (None: as in the file). Raises InputError
    if it was made on another base, or is damaged or of another format.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != FORMAT or header["content"] != digest(tensors):
        raise InputError(f"{path}: is no carrier of format {FORMAT}, or damaged; write it again")
    if header["base"] != base_fingerprint(net):
        raise InputError(f"{path}: this carrier was made on another base model; load the one that "
                         "its config.json names")
    logits = tensors.pop("logits")
    stored = [t.dtype for t in tensors.values()] or [torch.float32]
    carrier = Carrier(net.config, dtype or stored[0], net.device)
    carrier.logits.copy_(logits)
    for l, name, delta, R, C in carrier.open_blocks():
        delta[R[:, None], C] = tensors[f"delta.{l}.{name}"].to(delta)
    return carrier
