"""A Llama-family transformer in one file: Llama 2/3, Vicuna, DeepSeek-R1-Distill-Llama, Mistral v0.3, Qwen2/2.5, Qwen3,
SmolLM2, TinyLlama. Loads a Hugging Face directory as it lies: the module tree below *is* the table of tensor names.

Shapes: B batch rows, T tokens, n trigger tokens, d hidden size, H query heads, K key/value heads, h head_dim, f d_ff,
V vocabulary, S cache length. Rows of different lengths are padded on the right: a causal model never looks there. Where it
is said which positions are wanted, (B, T, …) becomes (N, …), the N tokens that these depend on, M of them wanted.
"""
import functools
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import memory
import weights
from files import InputError, check_fields, check_finite, read_json

FAMILIES = {  # model_type → (q/k/v bias, o bias, q/k norm); None: the config's attention_bias says
    "llama": (None, None, False), "mistral": (False, False, False), "qwen2": (True, False, False), "qwen3": (None, None, True)}
WIDE = 512    # hidden size from which matrix products are what a CPU spends its time on
# types and ranges of config.json's fields; far beyond any model there is, so that nonsense is told before it is tried
SIZE = ((int,), 1, 1 << 20)
FIELDS = {
    "model_type": tuple(FAMILIES), "vocab_size": ((int,), 1, 1 << 24), "hidden_size": SIZE, "intermediate_size": SIZE,
    "num_hidden_layers": ((int,), 1, 1 << 12), "num_attention_heads": SIZE, "num_key_value_heads": ((int, None), 1, 1 << 20),
    "head_dim": ((int, None), 1, 1 << 16),
    "rope_parameters": ((dict, None), None, None), "rope_scaling": ((dict, None), None, None), "layer_types": ((list, None), None, None)}
SHORT = 128   # tokens a row up to which attention on a CPU is faster step by step, in bf16


@dataclass(frozen=True)
class Config:
    """What the forward pass needs, under the field names of the checkpoint's own config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_llama3: tuple = None            # (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_dict(cls, c, where="config.json"):
        """From config.json as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it.
        Raises InputError naming the field for anything this file would not compute exactly."""
        def refuse(field, why):
            raise InputError(f"{where}: {field} = {c.get(field)!r} {why}")

        check_fields(where, c, FIELDS)
        family = c["model_type"]
        for field in ("rms_norm_eps", "rope_theta"):
            if type(c.get(field, 1.0)) not in (int, float) or not 0 < c.get(field, 1.0) < 1e30:
                refuse(field, "is not a positive number; the file is damaged")
        if c.get("hidden_act", "silu") not in ("silu", "swish"):
            refuse("hidden_act", "is not silu; other activations are not implemented")
        if c.get("quantization_config"):
            refuse("quantization_config", "means quantised weights; use the checkpoint in bf16, fp16 or fp32")
        if any(t != "full_attention" for t in c.get("layer_types") or ()):
            refuse("layer_types", "has layers without full attention, which are not implemented")
        if c.get("sliding_window") and (family == "mistral" or c.get("use_sliding_window") and not c.get("layer_types")):
            refuse("sliding_window", "is in use; only full attention is implemented")

        rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {})}
        field = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
        if any(isinstance(v, dict) for v in rope.values()):
            refuse(field, "differs from layer to layer, which is not implemented")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            refuse(field, "is a rope type other than default and llama3")
        if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
            refuse("partial_rotary_factor", "rotates part of a head only, which is not implemented")
        llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if kind == "llama3" and any(k not in rope for k in llama3):
            refuse(field, f"lacks {next(k for k in llama3 if k not in rope)}, which llama3 scaling needs")
        if bad := [k for k in (*llama3, "rope_theta") if type(rope.get(k, 1.0)) not in (int, float)]:
            refuse(field, f"has no number for {bad[0]}; the file is damaged")

        heads = c["num_attention_heads"]
        qkv, o, norm = FAMILIES[family]
        bias = bool(c.get("attention_bias", False))
        config = cls(
            **{k: c[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
            num_key_value_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            rms_norm_eps=c.get("rms_norm_eps", 1e-6), rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
            rope_llama3=tuple(float(rope[k]) for k in llama3) if kind == "llama3" else None,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)), mlp_bias=family == "llama" and bool(c.get("mlp_bias")),
            qkv_bias=bias if qkv is None else qkv, o_bias=bias if o is None else o, qk_norm=norm)
        if heads % config.num_key_value_heads:
            refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        return config


# ---------------------------------------------------------------------------------------------------------- the pieces

def wide(x):
    """x in fp32 at least: where precision decides (softmax over the vocabulary), bf16 is not enough. nn.RMSNorm does it itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@functools.lru_cache(maxsize=8)
