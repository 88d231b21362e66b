"""
ggufs.py against the transformers library, which reads the same files, and against the checkpoints
that they are made of.

Files are written by the gguf package, with its own table of names and llama.cpp's own permutation,
spelled out here.
"""
import functools
import json
import math
import random
import shutil
import struct

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import evaluate
import export
import ggufs
import lcdd
import lora
import model
import weights
from chat import Chat
from files import InputError
from helpers import TINY, by_the_rule, jsonl, pieces
from lab import smollm2
from run import locate

gguf = pytest.importorskip(
    "gguf", reason="gguf is not installed: nothing writes the files that ggufs.py reads"
)
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4    # logits, fp32, against transformers
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = dict(
    vocab_size=400, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=0.02,
    bos_token_id=1, eos_token_id=2, pad_token_id=0
)


def default(theta):
    return dict(rope_type="default", rope_theta=theta)


LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192
)
FAMILIES = {  # name → (architecture in GGUF, transformers' class, what is special)
    "llama": ("llama", "Llama", dict(rope_parameters=default(5e5))),
    "llama, tied": (
        "llama", "Llama",
        dict(num_attention_heads=8, tie_word_embeddings=True, rope_parameters=default(1e5))
    ),
    "mistral": (
        "llama", "Mistral", dict(head_dim=32, sliding_window=None, rope_parameters=default(1e6))
    ),
    "qwen2": ("qwen2", "Qwen2", dict(tie_word_embeddings=True, rope_parameters=default(1e6))),
    # 128: transformers asks no file
    "qwen3": (
        "qwen3", "Qwen3", dict(head_dim=128, tie_word_embeddings=True, rope_parameters=default(1e6))
    ),
}
# what transformers' reader leaves out: only the checkpoint itself tells whether these are right
OURS = {
    "llama, biases": (
        "llama", "Llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=default(1e4))
    ),
    "qwen3, heads of 64": ("qwen3", "Qwen3", dict(head_dim=64, rope_parameters=default(1e6))),
    "llama3 scaling": ("llama", "Llama", dict(rope_parameters=LLAMA3)),
    "llama3.2 scaling": (
        "llama", "Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3 | dict(factor=32.0))
    ),
}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# where a block of 256 has its fp16 scales
SCALES = {"Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}


# ---- writing the files

@functools.cache
def learned():
    """
    Byte-level BPE of 400 tokens, learned on Shakespeare and some numbers across all boundaries, as
    JSON.
    """
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lines = [
        json.loads(line)["response"]
        for line in (TINY / "shakespeare.jsonl").read_text().splitlines()[:300]
    ]
    lines += ["\n\n12", " 12", "they'RE", "x.\n\n"] * 300
    tok.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return tok.to_str()


def trained_tokenizer(cut="gpt-2"):
    """
    One vocabulary, the text cut before as the published tokenizer.json's of these models cut it.
    """
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.get(cut)
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + (digits or "")
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    settings = json.loads(learned())
    # a word that is a token is one, though no merge makes it
    settings["model"]["ignore_merges"] = cut == "llama-bpe"
    settings["model"]["merges"] = [
        m for m in settings["model"]["merges"] if cut != "llama-bpe" or "".join(m) != "the"
    ]
    tok = Tokenizer.from_str(json.dumps(settings))
    first = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}.get(
        cut, [pre_tokenizers.Split(Regex(words), "isolated")]
    )
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits is None)]
    )
    tok.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        tok.normalizer = normalizers.NFC()
    return tok


def add_tokenizer(writer, tok, cut="gpt-2"):
    found = json.loads(tok.to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in found["merges"]])
    for name, i in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_chat_template(TEMPLATE)


def make_checkpoint(special, kind):
    torch.manual_seed(1)
    net = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SIZE | special)
    ).eval()
    for name, p in net.named_parameters():
        p.data.uniform_(0.5, 1.5) if "norm" in name else p.data.normal_(
            0, 0.3 if name.endswith("bias") else 0.08
        )
    return net


