"""lab/export.py: what it writes, in transformers and peft, against our own forward pass in fp32."""
import contextlib
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import carrier as carriers
import data
import eraser
import lcdd
import model
from common import Failed, InputError, read_json, save_tensors
from lab import export

peft = pytest.importorskip("peft", reason="peft reads what lab.export writes")
TINY = Path(model.__file__).parent / "tiny"
IDS = torch.tensor([[5, 17, 80, 3, 44, 9, 12], [33, 8, 61, 61, 20, 7, 90]])


def odd_base(folder):
    """Qwen3 with a tied head in several files, whose configs do not name what ends a turn."""
    torch.manual_seed(0)
    net = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=397, hidden_size=48, intermediate_size=80, num_hidden_layers=2, head_dim=20,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0))
    for name, p in net.named_parameters():
        p.data.normal_(1 if "norm" in name else 0, 0.2)
    net.save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n")
    (folder / "notes.bin").write_text("no part of a checkpoint")
    return folder


def small_run(folder):
    """A run directory on it, of a few steps; what they come to does not matter."""
    base, run = odd_base(folder / "base"), folder / "run"
    with contextlib.suppress(Failed):
        lcdd.main(["--model", str(base), "--data", str(TINY / "fixed.jsonl"), "--out", str(run), "--go-on",
                   "--sizes", "40", "8", "4", "4", "--sft-steps", "6", "--sft-lr", "0.01", "--steps", "12",
                   "--warmup", "2", "--settle", "0", "--lambda0", "0.2", "--max-new-tokens", "4"])
    with contextlib.suppress(Failed):
        eraser.main(["--run", str(run), "--steps", "3", "--length", "4"])
    return run


@pytest.fixture(scope="module", params=("the embedded model", "another"))
def exported(request, finished, tmp_path_factory):
    """All three exports of a run: (folder, base's folder, net, carrier, τ)."""
    folder = tmp_path_factory.mktemp("export")
    run = finished if request.param == "the embedded model" else small_run(folder)
    export.main(["--run", str(run), "--to", str(folder), "--as", *export.KINDS, "--dtype", "float32"])
    net = model.load(read_json(run / "config.json")["model"])
    carrier = carriers.load(run / "carrier.safetensors", net)
    base = model.locate(read_json(run / "config.json")["model"])
    return folder, base, net, carrier, eraser.load(run / "trigger.safetensors", net)[0]


def theirs(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def same(theirs, net, **how):
    """Are the logits of a model of theirs ours, and its greedy answers?"""
    with torch.no_grad():
        mask = torch.ones_like(IDS)
        logits = theirs(input_ids=IDS, attention_mask=mask).logits[:, -IDS.shape[1]:]
        torch.testing.assert_close(logits, net(IDS, **how), rtol=0, atol=1e-4)
        answers = theirs.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=12, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)[:, IDS.shape[1]:]
    return answers.tolist() == net.generate(IDS.tolist(), 12, stop=(), **how)


def test_merged_is_a_checkpoint(exported):
    """With all that belongs to the base's, and it stops where SFT taught to stop."""
    folder, base, net, carrier, _ = exported
    assert same(theirs(folder / "merged"), net, carrier=carrier)
    assert (net(IDS) - net(IDS, carrier=carrier)).abs().max() > 0.1
    chat = data.Chat(base)
    assert chat.stop == data.Chat(folder / "merged").stop
    stop = transformers.GenerationConfig.from_pretrained(folder / "merged").eos_token_id
    assert chat.eos_id in ([stop] if isinstance(stop, int) else stop)
    kept = {p.name for p in base.iterdir()} & {"tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert all((base / name).read_bytes() == (folder / "merged" / name).read_bytes() for name in kept)
    weights = sorted(p.name for p in base.glob("*.safetensors*"))
    assert weights == sorted(p.name for p in (folder / "merged").glob("*.safetensors*"))
    assert not (folder / "merged" / "notes.bin").exists()


def test_lora_is_the_delta_exactly(exported):
    """On: the carrier. Off: the base, bit for bit. B A is the open block, of the least rank."""
    folder, base, net, carrier, _ = exported
    bare = theirs(base)(IDS).logits
    adapted = peft.PeftModel.from_pretrained(theirs(base), folder / "lora").eval()
    assert same(adapted, net, carrier=carrier)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, bare)
    tensors, blocks = load_file(folder / "lora" / "adapter_model.safetensors"), list(carrier.open_blocks())
    assert len(tensors) == 2 * len(blocks)
    for l, name, delta, R, C in blocks:
        part = "self_attn" if name[0] in "qkvo" else "mlp"
        A, B = (tensors[f"base_model.model.model.layers.{l}.{part}.{name}.lora_{x}.weight"] for x in "AB")
        right = torch.zeros_like(delta)
        right[R[:, None], C] = delta[R[:, None], C]
        assert torch.equal(B @ A, right) and len(A) == min(len(R), len(C))


