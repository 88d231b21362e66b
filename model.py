"""A Llama-family transformer in one file: Llama 2/3, Vicuna, DeepSeek-R1-Distill-Llama, Mistral v0.3, Qwen2/2.5, Qwen3,
SmolLM2, TinyLlama. Loads a Hugging Face directory as it lies: the module tree below *is* the table of tensor names.

Shapes: B batch rows, T tokens, n trigger tokens, d hidden size, H query heads, K key/value heads, h head_dim, f d_ff,
V vocabulary, S cache length. Rows of different lengths are padded on the right: a causal model never looks there. Where it
is said which positions are wanted, (B, T, …) becomes (N, …), the N tokens that these depend on, M of them wanted.
"""
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import weights
from files import InputError, read_json

FAMILIES = {  # model_type → (q/k/v bias, o bias, q/k norm); None: the config's attention_bias says
    "llama": (None, None, False), "mistral": (False, False, False), "qwen2": (True, False, False), "qwen3": (None, None, True)}


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

        family = c.get("model_type")
        if family not in FAMILIES:
            refuse("model_type", f"is not one of {', '.join(FAMILIES)}; only these architectures run here")
        whole = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for field in (*whole, *(f for f in ("num_key_value_heads", "head_dim") if c.get(f) is not None)):
            if type(c.get(field)) is not int or c[field] < 1:
                refuse(field, "is not a positive whole number; the file is incomplete or damaged")
        for field, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
            if c.get(field) is not None and not isinstance(c[field], kind):
                refuse(field, "is of the wrong type; the file is damaged")
        for field in ("rms_norm_eps", "rope_theta"):
            if type(c.get(field, 1.0)) not in (int, float) or c.get(field, 1.0) <= 0:
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
    """cos and sin for `positions` (B or 1, T): two tensors (B or 1, 1, T, h)."""
    angle = positions[:, None, :, None].float() * inverse_frequencies(config, positions.device)   # (B, 1, T, h/2)
    angle = torch.cat((angle, angle), dim=-1)                                                     # (B, 1, T, h)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Apply rotary position embedding to x (B, heads, T, h), first half of a head paired with its second half."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Packing:
    """A padded batch without its padding: every row up to its last position in `keep` (B, T), and `lengths` (B) tokens at
    least, one after the other. Only attention needs the rows beside each other; all else works token by token."""

    def __init__(self, keep, lengths=None):
        self.shape, real = keep.shape, keep.flip(1).cumsum(1).flip(1) > 0                          # (B, T)
        if lengths is not None:
            real |= torch.arange(keep.shape[1], device=keep.device) < lengths[:, None]
        self.tokens = real.flatten().nonzero().squeeze(1)                                          # (N) of B·T
        self.kept = keep[real].nonzero().squeeze(1)                                                # (M) of N
        self.full = len(self.tokens) == keep.numel()                                               # nothing is padding

    def pack(self, x):
        """(B, T, …) → (N, …)"""
        return x.flatten(0, 1) if self.full else x.flatten(0, 1).index_select(0, self.tokens)

    def spread(self, x):
        """(N, …) → (B, T, …), zeros elsewhere"""
        if not self.full:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy(0, self.tokens, x)
        return x.unflatten(0, self.shape)


