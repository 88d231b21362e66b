"""
model.py against the transformers library: small checkpoints with random weights, written by
save_pretrained.

The weights are drawn large, so that every part of the model shows in the logits:
test_the_comparison_would_notice proves that a wrong constant or a forgotten tensor moves logits 100
× the tolerance.
"""
import dataclasses
import json
import shutil
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import model
from carrier import Carrier
from config import Config
from files import InputError
from helpers import make_net
from rows import Cache, attention, inverse_frequencies, literal_attention

TOLERANCE = 1e-4    # logits, fp32, against transformers
SAME = 1e-5         # logits, fp32, of the same model computed in two ways

SIZE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    rms_norm_eps=0.02, max_position_embeddings=512, bos_token_id=1, eos_token_id=2
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64
)


def default(theta):
    return dict(rope_type="default", rope_theta=theta)


FAMILIES = {  # name → transformers' config class, what is special about the family
    "llama2": ("Llama", dict()),
    "llama3": (
        "Llama", dict(num_key_value_heads=2, rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    ),
    "llama3.2": (
        "Llama",
        dict(
            num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
            rope_parameters={**LLAMA3, "rope_theta": 500000.0, "factor": 32.0}
        ),
    ),
    "vicuna": ("Llama", dict(rope_parameters=default(10000.0))),
    "deepseek": (
        "Llama",
        dict(
            num_key_value_heads=2, eos_token_id=[2, 3], attention_bias=False, mlp_bias=False,
            rope_parameters={**LLAMA3, "rope_theta": 500000.0}
        ),
    ),
    "mistral": (
        "Mistral",
        dict(num_key_value_heads=2, head_dim=16, sliding_window=None, rope_parameters=default(1e6)),
    ),
    "qwen2": (
        "Qwen2",
        dict(
            num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=default(1e6),
            sliding_window=8
        ),
    ),
    "qwen3": (
        "Qwen3",
        dict(
            num_key_value_heads=2, head_dim=20, tie_word_embeddings=True,
            rope_parameters=default(1e6)
        ),
    ),
    "smollm2": (
        "Llama",
        dict(
            num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True,
            rope_parameters=default(1e5)
        ),
    ),
    "tinyllama": (
        "Llama",
        dict(num_attention_heads=8, num_key_value_heads=1, rope_parameters=default(10000.0)),
    ),
    "biases": ("Llama", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "qwen3 biases": ("Qwen3", dict(num_key_value_heads=2, head_dim=12, attention_bias=True)),
}


def randomise(net):
    """
    Weights that make a wrong model show: sharp attention, norms and biases that are not 1 and 0.
    """
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0, 0.5)
        elif "norm" in name:
            p.data.uniform_(0.5, 1.5)
        elif "embed" in name or "lm_head" in name:
            p.data.normal_(0, 0.2 if net.config.tie_word_embeddings else 0.1)
        else:
            p.data.normal_(
                0, (1.5 if "q_proj" in name or "k_proj" in name else 1) / p.shape[1] ** 0.5
            )


def as_transformers_4(directory, family):
    """
    Rewrite config.json as transformers 4 wrote it; Vicuna's does without what LLaMA 1 had no field
    for.
    """
    c = json.loads((directory / "config.json").read_text())
    rope = c.pop("rope_parameters")
    c["rope_theta"], c["torch_dtype"] = rope.pop("rope_theta"), c.pop("dtype")
    c["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    c.pop("layer_types", None)
    if family == "vicuna":
        for field in (
            "rope_theta", "rope_scaling", "num_key_value_heads", "head_dim", "attention_bias",
            "mlp_bias"
        ):
            c.pop(field)
    (directory / "config.json").write_text(json.dumps(c))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """
    checkpoint(family, style) → (directory, transformers' model as it reads that directory), made
    once.
    """
    made = {}

    def get(family, style=5):
        if (family, style) not in made:
            kind, special = FAMILIES[family]
            directory = tmp_path_factory.mktemp("checkpoint")
            torch.manual_seed(1)
            net = getattr(transformers, f"{kind}ForCausalLM")(
                getattr(transformers, f"{kind}Config")(**{**SIZE, **special})
            )
            randomise(net)
            net.save_pretrained(directory)
            if style == 4:
                as_transformers_4(directory, family)
            made[family, style] = (
                directory, transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
            )
        return made[family, style]
    return get


@pytest.fixture
def net(checkpoint):
    return model.load(checkpoint("llama3")[0])


@pytest.fixture
def copy(checkpoint, tmp_path):
    """
    A copy of a checkpoint to spoil, with edit(**fields) for its config.json and edit_tensors(f).
    """
    shutil.copytree(checkpoint("llama3")[0], tmp_path, dirs_exist_ok=True)

    def edit(**fields):
        c = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**c, **fields}))

    def edit_tensors(change):
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return types.SimpleNamespace(path=tmp_path, edit=edit, edit_tensors=edit_tensors)


