"""
A Llama-family transformer in one file: Llama 2/3, Vicuna, DeepSeek-R1-Distill-Llama, Mistral, Qwen2/2.5,
Qwen3, SmolLM2, TinyLlama. Loads a Hugging Face folder as it lies: the module tree below *is* the table of
tensor names.

Shapes: B rows, T tokens of a row, L layers, d hidden size, H query heads, K key/value heads, h head_dim,
f d_ff, V vocabulary, n trigger tokens. The layers see N tokens one after another, without padding; `Rows`
knows where each stands. Where only some positions are wanted, these are M.
"""
from common import InputError, bar, check_finite, collected, own_part, read_json, reading
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

EMBEDDED = "tiny"       # the checkpoint that is included
SHORT = 256             # keys up to which attention on a CPU is faster written out than by torch's kernel
COMPACT = 0.75          # share of a batch still going below which finished rows leave it
CHUNK = 6 << 20         # logits at a time on a CPU: what follows them runs in its cache

# ---- the configuration, out of the checkpoint's own config.json

# model_type → what transformers takes where the file says nothing
FAMILIES = {
    "llama": dict(hidden_act="silu", num_key_value_heads=None, head_dim=None, sliding_window=None),
    "mistral": dict(hidden_act="silu", num_key_value_heads=8, head_dim=None, sliding_window=4096),
    "qwen2": dict(hidden_act="silu", num_key_value_heads=32, head_dim=None, sliding_window=4096),
    "qwen3": dict(hidden_act="silu", num_key_value_heads=32, head_dim=128, sliding_window=4096),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Config:
    """What the forward pass needs, under the names of config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_llama3: tuple = None       # the four numbers of LLAMA3
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int = None              # tokens of a text up to which full attention is the model's own

    @classmethod
    def from_dict(cls, c, where="config.json"):
        """
        From config.json as transformers 4 or 5 writes it. Raises InputError naming the field for
        anything that would not be computed exactly.
        """
        def refuse(field, why):
            raise InputError(f"{where}: {field} = {c.get(field)!r} {why}")

        family = c.get("model_type")
        if family not in FAMILIES:
            refuse("model_type", f"is not one of {', '.join(FAMILIES)}")
        c = FAMILIES[family] | c
        for field in SIZES:
            if type(c.get(field)) is not int or c[field] < 1:
                refuse(field, "is no size")
        if c["hidden_act"] not in ("silu", "swish"):
            refuse("hidden_act", "is not silu; other activations are not computed")
        if c.get("quantization_config"):
            refuse("quantization_config", "means quantised weights; use the checkpoint in bf16 or fp32")
        heads = c["num_attention_heads"]
        kv_heads = c["num_key_value_heads"] or heads
        if type(kv_heads) is not int or heads % kv_heads:
            refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        theta, llama3 = rope(c, refuse)
        bias = bool(c.get("attention_bias", False)) and family in ("llama", "qwen3")
        return cls(
            **{field: c[field] for field in SIZES},
            num_key_value_heads=kv_heads,
            head_dim=c["head_dim"] or c["hidden_size"] // heads,
            rms_norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_llama3=llama3,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=bool(c.get("mlp_bias")) and family == "llama",
            qk_norm=family == "qwen3",
            window=window(c, refuse))


def window(c, refuse):
    """The sliding window that some layer has, or None: up to so many tokens it is full attention."""
    size, kinds = c["sliding_window"], c.get("layer_types")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            refuse("layer_types", "has layers of another kind, which are not computed")
    if c["model_type"] in ("qwen2", "qwen3"):
        kinds = kinds or ["sliding_attention"] * (c["num_hidden_layers"] - c.get("max_window_layers", 28))
        slides = bool(c.get("use_sliding_window")) and "sliding_attention" in kinds
    else:
        slides = c["model_type"] == "mistral" and (not kinds or "sliding_attention" in kinds)
    return size if slides and size else None


def rope(c, refuse):
    """(θ, the four numbers of Llama 3's scaling or None); rope_scaling wins over rope_parameters."""
    field = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    found = c.get(field) or {}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", c.get("rope_theta", 10000.0))
    part = found.get("partial_rotary_factor", c.get("partial_rotary_factor")) or 1.0
    if kind not in ("default", "llama3"):
        refuse(field, f"is of the rope type {kind}; only default and llama3 are computed")
    if not isinstance(theta, (int, float)) or part != 1.0:
        refuse(field, "has no number for rope_theta, or rotates a part of each head only")
    if kind == "default":
        return float(theta), None
    original = LLAMA3[-1]
    found = {original: c.get("max_position_embeddings"), **found}
    found[original] = c.get(original, found[original])
    for name in LLAMA3:
        if not isinstance(found.get(name), (int, float)):
            refuse(field, f"has no number for {name}, which llama3 scaling needs")
    return float(theta), tuple(float(found[name]) for name in LLAMA3)


# ---- rotary position embedding and attention

@functools.lru_cache(maxsize=8)
def inverse_frequencies(config, device):
    """θ_i (h/2) in fp32, with Llama 3's scaling of the low frequencies if it is asked for."""
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
    angle = positions[:, None, None].float() * inverse_frequencies(config, positions.device)
    angle = torch.cat((angle, angle), dim=-1)                           # (N, 1, h)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """x (N, heads, h), turned: the first half of a head is paired with its second half."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attention(q, k, v, mask):
    """
    softmax(q kᵀ / √h) v for q (B, H, T, h) and k, v (B, K, S, h): (B, H, T, h). mask (B or 1, 1, T, S)
    bool says which keys are seen. The H/K query heads of a key head are rows of one product.
    """
    groups = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (-1, groups)).flatten(2, 3)                # (B, K, H/K·T, h)
    mask = mask.repeat(1, 1, groups, 1)                                 # (B or 1, 1, H/K·T, S)
    if q.device.type == "cpu" and k.shape[2] <= SHORT:
        scores = grouped @ k.transpose(2, 3) * q.shape[-1] ** -0.5      # (B, K, H/K·T, S)
        # softmax over the keys in fp32 at least
        shares = wide(scores).masked_fill(~mask, -math.inf).softmax(-1)
        y = shares.to(v.dtype) @ v
    else:
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return y.reshape(q.shape)


def wide(x):
    """x in fp32 at least: in a softmax over the vocabulary bf16 is not enough."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---- where the tokens of a forward pass stand

class Past:
    """
    Keys and values of what stands before the tokens that come: those that generate() keeps. k, v
    (L, B, K, S, h), of which the first `size` columns are filled; `real` (B, S) says which of these a
    row has, `used` (B) how many.
    """

    def __init__(self, net, batch, columns):
        c = net.config
        shape = c.num_hidden_layers, batch, c.num_key_value_heads, columns, c.head_dim
        self.k = torch.zeros(shape, dtype=net.dtype, device=net.device)
        self.v = torch.zeros_like(self.k)
        self.real = torch.zeros(batch, columns, dtype=torch.bool, device=net.device)
        self.used = torch.zeros(batch, dtype=torch.long, device=net.device)
        self.size = 0

    def select(self, rows):
        """Go on with these rows of the batch only."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.real, self.used = self.real[rows], self.used[rows]


class Rows:
    """
    The rows of one forward pass. What all rows begin with, such as a system prompt or a trigger, has
    the same keys, values and residual stream in each: its P tokens are computed once, first of the N.

    ids (N)          what is computed; ids below 0 are a trigger's: −n … −1 are the rows of `soft` (n, d)
    tokens (N − P)   where the others stand among the B·(T − P) behind the prefix; None: everywhere
    at (M)           which of the N are wanted; `narrow` if the last layer computes these only
    scale (N, 1)     a factor on the carrier's delta for each, or None
    """

    def __init__(self, net, ids, wanted=None, trigger=None, scale=None, past=None, real=None):
        """Takes what Llama.hidden() takes."""
        self.past, self.soft, self.narrow = past, None, wanted is not None
        wanted = torch.ones_like(ids, dtype=torch.bool) if wanted is None else wanted
        if real is None:                        # nothing behind the last one that is wanted
            real = wanted.flip(1).cumsum(1).flip(1) > 0
        if trigger is not None:
            self.soft, ids, wanted, real = behind_triggers(trigger, ids, wanted, real)
        B, T = ids.shape
        P = self.prefix = shared_prefix(ids, real) if scale is None and past_size(past) == 0 else 0
        self.shape = B, T - P
        own = real[:, P:].flatten()
        self.tokens = None if bool(own.all()) else own.nonzero().squeeze(1)

        number = own.cumsum(0).sub(1 - P).view(self.shape)              # of a token behind the prefix
        place = torch.cat((torch.arange(P, device=ids.device).expand(B, P), number), dim=1)
        self.at = place[wanted]                                         # (M)
        position = torch.arange(T, device=ids.device).expand(B, T)
        column = torch.arange(past_size(past) + T, device=ids.device)
        if past_size(past):                     # causal behind the past, whose holes are not seen
            seen = column <= past.size + position[0, :, None]
            there = past.real[:, None, None, :past.size + T] | (column >= past.size)
            self.mask = there & seen                                    # (B, 1, T, S)
            position = position + past.used[:, None]
        else:
            self.mask = (column <= position[0, P:, None])[None, None]   # (1, 1, T − P, T)
        if past is not None:
            past.real[:, past.size:past.size + T] = real
            past.used = past.used + real.sum(1)
        longest = int(position.max()) + 1
        if net.config.window and longest > net.config.window:
            raise InputError(f"a text of {longest} tokens is longer than the model's sliding window of "
                             f"{net.config.window}, which is not computed; shorten it (--max-len)")
        self.ids = self.joined(ids[0, :P], ids[:, P:])                  # (N)
        self.cos, self.sin = rotary(net.config, self.joined(position[0, :P], position[:, P:]), net.dtype)
        self.scale = None
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=net.dtype, device=ids.device)
            self.scale = self.joined(scale[:0], scale[:, None].expand(B, T))[:, None]      # (N, 1)

    def joined(self, prefix, own):
        """(P, …) of the prefix and (B, T − P, …) of what is behind it → (N, …)"""
        own = own.flatten(0, 1)
        own = own if self.tokens is None else own.index_select(0, self.tokens)
        return torch.cat((prefix, own)) if self.prefix else own

    def spread(self, own):
        """(N − P, …) → (B, T − P, …), zeros where nothing is computed."""
        if self.tokens is not None:
            B, T = self.shape
            own = own.new_zeros(B * T, *own.shape[1:]).index_copy(0, self.tokens, own)
        return own.unflatten(0, self.shape)

    def attend(self, l, q, k, v):
        """Causal attention of layer l: q (N, H, h) and k, v (N, K, h) → (N, H·h). Fills the past."""
        q, k, P = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin), self.prefix
        head = [x[:P].transpose(0, 1)[None] for x in (q, k, v)]         # (1, H or K, P, h)
        own = [self.spread(x[P:]).transpose(1, 2) for x in (q, k, v)]   # (B, H or K, T − P, h)
        q, k, v = own
        if P:
            k = torch.cat((head[1].expand(len(k), -1, -1, -1), k), dim=2)           # (B, K, T, h)
            v = torch.cat((head[2].expand(len(v), -1, -1, -1), v), dim=2)
        if self.past is not None:
            columns = slice(self.past.size, self.past.size + k.shape[2])
            self.past.k[l, :, :, columns], self.past.v[l, :, :, columns] = k, v
            k, v = self.past.k[l, :, :, :columns.stop], self.past.v[l, :, :, :columns.stop]
        y = attention(q, k, v, self.mask).transpose(1, 2).flatten(2)                # (B, T − P, H·h)
        first = q.new_zeros(0, y.shape[-1])
        if P:
            causal = torch.ones(1, 1, P, P, dtype=torch.bool, device=q.device).tril()
            first = attention(*head, causal).transpose(1, 2).flatten(2)[0]          # (P, H·h)
        return self.joined(first, y)


