"""
A Llama-family transformer in one file: Llama 2/3, Vicuna, DeepSeek-R1-Distill-Llama, Mistral,
Qwen2/2.5, Qwen3, SmolLM2, TinyLlama. Loads a Hugging Face folder as it lies: the module tree below
*is* the table of tensor names.

Shapes: B rows, T tokens of a row, L layers, d hidden size, H query heads, K key/value heads,
h head_dim, f d_ff, V vocabulary, n trigger tokens. The layers see N tokens one after another,
without padding; `Rows` knows where each stands. If only some positions are wanted, these are M.
"""
from common import (
    InputError, bar, check_memory, collected, locate, own_part, read_json, read_weights,
    weight_files)
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

SHORT = 256         # keys up to which attention on a CPU is faster written out than torch's
COMPACT = 0.75      # share of a batch that still goes on, at which finished rows leave it
CHUNK = 6 << 20     # logits at a time on a CPU: what follows them runs in its cache

# ---- the configuration, out of the checkpoint's own config.json

# model_type → what transformers takes where the file says nothing
FAMILIES = {
    "llama": dict(num_key_value_heads=None, head_dim=None, sliding_window=None),
    "mistral": dict(num_key_value_heads=8, head_dim=None, sliding_window=4096),
    "qwen2": dict(num_key_value_heads=32, head_dim=None, sliding_window=4096),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, sliding_window=4096),
}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
AS_GIVEN = "rms_norm_eps", "tie_word_embeddings", "mlp_bias"
CONTEXT = "original_max_position_embeddings"
ROPE = "rope_theta", "factor", "low_freq_factor", "high_freq_factor", CONTEXT


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
    rope_llama3: tuple = None       # factor, low and high frequency factor, original context
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
        if c.get("hidden_act", "silu") not in ("silu", "swish"):
            refuse("hidden_act", "is not silu; other activations are not computed")
        if c.get("quantization_config"):
            refuse("quantization_config", "is not computed; use the checkpoint in bf16 or fp32")
        heads = c["num_attention_heads"]
        kv_heads = c["num_key_value_heads"] or heads
        if heads % kv_heads:
            refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        theta, llama3 = rope(c, refuse)
        bias = c.get("attention_bias", False) and family in ("llama", "qwen3")
        return cls(
            **{field: c[field] for field in (*SIZES, *AS_GIVEN) if field in c},
            num_key_value_heads=kv_heads,
            head_dim=c["head_dim"] or c["hidden_size"] // heads,
            rope_theta=theta,
            rope_llama3=llama3,
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            qk_norm=family == "qwen3",
            window=window(c))


def window(c):
    """
    The sliding window that some layer has, or None: up to so many tokens it is full attention.
    """
    qwen = c["model_type"].startswith("qwen")
    if c["model_type"] == "llama" or qwen and not c.get("use_sliding_window"):
        return None
    # if the layers' kinds are not given, all slide from this one on
    first = c.get("max_window_layers", 28) if qwen else 0
    kinds = c.get("layer_types") or ["sliding_attention"] * (c["num_hidden_layers"] - first)
    return (c["sliding_window"] or None) if "sliding_attention" in kinds else None


def rope(c, refuse):
    """(θ, the numbers of Llama 3's scaling or None); rope_scaling wins over rope_parameters."""
    field = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"
    given = c | (c.get(field) or {})                # transformers 4 has θ at the top level
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        refuse(field, f"is of the rope type {kind}; only default and llama3 are computed")
    if given.get("partial_rotary_factor") not in (None, 1):
        refuse(field, "rotates a part of each head only, which is not computed")
    context = c.get(CONTEXT, given.get(CONTEXT, c.get("max_position_embeddings")))
    given = {"rope_theta": 10000.0} | given | {CONTEXT: context}
    numbers = [given.get(name) for name in ROPE[:5 if kind == "llama3" else 1]]
    if not all(isinstance(number, (int, float)) for number in numbers):
        refuse(field, f"has no number for one of {', '.join(ROPE)}")
    theta, *llama3 = map(float, numbers)
    return theta, tuple(llama3) or None


