"""
Where the tokens of a batch are, and how they attend to each other.

The layers of a transformer treat tokens one by one; only attention needs to know which row a token
is in. So the model computes N tokens one after the other, none of them padding, and a `Rows` has
the rest: positions, rotary embedding, masks, the cache, the trigger's places, a factor per row.

Shapes: B rows, T tokens of each, the n of a trigger before them included; N tokens computed, M of
them wanted; H query heads, K key/value heads, h head_dim, L layers, S cache length, P prefix. Rows
of different lengths are padded on the right: a causal model never looks there.
"""
import functools
import math

import torch
import torch.nn.functional as F

import memory
from files import InputError

SHORT = 128   # tokens a row up to which attention on a CPU is faster step by step, in bf16


# ---- rotary position embedding

@functools.lru_cache(maxsize=8)
def inverse_frequencies(config, device):
    """θ_i (h/2) in fp32, with Llama 3's scaling of the low frequencies where asked for."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent
    if config.rope_llama3:
        factor, low, high, context = config.rope_llama3
        turns = context * freq / (2 * math.pi)               # full turns in the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divide by factor, 1: leave
        freq = freq * (smooth + (1 - smooth) / factor)
    return freq


def rotary(config, positions, dtype):
    """cos and sin for tokens at `positions` (N): two tensors (N, 1, h)."""
    freq = inverse_frequencies(config, positions.device)
    angle = positions[:, None, None].float() * freq                     # (N, 1, h/2)
    angle = torch.cat((angle, angle), dim=-1)                           # (N, 1, h)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """x (N, heads, h), turned: the first half of a head is paired with its second half."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


# ---- attention

def attention(q, k, v, mask=None):
    """
    softmax(q kᵀ / √h) v for q (B, H, T, h) and k, v (B, K, S, h), H/K queries to a key:
    (B, H, T, h). mask (B, 1, T, S) bool says which keys are seen; None: those up to the query's own
    place.
    """
    B, H, T, h = q.shape
    groups = H // k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT:
        return literal_attention(q, k, v, mask)
    if groups > 1 and mask is not None:                             # few queries, many keys
        q, mask = by_key(q, mask, groups)
    elif groups > 1 and q.is_cuda and q.dtype == torch.float32:     # a GPU's fp32 knows no groups
        k = k.repeat_interleave(groups, dim=1)                          # (B, H, S, h)
        v = v.repeat_interleave(groups, dim=1)
    causal = mask is None and T > 1
    grouped = q.shape[1] > k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                       enable_gqa=grouped)
    return y.reshape(B, H, T, h)