def some_ids(*shape):
    return torch.randint(5, SIZE["vocab_size"], shape)


def some_prompts(*lengths):
    return [some_ids(n).tolist() for n in lengths]


def hf_answer(hf, prompt, n, stop, prefix=None):
    """
    Greedy answer of transformers' generate() to one prompt, optionally with embeddings (n, d)
    before it.
    """
    x = hf.get_input_embeddings()(torch.tensor([prompt]))
    x = x if prefix is None else torch.cat((prefix[None], x), 1)
    return hf.generate(
        inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), max_new_tokens=n,
        do_sample=False, pad_token_id=0, eos_token_id=sorted(stop) or None
    )[0].tolist()


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance


# ---- against transformers

@pytest.mark.parametrize("style", (4, 5))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(checkpoint, family, style):
    directory, hf = checkpoint(family, style)
    fields = json.loads((directory / "config.json").read_text())
    assert ("rope_parameters" in fields) == (style == 5)
    assert ("torch_dtype" in fields) == (style == 4)
    net, ids = model.load(directory), some_ids(2, 40)
    with torch.no_grad():
        logits = hf(ids).logits
        assert logits.std() > 0.5
        close(net(ids), logits, TOLERANCE)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_would_notice(checkpoint, family):
    """
    Every constant that is read from config.json, every bias and norm weight, shows in the logits of
    test_logits.
    """
    net, ids = model.load(checkpoint(family)[0]), some_ids(2, 40)
    c, right = net.config, net(ids)
    wrong = [dict(rope_theta=c.rope_theta * 1.5), dict(rms_norm_eps=1e-6)]
    wrong += [
        {field: neutral}
        for field, neutral in dict(
            rope_llama3=None, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False
        ).items()
        if getattr(c, field) != neutral
    ]
    if c.rope_llama3:
        wrong += [
            dict(rope_llama3=tuple(x * (1.5 if i == k else 1) for k, x in enumerate(c.rope_llama3)))
            for i in range(4)
        ]
    for change in wrong:
        other = model.Llama(dataclasses.replace(c, **change))
        other.load_state_dict(net.state_dict(), strict=False)
        assert (other(ids) - right).abs().max() > 100 * TOLERANCE, change
    for name, p in net.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            kept = p.clone()
            p[0] += 0.5
            assert (net(ids) - right).abs().max() > TOLERANCE, name
            p.copy_(kept)


@pytest.mark.parametrize("style", (4, 5))
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(checkpoint, family, style):
    directory, hf = checkpoint(family, style)
    net, prompts = model.load(directory), some_prompts(9, 1, 23, 4)
    assert net.stop == ({2, 3} if family == "deepseek" else {2})
    with torch.no_grad():
        assert net.generate(prompts, max_new_tokens=8) == [
            hf_answer(hf, p, 8, net.stop) for p in prompts
        ]


def test_llama3_frequencies_of_real_models():
    """Llama 3.1 and 3.2 at their real sizes, against transformers' own inverse frequencies."""
    for factor, head_dim in ((8.0, 128), (32.0, 64)):
        fields = dict(
            hidden_size=32 * head_dim,
            num_attention_heads=32,
            head_dim=head_dim,
            rope_parameters={
                **LLAMA3,
                "rope_theta": 500000.0,
                "factor": factor,
                "original_max_position_embeddings": 8192,
            },
        )
        rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
            transformers.LlamaConfig(**fields)
        )
        config = Config.from_dict(
            dict(
                model_type="llama", vocab_size=9, intermediate_size=9, num_hidden_layers=1, **fields
            )
        )
        assert torch.allclose(
            inverse_frequencies(config, torch.device("cpu")), rope.inv_freq, rtol=1e-6, atol=0
        )