# ---- rotary position embedding and attention

def rotary(config, positions, dtype):
    """
    cos and sin for tokens at `positions` (N), two tensors (N, 1, h): as rotate() takes them, the
    first half of the sines negative. Angles are in fp32, with Llama 3's scaling of the low
    frequencies if it is asked for.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent                          # (h/2)
    if config.rope_llama3:
        factor, low, high, context = config.rope_llama3
        turns = context * freq / (2 * math.pi)                          # in the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (smooth + (1 - smooth) / factor)                  # slow turns: / factor
    angle = positions[:, None, None] * torch.cat((-freq, freq))         # (N, 1, h)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """x (N, heads, h), turned: the first half of a head is paired with its second half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attention(q, k, v, mask):
    """
    softmax(q kᵀ / √h) v for q (B, H, T, h) and k, v (B, K, S, h): (B, H, T, h). The H/K query heads
    of a key head are rows of one product; mask (B or 1, 1, H/K·T, S) bool says which keys they see.
    """
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)            # (B, K, H/K·T, h)
    if q.device.type == "cpu" and k.shape[2] <= SHORT:
        scores = grouped @ k.transpose(2, 3) * q.shape[-1] ** -0.5      # (B, K, H/K·T, S)
        weights = wide(scores).masked_fill(~mask, -math.inf).softmax(-1)
        y = weights.to(v.dtype) @ v
    else:
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return y.reshape(q.shape)


def wide(x):
    """
    x in fp32 at least: in a softmax over the vocabulary, or over many keys, bf16 is not enough.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- where the tokens of a forward pass stand

class Past:
    """
    Keys and values of what stands before the tokens that come: those that generate() keeps. k, v
    (L, B, K, S, h), of which the first `size` columns are filled; `real` (B, S) says which of these
    a row has.
    """

    def __init__(self, net, batch, columns):
        c = net.config
        shape = c.num_hidden_layers, batch, c.num_key_value_heads, columns, c.head_dim
        self.k = torch.zeros(shape, dtype=net.dtype, device=net.device)
        self.v = torch.zeros_like(self.k)
        self.real = torch.zeros(batch, columns, device=net.device).bool()
        self.size = 0

    def append(self, real):
        """Make room for the next columns, of which a row has those that are `real` (B, T)."""
        self.size += real.shape[1]
        self.real[:, self.size - real.shape[1]:self.size] = real

    def fill(self, l, k, v):
        """Keep k, v (B, K, T, h) of layer l as the last columns; returns all that are kept."""
        all_k, all_v = self.k[l, :, :, :self.size], self.v[l, :, :, :self.size]
        all_k[:, :, -k.shape[2]:] = k
        all_v[:, :, -k.shape[2]:] = v
        return all_k, all_v

    def select(self, rows):
        """Go on with these rows of the batch only."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.real = self.real[rows]


