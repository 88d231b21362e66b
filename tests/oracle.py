"""The method as the paper writes it, literal and slow: what the tests hold the product to.

It imports nothing of the product. The transformer below is plain functions on a dictionary of a
checkpoint's own tensors: one row at a time, no padding, no cache, a batch is a loop. Sections
follow the paper's order, functions name its equations, and what the paper lacks is said to be ours.

    weights  {Hugging Face name: tensor}, such as "model.layers.0.self_attn.q_proj.weight"
    config   has the checkpoint's sizes and switches, as model.Config names them
    delta    {(layer, projection): Δ (d_out, d_in)}
    m        {(layer, group): gate logits (length)}
    s        settings under the names of the commands' options

Shapes: L layers, d hidden size, d_ff hidden neurons, H query heads and K key/value heads of size h,
T tokens of a row, n trigger tokens, V vocabulary.
"""
import math

import torch

# Table 5: the row gate (outputs) and the column gate (inputs) of each Δ, out of 8 gate vectors per
# layer. o_proj reads with attn_v: its input is the context vector, which is made of values.
TABLE_5 = {
    "self_attn.q_proj": ("attn_q", "attn_read"),
    "self_attn.k_proj": ("attn_k", "attn_read"),
    "self_attn.v_proj": ("attn_v", "attn_read"),
    "self_attn.o_proj": ("attn_write", "attn_v"),
    "mlp.gate_proj": ("ffn_hidden", "ffn_read"),
    "mlp.up_proj": ("ffn_hidden", "ffn_read"),
    "mlp.down_proj": ("ffn_write", "ffn_hidden"),
}


# --------------------------------------------------------------- the base model: a Llama, one row

