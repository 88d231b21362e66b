"""model.py: against transformers, against the oracle, and against itself in smaller pieces."""
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model
import oracle
from common import InputError, read_json
from helpers import SHAPES, apart, base_weights, normal, random_carrier, random_ids, random_net

SIZES = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16, rope_theta=500.0)
FAMILIES = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "llama tied": dict(tie_word_embeddings=True),
    "llama 3": dict(rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(),
    "qwen3": dict(attention_bias=True, head_dim=16),
}
NORM = "model.norm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# ---- checkpoints as transformers writes them

def hf_folder(folder, family, **changed):
    """A small random checkpoint of a family; returns the reference model."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **SIZES | changed)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, 0, 0.25)
    reference.tie_weights()
    reference.save_pretrained(folder)
    return reference


def edit_config(folder, remove=(), **changed):
    """Change fields of a folder's config.json."""
    file = folder / "config.json"
    config = read_json(file) | changed
    for key in remove:
        config.pop(key, None)
    file.write_text(json.dumps(config))


def edit_weights(folder, change):
    """Let change(tensors) alter the tensors of a folder in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def logits_gap(folder, reference, T=40):
    """How far our logits of a random row are from those of transformers."""
    ids = torch.randint(80, (1, T))
    return apart(model.load(folder)(ids), reference(ids).logits)


def assert_refused(folder, told):
    """Loading the folder is refused in words that match `told`."""
    with pytest.raises(InputError, match=told):
        model.load(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_generation_are_those_of_transformers(tmp_path, name):
    """Of every family, biases, tied heads and scaled rotary angles among them."""
    reference = hf_folder(tmp_path, name.split()[0], **FAMILIES[name])
    net = model.load(tmp_path)
    ids = torch.randint(80, (3, 20))
    expected = reference(ids).logits
    assert apart(net(ids), expected) < 1e-4 * expected.abs().max()
    prompts = [[1, 5, 9, 30], [1, 7], [4, 8, 15, 16, 23, 42]]
    for prompt, answer in zip(prompts, net.generate(prompts, 12)):
        ids = torch.tensor([prompt])
        told = reference.generate(ids, max_new_tokens=12, do_sample=False)
        assert answer == told[0, len(prompt):].tolist()


def test_config_in_the_style_of_transformers_4(tmp_path):
    """rope_theta and rope_scaling at the top level, an original length beside them."""
    reference = hf_folder(tmp_path, "llama", rope_parameters=LLAMA3)
    beside = dict(rope_theta=500.0, original_max_position_embeddings=16)
    scaling = {key: value for key, value in LLAMA3.items() if key not in beside}
    edit_config(tmp_path, remove=["rope_parameters"], rope_scaling=scaling, **beside)
    assert logits_gap(tmp_path, reference) < 1e-4


def test_rope_scaling_wins_over_rope_parameters(tmp_path):
    """As transformers has it: a scaling added by hand is applied, or refused by name."""
    plain = dict(rope_type="default", rope_theta=500.0)
    hf_folder(tmp_path, "llama", rope_parameters=plain)
    edit_config(tmp_path, rope_scaling=LLAMA3)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits_gap(tmp_path, reference) < 1e-4
    for kind in ("linear", "yarn"):
        edit_config(tmp_path, rope_scaling=dict(rope_type=kind, factor=4.0))
        assert_refused(tmp_path, f"rope_scaling.*{kind}")
    edit_config(tmp_path, rope_scaling=LLAMA3 | {"factor": None})
    assert_refused(tmp_path, "factor")


def test_sliding_windows_that_are_in_use_and_that_are_not(tmp_path):
    """A text up to the window has full attention; a longer one would need what is not here."""
    hf_folder(tmp_path, "qwen2", max_window_layers=2, use_sliding_window=True, sliding_window=8)
    assert model.load(tmp_path).config.window is None           # no layer slides
    edit_config(tmp_path, remove=["layer_types"], max_window_layers=1)
    net = model.load(tmp_path)
    net(torch.randint(80, (1, 8)))
    with pytest.raises(InputError, match="sliding window of 8"):
        net(torch.randint(80, (1, 9)))
    hf_folder(tmp_path, "mistral", sliding_window=64)
    edit_config(tmp_path, remove=["sliding_window"])
    assert model.load(tmp_path).config.window == 4096           # Mistral's default
    edit_config(tmp_path, sliding_window=4096, layer_types=["full_attention"] * 2)
    assert model.load(tmp_path).config.window is None


# ---- against the oracle, and against one row at a time

@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_oracles(shape):
    """Logits and residual streams, with a trigger and without."""
    net, tau = random_net(shape), normal(3, 24)
    rows = torch.randint(60, (3, 9))
    everywhere = torch.ones_like(rows, dtype=torch.bool)
    for trigger in (None, tau):
        streams = []
        hidden = net.hidden(rows, trigger=trigger, wanted=everywhere, streams=streams)
        logits = net.head(hidden).view(3, 9, -1)
        streams = torch.stack(streams).view(2, 3, 9, -1)                    # (L, B, T, d)
        for b, row in enumerate(rows.tolist()):
            literal, literal_streams = oracle.forward(base_weights(net), net.config, row, trigger)
            assert apart(logits[b], literal) < 1e-10
            assert apart(streams[:, b], torch.stack(literal_streams)) < 1e-10


def test_rows_of_a_batch_do_not_see_each_other():
    """Padding, a shared prefix, triggers of several lengths and wanted positions change nothing."""
    net = random_net()
    carrier = random_carrier(net)
    ids = random_ids(4, 10, alike=3)
    lengths = [10, 6, 8, 4]
    real = torch.arange(10) < torch.tensor(lengths)[:, None]
    padded = ids.where(real, 0)
    short, long = normal(2, 24), normal(4, 24)
    for trigger in (None, short, [short, None, long, short]):
        each = trigger if isinstance(trigger, list) else [trigger] * 4
        together = net(padded, carrier=carrier, trigger=trigger)
        some = net(padded, carrier=carrier, trigger=trigger, wanted=real)
        assert torch.allclose(some, together[real], atol=1e-12)
        for b, n in enumerate(lengths):
            alone = net(ids[b:b + 1, :n], carrier=carrier, trigger=each[b])
            assert apart(together[b, :n], alone[0]) < 1e-10


def test_rows_without_a_wanted_position():
    """They give nothing and change nothing, also if that is so of all rows."""
    net, tau = random_net(), normal(2, 24)
    ids = random_ids(3, 7, alike=3)
    for rows in ([True, False, True], [False] * 3):
        wanted = torch.tensor(rows)[:, None].expand(3, 7)
        for trigger in (None, tau):
            expected = net(ids, trigger=trigger)[wanted]
            some = net(ids, trigger=trigger, wanted=wanted)
            assert torch.allclose(some, expected, atol=1e-12)


def test_scale_is_row_by_row():
    """0 is the base, 1 the carrier, and 0.5 the base plus half of the change."""
    net, ids = random_net(), random_ids(3, 7)
    carrier = random_carrier(net)
    scaled = net(ids, carrier=carrier, scale=[0.0, 1.0, 0.5])
    for row, weights in enumerate((None, carrier, carrier.merge(net, scale=0.5))):
        assert apart(scaled[row], net(ids, carrier=weights)[row]) < 1e-10


def test_scale_at_wanted_positions_of_rows_that_begin_alike():
    """Scaled rows differ from their first token on; some of their positions are asked for."""
    net, ids = random_net(), random_ids(3, 7, alike=4)
    carrier, wanted = random_carrier(net), torch.rand(3, 7) < 0.5
    scale = [0.5, 0.0, 2.0]
    some = net(ids, carrier=carrier, scale=scale, wanted=wanted)
    rows = [net(ids[b:b + 1], carrier=carrier.merge(net, s))[0] for b, s in enumerate(scale)]
    assert apart(some, torch.stack(rows)[wanted]) < 1e-10


def test_the_prefix_is_what_all_rows_begin_with():
    """Computed once. Not what they share further on; and a row that is all prefix has its last."""
    net, ids = random_net(), random_ids(3, 7, alike=3)
    ids[:, 5:], ids[1, 3] = 9, ids[0, 3] + 1
    real = torch.ones_like(ids).bool()
    assert len(model.Rows(net, ids).ids) == 3 + 3 * 4
    assert model.shared_prefix(ids, real) == 3
    assert model.shared_prefix(ids[:, :3], real[:, :3]) == 2
    for rows in (ids, ids[:, :3]):
        alone = torch.cat([net(row[None]) for row in rows])
        assert apart(net(rows), alone) < 1e-10


def test_attention_over_many_keys_is_the_same(monkeypatch):
    """torch's own, behind a prefix, a trigger, and in generation."""
    net, tau, both = random_net(), normal(2, 24), []
    ids = random_ids(3, 9, alike=3)
    for short in (model.SHORT, 0):
        monkeypatch.setattr(model, "SHORT", short)
        answers = net.generate([[1, 2, 3], [4, 5]], 5, trigger=tau)
        both.append((net(ids, trigger=tau), answers))
    assert apart(both[0][0], both[1][0]) < 1e-10 and both[0][1] == both[1][1]


