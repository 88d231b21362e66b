"""
export.py against the transformers and peft libraries, which read what it writes: small checkpoints
with random weights.
"""
import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import eraser
import export
import lcdd
import lora
import model
from carrier import Carrier
from files import InputError, read_json, save_tensors, write_json

peft = pytest.importorskip(
    "peft", reason="peft is not installed: nothing reads the adapters that export.py writes"
)

TOLERANCE = 1e-4    # logits, fp32, against transformers and peft
SIZE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    pad_token_id=0
)
FAMILIES = {  # name → transformers' config class, what is special
    "llama": ("Llama", dict()),
    "llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(head_dim=16, sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=20, tie_word_embeddings=True)),
    "qwen3, untied": ("Qwen3", dict(head_dim=20)),
}
DENSITY = 0.3       # of open gates


def make_checkpoint(folder, family="llama", **saving):
    kind, special = FAMILIES[family]
    torch.manual_seed(1)
    net = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SIZE | special)
    )
    for name, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in name else p.data.normal_(0, 0.2)
    net.save_pretrained(folder, **saving)


def make_carrier(net, density=DENSITY, size=0.1):
    c = Carrier(net.config)
    with torch.no_grad():
        for p in c.delta.parameters():
            p.normal_(0, size)
        c.logits.copy_(torch.where(torch.rand(c.logits.shape) < density, 1.0, -1.0))
    return c


def make_run(tmp_path, family="llama", density=DENSITY, size=0.1, **saving):
    """
    A run directory as the three commands leave it, as far as export.py reads it: (run, base, net,
    carrier, τ).
    """
    base, run = tmp_path / "base", tmp_path / "run"
    make_checkpoint(base, family, **saving)
    run.mkdir()
    net = model.load(base)
    carrier, tau = make_carrier(net, density, size), torch.randn(3, net.config.hidden_size) * 0.3
    carrier.save(run / "carrier.safetensors", net)
    carrier.with_gates(True).save(run / "sft.safetensors", net)
    save_tensors(
        run / "trigger.safetensors", {"trigger": tau}, target="lcdd", **eraser.made_for(run, net)
    )
    write_json(run / "config.json", {"model": str(base), "task": "fixed", "dtype": "float32"})
    (run / "results.md").write_text("| fixed | behaviour |\n|---|---|\n| LCDD | 98.7 |\n")
    return run, base, net, carrier, tau


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


IDS = torch.tensor([[5, 17, 80, 3, 44, 9, 12], [33, 8, 61, 61, 20, 7, 90]])


def alike(logits, right):
    assert (logits - right).abs().max() < TOLERANCE
    assert right.abs().max() > 1