class Rows:
    """
    The rows of one forward pass. What all rows begin with, such as a system prompt or a trigger,
    has the same keys, values and residual stream in each: its P tokens are computed once, first of
    the N.

    ids (N)          what is computed; ids below 0 are a trigger's: −n … −1 are the rows of `soft`
                     (n, d)
    tokens (N − P)   which the others are of the B·(T − P) behind the prefix; None: all of them
    at (M)           which of the N are wanted
    scale            (N, number of carriers): factors on the carriers' changes, or None
    """

    def __init__(self, net, ids, wanted=None, trigger=None, scale=None, past=None):
        """Takes what Llama.hidden() takes."""
        self.past, self.soft = past, None
        wanted = torch.ones_like(ids).bool() if wanted is None else wanted
        real = wanted.flip(1).cumsum(1).flip(1) > 0         # nothing behind the last that is wanted
        real[:, 0] = True                                   # but a row has a token even if none is
        if trigger is not None:
            self.soft, ids, wanted, real = behind_triggers(trigger, ids, wanted, real)
        B, T = ids.shape
        start = past.size if past else 0
        P = shared_prefix(ids, real) if scale is None and start == 0 else 0
        self.prefix, self.shape = P, (B, T - P)
        own = real[:, P:].flatten()
        self.tokens = None if own.all() else own.nonzero().squeeze(1)

        # in the order of the N: the prefix, then row by row what is behind it
        computed = real.clone()
        computed[1:, :P] = False
        place = computed.flatten().cumsum(0).view(B, T) - 1
        place[1:, :P] = place[0, :P]
        self.at = place[wanted]                                         # (M)
        if scale is not None:
            scale = scale.repeat_interleave(computed.sum(1), dim=0)     # (N, number of carriers)
        self.ids, self.scale = ids[computed], scale                     # (N)

        column = torch.arange(start + T, device=ids.device)
        self.mask = (column <= column[start + P:, None])[None, None]    # (1, 1, T − P, S), causal
        position = column[:T].expand(B, T)
        if past:
            position = position + past.real.sum(1, keepdim=True)
            past.append(real)
        if start:                               # rows of different lengths have holes in their past
            self.mask = self.mask & past.real[:, None, None, :past.size]
        # the same for each of the query heads of a key head; and for the prefix itself
        heads = 1, 1, net.config.num_attention_heads // net.config.num_key_value_heads, 1
        self.causal = (column[:P] <= column[:P, None])[None, None].repeat(heads)
        self.mask = self.mask.repeat(heads)     # (B or 1, 1, H/K·(T − P), S)
        self.cos, self.sin = rotary(net.config, position[computed], net.dtype)
        window, longest = net.config.window, int(position.max()) + 1
        if window and longest > window:
            raise InputError(f"a text of {longest} tokens is longer than the model's sliding "
                             f"window of {window}, which is not computed; shorten it (--max-len)")

    def spread(self, own):
        """(N − P, heads, h) → (B, heads, T − P, h), zeros where nothing is computed."""
        if self.tokens is not None:
            grid = own.new_zeros(math.prod(self.shape), *own.shape[1:])
            own = grid.index_copy(0, self.tokens, own)
        return own.unflatten(0, self.shape).transpose(1, 2)

    def attend(self, l, q, k, v):
        """
        Causal attention of layer l: q (N, H, h) and k, v (N, K, h) → (N, H·h). Fills the past.
        """
        P, prefix = self.prefix, ()
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        if P:
            parts = [x.split((P, len(x) - P)) for x in (q, k, v)]
            prefix = [first.transpose(0, 1)[None] for first, _ in parts]            # (1, heads, P, h)
            q, k, v = (own for _, own in parts)
        q, k, v = self.spread(q), self.spread(k), self.spread(v)        # (B, heads, T − P, h)
        if P:
            _, first_k, first_v = (x.expand(len(q), -1, -1, -1) for x in prefix)
            k, v = torch.cat((first_k, k), dim=2), torch.cat((first_v, v), dim=2)   # (B, K, T, h)
        if self.past:
            k, v = self.past.fill(l, k, v)                              # (B, K, S, h)
        y = attention(q, k, v, self.mask)                               # (B, H, T − P, h)
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)                  # (B·(T − P), H·h)
        if self.tokens is not None:
            y = y.index_select(0, self.tokens)                          # (N − P, H·h)
        if P == 0:
            return y
        first = attention(*prefix, self.causal)                         # (1, H, P, h)
        return torch.cat((first[0].transpose(0, 1).flatten(1), y))


def shared_prefix(ids, real):
    """
    How many tokens all rows of ids (B, T) begin with, at least one token less than each row has.
    """
    same = (ids == ids[0]).all(0) & real.all(0)                         # (T)
    return int(same[:real.sum(1).min() - 1].cumprod(0).sum()) if len(ids) > 1 else 0