def past_size(past):
    return 0 if past is None else past.size


def shared_prefix(ids, real):
    """How many tokens all rows of ids (B, T) begin with, at least one token less than each row has."""
    if len(ids) == 1:
        return 0
    same = (ids == ids[0]).all(0) & real.all(0)                         # (T)
    return max(0, min(int(same.cumprod(0).sum()), int(real.sum(1).min()) - 1))


def behind_triggers(trigger, ids, wanted, real):
    """
    ids, wanted, real (B, T) with each row's trigger before it, and all triggers one behind another
    (n, d). trigger: τ for all rows, or a list of one or None for each row.
    """
    each = [trigger] * len(ids) if isinstance(trigger, torch.Tensor) else list(trigger)
    if len(each) != len(ids):
        raise InputError(f"trigger: {len(each)} for {len(ids)} rows; give one for all, or one for each")
    different = list({id(tau): tau for tau in each if tau is not None}.values())
    if not different:
        return None, ids, wanted, real
    start, total = {}, -sum(len(tau) for tau in different)
    for tau in different:
        start[id(tau)] = total
        total += len(tau)
    rows = []
    for tau, row in zip(each, torch.stack((ids, wanted, real), dim=2)):
        n = 0 if tau is None else len(tau)
        before = torch.zeros(n, 3, dtype=torch.long, device=ids.device)
        before[:, 0] = torch.arange(n, device=ids.device) + start.get(id(tau), 0)
        before[:, 2] = 1
        rows.append(torch.cat((before, row)))
    ids, wanted, real = nn.utils.rnn.pad_sequence(rows, batch_first=True).unbind(2)
    return torch.cat(different), ids, wanted.bool(), real.bool()