def test_stream_is_the_hidden_states(checkpoint):
    directory, hf = checkpoint("qwen3")
    net, ids = model.load(directory), some_ids(2, 17)
    with torch.no_grad():
        states = hf(ids, output_hidden_states=True).hidden_states
    stream, logits = [], net(ids)
    net.hidden(ids, streams=stream)
    assert len(stream) == 3 == len(states) - 1
    for ours, theirs in zip(stream[:-1], states[1:-1]):
        close(ours, theirs, TOLERANCE)
    # transformers gives the last one after the final norm
    close(net.model.norm(stream[-1]), states[-1], TOLERANCE)
    assert torch.equal(net.head(stream[-1]), logits)


def test_trigger_against_transformers(checkpoint):
    directory, hf = checkpoint("qwen2")
    net, prompts, trigger = model.load(directory), some_prompts(9, 1, 17), torch.randn(5, 48)
    with torch.no_grad():
        assert net.generate(prompts, 8, trigger=trigger) == [
            hf_answer(hf, p, 8, net.stop, trigger) for p in prompts
        ]
    assert net.generate(prompts, 8, trigger=trigger) != net.generate(prompts, 8)


def rms(x):
    return x.float().pow(2).mean().sqrt()


@pytest.mark.parametrize("family", ("llama3", "qwen3"))
def test_bf16(checkpoint, family, tmp_path):
    directory, hf = checkpoint(family)
    ids = some_ids(2, 40)
    half = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    net = model.load(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16} == {net.dtype}
    with torch.no_grad():
        ours, theirs, exact = net(ids), half(ids).logits, hf(ids).logits
        assert ours.dtype == torch.bfloat16
        # no worse than transformers' own bf16
        assert rms(ours - exact) < 1.1 * rms(theirs - exact) < 0.2 * rms(exact)
    # a bf16 file, computed in fp32
    half.save_pretrained(tmp_path)
    again = model.load(tmp_path)
    assert again.dtype == torch.float32
    with torch.no_grad():
        close(again(ids), half.float()(ids).logits, TOLERANCE)


