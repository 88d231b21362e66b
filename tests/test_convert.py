"""
lab/convert.py on checkpoints that are made here: what it writes against transformers, peft,
sentencepiece, mistral-common and llama.cpp. No network.
"""
import json
import shutil
import urllib.request

import pytest
import torch

for library in ("transformers", "peft", "gguf", "sentencepiece", "google.protobuf"):
    pytest.importorskip(library, reason=f"{library} is not installed: lab.convert is not tested")

import gguf
import numpy as np
import peft
import sentencepiece
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model
from common import InputError
from data import EVERYDAY, Chat
from lab import convert, smollm2

IDS = torch.arange(5, 29).reshape(2, 12)
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZE = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
DEFAULT = dict(rope_parameters=dict(rope_type="default", rope_theta=1e5))
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=8192)
PROSE = [json.loads(line)["prompt"] for line in EVERYDAY.read_text().splitlines()[:500]]
HARD = ["\n\n6?", "they'RE 1234567 x.\n\n  y", " 12\n", "a  b", "日本 🙂\t\n x"]


# ---- checkpoints

def network(family="Llama", **special):
    """A random model of transformers', with no weight at its usual start."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SIZE | special)
    net = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in name else p.data.normal_(0, 0.15)
    return net.eval()


def byte_level():
    """Byte-level BPE, learned across all boundaries."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.train_from_iterator(PROSE[:300] + HARD * 100, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return tok


def write(path, content):
    path.write_text(json.dumps(content))


def folder(path, net, tok=None, **settings):
    """A plain checkpoint, with a ChatML template."""
    net.save_pretrained(path)
    (tok or byte_level()).save(str(path / "tokenizer.json"))
    names = dict(bos_token=SPECIAL[1], eos_token=SPECIAL[2], chat_template=CHATML)
    write(path / "tokenizer_config.json", names | settings)
    return path