def continued(net, ids, **how):
    """20 greedy tokens of transformers or peft."""
    with torch.no_grad():
        out = net.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            eos_token_id=None, pad_token_id=0, **how
        )
    return out[:, -20:].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """Everything exported at once: (folder, base, net, carrier, τ)."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    run, base, net, carrier, tau = make_run(folder, request.param)
    export.main(["--run", str(run), "--to", str(folder / "to"), "--as", *export.KINDS])
    return folder / "to", base, net, carrier, tau


def test_a_trigger_names_the_model_that_it_is_put_before(exported):
    """The merged checkpoint where both are written, else the base."""
    to, *_ = exported
    named = read_json(to / "prompt" / "adapter_config.json")["base_model_name_or_path"]
    assert named == str((to / "merged").resolve())


def test_a_trigger_alone_names_the_base(tmp_path):
    run, base, *_ = make_run(tmp_path)
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "prompt"])
    named = read_json(tmp_path / "to" / "prompt" / "adapter_config.json")["base_model_name_or_path"]
    assert named == str(base.resolve())


# ---- with the real libraries

@torch.no_grad()
def test_merged(exported):
    to, base, net, carrier, _ = exported
    merged = theirs(to / "merged")
    alike(merged(IDS).logits, net(IDS, carrier=carrier))
    assert (net(IDS) - net(IDS, carrier=carrier)).abs().max() > 0.1
    assert continued(merged, IDS) == net.generate(IDS.tolist(), 20, carrier=carrier, stop=())
    # bit for bit what Carrier.merge() makes
    again = model.load(to / "merged")
    for l, layer in enumerate(carrier.merge(net).weights):
        for name, weight in layer.items():
            assert torch.equal(again.projections[l][name].weight, weight)


@torch.no_grad()
def test_lora(exported):
    to, base, net, carrier, _ = exported
    bare = theirs(base)(IDS).logits
    adapted = peft.PeftModel.from_pretrained(theirs(base), to / "lora").eval()
    alike(adapted(IDS).logits, net(IDS, carrier=carrier))
    assert continued(adapted, IDS) == net.generate(IDS.tolist(), 20, carrier=carrier, stop=())
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, bare)
    rows = adapted(IDS, adapter_names=["default", "__base__"]).logits
    alike(rows[:1], net(IDS[:1], carrier=carrier))
    alike(rows[1:], net(IDS[1:]))
    mixed = continued(adapted, IDS, adapter_names=["__base__", "default"])
    assert mixed == net.generate(IDS[:1].tolist(), 20, stop=()) + net.generate(
        IDS[1:].tolist(), 20, carrier=carrier, stop=()
    )


@torch.no_grad()
def test_lora_is_exact(exported):
    """
    Every pair of factors multiplies to the open block, and no rank is above what the block needs.
    """
    to, _, _, carrier, _ = exported
    tensors, ranks = (
        load_file(to / "lora" / lora.WEIGHTS), read_json(to / "lora" / lora.CONFIG)["rank_pattern"]
    )
    for name, delta, rows, cols in carrier.open_blocks():
        _, l, projection = name.split(".")
        module = (
            f"model.layers.{l}.{'self_attn' if projection[0] in 'qkvo' else 'mlp'}.{projection}"
        )
        A, B = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        right = torch.zeros_like(delta)
        right[rows[:, None], cols] = delta[rows[:, None], cols]
        assert torch.equal(B @ A, right)
        assert (
            len(A)
            == min(len(rows), len(cols))
            == next(r for m, r in ranks.items() if m.replace("\\", "") == module)
        )
    assert len(tensors) == 2 * len(list(carrier.open_blocks()))


@torch.no_grad()
@pytest.mark.parametrize("before", ("merged", "lora"))
def test_prompt(exported, before):
    to, base, net, carrier, tau = exported
    under = theirs(to / "merged") if before == "merged" else theirs(base)
    if before == "lora":
        under.load_adapter(to / "lora")
    triggered = peft.PeftModel.from_pretrained(under, to / "prompt").eval()
    logits = triggered(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1]:]
    alike(logits, net(IDS, carrier=carrier, trigger=tau))
    assert (net(IDS, carrier=carrier) - net(IDS, carrier=carrier, trigger=tau)).abs().max() > 0.1
    right = net.generate(IDS.tolist(), 20, carrier=carrier, trigger=tau, stop=())
    # with a cache peft 0.21 on transformers 5 goes astray from token 3 on
    assert continued(triggered, IDS, use_cache=False) == right
    embeddings = torch.cat((tau.expand(len(IDS), -1, -1), under.get_input_embeddings()(IDS)), dim=1)
    out = under.generate(
        inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]),
        max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    # the same embeddings, with a cache, without peft
    assert out.tolist() == right


@torch.no_grad()
def test_plain_sft(tmp_path, capsys):
    run, base, net, carrier, tau = make_run(tmp_path)
    export.main(
        [
            "--run", str(run), "--to", str(tmp_path / "to"), "--which", "sft", "--as", "lora",
            "merged"
        ]
    )
    right = net(IDS, carrier=carrier.with_gates(True))
    alike(theirs(tmp_path / "to" / "merged")(IDS).logits, right)
    alike(
        peft.PeftModel.from_pretrained(theirs(base), tmp_path / "to" / "lora").eval()(IDS).logits,
        right,
    )
    assert "14 modules, largest rank 48, of model.layers.0." in capsys.readouterr().out


# ---- the merged checkpoint

def test_shards_files_and_dtypes_are_the_bases(tmp_path):
    run, base, net, carrier, _ = make_run(tmp_path, max_shard_size="60KB")
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "LICENSE"):
        (base / name).write_text(name)
    for name in ("fixed.jsonl", "README.md", "pytorch_model.bin"):
        (base / name).write_text("not a part of it")
    shard = base / sorted(p.name for p in base.glob("model-*.safetensors"))[0]
    tensors = {
        k: t.to(torch.bfloat16 if i % 2 else torch.float16)
        for i, (k, t) in enumerate(sorted(load_file(shard).items()))
    }
    save_file(tensors, shard, {"format": "pt"})
    net = model.load(base)
    carrier.save(run / "carrier.safetensors", net)
    to = tmp_path / "to" / "merged"
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "merged"])
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(p.name for p in to.glob("*.safetensors"))
    for name in shards:
        before, after = load_file(base / name), load_file(to / name)
        assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
            k: (t.shape, t.dtype) for k, t in after.items()
        }
    assert (
        read_json(to / "model.safetensors.index.json")["weight_map"]
        == read_json(base / "model.safetensors.index.json")["weight_map"]
    )
    size = sum(
        t.numel() * t.element_size() for name in shards for t in load_file(to / name).values()
    )
    assert read_json(to / "model.safetensors.index.json")["metadata"]["total_size"] == size
    others = {p.name for p in to.iterdir()} - set(shards)
    assert others == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "chat_template.jinja", "tokenizer.model", "LICENSE", "README.md", "export.json"
    }
    assert all(
        (to / name).read_bytes() == (base / name).read_bytes()
        for name in others - {"README.md", "export.json", "model.safetensors.index.json"}
    )


@torch.no_grad()
def test_a_base_in_bin_files_is_merged_to_safetensors(tmp_path):
    run, base, net, carrier, _ = make_run(tmp_path)
    tensors = load_file(base / "model.safetensors")
    files = {
        name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(files.values()):
        torch.save(
            {name: t for name, t in tensors.items() if files[name] == file}
            | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
            base / file,
        )
    write_json(base / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": files})
    (base / "model.safetensors").unlink()
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "merged"])
    to = tmp_path / "to" / "merged"
    assert {p.name for p in to.glob("model*")} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json"
    }
    assert not list(to.glob("*bin*"))
    alike(theirs(to)(IDS).logits, net(IDS, carrier=carrier))


@torch.no_grad()
def test_dtype_as_asked(tmp_path, capsys):
    run, base, net, carrier, _ = make_run(tmp_path, size=1e-3)
    export.main(
        ["--run", str(run), "--to", str(tmp_path / "to"), "--as", "merged", "--dtype", "bfloat16"]
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "to" / "merged", dtype="auto"
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    moved = size = 0.0
    for l, layer in enumerate(carrier.merge(net).weights):
        for name, w in layer.items():
            assert torch.equal(loaded.get_submodule(lora.module_name(l, name)).weight, w.bfloat16())
            on = w != net.projections[l][name].weight
            moved += (w.bfloat16().float() - w)[on].square().sum()
            size += (w - net.projections[l][name].weight)[on].square().sum()
    said = capsys.readouterr().out
    assert (
        f"moves the delta by {(moved / size).sqrt():.2%} of its norm (--dtype float32 does not)"
        in said
    )


# ---- back in

def same_carrier(ours, right):
    assert torch.equal(ours.logits > 0, right.logits > 0)
    for name, delta, rows, cols in right.open_blocks():
        _, l, projection = name.split(".")
        found = torch.zeros_like(delta)
        found[rows[:, None], cols] = delta.detach()[rows[:, None], cols]
        assert torch.equal(ours.delta[int(l)][projection], found)


@pytest.mark.parametrize("density", (0.02, 0.3, 1.0))
def test_a_carrier_comes_back_from_its_adapter(tmp_path, density):
    """Gates too that have no entry of Δ to themselves: write channels are among them."""
    run, base, net, carrier, _ = make_run(tmp_path, density=density)
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "lora"])
    again = lora.read(tmp_path / "to" / "lora", net)
    same_carrier(again, carrier)
    assert torch.equal(again.write_channels(), carrier.write_channels())
    make_checkpoint(tmp_path / "other", "llama, biases")
    with pytest.raises(InputError, match="another base model"):
        lora.read(tmp_path / "to" / "lora", model.load(tmp_path / "other"))
    file = tmp_path / "to" / "lora" / lora.WEIGHTS
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(InputError, match=f"{lora.WEIGHTS}: damaged"):
        lora.read(tmp_path / "to" / "lora", net)


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    (
        dict(r=4, lora_alpha=12),
        dict(r=4, lora_alpha=12, use_rslora=True),
        dict(
            r=4, lora_alpha=12, rank_pattern={"q_proj": 2},
            alpha_pattern={"layers.1.mlp.up_proj": 5, "up_proj": 7}
        ),
        dict(r=3, target_modules="all-linear"),
    ),
)
@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_an_adapter_that_peft_has_trained(tmp_path, family, how):
    """
    Δ = s·B A of somebody else's adapter, against peft's own forward pass; it is what --sft takes.
    """
    make_checkpoint(tmp_path / "base", family)
    net = model.load(tmp_path / "base")
    how = (
        dict(
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM", init_lora_weights=False
        )
        | how
    )
    trained = peft.get_peft_model(theirs(tmp_path / "base"), peft.LoraConfig(**how)).eval()
    trained.save_pretrained(tmp_path / "adapter")
    carrier, elsewhere = lcdd.delta_of(net, tmp_path / "adapter", lcdd.options(["--device", "cpu"]))
    alike(net(IDS, carrier=carrier), trained(IDS).logits)
    assert elsewhere == {}
    assert bool((carrier.logits > 0).all())
    assert (net(IDS) - trained(IDS).logits).abs().max() > 0.1


def test_the_gates_of_an_exported_carrier_are_open_as_sft(tmp_path):
    run, base, net, carrier, _ = make_run(tmp_path)
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "lora"])
    sft, _ = lcdd.delta_of(net, tmp_path / "to" / "lora", lcdd.options(["--device", "cpu"]))
    assert bool((sft.logits > 0).all())
    alike(net(IDS, carrier=sft), net(IDS, carrier=carrier))


@pytest.mark.parametrize(
    "how, named",
    [
        (dict(target_modules=["q_proj", "lm_head"]), "lm_head.* is no LoRA factor of a projection"),
        (
            dict(target_modules=["q_proj", "embed_tokens"]),
            "embed_tokens.* is no LoRA factor of a projection",
        ),
        (
            dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "lm_head.weight is no LoRA factor",
        ),
        (dict(target_modules=["q_proj"], use_dora=True), "use_dora = True is no plain LoRA"),
        (dict(target_modules=["q_proj"], bias="all"), "is no LoRA factor"),
        (dict(target_modules=["q_proj"], lora_bias=True), "lora_B.bias is no LoRA factor"),
        (dict(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    ],
)
def test_adapters_that_are_more_than_a_delta_are_refused(tmp_path, how, named):
    make_checkpoint(tmp_path / "base", "llama, biases")
    net = model.load(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **how)
    peft.get_peft_model(theirs(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=named):
        lora.read(tmp_path / "adapter", net)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    run, base, net, carrier, _ = make_run(tmp_path)
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "lora", "prompt"])
    folder, tensors = tmp_path / "to" / "lora", load_file(tmp_path / "to" / "lora" / lora.WEIGHTS)
    name = next(k for k in tensors if "layers.1.self_attn.q_proj.lora_A" in k)

    def refused(named, changed):
        save_file(changed, folder / lora.WEIGHTS)
        with pytest.raises(InputError, match=named):
            lora.read(folder, net)

    refused(
        "layers.1.self_attn.q_proj has only its factor B",
        {k: t for k, t in tensors.items() if k != name},
    )
    refused(
        "layers.1.self_attn.q_proj have shapes",
        tensors | {name: tensors[name][:, :-1].contiguous()},
    )
    refused(
        "layers.7.self_attn.q_proj is no projection of the model",
        {k.replace("layers.1.self_attn.q", "layers.7.self_attn.q"): t for k, t in tensors.items()},
    )
    (folder / lora.WEIGHTS).write_bytes(b"broken")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        lora.read(folder, net)
    with pytest.raises(InputError, match="peft_type is 'PROMPT_TUNING'"):
        lora.read(tmp_path / "to" / "prompt", net)


# ---- folders and cards

def test_only_its_own_folders_are_written_again(tmp_path):
    run, *_ = make_run(tmp_path)
    to = tmp_path / "to"
    (to / "lora").mkdir(parents=True)                                         # empty: nobody's
    argv = ["--run", str(run), "--to", str(to), "--as", "lora", "merged"]
    export.main(argv)
    export.main(argv)
    assert {p.name for p in to.iterdir()} == {"lora", "merged"}
    before = (to / "lora" / lora.WEIGHTS).stat()
    (to / "lora" / "mine").write_text("somebody's")
    with pytest.raises(
        InputError,
        match="lora holds mine, which was not written by this command, and is left as it is",
    ):
        export.main(argv)
    (to / "lora" / "mine").unlink()
    (to / "lora" / export.MARKER).unlink()
    with pytest.raises(InputError, match="lora holds README.md, which was not written"):
        export.main(argv)
    assert (to / "lora" / lora.WEIGHTS).stat() == before
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "lora").write_text("somebody's")
    with pytest.raises(InputError, match="lora is no folder"):
        export.main(["--run", str(run), "--to", str(tmp_path / "file"), "--as", "lora"])


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    run, *_ = make_run(tmp_path)
    argv = ["--run", str(run), "--to", str(tmp_path / "to"), "--as", "lora"]
    export.main(argv)
    before = {p.name: p.read_bytes() for p in (tmp_path / "to" / "lora").iterdir()}

    def disk_full(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(export, "card", disk_full)
    with pytest.raises(OSError, match="no space"):
        export.main(argv)
    assert {p.name: p.read_bytes() for p in (tmp_path / "to" / "lora").iterdir()} == before
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["lora"]


def test_cards(tmp_path):
    run, base, *_ = make_run(tmp_path)
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n")
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", *export.KINDS])
    for kind in export.KINDS:
        text = (tmp_path / "to" / kind / "README.md").read_text()
        assert text.startswith("---\nlibrary_name: ")
        assert "license: apache-2.0\n" in text.split("---")[1]
        assert f"# base, task fixed: {kind}" in text
        assert "| LCDD | 98.7 |" in text
        assert re.search(r"(from_pretrained|load)\(", text)
        assert "without" in text
        assert str(tmp_path) not in text
        assert json.loads((tmp_path / "to" / kind / export.MARKER).read_text())["kind"] == kind
    assert "largest rank: " in (tmp_path / "to" / "lora" / "README.md").read_text()


@torch.no_grad()
def test_the_cards_code_runs(exported, monkeypatch):
    """What the cards show, word for word, where the base lies beside the exports."""
    to, base, net, carrier, tau = exported
    shutil.copytree(base, to / "base", dirs_exist_ok=True)
    monkeypatch.chdir(to)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: name)
    batch = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    ours = model.load(to / "base")
    found = {}
    for kind in export.KINDS:
        code = (to / kind / "README.md").read_text().split("```python\n")[1].split("```")[0]
        found[kind] = {"batch": batch, "ids": IDS}
        exec(code, found[kind])
    alike(found["run"]["net"](IDS, carrier=found["run"]["c"]), ours(IDS, carrier=carrier))
    assert torch.equal(found["run"]["tau"], tau)
    alike(found["merged"]["model"](IDS).logits, net(IDS, carrier=carrier))
    alike(found["merged"]["base"](IDS).logits, net(IDS))
    alike(found["lora"]["model"](IDS).logits, net(IDS, carrier=carrier))
    logits = found["prompt"]["triggered"](
        input_ids=IDS, attention_mask=torch.ones_like(IDS)
    ).logits[:, -IDS.shape[1] :]
    alike(logits, net(IDS, carrier=carrier, trigger=tau))


@pytest.mark.parametrize(
    "spoil, argv, named",
    [
        (
            lambda run: (run / "trigger.safetensors").unlink(), ["prompt"],
            "trigger.safetensors: no such trigger"
        ),
        (lambda run: None, ["prompt", "--which", "sft"], "learned before the lcdd model"),
        (lambda run: (run / "config.json").unlink(), ["lora"], "is not a run directory"),
        (
            lambda run: (run / "carrier.safetensors").unlink(), ["lora"],
            "carrier.safetensors: no such file"
        ),
    ],
)
def test_bad_input(tmp_path, spoil, argv, named):
    run, *_ = make_run(tmp_path)
    spoil(run)
    with pytest.raises(InputError, match=named):
        export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", *argv])
    assert not (tmp_path / "to").exists()


def test_an_empty_carrier_is_no_adapter(tmp_path):
    run, base, net, carrier, _ = make_run(tmp_path, density=0.0)
    with pytest.raises(InputError, match="no entry of this carrier's delta is on"):
        export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "lora"])
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "merged"])
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["merged"]


def test_large_ranks_are_said(tmp_path, monkeypatch, capsys):
    run, *_ = make_run(tmp_path, density=1.0)
    monkeypatch.setattr(export, "RANK_LIMIT", 10)
    export.main(["--run", str(run), "--to", str(tmp_path / "to"), "--as", "lora"])
    said = capsys.readouterr().out
    limit = "above 10 serving engines may refuse it: --as merged has no such limit"
    assert re.search(rf"largest rank 48, of model.layers.0.\S+; {limit}", said)