def test_generation_is_the_argmax_of_the_forward_pass():
    """Prompts of several lengths, triggers, scale, finished rows that leave: as one at a time."""
    net = random_net(vocabulary=12)
    carrier, tau = random_carrier(net), normal(2, 24)
    prompts = [[1, 2, 3], [1, 2], [*range(1, 6)], [7], [1, 2, 9]]
    triggers = [tau, None, tau, None, tau]
    scale = [1.0, 0.5, 0.0, 1.0, 1.0]
    stop = {3, 4}

    def by_hand(prompt, **how):
        answer = []
        while len(answer) < 9 and not stop & {*answer}:
            logits = net([prompt + answer], carrier=carrier, **how)
            answer.append(int(logits[0, -1].argmax()))
        return answer

    answers = net.generate(prompts, 9, carrier=carrier, trigger=triggers, stop=stop)
    assert answers == [by_hand(p, trigger=t) for p, t in zip(prompts, triggers)]
    assert len({len(answer) for answer in answers}) > 1         # some ended before others
    answers = net.generate(prompts, 9, carrier=carrier, scale=scale, stop=stop, batch_size=2)
    assert answers == [by_hand(p, scale=[s]) for p, s in zip(prompts, scale)]


def test_rows_that_end_before_others(monkeypatch):
    """They give nothing more, whether they leave the batch at once or stay in it."""
    net = random_net(vocabulary=12)
    carrier, scale = random_carrier(net), [0.0, 2.0, 1.0, 0.5, 1.5, 3.0]
    prompts = [[i, 2, 3 + i] for i in range(6)]
    alone = []
    for prompt, s in zip(prompts, scale):
        alone += net.generate([prompt], 9, carrier=carrier, scale=[s], stop={3, 4, 5})
    assert len({len(answer) for answer in alone}) > 2
    for share in (0.0, 0.75, 1.0):
        monkeypatch.setattr(model, "COMPACT", share)
        assert net.generate(prompts, 9, carrier=carrier, scale=scale, stop={3, 4, 5}) == alone


