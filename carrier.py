"""
The carrier: weight deltas and binary gates beside a base model that is never changed (Sec. 3.1).

    W = W_b + M ⊙ Δ,  M = r ⊗ c     Eq. 1, 2: r gates the rows (outputs) of Δ, c its columns

A forward pass takes one of three: a Carrier, which is Eq. 1 as it stands and autograd; a Step, the
same made fast for one optimizer step; a Merged, frozen weights W.
Each has bind(net), which returns linear(l, name, x): what stands in for the base's projections.

Shapes: L layers, d hidden size, d_q = heads·head_dim, d_kv = key/value heads·head_dim, f = d_ff;
N tokens. R and C index a projection's open rows and open columns.
"""
from common import InputError, digest, load_tensors, save_tensors
import copy
import functools

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
AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}     # weights merged in one go: every call has its cost


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


# ---- the gated linear layer: the definition, and a cheaper way for few open gates

def masked_weight(weight, delta, row, col, scale=1.0):
    """
    W_b + s·(r ⊗ c) ⊙ Δ (Eq. 1, 2): the definition. weight, delta (…, d_out, d_in), row (…, d_out),
    col (…, d_in). Rounded once, to the weight's dtype.
    """
    change = delta.to(torch.promote_types(delta.dtype, weight.dtype)) * (scale * row).unsqueeze(-1)
    return change.mul_(col.unsqueeze(-2)).add_(weight).to(weight.dtype)


class GatedActivations(torch.autograd.Function):
    """
    x (N, d_in) → (N, d_out) by gating activations, W_b x + r ⊙ Δ(c ⊙ x) (Eq. 9, 10 and 16–20; equal
    to Eq. 1 by 11–15 and 21–25): of Δ only the open block is used. `into` (d_out, |C|) is r ⊙ Δ ⊙ c
    at the open columns, `back` (|R|, d_in) at the open rows.

    `rows`, `cols` and `block`, Δ at R, at C and at R × C, are there for their gradient: ∂L/∂W, with
    the gates not yet on it, in these places. Shut gates have their straight-through gradient there.
    """

    @staticmethod
    def forward(ctx, weight, bias, into, back, R, C, rows, cols, block, x):
        x_open = x.index_select(1, C)                                               # (N, |C|)
        ctx.save_for_backward(x, x_open, weight, R, back)
        return F.linear(x, weight, bias).addmm_(x_open, into.t())

    @staticmethod
    def backward(ctx, grad):
        x, x_open, weight, R, back = ctx.saved_tensors
        *_, of_rows, of_cols, of_block, of_x = ctx.needs_input_grad
        y_open = grad.index_select(1, R)                                            # (N, |R|)
        grad_x = (grad @ weight).addmm_(y_open, back) if of_x else None
        grad_rows = y_open.t() @ x if of_rows else None                             # (|R|, d_in)
        grad_cols = grad.t() @ x_open if of_cols else None                          # (d_out, |C|)
        grad_block = y_open.t() @ x_open if of_block else None                      # (|R|, |C|)
        return *[None] * 6, grad_rows, grad_cols, grad_block, grad_x


# ---- the carrier

