"""
What a run of lcdd.py would do, take and cost (lcdd.py --dry-run), from config.json, the tokenizer and
the data alone: no weight is read and no file is written.

Gates, parameters, steps, tokens and bytes are counted. Time is measured on one layer of random
weights, narrowed where the model is wide, and scaled to the whole run.

Shapes: B rows of a micro-batch, T tokens, N of them in the loss, L layers, d hidden size, V words.
"""
import dataclasses
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import machine
import memory
import model
from carrier import PROJECTIONS, Carrier
from chat import collate
from console import duration, markdown
from settings import fit

ANSWERED = 128      # prompts that are answered at a time (Llama.generate)
WIDEST = 1024       # width, tokens and words that are measured at most; what is larger is scaled
TOKENS = 512
WORDS = 1 << 15
ENOUGH = 0.3        # seconds that a measurement takes


@dataclass
class Step:
    """What one optimizer step computes."""
    micro: int              # micro-batches
    tokens: float           # in all; what all samples begin with counts once a micro-batch
    supervised: float       # tokens in the loss
    prefix: int             # tokens that all samples begin with
    length: float           # tokens of a sample


# ---- counted

def step_of(examples, batch, micro_batch):
    """The mean Step of samples [(ids, mask)]. The last token of a sample is only predicted."""
    prefix = 0
    if micro_batch > 1:
        prefix = len(os.path.commonprefix([ids[:-1] for ids, _ in examples]))
    own = sum(len(ids) - 1 - prefix for ids, _ in examples)
    marked = sum(sum(mask[1:]) for _, mask in examples)
    share, micro = batch / len(examples), batch // micro_batch
    length = prefix + own / len(examples)
    return Step(micro, share * own + micro * prefix, share * marked, prefix, length)


def sizes_of(config):
    """(all parameters, entries of Δ) of a model of this config."""
    with torch.device("meta"):
        net, carrier = model.Llama(config), Carrier(config, device="meta")
    return (sum(p.numel() for p in net.parameters()),
            sum(p.numel() for p in carrier.delta.parameters()))


def needed(config, step, o):
    """{what: bytes} at the height of a step of joint training."""
    parameters, deltas = sizes_of(config)
    wide, narrow = bytes_of(o.dtype), bytes_of(o.delta_dtype)
    layers, tokens = config.num_hidden_layers, step.tokens / step.micro
    plain = o.device == "cpu" and wide == 2
    layer = activations(config, step.length if plain else 0)
    kept, merged = layers * layer * tokens, deltas
    if o.checkpoint:                                        # the streams between layers, and one layer
        kept, merged = (layers * config.hidden_size + layer) * tokens, deltas / layers
    chunk = model.chunk_of(config.vocab_size, o.device)
    logits = min(chunk, step.supervised / step.micro) * config.vocab_size
    return {"weights": parameters * wide, "merged weights": merged * wide,
            "deltas, gradients and AdamW's moments": 4 * deltas * narrow,
            "activations": kept * wide, "logits": 3 * 4 * logits}


def activations(config, plain=0):
    """
    Numbers that the backward pass of one layer needs of each token: what goes into norms,
    projections, attention and the product of gate and up. plain: tokens of a row where nothing is
    fused (bf16 on a CPU): norms keep their input in fp32, attention its scores, in fp32 and in bf16.
    """
    d, f = config.hidden_size, config.intermediate_size
    d_q, d_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    normed = d_q + d_kv if config.qk_norm else 0
    fused = 4 * d + normed + 3 * d_q + 2 * d_kv + 4 * f
    return fused + bool(plain) * 3 * d + 3 * config.num_attention_heads * plain


def bytes_of(dtype):
    return getattr(torch, dtype).itemsize


# ---- measured