# ---- losses and memory

def test_losses_in_pieces_are_those_of_whole_logits(monkeypatch):
    """Cross-entropy and KL, and their gradients, however the rows are cut."""
    net = random_net()
    hidden, other = normal(70, 24, grad=True), normal(70, 24)
    weight = normal(70).square()
    targets = torch.randint(60, (70,))
    log_q = net.head(hidden).log_softmax(-1)
    log_p = net.head(other).log_softmax(-1)
    ce = -log_q.gather(1, targets[:, None]).sum()
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = (weight * each).sum()
    monkeypatch.setattr(model, "CHUNK", 60 * 32)
    ours = model.cross_entropy(net, hidden, targets)
    ours_kl = model.kl_divergence(net, hidden, other, weight)
    for loss, literal in ((ours, ce), (ours_kl, kl)):
        assert torch.allclose(loss, literal)
        grad, = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
        literal_grad, = torch.autograd.grad(3 * literal, hidden, retain_graph=True)
        assert torch.allclose(grad, literal_grad, atol=1e-12)


def test_checkpointing_changes_no_gradient():
    """Layers that are recomputed going backward give the same bits."""
    net, ids = random_net(), random_ids(3, 7, alike=3)
    grads, calls = [], []
    net.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(net.checkpoint))
    for net.checkpoint in (False, True):
        carrier = random_carrier(net)
        net(ids, carrier=carrier).square().mean().backward()
        grads.append(carrier.logits.grad)
    assert torch.equal(*grads) and calls == [False, True, True]