class Carrier(nn.Module):
    """
    Gate logits `logits` (L, gates a layer) and deltas `delta[name]` (L, d_out, d_in) for a model of
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
        self.delta = nn.ParameterDict()
        for name, (row, col) in PROJECTIONS.items():
            shape = config.num_hidden_layers, lengths[row], lengths[col]
            self.delta[name] = torch.zeros(shape, dtype=dtype, device=device)

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
        """{name: (r (L, d_out), c (L, d_in))} of every projection, of (L, gates a layer)."""
        groups = self.by_group(gates)
        return {name: (groups[row], groups[col]) for name, (row, col) in PROJECTIONS.items()}

    # -- in the forward pass

    def gates(self):
        """projections(), 0 or 1; their gradient is the straight-through one (Eq. 26, 27)."""
        return self.projections(Heaviside.apply(self.logits))

    def each(self):
        """{(l, name): (Δ, r, c)}, and autograd knows where they come from."""
        return {(l, name): parts for name, gates in self.gates().items()
                for l, parts in enumerate(zip(self.delta[name], *gates))}

    def bind(self, net):
        """
        linear(l, name, x), every projection of one forward pass: Eq. 1 as it stands, and autograd.
        """
        parts = self.each()

        def linear(l, name, x):
            base = net.projections[l][name]
            return F.linear(x, masked_weight(base.weight, *parts[l, name]), base.bias)
        return linear

    def changes(self):
        """
        change(l, name, x): r ⊙ Δ(c ⊙ x), what the carrier adds to a projection's output (Eq. 9).
        """
        parts = self.each()

        def change(l, name, x):
            delta, row, col = (part.to(x.dtype) for part in parts[l, name])
            return F.linear(x * col, delta) * row
        return change

    @torch.no_grad()
    def merge(self, net, scale=1.0):
        """
        Frozen weights W_b + s·(r ⊗ c) ⊙ Δ of every projection as a Merged. The base stays as it is.
        """
        return Merged({(l, name): masked_weight(net.projections[l][name].weight, *parts, scale)
                       for (l, name), parts in self.each().items()})

    # -- what it says of itself

    @torch.no_grad()
    def stats(self):
        """
        {"gates": {total, open}, sparsity, entries_off}: the share of gates that are off, and that
        of the entries of Δ, 1 − Σ |R||C| / Σ d_out·d_in.
        """
        total, opened = self.logits.numel(), int((self.logits > 0).sum())
        on = entries = 0
        for name, (row, col) in self.projections(self.logits > 0).items():
            on = on + (row.sum(1) * col.sum(1)).sum()
            entries += self.delta[name].numel()
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
        other, logit = copy.copy(self), 1.0 if value else -1.0
        other._parameters = {"logits": nn.Parameter(torch.full_like(self.logits, logit))}
        return other

    @torch.no_grad()
    def open_blocks(self):
        """Yield (l, name, Δ, R, C) of every projection in which an entry is on."""
        for (l, name), (delta, row, col) in self.each().items():
            R, C = row.nonzero().squeeze(1), col.nonzero().squeeze(1)
            if len(R) and len(C):
                yield l, name, delta, R, C

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


def open_channels(gates):
    """
    The open of gates (L, length), L index tensors: open channels first, then shut ones, whose gates
    are 0 anyway, up to a multiple of LANES.
    """
    order = gates.byte().argsort(dim=1, descending=True, stable=True)               # (L, length)
    counts = (gates.sum(1).int() + LANES - 1) // LANES * LANES                      # (L)
    return [row[:n] for row, n in zip(order, counts.tolist())]


class Step:
    """
    A carrier within one optimizer step, in its place. What the forward pass takes follows from gates
    and deltas alone, so all micro-batches share it. So does the way back through Eq. 1: `delta.grad`
    gathers G = ∂L/∂W, and then finish() makes of it

        ∂L/∂Δ = (r ⊗ c) ⊙ G        ∂L/∂r = (G ⊙ Δ) c        ∂L/∂c = (G ⊙ Δ)ᵀ r

    After the optimizer has moved gates or deltas, a new one is needed.
    """

    def __init__(self, carrier, net):
        """Merges weights, or gathers what is open of Δ, whichever is cheaper."""
        self.carrier, self.gates = carrier, carrier.gates()
        self.linears, self.merged, self.gated = {}, [], {}
        for name in self.gates:
            self.prepare(name, carrier.delta[name], [layer[name] for layer in net.projections])

    @torch.no_grad()
    def prepare(self, name, delta, base):
        """Projection `name` of all layers: Δ (L, d_out, d_in) and `base`, L nn.Linear."""
        delta.grad = torch.zeros_like(delta) if delta.grad is None else delta.grad.zero_()
        size = max(1, AT_ONCE[delta.device.type] // delta[0].numel())
        all_of = tuple(map(range, delta[0].shape))      # layers merged in one go are not looked at
        channels = zip(*map(open_channels, self.gates[name])) if size == 1 else [all_of] * len(base)
        for l, (R, C) in list(enumerate(channels))[::size]:
            if len(R) / delta.shape[1] + len(C) / delta.shape[2] < SPARSE_BELOW:
                self.gather(name, l, base[l], R, C)
            else:
                self.merge(name, slice(l, l + size), base)

    def merge(self, name, ls, base):
        """Projection `name` of the layers `ls`, a slice, by masked weights."""
        delta, gates = self.carrier.delta[name], (g[ls] for g in self.gates[name])
        weights = [layer.weight for layer in base[ls]]
        weight = torch.stack(weights) if len(weights) > 1 else weights[0][None]     # (…, d_out, d_in)
        self.merged.append((name, ls))
        for l, W in enumerate(masked_weight(weight, delta[ls], *gates).unbind(), ls.start):
            hook = functools.partial(gather_gradient, delta.grad[l])
            W.requires_grad_().register_post_accumulate_grad_hook(hook)
            self.linears[l, name] = functools.partial(F.linear, weight=W, bias=base[l].bias)

    def gather(self, name, l, base, R, C):
        """Projection `name` of layer l by GatedActivations."""
        delta, (row, col) = self.carrier.delta[name][l], (g[l] for g in self.gates[name])
        rows, cols = (delta.index_select(dim, at).to(row) for dim, at in enumerate((R, C)))
        block = rows.index_select(1, C)
        into = (row[:, None] * cols * col[C]).to(base.weight.dtype)                 # (d_out, |C|)
        back = (row[R, None] * rows * col).to(base.weight.dtype)                    # (|R|, d_in)
        for leaf in (rows, cols) if self.carrier.logits.requires_grad else (block,):
            leaf.requires_grad_()
        parts = self.gated[l, name] = R, C, rows, cols, block
        fixed = base.weight, base.bias, into, back
        self.linears[l, name] = functools.partial(GatedActivations.apply, *fixed, *parts)

    def bind(self, net):
        """linear(l, name, x), every projection of one forward pass."""
        return lambda l, name, x: self.linears[l, name](x)

    @torch.no_grad()
    def finish(self):
        """After the backward passes: their gradients by Δ and, added up, by m into .grad."""
        of_gates = self.carrier.logits.requires_grad
        grads = {name: [torch.zeros_like(g) for g in gates] for name, gates in self.gates.items()}
        for (l, name), (R, C, rows, cols, block) in self.gated.items():
            delta, (row, col) = self.carrier.delta[name], (g[l] for g in self.gates[name])
            if of_gates:
                grads[name][0][l] = (cols.grad * cols) @ col[C]
                grads[name][1][l] = row[R] @ (rows.grad * rows)
            G = rows.grad.index_select(1, C) if of_gates else block.grad            # (|R|, |C|)
            delta.grad[l, R[:, None], C] = (row[R, None] * G * col[C]).to(delta)
        for name, ls in self.merged:
            delta, (row, col) = self.carrier.delta[name], (g[ls] for g in self.gates[name])
            G = delta.grad[ls]                                                      # (…, d_out, d_in)
            if of_gates:
                G_delta = G.to(row) * delta[ls]
                grads[name][0][ls] = (G_delta @ col[..., None])[..., 0]
                grads[name][1][ls] = (row[..., None, :] @ G_delta)[..., 0, :]
            G.mul_(row[..., None]).mul_(col[..., None, :])
        if of_gates:
            torch.autograd.backward(sum(self.gates.values(), ()), sum(grads.values(), []))


def gather_gradient(G, W):
    """Add ∂L/∂W to G as soon as it is there, and keep it nowhere else."""
    G.add_(W.grad)
    W.grad = None


class Merged:
    """Frozen merged weights, {(l, name): (d_out, d_in)}, in the place of a carrier."""

    def __init__(self, weights):
        self.weights = weights

    def bind(self, net):
        """linear(l, name, x) by these weights."""
        return lambda l, name, x: F.linear(x, self.weights[l, name], net.projections[l][name].bias)

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