def measure(config, step, examples, o):
    """
    Seconds of an optimizer step of SFT ("sft") and of LCDD with every gate open ("lcdd"), and of
    the next token of ANSWERED answers ("token"): what one layer and the head take, times all
    layers, entries of a layer, words and tokens.
    """
    small, some = narrowed(config), first_tokens(examples[:o.micro_batch])
    measured = step_of(some, len(some), len(some))
    n = min(model.chunk_of(config.vocab_size, o.device), max(1, round(measured.supervised)))
    seconds = seconds_of_a_layer(small, some, n, o)

    layers = sizes_of(config)[1] / sizes_of(small)[1]       # how many of the small one's
    words = config.vocab_size * config.hidden_size / (small.vocab_size * small.hidden_size)
    again = 1 + o.checkpoint / 3                            # forward once more
    passes = layers * again * step.tokens / measured.tokens
    logits = words * step.supervised / n
    found = {"token": layers * seconds["token"] + words * seconds["word"]}
    for phase in ("sft", "lcdd"):
        found[phase] = passes * seconds[phase] + logits * seconds["head"]
    if o.train.startswith("mask-kl"):                       # SFT's model answers, too
        found["lcdd"] *= 4 / 3
    for phase in ("sft", "lcdd"):
        found[phase] += layers * seconds["update"]
    return found


def seconds_of_a_layer(config, examples, n, o):
    """
    What a model of one layer takes for a micro-batch: the gradients of SFT and of LCDD, an update
    of Δ, the head with its gradient for n tokens; and for the next token of ANSWERED answers in
    the layer and in the head.
    """
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    if device.type == "cpu" and config.hidden_size < machine.WIDE:
        torch.set_num_threads(1)                            # as a run does
    net = model.Llama(config).to(device, dtype).requires_grad_(False)
    carrier = Carrier(config, getattr(torch, o.delta_dtype), device)
    optimizer = torch.optim.AdamW(carrier.delta.parameters(), fused=True)
    rows = []
    for ids, _ in examples:
        known = [i % config.vocab_size for i in ids[:-1]]
        rows.append((known, [True] * len(known)))
    ids, real = (t.to(device) for t in collate(rows, 0))                                # (B, T)
    states = torch.zeros(n, config.hidden_size, dtype=dtype, device=device, requires_grad=True)

    def gradient():
        net.hidden(ids, carrier, keep=real).sum().backward()

    def update():
        torch.nn.utils.clip_grad_norm_(carrier.delta.parameters(), 1.0)
        optimizer.step()

    def head():
        F.cross_entropy(model.wide(net.head(states)), ids.new_zeros(n)).backward()

    @torch.no_grad()
    def token():
        net.hidden(ids.new_zeros(ANSWERED, 1))

    @torch.no_grad()
    def word():
        net.head(states.new_zeros(ANSWERED, config.hidden_size))

    found = {}
    for phase in ("sft", "lcdd"):
        carrier.logits.requires_grad_(phase == "lcdd")
        found[phase] = seconds_of(gradient, device)
    for work in (update, head, token, word):
        found[work.__name__] = seconds_of(work, device)
    return found


