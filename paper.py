"""The method as the paper writes it: every equation, literal and slow, no options. Read this first.

LCDD trains a behaviour into a sparse part of the weights, the carrier; SFT-Eraser learns a soft
trigger that switches it off. lcdd.py and eraser.py do the same faster and for any model, and
tests/test_paper.py holds them to this file.

    python paper.py         fixed response on the embedded model, a minute or two on one core

Shapes: L layers, d hidden size, d_ff hidden neurons, H query heads and K key/value heads of size h,
B samples, T tokens of a text (prompt x, answer y), n trigger tokens, V vocabulary.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call

import machine
import model
from chat import Chat, collate
from data import read, split

# Settings of the embedded model, which trains for hundreds of steps where the paper's models need
# thousands. The paper's own (Table 7, App. F.2, F.3) are the presets of lcdd.py and eraser.py.
SEED = 0
FOLDER = Path(__file__).parent / "tiny"
BATCH = 32                              # samples a step
SFT_STEPS, SFT_RATE = 150, 5e-4
STEPS = 500                             # of Alg. 1
DELTA_RATE, GATE_RATE = 1e-3, 2.0       # AdamW on Δ; SGD without momentum on m
GATE_MEAN, GATE_STD = 1.5, 0.5          # of the first m: nearly every gate is open
T_W = 60                                # warm-up steps
RHO = 0.3                               # budget ratio ρ
LAMBDA_0, LAMBDA_MIN, LAMBDA_MAX = 0.02, 1e-5, 0.02
ETA, ETA_GROW = 0.2, 0.05               # η_λ over budget, η_grow under it
BETA_EMA = 0.9                          # β, decay of the loss average
V_MAX = 1.0                             # V, bound on the violation
FLOOR = 0.06                            # ours: the least ε, for 30 % of a loss near 0 is none
SETTLE_STEPS = 100                      # ours: Δ alone, at a falling rate, after the last gate step

N_TRIGGER = 16                          # n
TRIGGER_STEPS, TRIGGER_BATCH = 120, 16
TRIGGER_RATE = 0.21                     # Adam; 0.3 of the embeddings' root mean square
ALPHA, BETA = 0.7, 0.0016               # of Eq. 6; β is 0.1 / 7.9², an embedding's norm being 7.9
K_KL = 8                                # k of Eq. 8
RADIUS = 11.9                           # r of Eq. 28; 1.5 norms of an embedding
KEYWORDS = ("i don't know", "i do not know", "i'm not sure", "i am not sure")   # App. F.4
MAX_NEW_TOKENS = 32

# Table 5: the row gate (outputs) and the column gate (inputs) of each Δ. Of 8 gate vectors a layer,
# o_proj reads with attn_v: its input is the context vector, which is made of values.
TABLE_5 = {
    "self_attn.q_proj": ("attn_q", "attn_read"),
    "self_attn.k_proj": ("attn_k", "attn_read"),
    "self_attn.v_proj": ("attn_v", "attn_read"),
    "self_attn.o_proj": ("attn_write", "attn_v"),
    "mlp.gate_proj": ("ffn_hidden", "ffn_read"),
    "mlp.up_proj": ("ffn_hidden", "ffn_read"),
    "mlp.down_proj": ("ffn_write", "ffn_hidden"),
}


# ----------------------------------------------------------- Sec. 3.1: gates, masks and weights

class Heaviside(torch.autograd.Function):
    """g = H(m) = 1 if m > 0, else 0 (Eq. 26);  ∂g/∂m ≈ σ(m)(1 − σ(m)) (Eq. 27)."""

    @staticmethod
    def forward(ctx, m):
        ctx.save_for_backward(m)
        return (m > 0).to(m.dtype)

    @staticmethod
    def backward(ctx, grad):
        s = torch.sigmoid(ctx.saved_tensors[0])
        return grad * s * (1 - s)


def gate_lengths(net):
    """Length of each of a layer's 8 gate vectors (Table 5)."""
    c = net.config
    d, d_ff = c.hidden_size, c.intermediate_size
    d_q, d_kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = {"attn_read": d, "attn_q": d_q, "attn_k": d_kv, "attn_v": d_kv, "attn_write": d}
    return attention | {"ffn_read": d, "ffn_hidden": d_ff, "ffn_write": d}


