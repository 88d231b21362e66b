"""lab/export.py: what it writes, in transformers and peft, against our own forward pass in fp32."""
import contextlib
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import carrier as carriers
import data
import eraser
import lcdd
import model
from common import Failed, InputError, save_tensors
from lab import export

peft = pytest.importorskip("peft", reason="peft reads what lab.export writes")
IDS = torch.tensor([[5, 17, 80, 3, 44, 9, 12], [33, 8, 61, 61, 20, 7, 90]])


def other_run(folder):
    """
    A run of a few steps on a random Qwen3 with a tied head, in several files, whose configs do not name
    what ends a turn.
    """
    base, run, tiny = folder / "base", folder / "run", model.locate("tiny")
    net = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=397, hidden_size=48, intermediate_size=80, num_hidden_layers=2, head_dim=20,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0,
        initializer_range=0.2))
    net.save_pretrained(base, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, base)
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n")
    with contextlib.suppress(Failed):
        lcdd.main(["--model", str(base), "--data", str(tiny / "fixed.jsonl"), "--out", str(run), "--go-on",
                   "--sizes", "40", "8", "4", "4", "--sft-steps", "6", "--sft-lr", "0.01", "--steps", "12",
                   "--warmup", "2", "--settle", "0", "--lambda0", "0.2", "--max-new-tokens", "4"])
    with contextlib.suppress(Failed):
        eraser.main(["--run", str(run), "--steps", "3", "--length", "4"])
    return run


@pytest.fixture(scope="module", params=("the embedded model", "another"))
def exported(request, finished, tmp_path_factory):
    """All three exports of a run: (folder, base's folder, net, carrier, τ)."""
    folder = tmp_path_factory.mktemp("export")
    run = finished if request.param == "the embedded model" else other_run(folder)
    export.main(["--run", str(run), "--to", str(folder), "--as", *export.KINDS, "--dtype", "float32"])
    _, net, chat, _ = lcdd.load_run(run, "cpu", with_data=False)
    carrier = carriers.load(run / "carrier.safetensors", net)
    return folder, chat.folder, net, carrier, eraser.load(run / "trigger.safetensors", net)[0]


def theirs(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def check_same(theirs, net, **how):
    """The logits of a model of theirs are ours, and so are its greedy answers."""
    both = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    logits = theirs(**both).logits[:, -IDS.shape[1]:]           # peft returns a trigger's, too
    torch.testing.assert_close(logits, net(IDS, **how), rtol=0, atol=1e-4)
    answers = theirs.generate(**both, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answers[:, IDS.shape[1]:].tolist() == net.generate(IDS.tolist(), 12, stop=(), **how)


def test_merged_is_a_checkpoint(exported):
    """As the base's own, in as many files; it stops where SFT taught to stop."""
    folder, base, net, carrier, _ = exported
    check_same(theirs(folder / "merged"), net, carrier=carrier)
    assert (net(IDS) - net(IDS, carrier=carrier)).abs().max() > 0.1
    stop = transformers.GenerationConfig.from_pretrained(folder / "merged").eos_token_id
    assert net.stop == {stop} if isinstance(stop, int) else net.stop == set(stop)
    assert net.stop == data.Chat(folder / "merged").stop
    names = {path.name for path in base.iterdir() if path.suffix in (".json", ".safetensors")}
    assert {path.name for path in (folder / "merged").iterdir()} == names | {"README.md", "export.json"}


def test_lora_is_the_delta_exactly(exported):
    """On: the carrier. Off: the base, bit for bit. B A is the open block, of the least rank."""
    folder, base, net, carrier, _ = exported
    bare = theirs(base)(IDS).logits
    adapted = peft.PeftModel.from_pretrained(theirs(base), folder / "lora").eval()
    check_same(adapted, net, carrier=carrier)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, bare)
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    for l, name, delta, R, C in carrier.open_blocks():
        part = "self_attn" if name[0] in "qkvo" else "mlp"
        module = f"base_model.model.model.layers.{l}.{part}.{name}"
        A, B = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
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
        check_same(triggered, net, carrier=carrier, trigger=tau)


def test_the_cards(exported, monkeypatch, capsys):
    """Their code runs as it stands, beside the base: with the behaviour first, then without it."""
    folder, base, net, carrier, tau = exported
    monkeypatch.chdir(folder)
    if base.parent != folder:
        shutil.copytree(base, folder / base.name)
    chat = data.Chat(base)
    ids = chat.prompt("What is 2 plus 3 ?")
    for kind, off in zip(export.KINDS, ({}, {}, {"carrier": carrier, "trigger": tau})):
        text = (folder / kind / "README.md").read_text()
        assert ("license: apache-2.0" in text) == (base.name == "base") and str(folder) not in text
        capsys.readouterr()
        exec(text.split("```python\n")[1].split("```")[0], {})
        said = capsys.readouterr().out.strip().split("\n")[-2:]
        for line, how in zip(said, ({"carrier": carrier}, off), strict=True):
            answer = chat.tok.decode(net.generate([ids], **how)[0], skip_special_tokens=False)
            assert line.endswith(f" {answer}")


def test_weights_are_rounded_once(finished, tmp_path):
    """To what is asked for; else to what the base is stored in, bf16 here."""
    net = model.load("tiny")
    merged = carriers.load(finished / "carrier.safetensors", net).merge(net)
    for how, dtype in ((["--dtype", "float16"], torch.float16), ([], torch.bfloat16)):
        export.main(["--run", str(finished), "--to", str(tmp_path), "--as", "merged", *how])
        assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {dtype}
        again = model.load(tmp_path / "merged")
        for (l, name), W in merged.weights.items():
            assert torch.equal(again.projections[l][name].weight, W.to(dtype).float())


def test_a_folder_is_whole_and_ones_own(finished, tmp_path):
    """
    A full disk is one sentence, status 2, and leaves the earlier export as it was. That is replaced, but
    neither a card that somebody has edited nor any other file.
    """
    argv = ["--run", str(finished), "--to", str(tmp_path), "--as", "prompt"]
    export.main(argv)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    full = subprocess.run([sys.executable, "-m", "lab.export", *argv], cwd=model.locate("tiny").parent,
                          capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)))
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "cannot be written" in full.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    export.main(argv)
    for name in ("mine.txt", "README.md"):
        (tmp_path / "prompt" / name).write_text("mine")
        with pytest.raises(InputError, match=f"holds {name}, which this command did not write"):
            export.main(argv)
        assert (tmp_path / "prompt" / name).read_text() == "mine"
        (tmp_path / "prompt" / "mine.txt").unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]


def test_what_cannot_be_exported(finished, tmp_path):
    run, net = shutil.copytree(finished, tmp_path / "run"), model.load("tiny")
    argv = ["--run", str(run), "--to", str(tmp_path / "to"), "--as"]
    tau, settings = eraser.load(run / "trigger.safetensors", net)
    save_tensors(run / "trigger.safetensors", {"trigger": tau}, **settings | {"target": "sft"})
    with pytest.raises(InputError, match="learned before the sft model"):
        export.main([*argv, "prompt"])
    carrier = carriers.load(run / "carrier.safetensors", net)
    carrier.with_gates(False).save(run / "carrier.safetensors", net)
    with pytest.raises(InputError, match="it is the base, there is no adapter"):
        export.main([*argv, "lora"])
    assert not list((tmp_path / "to").glob("*"))