# ---- a layer

class Attention(nn.Module):
    """Causal self-attention, queries in groups over fewer keys and values."""

    def __init__(self, c):
        super().__init__()
        d, d_q, d_kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(d, d_q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(d_q, d, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, l, x, linear, rows):
        """x (N, d) → the context vectors (N, H·h), which o_proj reads."""
        q = linear(l, "q_proj", x).unflatten(-1, (-1, self.head_dim))   # (N, H, h)
        k = linear(l, "k_proj", x).unflatten(-1, (-1, self.head_dim))   # (N, K, h)
        v = linear(l, "v_proj", x).unflatten(-1, (-1, self.head_dim))   # (N, K, h)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return rows.attend(l, q, k, v)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) ⊙ up(x))."""

    def __init__(self, c):
        super().__init__()
        d, f = c.hidden_size, c.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=c.mlp_bias)
        self.up_proj = nn.Linear(d, f, bias=c.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=c.mlp_bias)

    def forward(self, l, x, linear):
        hidden = F.silu(linear(l, "gate_proj", x)) * linear(l, "up_proj", x)        # (N, f)
        return linear(l, "down_proj", hidden)                                       # (N, d)


class Block(nn.Module):
    """A layer: attention, then MLP, each on the normed residual stream and added to it."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, l, x, linear, rows, at=None):
        """x (N, d) → (N, d), or (M, d) at the positions `at`. linear(l, name, x): every projection."""
        context = self.self_attn(l, self.input_layernorm(x), linear, rows)          # (N, H·h)
        if at is not None:
            x, context = x.index_select(0, at), context.index_select(0, at)
        x = x + linear(l, "o_proj", context)
        return x + self.mlp(l, self.post_attention_layernorm(x), linear)


# ---- the model

class Llama(nn.Module):
    """The base model. No carrier changes its weights; `carrier=None` is the base, bit for bit."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            "norm": nn.RMSNorm(c.hidden_size, c.rms_norm_eps)})
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.projections = []           # of layer l: {q_proj … down_proj: nn.Linear}
        for layer in self.model.layers:
            parts = (*layer.self_attn.named_children(), *layer.mlp.named_children())
            self.projections.append({name: part for name, part in parts if name.endswith("_proj")})
        self.stop = frozenset()         # ids that end an answer
        self.checkpoint = False         # recompute layers in the backward pass: less memory, more time

    @property
    def embedding(self):
        """Token embeddings (V, d)."""
        return self.model.embed_tokens.weight

    @property
    def device(self):
        return self.embedding.device

    @property
    def dtype(self):
        return self.embedding.dtype

    def embed(self, ids, soft=None):
        """Ids (N) → embeddings (N, d); the ids −n … −1 are the rows of `soft` (n, d)."""
        if soft is None:
            return self.model.embed_tokens(ids)
        x = self.model.embed_tokens(ids.clamp(min=0))
        place = (ids < 0).nonzero().squeeze(1)
        return x.index_copy(0, place, soft.to(x.dtype).index_select(0, ids[place] + len(soft)))

    def head(self, x):
        """Hidden states (…, d) → logits (…, V)."""
        tied = self.config.tie_word_embeddings
        return F.linear(self.model.norm(x), self.embedding if tied else self.lm_head.weight)

    def plain(self, l, name, x):
        """The base's own projections: what a carrier's bind() stands in for."""
        return self.projections[l][name](x)

    def hidden(self, ids, carrier=None, trigger=None, scale=None, wanted=None, past=None, real=None,
               streams=None):
        """
        Hidden states after the last layer, of which head() makes logits: (B, T, d), or (M, d) at the
        positions `wanted`. Takes what forward() takes, and

        past     a Past to go on from and to fill
        real     (B, T) bool, the tokens that are no padding; else all up to the last that is wanted
        streams  a list: the residual stream after each layer is appended, of the shape of the result
        """
        if scale is not None and (carrier is None or len(scale) != len(ids)):
            raise InputError(f"scale needs a carrier and one factor for each of the {len(ids)} rows")
        rows = Rows(self, ids, wanted, trigger, scale, past, real)
        linear = self.plain if carrier is None else bind(carrier, self, rows)
        x = self.embed(rows.ids, rows.soft)                             # (N, d)
        for l, layer in enumerate(self.model.layers):
            last = l + 1 == len(self.model.layers)
            at = rows.at if last and rows.narrow else None              # all others see every token
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, l, x, linear, rows, at, use_reentrant=False)
            else:
                x = layer(l, x, linear, rows, at)
            if streams is not None and not last:
                streams.append(x.index_select(0, rows.at))
        if past is not None:
            past.size += rows.prefix + rows.shape[1]
        x = x if rows.narrow else x.index_select(0, rows.at).unflatten(0, ids.shape)
        if streams is not None:
            streams.append(x.flatten(0, -2))
        return x

    def forward(self, ids, carrier=None, trigger=None, scale=None, wanted=None):
        """
        Logits (B, T, V) of B right-padded rows of token ids (B, T), a tensor or a list of lists.

        carrier  a Carrier, a Merged or a list of Carriers; None is the base
        trigger  τ (n, d), put before every row; or a list of one or None for each row, of any
                 lengths. Nothing is returned for its own positions
        scale    (B) factors on the carrier's delta, row by row; None is 1
        wanted   (B, T) bool: logits (M, V) at these M positions only
        """
        ids = torch.as_tensor(ids, device=self.device)
        return self.head(self.hidden(ids, carrier, trigger, scale, wanted))

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=128, carrier=None, trigger=None, scale=None, stop=None,
                 batch_size=128, label=None):
        """
        Greedy answers to `prompts` (lists of ids, any lengths): lists of new ids, the one that ended
        the answer included.

        trigger, scale: as forward(). stop: ids that end an answer, by default the checkpoint's own.
        label: what a progress bar is called.
        """
        if not all(len(prompt) for prompt in prompts):
            raise InputError("generate: an empty prompt; every prompt needs at least one token")
        if carrier is not None and scale is None:
            carrier = merged(carrier, self)     # W once, and not a product with Δ for every token
        each = trigger if isinstance(trigger, list) else [trigger] * len(prompts)
        order = own_part(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        answers = {i: [] for i in order}
        progress = bar(label, len(order)) if label else None
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            factors = None if scale is None else torch.as_tensor([float(scale[i]) for i in batch])
            steps = self.decode([prompts[i] for i in batch], max_new_tokens, carrier,
                                [each[i] for i in batch], factors, stop)
            for new in steps:
                for row, token in new:
                    answers[batch[row]].append(token)
            if progress:
                progress.update(len(batch))
        answers = dict(collected(list(answers.items())))
        return [answers[i] for i in range(len(prompts))]

    @torch.no_grad()
    def decode(self, prompts, max_new_tokens, carrier=None, triggers=None, scale=None, stop=None):
        """
        Decode one batch: yields, a token at a time, [(which prompt, its new id), …] of those that are
        not finished. Finished rows leave the batch once enough of them are.
        """
        stop = self.stop if stop is None else stop
        triggers = triggers or [None] * len(prompts)
        n = max(0 if tau is None else len(tau) for tau in triggers)
        ids = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).bool()
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)                      # (B, T)
        past = Past(self, len(ids), n + ids.shape[1] + max_new_tokens)
        last = real & ~F.pad(real, (0, 1))[:, 1:]                                   # (B, T)
        x = self.hidden(ids, carrier, triggers, scale, last, past, real)            # (B, d)
        alive = list(range(len(prompts)))       # alive[b] is the prompt in row b of the batch
        finished = set()
        for step in range(max_new_tokens):
            token = self.head(x).argmax(-1)                                         # (B)
            new = [(i, t) for i, t in zip(alive, token.tolist()) if i not in finished]
            finished.update(i for i, t in new if t in stop)
            yield new
            going = [b for b, i in enumerate(alive) if i not in finished]
            if not going or step + 1 == max_new_tokens:
                return
            if len(going) <= COMPACT * len(alive):
                alive = [alive[b] for b in going]
                going = torch.tensor(going, device=self.device)
                past.select(going)
                token = token[going]
                scale = None if scale is None else scale[going.cpu()]
            x = self.hidden(token[:, None], carrier, None, scale, past=past)[:, 0]  # (B, d)