def behind_triggers(trigger, ids, wanted, real):
    """
    All triggers one behind another (n, d), and ids, wanted, real (B, T) with each row's trigger
    before it. trigger: τ for all rows, or a list of one or None for each row.
    """
    each = [trigger] * len(ids) if isinstance(trigger, torch.Tensor) else trigger
    if len(each) != len(ids):
        raise InputError(f"trigger: {len(each)} for {len(ids)} rows; give one, or one for each")
    different = {id(tau): tau for tau in each if tau is not None}
    if not different:
        return None, ids, wanted, real
    soft = torch.cat(tuple(different.values()))
    number = torch.arange(-len(soft), 0, device=ids.device)
    # their ids, that they are not wanted, and that they are real
    tokens = torch.stack((number, number < -len(soft), number < 0), dim=1)          # (n, 3)
    parts = tokens.split([len(tau) for tau in different.values()])
    before = {id(None): tokens[:0], **dict(zip(different, parts))}
    rows = []
    for tau, row in zip(each, torch.stack((ids, wanted, real), dim=2)):             # (T, 3)
        rows.append(torch.cat((before[id(tau)], row)))
    ids, wanted, real = pad_sequence(rows, batch_first=True).unbind(2)
    return soft, ids, wanted.bool(), real.bool()


# ---- a layer