def rms_norm(x, gain, eps):
    """x / √(mean x² + eps) ⊙ gain, over the last dimension."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def angles(config, T):
    """The angle that each pair of a head's channels turns by at each position. (T, h/2)

    In fp32 whatever the model computes in, for that is what checkpoints were trained with. Llama 3
    leaves pairs that turn often within the original context, divides the frequency of slow ones by
    `factor`, and goes from one to the other linearly in the number of turns.
    """
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequency = 1.0 / config.rope_theta ** exponent                         # (h/2)
    if config.rope_llama3:
        factor, low, high, context = config.rope_llama3
        turns = context * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    return torch.arange(T).float()[:, None] * frequency


def rotate(x, angle):
    """Turn channel i of x (T, h) and channel i + h/2, as a point in the plane, by `angle`."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)             # (T, h/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(weights, config, l, x, linear):
    """Causal self-attention of layer l, head by head: normed stream x (T, d) → (T, d)."""
    T, h = len(x), config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads        # GQA
    query_heads = linear(l, "self_attn.q_proj", x).split(h, dim=-1)         # H × (T, h)
    key_heads = linear(l, "self_attn.k_proj", x).split(h, dim=-1)           # K × (T, h)
    value_heads = linear(l, "self_attn.v_proj", x).split(h, dim=-1)         # K × (T, h)
    angle = angles(config, T)
    future = torch.ones(T, T).triu(1).bool()
    contexts = []
    for i, q in enumerate(query_heads):
        k, v = key_heads[i // group], value_heads[i // group]
        if config.qk_norm:
            name = f"model.layers.{l}.self_attn"
            q = rms_norm(q, weights[f"{name}.q_norm.weight"], config.rms_norm_eps)
            k = rms_norm(k, weights[f"{name}.k_norm.weight"], config.rms_norm_eps)
        scores = rotate(q, angle) @ rotate(k, angle).T / math.sqrt(h)       # (T, T)
        shares = scores.masked_fill(future, -math.inf).softmax(-1)
        contexts.append(shares @ v)                                         # (T, h)
    return linear(l, "self_attn.o_proj", torch.cat(contexts, dim=-1))       # c (T, H·h) → (T, d)


def mlp(l, x, linear):
    """SwiGLU of layer l: normed stream x (T, d) → (T, d)."""
    gate = linear(l, "mlp.gate_proj", x)                                    # (T, d_ff)
    up = linear(l, "mlp.up_proj", x)                                        # (T, d_ff)
    silu = gate * torch.sigmoid(gate)
    return linear(l, "mlp.down_proj", silu * up)


def transformer(weights, config, ids, tau, linear):
    """The model on τ ⊕ ids, linear(l, projection, x) being every projection.

    Returns, at the positions of `ids`, the logits (T, V) and the residual stream after each layer,
    L × (T, d).
    """
    eps = config.rms_norm_eps
    n = 0 if tau is None else len(tau)
    embedding = weights["model.embed_tokens.weight"]                        # (V, d)
    x = embedding[ids]                                                      # (T, d)
    if tau is not None:
        x = torch.cat([tau, x])                                             # (n + T, d)
    streams = []
    for l in range(config.num_hidden_layers):
        name = f"model.layers.{l}"
        normed = rms_norm(x, weights[f"{name}.input_layernorm.weight"], eps)
        x = x + attention(weights, config, l, normed, linear)
        normed = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
        x = x + mlp(l, normed, linear)
        streams.append(x[n:])
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    last = rms_norm(x[n:], weights["model.norm.weight"], eps)
    return last @ head.T, streams


def base_linear(weights, l, projection, x):
    """W x + b of a projection of layer l, for every token of x (T, d_in). (T, d_out)"""
    name = f"model.layers.{l}.{projection}"
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def forward(weights, config, ids, tau=None):
    """The model with these weights on τ ⊕ ids: logits (T, V), streams L × (T, d)."""
    def projected(l, projection, x):
        return base_linear(weights, l, projection, x)
    return transformer(weights, config, ids, tau, projected)


# --------------------------------------------------- Sec. 3.1, App. A, B: gates, masks and weights

class Heaviside(torch.autograd.Function):
    """g = H(m) = 1 if m > 0, else 0 (Eq. 26);  ∂g/∂m ≈ σ(m)(1 − σ(m)) (Eq. 27)."""

    @staticmethod
    def forward(ctx, m):
        ctx.save_for_backward(m)
        return (m > 0).to(m.dtype)

    @staticmethod
    def backward(ctx, grad):
        m, = ctx.saved_tensors
        sigma = torch.sigmoid(m)
        return grad * sigma * (1 - sigma)


def gate_lengths(config):
    """Length of each of a layer's 8 gate vectors (Table 5)."""
    d, d_ff = config.hidden_size, config.intermediate_size
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    return {
        "attn_read": d, "attn_q": d_q, "attn_k": d_kv, "attn_v": d_kv, "attn_write": d,
        "ffn_read": d, "ffn_hidden": d_ff, "ffn_write": d,
    }


def gates(config, m, l, projection):
    """The row gate r (d_out) and the column gate c (d_in) of a projection of layer l."""
    row, col = TABLE_5[projection]
    r = Heaviside.apply(m[l, row])
    c = Heaviside.apply(m[l, col])
    if projection == "self_attn.o_proj":            # H/K query heads read the values of one head
        group = config.num_attention_heads // config.num_key_value_heads
        heads = c.split(config.head_dim)                                    # K × (h)
        repeated = [heads[i // group] for i in range(config.num_attention_heads)]
        c = torch.cat(repeated)                                             # (H·h)
    return r, c


def masked_weights(weights, config, delta, m):
    """All weights of the masked model: W = W_b + M ⊙ Δ (Eq. 1) where there is a Δ, else the base's.

    M = r ⊗ c, M_ij = r_i·c_j (Eq. 2). Returns a dictionary with the names of `weights`.
    """
    W = dict(weights)
    for (l, projection), D in delta.items():
        r, c = gates(config, m, l, projection)
        M = torch.outer(r, c)                                               # (d_out, d_in)
        name = f"model.layers.{l}.{projection}.weight"
        W[name] = weights[name] + M * D
    return W


def gated_forward(weights, config, delta, m, ids, tau=None, scale=1.0):
    """The same model by gating activations instead of weights (App. A).

    Every projection of x is W_b x + scale · r ⊙ Δ(c ⊙ x), with scale 1 in the paper:
        h = act(W_g x + r_hid ⊙ Δ_g(r_in ⊙ x)) ⊙ (W_u x + r_hid ⊙ Δ_u(r_in ⊙ x))            (Eq. 9)
        y = W_d h + r_out ⊙ Δ_d(r_hid ⊙ h)                                                  (Eq. 10)
        q = W_q x + r_q ⊙ Δ_q(r_in ⊙ x), k and v likewise                               (Eq. 16–18)
        o = W_o c + r_out ⊙ Δ_o(r_v ⊙ c), c = softmax(q kᵀ / √h) v                      (Eq. 19, 20)
    """
    def projected(l, projection, x):
        r, c = gates(config, m, l, projection)
        change = r * ((c * x) @ delta[l, projection].T)                     # (T, d_out)
        return base_linear(weights, l, projection, x) + scale * change
    return transformer(weights, config, ids, tau, projected)


# -------------------------------------------------------------------------- Sec. 3.2, Alg. 1: LCDD

def omega(m):
    """Ω(m) = Σ_i σ(m_i), over all gates of all groups and layers (Eq. 3)."""
    return sum(torch.sigmoid(logits).sum() for logits in m.values())


def task_loss(weights, config, batch):
    """L_task of a batch [(ids, mask), …]: mean cross-entropy of its response tokens, in nats.

    mask is True on response tokens; position t − 1 predicts token t.
    """
    total, count = 0.0, 0
    for ids, mask in batch:
        logits, _ = forward(weights, config, ids[:-1])                      # (T - 1, V)
        log_p = logits.log_softmax(-1)
        for t in range(1, len(ids)):
            if mask[t]:
                total = total - log_p[t - 1, ids[t]]
                count += 1
    return total / count


def clip(tensors, bound):
    """Scale the gradients of `tensors` down to the joint norm `bound`; 0: as they are, the paper.

    The 1e-6 is torch's.
    """
    if bound:
        norm = math.sqrt(sum(x.grad.square().sum().item() for x in tensors))
        for x in tensors:
            x.grad.mul_(min(1.0, bound / (norm + 1e-6)))


def adamw(delta):
    """AdamW on Δ without weight decay; each loop below sets the rate."""
    return torch.optim.AdamW(delta.values(), weight_decay=0.0)


def train_delta(weights, config, delta, m, batches, s, rate, optimizer):
    """Δ alone, in place, its rate falling linearly from `rate` to 0. Yields L before every step.

    With every gate open this is full SFT, Δ = W_f − W_b; with the gates that Alg. 1 left it is
    settling, which is ours. `optimizer`: adamw(delta), new or with the moments of Alg. 1.
    """
    for t, batch in enumerate(batches):
        L = task_loss(masked_weights(weights, config, delta, m), config, batch)
        optimizer.zero_grad()
        L.backward()
        clip(delta.values(), s.clip)
        optimizer.param_groups[0]["lr"] = rate * (1 - t / len(batches))
        optimizer.step()
        yield L.item()


def lcdd(weights, config, delta, m, batches, s, optimizer):
    """Alg. 1: min over m, Δ of Ω(m) subject to L_task(m, Δ) ≤ ε (Eq. 4).

    Δ and m are trained in place, Δ by `optimizer`; yields (L, ema, ε, λ) after every step. The
    paper's controller is s.floor = s.select = s.clip = 0 and s.brake = False, without early stops.
    """
    gate_optimizer = torch.optim.SGD(m.values(), lr=s.gate_lr, momentum=0.0)
    optimizer.param_groups[0]["lr"] = s.lr
    lam, average, epsilon = s.lambda0, 0.0, None
    room = 1.0              # share of the slack between L when ε was set and ε that is left
    mean = {key: torch.zeros_like(logits) for key, logits in m.items()}
    for t, batch in enumerate(batches):
        # L, the task loss of the gated model
        L = task_loss(masked_weights(weights, config, delta, m), config, batch)
        optimizer.zero_grad()
        gate_optimizer.zero_grad()
        L.backward()

        # + λ · min(1, t/T_w) · Ω(m). Ours: the task's say in the gates is scaled before (select),
        # and the penalty fades as L nears ε and turns round beyond it (brake)
        warm = min(1.0, t / s.warmup)
        if s.select:
            select(m, mean, warm * s.select * pull(s))
        braked = max(-1.0, min(1.0, room)) if s.brake else 1.0
        (lam * warm * braked * omega(m)).backward()

        # one step: Δ by AdamW, m by SGD
        clip(delta.values(), s.clip)
        optimizer.step()
        gate_optimizer.step()

        # ema = β·ema + (1 − β)·L, bias-corrected by 1 − β^(t+1)
        average = s.beta * average + (1 - s.beta) * L.item()
        ema = average / (1 - s.beta ** (t + 1))

        # when warm-up ends: ε = (1 + ρ)·ema. Ours: a floor, for 30 % of a loss near 0 is nothing
        if t >= s.warmup and epsilon is None:
            start = ema
            epsilon = max((1 + s.rho) * ema, s.floor)

        # from then on: v = clip((ema − ε)/ε, ±V);  λ ← clamp(λ·exp(−η·v), λ_min, λ_max)
        elif t >= s.warmup:
            v = (ema - epsilon) / epsilon
            if s.brake:                     # λ follows too, for shut gates hardly open again
                room = (epsilon - ema) / max(epsilon - start, 1e-12)
                v = -room
            if s.violation_clip:
                v = max(-s.violation_clip, min(s.violation_clip, v))
            eta = s.eta if v > 0 else s.eta_grow
            lam = lam * math.exp(-eta * v)
            lam = max(s.lambda_min, min(s.lambda_max, lam))
        yield L.item(), ema, epsilon, lam


def pull(s):
    """λ₀·σ′(mean): the penalty's pull on a gate at the start."""
    sigma = 1 / (1 + math.exp(-s.gate_mean))
    return s.lambda0 * sigma * (1 - sigma)


def select(m, mean, size):
    """Replace the task's gradient on the gates by its running mean, scaled layer by layer.

    Its root mean square over a layer's gates becomes `size`. Near zero loss that gradient is next
    to nothing beside the penalty's, and the noise of the first logits would choose the carrier.
    `mean`, {(layer, group): running mean}, moves in place.
    """
    for key, logits in m.items():
        mean[key] = 0.9 * mean[key] + 0.1 * logits.grad
    for layer in sorted({l for l, _ in m}):
        keys = [key for key in m if key[0] == layer]
        every = torch.cat([mean[key] for key in keys])                      # (a layer's gates)
        rms = every.square().mean().sqrt().item()
        for key in keys:
            m[key].grad = mean[key] * (size / max(rms, 1e-30))


# -------------------------------------------------------------------------- Sec. 3.3: SFT-Eraser

def write_channels(config, m):
    """C_l = {i : ffn_write_i open} ∪ {i : attn_write_i open} (Eq. 5): L × (d) bool."""
    layers = range(config.num_hidden_layers)
    return [(m[l, "ffn_write"] > 0) | (m[l, "attn_write"] > 0) for l in layers]


def base_variance(weights, config, prompts):
    """Variance over prompts of the base's residual stream at the last prompt token: L × (d)."""
    ends = []
    for x in prompts:
        _, streams = forward(weights, config, x)
        ends.append(torch.stack([a[-1] for a in streams]))                  # (L, d)
    return list(torch.stack(ends).var(0))


def matching_loss(streams, base_streams, last, C, variance=None):
    """L_mse (Eq. 7): mean over layers with C_l ≠ ∅ of mean_{i ∈ C_l} (a_{l,i} − a_{l,i}^base)².

    Streams L × (T, d) on τ ⊕ x and on x; `last` is the last prompt token. With a variance L × (d),
    which is ours, each layer is divided by its mean over C_l. 0 if every C_l is empty.
    """
    errors = []
    for l, channels in enumerate(C):
        if channels.any():
            a, a_base = streams[l][last, channels], base_streams[l][last, channels]     # (|C_l|)
            unit = 1.0 if variance is None else variance[l][channels].mean()
            errors.append((a - a_base).square().mean() / unit)
    return sum(errors) / max(1, len(errors))


def kl(p_logits, q_logits):
    """Mean over positions of KL(p ‖ q) over the whole vocabulary, in nats. (T, V), (T, V)"""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def trigger_loss(weights, W, config, tau, sample, C, s, variance=None):
    """L = L_mse + α·L_kl + β·R (Eq. 6) of one sample: (L, L_mse, L_kl, R).

    weights: the base; W: the model that τ stands before. sample: prompt x, an answer y, and the
    positions in x ⊕ y of Eq. 8; position len(x) − 1 predicts y_1.
    """
    x, y, positions = sample
    ids, last = x + y[:-1], len(x) - 1              # the last token of y only gets predicted
    with torch.no_grad():
        base_logits, base_streams = forward(weights, config, ids)
    logits, streams = forward(W, config, ids, tau)
    L_mse = matching_loss(streams, base_streams, last, C, variance)

    # Eq. 8: L_kl = mean over k positions of KL(p_base(· | x, y_<t) ‖ p(· | τ ⊕ x, y_<t))
    L_kl = kl(base_logits[positions], logits[positions])

    # R = mean over trigger tokens of ‖τ_j‖²
    R = tau.square().sum(dim=1).mean()
    return L_mse + s.alpha * L_kl + s.beta * R, L_mse, L_kl, R


@torch.no_grad()
def project(tau, r):
    """τ_j ← τ_j · min(1, r/‖τ_j‖), in place (Eq. 28)."""
    for tau_j in tau:
        tau_j.mul_(min(1.0, r / tau_j.norm().item()))


def eraser(weights, W, config, tau, batches, C, s, variance=None):
    """Train τ (n, d) in place by Adam, every weight frozen, on batches [(x, y, positions), …].

    s.lr, s.bound and s.beta are plain numbers. Yields the mean of Eq. 6 before every step.
    """
    optimizer = torch.optim.Adam([tau])
    for t, batch in enumerate(batches):
        L = 0.0
        for sample in batch:
            parts = trigger_loss(weights, W, config, tau, sample, C, s, variance)
            L = L + parts[0] / len(batch)
        optimizer.zero_grad()
        L.backward()
        clip([tau], s.clip)
        fall = 1.0
        if s.schedule == "cosine":                          # ours; the paper's rate is constant
            fall = 0.5 * (1 + math.cos(math.pi * t / len(batches)))
        optimizer.param_groups[0]["lr"] = s.lr * fall
        optimizer.step()
        project(tau, s.bound)
        yield L.item()


# ------------------------------------------------------------------- Sec. 4, App. F.4: measures

@torch.no_grad()
def answer(weights, config, x, stop, tau=None, length=128):
    """The greedy answer to a prompt x: new ids, up to and with a token of `stop`."""
    y = []
    while len(y) < length and not (y and y[-1] in stop):
        logits, _ = forward(weights, config, x + y, tau)
        y.append(logits[-1].argmax().item())
    return y


@torch.no_grad()
def mean_kl(config, p, q, prompts, answers):
    """KL(p ‖ q) on given answers: mean over tokens, then over prompts; p and q are (weights, τ)."""
    total = 0.0
    for x, y in zip(prompts, answers):
        ids, last = x + y[:-1], len(x) - 1
        p_logits, _ = forward(p[0], config, ids, p[1])
        q_logits, _ = forward(q[0], config, ids, q[1])
        total += kl(p_logits[last:], q_logits[last:]).item()
    return total / len(prompts)