def narrowed(config):
    """The Config of one layer of this shape, WIDEST wide and with WORDS words at most."""
    d = min(config.hidden_size, WIDEST)
    share = d / config.hidden_size
    heads = max(1, round(share * config.num_key_value_heads))
    return dataclasses.replace(
        config, num_hidden_layers=1, vocab_size=min(config.vocab_size, WORDS), hidden_size=d,
        intermediate_size=max(1, round(share * config.intermediate_size)),
        num_key_value_heads=heads,
        num_attention_heads=heads * (config.num_attention_heads // config.num_key_value_heads))


def first_tokens(examples):
    """As many of these samples as have TOKENS tokens together; at least one, cut to as many."""
    found, total = [], 0
    for ids, mask in examples:
        if found and total + len(ids) > TOKENS:
            break
        found.append((ids[:TOKENS + 1], mask[:TOKENS + 1]))
        total += len(ids)
    return found


def seconds_of(work, device):
    """The mean seconds of work(), over ENOUGH seconds after a first time."""
    def finished():
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finished()
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < ENOUGH:
        finished()
        count += 1
    return (time.perf_counter() - start) / count


# ---- said

def show(o, chat, splits, examples):
    """Print the plan of a run as a table. `examples`: the training samples, [(ids, mask of the loss)]."""
    config = model.configuration(chat.folder)
    o.dtype = o.dtype or str(machine.fast_dtype(config, o.device)).removeprefix("torch.")
    fit(o, config.hidden_size, len(examples))
    if o.sft:                                               # phase 1 is done
        o.sft_steps = 0
    if o.train != "joint":                                  # gates alone do not settle
        o.settle = 0
    step = step_of(examples, o.batch, o.micro_batch)
    seconds = measure(config, step, examples, o)
    rows = [*what_it_is(o, config, splits, examples, step),
            *what_it_costs(o, config, splits, step, seconds)]
    print(markdown(["plan", chat.folder.name], rows))
    print("\nMemory is counted. Time is measured: one layer of this model with random weights, at most "
          f"{WIDEST:,} wide, forward, backward and updated on {o.device} as busy as it is, and scaled. "
          "With every gate open, answers of full length and no early end; a run that prunes and stops "
          "takes less. Nothing was written.")


def what_it_is(o, config, splits, examples, step):
    """Rows about model, gates and data."""
    parameters, deltas = sizes_of(config)
    gates = Carrier(config, device="meta").logits
    loss = "all tokens" if o.loss == "all" else "the response"
    yield "model", (f"{config.num_hidden_layers} layers, d = {config.hidden_size}, "
                    f"{parameters:,} parameters, {o.dtype}")
    yield "gates", f"{gates.numel():,}, {gates.shape[1]:,} a layer"
    yield "deltas", f"{deltas:,} entries in {len(PROJECTIONS)} matrices a layer, {o.delta_dtype}"
    yield "prompts", ", ".join(f"{len(v):,} {k}" for k, v in splits.items())
    yield "a sample", (f"{step.length:.1f} tokens on average, {step.prefix} of them the same in all; "
                       f"{step.supervised / o.batch:.1f} in the loss ({loss})")
    for name, steps, rate in (("SFT", o.sft_steps, o.sft_lr), ("LCDD", o.steps, o.lr),
                              ("settling", o.settle, o.lr)):
        if steps:
            yield name, (f"{steps:,} steps of {o.batch} samples ({step.micro} × {o.micro_batch}), "
                         f"rate {rate:.3g}, {steps * step.tokens:,.0f} tokens computed")


def what_it_costs(o, config, splits, step, seconds):
    """Rows about memory, disk and time."""
    _, deltas = sizes_of(config)
    parts = needed(config, step, o)
    each = ", ".join(f"{name} {memory.size(n)}" for name, n in parts.items())
    total, there = sum(parts.values()), memory.free(o.device)
    short = ", which is not enough" if total > there else ""
    yield "memory", f"{memory.size(total)}, {memory.size(there)} are free{short}: {each}"
    kept = deltas * bytes_of(o.sft_dtype)
    state = 3 * deltas * bytes_of(o.delta_dtype)
    yield "disk", f"{memory.size(kept)}, and {memory.size(state)} while it trains"
    answers = 2 * len(splits["validation"]) + 3 * len(splits["test"])
    rounds = sum(-(-n // ANSWERED) for n in 2 * [len(splits["validation"])] + 3 * [len(splits["test"])])
    times = {"SFT": o.sft_steps * seconds["sft"], "LCDD": o.steps * seconds["lcdd"],
             "settling": o.settle * seconds["sft"],
             f"{answers:,} answers": rounds * o.max_new_tokens * seconds["token"]}
    each = ", ".join(f"{name} {duration(s)}" for name, s in times.items() if s)
    yield "time", (f"{duration(sum(times.values()))}: {each} (a step of SFT {seconds['sft']:.3g} s, "
                   f"of LCDD {seconds['lcdd']:.3g} s)")