def bind(carrier, net, rows):
    """linear(l, name, x) of a carrier, or of several, for the rows of one forward pass."""
    if not isinstance(carrier, list):
        return carrier.bind(net, rows)
    parts = [one.bind(net, rows) for one in carrier]

    def linear(l, name, x):
        """The deltas of all carriers on one base."""
        y = net.plain(l, name, x)
        return y + sum(part(l, name, x) - y for part in parts)
    return linear


def merged(carrier, net):
    """The frozen weights of a carrier, or itself if it has some."""
    return carrier.merge(net) if hasattr(carrier, "merge") else carrier


# ---- losses on logits

def cross_entropy(net, hidden, targets):
    """Σ −log p(target) over hidden states (M, d) with the next tokens `targets` (M), in nats."""
    def piece(h, y):
        return F.cross_entropy(wide(net.head(h)), y, reduction="sum")
    return in_pieces(net, piece, hidden, targets)


def kl_divergence(net, hidden, base, weight):
    """Σ weight · KL(p_base ‖ p) over hidden states (M, d), `base`'s (M, d) and weights (M), in nats."""
    def piece(h, b, w):
        p, q = (wide(net.head(x)).log_softmax(-1) for x in (b, h))                  # (chunk, V)
        return ((p.exp() * (p - q)).sum(-1) * w).sum()
    return in_pieces(net, piece, hidden, base, weight)