def permuted(w, heads):
    """As llama.cpp's convert_hf_to_gguf.py has it."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def quantised(w, kind):
    """
    (bytes or numbers, type): what the package quantises itself, and random blocks where it only
    reads.
    """
    kind = gguf.GGMLQuantizationType[kind]
    if w.ndim == 1:
        return w, gguf.GGMLQuantizationType.F32
    if kind.name not in SCALES:
        return gguf.quantize(w, kind), kind
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(w.size).integers(0, 256, (w.size // block, size), dtype=np.uint8)
    low, high = SCALES[kind.name]
    blocks[:, low:high] = np.full((len(blocks), (high - low) // 2), 4e-5, np.float16).view(np.uint8)
    return blocks.reshape(w.shape[0], -1), kind


def write(path, family="llama", kind="F32", tok=None, cut="gpt-2", change=None):
    """
    A GGUF file of a random checkpoint: the transformers model. change(writer) adds or replaces
    fields.
    """
    architecture, name, special = (FAMILIES | OURS)[family]
    net, writer = make_checkpoint(special, name), gguf.GGUFWriter(path, architecture)
    c = net.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if head_dim != c.hidden_size // c.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    add_tokenizer(writer, tok or trained_tokenizer(cut), cut)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), c.num_hidden_layers
    )
    for key, t in net.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        w = t.numpy()
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            w = permuted(w, c.num_attention_heads if "q_proj" in key else c.num_key_value_heads)
        numbers, stored = quantised(np.ascontiguousarray(w), kind)
        stem, _, ending = key.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", numbers, raw_dtype=stored)
    if c.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(c.rope_parameters, head_dim))
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return net


def rope_factors(rope, head_dim):
    """As llama.cpp's converter has it, frequency by frequency."""
    found, context = [], rope["original_max_position_embeddings"]
    for i in range(0, head_dim, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if length < context / rope["high_freq_factor"]:
            found.append(1)
        elif length > context / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (context / length - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)


def theirs(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


IDS = torch.tensor([[5, 17, 80, 3, 44, 9, 12, 399], [33, 8, 61, 61, 20, 7, 90, 250]])


def alike(logits, right):
    assert (logits - right).abs().max() < TOLERANCE
    assert right.abs().max() > 1


# ---- the weights

@torch.no_grad()
@pytest.mark.parametrize(
    "family, kind",
    [
        *((family, "F32") for family in FAMILIES),
        *(("llama", kind) for kind in KINDS[1:]),
        ("qwen2", "Q8_0"),
        ("qwen3", "Q4_K"),
    ],
)
def test_logits_are_what_transformers_reads(tmp_path, family, kind):
    path = tmp_path / "net.gguf"
    made = write(path, family, kind)
    net, right = model.load(path), theirs(path)(IDS).logits
    alike(net(IDS), right)
    assert net.stop == {2}
    if kind == "F32":
        alike(net(IDS), made(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", OURS)
def test_logits_are_the_checkpoints(tmp_path, family):
    """
    What a file says and transformers does not read: biases, a head's size, Llama 3's scaling of
    frequencies.
    """
    made = write(tmp_path / "net.gguf", family)
    long = torch.arange(120)[None] * 3 % 400
    alike(model.load(tmp_path / "net.gguf")(long), made(long).logits)


@pytest.mark.parametrize("kind", ("Q8_0", "Q4_K", "Q5_K", "Q6_K"))
def test_blocks_are_multiplied_out_as_transformers_own_code_does(tmp_path, kind):
    """transformers has a second reader, in torch, which does without the gguf package."""
    dequant = pytest.importorskip(
        "transformers.integrations.gguf.dequant",
        reason="this transformers multiplies no blocks out itself",
    )
    write(tmp_path / "net.gguf", "qwen2", kind)
    found = dict(weights.tensors(tmp_path / "net.gguf"))
    for t in gguf.GGUFReader(tmp_path / "net.gguf").tensors:
        if t.tensor_type.name == kind:
            right = dequant.dequantize(torch.tensor(t.data).flatten(), int(t.tensor_type)).view(
                *t.shape[::-1].tolist()
            )
            assert torch.allclose(found[ggufs.name_of(t.name)], right, rtol=1e-6, atol=0)


def test_numbers_keep_their_dtype(tmp_path):
    for kind, dtype in (
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("Q4_1", torch.float32),
    ):
        write(tmp_path / f"{kind}.gguf", kind=kind)
        t = dict(weights.tensors(tmp_path / f"{kind}.gguf"))["model.layers.1.mlp.up_proj.weight"]
        assert t.dtype == dtype
        assert weights.described(tmp_path / f"{kind}.gguf", "config.json")["dtype"] == str(
            dtype
        ).removeprefix("torch.")


# ---- the tokenizer

TEXTS = [
    "", "a", " What is it?", "the  the\n\n\nthe", "I'll, they'RE 1234 and\n\n123\r\n 12.5",
    "x.\n\ny", "naïve é 日本 🙂\u200b", "x<|im_end|>\ny", "   \t 99 ", "hath thou 2024", "the word"
]


@pytest.mark.parametrize("cut", ("gpt-2", "smollm", "llama-bpe", "qwen2"))
def test_ids_are_the_tokenizers(tmp_path, cut):
    """Against the tokenizer that the file was made of."""
    made = trained_tokenizer(cut)
    write(tmp_path / "net.gguf", "llama", tok=made, cut=cut)
    tok = ggufs.tokenizer(tmp_path / "net.gguf")
    texts = TEXTS + [
        json.loads(line)["prompt"]
        for line in (TINY / "shakespeare.jsonl").read_text().splitlines()[:300]
    ]
    for text in texts:
        ids = made.encode(text, add_special_tokens=False).ids
        assert tok.encode(text, add_special_tokens=False).ids == ids
        assert tok.decode(ids) == made.decode(ids)
        assert tok.decode(ids, skip_special_tokens=False) == made.decode(
            ids, skip_special_tokens=False
        )
    others = [
        trained_tokenizer(other)
        for other in ("gpt-2", "smollm", "llama-bpe", "qwen2")
        if other != cut
    ]
    assert all(any(tok.encode(t).ids != other.encode(t).ids for t in texts) for other in others)


@pytest.mark.parametrize(
    "family, cut", (("llama", "gpt-2"), ("qwen2", "qwen2"), ("qwen3", "qwen2"))
)
def test_ids_and_prompts_are_what_transformers_reads(tmp_path, family, cut):
    """Where it cuts as the file says; for Llama it always cuts as GPT-2 does."""
    path = tmp_path / "net.gguf"
    write(path, family, cut=cut)
    chat, right = (
        Chat(path), transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    )
    for text in TEXTS:
        assert chat.ids(text) == right(text, add_special_tokens=False).input_ids
        if text:
            turn = [{"role": "user", "content": text}]
            assert chat.prompt(text) == list(
                right.apply_chat_template(
                    turn, add_generation_prompt=True, chat_template=TEMPLATE
                ).input_ids
            )
    assert (chat.eos_id, chat.pad_id, chat.stop, chat.begin, chat.vocab_size) == (
        2,
        0,
        {2},
        [],
        400,
    )


def as_sentencepiece(space=True):
    def change(writer):
        found = pieces()
        for name in ("tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.chat_template"):
            writer.kv_data[0].pop(name)
        for name, value in (
            ("model", "llama"),
            ("tokens", [p for p, _, _ in found]),
            ("scores", [s for _, s, _ in found]),
            ("token_type", [k for _, _, k in found]),
        ):
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}", None)
            writer.add_string(
                f"tokenizer.ggml.{name}", value
            ) if name == "model" else writer.add_array(f"tokenizer.ggml.{name}", value)
        if not space:
            writer.add_add_space_prefix(False)
    return change


def test_sentencepiece(tmp_path):
    """
    Llama 2's kind: scores in place of merges, bytes for the rest, a space before the text and <s>
    before what is no chat.
    """
    write(tmp_path / "net.gguf", change=as_sentencepiece())
    chat, right = (
        Chat(tmp_path / "net.gguf"),
        transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="net.gguf"),
    )
    for text in (
        "low", "the low lower lowest", "  the   ", "hé llo", "日本 hello", "hellohellohello",
        "owl wol lowel" * 5
    ):
        ids = chat.ids(text)
        assert ids == by_the_rule(text, pieces()) == right(text, add_special_tokens=False).input_ids
        assert chat.decode(ids) == text
        assert chat.plain(text) == [1, *ids]
    # Vicuna's template: there is none in the file
    assert chat.prompt("hello")[0] == 1
    write(tmp_path / "bare.gguf", change=as_sentencepiece(space=False))
    bare = Chat(tmp_path / "bare.gguf")
    assert bare.tok.encode("low the").tokens == ["low", "▁the"]
    assert bare.decode(bare.ids("low the")) == "low the"


def test_what_ends_an_answer(tmp_path):
    """
    eos, and where there are such, the ends of a turn and of a message; the file's fingerprint is
    the tokenizer's.
    """
    write(tmp_path / "net.gguf", change=lambda w: w.add_eot_token_id(7))
    write(tmp_path / "other.gguf", "qwen3", kind="Q8_0", change=lambda w: w.add_eot_token_id(7))
    assert Chat(tmp_path / "net.gguf").stop == {2, 7}
    assert model.load(tmp_path / "net.gguf").stop == {2, 7}
    write(tmp_path / "same.gguf", kind="Q8_0")
    assert Chat(tmp_path / "net.gguf").fingerprint() == Chat(tmp_path / "same.gguf").fingerprint()


def test_as_the_folder_of_a_checkpoint(tmp_path):
    """lab/smollm2.py's: in bf16, with the answer's end that the file names."""
    write(tmp_path / "net.gguf", kind="Q8_0")
    folder = tmp_path / "chat"
    folder.mkdir()
    smollm2.convert(tmp_path / "net.gguf", folder)
    assert Chat(folder).stop == {2}
    ours = model.load(folder, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        right = model.load(tmp_path / "net.gguf", dtype=torch.bfloat16)(IDS)
        assert torch.equal(ours(IDS), right)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again.eos_token == "<|im_end|>"


# ---- everything else works

def test_train_evaluate_export(tmp_path, capsys, undrawn):
    """
    lcdd.py, evaluate.py and export.py on a GGUF base; transformers and peft read what they write.
    """
    peft = pytest.importorskip(
        "peft", reason="peft is not installed: nothing reads an adapter for a GGUF base"
    )
    path, run, to = tmp_path / "base.gguf", tmp_path / "run", tmp_path / "to"
    write(path, "llama", "Q8_0", change=lambda w: w.add_license("apache-2.0"))
    data = jsonl(
        tmp_path / "mine.jsonl", [{"prompt": f"say {i}", "response": "thou art"} for i in range(60)]
    )
    lcdd.main(
        [
            "--go-on", "--model", str(path), "--task", str(data), "--out", str(run), "--sft-steps",
            "4", "--steps", "4", "--settle", "1", "--warmup", "1", "--n-train", "20", "--n-test",
            "4", "--n-trigger", "8", "--n-validation", "8", "--device", "cpu", "--max-new-tokens",
            "4", "--dtype", "float32"
        ]
    )
    evaluate.main(["--run", str(run), "--device", "cpu"])
    assert "gates shut is the base bit for bit: yes" in capsys.readouterr().out
    export.main(["--run", str(run), "--to", str(to), "--as", "merged", "lora"])
    net = model.load(path)
    carrier = lora.read(to / "lora", net)
    with torch.no_grad():
        right = net(IDS, carrier=carrier)
        assert (right - net(IDS)).abs().max() > 10 * TOLERANCE
        merged = transformers.AutoModelForCausalLM.from_pretrained(
            to / "merged", dtype=torch.float32
        ).eval()
        alike(merged(IDS).logits, right)
        alike(model.load(to / "merged")(IDS), right)
        alike(peft.PeftModel.from_pretrained(theirs(path), to / "lora").eval()(IDS).logits, right)
    chat, again = Chat(path), transformers.AutoTokenizer.from_pretrained(to / "merged")
    assert [again(t, add_special_tokens=False).input_ids for t in TEXTS] == [
        chat.ids(t) for t in TEXTS
    ]
    assert (again.eos_token, again.bos_token, again.chat_template) == (
        "<|im_end|>", "<|im_start|>", TEMPLATE
    )
    assert Chat(to / "merged").prompt("hello") == chat.prompt("hello")
    card = (to / "lora" / "README.md").read_text()
    assert '.from_pretrained(".", gguf_file="base.gguf")' in card
    assert "license: apache-2.0" in card


# ---- bad input

def put(name, value):
    """change(): a text field has another value."""
    def change(writer):
        writer.kv_data[0].pop(name, None)
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[
            type(value)
        ]
        add(name, value)
    return change


def drop(name):
    return lambda writer: writer.kv_data[0].pop(name)


@pytest.mark.parametrize(
    "family, change, named",
    [
        (
            "llama", put("general.architecture", "gemma2"),
            "general.architecture = 'gemma2' is not one of llama, qwen2, qwen3"
        ),
        ("llama", put("general.type", "adapter"), "general.type is 'adapter'"),
        ("llama", put("split.count", 3), "one part of 3; join them"),
        ("llama", put("llama.expert_count", 8), "llama.expert_count = 8 is not implemented"),
        ("llama", put("llama.attention.sliding_window", 64), "sliding_window = 64 is in use"),
        ("llama", put("llama.rope.dimension_count", 32), "partial_rotary_factor"),
        (
            "llama", put("llama.rope.scaling.type", "yarn"),
            "rope_parameters .*rope type other than default and llama3"
        ),
        ("llama", put("llama.attention.value_length", 32), "value_length is not key_length"),
        (
            "llama", put("llama.block_count", 3),
            "tensor model.layers.2.input_layernorm.weight is missing"
        ),
        (
            "llama", put("llama.block_count", "two"),
            "llama: block_count = 'two' is of the wrong type"
        ),
        ("llama", put("llama.attention.head_count", 3), "partial_rotary_factor"),
        (
            "llama", drop("llama.attention.layer_norm_rms_epsilon"),
            "llama: the field 'attention.layer_norm_rms_epsilon' is missing"
        ),
        ("llama", drop("llama.embedding_length"), "llama: the field 'embedding_length' is missing"),
        (
            "llama", put("tokenizer.ggml.model", "bert"),
            "tokenizer.ggml.model = 'bert' is not one of gpt2, llama"
        ),
        (
            "llama", put("tokenizer.ggml.pre", "tekken"),
            "tokenizer.ggml.pre = 'tekken' is not one of gpt-2, smollm"
        ),
        ("llama", drop("tokenizer.ggml.merges"), "tokenizer.ggml.merges is missing"),
        (
            "llama", put("tokenizer.ggml.eos_token_id", 400),
            "tokenizer.ggml.eos_token_id = 400 is none of the 400 tokens"
        ),
        (
            "llama",
            lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((8, 4), np.float32)),
            "tensor blk.0.ffn_gate_inp.weight is not part of a llama model",
        ),
        (
            "llama",
            lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 32, dtype=np.float32)),
            "rope_freqs.weight scales rotary frequencies in another way",
        ),
        (
            "llama", lambda w: w.add_tensor("rope_freqs.weight", np.ones(31, np.float32)),
            "rope_freqs.weight scales rotary frequencies in another way"
        ),
    ],
)
def test_refusals(tmp_path, family, change, named):
    path = tmp_path / "net.gguf"
    write(path, family, change=change)
    with pytest.raises(InputError, match=f"net.gguf.*{named}|{named}"):
        model.load(path)
        Chat(path)