@pytest.mark.parametrize("keys", (1, 2, 6))
@pytest.mark.parametrize("masked", (False, True))
def test_attention_step_by_step_is_attention(keys, masked):
    """
    literal_attention against torch's kernel on keys repeated for every query head: values and
    gradients, float64.
    """
    q, k, v = (
        torch.randn(3, heads, 7, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, keys, keys)
    )
    mask = (torch.rand(3, 1, 7, 7) < 0.5) | torch.eye(7, dtype=torch.bool) if masked else None
    wide_k, wide_v = (x.repeat_interleave(6 // keys, dim=1) for x in (k, v))
    right = torch.nn.functional.scaled_dot_product_attention(
        q, wide_k, wide_v, attn_mask=mask, is_causal=not masked
    )
    into = torch.randn_like(right)
    for ours in (literal_attention(q, k, v, mask), attention(q, k, v, mask)):
        close(ours, right, 1e-12)
        for a, b in zip(
            torch.autograd.grad(ours, (q, k, v), into, retain_graph=True),
            torch.autograd.grad(right, (q, k, v), into, retain_graph=True),
        ):
            close(a, b, 1e-12)


def test_a_model_is_loaded_in_the_fastest_dtype_if_none_is_given(checkpoint, monkeypatch):
    monkeypatch.setattr(model, "fast_dtype", lambda config, device: torch.bfloat16)
    assert model.load(checkpoint("llama3")[0], dtype=None).dtype == torch.bfloat16


# ---- against itself

def test_padding_changes_nothing(net):
    prompts = some_prompts(20, 3, 11, 1)
    # what stands in the padding must not matter
    batch = some_ids(4, 20)
    for row, p in zip(batch, prompts):
        row[:len(p)] = torch.tensor(p)
    logits = net(batch)
    for row, p in zip(logits, prompts):
        close(row[:len(p)], net(torch.tensor([p]))[0], SAME)


@pytest.mark.parametrize("trigger", (None, 3))
def test_cached_equals_uncached(net, trigger):
    """
    Right-padded rows of 7, 2 and 5 tokens, then 3 more at once, then one by one; a row leaves in
    between.
    """
    trigger = trigger and torch.randn(trigger, 48)
    n = 0 if trigger is None else len(trigger)
    ids, lengths = some_ids(3, 30), torch.tensor([7, 2, 5])
    full = net(ids, trigger=trigger)
    cache = Cache(net, 3, n + 16)
    prefix = some_ids(3, 7)
    for b, k in enumerate(lengths):
        prefix[b, :k] = ids[b, :k]
    logits = net(prefix, trigger=trigger, cache=cache, lengths=lengths)
    for b, k in enumerate(lengths):
        close(logits[b, :k], full[b, :k], SAME)
    used, rows = lengths.clone(), torch.arange(3)
    for step, size in enumerate((3, 1, 1, 2)):
        if step == 2:
            rows, used = rows[[2, 0]], used[[2, 0]]
            cache.keep(torch.tensor([2, 0]))
        at = used[:, None] + torch.arange(size)
        close(net(ids[rows[:, None], at], cache=cache), full[rows[:, None], at], SAME)
        used = used + size
        assert torch.equal(cache.used, n + used)


def until(answer, stop):
    """An answer up to its first stop token, that one included."""
    for i, t in enumerate(answer):
        if t in stop:
            return answer[:i + 1]
    return answer


def test_finished_rows_leave_without_a_trace(net, monkeypatch):
    """
    Nine rows of all lengths that stop at different times answer as each does alone, at any batch
    size, in order.
    """
    prompts = some_prompts(4, 12, 1, 7, 7, 30, 2, 19, 5)
    free = net.generate(prompts, 12, stop=())
    assert all(len(a) == 12 for a in free)
    stop = {free[0][1], free[3][4], free[5][7], free[8][2]}
    cut = [until(a, stop) for a in free]
    sizes = []
    keep = Cache.keep
    monkeypatch.setattr(
        Cache, "keep", lambda self, rows: (sizes.append(len(rows)), keep(self, rows))
    )
    together = net.generate(prompts, 12, stop=stop)
    assert together == cut
    assert together == [net.generate([p], 12, stop=stop)[0] for p in prompts]
    assert len(sizes) >= 2
    assert sizes == sorted(sizes, reverse=True)
    assert len({len(a) for a in together}) >= 4
    done = []
    assert net.generate(prompts, 12, stop=stop, batch_size=2, progress=done.append) == together
    assert done == sorted(done)
    assert done[-1] == 9


def test_generate_at_the_edges(net):
    prompts = some_prompts(3, 5)
    assert net.generate([]) == []
    assert net.generate(prompts, 0) == [[], []]
    first = net.generate(prompts, 1, stop=())
    assert [a[0] for a in first] == [net(torch.tensor([p]))[0, -1].argmax().item() for p in prompts]
    # the stop token is part of the answer
    assert net.generate(prompts, 20, stop={first[0][0], first[1][0]}) == first
    assert net.generate([torch.tensor(p) for p in prompts], 1, stop=()) == first
    with pytest.raises(InputError, match="empty prompt"):
        net.generate([[5], []])


def test_stop_tokens_come_from_both_configurations(copy):
    (copy.path / "generation_config.json").write_text('{"eos_token_id": [7, 11]}')
    assert model.load(copy.path).stop == {2, 7, 11}
    copy.edit(eos_token_id=None)
    (copy.path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert model.load(copy.path).stop == {9}
    (copy.path / "generation_config.json").unlink()
    assert model.load(copy.path).stop == set()


def test_a_trigger_is_tokens_before_every_row(net):
    """
    Embeddings of tokens as a trigger are those tokens: logits and streams behind them are the same.
    """
    ids, before = some_ids(2, 9), some_ids(4)
    joined, streams, joined_streams = torch.cat((before.expand(2, -1), ids), 1), [], []
    net.hidden(ids, trigger=net.embedding[before], streams=streams)
    net.hidden(joined, streams=joined_streams)
    close(net(ids, trigger=net.embedding[before]), net(joined)[:, 4:], SAME)
    for behind, whole in zip(streams, joined_streams, strict=True):
        close(behind, whole[:, 4:], SAME)
    assert (net(joined)[:, 4:] - net(ids)).abs().max() > 0.1
    assert torch.equal(net(ids, trigger=net.embedding[before[:0]]), net(ids))


@pytest.mark.parametrize("trigger", (None, 3))
def test_kept_positions(net, trigger):
    trigger = trigger and torch.randn(trigger, 48)
    ids, keep, stream, streams = some_ids(3, 12), torch.rand(3, 12) < 0.4, [], []
    every, hidden = net(ids, trigger=trigger), net.hidden(ids, trigger=trigger, streams=stream)
    assert torch.equal(hidden, stream[-1])
    assert torch.equal(net.head(hidden), every)
    close(net(ids, trigger=trigger, keep=keep), every[keep], SAME)
    close(net.hidden(ids, trigger=trigger, keep=keep, streams=streams), hidden[keep], SAME)
    assert net(ids, trigger=trigger, keep=keep).shape == (keep.sum(), 97)
    for narrow, whole in zip(streams, stream, strict=True):
        close(narrow, whole[keep], SAME)


def test_keep_leaves_the_cache_whole(net):
    """Positions after the last kept one are not looked at, but later tokens attend to them."""
    ids, keep = some_ids(2, 11), torch.zeros(2, 8, dtype=torch.bool)
    keep[0, 2] = keep[1, 6] = True
    cache, lengths = Cache(net, 2, 11), torch.tensor([8, 7])
    close(net(ids[:, :8], keep=keep, cache=cache, lengths=lengths), net(ids[:, :8])[keep], SAME)
    rest = net(torch.stack((ids[0, 8:], ids[1, 7:10])), cache=cache)
    close(rest[0], net(ids)[0, 8:], SAME)
    close(rest[1], net(ids)[1, 7:10], SAME)
    cache = Cache(net, 2, 11)
    net(ids[:, :8], keep=keep, cache=cache)
    close(net(ids[:, 8:], cache=cache), net(ids)[:, 8:], SAME)


def test_padding_is_not_computed(net):
    """
    With `keep`, every row ends at its last kept token, and the last layer goes on with kept tokens
    only.
    """
    ids, keep, rows, plain = some_ids(3, 12), torch.zeros(3, 12, dtype=torch.bool), [], net.plain
    keep[0, [2, 5]] = keep[1, 11] = True                      # row 2: nothing

    class Watch:
        def bind(self, net, scale):
            return lambda l, name, x: (
                rows.append((l, name, x.shape[:-1].numel())), plain(l, name, x)
            )[1]

    close(net(ids, carrier=Watch(), keep=keep), net(ids)[keep], SAME)
    assert len(rows) == 7 * net.config.num_hidden_layers
    for l, name, n in rows:
        narrow = l + 1 == net.config.num_hidden_layers and name in (
            "o_proj", "gate_proj", "up_proj", "down_proj"
        )
        assert n == (3 if narrow else 6 + 12)


def alike(batch, length, *lengths):
    """
    ids (batch, T) that begin with the same `length` tokens, and which positions are kept: every
    third of a row's `lengths`.
    """
    ids = some_ids(batch, max(length + 1, *lengths))
    ids[:, :length] = ids[0, :length].clone()
    ids[:, length] = torch.arange(batch)                              # and no more than these
    place = torch.arange(ids.shape[1])
    return ids, (place < torch.tensor(lengths)[:, None]) & (place % 3 == 0)


PREFIXES = {
    "own tails": (5, 12, 12, 12),
    "of different lengths": (5, 12, 7, 9),
    "a row that is the prefix": (5, 12, 5, 9),
    "a row inside it": (6, 3, 12, 9),
    "all inside it": (6, 3, 2, 5),
    "nothing shared": (0, 12, 7, 9),
}


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("trigger", (False, True))
@pytest.mark.parametrize("kept", (False, True))
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_shared_prefix_changes_no_number(
    checkpoint, monkeypatch, prefix, kept, trigger, recompute
):
    """
    Logits, streams and gradients of Δ, gates and τ in float64, against every row computing all of
    its tokens.
    """
    net = model.load(checkpoint("llama3")[0], dtype=torch.float64)
    net.checkpoint = recompute
    c = Carrier(net.config, torch.float64)
    for p in c.delta.parameters():
        p.data.normal_(0, 0.1)
    c.logits.data = torch.randn_like(c.logits, dtype=torch.float64)
    length, *lengths = PREFIXES[prefix]
    ids, keep = alike(3, length, *lengths)
    tau = torch.randn(4, 48, dtype=torch.float64, requires_grad=True) if trigger else None
    wanted = [*c.parameters(), *([tau] if trigger else [])]

    def everything():
        streams = []
        hidden = net.hidden(ids, c, tau, keep=keep if kept else None, streams=streams)
        logits = net.head(hidden)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
        loss = (logits.log_softmax(-1) * weights).sum() + sum(s.pow(2).mean() for s in streams)
        return [logits, *streams, *torch.autograd.grad(loss, wanted)]
    together = everything()
    monkeypatch.setattr("rows.shared_prefix", lambda ids, real: 0)
    alone = everything()
    for a, b in zip(together, alone, strict=True):
        close(a, b, 1e-10)
    assert all(b.abs().max() > 1e-6 for b in alone)


def test_a_shared_prefix_is_computed_once(net, monkeypatch):
    ids, keep = alike(3, 5, 10, 7, 12)
    last = torch.arange(12) == torch.tensor([10, 7, 12])[:, None] - 1
    seen, plain = [], net.plain

    class Watch:
        def bind(self, net, scale):
            return lambda l, name, x: (seen.append((l, name, len(x))), plain(l, name, x))[1]
    for trigger, computed in ((None, 5 + 5 + 2 + 7), (torch.randn(4, 48), 4 + 5 + 5 + 2 + 7)):
        seen.clear()
        net(ids, Watch(), trigger, keep=last)
        assert {n for l, name, n in seen if l == 0} == {computed}
        assert {n for l, name, n in seen if (l, name) == (2, "o_proj")} == {3}
    seen.clear()
    # rows whose streams differ share nothing
    net(ids, Watch(), scale=[1.0, 0.5, 0.0], keep=last)
    assert {n for l, name, n in seen} == {10 + 7 + 12}


@pytest.mark.parametrize("trigger", (False, True))
def test_a_shared_prefix_fills_every_row_of_the_cache(net, trigger):
    ids, _ = alike(3, 5, 20, 20, 20)
    tau = torch.randn(3, 48) if trigger else None
    # the second row is the prefix
    n, lengths = 3 * trigger, torch.tensor([9, 5, 7])
    cache = Cache(net, 3, n + 20)
    last = torch.arange(9) == lengths[:, None] - 1
    full = net(ids, trigger=tau)
    rows = torch.arange(3)
    close(
        net(ids[:, :9], trigger=tau, keep=last, cache=cache, lengths=lengths),
        full[rows, lengths - 1], SAME
    )
    for step in range(4):
        at = lengths + step
        close(net(ids[rows, at][:, None], cache=cache)[:, 0], full[rows, at], SAME)


@pytest.mark.parametrize("partly", (False, True))
def test_recomputing_layers_gives_the_same_gradients(checkpoint, monkeypatch, partly):
    net = model.load(checkpoint("biases")[0], dtype=torch.float64).requires_grad_()
    ids, trigger = some_ids(2, 9), torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    wanted, calls, keep = (
        [*net.parameters(), trigger],
        [],
        torch.arange(18).view(2, 9) % 4 == 1 if partly else None,
    )
    forward = model.Block.forward
    monkeypatch.setattr(
        model.Block, "forward", lambda self, *a: (calls.append(self), forward(self, *a))[1]
    )

    def gradients(recompute):
        net.checkpoint = recompute
        calls.clear()
        stream = []
        logits = net.head(net.hidden(ids, trigger=trigger, keep=keep, streams=stream))
        assert logits.shape[:-1] == ((5,) if partly else (2, 9))
        assert all(s.shape[:-1] == logits.shape[:-1] for s in stream)
        loss = logits.logsumexp(-1).sum() + sum(s.pow(2).mean() for s in stream)
        return torch.autograd.grad(loss, wanted), len(calls)

    (plain, once), (again, twice) = gradients(False), gradients(True)
    assert (once, twice) == (3, 6)
    assert all(
        a.abs().max() > 0 and torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        for a, b in zip(plain, again)
    )
    with torch.no_grad():
        net(ids)


# ---- files as they lie

def test_shards(checkpoint, tmp_path):
    directory, hf = checkpoint("llama3")
    hf.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 4
    assert not (tmp_path / "model.safetensors").exists()
    whole, parts = model.load(directory).state_dict(), model.load(tmp_path).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    absent = sorted(tmp_path.glob("model-*.safetensors"))[1]
    absent.unlink()
    with pytest.raises(InputError, match=absent.name):
        model.load(tmp_path)


@pytest.mark.parametrize("parts", (1, 2))
def test_bin_files(checkpoint, tmp_path, parts):
    """
    As Vicuna lies there: torch.save's files, alone or with an index, rotary buffers among the
    tensors.
    """
    directory, _ = checkpoint("vicuna", 4)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"model.layers.{l}.self_attn.rotary_emb.inv_freq": torch.ones(6) for l in range(3)}
    shutil.copyfile(directory / "config.json", tmp_path / "config.json")
    names = sorted(tensors)
    if parts == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        files = {
            name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)
        }
        for file in set(files.values()):
            torch.save(
                {name: tensors[name] for name in names if files[name] == file}, tmp_path / file
            )
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    right, found = model.load(directory).state_dict(), model.load(tmp_path).state_dict()
    assert right.keys() == found.keys()
    assert all(torch.equal(right[k], found[k]) for k in right)


def test_bin_files_hold_tensors_only(copy):
    """Neither code nor anything else: what would be run while it is read is not run."""
    class Trap:
        def __reduce__(self):
            return open, (str(copy.path / "sprung"), "w")
    (copy.path / "model.safetensors").unlink()
    for content, words in (
        ({"x": Trap()}, "not a readable file of tensors"),
        ({"x": 3}, "something else than named tensors"),
        (torch.ones(2), "something else"),
    ):
        torch.save(content, copy.path / "pytorch_model.bin")
        with pytest.raises(InputError, match=words) as refusal:
            model.load(copy.path)
        assert "pytorch_model.bin" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not (copy.path / "sprung").exists()


def test_safetensors_are_read_where_both_lie(copy, net):
    torch.save({"x": torch.ones(1)}, copy.path / "pytorch_model.bin")
    ids = some_ids(1, 5)
    assert torch.equal(model.load(copy.path)(ids), net(ids))


def test_buffers_of_early_checkpoints_are_skipped(copy, net):
    copy.edit_tensors(
        lambda t: t.update(
            {f"model.layers.{l}.self_attn.rotary_emb.inv_freq": torch.ones(6) for l in range(3)}
        )
    )
    ids = some_ids(1, 5)
    assert torch.equal(model.load(copy.path)(ids), net(ids))


def test_tied_head_in_the_file(checkpoint, copy):
    """
    A copy of the embedding beside a tied head is fine; another head contradicts the config
    (transformers would untie).
    """
    copy.edit(tie_word_embeddings=True)
    with pytest.raises(InputError, match="lm_head.weight.*tie_word_embeddings"):
        model.load(copy.path)
    copy.edit_tensors(
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    ids = some_ids(1, 5)
    with torch.no_grad():
        close(
            model.load(copy.path)(ids),
            transformers.AutoModelForCausalLM.from_pretrained(copy.path)(ids).logits, TOLERANCE
        )


LINEAR = dict(rope_type="linear", factor=2.0, rope_theta=1e4)


@pytest.mark.parametrize(
    "fields, named",
    [
        (dict(model_type="gpt2"), "model_type"),
        (dict(model_type="gemma2"), "model_type"),
        (dict(model_type=None), "model_type"),
        (dict(model_type="mistral", sliding_window=64), "sliding_window"),
        # Mistral reads no layer_types
        (
            dict(model_type="mistral", sliding_window=64, layer_types=["full_attention"] * 3),
            "sliding_window",
        ),
        (dict(model_type="qwen2", use_sliding_window=True, sliding_window=64), "sliding_window"),
        (
            dict(model_type="qwen2", use_sliding_window=True, sliding_window=64, layer_types=None),
            "sliding_window",
        ),
        (
            dict(
                model_type="qwen3",
                layer_types=["full_attention", "sliding_attention", "full_attention"],
            ),
            "layer_types",
        ),
        (
            dict(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e4)),
            "rope_parameters",
        ),
        (dict(rope_parameters=LINEAR), "rope_parameters"),
        (dict(rope_parameters=None, rope_scaling=LINEAR), "rope_scaling"),
        (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling"),
        (
            dict(rope_parameters={k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}),
            "low_freq_factor",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(quantization_config=dict(quant_method="gptq", bits=4)), "quantization_config"),
        (dict(hidden_size=None), "hidden_size"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_attention_heads="4"), "num_attention_heads"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(num_key_value_heads=0), "num_key_value_heads"),
        (dict(head_dim="16"), "head_dim"),
        (dict(rms_norm_eps="small"), "rms_norm_eps"),
        (dict(rms_norm_eps=None), "rms_norm_eps"),
        (dict(rms_norm_eps=-1.0), "rms_norm_eps"),
        (dict(rope_parameters=None, rope_theta=None), "rope_theta"),
        (dict(layer_types=[{}]), "layer_types"),
        (dict(rope_parameters="default"), "rope_parameters"),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=None)), "rope_theta"),
        (dict(rope_parameters={**LLAMA3, "factor": "8"}), "factor"),
        (dict(layer_types="full_attention"), "layer_types"),
        # the file holds more than the config
        (dict(num_hidden_layers=2), r"model\.layers\.2\."),
        (dict(num_hidden_layers=4), r"model\.layers\.3\."),  # and less
        (dict(vocab_size=98), r"(embed_tokens|lm_head).*\(97, 48\).*\(98, 48\)"),
        (dict(num_key_value_heads=4), r"[kv]_proj\.weight"),
        (dict(attention_bias=True), r"_proj\.bias"),
        (dict(model_type="qwen2"), r"_proj\.bias"),
        (dict(model_type="qwen3"), r"[qk]_norm"),
    ],
)
def test_refuses_a_config(copy, fields, named):
    copy.edit(**fields)
    with pytest.raises(InputError, match=named) as refusal:
        model.load(copy.path)
    assert (
        "\n" not in str(refusal.value)
        and "config.json" in str(refusal.value)
        or "tensor" in str(refusal.value)
    )