def learned(path, **special):
    """A tokenizer.model that the sentencepiece library trains in Llama's settings."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_prefix=str(path / "tokenizer"), vocab_size=380,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, **special)
    proto = convert.ModelProto.FromString((path / "tokenizer.model").read_bytes())
    late = list(proto.pieces)[-200:]        # ids in another order than scores: Mistral's "▁▁"
    del proto.pieces[-200:]
    proto.pieces.extend(late[::-1])
    (path / "tokenizer.model").write_bytes(proto.SerializeToString())
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


def gguf_file(path, net, kind="F32", tok=None, change=None, **fields):
    """A GGUF of a model; fields: tokenizer.ggml's; change(writer) adds whatever else."""
    c, kind = net.config, gguf.GGMLQuantizationType[kind]
    family, head_dim = c.model_type.replace("mistral", "llama"), c.head_dim or 16
    writer = gguf.GGUFWriter(path, family)
    sizes = dict(context_length=256, block_count=2, embedding_length=64, feed_forward_length=96,
                 head_count=4, head_count_kv=2, key_length=head_dim, value_length=head_dim,
                 layer_norm_rms_eps=c.rms_norm_eps, rope_freq_base=c.rope_parameters["rope_theta"])
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    add_tokenizer(writer, tok or byte_level(), fields)
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names, heads = gguf.get_tensor_name_map(architecture, 2), {"q_proj": 4, "k_proj": 2}
    for key, t in net.state_dict().items():
        stem, _, ending = key.rpartition(".")
        w, part = t.numpy(), stem.rpartition(".")[2]
        if family == "llama" and part in heads:     # as llama.cpp's converter turns the rows
            w = w.reshape(heads[part], 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if key != "lm_head.weight" or not c.tie_word_embeddings:
            form = kind if w.ndim > 1 else gguf.GGMLQuantizationType.F32
            numbers = gguf.quantize(np.ascontiguousarray(w), form)
            writer.add_tensor(f"{names.get_name(stem)}.{ending}", numbers, raw_dtype=form)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, tok, fields):
    """The fields of a byte-level tokenizer, or of a sentencepiece model."""
    if isinstance(tok, Tokenizer):
        found = json.loads(tok.to_str())["model"]
        pieces = sorted(found["vocab"], key=found["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        merges = [" ".join(pair) for pair in found["merges"] if "".join(pair) != "the"]
        writer.add_token_merges(merges)     # Llama 3's words are tokens that no merge makes
        writer.add_token_types([3 if piece in SPECIAL else 1 for piece in pieces])
    else:
        proto = convert.ModelProto.FromString(tok.serialized_model_proto())
        pieces = [piece.piece for piece in proto.pieces]
        writer.add_tokenizer_model("llama")
        writer.add_token_types([piece.type for piece in proto.pieces])
        writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_list(pieces)
    writer.add_chat_template(CHATML)
    for name, value in (dict(pre="gpt-2", bos_token_id=1, eos_token_id=2) | fields).items():
        if value is not None:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(f"tokenizer.ggml.{name}", value)


def converted(source, **how):
    """The folder that is written of a source."""
    out = source.parent / f"{source.name}.out"
    convert.convert(str(source), out, **how)
    return out


def same(path, right):
    """Does the root compute with a folder what transformers' model does?"""
    with torch.no_grad():
        ours, right = model.load(path)(IDS), right(IDS).logits
    return bool((ours - right).abs().max() <= 1e-5 * right.abs().max())


def refused(source, what, **how):
    """The sentence says what, and nothing is left behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError, match=what):
        converted(source, **how)
    assert sorted(source.parent.iterdir()) == before


# ---- weights

def test_files_of_torch(tmp_path):
    """Shards in torch's zip form and its older one; config.json's dtype narrows nothing."""
    net = network()
    source, state = folder(tmp_path / "in", net), net.state_dict()
    (source / "model.safetensors").unlink()
    names = {name: f"pytorch_model-{k % 2}.bin" for k, name in enumerate(state)}
    for k in range(2):
        file = f"pytorch_model-{k}.bin"
        part = {name: state[name] for name in names if names[name] == file}
        torch.save(part, source / file, _use_new_zipfile_serialization=k == 0)
    write(source / "pytorch_model.bin.index.json", dict(metadata={}, weight_map=names))
    config = json.loads((source / "config.json").read_text())
    write(source / "config.json", config | {"dtype": "float16"})
    found = load_file(converted(source) / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert Chat(tmp_path / "in.out").prompt("Hello") == Chat(source).prompt("Hello")
    net = network(tie_word_embeddings=True)         # of which only the head is stored
    source, state = folder(tmp_path / "tied", net), dict(net.state_dict())
    del state["model.embed_tokens.weight"]
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert same(converted(source), net)


def test_a_scaling_that_was_added_by_hand(tmp_path):
    """rope_scaling wins over rope_parameters: llama3's is computed, linear is refused by name."""
    source = folder(tmp_path / "in", network())
    config = json.loads((source / "config.json").read_text())
    write(source / "config.json", config | {"rope_scaling": dict(rope_type="linear", factor=4.0)})
    refused(source, "linear")
    write(source / "config.json", config | {"rope_scaling": LLAMA3})
    right = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert right.config.rope_parameters["rope_type"] == "llama3" and same(converted(source), right)


def test_first_layers_for_want_of_memory(tmp_path, monkeypatch, capsys):
    source = folder(tmp_path / "in", network("Qwen2", num_hidden_layers=3))
    monkeypatch.setattr(convert, "SPARE", 1e-6)
    converted(source)
    said = capsys.readouterr()
    assert "2 of 3 layers for want" in said.out and "rounded to bfloat16" in said.err


def test_folders_that_are_refused(tmp_path):
    source = folder(tmp_path / "in", network())
    config = json.loads((source / "config.json").read_text())
    write(source / "config.json", config | {"num_hidden_layers": 3})
    refused(source, "layers.2.*missing")
    write(source / "config.json", config)
    damaged = (source / "model.safetensors").read_bytes()[:-100]
    (source / "model.safetensors").write_bytes(damaged)
    refused(source, "model.safetensors: cannot be read")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, "pytorch_model.bin: cannot be read")
    (source / "pytorch_model.bin").unlink()
    refused(source, "no config.json and weights")
    refused(tmp_path / "elsewhere", "name a local folder")
    with pytest.raises(InputError, match="is left as it is"):
        convert.convert(str(folder(tmp_path / "other", network())), source)


def test_nothing_is_called_ready_that_does_not_agree(tmp_path, monkeypatch, capsys):
    source, load = folder(tmp_path / "in", network()), model.load

    def another(path, **how):
        net = load(path, **how)
        net.model.norm.weight.data *= 1.001
        return net

    for place, name, broken, what in (
            (model, "load", another, "logits of the ids"),
            (Chat, "plain", lambda chat, text: [0], "[0], not ["),
            (Chat, "render", lambda chat, text, answer=None: text, "the template of")):
        monkeypatch.setattr(place, name, broken)
        refused(source, "not written")
        assert what in capsys.readouterr().err
        monkeypatch.undo()


# ---- tokenizer.model

@pytest.mark.parametrize("legacy", [True, False, None])
def test_sentencepiece(tmp_path, legacy):
    """
    Tokens of added_tokens.json, wherever they stand; text behind a special token by `legacy`;
    a user-defined piece within a text as sentencepiece has it.
    """
    source = tmp_path / "in"
    network(vocab_size=384).save_pretrained(source)
    right = learned(source, user_defined_symbols=["[user]"], control_symbols=["[INST]"])
    write(source / "added_tokens.json", {"<|im_end|>": 380, "<|im_start|>": 381})
    settings = dict(chat_template=CHATML, eos_token="<|im_end|>", legacy=legacy)
    write(source / "tokenizer_config.json", settings)
    chat = Chat(converted(source))
    for text in PROSE[:50] + HARD[1:2] + HARD[3:] + ["a[user]b  c"]:
        assert chat.plain(text) == [1, *right.encode(text)]
    for text in PROSE[:50] + HARD[3:]:
        assert chat.decode(chat.ids(text)) == text
    for text in ("user\n", " Hello"):       # "▁" is what begins a text for sentencepiece
        behind = right.encode(text) if legacy is not False else right.encode(f"[user]{text}")[2:]
        for token, i in ("<|im_start|>", 381), ("[INST]", right.piece_to_id("[INST]")):
            assert chat.plain(f"{token}{text}{token}") == [1, i, *behind, i]
    assert (chat.eos_id, chat.prompt("x").count(381), chat.prompt("x").count(380)) == (380, 2, 1)


# ---- tokens that are declared beside tokenizer.json

def test_declared_tokens(tmp_path):
    """Wherever they are declared, with the id that is declared; an empty token is none."""
    plain, late = {"<d>": 400, "</d>": 401}, {"<d>": 405, "</d>": 403}
    by_id = {str(i): dict(content=text, special=True) for text, i in plain.items()}
    for k, (settings, file) in enumerate([
            (dict(added_tokens_decoder=by_id), None), ({}, plain), ({}, late),
            (dict(additional_special_tokens=list(plain)), None)]):
        source = folder(tmp_path / f"in{k}", network(vocab_size=410), **settings)
        if file:
            write(source / "added_tokens.json", file)
        ids = Chat(converted(source)).ids("a <d>b</d>")
        assert ids[-3::2] == list((file or plain).values())
        library = transformers.AutoTokenizer.from_pretrained(tmp_path / f"in{k}.out")
        assert library("a <d>b</d>").input_ids == ids
    source = folder(tmp_path / "empty", network(), eos_token="", pad_token="[PAD]")
    write(source / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    assert Chat(converted(source)).eos_id == 2
    write(source / "tokenizer_config.json", dict(chat_template=CHATML + "[PAD]", pad_token="[PAD]"))
    with pytest.raises(InputError, match="PAD"):        # beyond the vocabulary, and written
        convert.convert(str(source), tmp_path / "out")


# ---- GGUF

def test_weights_of_gguf_files(tmp_path):
    """Against the model that a file was made of; transformers' own config leaves out half of it."""
    scaled = network(rope_parameters=LLAMA3)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled.config, "cpu")
    factors = LLAMA3["rope_theta"] ** -(torch.arange(0, 16, 2) / 16) / frequencies
    nets = [scaled, network(**DEFAULT), network(attention_bias=True, mlp_bias=True, **DEFAULT),
            network("Mistral", head_dim=32, sliding_window=None, **DEFAULT),
            network("Qwen2", head_dim=16, tie_word_embeddings=True, **DEFAULT),
            network("Qwen3", head_dim=32, **DEFAULT)]
    for k, net in enumerate(nets):
        def change(writer, net=net):
            if net is scaled:
                writer.add_tensor("rope_freqs.weight", factors.numpy())
        assert same(converted(gguf_file(tmp_path / f"{k}.gguf", net, change=change)), net)
    net = network(**DEFAULT)
    for p in net.parameters():
        p.data = p.data.half().float()      # 16 bits stay 16 bits
    out = converted(gguf_file(tmp_path / "half.gguf", net, "F16"))
    assert same(out, net)
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.float16


def llama_cpp(path, texts):
    """Ids of plain texts by llama.cpp."""
    library = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: GGUF's ids are "
                                  "not compared with llama.cpp's")
    options, found = library.CommonParams(), []
    options.model.path, options.n_ctx, options.n_parallel = str(path), 64, 1
    options.warmup, options.verbosity = False, -1
    server = library.Server(options)        # for this machine only
    for text in texts:
        question = json.dumps(dict(content=text, add_special=True)).encode()
        with urllib.request.urlopen(f"{server.listening_address}/tokenize", question) as answer:
            found.append(json.load(answer)["tokens"])
    return found