def inverse_frequencies(config, device):
    """θ_i of rotary position embedding, (h/2), in fp32, with Llama 3's scaling of the low frequencies where asked for."""
    freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    if config.rope_llama3:
        factor, low, high, context = config.rope_llama3
        turns = context * freq / (2 * math.pi)                   # full turns within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)      # 0: divide by factor, 1: leave
        freq = freq * (smooth + (1 - smooth) / factor)
    return freq


def rotary(config, positions, dtype):
    """cos and sin for tokens at `positions` (N): two tensors (N, 1, h)."""
    angle = positions[:, None, None].float() * inverse_frequencies(config, positions.device)   # (N, 1, h/2)
    angle = torch.cat((angle, angle), dim=-1)                                                  # (N, 1, h)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Apply rotary position embedding to x (N, heads, h), first half of a head paired with its second half."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Cache:
    """Keys and values of B right-padded rows, `used` (B) tokens of each real. Made by generate(), filled by forward()."""

    def __init__(self, net, batch, length):
        c = net.config
        memory.check(memory.of_cache(c, batch, length, net.dtype), f"Keys and values of {batch} texts of up to {length} tokens",
                     "lower the number of new tokens, or of prompts at a time", net.device)
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim)           # (L, B, K, S, h)
        self.k, self.v = (torch.zeros(shape, dtype=net.dtype, device=net.device) for _ in range(2))
        self.used = torch.zeros(batch, dtype=torch.long, device=net.device)
        self.longest = 0                                                                          # max(used), without a sync

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