def test_factors_of_one_scale_nothing(tmp_path):
    write(
        tmp_path / "net.gguf",
        change=lambda w: w.add_tensor("rope_freqs.weight", np.ones(32, np.float32)),
    )
    assert model.configuration(tmp_path / "net.gguf").rope_llama3 is None


def test_without_the_package(tmp_path, monkeypatch):
    """Only quantised numbers need it."""
    write(tmp_path / "net.gguf", kind="Q8_0")
    write(tmp_path / "plain.gguf", "llama3 scaling", kind="BF16")
    monkeypatch.setattr(ggufs.importlib.util, "find_spec", lambda name: None)
    assert model.configuration(tmp_path / "net.gguf").num_hidden_layers == 2
    assert Chat(tmp_path / "net.gguf").eos_id == 2
    assert model.load(tmp_path / "plain.gguf").config.rope_llama3
    with pytest.raises(
        InputError,
        match="net.gguf: its weights are quantised, and the gguf package, which multiplies "
        "them out, is not installed; pip install gguf",
    ):
        model.load(tmp_path / "net.gguf")


def test_folders_and_names(tmp_path):
    write(tmp_path / "net.gguf")
    assert locate(str(tmp_path / "net.gguf")) == tmp_path / "net.gguf"
    with pytest.raises(InputError, match="no config.json in there; give the file net.gguf itself"):
        model.load(tmp_path)
    with pytest.raises(InputError, match="neither a folder, nor a .gguf file"):
        locate(str(tmp_path / "other.gguf"))
    shutil.copyfile(tmp_path / "net.gguf", tmp_path / "net.bin")
    with pytest.raises(InputError, match="neither a folder, nor a .gguf file"):
        locate(str(tmp_path / "net.bin"))