def in_pieces(net, piece, hidden, *others):
    """
    Σ piece(h, …) over rows of hidden (M, d) and of `others`, some at a time: with 152k words the logits
    of a whole batch would be most of the memory.
    """
    size = max(32, CHUNK // net.config.vocab_size) if net.device.type == "cpu" else 1024
    if torch.is_grad_enabled() and hidden.requires_grad:
        return InPieces.apply(piece, size, hidden, *others)
    cut = [t.split(size) for t in (hidden, *others)]
    return sum(piece(*rows) for rows in zip(*cut))


class InPieces(torch.autograd.Function):
    """Differentiates a piece as soon as it is computed, so that no logits outlive it; for `hidden` only."""

    @staticmethod
    def forward(ctx, piece, size, hidden, *others):
        total, grad = wide(hidden.new_zeros(())), torch.empty_like(hidden)
        for i in range(0, len(hidden), size):
            rows = slice(i, i + size)
            with torch.enable_grad():
                h = hidden[rows].detach().requires_grad_()
                loss = piece(h, *(other[rows] for other in others))
            grad[rows], = torch.autograd.grad(loss, h)
            total += loss.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_of_total):
        grad, = ctx.saved_tensors                                                   # (M, d)
        return None, None, grad * grad_of_total, *[None] * (len(ctx.needs_input_grad) - 3)


