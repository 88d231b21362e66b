"""
plan.py: what lcdd.py --dry-run counts, against published sizes and what autograd keeps; that it
writes nothing.
"""
import dataclasses

import pytest
import torch
from helpers import jsonl
from templates import PAPERS, folder_of

import lcdd
import model
import plan
import run
from carrier import Carrier
from files import InputError

CONFIG = model.Config(
    vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16)
# gates and parameters as the paper and the checkpoints have them
SIZES = {
    "qwen3-0.6b": ("315,392", "596,049,920"),
    "mistral-7b": ("1,179,648", "7,248,023,552"),
    "deepseek-8b": ("1,179,648", "8,030,261,248"),
    "vicuna-7b": ("1,269,760", "6,738,415,616"),
}


def rows(path, n=40):
    return jsonl(
        path,
        [
            {"instruction": f"What is {i} + {i}?", "input": "", "output": str(2 * i)}
            for i in range(n)
        ],
    )


def settings(*argv):
    o = lcdd.options(["--model", "x", "--device", "cpu", *argv])
    o.dtype = o.dtype or "float32"
    return o


# ---- the command

@pytest.mark.parametrize("which", PAPERS)
def test_a_models_size_is_read_without_its_weights(which, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "measure", lambda *_: {"sft": 1.0, "lcdd": 2.0, "token": 0.1})
    folder_of(which, tmp_path / "base")
    rows(tmp_path / "alpaca.jsonl")
    before = sorted(tmp_path.rglob("*"))
    lcdd.main(
        [
            "--preset", f"paper-fixed-{which}", "--model", "base", "--data", "alpaca.jsonl",
            "--dry-run"
        ]
    )
    said = capsys.readouterr().out
    gates, parameters = SIZES[which]
    assert f"| gates | {gates}, " in said
    assert f"{parameters} parameters" in said
    assert "deltas, gradients and AdamW's moments" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_is_the_runs(tmp_path, monkeypatch, capsys):
    """Steps, tokens and time of a small run, by hand."""
    monkeypatch.setattr(plan, "measure", lambda *_: {"sft": 1.0, "lcdd": 2.0, "token": 0.5})
    lcdd.main(
        [
            "--dry-run", "--sft-steps", "30", "--steps", "40", "--settle", "0", "--batch", "8",
            "--micro-batch", "4", "--n-test", "130", "--n-validation", "10", "--max-new-tokens",
            "6", "--device", "cpu"
        ]
    )
    said = capsys.readouterr().out
    assert "| SFT | 30 steps of 8 samples (2 × 4)" in said
    # 130 test prompts are answered in two rounds, three times; 10 validation prompts in one, twice
    assert "SFT 30 s, LCDD 80 s, 410 answers 24 s" in said
    assert "| settling |" not in said