class Rows:
    """Where the tokens of a batch are. N tokens are computed one after the other, none of them padding; in B rows of T they
    stand beside each other only to attend. A prefix that all rows share, such as the system prompt of a chat template or
    a trigger, has the same keys, values and residual stream in each: its P tokens are computed once, first of the N.
    """

    def __init__(self, net, ids, asked, alike=True, cache=None, lengths=None):
        """ids (B, T), the tokens; asked (B, T) bool, those whose hidden states are wanted, M in all: nothing after a row's
        last one is computed. alike: rows differ in their tokens only. cache, lengths: as in forward()."""
        self.config, self.cache, self.shape = net.config, cache, ids.shape
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)                # (B, T)
        real = asked.flip(1).cumsum(1).flip(1) > 0                                                 # (B, T)
        self.fresh, self.mask = True, None
        if cache is not None:
            new = torch.full_like(cache.used, ids.shape[1]) if lengths is None else lengths        # (B)
            real |= positions < new[:, None]
            positions, self.fresh = positions + cache.used[:, None], cache.longest == 0
            cache.used, cache.longest = cache.used + new, cache.longest + ids.shape[1]
        if not self.fresh:
            past = torch.arange(cache.longest, device=ids.device)                                  # (S)
            self.mask = past <= positions[:, None, :, None]                                        # (B, 1, T, S)
        self.positions = positions

        # the N tokens: the prefix out of the first row, then what each row has of its own
        self.prefix = shared_prefix(ids, real) if alike and self.fresh else 0
        real[0, :self.prefix], real[1:, :self.prefix] = True, False
        self.tokens = real.flatten().nonzero().squeeze(1)                                          # (N) of B·T
        self.full = len(self.tokens) == real.numel()

        # the M that are asked for: each is one of the N, and behind the last layer one of the needed ones
        place = real.flatten().cumsum(0).sub(1).view(self.shape)                                   # (B, T), of N
        place[1:, :self.prefix] = place[0, :self.prefix]
        self.wanted = place[asked]                                                                 # (M) of N
        self.needed = torch.unique(self.wanted) if alike else torch.arange(len(self.tokens), device=ids.device)
        self.found = torch.searchsorted(self.needed, self.wanted)                                  # (M) of the needed
        self.cos, self.sin = rotary(self.config, self.pack(positions), net.dtype)                  # (N, 1, h)

    def pack(self, x):
        """(B, T, …) → (N, …)"""
        return x.flatten(0, 1) if self.full else x.flatten(0, 1).index_select(0, self.tokens)

    def spread(self, x):
        """(N, …) → (B, T, …), zeros where nothing is computed."""
        B, T = self.shape
        if self.full:
            return x.unflatten(0, self.shape)
        rows = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, self.tokens, x).unflatten(0, self.shape)
        if not self.prefix:
            return rows
        prefix = x[:self.prefix].expand(B, *[-1] * x.dim())                                        # (B, P, …)
        return torch.cat((prefix, rows[:, self.prefix:]), dim=1)

    def attend(self, l, q, k, v):
        """Causal attention of layer l: q (N, H, h), k and v (N, K, h) → (N, H·h). Fills the cache."""
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        q, k, v = (self.spread(x).transpose(1, 2) for x in (q, k, v))                              # (B, H or K, T, h)
        if self.cache is not None:
            self.cache.extend(l, k, v, self.positions)
        if not self.fresh:
            k, v = self.cache.past(l)                                                              # (B, K, S, h)
        y = attention(q, k, v, self.mask)                                                          # (B, H, T, h)
        return self.pack(y.transpose(1, 2).flatten(2))

    def narrow(self, l, x):
        """What layer l still needs of x (N, …) after its attention: everything, or behind the last only what is asked for."""
        last = l + 1 == self.config.num_hidden_layers
        return x.index_select(0, self.needed) if last and len(self.needed) < len(x) else x

    def answer(self, l, x):
        """The stream after layer l → (M, d), what was asked for, row after row."""
        last = l + 1 == self.config.num_hidden_layers
        return x.index_select(0, self.found if last else self.wanted)


def shared_prefix(ids, real):
    """How many tokens all rows of ids (B, T) begin with, no more than the longest row has; 0 for a single row."""
    if len(ids) == 1:
        return 0
    same = (ids == ids[0]).all(0) & real.any(0)                                                    # (T)
    return int(same.cumprod(0).sum())


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √h) v for q (B, H, T, h) and k, v (B, K, S, h), H/K queries to a key: (B, H, T, h). mask (B, 1, T, S)
    bool says which keys are seen; None: those up to the query's own place."""
    shape, groups = q.shape, q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and shape[2] <= SHORT:
        return literal_attention(q, k, v, mask)
    if groups > 1 and mask is not None:                      # few queries, many keys
        q, mask = q.unflatten(1, (-1, groups)).flatten(2, 3), mask.repeat(1, 1, groups, 1)         # (B, K, H/K·T, h)
    elif groups > 1 and q.is_cuda and q.dtype == torch.float32:   # a GPU's kernels for fp32 know no groups
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)              # (B, H, S, h)
    causal, grouped = mask is None and q.shape[2] > 1, q.shape[1] > k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return y.reshape(shape)


def literal_attention(q, k, v, mask=None):
    """attention() step by step, with the softmax in fp32. Torch's kernel takes 2 to 5 × as long for short rows in bf16 on a CPU."""
    shape, groups = q.shape, q.shape[1] // k.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, shape[2], shape[2], dtype=torch.bool, device=q.device).tril()      # (1, 1, T, T)
    q, mask = q.unflatten(1, (-1, groups)).flatten(2, 3), mask.repeat(1, 1, groups, 1)             # (B, K, H/K·T, h)
    scores = wide(q @ k.transpose(2, 3)) / math.sqrt(shape[3])                                     # (B, K, H/K·T, S)
    shares = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (shares.to(v.dtype) @ v).reshape(shape)