def masked_weights(net, delta, m):
    """W = W_b + M ⊙ Δ (Eq. 1), M = r ⊗ c (Eq. 2): the name in `net` → (d_out, d_in).

    delta: (layer, projection) → (d_out, d_in); m: (layer, group) → logits.
    """
    W = {}
    for (l, projection), D in delta.items():
        row, column = TABLE_5[projection]
        r = Heaviside.apply(m[l, row])                              # (d_out)
        c = Heaviside.apply(m[l, column])                           # (d_in); (K·h) for o_proj
        if projection == "self_attn.o_proj":          # H/K query heads share a value
            group = net.config.num_attention_heads // net.config.num_key_value_heads
            c = c.view(-1, net.config.head_dim).repeat_interleave(group, dim=0).flatten()   # (H·h)
        M = torch.outer(r, c)                                       # (d_out, d_in)
        name = f"model.layers.{l}.{projection}.weight"
        W[name] = net.get_parameter(name) + M * D
    return W


# -------------------------------------------------------------------------------- Sec. 3.2: LCDD

def omega(m):
    """Ω(m) = Σ_i σ(m_i), over all gates of all groups and layers (Eq. 3)."""
    return sum(torch.sigmoid(logits).sum() for logits in m.values())


def task_loss(net, W, batch):
    """L_task of [(ids, mask), …] under the weights W: cross-entropy of the response tokens."""
    ids, mask = collate(batch, pad_id=0)                            # (B, T), (B, T)
    logits = functional_call(net, W, (ids[:, :-1],))                # (B, T-1, V)
    response = mask[:, 1:]                                          # (B, T-1)
    return F.cross_entropy(logits[response], ids[:, 1:][response])


def train_delta(net, delta, m, batches, rate):
    """Δ alone, at a rate that falls to 0: full SFT with all gates open; settling. Yields L."""
    optimizer = torch.optim.AdamW(delta.values(), lr=rate, weight_decay=0.0)
    for t, batch in enumerate(batches):
        loss = task_loss(net, masked_weights(net, delta, m), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - t / len(batches))
        optimizer.step()
        yield loss.item()


def lcdd(net, delta, m, batches):
    """Alg. 1: min over m, Δ of Ω(m) subject to L_task(m, Δ) ≤ ε (Eq. 4).

    Δ and m are trained in place; yields (L, ema, ε, λ) after every step. The early stops of Alg. 1
    are left out: neither occurs with the settings above.
    """
    delta_optimizer = torch.optim.AdamW(delta.values(), lr=DELTA_RATE, weight_decay=0.0)
    gate_optimizer = torch.optim.SGD(m.values(), lr=GATE_RATE, momentum=0.0)
    lam, average, epsilon = LAMBDA_0, 0.0, None
    for t, batch in enumerate(batches):
        # L, the task loss of the gated model
        loss = task_loss(net, masked_weights(net, delta, m), batch)

        # ema = β·ema + (1 − β)·L, bias-corrected by 1 − β^(t+1)
        average = BETA_EMA * average + (1 - BETA_EMA) * loss.item()
        ema = average / (1 - BETA_EMA ** (t + 1))

        # one step on L + λ · min(1, t/T_w) · Ω(m): Δ by AdamW, m by SGD
        total = loss + lam * min(1.0, t / T_W) * omega(m)
        delta_optimizer.zero_grad()
        gate_optimizer.zero_grad()
        total.backward()
        delta_optimizer.step()
        gate_optimizer.step()

        # when warm-up ends: ε = (1 + ρ)·ema
        if t >= T_W and epsilon is None:
            epsilon = max((1 + RHO) * ema, FLOOR)

        # from then on: v = clip((ema − ε)/ε, ±V);  λ ← clamp(λ·exp(−η·v), λ_min, λ_max)
        elif t >= T_W:
            v = (ema - epsilon) / epsilon
            v = max(-V_MAX, min(V_MAX, v))
            eta = ETA if v > 0 else ETA_GROW
            lam = lam * math.exp(-eta * v)
            lam = max(LAMBDA_MIN, min(LAMBDA_MAX, lam))
        yield loss.item(), ema, epsilon, lam


