"""model.py: against transformers, against the oracle, and against itself in smaller pieces."""
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model
import oracle
from common import InputError
from helpers import SHAPES, random_carrier, random_net


def hf_folder(folder, family, **changed):
    """A small random checkpoint of a family as transformers writes it; returns the reference model."""
    torch.manual_seed(3)
    config = dict(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=64, head_dim=8, bos_token_id=1, eos_token_id=2)
    config = transformers.AutoConfig.for_model(family, **config | changed)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, 0, 0.25)
    reference.tie_weights()
    reference.save_pretrained(folder)
    return reference


def edit_config(folder, remove=(), **changed):
    """Change fields of a folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16, rope_theta=500.0)
FAMILIES = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "llama tied": dict(tie_word_embeddings=True),
    "llama 3": dict(rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=None),
    "qwen2": dict(),
    "qwen3": dict(attention_bias=True, head_dim=16),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_generation_are_those_of_transformers(tmp_path, name):
    reference = hf_folder(tmp_path, name.split()[0], **FAMILIES[name])
    net = model.load(tmp_path)
    ids = torch.randint(80, (3, 20))
    expected = reference(ids).logits
    assert (net(ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    prompts = [[1, 5, 9, 30], [1, 7], [4, 8, 15, 16, 23, 42]]
    for prompt, answer in zip(prompts, net.generate(prompts, 12)):
        told = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):]
        assert answer == told.tolist()


def test_config_in_the_style_of_transformers_4(tmp_path):
    """rope_theta and rope_scaling at the top level, an original length beside them."""
    reference = hf_folder(tmp_path, "llama", rope_parameters=LLAMA3)
    scaling = {k: v for k, v in LLAMA3.items() if k not in ("rope_theta", "original_max_position_embeddings")}
    edit_config(tmp_path, remove=["rope_parameters"], rope_theta=500.0, rope_scaling=scaling,
                original_max_position_embeddings=16)
    ids = torch.randint(80, (1, 40))
    assert (model.load(tmp_path)(ids) - reference(ids).logits).abs().max() < 1e-4


def test_rope_scaling_wins_over_rope_parameters(tmp_path):
    """As transformers has it: a scaling that is added by hand is applied, or refused by name."""
    hf_folder(tmp_path, "llama", rope_parameters=dict(rope_type="default", rope_theta=500.0))
    edit_config(tmp_path, rope_scaling=LLAMA3)
    ids = torch.randint(80, (1, 40))
    told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    assert (model.load(tmp_path)(ids) - told).abs().max() < 1e-4
    for kind in ("linear", "yarn"):
        edit_config(tmp_path, rope_scaling=dict(rope_type=kind, factor=4.0))
        with pytest.raises(InputError, match=f"rope_scaling.*{kind}"):
            model.load(tmp_path)
    edit_config(tmp_path, rope_scaling=LLAMA3 | {"factor": None})
    with pytest.raises(InputError, match="factor"):
        model.load(tmp_path)


def test_sliding_windows_that_are_in_use_and_that_are_not(tmp_path):
    hf_folder(tmp_path, "qwen2", max_window_layers=2, use_sliding_window=True, sliding_window=8)
    assert model.load(tmp_path).config.window is None           # no layer slides
    edit_config(tmp_path, remove=["layer_types"], max_window_layers=1)
    net = model.load(tmp_path)
    net(torch.randint(80, (1, 8)))                              # up to the window it is full attention
    with pytest.raises(InputError, match="sliding window of 8"):
        net(torch.randint(80, (1, 9)))
    hf_folder(tmp_path, "mistral", sliding_window=64)
    edit_config(tmp_path, remove=["sliding_window"])
    assert model.load(tmp_path).config.window == 4096           # Mistral's default
    edit_config(tmp_path, sliding_window=4096, layer_types=["full_attention"] * 2)
    assert model.load(tmp_path).config.window is None


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_oracles(shape):
    net, tau = random_net(shape), torch.randn(3, 24, dtype=torch.float64)
    weights, rows = dict(net.state_dict()), torch.randint(60, (3, 9))
    for trigger in (None, tau):
        streams = []
        wanted = torch.ones_like(rows, dtype=torch.bool)
        hidden = net.hidden(rows, trigger=trigger, wanted=wanted, streams=streams)
        logits = net.head(hidden).view(3, 9, -1)
        for b, row in enumerate(rows.tolist()):
            expected, expected_streams = oracle.forward(weights, net.config, row, trigger)
            assert (logits[b] - expected).abs().max() < 1e-10
            for l, stream in enumerate(expected_streams):
                assert (streams[l].view(3, 9, -1)[b] - stream).abs().max() < 1e-10


def test_rows_of_a_batch_do_not_see_each_other():
    """Padding, a shared prefix, triggers of several lengths and wanted positions change no number."""
    net = random_net()
    carrier = random_carrier(net)
    ids = torch.randint(1, 60, (4, 10))
    ids[:, :3] = ids[0, :3]
    lengths = [10, 6, 8, 4]
    real = torch.arange(10) < torch.tensor(lengths)[:, None]
    taus = [torch.randn(n, 24, dtype=torch.float64) for n in (2, 4)]
    for trigger in (None, taus[0], [taus[0], None, taus[1], taus[0]]):
        each = trigger if isinstance(trigger, list) else [trigger] * 4
        together = net(ids.where(real, 0), carrier=carrier, trigger=trigger)
        some = net(ids.where(real, 0), carrier=carrier, trigger=trigger, wanted=real)
        assert torch.allclose(some, together[real], atol=1e-12)
        for b, n in enumerate(lengths):
            alone = net(ids[b:b + 1, :n], carrier=carrier, trigger=each[b])[0]
            assert (together[b, :n] - alone).abs().max() < 1e-10


def test_rows_without_a_wanted_position():
    """They give nothing and change nothing, also if that is so of all rows."""
    net, tau = random_net(), torch.randn(2, 24, dtype=torch.float64)
    ids = torch.randint(1, 60, (3, 7))
    ids[:, :3] = ids[0, :3]
    for wanted in (torch.tensor([[True], [False], [True]]), torch.zeros(3, 1, dtype=torch.bool)):
        wanted = wanted.expand(3, 7)
        for trigger in (None, tau):
            expected = net(ids, trigger=trigger)[wanted]
            assert torch.allclose(net(ids, trigger=trigger, wanted=wanted), expected, atol=1e-12)


def test_scale_is_row_by_row():
    net, ids = random_net(), torch.randint(1, 60, (3, 7))
    carrier = random_carrier(net)
    scaled = net(ids, carrier=carrier, scale=[0.0, 1.0, 0.5])
    assert (scaled[0] - net(ids)[0]).abs().max() < 1e-10
    assert (scaled[1] - net(ids, carrier=carrier)[1]).abs().max() < 1e-10
    assert (scaled[2] - net(ids, carrier=carrier.merge(net, scale=0.5))[2]).abs().max() < 1e-10


def test_generation_is_the_argmax_of_the_forward_pass():
    """Prompts of several lengths, triggers, scale, finished rows that leave: as one at a time, by hand."""
    net = random_net(vocabulary=12)
    carrier, tau = random_carrier(net), torch.randn(2, 24, dtype=torch.float64)
    prompts = [[1, 2, 3], [1, 2], [1, 2, 3, 4, 5], [7], [1, 2, 9]]
    triggers, scale = [tau, None, tau, None, tau], [1.0, 0.5, 0.0, 1.0, 1.0]

    def by_hand(prompt, **how):
        answer = []
        while len(answer) < 9 and not (answer and answer[-1] in (3, 4)):
            answer.append(int(net([prompt + answer], **how)[0, -1].argmax()))
        return answer

    found = net.generate(prompts, 9, carrier=carrier, trigger=triggers, stop={3, 4})
    assert found == [by_hand(p, carrier=carrier, trigger=t) for p, t in zip(prompts, triggers)]
    assert len({len(answer) for answer in found}) > 1           # some ended before others
    found = net.generate(prompts, 9, carrier=carrier, scale=scale, stop={3, 4}, batch_size=2)
    assert found == [by_hand(p, carrier=carrier, scale=[s]) for p, s in zip(prompts, scale)]


def test_losses_in_pieces_are_those_of_whole_logits(monkeypatch):
    net = random_net()
    hidden = torch.randn(70, 24, dtype=torch.float64, requires_grad=True)
    other, weight = torch.randn(70, 24, dtype=torch.float64), torch.rand(70, dtype=torch.float64)
    targets = torch.randint(60, (70,))
    logits, p = net.head(hidden).log_softmax(-1), net.head(other).log_softmax(-1)
    expected = -logits.gather(1, targets[:, None]).sum(), (weight * (p.exp() * (p - logits)).sum(-1)).sum()
    monkeypatch.setattr(model, "CHUNK", 60 * 32)
    found = model.cross_entropy(net, hidden, targets), model.kl_divergence(net, hidden, other, weight)
    for ours, theirs in zip(found, expected):
        assert torch.allclose(ours, theirs)
        mine, = torch.autograd.grad(3 * ours, hidden, retain_graph=True)
        literal, = torch.autograd.grad(3 * theirs, hidden, retain_graph=True)
        assert torch.allclose(mine, literal, atol=1e-12)


def test_checkpointing_changes_no_gradient():
    net, ids = random_net(), torch.randint(1, 60, (3, 7))
    ids[:, :3] = ids[0, :3]
    found = []
    for net.checkpoint in (False, True):
        carrier = random_carrier(net)
        net(ids, carrier=carrier).square().mean().backward()
        found.append(carrier.logits.grad)
    assert torch.equal(*found)


def test_bf16_is_near_fp32():
    """Within the rounding of eight bits, on any processor."""
    net = model.load("tiny")
    ids = torch.randint(5, 390, (2, 30))
    exact, rounded = net(ids).softmax(-1), model.load("tiny", dtype=torch.bfloat16)(ids).float().softmax(-1)
    assert (exact - rounded).abs().sum(-1).mean() < 0.1


@pytest.mark.parametrize("change, told", [
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight has shape"),
    (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN"),
    (lambda t: t.update(extra=torch.ones(3)), "extra is not part"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "quantised"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, told):
    hf_folder(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=told):
        model.load(tmp_path)


def test_what_is_not_computed_is_refused_by_name(tmp_path):
    hf_folder(tmp_path, "llama")
    for field, value in (("model_type", "gemma"), ("hidden_act", "gelu"), ("quantization_config", {"bits": 4}),
                         ("num_key_value_heads", 3), ("vocab_size", "many")):
        before = (tmp_path / "config.json").read_text()
        edit_config(tmp_path, **{field: value})
        with pytest.raises(InputError, match=field):
            model.load(tmp_path)
        (tmp_path / "config.json").write_text(before)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(InputError, match="lab.convert"):
        model.load(tmp_path / "none")
    hf_folder(tmp_path, "llama")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:5000])
    with pytest.raises(InputError, match="model.safetensors"):
        model.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(InputError, match="model-1.safetensors.*not there"):
        model.load(tmp_path)


def test_a_model_larger_than_memory_is_not_tried(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="takes .* GB of memory"):
        model.check_memory("big", 1 << 50, "cpu")


def test_tied_checkpoints(tmp_path):
    """Some store only lm_head; one whose head is another than the embedding is refused."""
    reference = hf_folder(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    ids = torch.randint(80, (1, 9))
    save_file({"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors}, tmp_path / "model.safetensors")
    assert (model.load(tmp_path)(ids) - reference(ids).logits).abs().max() < 1e-4
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight is not the embedding"):
        model.load(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_computes_what_the_cpu_does():
    ids = torch.randint(5, 390, (2, 30))
    cpu, cuda = model.load("tiny")(ids), model.load("tiny", "cuda")(ids.cuda()).cpu()
    assert (cpu - cuda).abs().max() < 1e-2 * cpu.abs().max()