class Attention(nn.Module):
    """Causal self-attention, queries in groups over fewer keys and values."""

    def __init__(self, c):
        super().__init__()
        d, d_q, d_kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim, self.normed = c.head_dim, c.qk_norm
        self.q_proj = nn.Linear(d, d_q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(d_q, d, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps), nn.RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, l, x, linear, rows):
        q, k, v = (linear(l, f"{name}_proj", x).unflatten(-1, (-1, self.head_dim)) for name in "qkv")   # (N, H or K, h)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        y = rows.attend(l, q, k, v)                                                                # (N, H·h)
        return linear(l, "o_proj", rows.narrow(l, y))                                              # (N, d)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) ⊙ up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, l, x, linear):
        hidden = F.silu(linear(l, "gate_proj", x)) * linear(l, "up_proj", x)                       # (N, f)
        return linear(l, "down_proj", hidden)                                                      # (N, d)


class Block(nn.Module):
    """A layer: attention, then MLP, each on the normed residual stream and added to it."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, l, x, linear, rows):
        """Layer l: x (N, d) → (N, d), or behind the last layer fewer. linear(l, name, x) is every projection."""
        attended = self.self_attn(l, self.input_layernorm(x), linear, rows)
        x = rows.narrow(l, x) + attended
        return x + self.mlp(l, self.post_attention_layernorm(x), linear)


# ----------------------------------------------------------------------------------------------------------- the model

class Llama(nn.Module):
    """The base model. Its weights are never changed by a carrier; `carrier=None` is the base, bit for bit."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            "norm": nn.RMSNorm(c.hidden_size, c.rms_norm_eps)})
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.projections = [{name: part._modules[name] for part in (layer.self_attn, layer.mlp) for name in part._modules
                             if name.endswith("_proj")} for layer in self.model.layers]   # projections[l][name]: nn.Linear
        self.stop = frozenset()      # token ids that end an answer, from the checkpoint's own configuration
        self.checkpoint = False      # recompute each layer in the backward pass: less memory, a third more time

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

    def head(self, x):
        """Hidden states (…, d) → logits (…, V)."""
        return F.linear(self.model.norm(x), self.embedding if self.config.tie_word_embeddings else self.lm_head.weight)

    def embed(self, tokens, trigger=None):
        """Ids (N) → embeddings (N, d); the ids -n … -1 are the n tokens of the trigger."""
        if trigger is None:
            return self.model.embed_tokens(tokens)
        x, place = self.model.embed_tokens(tokens.clamp(min=0)), (tokens < 0).nonzero().squeeze(1)
        return x.index_copy(0, place, trigger.to(x.dtype).index_select(0, tokens[place] + len(trigger)))

    def hidden(self, ids, carrier=None, trigger=None, scale=None, keep=None, cache=None, lengths=None, streams=None):
        """Hidden states after the last layer, which head() makes logits of: (B, T, d), or (M, d) with `keep`.
        Takes what forward() takes; the residual stream after each layer, of the same shape, is appended to the list `streams`."""
        shape, asked = ids.shape, torch.ones_like(ids, dtype=torch.bool) if keep is None else keep   # (B, T)
        if scale is not None and (carrier is None or len(scale) != len(ids)):
            raise InputError(f"scale needs a carrier and one factor for each of the {len(ids)} rows")
        if trigger is not None:
            n = len(trigger)
            before = torch.arange(-n, 0, device=ids.device).expand(len(ids), n)
            ids, asked = torch.cat((before, ids), dim=1), F.pad(asked, (n, 0))                     # (B, n+T)
            lengths = None if lengths is None else n + lengths
        rows = Rows(self, ids, asked, scale is None, cache, lengths)
        x = self.embed(rows.pack(ids), trigger)                                                    # (N, d)
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)[:, None]                # (B, 1)
            scale = rows.pack(scale.expand(ids.shape))[:, None]                                    # (N, 1)
        linear = self.plain if carrier is None else carrier.bind(self, scale)
        for l, layer in enumerate(self.model.layers):
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, l, x, linear, rows, use_reentrant=False)
            else:
                x = layer(l, x, linear, rows)
            if streams is not None or l + 1 == len(self.model.layers):
                y = rows.answer(l, x)                                                              # (M, d)
                y = y if keep is not None else y.unflatten(0, shape)
            if streams is not None:
                streams.append(y)
        return y

    def forward(self, ids, carrier=None, trigger=None, scale=None, keep=None, cache=None, lengths=None):
        """Logits (B, T, V) of B right-padded rows of token ids (B, T), a tensor or a list of lists.

        carrier  a Carrier or a Merged; None is the base
        trigger  τ (n, d), put before every row; nothing is returned for its own positions
        scale    (B,) factors on the carrier's delta, row by row; None is 1
        keep     (B, T) bool: logits (M, V) at these M positions only, and nothing after a row's last one is computed
        cache    a Cache to continue from and to fill; `lengths` (B) says how many of the new tokens are real
        """
        ids = torch.as_tensor(ids, device=self.device)
        return self.head(self.hidden(ids, carrier, trigger, scale, keep, cache, lengths))

    def plain(self, l, name, x):
        """The base's own projections: what a carrier's bind() stands in for."""
        return self.projections[l][name](x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=128, carrier=None, trigger=None, scale=None, stop=None, batch_size=128, progress=None,
                 heard=None):
        """Greedy answers to `prompts` (lists of ids, any lengths): new ids only, the stop token included.

        Rows are decoded in batches of similar length; finished rows leave the batch. scale: one factor a prompt.
        stop: ids that end an answer, by default the checkpoint's own. progress: called each token with the number finished.
        heard: called with (which prompt, id) as soon as there is a new id.
        """
        stop = self.stop if stop is None else stop
        if carrier is not None and scale is None:
            carrier = carrier.merge(self)                     # W once, instead of a product with Δ every token
        answers = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        n = 0 if trigger is None else len(trigger)
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            lengths = torch.tensor([len(prompts[i]) for i in rows], device=self.device)
            if not lengths.all():
                raise InputError("generate: an empty prompt; every prompt needs at least one token")
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long, device=self.device)
            for b, i in enumerate(rows):
                ids[b, :len(prompts[i])] = torch.as_tensor(prompts[i])
            factor = None if scale is None else torch.as_tensor(scale, dtype=torch.float32)[rows].to(self.device)
            cache = Cache(self, len(rows), n + ids.shape[1] + max_new_tokens)
            last = torch.arange(ids.shape[1], device=self.device) == lengths[:, None] - 1          # (B, T)
            logits = self(ids, carrier, trigger, factor, last, cache, lengths)  # (B, V)
            alive = list(range(len(rows)))                    # rows[alive[b]] is the prompt in row b of the cache
            for step in range(max_new_tokens):
                token = logits.argmax(-1)                                                          # (B)
                for b, t in zip(alive, token.tolist()):
                    answer = answers[rows[b]]
                    if not (answer and answer[-1] in stop):
                        answer.append(t)
                        if heard:
                            heard(rows[b], t)
                going = [k for k, b in enumerate(alive) if answers[rows[b]][-1] not in stop]
                if progress:
                    progress(start + len(rows) - len(going))
                if not going or step + 1 == max_new_tokens:
                    break
                if len(going) <= 0.75 * len(alive):
                    index = torch.tensor(going, device=self.device)
                    cache.keep(index)
                    alive, token = [alive[k] for k in going], token[index]
                    factor = factor if factor is None else factor[index]
                logits = self(token[:, None], carrier, scale=factor, cache=cache)[:, -1]           # (B, V)
        return answers