def test_a_changed_file_is_read_again(tmp_path):
    write(tmp_path / "net.gguf", "qwen2")
    assert model.configuration(tmp_path / "net.gguf").qkv_bias
    write(tmp_path / "net.gguf", "llama")
    assert not model.configuration(tmp_path / "net.gguf").qkv_bias


@pytest.mark.filterwarnings("ignore:invalid value")
def test_damage_is_an_input_error(tmp_path):
    """
    Cut at every kind of place, bytes of the header changed, lengths that ask for more than there
    is: one sentence, whatever it was.
    """
    path = tmp_path / "net.gguf"
    write(path, kind="Q8_0")
    whole, rng, told = path.read_bytes(), random.Random(0), 0
    header = whole.index(b"blk.1.ffn_down.weight") + 200
    damaged = [whole[:n] for n in (0, 3, 4, 20, 100, 5000, header, len(whole) - 100)]
    for _ in range(120):
        piece = bytearray(whole)
        at = rng.randrange(header)
        piece[at:at + 1] = bytes([rng.randrange(256)])
        damaged.append(bytes(piece))
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    # a width of 0
    damaged.append(whole[:at] + struct.pack("<Q", 0) + whole[at + 8:])
    for value in (2 ** 62, 2 ** 64 - 1, 10 ** 6):
        for name in (b"tokenizer.ggml.tokens", b"general.architecture", b"tokenizer.ggml.merges"):
            at = whole.index(name) + len(name) + (8 if name.startswith(b"tok") else 4)
            damaged.append(whole[:at] + struct.pack("<Q", value) + whole[at + 8:])
    for content in damaged:
        path.write_bytes(content)
        try:
            model.load(path)
            Chat(path)
        except InputError as error:
            told += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 600
    assert told > 60