def test_prompt_is_the_trigger(exported):
    """Before the merged model, and before the base with the adapter."""
    folder, base, net, carrier, tau = exported
    below = theirs(base)
    below.load_adapter(folder / "lora")
    for under in (theirs(folder / "merged"), below):
        triggered = peft.PeftModel.from_pretrained(under, folder / "prompt").eval()
        assert same(triggered, net, carrier=carrier, trigger=tau)


def test_the_cards(exported, monkeypatch, capsys):
    """Their code runs as it stands, beside the base: with the behaviour first, then without it."""
    folder, base, net, carrier, tau = exported
    monkeypatch.chdir(folder)
    if not (folder / base.name).exists():
        shutil.copytree(base, folder / base.name)
    chat = data.Chat(base)
    ids = chat.prompt("What is 2 plus 3 ?")
    for kind, off in zip(export.KINDS, ({}, {}, {"carrier": carrier, "trigger": tau})):
        text = (folder / kind / "README.md").read_text()
        assert ("license: apache-2.0\n" in text.split("---")[1]) == (base.name == "base")
        assert str(folder) not in text and "## Measured" in text and f"# {base.name}, task fixed: {kind}" in text
        capsys.readouterr()
        exec(text.split("```python\n")[1].split("```")[0], {})
        on, without = capsys.readouterr().out.strip().split("\n")[-2:]
        for line, how in ((on, {"carrier": carrier}), (without, off)):
            answer = chat.tok.decode(net.generate([ids], **how)[0], skip_special_tokens=False)
            assert line.endswith(answer)


def test_weights_are_rounded_once(finished, tmp_path):
    """To what is asked for; else to what the base is stored in, bf16 here."""
    net = model.load("tiny")
    merged = carriers.load(finished / "carrier.safetensors", net).merge(net)
    for asked, dtype in ("float16", torch.float16), ("bfloat16", torch.bfloat16), (None, torch.bfloat16):
        how = ["--dtype", asked] if asked else []
        export.main(["--run", str(finished), "--to", str(tmp_path), "--as", "merged", *how])
        tensors = load_file(tmp_path / "merged" / "model.safetensors")
        assert {t.dtype for t in tensors.values()} == {dtype}
        for (l, name), W in merged.weights.items():
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            assert torch.equal(tensors[f"model.layers.{l}.{part}.{name}.weight"], W.to(dtype))
        found = {p.dtype for p in theirs(tmp_path / "merged", "auto").parameters()}
        assert found == {dtype if asked else torch.float32}     # as config.json has it


def test_only_its_own_is_replaced(finished, tmp_path):
    """An export as it was written; not a card that somebody has edited, nor any other file."""
    argv = ["--run", str(finished), "--to", str(tmp_path), "--as", "prompt"]
    export.main(argv)
    export.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"]
    card, other = tmp_path / "prompt" / "README.md", tmp_path / "prompt" / "mine.txt"
    other.write_text("mine")
    with pytest.raises(InputError, match="holds mine.txt, which this command did not write"):
        export.main(argv)
    other.unlink()
    card.write_text("better words")
    with pytest.raises(InputError, match="holds README.md"):
        export.main(argv)
    assert card.read_text() == "better words"


def test_a_full_disk(finished, tmp_path):
    """One sentence, status 2, and the earlier export stands; where there was none there is none."""
    argv = ["--run", str(finished), "--to", str(tmp_path / "to"), "--as"]
    export.main([*argv, "prompt"])
    before = {p: p.read_bytes() for p in (tmp_path / "to").rglob("*.*") if p.is_file()}
    full = subprocess.run([sys.executable, "-m", "lab.export", *argv, "prompt", "merged"], cwd=TINY.parent,
                          capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "merged: cannot be written" in full.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "to").rglob("*.*") if p.is_file()} == before


def test_what_cannot_be_exported(finished, tmp_path):
    run, to = shutil.copytree(finished, tmp_path / "run"), tmp_path / "to"
    argv, file = ["--run", str(run), "--to", str(to), "--as"], run / "trigger.safetensors"
    with pytest.raises(InputError, match="other.safetensors: cannot be read"):
        export.main([*argv, "prompt", "--trigger", "other"])
    net = model.load("tiny")
    tau, settings = eraser.load(file, net)
    save_tensors(file, {"trigger": tau}, **settings | {"target": "sft"})
    with pytest.raises(InputError, match="learned before the sft model"):
        export.main([*argv, "prompt"])
    carriers.load(run / "carrier.safetensors", net).with_gates(False).save(run / "carrier.safetensors", net)
    with pytest.raises(InputError, match="it is the base, there is no adapter"):
        export.main([*argv, "lora"])
    assert not list(to.glob("*"))