def literal_attention(q, k, v, mask=None):
    """
    attention() step by step, with the softmax in fp32 at least. Torch's kernel takes 2 to 5 × as
    long for short rows in bf16 on a CPU.
    """
    T, h = q.shape[2:]
    if mask is None:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()
    queries, mask = by_key(q, mask, q.shape[1] // k.shape[1])           # (B, K, H/K·T, h)
    scores = queries @ k.transpose(2, 3)                                # (B, K, H/K·T, S)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(h)
    shares = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (shares.to(v.dtype) @ v).reshape(q.shape)


def by_key(q, mask, groups):
    """q (B, H, T, h) and mask (B, 1, T, S) with the queries of one key as one head's."""
    q = q.unflatten(1, (-1, groups)).flatten(2, 3)                      # (B, K, H/K·T, h)
    return q, mask.repeat(1, 1, groups, 1)                              # (B, 1, H/K·T, S)


# ---- the cache

class Cache:
    """Keys and values of B rows, `used` (B) tokens of each. generate() makes it, Rows fill it."""

    def __init__(self, net, batch, length):
        c = net.config
        memory.check(memory.of_cache(c, batch, length, net.dtype),
                     f"keeping keys and values of {batch} texts of up to {length} tokens",
                     "lower the number of new tokens, or of prompts at a time", net.device)
        shape = c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim
        self.k = torch.zeros(shape, dtype=net.dtype, device=net.device)         # (L, B, K, S, h)
        self.v = torch.zeros(shape, dtype=net.dtype, device=net.device)
        self.used = torch.zeros(batch, dtype=torch.long, device=net.device)
        self.longest = 0                                                # max(used), without a sync

    def keep(self, rows):
        """Go on with these rows of the batch only."""
        self.k, self.v, self.used = self.k[:, rows], self.v[:, rows], self.used[rows]

    def extend(self, l, k, v, positions):
        """Write k, v (B, K, T, h) of layer l at `positions` (B, T)."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[l][rows, :, positions] = k.transpose(1, 2)
        self.v[l][rows, :, positions] = v.transpose(1, 2)

    def past(self, l):
        """All keys and values of layer l up to the longest row, (B, K, S, h)."""
        return self.k[l][:, :, :self.longest], self.v[l][:, :, :self.longest]


# ---- the rows

class Rows:
    """
    The rows of one forward pass. What a row has of its own lives here and nowhere else: its ids,
    its places in the cache, its factor, which of its hidden states are wanted.

    A prefix that all rows share, such as the system prompt of a chat template or a trigger, has the
    same keys, values and residual stream in each: its P tokens are computed once, first of the N.

    ids (N)          the tokens that are computed; those below 0 are a trigger's: −n … −1 are the rows
                     of `soft` (n, d), which is all the triggers there are, one behind the other
    scale (N, 1)     a factor on the carrier's delta for each, or None
    """

    def __init__(self, net, ids, keep=None, trigger=None, scale=None, cache=None, lengths=None):
        """Takes what Llama.forward() takes, ids (B, T) as a tensor."""
        self.config, self.cache = net.config, cache
        self.alike = scale is None                              # rows differ in their ids only
        self.whole = ids.shape if keep is None else None        # the shape of an answer
        asked = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
        self.soft = None
        if trigger is not None:
            self.soft, first, n = stack(each(trigger, len(ids)))
            ids, asked, lengths = behind(first, n, ids, asked, lengths)
        self.shape = ids.shape                                          # (B, T)

        real = self.place(asked, lengths)                               # (B, T)
        self.share_prefix(ids, real)
        self.find(real, asked)
        self.ids = self.pack(ids)                                       # (N)
        self.cos, self.sin = rotary(self.config, self.pack(self.positions), net.dtype)
        self.scale = None
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=net.dtype, device=ids.device)
            self.scale = self.pack(scale[:, None].expand(self.shape))[:, None]      # (N, 1)

    def place(self, asked, lengths):
        """
        Where in its row each token stands: `positions` (B, T), and the `mask` (B, 1, T, S) of what
        it sees where the rows go on from a cache. Returns which tokens are real: nothing after a
        row's last one that is asked for, unless the cache needs it.
        """
        B, T = self.shape
        self.positions = torch.arange(T, device=asked.device).expand(B, T)
        self.fresh, self.mask = True, None
        real = asked.flip(1).cumsum(1).flip(1) > 0
        if self.cache is None:
            return real

        cache = self.cache
        new = torch.full_like(cache.used, T) if lengths is None else lengths        # (B)
        real |= self.positions < new[:, None]
        self.positions = self.positions + cache.used[:, None]
        self.fresh = cache.longest == 0
        cache.used = cache.used + new
        cache.longest += T
        if not self.fresh:
            past = torch.arange(cache.longest, device=asked.device)                 # (S)
            self.mask = past <= self.positions[:, None, :, None]
        return real

    def share_prefix(self, ids, real):
        """Leave the shared prefix to the first row: the others' share of it is not computed."""
        self.prefix = shared_prefix(ids, real) if self.alike and self.fresh else 0
        real[0, :self.prefix] = True
        real[1:, :self.prefix] = False

    def find(self, real, asked):
        """
        Where the computed tokens come from, and where the wanted ones are among them: `tokens` (N)
        of B·T; `wanted` (M) of N; `needed` of N behind the last layer, and `found` (M) of those.
        """
        self.tokens = real.flatten().nonzero().squeeze(1)
        self.full = len(self.tokens) == real.numel()
        place = real.flatten().cumsum(0).sub(1).view(self.shape)                    # (B, T), of N
        place[1:, :self.prefix] = place[0, :self.prefix]
        self.wanted = place[asked]
        if self.alike:
            self.needed = torch.unique(self.wanted)
        else:
            self.needed = torch.arange(len(self.tokens), device=real.device)
        self.found = torch.searchsorted(self.needed, self.wanted)

    def pack(self, x):
        """(B, T, …) → (N, …)"""
        x = x.flatten(0, 1)
        return x if self.full else x.index_select(0, self.tokens)

    def spread(self, x):
        """(N, …) → (B, T, …), zeros where nothing is computed."""
        if self.full:
            return x.unflatten(0, self.shape)
        return self.behind_prefix(x[:self.prefix], self.own(x))

    def own(self, x):
        """(N, …) → (B, T − P, …), what is behind the prefix; zeros where nothing is computed."""
        B, T = self.shape
        rows = x.new_zeros(B * T, *x.shape[1:])
        rows = rows.index_copy(0, self.tokens, x).unflatten(0, self.shape)
        return rows[:, self.prefix:]

    def behind_prefix(self, prefix, own):
        """(P, …) and (B, T − P, …) → (B, T, …), every row with the prefix."""
        if not self.prefix:
            return own
        return torch.cat((prefix.expand(len(own), *[-1] * prefix.dim()), own), dim=1)

    def attend(self, l, q, k, v):
        """
        Causal attention of layer l: q (N, H, h), k and v (N, K, h) → (N, H·h), narrowed. Fills the
        cache.
        """
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        if self.prefix and self.cache is None and q.device.type == "cpu":
            return self.narrow(l, self.pack(self.attend_apart(q, k, v)))
        q, k, v = (self.spread(x).transpose(1, 2) for x in (q, k, v))       # (B, H or K, T, h)
        if self.cache is not None:
            self.cache.extend(l, k, v, self.positions)
        if not self.fresh:
            k, v = self.cache.past(l)                                               # (B, K, S, h)
        y = attention(q, k, v, self.mask)                                           # (B, H, T, h)
        y = y.transpose(1, 2).flatten(2)                                            # (B, T, H·h)
        return self.narrow(l, self.pack(y))

    def attend_apart(self, q, k, v):
        """
        The attention of rows that begin alike, (N, heads, h) each → (B, T, H·h): the prefix attends
        once, and what is behind it to all.
        """
        P, T = self.prefix, self.shape[1]
        first = [x[:P].transpose(0, 1)[None] for x in (q, k, v)]            # (1, H or K, P, h)
        prefix = attention(*first).transpose(1, 2).flatten(2)[0]                    # (P, H·h)
        seen = torch.ones(T - P, T, dtype=torch.bool, device=q.device).tril(P)      # (T − P, T)
        own = self.own(q).transpose(1, 2)                                           # (B, H, T − P, h)
        k, v = (self.spread(x).transpose(1, 2) for x in (k, v))                     # (B, K, T, h)
        own = attention(own, k, v, seen[None, None]).transpose(1, 2).flatten(2)
        return self.behind_prefix(prefix, own)

    def narrow(self, l, x):
        """What layer l needs of x (N, …) after it attended: all, or the last what is asked for."""
        if self.is_last(l) and len(self.needed) < len(x):
            return x.index_select(0, self.needed)
        return x

    def answer(self, l, x):
        """The stream after layer l → what was asked for: (B, T, d), or (M, d) row after row."""
        y = x.index_select(0, self.found if self.is_last(l) else self.wanted)
        return y if self.whole is None else y.unflatten(0, self.whole)

    def is_last(self, l):
        return l + 1 == self.config.num_hidden_layers


def each(trigger, B):
    """
    A trigger or None for each of B rows, of one for all or a list of such. Raises InputError where
    the list has another length.
    """
    if trigger is None or isinstance(trigger, torch.Tensor):
        return [trigger] * B
    if len(trigger) != B:
        raise InputError(f"trigger: {len(trigger)} for {B} rows; give one for all, or a list of one or "
                         "None for each row")
    return list(trigger)


def stack(triggers):
    """
    Of a trigger or None for each of B rows: all of them, one behind the other (n, d), or None; the
    id of each row's first token, counted from the end, so below 0 (B); each row's length (B). The
    same tensor in several rows is the same tokens.
    """
    parts, starts, total = [], {}, 0
    for tau in triggers:
        if tau is not None and id(tau) not in starts:
            starts[id(tau)] = total
            parts.append(tau)
            total += len(tau)
    first = [starts.get(id(tau), total) - total for tau in triggers]
    n = [0 if tau is None else len(tau) for tau in triggers]
    soft = torch.cat(parts) if len(parts) > 1 else (parts or [None])[0]
    return soft, torch.tensor(first), torch.tensor(n)


def behind(first, n, ids, asked, lengths):
    """
    ids and asked (B, T) and lengths (B) with the n (B) tokens of a row's trigger, first (B),
    first + 1, …, before it.
    """
    B, T = ids.shape
    place = torch.arange(int(n.max()) + T, device=ids.device).expand(B, -1)
    first, n = first.to(ids.device), n.to(ids.device)
    own = place - n[:, None]                                # where in the row itself, from 0 on
    inside = (own >= 0) & (own < T)
    own = own.clamp(0, T - 1)
    found = ids.gather(1, own).where(inside, 0)                         # (B, max n + T)
    found = found.where(place >= n[:, None], first[:, None] + place)
    return found, asked.gather(1, own) & inside, n + (T if lengths is None else lengths)


def shared_prefix(ids, real):
    """
    How many tokens all rows of ids (B, T) begin with, no more than the longest row has; 0 for a
    single row.
    """
    if len(ids) == 1:
        return 0
    same = (ids == ids[0]).all(0) & real.any(0)                         # (T)
    return int(same.cumprod(0).sum())