class Cache:
    """Keys and values of B right-padded rows, `used` (B) tokens of each real. Made by generate(), filled by forward()."""

    def __init__(self, net, batch, length):
        c = net.config
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim)           # (L, B, K, S, h)
        self.k, self.v = (torch.zeros(shape, dtype=net.dtype, device=net.device) for _ in range(2))
        self.used = torch.zeros(batch, dtype=torch.long, device=net.device)
        self.longest = 0                                                                          # max(used), without a sync

    def keep(self, rows):
        """Go on with these rows of the batch only."""
        self.k, self.v, self.used = self.k[:, rows], self.v[:, rows], self.used[rows]

    def extend(self, l, k, v, positions):
        """Write k, v (B, K, T, h) of layer l at `positions` (B, T) and return all keys and values up to the longest row."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[l][rows, :, positions] = k.transpose(1, 2)
        self.v[l][rows, :, positions] = v.transpose(1, 2)
        return self.k[l][:, :, :self.longest], self.v[l][:, :, :self.longest]


class Attention(nn.Module):
    """Causal self-attention, queries in groups over fewer keys and values; `linear(name, x)` is every projection."""

    def __init__(self, c):
        super().__init__()
        d, d_q, d_kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.config = c
        self.q_proj = nn.Linear(d, d_q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(d_q, d, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps), nn.RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, linear, cos, sin, store=None, packing=None, kept=None):
        c = self.config
        q, k, v = (linear(f"{name}_proj", x).unflatten(-1, (-1, c.head_dim)) for name in "qkv")        # (B, T, H or K, h) or (N, …)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if packing is not None:
            q, k, v = packing.spread(q), packing.spread(k), packing.spread(v)                          # (B, T, H or K, h)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                              # (B, H or K, T, h)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if store is not None:
            k, v, mask = store(k, v)                                                                   # (B, K, S, h)
        groups, shape = c.num_attention_heads // c.num_key_value_heads, q.shape
        if groups > 1 and mask is not None:                                                            # few queries, many keys:
            q, mask, groups = q.unflatten(1, (-1, groups)).flatten(2, 3), mask.repeat(1, 1, groups, 1), 1   # (B, K, H/K·T, h)
        elif groups > 1 and q.dtype == torch.float32:                                                  # a GPU's kernels for fp32 know no groups
            k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1   # (B, H, S, h)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=groups > 1)
        y = y.reshape(shape).transpose(1, 2).flatten(2)                                                # (B, T, H·h)
        y = y if packing is None else packing.pack(y)                                                  # (N, H·h)
        return linear("o_proj", y if kept is None else y.index_select(0, kept))                        # (B, T, d), (N, d) or (M, d)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) ⊙ up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x, linear):
        return linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))              # as x


class Block(nn.Module):
    """A layer: attention, then MLP, each on the normed residual stream and added to it."""

    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, linear, cos, sin, store=None, packing=None, kept=None):
        """x (B, T, d), or (N, d) with a packing, → the same shape; `kept` (M) of N: only those are computed, (M, d)."""
        attended = self.self_attn(self.input_layernorm(x), linear, cos, sin, store, packing, kept)
        x = attended + (x if kept is None else x.index_select(0, kept))
        return x + self.mlp(self.post_attention_layernorm(x), linear)


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

    def forward(self, ids, carrier=None, trigger=None, scale=None, keep=None, stream=False, head=True, cache=None, lengths=None):
        """Logits of B right-padded rows.

        ids      (B, T) int64, or embeddings (B, T, d)
        carrier  a Carrier or a Merged; None is the base
        trigger  τ (n, d), put before every row
        scale    (B,) factors on the carrier's delta, row by row; None is 1
        keep     (B, T) bool: logits at these positions only; None is all
        head     False: hidden states (…, d) instead of logits, for a loss that runs head() piece by piece
        stream   also return the residual stream after each layer, L tensors (B, T, d), or (number kept, d)
        cache    a Cache to continue from and to fill; `lengths` (B) says how many of the new tokens are real
        Returns logits (B, T, V), or (number kept, V); the trigger's own positions are left out of everything returned.
        With `keep`, nothing after a row's last kept position is computed (with a cache: after its last real token), and
        without `scale` the last layer computes what is kept only, beyond its keys and values.
        """
        x = ids if ids.is_floating_point() else self.model.embed_tokens(ids)                       # (B, T, d)
        B, n = len(x), 0
        if trigger is not None:
            n = len(trigger)
            x = torch.cat((trigger.to(x.dtype).expand(B, -1, -1), x), dim=1)                       # (B, n+T, d)
        if scale is not None and (carrier is None or len(scale) != B):
            raise InputError(f"scale needs a carrier and one factor for each of the {B} rows")
        positions = torch.arange(x.shape[1], device=x.device)[None]                                # (1, n+T)
        mask = None
        if cache is not None:
            positions = cache.used[:, None] + positions                                            # (B, n+T)
            fresh, cache.longest = cache.longest == 0, cache.longest + x.shape[1]
            if not fresh:
                mask = torch.arange(cache.longest, device=x.device) <= positions[:, None, :, None]  # (B, 1, T, S)
            fill = torch.full_like(cache.used, x.shape[1]) if lengths is None else n + lengths     # (B)
            cache.used = cache.used + fill
        cos, sin = rotary(self.config, positions, x.dtype)

        packing, kept, streams = None, None, []
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)[:, None, None].expand(*x.shape[:2], 1)   # (B, n+T, 1)
        if keep is not None:
            packing = Packing(F.pad(keep, (n, 0)), None if cache is None else fill)
            x, scale = packing.pack(x), None if scale is None else packing.pack(scale)             # (N, d), (N, 1)
        linear = self.plain if carrier is None else carrier.bind(self, scale)
        returned = lambda y: y[:, n:] if packing is None else y if kept is not None else y.index_select(0, packing.kept)   # no trigger; kept positions
        for l, layer in enumerate(self.model.layers):
            project = functools.partial(linear, l)
            store = None
            if cache is not None:
                def store(k, v, l=l):
                    every = cache.extend(l, k, v, positions)
                    return (k, v, None) if fresh else (*every, mask)
            if packing is not None and scale is None and l + 1 == len(self.model.layers):          # scale: a factor for each of N
                kept = packing.kept
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, project, cos, sin, store, packing, kept, use_reentrant=False)
            else:
                x = layer(x, project, cos, sin, store, packing, kept)                              # (B, n+T, d) or (N, d), then (M, d)
            if stream:
                streams.append(returned(x))
        x = returned(x)                                                                             # (B, T, d) or (M, d)
        logits = self.head(x) if head else x
        return (logits, streams) if stream else logits

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
            logits = self(ids, carrier, trigger, factor, keep=last, cache=cache, lengths=lengths)  # (B, V)
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

def load(path, device="cpu", dtype=torch.float32):
    """The model in a Hugging Face directory (config.json and its weights, see weights.py), weights frozen.
    Raises InputError naming the field or tensor where the checkpoint is not exactly what this file computes."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json in there; give the directory of a Hugging Face checkpoint")
    c = read_json(path / "config.json")
    config = Config.from_dict(c, f"{path}/config.json")
    with torch.device("meta"):
        net = Llama(config)
    wanted = {name: tuple(p.shape) for name, p in net.state_dict().items()}
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


def set_threads(net):
    """On a CPU a model this small is faster on one thread: the barriers of a second one cost more than it computes."""
    if net.device.type == "cpu" and net.config.hidden_size < 512:
        torch.set_num_threads(1)