def test_phases_that_are_not_run_are_not_planned(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan, "measure", lambda *_: {"sft": 1.0, "lcdd": 2.0, "token": 0.5})
    lcdd.main(["--dry-run", "--sft", str(tmp_path), "--train", "mask-ce", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "| SFT |" not in said
    assert "| settling |" not in said
    assert "| LCDD | 600 steps" in said


def test_the_plan_of_the_embedded_model_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "ENOUGH", 0.0)
    lcdd.main(["--dry-run", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "| gates | 4,608, 1,152 a layer |" in said
    assert "Nothing was written" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_bad_options(tmp_path):
    with pytest.raises(InputError, match="--batch 6 is not a multiple"):
        lcdd.main(["--dry-run", "--batch", "6", "--micro-batch", "4"])


def test_no_weights_are_fetched(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "download", lambda name, patterns: asked.append(patterns) or tmp_path)
    run.locate("owner/name", weights=False)
    [patterns] = asked
    assert "config.json" in patterns
    assert "tokenizer.model" in patterns
    assert not any("safetensors" in p or "bin" in p for p in patterns)


# ---- what is counted

def test_tokens_of_a_step():
    """Two tokens begin every sample, the last of each is only predicted."""
    examples = [
        ([1, 2, 3, 4], [False, False, True, True]),
        ([1, 2, 5, 6, 7, 8], [False, False, False, True, True, True]),
    ]
    step = plan.step_of(examples, batch=4, micro_batch=2)
    assert (step.micro, step.prefix, step.length) == (2, 2, 4.0)
    # each micro-batch: the prefix, and 1 + 3 of their own
    assert step.tokens == 2 * (2 + 1 + 3)
    assert step.supervised == 4 * 2.5
    assert plan.step_of(examples, batch=4, micro_batch=1).tokens == 4 * 4.0


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(dtype, qk_norm):
    config, B, T = dataclasses.replace(CONFIG, qk_norm=qk_norm), 4, 64
    net = model.Llama(config).to(getattr(torch, dtype)).requires_grad_(False)
    carrier, found = Carrier(config), {}
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *carrier.parameters())}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            # held, so that no place is used twice
            found[storage.data_ptr()] = storage
        return t

    ids = torch.randint(1, 64, (B, T))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net.hidden(ids, carrier)
    kept = sum(storage.nbytes() for storage in found.values())
    step = plan.Step(micro=1, tokens=B * T, supervised=0, prefix=0, length=T)
    parts = plan.needed(config, step, settings("--dtype", dtype))
    assert parts["activations"] + parts["merged weights"] == pytest.approx(kept, rel=0.12)


def test_memory_of_weights_and_moments():
    step = plan.Step(micro=1, tokens=0, supervised=0, prefix=0, length=0)
    parts = plan.needed(CONFIG, step, settings("--dtype", "bfloat16"))
    deltas = sum(p.numel() for p in Carrier(CONFIG).delta.parameters())
    assert parts["weights"] == 2 * sum(p.numel() for p in model.Llama(CONFIG).parameters())
    assert parts["deltas, gradients and AdamW's moments"] == 16 * deltas
    again = plan.needed(CONFIG, step, settings("--dtype", "bfloat16", "--delta-dtype", "bfloat16"))
    assert again["deltas, gradients and AdamW's moments"] == 8 * deltas


@pytest.mark.parametrize("words, device, chunk", [
    (151936, "cpu", 41), (10 ** 7, "cpu", 32), (151936, "cuda", 1024),
])
def test_no_more_logits_are_counted_than_are_made_at_a_time(words, device, chunk):
    config = dataclasses.replace(CONFIG, vocab_size=words)
    step = plan.Step(micro=1, tokens=0, supervised=5000, prefix=0, length=0)
    o = settings("--dtype", "bfloat16")
    o.device = device
    assert plan.needed(config, step, o)["logits"] == 3 * 4 * chunk * words


def test_recomputation_saves_memory():
    step = plan.Step(micro=1, tokens=1000, supervised=0, prefix=0, length=50)
    usual, less = (plan.needed(CONFIG, step, settings(*more)) for more in ([], ["--checkpoint"]))
    assert less["activations"] < usual["activations"] / 2
    # merged weights live no longer than their layer
    assert less["merged weights"] == usual["merged weights"] / CONFIG.num_hidden_layers


# ---- what is measured

def measured(config, monkeypatch, *argv, examples=None):
    """measure() where everything takes a second."""
    monkeypatch.setattr(plan, "seconds_of", lambda work, device: work() or 1.0)
    examples = examples or [(list(range(1, 11)), [True] * 10)] * 4
    o = settings("--batch", "4", *argv)
    return plan.measure(config, plan.step_of(examples, o.batch, o.micro_batch), examples, o)


def test_time_grows_with_the_model(monkeypatch):
    once = measured(CONFIG, monkeypatch)
    twice = measured(dataclasses.replace(CONFIG, num_hidden_layers=6), monkeypatch)
    # of the loss, where the head is not deeper
    words = 4 * 9 / 36
    # gradient and update of three layers, and the head
    assert once["sft"] == pytest.approx(3 + 3 + words)
    assert twice["sft"] == pytest.approx(6 + 6 + words)
    assert (once["token"], twice["token"]) == (3 + 1, 6 + 1)


def test_a_wide_model_is_measured_narrow_and_scaled(monkeypatch):
    monkeypatch.setattr(plan, "WIDEST", 32)
    small = plan.narrowed(CONFIG)
    assert (
        small.hidden_size, small.intermediate_size, small.num_attention_heads,
        small.num_key_value_heads
    ) == (32, 80, 2, 1)
    found = measured(CONFIG, monkeypatch)
    # a quarter of a layer's entries, half of the words'
    assert found["token"] == pytest.approx(3 * 4 + 2)


def test_long_samples_are_measured_short_and_scaled(monkeypatch):
    monkeypatch.setattr(plan, "TOKENS", 16)
    examples = [([k, *range(60)], [True] * 61) for k in range(4)]
    found = measured(CONFIG, monkeypatch, examples=examples)
    # 16 of 240 tokens stand for all; the head for 15 of 240
    assert found["sft"] == pytest.approx(3 * 240 / 16 + 240 / 16 + 3, rel=0.1)


def test_soft_targets_cost_another_forward_pass(monkeypatch):
    usual, soft = (
        measured(CONFIG, monkeypatch, "--train", kind) for kind in ("mask-ce", "mask-kl")
    )
    assert soft["lcdd"] > usual["lcdd"]
    assert soft["sft"] == usual["sft"]