# ---- loading

def locate(name):
    """The folder of a model: "tiny" is the embedded one, a folder is itself, owner/name is the hub's."""
    if name == EMBEDDED:
        return Path(__file__).parent / EMBEDDED
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise InputError(f"{name}: no folder of a checkpoint; other forms become one by "
                         f"python -m lab.convert {name} DIR")
    from huggingface_hub import snapshot_download      # slow to import
    wanted = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
    with reading(name, "it is no folder here, and the hub did not give it; name a local folder"):
        return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=["original/*"]))


def load(path, device="cpu", dtype=torch.float32):
    """
    The base model in a Hugging Face folder, or of the hub, its weights frozen. Raises InputError naming
    the file, field or tensor if the checkpoint is not exactly what this file computes.
    """
    path = locate(path)
    config = Config.from_dict(read_json(path / "config.json"), path / "config.json")
    with torch.device("meta"):
        net = Llama(config)
    wanted = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    check_memory(path, sum(map(math.prod, wanted.values())) * dtype.itemsize, device)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tensors = {}
    for file in weight_files(path):
        for name, t in read_weights(file, {head: wanted[embedding], **wanted}):
            tensors[name] = t.to(device, dtype)
    if config.tie_word_embeddings and head in tensors:
        tied = tensors.pop(head)                # some save only this one of the two
        if not torch.equal(tied, tensors.setdefault(embedding, tied)):
            raise InputError(f"{path}: tensor {head} is not the embedding although config.json says "
                             "tie_word_embeddings; correct one of the two")
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); the checkpoint "
                         "is incomplete")
    net.load_state_dict(tensors, assign=True)
    net.stop = stop_ids(path)
    return net.requires_grad_(False).eval()