def test_llama_cpp(tmp_path):
    """The ids of all pre-tokenizers, and of pieces of sentencepiece, are llama.cpp's."""
    net, tok = network(**DEFAULT), byte_level()
    paths = [gguf_file(tmp_path / f"{pre}.gguf", net, tok=tok, pre=pre) for pre in convert.CUTS]
    tok = learned(tmp_path, user_defined_symbols=["[user]"])
    net = network(vocab_size=380, **DEFAULT)
    paths.append(gguf_file(tmp_path / "pieces.gguf", net, tok=tok, pre="default"))
    for path in paths:
        chat = Chat(converted(path))
        texts = convert.texts_for(convert.read_tokenizer(path)[0])
        texts += ["a[user]b", "</s>x", " a  b", *HARD, CHATML]
        assert list(map(chat.plain, texts)) == llama_cpp(path, texts)


def test_a_gguf_file_that_does_not_say_how_text_is_cut(tmp_path):
    """It is asked for, not guessed; what is named has to have the file's pieces."""
    for pre in (None, "default", "unheard-of"):
        path = gguf_file(tmp_path / "net.gguf", network(**DEFAULT), pre=pre)
        refused(path, "--tokenizer")
    named = folder(tmp_path / "named", network())
    assert Chat(converted(path, tokenizer=str(named))).ids("\n\n6?") == Chat(named).ids("\n\n6?")
    shutil.rmtree(tmp_path / "net.gguf.out")
    other = (named / "tokenizer.json").read_text().replace('"!"', '"another"')
    (named / "tokenizer.json").write_text(other)
    refused(path, "another", tokenizer=str(named))