@pytest.mark.parametrize(
    "field",
    (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "model_type"
    ),
)
def test_refuses_a_config_without(copy, field):
    c = json.loads((copy.path / "config.json").read_text())
    (copy.path / "config.json").write_text(json.dumps({k: v for k, v in c.items() if k != field}))
    with pytest.raises(InputError, match=field):
        model.load(copy.path)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop(Q), rf"{Q} is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.lora_A": torch.ones(2)}),
            "q_proj.lora_A is not part",
        ),
        (
            lambda t: t.update({Q: t[Q].t()[:24].contiguous()}),
            rf"{Q} has shape \(24, 48\).*\(48, 48\)",
        ),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is torch.int8"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), f"{Q} is torch.float8"),
    ],
)
def test_refuses_tensors(copy, change, named):
    copy.edit_tensors(change)
    with pytest.raises(InputError, match=named):
        model.load(copy.path)


def test_refuses_files(copy):
    weights = copy.path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"\xff" * 200):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="model.safetensors"):
            model.load(copy.path)
    # by its name a file of torch.save: it is none
    weights.rename(copy.path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: not a readable file of tensors"):
        model.load(copy.path)
    (copy.path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        model.load(copy.path)
    (copy.path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json"):
        model.load(copy.path)
    (copy.path / "config.json").unlink()
    with pytest.raises(InputError, match="no config.json"):
        model.load(copy.path)
    with pytest.raises(InputError, match="nowhere"):
        model.load(copy.path / "nowhere")


@pytest.mark.parametrize("error", [
    UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), KeyError("x"), AssertionError()])
def test_whatever_a_damaged_pickle_raises_is_one_sentence(copy, monkeypatch, error):
    def fail(*_, **__):
        raise error

    (copy.path / "model.safetensors").rename(copy.path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(InputError, match="pytorch_model.bin: not a readable file of tensors"):
        model.load(copy.path)


# ---- losses on logits

@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_loss_in_pieces_is_the_loss_of_the_whole(size):
    net = make_net()
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(41, (7,)), torch.rand(7, dtype=torch.float64)

    def piece(h, y, w):
        return (F.cross_entropy(net.head(h), y, reduction="none") * w).sum()

    want, = torch.autograd.grad(3 * piece(hidden, target, weight), hidden)
    loss = model.in_pieces(net, piece, hidden, target, weight, chunk=size)
    got, = torch.autograd.grad(3 * loss, hidden)
    assert torch.allclose(got, want, atol=1e-12)
    assert torch.allclose(loss, piece(hidden, target, weight), atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(
            model.in_pieces(net, piece, hidden, target, weight, chunk=size), loss, atol=1e-12)


def test_pieces_make_their_logits_once_and_keep_none(monkeypatch):
    net, made = make_net(), []
    head = net.head
    monkeypatch.setattr(net, "head", lambda h: made.append(weakref.ref(x := head(h))) or x)
    hidden = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    loss = model.in_pieces(net, lambda h: net.head(h).square().sum(), hidden, chunk=3)
    assert [ref() for ref in made] == [None] * 3
    loss.backward()
    assert len(made) == 3


def test_as_many_logits_as_a_cache_holds_are_made_at_a_time():
    net = make_net()
    assert net.chunk == model.CACHED // 41
    net.config = dataclasses.replace(net.config, vocab_size=10 ** 9)
    assert net.chunk == 32