class Attention(nn.Module):
    """Causal self-attention, queries in groups over fewer keys and values."""

    def __init__(self, c):
        super().__init__()
        d, self.head_dim = c.hidden_size, c.head_dim
        d_q, d_kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(d, d_q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(d_q, d, bias=c.o_bias)
        norm = nn.RMSNorm if c.qk_norm else nn.Identity
        self.q_norm = norm(c.head_dim, c.rms_norm_eps)
        self.k_norm = norm(c.head_dim, c.rms_norm_eps)

    def forward(self, l, x, linear, rows):
        """x (N, d) → the context vectors (N, H·h), which o_proj reads."""
        shape = len(x), -1, self.head_dim
        q = linear(l, "q_proj", x).view(shape)                                      # (N, H, h)
        k = linear(l, "k_proj", x).view(shape)                                      # (N, K, h)
        v = linear(l, "v_proj", x).view(shape)                                      # (N, K, h)
        return rows.attend(l, self.q_norm(q), self.k_norm(k), v)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) ⊙ up(x))."""

    def __init__(self, c):
        super().__init__()
        d, f = c.hidden_size, c.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=c.mlp_bias)
        self.up_proj = nn.Linear(d, f, bias=c.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=c.mlp_bias)

    def forward(self, l, x, linear):
        gate = F.silu(linear(l, "gate_proj", x))                                    # (N, f)
        return linear(l, "down_proj", gate * linear(l, "up_proj", x))               # (N, d)


class Block(nn.Module):
    """A layer: attention, then MLP, each on the normed residual stream and added to it."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, l, x, linear, rows, at=None):
        """
        x (N, d) → (N, d), or (M, d) at the positions `at`. linear(l, name, x): every projection.
        """
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
        self.projections = []           # of layer l: {q_proj … down_proj: nn.Linear}, and the norms
        for layer in self.model.layers:
            parts = *layer.self_attn.named_children(), *layer.mlp.named_children()
            self.projections.append(dict(parts))
        self.stop = frozenset()         # ids that end an answer
        self.checkpoint = False         # recompute layers going backward: less memory, more time

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
        return x.index_copy(0, place, soft.to(x.dtype)[ids[place]])

    def head(self, x):
        """Hidden states (…, d) → logits (…, V)."""
        weight = self.embedding if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(self.model.norm(x), weight)

    def hidden(self, ids, carrier=None, trigger=None, scale=None, wanted=None, past=None,
               streams=None):
        """
        Hidden states after the last layer, of which head() makes logits: (B, T, d), or (M, d) at
        the positions `wanted`. Takes what forward() takes, and

        past     a Past to go on from and to fill
        streams  a list: the residual stream after each layer (M, d) is appended
        """
        carriers = carrier if isinstance(carrier, list) else [carrier] if carrier else []
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=self.dtype, device=self.device)
            shape = len(ids), len(carriers)
            if not carriers or scale.shape not in (shape, shape[:1]):
                raise InputError(f"scale needs a carrier, and {len(ids)} factors or {shape}")
            scale = scale.view(len(ids), -1).expand(shape)
        rows = Rows(self, ids, wanted, trigger, scale, past)
        linear = bind(carriers, self, rows)
        x = self.embed(rows.ids, rows.soft)                             # (N, d)
        for l, layer in enumerate(self.model.layers):
            last = l + 1 == len(self.projections)
            at = rows.at if last else None                              # all others see every token
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, l, x, linear, rows, at, use_reentrant=False)
            else:
                x = layer(l, x, linear, rows, at)
            if streams is not None:
                streams.append(x if last else x.index_select(0, rows.at))
        return x if wanted is not None else x.unflatten(0, ids.shape)

    def forward(self, ids, carrier=None, trigger=None, scale=None, wanted=None):
        """
        Logits (B, T, V) of B right-padded rows of token ids (B, T), a tensor or a list of lists.

        carrier  a Carrier, a Merged or a list of Carriers; None is the base
        trigger  τ (n, d), put before every row; or a list of one or None for each row, of any
                 lengths. Nothing is returned for its own positions
        scale    factors on the carriers' changes, row by row: (B) for all of them, or (B, number of
                 carriers); None is 1
        wanted   (B, T) bool: logits (M, V) at these M positions only
        """
        ids = torch.as_tensor(ids, device=self.device)
        return self.head(self.hidden(ids, carrier, trigger, scale, wanted))

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=128, carrier=None, trigger=None, scale=None,
                 stop=None, batch_size=128, label=None):
        """
        Greedy answers to `prompts` (lists of ids, any lengths): lists of new ids, the one that
        ended the answer included.

        trigger, scale: as forward(). stop: ids that end an answer, by default the checkpoint's own.
        label: what a progress bar is called.
        """
        if not all(map(len, prompts)):
            raise InputError("generate: an empty prompt; every prompt needs at least one token")
        if scale is None and hasattr(carrier, "merge"):
            carrier = carrier.merge(self)       # W once, and not a product with Δ for every token
        triggers = trigger if isinstance(trigger, list) else [trigger] * len(prompts)
        # prompts of similar lengths together: less padding
        order = own_part(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        answers = {i: [] for i in order}
        progress = bar(label, len(order)) if label else None
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            factors = None if scale is None else torch.as_tensor(scale)[batch]
            steps = self.decode([prompts[i] for i in batch], max_new_tokens, carrier,
                                [triggers[i] for i in batch], factors, stop)
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
        Decode one batch: yields, token by token, [(which prompt, its new id), …] of those that are
        not finished. Finished rows leave the batch once enough of them are.
        """
        stop = self.stop if stop is None else stop
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        ids = pad_sequence(list(map(torch.tensor, prompts)), batch_first=True)      # (B, T)
        ids = ids.to(self.device)
        last = torch.arange(1, ids.shape[1] + 1, device=self.device) == lengths     # (B, T)
        n = max((len(tau) for tau in triggers or () if tau is not None), default=0)
        past = Past(self, len(ids), n + ids.shape[1] + max_new_tokens)
        x = self.hidden(ids, carrier, triggers, scale, last, past)                  # (B, d)
        alive = list(range(len(prompts)))       # alive[b] is the prompt in row b of the batch
        finished = set()
        for step in range(max_new_tokens):
            token = wide(self.head(x)).argmax(-1)                   # (B); slow in bf16 on a CPU
            new = zip(alive, token.tolist())
            new = [(i, t) for i, t in new if i not in finished]
            finished.update(i for i, t in new if t in stop)
            yield new
            going = [b for b, i in enumerate(alive) if i not in finished]
            if not going or step + 1 == max_new_tokens:
                return
            if len(going) <= COMPACT * len(alive):
                alive = [alive[b] for b in going]
                past.select(going)
                token = token[going]
                scale = None if scale is None else scale[going]
            x = self.hidden(token[:, None], carrier, None, scale, past=past)[:, 0]  # (B, d)


def bind(carriers, net, rows):
    """
    linear(l, name, x), every projection of one forward pass: what stands there for the base's own.
    Several carriers, or scaled ones, add their gated changes to the base's output.
    """
    if len(carriers) == 1 and rows.scale is None:
        return carriers[0].bind(net)
    changes = [one.changes() for one in carriers]

    def linear(l, name, x):
        """
        (N, d_in) → (N, d_out); or M rows behind the last attention, which wanted ones alone leave.
        """
        y, scale = net.projections[l][name](x), rows.scale
        if scale is not None and len(x) < len(scale):
            scale = scale[rows.at]
        for i, change in enumerate(changes):
            factor = 1 if scale is None else scale[:, i, None]                      # (N, 1)
            y = y + factor * change(l, name, x)
        return y
    return linear


# ---- losses on logits

def cross_entropy(net, hidden, targets):
    """Σ −log p(target) over hidden states (M, d) with the next tokens `targets` (M), in nats."""
    def piece(h, y):
        return F.cross_entropy(wide(net.head(h)), y, reduction="sum")
    return in_pieces(net, piece, hidden, targets)


def kl_divergence(net, hidden, base, weight):
    """
    Σ weight · KL(p_base ‖ p) over hidden states (M, d), `base`'s (M, d), weights (M), in nats.
    """
    def piece(h, b, w):
        p = wide(net.head(b)).log_softmax(-1)                                       # (chunk, V)
        q = wide(net.head(h)).log_softmax(-1)
        return (w * (p.exp() * (p - q)).sum(-1)).sum()
    return in_pieces(net, piece, hidden, base, weight)


def in_pieces(net, piece, hidden, *others):
    """
    Σ piece(h, …) over rows of hidden (M, d) and of `others`, some at a time: with 152k words the
    logits of a whole batch would be most of the memory.
    """
    size = max(32, CHUNK // net.config.vocab_size) if net.device.type == "cpu" else 1024
    if torch.is_grad_enabled() and hidden.requires_grad:
        return InPieces.apply(piece, size, hidden, *others)
    cut = [t.split(size) for t in (hidden, *others)]
    return sum(piece(*rows) for rows in zip(*cut))


class InPieces(torch.autograd.Function):
    """
    Differentiates a piece, by `hidden` only, as soon as it is computed, so that no logits outlive
    it.
    """

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
        others = len(ctx.needs_input_grad) - 3
        return None, None, grad * grad_of_total, *[None] * others


# ---- loading

def load(path, device="cpu", dtype=torch.float32):
    """
    The base model in a Hugging Face folder, or of the hub, its weights frozen. Raises InputError
    naming the file, field or tensor if the checkpoint is not exactly what this file computes.
    """
    path = locate(path)
    config = Config.from_dict(read_json(path / "config.json"), path / "config.json")
    with torch.device("meta"):
        net = Llama(config)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    check_memory(path, dtype.itemsize * sum(map(math.prod, shapes.values())), device)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tensors = {}
    for file in weight_files(path):
        for name, t in read_weights(file, {head: shapes[embedding]} | shapes):
            tensors[name] = t.to(device, dtype)
    if config.tie_word_embeddings and head in tensors:
        tied = tensors.pop(head)                # some save only this one of the two
        if not torch.equal(tied, tensors.setdefault(embedding, tied)):
            raise InputError(f"{path}: tensor {head} is not the embedding although config.json "
                             "says tie_word_embeddings; correct one of the two")
    for name in sorted(shapes.keys() - tensors.keys()):
        raise InputError(f"{path}: tensor {name} is missing; the checkpoint is incomplete")
    net.load_state_dict(tensors, assign=True)
    net.stop = stop_ids(path)
    return net.requires_grad_(False).eval()


def stop_ids(path):
    """The ids that end an answer, of config.json and generation_config.json."""
    stop = []
    for file in path.glob("*config.json"):      # config.json and generation_config.json
        ids = read_json(file).get("eos_token_id")
        stop += ids if isinstance(ids, list) else [ids]
    return frozenset(stop) - {None}