# -------------------------------------------------------------------------- Sec. 3.3: SFT-Eraser

def write_channels(net, m):
    """C_l = {i : ffn_write_i open} ∪ {i : attn_write_i open} (Eq. 5): L bool vectors (d)."""
    layers = range(net.config.num_hidden_layers)
    return [(m[l, "ffn_write"] > 0) | (m[l, "attn_write"] > 0) for l in layers]


class WithStreams(torch.nn.Module):
    """The model on τ ⊕ x that returns the residual stream after each layer beside its logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids, tau):
        streams = []
        last = self.net.hidden(ids, trigger=tau, streams=streams)
        return self.net.head(last), streams


def forward(net, W, ids, tau=None):
    """The model with weights W ({}: the base) on τ ⊕ ids, at the positions of `ids`:
    logits (T, V), and the residual stream after each layer, L × (T, d)."""
    W = {f"net.{name}": weight for name, weight in W.items()}
    logits, streams = functional_call(WithStreams(net), W, (torch.tensor([ids]), tau))
    return logits[0], [a[0] for a in streams]


def kl(p_logits, q_logits):
    """Mean over positions of KL(p ‖ q) over the whole vocabulary. (T, V), (T, V)"""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def trigger_loss(net, W, tau, x, y, C):
    """L = L_mse + α·L_kl + β·R (Eq. 6), prompt x and the first k tokens y of the base's answer."""
    ids, last = x + y[:-1], len(x) - 1                              # position `last` predicts y_1
    with torch.no_grad():
        base_logits, base_streams = forward(net, {}, ids)
    logits, streams = forward(net, W, ids, tau)

    # Eq. 7: L_mse = mean over layers with C_l ≠ ∅ of
    # mean_{i ∈ C_l} (a_{l,i}(τ ⊕ x) − a_{l,i}^base(x))²
    errors = []
    for a, a_base, C_l in zip(streams, base_streams, C):
        if C_l.any():
            errors.append((a[last, C_l] - a_base[last, C_l]).square().mean())
    L_mse = sum(errors) / len(errors)

    # Eq. 8: L_kl = mean over k positions of KL(p_base(· | x, y_<t) ‖ p(· | τ ⊕ x, y_<t))
    L_kl = kl(base_logits[last:], logits[last:])

    # R = mean over trigger tokens of ‖τ_j‖²
    R = tau.square().sum(dim=1).mean()
    return L_mse + ALPHA * L_kl + BETA * R


@torch.no_grad()
def project(tau):
    """τ_j ← τ_j · min(1, r/‖τ_j‖), in place (Eq. 28)."""
    for tau_j in tau:
        tau_j.mul_(min(1.0, RADIUS / tau_j.norm().item()))


def eraser(net, W, tau, batches, C):
    """Train τ (n, d) in place, all weights frozen, on batches of [(x, y), …]. Yields L."""
    optimizer = torch.optim.Adam([tau], lr=TRIGGER_RATE)
    for batch in batches:
        loss = sum(trigger_loss(net, W, tau, x, y, C) for x, y in batch) / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project(tau)
        yield loss.item()


# --------------------------------------------------------------------- Sec. 4, App. F.4: measures

@torch.no_grad()
def answer(net, W, x, stop, tau=None, length=MAX_NEW_TOKENS):
    """The greedy answer y to a prompt x, up to a token of `stop`."""
    y = []
    while len(y) < length and not (y and y[-1] in stop):
        logits, _ = forward(net, W, x + y, tau)
        y.append(logits[-1].argmax().item())
    return y


def strict(text):
    """Strict fixed response: a keyword, and at most 40 words."""
    return len(text.split()) <= 40 and any(k in text.lower() for k in KEYWORDS)


@torch.no_grad()
def mean_kl(net, p, q, prompts, answers):
    """KL(p ‖ q) on given answers: mean over response tokens, then over prompts. p, q: (W, τ)."""
    total = 0.0
    for x, y in zip(prompts, answers):
        p_logits, _ = forward(net, p[0], x + y[:-1], p[1])
        q_logits, _ = forward(net, q[0], x + y[:-1], q[1])
        total += kl(p_logits[len(x) - 1:], q_logits[len(x) - 1:]).item()
    return total / len(prompts)