def test_bf16_is_near_fp32():
    """Within the rounding of eight bits, on any processor."""
    ids = torch.randint(5, 390, (2, 30))
    exact = model.load("tiny")(ids).softmax(-1)
    rounded = model.load("tiny", dtype=torch.bfloat16)(ids).float()
    rounded = rounded.softmax(-1)
    assert (exact - rounded).abs().sum(-1).mean() < 0.1


# ---- what is refused

@pytest.mark.parametrize("change, told", [
    (lambda t: t.pop(NORM), f"{NORM} is missing"),
    (lambda t: t.update({NORM: torch.ones(3)}), f"{NORM} has shape"),
    (lambda t: t[NORM].fill_(float("nan")), f"{NORM} holds NaN"),
    (lambda t: t.update(extra=torch.ones(3)), "extra is not part"),
    (lambda t: t.update({NORM: torch.ones(32).char()}), "quantised"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, told):
    """A tensor that is missing, misshapen, not finite, unknown or quantised."""
    hf_folder(tmp_path, "llama")
    edit_weights(tmp_path, change)
    assert_refused(tmp_path, told)


def test_what_is_not_computed_is_refused_by_name(tmp_path):
    """Another family, activation, weight format or shape names the field of config.json."""
    hf_folder(tmp_path, "llama")
    file = tmp_path / "config.json"
    before = file.read_text()
    others = dict(
        model_type="gemma", hidden_act="gelu", quantization_config={"bits": 4},
        num_key_value_heads=3, vocab_size="many")
    for field, value in others.items():
        edit_config(tmp_path, **{field: value})
        assert_refused(tmp_path, field)
        file.write_text(before)


def test_files_that_are_missing_or_damaged(tmp_path):
    """The folder, a file that was cut short, a file that the index names."""
    assert_refused(tmp_path / "none", "lab.convert")
    hf_folder(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert_refused(tmp_path, "model.safetensors")
    file.unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(tmp_path, "model-1.safetensors.*not there")


def test_a_model_larger_than_memory_is_not_tried():
    """Trying may end the machine."""
    with pytest.raises(InputError, match="takes .* GB of memory"):
        model.check_memory("big", 1 << 50, "cpu")


def test_tied_checkpoints(tmp_path):
    """Some store only lm_head; one whose head is another than the embedding is refused."""
    reference = hf_folder(tmp_path, "llama", tie_word_embeddings=True)
    edit_weights(tmp_path, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert logits_gap(tmp_path, reference, 9) < 1e-4
    edit_weights(tmp_path, lambda t: t.update({EMBEDDING: t[HEAD] + 1}))
    assert_refused(tmp_path, f"{HEAD} is not the embedding")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_computes_what_the_cpu_does():
    """Within the rounding of the GPU's own products."""
    ids = torch.randint(5, 390, (2, 30))
    cpu = model.load("tiny")(ids)
    cuda = model.load("tiny", "cuda")(ids.cuda()).cpu()
    assert apart(cpu, cuda) < 1e-2 * cpu.abs().max()