# ------------------------------------------------------------------------------------------------------------- loading

def configuration(folder):
    """The Config of a checkpoint's folder. Raises InputError naming the field that does not run here."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no config.json in there; give the directory of a Hugging Face checkpoint")
    return Config.from_dict(read_json(file), file)


def load(path, device="cpu", dtype=torch.float32):
    """The model in a Hugging Face directory (config.json and its weights, see weights.py), weights frozen. dtype None: the fastest here.
    Raises InputError naming the field or tensor where the checkpoint is not exactly what this file computes."""
    path = Path(path)
    config, c = configuration(path), read_json(path / "config.json")
    dtype = dtype or fast_dtype(config, device)
    with torch.device("meta"):
        net = Llama(config)
    wanted = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    memory.check(memory.of_weights(wanted.values(), dtype), f"the model that {path / 'config.json'} describes",
                 "use a smaller one, or a machine with more memory", device)
    tensors, tied = {}, None
    for file in weights.shards(path)[0]:
        for name, t in weights.tensors(file):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                tied = t                                      # may stand there beside the embedding, but only as a copy
                continue
            if name not in wanted:
                raise InputError(f"{file.name}: tensor {name} is not part of a {c['model_type']} model with this config.json")
            if tuple(t.shape) != wanted[name]:
                raise InputError(f"{file.name}: tensor {name} has shape {tuple(t.shape)}, config.json asks for {wanted[name]}")
            if not t.is_floating_point() or t.element_size() < 2:
                raise InputError(f"{file.name}: tensor {name} is {t.dtype}, quantised; use a checkpoint in bf16, fp16 or fp32")
            check_finite(file, {name: t})
            tensors[name] = t.to(device, dtype)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); the checkpoint is incomplete")
    if tied is not None and not torch.equal(tied.to(device, dtype), tensors["model.embed_tokens.weight"]):
        raise InputError(f"{path}: tensor lm_head.weight is not the embedding although config.json says tie_word_embeddings; correct one of the two")
    net.load_state_dict(tensors, assign=True)
    net.requires_grad_(False).eval()
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    for eos in (c.get("eos_token_id"), generation.get("eos_token_id")):
        net.stop |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    return net


def native_bf16():
    """Whether this processor multiplies bf16 itself. Where torch cannot tell, it does not: emulated, bf16 is slower than fp32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def fast_dtype(config, device):
    """The dtype in which a model of this `config` computes fastest: bf16 on a GPU, on a CPU where that is native and the
    products are large enough to be what takes the time."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.bfloat16 if on_gpu or config.hidden_size >= WIDE and native_bf16() else torch.float32


def set_threads(net, rows=256):
    """
    Choose how many threads compute on a CPU, from one to as many as torch would take: one for a model under WIDE, where
    the barriers of a second one cost more than it computes, else as many as are worth it for products of `rows` rows
    (1: single answers are decoded) on the machine as busy as it is now. A set OMP_NUM_THREADS is the user's own word.
    """
    most = torch.get_num_threads()
    if net.device.type != "cpu" or most == 1:
        return
    if net.config.hidden_size < WIDE:
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(worth_it(most, functools.partial(product_seconds, net, rows)))


def worth_it(most, seconds):
    """Of 1, 2, 4, … and `most` threads the largest number with which seconds(n) is a fifth less than with the best below."""
    best, least, n = 1, seconds(1), 2
    while n < 2 * most:
        count = min(n, most)
        if (found := seconds(count)) < 0.8 * least:
            best, least = count, found
        n *= 2
    return best


def product_seconds(net, rows, threads, enough=0.3):
    """Seconds of the products of `rows` rows with the weights of a few layers, with so many threads: the mean over `enough` seconds."""
    x = torch.ones(rows, net.config.hidden_size, dtype=net.dtype)
    some = [layer["up_proj"].weight for layer in net.projections[:4]]
    torch.set_num_threads(threads)
    F.linear(x, some[0])                                      # the first one also makes the threads
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < enough:
        for weight in some:
            F.linear(x, weight)
        count += 1
    return (time.perf_counter() - start) / count
