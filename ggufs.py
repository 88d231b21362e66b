"""
A GGUF file, llama.cpp's form of a model, as a checkpoint: what config.json, the tokenizer's files and
the files of weights would hold, out of the one file.

    header    named fields (numbers, texts, lists), then name, shape, type and place of every tensor
    weights   as they are, or in blocks of a few bits a number, which the `gguf` package multiplies out

llama.cpp's converter turns Llama's query and key rows round, and writes Llama 3's scaling of rotary
frequencies as a tensor; both are undone here. Ids follow `tokenizer.ggml.pre`, as llama.cpp's do; the
transformers library takes GPT-2's cut for every Llama.
"""
import functools
import importlib.util
import math
import mmap
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import spm
from files import InputError, check_fields

SUFFIX = ".gguf"
VERSIONS = (2, 3)                # of the format; 1 was in use for some weeks
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9                # the other types of a field
ALIGNMENT = 32                   # of tensors in the file, where no field says otherwise
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}    # types of numbers as they are
CONVERTED = ("llama",)           # architectures whose query and key rows the converter turns round
FAMILIES = ("llama", "qwen2", "qwen3")

TENSORS = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# types and ranges of the fields behind the architecture's name
SIZE, MAYBE = ((int,), 1, 1 << 20), ((int, None), 1, 1 << 20)
FIELDS = {
    "block_count": ((int,), 1, 1 << 12), "embedding_length": SIZE, "feed_forward_length": SIZE,
    "context_length": ((int, None), 1, 1 << 40), "attention.sliding_window": ((int, None), 0, 1 << 40),
    "attention.head_count": SIZE, "attention.head_count_kv": MAYBE,
    "attention.key_length": MAYBE, "attention.value_length": MAYBE, "rope.dimension_count": MAYBE,
    "attention.layer_norm_rms_epsilon": ((float,), 0, 1), "rope.freq_base": ((float, None), 1, 1e30),
    "rope.scaling.type": ((str, None), None, None),
}
ROPE_FACTORS = "rope_freqs.weight"   # by which rotary frequencies are divided, one a pair of channels
# fields, behind the architecture's name, with which a model computes something else than its family does
UNLIKE = ("expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.scale",
          "attention.clamp_kqv", "rope.scale_linear", "tensor_data_layout")

# how text is cut before byte-pair encoding, by tokenizer.ggml.pre; None: as GPT-2 does
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
         r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CUTS = {
    "gpt-2": None, "smollm": None,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), WORDS.format(digits="{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), WORDS.format(digits="")),
}
LLAMA3 = ("llama3", "llama-v3", "llama-bpe")


def is_gguf(path):
    """Is it a file of this form, by its name?"""
    return Path(path).suffix == SUFFIX and Path(path).is_file()


# ---- the file

class Cursor:
    """A place in the header's bytes; ValueError or struct.error where they end too early."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def left(self, count, size):
        """Raises ValueError where fewer than count × size bytes are left."""
        if count * size > len(self.data) - self.at:
            raise ValueError("cut short")

    def take(self, form):
        """One number."""
        found, = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def text(self):
        """A string: its length in eight bytes, then UTF-8."""
        size = self.take("Q")
        self.left(size, 1)
        self.at += size
        return self.data[self.at - size:self.at].decode("utf-8")

    def value(self, kind):
        """A field's value: number, bool, text, or a list of those."""
        if kind == TEXT:
            return self.text()
        if kind in SCALARS:
            return self.take(SCALARS[kind])
        if kind != LIST:
            raise ValueError(f"type {kind}")
        kind, count = self.take("I"), self.take("Q")
        if kind == TEXT:
            self.left(count, 8)
            return [self.text() for _ in range(count)]
        form = SCALARS.get(kind)
        if form is None:
            raise ValueError(f"a list of type {kind}")
        self.left(count, struct.calcsize(f"<{form}"))
        found = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{form}")
        return list(found)