def test_what_ends_an_answer(tmp_path):
    """A file whose eos is not how its template ends a turn: both do, and so for other libraries."""
    path = gguf_file(tmp_path / "net.gguf", network(**DEFAULT), eos_token_id=0, eot_token_id=5)
    chat = Chat(converted(path))
    assert (chat.stop, chat.eos_id) == ({0, 2, 5}, 2)
    out = tmp_path / "net.gguf.out"
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [0, 2, 5]
    library = transformers.AutoTokenizer.from_pretrained(out)
    assert (library.bos_token, library.eos_token) == ("<|im_start|>", "<|endoftext|>")


def test_gguf_files_that_are_refused(tmp_path):
    numbers = np.arange(1, 9, dtype=np.float32)
    cases = {"expert_count": lambda w: w.add_uint32("llama.expert_count", 8),
             "rope.scaling.type": lambda w: w.add_string("llama.rope.scaling.type", "yarn"),
             "sliding_window": lambda w: w.add_uint32("llama.attention.sliding_window", 64),
             "one part of 2": lambda w: w.add_uint16("split.count", 2),
             "Llama 3": lambda w: w.add_tensor("rope_freqs.weight", numbers),
             "tensors": lambda w: w.add_tensor("blk.0.sinks.weight", numbers)}
    for what, change in cases.items():
        path = gguf_file(tmp_path / "net.gguf", network(**DEFAULT), change=change)
        refused(path, what)
    path.write_bytes(path.read_bytes()[:2000])
    refused(path, "net.gguf: cannot be read")