def weight_files(path):
    """The safetensors files of a checkpoint's folder."""
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (path / names[0]).is_file() and index.is_file():
        with reading(index):
            names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if not (path / name).is_file():
            other = "" if index.is_file() else f"; other forms: python -m lab.convert {path} DIR"
            raise InputError(f"{path / name}: is not there; the checkpoint is incomplete{other}")
    return [path / name for name in names]


def read_weights(file, wanted):
    """Yield (name, tensor) of a safetensors file. Raises InputError for a tensor that is not `wanted`."""
    with reading(file, "download it again"):
        f = safe_open(file, framework="pt")
        names = f.keys()
    for name in names:
        if name.endswith("rotary_emb.inv_freq"):        # a buffer of early Llamas; it follows from θ
            continue
        with reading(file, "download it again"):
            t = f.get_tensor(name)
        if name not in wanted:
            raise InputError(f"{file}: tensor {name} is not part of this model by its config.json")
        if tuple(t.shape) != wanted[name]:
            raise InputError(f"{file}: tensor {name} has shape {tuple(t.shape)}, and config.json asks for "
                             f"{wanted[name]}")
        if not t.is_floating_point() or t.element_size() < 2:
            raise InputError(f"{file}: tensor {name} is {t.dtype}, quantised; use bf16, fp16 or fp32")
        check_finite(file, {name: t})
        yield name, t


def check_memory(path, needed, device):
    """Raises InputError if a model of `needed` bytes does not fit: trying may end the machine."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
        found = re.search(r"MemAvailable: *(\d+) kB", lines)
        free = 1024 * int(found[1]) if found else math.inf
    if needed > free:
        raise InputError(f"{path}: the model takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB "
                         "are free; use a smaller one, or --dtype bfloat16")


def stop_ids(path):
    """The ids that end an answer, of config.json and generation_config.json."""
    found = set()
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            ids = read_json(path / name).get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [ids])
    return frozenset(found - {None})