class Gguf:
    """
    A GGUF file, its header read.

    fields   {name: value}
    places   {tensor: (shape, type's number, first byte)}; a shape's last dimension is the one whose
             numbers stand beside each other, as in torch

    Raises InputError where the file is none, is damaged, or is one part of several.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.fields, self.places = {}, {}
        try:
            with open(path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.read_header()
        except (ValueError, struct.error, OSError, OverflowError) as error:
            raise InputError(f"{path}: not a readable GGUF file ({error}); download it again") from None
        if self.fields.get("split.count", 0) not in (0, 1):
            raise InputError(f"{path}: one part of {self.fields['split.count']}; join them with "
                             "llama-gguf-split --merge and give the one file")
        if self.fields.get("general.type", "model") != "model":
            raise InputError(f"{path}: general.type is {self.fields['general.type']!r}, not a model; "
                             "give the file of a model")
        self.architecture = self.fields.get("general.architecture")
        if self.architecture not in FAMILIES:
            raise InputError(f"{path}: general.architecture = {str(self.architecture)[:60]!r} is not one of "
                             f"{', '.join(FAMILIES)}, which are what runs here; give another model")

    def read_header(self):
        """Fill `fields` and `places`; weights begin at the next aligned byte. ValueError: damaged."""
        cursor = Cursor(self.data)
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        cursor.at = 4
        version = cursor.take("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} of the format")
        tensors, fields = cursor.take("Q"), cursor.take("Q")
        for _ in range(fields):
            name = cursor.text()
            self.fields[name] = cursor.value(cursor.take("I"))
        found = []
        for _ in range(tensors):
            name, dimensions = cursor.text(), cursor.take("I")
            cursor.left(dimensions, 8)
            shape = tuple(cursor.take("Q") for _ in range(dimensions))[::-1]
            found.append((name, shape, cursor.take("I"), cursor.take("Q")))
        align = self.fields.get("general.alignment", ALIGNMENT)
        if type(align) is not int or align < 1:
            raise ValueError(f"general.alignment = {align!r}")
        start = -(-cursor.at // align) * align
        for name, shape, kind, offset in found:
            if name in self.places:
                raise ValueError(f"two tensors are called {name}")
            self.places[name] = shape, kind, start + offset

    def field(self, name, default=None):
        """A field of the architecture's own, "block_count" for instance."""
        return self.fields.get(f"{self.architecture}.{name}", default)

    def special(self, name):
        """The id in tokenizer.ggml.NAME_token_id, or None."""
        return self.fields.get(f"tokenizer.ggml.{name}_token_id")

    def listed(self, name, kinds, length=None):
        """The field of that name, a list of such values. Raises InputError where it is none."""
        found = self.fields.get(name)
        if not isinstance(found, list) or any(type(x) not in kinds for x in found):
            raise InputError(f"{self.path}: {name} is missing or no list of {kinds[0].__name__}; "
                             "download the file again")
        if length is not None and len(found) != length:
            raise InputError(f"{self.path}: {name} has {len(found)} entries for {length} tokens; download "
                             "the file again")
        return found

    def tensor(self, name):
        """
        A tensor in fp32, fp16 or bf16 as it is stored, multiplied out to fp32 where it is quantised.
        Raises InputError naming it where its type is not known here, or the file is cut short.
        """
        shape, number, start = self.places[name]
        dtype = PLAIN.get(number)
        if dtype is None:
            kind, block, size = self.quantised(name, number)
        else:
            block, size = 1, dtype.itemsize
        row = shape[-1] if shape else 1
        total = math.prod(shape) // block * size
        if not total or row % block:
            raise InputError(f"{self.path}: tensor {name} has shape {shape}, which is no whole number of "
                             f"blocks of {block}; download the file again")
        if start + total > len(self.data):
            raise InputError(f"{self.path}: cut short, it ends before tensor {name} does; download it again")
        raw = np.frombuffer(self.data, np.uint8, total, start).copy()
        if dtype is not None:
            return torch.from_numpy(raw).view(dtype).reshape(shape)
        blocks = raw.reshape(*shape[:-1], row // block * size)
        try:
            numbers = package(self.path).dequantize(blocks, kind)
        except NotImplementedError:
            raise InputError(f"{self.path}: tensor {name} is of type {kind.name}, which the gguf package "
                             "does not multiply out; use a file of another type") from None
        return torch.from_numpy(numbers).reshape(shape)

    def quantised(self, name, number):
        """(the gguf package's type of that number, numbers in a block, bytes of a block)."""
        gguf = package(self.path)
        try:
            kind = gguf.GGMLQuantizationType(number)
            return kind, *gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise InputError(f"{self.path}: tensor {name} has type {number}, which this version of the gguf "
                             "package does not know; upgrade it, or use another file") from None


def package(path):
    """The gguf package. Raises InputError where it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: its weights are quantised, and the gguf package, which multiplies them "
                         "out, is not installed; pip install gguf")
    import gguf
    return gguf


@functools.lru_cache(maxsize=2)
def read_once(path, changed, size):
    return Gguf(path)


def read(path):
    """The Gguf of a file; one that has not changed since is not read again."""
    facts = Path(path).stat()
    return read_once(str(path), facts.st_mtime_ns, facts.st_size)


# ---- the weights

def name_of(name):
    """A tensor's name in a checkpoint; its own where it has none there."""
    stem, _, ending = name.rpartition(".")
    if stem == "output":
        return f"lm_head.{ending}"
    if stem in TENSORS:
        return f"model.{TENSORS[stem]}.{ending}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block == "blk" and layer.isdecimal() and part in LAYER_TENSORS:
        return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{ending}"
    return name


def rows_back(t, heads):
    """
    Query or key rows (or biases) in a checkpoint's order. Rotary embedding turns pairs of channels:
    a checkpoint has the first ones of all pairs of a head, then the second ones; GGUF has them
    side by side.
    """
    return t.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(t.shape)


def tensors(path):
    """Yield (name, tensor), named and ordered as in a checkpoint."""
    found = read(path)
    settings = config(found)
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    for name in found.places:
        if name == ROPE_FACTORS:
            continue
        t, part = found.tensor(name), name.split(".")[-2:][0]
        if part in heads and found.architecture in CONVERTED:
            if len(t) % (2 * heads[part]):
                raise InputError(f"{found.path}: tensor {name} of shape {tuple(t.shape)} is not "
                                 f"{heads[part]} heads of pairs of channels; download the file again")
            t = rows_back(t, heads[part])
        yield name_of(name), t


# ---- the configuration

def config(found):
    """What config.json would say. Raises InputError for what no checkpoint's family computes."""
    own = {name: found.field(name) for name in FIELDS}
    check_fields(f"{found.path}: {found.architecture}", own, FIELDS)
    for name in UNLIKE:
        if found.field(name) not in (None, 0, 1):
            shown = repr(found.field(name))[:60]
            raise InputError(f"{found.path}: {found.architecture}.{name} = {shown} is not implemented; give "
                             "another model")
    names, heads, width = found.places, found.field("attention.head_count"), found.field("embedding_length")
    head_dim = found.field("attention.key_length", width // heads)
    context, window = found.field("context_length"), found.field("attention.sliding_window")
    if window and context and window < context:
        raise InputError(f"{found.path}: {found.architecture}.attention.sliding_window = {window!r} is in "
                         "use, and only full attention is implemented; give another model")
    if found.field("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{found.path}: {found.architecture}.attention.value_length is not key_length, "
                         "which is not implemented; give another model")
    settings = {
        "model_type": found.architecture,
        "vocab_size": names["token_embd.weight"][0][0] if "token_embd.weight" in names else None,
        "hidden_size": width,
        "intermediate_size": found.field("feed_forward_length"),
        "num_hidden_layers": found.field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": found.field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": found.field("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope(found, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "max_position_embeddings": context,
        "dtype": stored(found),
        "architectures": [f"{found.architecture.capitalize()}ForCausalLM"],
    }
    for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if found.special(field) is not None:
            settings[f"{name}_token_id"] = found.special(field)
    return settings


def stored(found):
    """The dtype of the projections' numbers, as config.json names it."""
    _, kind, _ = found.places.get("blk.0.attn_q.weight", (None, 0, None))
    return str(PLAIN.get(kind, torch.float32)).removeprefix("torch.")


def rope(found, head_dim):
    """rope_parameters of config.json."""
    theta = found.field("rope.freq_base", 10000.0)
    kind = found.field("rope.scaling.type", "none")
    parameters = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    turned = found.field("rope.dimension_count", head_dim)
    if turned != head_dim:
        parameters["partial_rotary_factor"] = turned / head_dim
    if ROPE_FACTORS in found.places:
        parameters |= llama3_scaling(found, theta, head_dim)
    return parameters


def llama3_scaling(found, theta, head_dim):
    """
    Llama 3's scaling of rotary frequencies θ_i out of the factors f_i that they are divided by.

    With F = max f_i, 1/f_i = s_i + (1 − s_i)/F, and s_i grows evenly with the turns within the
    original context, from 0 at low_freq_factor to 1 at high_freq_factor. The common scale of these
    three is free: low_freq_factor is 1. Raises InputError where the factors are anything else.
    """
    factors = found.tensor(ROPE_FACTORS).double()
    if len(factors) * 2 != head_dim or not bool((factors >= 1).all()):
        raise not_llama3(found)
    if bool((factors == 1).all()):
        return {}
    largest = factors.max()
    share = (1 / factors - 1 / largest) / (1 - 1 / largest)                          # s_i (h/2)
    frequency = float(theta) ** (-torch.arange(0, head_dim, 2).double() / head_dim)  # θ_i (h/2)
    between = (share > 1e-6) & (share < 1 - 1e-6)
    if between.sum() < 2:
        raise not_llama3(found)
    x, y = frequency[between], share[between]
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    offset = y.mean() - slope * x.mean()
    if not (slope > 0 and offset < 0):
        raise not_llama3(found)
    high = round(float(1 - 1 / offset), 3)
    context = round(float(slope * 2 * math.pi * (high - 1)))
    # the factors that these four make have to be those in the file
    turns = context * frequency / (2 * math.pi)
    share = ((turns - 1) / (high - 1)).clamp(0, 1)
    again = 1 / (share + (1 - share) / largest)
    if ((again - factors).abs() / factors).max() > 1e-5:
        raise not_llama3(found)
    return {"rope_type": "llama3", "factor": float(largest), "low_freq_factor": 1.0,
            "high_freq_factor": high, "original_max_position_embeddings": context}


def not_llama3(found):
    return InputError(f"{found.path}: tensor {ROPE_FACTORS} scales rotary frequencies in another way than "
                      "Llama 3's, which is not implemented; give another model")


def described(path, name):
    """What the JSON file `name` of a checkpoint would hold; {} where it would not be there."""
    found = read(path)
    if name == "config.json":
        return config(found)
    if name == "tokenizer_config.json":
        return tokenizer_config(found)
    if name == "generation_config.json":
        ends = {found.special(end) for end in ("eos", "eot", "eom")} - {None}
        return {"eos_token_id": sorted(ends)}
    return {}


# ---- the tokenizer

def tokenizer_config(found):
    """Special tokens and the chat template."""
    pieces = found.listed("tokenizer.ggml.tokens", (str,))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        i = found.special(field)
        if i is None:
            continue
        if type(i) is not int or not 0 <= i < len(pieces):
            raise InputError(f"{found.path}: tokenizer.ggml.{field}_token_id = {i!r} is none of the "
                             f"{len(pieces)} tokens; download the file again")
        settings[f"{name}_token"] = pieces[i]
    by_default = found.fields.get("tokenizer.ggml.model") == "llama" or pre(found) in LLAMA3
    settings["add_bos_token"] = bool(found.fields.get("tokenizer.ggml.add_bos_token", by_default))
    template = found.fields.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    return settings


def pre(found):
    """How text is cut before byte-pair encoding; files of early 2024 do not say."""
    said = found.fields.get("tokenizer.ggml.pre", "default")
    if said == "default":
        return "qwen2" if found.architecture.startswith("qwen") else "gpt-2"
    return said


def tokenizer(path):
    """The file's tokenizer. Raises InputError where it is of a kind that is not known here."""
    found = read(path)
    pieces = found.listed("tokenizer.ggml.tokens", (str,))
    kinds = [spm.NORMAL] * len(pieces)
    if "tokenizer.ggml.token_type" in found.fields:
        kinds = found.listed("tokenizer.ggml.token_type", (int,), len(pieces))
    model = found.fields.get("tokenizer.ggml.model")
    if model == "llama":
        scores = found.listed("tokenizer.ggml.scores", (float,), len(pieces))
        space = bool(found.fields.get("tokenizer.ggml.add_space_prefix", True))
        return spm.build(list(zip(pieces, scores, kinds)), space)
    if model != "gpt2":
        raise InputError(f"{path}: tokenizer.ggml.model = {str(model)[:60]!r} is not one of gpt2, llama; use "
                         "the model's checkpoint with its tokenizer.json")
    return byte_level(found, pieces, kinds)


def byte_level(found, pieces, kinds):
    """Byte-pair encoding of bytes, GPT-2's kind."""
    if pre(found) not in CUTS:
        raise InputError(f"{found.path}: tokenizer.ggml.pre = {str(pre(found))[:60]!r} is not one of "
                         f"{', '.join(CUTS)}; use the model's checkpoint with its tokenizer.json")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for line in found.listed("tokenizer.ggml.merges", (str,)):
        a, _, b = line.partition(" ")
        if not {a, b, a + b} <= vocabulary.keys():
            raise InputError(f"{found.path}: tokenizer.ggml.merges has {line[:60]!r}, whose pieces are no "
                             "tokens; download the file again")
        merges.append((a, b))
    tok = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre(found) in LLAMA3))
    cut = CUTS[pre(found)]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)
    if cut is not None:
        first = [pre_tokenizers.Split(Regex(cut), "isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if pre(found) == "smollm" else []
    tok.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_of])
    if pre(found) == "qwen2":
        tok.normalizer = normalizers.NFC()
    tok.decoder = decoders.ByteLevel()
    spm.add_special(tok, pieces, kinds)
    return tok