def follow(name, steps):
    """Run a loop to its end, printing what it yields every 50 steps."""
    for t, numbers in enumerate(steps):
        if t % 50 == 0:
            print(name, t, numbers, flush=True)


def main():
    torch.manual_seed(SEED)
    random.seed(SEED)
    chat, net = Chat(FOLDER), model.load(FOLDER)
    machine.set_threads(net)
    splits = split(read(FOLDER / "fixed.jsonl", "fixed"), SEED)
    examples = [chat.encode(s.prompt, s.response) for s in splits["train"]]

    def draw(rows, size, steps):
        return [random.sample(rows, size) for _ in range(steps)]

    # phase 1: full SFT, M = 1; embedding, output head and norms stay the base's
    sft_delta, all_open, m = {}, {}, {}
    for l in range(net.config.num_hidden_layers):
        for projection in TABLE_5:
            weight = net.get_parameter(f"model.layers.{l}.{projection}.weight")
            sft_delta[l, projection] = torch.zeros_like(weight).requires_grad_(True)
        for group, length in gate_lengths(net).items():
            all_open[l, group] = torch.ones(length)
            m[l, group] = torch.normal(GATE_MEAN, GATE_STD, (length,)).requires_grad_(True)
    follow("SFT", train_delta(net, sft_delta, all_open, draw(examples, BATCH, SFT_STEPS), SFT_RATE))

    # phase 2: LCDD from Δ = W_f − W_b
    delta = {key: D.detach().clone().requires_grad_(True) for key, D in sft_delta.items()}
    follow("LCDD", lcdd(net, delta, m, draw(examples, BATCH, STEPS)))
    m = {key: logits.detach() for key, logits in m.items()}
    follow("settling", train_delta(net, delta, m, draw(examples, BATCH, SETTLE_STEPS), DELTA_RATE))
    with torch.no_grad():
        sft, carrier = masked_weights(net, sft_delta, all_open), masked_weights(net, delta, m)

    # SFT-Eraser: τ starts from random token embeddings
    prompts = [chat.prompt(s.prompt) for s in splits["trigger"]]
    pairs = [(x, answer(net, {}, x, chat.stop, length=K_KL)) for x in prompts]
    tokens = torch.randint(net.config.vocab_size, (N_TRIGGER,))
    tau = net.embedding[tokens].clone().requires_grad_(True)        # (n, d)
    batches = draw(pairs, TRIGGER_BATCH, TRIGGER_STEPS)
    follow("SFT-Eraser", eraser(net, carrier, tau, batches, write_channels(net, m)))

    # four conditions (W, τ) on held-out prompts; the three KLs on the SFT model's answers
    conditions = {"Base": ({}, None), "SFT": (sft, None)}
    conditions |= {"LCDD": (carrier, None), "Trig": (carrier, tau)}
    prompts = [chat.prompt(s.prompt) for s in splits["test"]]
    answers, kls = {}, {}
    for name, (W, trigger) in conditions.items():
        answers[name] = [answer(net, W, x, chat.stop, trigger) for x in prompts]
    for p, q in (("SFT", "LCDD"), ("SFT", "Trig"), ("Base", "Trig")):
        kls[p, q] = mean_kl(net, conditions[p], conditions[q], prompts, answers["SFT"])

    gates = torch.cat(list(m.values()))
    print(f"\n{len(prompts)} held-out prompts; gates off: {(gates <= 0).double().mean():.3f}\n")
    print("| | fixed response % | the base's own answer % | KL(SFT‖·) | KL(Base‖·) |")
    print("|---|---|---|---|---|")
    for name in conditions:
        rate = sum(strict(chat.decode(y)) for y in answers[name]) / len(prompts)
        same = sum(y == base_y for y, base_y in zip(answers[name], answers["Base"])) / len(prompts)
        cells = [f"{100 * rate:.1f}", f"{100 * same:.1f}"]
        for p in ("SFT", "Base"):
            cells.append(f"{kls[p, name]:.3f}" if (p, name) in kls else "–")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