# ---- adapters

def adapter(path, base, net, **special):
    """A LoRA adapter of random weights on a base."""
    settings = dict(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") | special
    lora = peft.get_peft_model(net, peft.LoraConfig(**settings)).eval()
    for name, p in lora.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data.normal_(0, 0.1)
    lora.peft_config["default"].base_model_name_or_path = str(base)
    lora.save_pretrained(path)
    return lora


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters(tmp_path):
    """Merged in fp32 into a base in bf16, with its tokenizer; or with rows of new tokens."""
    base = folder(tmp_path / "base", network(tie_word_embeddings=True).bfloat16())
    nets = [transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32) for _ in "ab"]
    right = adapter(tmp_path / "in", base, nets[0], use_dora=True)
    assert same(converted(tmp_path / "in"), right)
    assert Chat(tmp_path / "in.out").prompt("x") == Chat(base).prompt("x")
    nets[1].resize_token_embeddings(408)
    right = adapter(tmp_path / "more", base, nets[1], modules_to_save=["embed_tokens", "lm_head"])
    shutil.copy(base / "tokenizer.json", tmp_path / "more")
    settings = dict(eos_token="<|im_end|>", extra_special_tokens=["<new>"], chat_template=CHATML)
    write(tmp_path / "more/tokenizer_config.json", settings)
    assert same(converted(tmp_path / "more"), right)
    assert Chat(tmp_path / "more.out").ids("<new>") == [400]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_refused(tmp_path):
    base = folder(tmp_path / "base", network())
    adapter(tmp_path / "in", tmp_path / "elsewhere", network())
    refused(tmp_path / "in", "base_model_name_or_path.*elsewhere")
    config = json.loads((tmp_path / "in/adapter_config.json").read_text())
    other = dict(base_model_name_or_path=str(base), target_modules=["k_proj"])
    write(tmp_path / "in/adapter_config.json", config | other)
    refused(tmp_path / "in", "give an adapter of this base")
    prompt = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    net = peft.get_peft_model(network(), prompt)
    net.peft_config["default"].base_model_name_or_path = str(base)
    net.save_pretrained(tmp_path / "prompt")
    refused(tmp_path / "prompt", "a learned prompt")


# ---- lab.smollm2

def test_smollm2_from_the_hub_or_the_wheel(tmp_path, monkeypatch, capsys):
    """The hub first, the wheel's file if it is not reached; a folder that is there stays."""
    hub, reached = folder(tmp_path / "hub", network()), [True]
    wheel = gguf_file(tmp_path / "net.gguf", network(**DEFAULT))

    def locate(name):
        if name == smollm2.NAME and not reached:
            raise InputError("the hub is not reached")
        return hub if name == smollm2.NAME else name

    monkeypatch.setattr(convert, "locate", locate)
    monkeypatch.setattr(smollm2, "gguf_in_wheel", lambda place: wheel)
    for by_wheel in (False, True):
        smollm2.fetch(tmp_path / "first", by_wheel)
        assert same(tmp_path / "first", network())
    reached.clear()
    smollm2.fetch(tmp_path / "second")
    assert same(tmp_path / "second", network(**DEFAULT)) and not same(hub, network(**DEFAULT))
    assert "the hub is not reached" in capsys.readouterr().err
