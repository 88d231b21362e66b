"""
A Llama-family transformer in one file: Llama 2/3, Vicuna, DeepSeek-R1-Distill-Llama, Mistral v0.3,
Qwen2/2.5, Qwen3, SmolLM2, TinyLlama. Loads a Hugging Face directory as it lies: the module tree
below *is* the table of tensor names.

Shapes: B batch rows, T tokens, n trigger tokens, d hidden size, H query heads, K key/value heads,
h head_dim, f d_ff, V vocabulary. The layers see N tokens one after the other, without padding;
rows.py knows which row each is in. Where it is said which positions are wanted, these are M.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import memory
import weights
from config import Config
from files import InputError, check_finite, shown
from machine import fast_dtype
from parallel import gathered, share, world
from rows import Cache, Rows, each

COMPACT = 0.75   # of a batch's rows still going: finished ones leave it
CACHED = 6 << 20  # logits at a time, on a CPU


def wide(x):
    """
    x in fp32 at least: where precision decides (softmax over the vocabulary), bf16 is not enough.
    nn.RMSNorm does it itself.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---- a layer

class Attention(nn.Module):
    """Causal self-attention, queries in groups over fewer keys and values."""

    def __init__(self, c):
        super().__init__()
        d = c.hidden_size
        d_q = c.num_attention_heads * c.head_dim
        d_kv = c.num_key_value_heads * c.head_dim
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(d, d_q, bias=c.qkv_bias)
        self.k_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.v_proj = nn.Linear(d, d_kv, bias=c.qkv_bias)
        self.o_proj = nn.Linear(d_q, d, bias=c.o_bias)
        self.q_norm = self.k_norm = None
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, l, x, linear, rows):
        q = linear(l, "q_proj", x).unflatten(-1, (-1, self.head_dim))   # (N, H, h)
        k = linear(l, "k_proj", x).unflatten(-1, (-1, self.head_dim))   # (N, K, h)
        v = linear(l, "v_proj", x).unflatten(-1, (-1, self.head_dim))   # (N, K, h)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return linear(l, "o_proj", rows.attend(l, q, k, v))             # (N, d)


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

    def forward(self, l, x, linear, rows):
        """
        Layer l: x (N, d) → (N, d); the last layer computes no token once only others are wanted.
        linear(l, name, x) is every projection.
        """
        attended = self.self_attn(l, self.input_layernorm(x), linear, rows)
        x = rows.narrow(l, x) + attended
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
        self.projections = [projections_of(layer) for layer in self.model.layers]
        self.stop = frozenset()      # ids that end an answer, from the checkpoint's own settings
        self.checkpoint = False      # recompute layers going backward: less memory, more time

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

    def embed(self, ids, trigger=None):
        """Ids (N) → embeddings (N, d); the ids −n … −1 are the n tokens of the trigger τ (n, d)."""
        if trigger is None:
            return self.model.embed_tokens(ids)
        x = self.model.embed_tokens(ids.clamp(min=0))
        place = (ids < 0).nonzero().squeeze(1)
        soft = trigger.to(x.dtype).index_select(0, ids[place] + len(trigger))
        return x.index_copy(0, place, soft)

    def head(self, x):
        """Hidden states (…, d) → logits (…, V)."""
        tied = self.config.tie_word_embeddings
        return F.linear(self.model.norm(x), self.embedding if tied else self.lm_head.weight)

    @property
    def chunk(self):
        """How many tokens' logits are made at a time."""
        return chunk_of(self.config.vocab_size, self.device.type)

    def plain(self, l, name, x):
        """The base's own projections: what a carrier's bind() stands in for."""
        return self.projections[l][name](x)

    def hidden(self, ids, carrier=None, trigger=None, scale=None, keep=None, cache=None,
               lengths=None, streams=None):
        """
        Hidden states after the last layer, which head() makes logits of: (B, T, d), or (M, d) with
        `keep`. Takes what forward() takes; the residual stream after each layer, of the same shape,
        is appended to the list `streams`.
        """
        if scale is not None and (carrier is None or len(scale) != len(ids)):
            raise InputError("scale needs a carrier and one factor for each of the "
                             f"{len(ids)} rows")
        rows = Rows(self, ids, keep, trigger, scale, cache, lengths)
        linear = self.plain if carrier is None else carrier.bind(self, rows.scale)
        x = self.embed(rows.ids, rows.soft)                             # (N, d)
        for l, layer in enumerate(self.model.layers):
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, l, x, linear, rows, use_reentrant=False)
            else:
                x = layer(l, x, linear, rows)
            if streams is not None:
                streams.append(rows.answer(l, x))
        return rows.answer(l, x) if streams is None else streams[-1]

    def forward(self, ids, carrier=None, trigger=None, scale=None, keep=None, cache=None,
                lengths=None):
        """
        Logits (B, T, V) of B right-padded rows of token ids (B, T), a tensor or a list of lists.

        carrier  a Carrier or a Merged; None is the base
        trigger  τ (n, d), put before every row; or a list of one for each row, of any lengths, None
                 where a row has none. Nothing is returned for its own positions
        scale    (B,) factors on the carrier's delta, row by row; None is 1
        keep     (B, T) bool: logits (M, V) at these M positions only, and nothing after a row's
                 last one is computed
        cache    a Cache to continue from and to fill; `lengths` (B) says how many of the new tokens
                 are real
        """
        ids = torch.as_tensor(ids, device=self.device)
        return self.head(self.hidden(ids, carrier, trigger, scale, keep, cache, lengths))

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=128, carrier=None, trigger=None, scale=None,
                 stop=None, batch_size=128, progress=None, heard=None):
        """
        Greedy answers to `prompts` (lists of ids, any lengths): new ids only, the stop token
        included. Prompts are decoded in batches of similar length.

        trigger: one for all prompts, or a list of one or None for each. scale: one factor a prompt.
        stop: ids that end an answer, by default the checkpoint's own. progress: called each token
        with the number finished. heard: called with (which prompt, id) as soon as there is a new id.
        """
        stop = self.stop if stop is None else stop
        if not all(len(prompt) for prompt in prompts):
            raise InputError("generate: an empty prompt; every prompt needs at least one token")
        if carrier is not None and scale is None:
            carrier = carrier.merge(self)        # W once, instead of a product with Δ every token
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=torch.float32)
        triggers = each(trigger, len(prompts))
        answers = [[] for _ in prompts]
        order = share(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        for start in range(0, len(order), batch_size):
            batch = order[start:start + batch_size]
            some = [prompts[i] for i in batch]
            factors = None if scale is None else scale[batch].to(self.device)
            before = [triggers[i] for i in batch]
            finished = start
            for new in self.decode(some, max_new_tokens, carrier, before, factors, stop):
                for row, token in new:
                    answers[batch[row]].append(token)
                    finished += token in stop
                    if heard:
                        heard(batch[row], token)
                if progress:
                    progress(finished * world())
        for i, answer in gathered([(i, answers[i]) for i in order]):
            answers[i] = answer
        return answers

    def decode(self, prompts, max_new_tokens, carrier, triggers, scale, stop):
        """
        Decode one batch: yields, a token at a time, [(which prompt, its new id), …] of those that
        are not finished. Finished rows leave the batch once enough of them are.
        """
        ids, lengths = pad(prompts, self.device)                        # (B, T), (B)
        n = max(0 if tau is None else len(tau) for tau in triggers)
        cache = Cache(self, len(ids), n + ids.shape[1] + max_new_tokens)
        last = torch.arange(ids.shape[1], device=self.device) == lengths[:, None] - 1   # (B, T)
        logits = self(ids, carrier, triggers, scale, last, cache, lengths)              # (B, V)
        alive = list(range(len(prompts)))        # alive[b] is the prompt in row b of the cache
        finished = set()
        for step in range(max_new_tokens):
            token = logits.argmax(-1)                                   # (B)
            new = [(i, t) for i, t in zip(alive, token.tolist()) if i not in finished]
            finished.update(i for i, t in new if t in stop)
            yield new
            going = [b for b, i in enumerate(alive) if i not in finished]
            if not going or step + 1 == max_new_tokens:
                return
            if len(going) <= COMPACT * len(alive):
                alive = [alive[b] for b in going]
                going = torch.tensor(going, device=self.device)
                cache.keep(going)
                token = token[going]
                scale = None if scale is None else scale[going]
            logits = self(token[:, None], carrier, scale=scale, cache=cache)[:, -1]     # (B, V)


# ---- losses on logits

def chunk_of(words, device):
    """
    How many tokens' logits are made at a time: on a CPU as many as stay in its cache, where what
    follows runs three times as fast as on more.
    """
    return max(32, CACHED // words) if device == "cpu" else 1024


class InPieces(torch.autograd.Function):
    """
    Σ piece(h, …) over pieces of `size` rows of hidden (N, d) and what belongs to each row. A piece
    is differentiated as soon as it is computed, so no logits outlive it and none are made twice.
    Only `hidden` gets a gradient.
    """

    @staticmethod
    def forward(ctx, piece, size, hidden, *others):
        total, grad = hidden.new_zeros((), dtype=wide(hidden).dtype), torch.empty_like(hidden)
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
        grad, = ctx.saved_tensors                                                   # (N, d)
        return None, None, grad * grad_of_total, *[None] * (len(ctx.needs_input_grad) - 3)


def in_pieces(net, piece, hidden, *others, chunk=None):
    """
    Σ piece(h, …) over rows of hidden (N, d) and of `others`, `chunk` at a time (net.chunk): the
    loss of piece(hidden, *others) in less memory and time.
    """
    size = chunk or net.chunk
    if torch.is_grad_enabled() and hidden.requires_grad:
        return InPieces.apply(piece, size, hidden, *others)
    cut = [t.split(size) for t in (hidden, *others)]
    return sum(piece(*rows) for rows in zip(*cut))


def projections_of(layer):
    """{name: nn.Linear} of a Block, in the checkpoint's own names: q_proj … down_proj."""
    found = {}
    for part in (layer.self_attn, layer.mlp):
        for name, module in part.named_children():
            if name.endswith("_proj"):
                found[name] = module
    return found


def pad(prompts, device):
    """Lists of ids → ids (B, T), padded on the right with 0, and lengths (B)."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long, device=device)
    for b, prompt in enumerate(prompts):
        ids[b, :len(prompt)] = torch.as_tensor(prompt)
    return ids, lengths


# ---- loading

def configuration(folder):
    """
    The Config of a checkpoint (see weights.py). Raises InputError naming the field that does not
    run here.
    """
    path = Path(folder)
    where = path / "config.json" if path.is_dir() else path
    return Config.from_dict(weights.described(path, "config.json"), where)


def load(path, device="cpu", dtype=torch.float32):
    """
    The model in a Hugging Face directory or a GGUF file (see weights.py), weights frozen. dtype
    None: the fastest here. Raises InputError naming the field or tensor where the checkpoint is not
    exactly what this file computes.
    """
    path = Path(path)
    config = configuration(path)
    dtype = dtype or fast_dtype(config, device)
    with torch.device("meta"):
        net = Llama(config)
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    memory.check(memory.of_weights(shapes.values(), dtype), f"the model in {path}",
                 "use a smaller one, or a machine with more memory", device)
    tensors = read_tensors(path, shapes, device, dtype)
    if config.tie_word_embeddings:
        check_tied(path, tensors)
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); the "
                         "checkpoint is incomplete")
    net.load_state_dict(tensors, assign=True)
    net.stop = stop_ids(path)
    return net.requires_grad_(False).eval()


def read_tensors(path, shapes, device, dtype):
    """
    {name: tensor} of a checkpoint's weights, each as `shapes` wants it; and lm_head.weight, which
    may stand beside an embedding that it is tied to. Raises InputError for any other.
    """
    found = {}
    embedding = shapes["model.embed_tokens.weight"]
    wanted = {"lm_head.weight": embedding, **shapes}
    for file in weights.shards(path)[0]:
        for name, t in weights.tensors(file):
            if name not in wanted:
                family = weights.described(path, "config.json")["model_type"]
                raise InputError(f"{file.name}: tensor {name} is not part of a {family} model with "
                                 "this config.json")
            if tuple(t.shape) != wanted[name]:
                raise InputError(f"{file.name}: tensor {name} has shape {tuple(t.shape)}, "
                                 f"config.json asks for {wanted[name]}")
            if not t.is_floating_point() or t.element_size() < 2:
                raise InputError(f"{file.name}: tensor {name} is {t.dtype}, quantised; use a "
                                 "checkpoint in bf16, fp16 or fp32")
            check_finite(file, {name: t})
            found[name] = t.to(device, dtype)
    return found


def check_tied(path, tensors):
    """
    Take a tied head out of `tensors`. It may stand there, but only as a copy of the embedding.
    """
    tied = tensors.pop("lm_head.weight", None)
    embedding = tensors.get("model.embed_tokens.weight")
    if tied is not None and embedding is not None and not torch.equal(tied, embedding):
        raise InputError(f"{path}: tensor lm_head.weight is not the embedding although config.json "
                         "says tie_word_embeddings; correct one of the two")


def stop_ids(path):
    """The ids that end an answer, of config.json and generation_config.json: a frozenset."""
    found = set()
    for name in ("config.json", "generation_config.json"):
        ids = weights.described(path, name).get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if type(i) not in (int, type(None)):
                raise InputError(f"{path}: eos_token_id {shown(i)} in {name} is no token's id; use the "
                                 "model's own file")
            found.add(i)
    found.discard(None)
    return frozenset(found)
