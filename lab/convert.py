"""
Whatever transformers or peft reads → a plain Hugging Face folder, which the root reads.

    python -m lab.convert SOURCE DIR                           a folder, a file, a name on the hub
    python -m lab.convert SOURCE DIR --tokenizer OWNER/NAME    with another model's tokenizer

folder    weights in safetensors or pytorch_model*.bin, with tokenizer.json or tokenizer.model
file      GGUF, llama.cpp's form of a model
adapter   of peft, merged in fp32 into the base that its adapter_config.json names

The libraries do the work. Ours are a GGUF file's pre-tokenizer and special tokens, where
transformers is no reference (it never reads tokenizer.ggml.pre, and confuses eos and bos), and the
spaces that sentencepiece puts in front of a text. DIR is written whole or not at all, after the
root's reading of it was compared with transformers' weights of SOURCE and sentencepiece's ids.
"""
from common import Failed, InputError, read_json, reading, run_command, write_json
import argparse
import functools
import gc
import importlib.util
import json
import random
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

LIBRARIES = ("transformers", "accelerate", "peft", "gguf", "sentencepiece", "protobuf")
if any(importlib.util.find_spec(name.replace("protobuf", "google")) is None for name in LIBRARIES):
    sys.exit(f"error: lab.convert needs more libraries: pip install {' '.join(LIBRARIES)}")

import gguf
import peft
import psutil
import torch
import transformers
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import load_state_dict
from transformers.tokenization_utils_base import generate_merges

import model
from data import EVERYDAY, Chat, note, optional_json

TOLERANCE = 1e-4                # of the largest logit, in fp32
PROMPTS, LONGEST = 12, 32       # whose logits are compared; tokens of one
LAYERS = 2                      # that are compared if a model does not fit in fp32
TEXTS = 200                     # mixtures of FRAGMENTS, whose ids are compared
SPARE = 0.8                     # of the free memory, which a model may take
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
AGAIN = "download it again"
NAME_ONE = "name a model that has its tokenizer: --tokenizer OWNER/NAME"

ARCHITECTURES = ("llama", "qwen2", "qwen3")                 # GGUF's names
EXACT = {"F16": torch.float16, "BF16": torch.bfloat16}      # GGUF's types that need no fp32
# fields, behind the architecture's name, with which a model computes something else
UNLIKE = ("expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.scale",
          "attention.clamp_kqv", "rope.scale_linear", "tensor_data_layout")
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6           # types of pieces
BPE = 2                                                     # among sentencepiece's models

# how text is cut before byte-pair encoding, by tokenizer.ggml.pre; None: as GPT-2 does
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
         r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
CUTS = {"gpt-2": None, "smollm": None,
        **dict.fromkeys(LLAMA3, WORDS.format(digits="{1,3}")),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), WORDS.format(digits=""))}

# what tokenizers are known to cut in different ways
FRAGMENTS = (
    "Hello| world|the| The| don't|IT'S|we'LL| 1| 1234567|3.14|٣٤|½|100%|\n|\n\n| \n|\r\n|\t|  |"
    "    x|\u00a0|\u200b|▁|naïve| é| straße|İ|ﬁ| 日本語|한국|ไทย|🙂| 👩‍👩‍👧|…|, |!?|.| (a)|x_y|</a>|"
    ' A.B|CamelCase| =>|http://a.b/c?d=e|#1|"quoted"|``|$x^2$| int i=0;'
).split("|")


# ---- what the source is

class Source(NamedTuple):
    """kind: folder, gguf or adapter. base: where an adapter's base lies, for others the path."""
    kind: str
    path: Path
    base: Path


def locate(name):
    """The folder or file of that name, of this machine or of the hub."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    with reading(name, "it is nothing here, and the hub did not give it; name a local folder"):
        skip = ["*/*", "consolidated*", "*.gguf"]
        found = Path(snapshot_download(str(name), ignore_patterns=[*skip, "*.bin"]))
        return found if weight_files(found) else Path(snapshot_download(name, ignore_patterns=skip))


def identify(name):
    """The Source of that name. Raises InputError if it is none of the three kinds."""
    path = locate(name)
    if path.is_file():
        return Source("gguf", path, path)
    if weight_files(path) and (path / "config.json").is_file():
        return Source("folder", path, path)
    if not (path / "adapter_config.json").is_file():
        raise InputError(f"{path}: no config.json and weights, and no adapter; give a GGUF itself")
    try:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return Source("adapter", path, locate(base or "(none)"))
    except InputError as error:
        raise InputError(f"{path}/adapter_config.json: base_model_name_or_path: {error}") from None


def weight_files(folder):
    """The files of a model's weights in a folder; safetensors if both forms are there."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


# ---- weights

def stored(source):
    """(the narrowest dtype that holds all weights as they are, how many numbers they are)."""
    if source.kind == "gguf":
        tensors = [t for t in gguf_file(source.path)[0].tensors if t.name != "rope_freqs.weight"]
        kinds = {EXACT.get(t.tensor_type.name, torch.float32) for t in tensors if len(t.shape) > 1}
        return functools.reduce(torch.promote_types, kinds), sum(int(t.n_elements) for t in tensors)
    kinds, count = [torch.float32] if source.kind == "adapter" else [], 0
    for file in weight_files(source.base):
        with reading(file, AGAIN):
            tensors = load_state_dict(file, map_location="meta")
        kinds += [t.dtype for name, t in tensors.items() if not name.endswith("inv_freq")]
        count += sum(t.numel() for t in tensors.values())
    return functools.reduce(torch.promote_types, kinds), count


def load(source, dtype):
    """transformers' model of a source, or peft's, with every weight found; on the CPU."""
    place, more = source.base, {}
    if source.kind == "gguf":
        place = source.path.parent
        more = dict(gguf_file=source.path.name, config=gguf_config(source.path),
                    quantization_config=transformers.GgufConfig(dequantize=True))
    with reading(source.base, AGAIN):
        net, info = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True, local_files_only=True, **more)
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise InputError(f"{source.base}: tensor {absent[0]} is missing or misshapen "
                         f"({len(absent)} in all); the checkpoint is incomplete")
    if info["unexpected_keys"]:
        note(f"{source.base}: transformers leaves out tensor {min(info['unexpected_keys'])}")
    if source.kind == "gguf" and stored(source)[1] != net.num_parameters():
        raise InputError(f"{source.path}: has other tensors than those of {net.config.model_type}")
    return with_adapter(net, source.path) if source.kind == "adapter" else net.eval()


def with_adapter(net, path):
    """A peft model of an adapter on its base."""
    with reading(path, "give an adapter of this base"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")      # peft goes on without
        if peft.PeftConfig.from_pretrained(path).is_prompt_learning:
            raise InputError(f"{path}: a learned prompt is no change of weights; it is not merged")
        for file in path.glob("adapter_model.*"):
            for name, t in load_state_dict(file, map_location="meta").items():
                if "embed_tokens" in name and "lora_" not in name:  # whole, with rows of new tokens
                    net.resize_token_embeddings(t.shape[0])
        return peft.PeftModel.from_pretrained(net, path).eval()


def write_weights(net, source, folder):
    """config.json, generation_config.json and safetensors of transformers' model of a source."""
    # transformers does not write all that it reads, such as a temperature without sampling
    net.generation_config = transformers.GenerationConfig()
    net.save_pretrained(folder, max_shard_size="5GB")
    config = read_json(folder / "config.json")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]     # where version 4 reads it
    if config["rope_parameters"]["rope_type"] != "default":
        config["rope_scaling"] = config["rope_parameters"]
    write_json(folder / "config.json", config)
    generation = optional_json(source.base / "generation_config.json")
    if source.kind == "gguf":
        own = named(gguf_file(source.path)[1], "tokenizer.ggml.")
        ends = {own.get(f"{name}_token_id") for name in ("eos", "eot", "eom")}
        generation["eos_token_id"] = sorted(ends - {None})
    write_json(folder / "generation_config.json", generation)
    for file in [*source.base.glob("LICENSE*"), *source.base.glob("NOTICE*")]:
        shutil.copy(file, folder)


# ---- a GGUF file

@functools.lru_cache(maxsize=1)
def gguf_file(path):
    """(GGUFReader, {field: value}) of a whole model. Raises InputError if it is none."""
    with reading(path, "give the GGUF file of a model"):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("split.count", 0) > 1:
        raise InputError(f"{path}: one part of {fields['split.count']}; join them, "
                         "llama-gguf-split --merge")
    if fields.get("general.architecture") not in ARCHITECTURES:
        raise InputError(f"{path}: general.architecture {fields.get('general.architecture')!r} is "
                         f"none of {', '.join(ARCHITECTURES)}; give another model")
    return reader, fields


def named(fields, prefix):
    """Fields by what follows the prefix."""
    return {key.removeprefix(prefix): x for key, x in fields.items() if key.startswith(prefix)}


def gguf_config(path):
    """
    transformers' config of a GGUF file, and what it leaves out: head_dim, biases, Llama 3's
    scaling, full attention. Raises InputError for what the root does not compute.
    """
    reader, fields = gguf_file(path)
    family, tensors = fields["general.architecture"], {t.name: t for t in reader.tensors}
    own = named(fields, f"{family}.")
    with reading(path, AGAIN):
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        config.vocab_size = int(tensors["token_embd.weight"].shape[-1])
        usual = config.hidden_size // config.num_attention_heads
        config.head_dim = head_dim = own.get("attention.key_length", usual)
    known = {name: (None, 0, 1) for name in UNLIKE}
    known["attention.value_length"] = known["rope.dimension_count"] = (None, head_dim)
    known["rope.scaling.type"] = (None, "none")
    if own.get("attention.sliding_window", 0) < own.get("context_length", 0):       # in use
        known["attention.sliding_window"] = (None, 0)
    for name, values in known.items():
        if own.get(name) not in values:
            raise InputError(f"{path}: {family}.{name} = {own[name]!r} is not computed")
    config.sliding_window = None
    config.attention_bias = "blk.0.attn_q.bias" in tensors
    config.mlp_bias = "blk.0.ffn_up.bias" in tensors
    theta = float(own.get("rope.freq_base", 10000.0))
    config.rope_parameters = dict(rope_type="default", rope_theta=theta)
    if "rope_freqs.weight" in tensors:
        scale_frequencies(path, config, torch.tensor(tensors["rope_freqs.weight"].data))
    return config


def scale_frequencies(path, config, factors):
    """
    Set Llama 3's scaling, if this is what divides θ_i by the `factors` (h/2) of a GGUF file. Its
    four numbers are not in there; only the largest factor differs between the published models.
    """
    if bool((factors == 1).all()):
        return
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters |= dict(rope_type="llama3", factor=float(factors.max()),
                                   low_freq_factor=1.0, high_freq_factor=4.0,
                                   original_max_position_embeddings=8192)
    right, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")                         # (h/2)
    pairs = torch.arange(0, config.head_dim, 2).double() / config.head_dim
    if len(pairs) != len(factors) or not torch.allclose(theta ** -pairs / factors, right.double(),
                                                        rtol=1e-4):
        raise InputError(f"{path}: rope_freqs.weight is not the scaling of a published Llama 3")


def gguf_tokenizer(path):
    """(Tokenizer, tokenizer_config, sentencepiece's model or None), as llama.cpp reads a file."""
    fields = gguf_file(path)[1]
    own = named(fields, "tokenizer.ggml.")
    kind, pre = own.get("model"), own.get("pre", "default")
    with reading(path, AGAIN):
        pieces, kinds = own["tokens"], own["token_type"]
        settings = dict(add_bos_token=own.get("add_bos_token", kind == "llama" or pre in LLAMA3),
                        add_eos_token=own.get("add_eos_token", False),
                        chat_template=fields.get("tokenizer.chat_template", ""))
        for name, field in dict(bos="bos", eos="eos", pad="padding", unk="unknown").items():
            if f"{field}_token_id" in own:
                settings[f"{name}_token"] = pieces[own[f"{field}_token_id"]]
    if kind == "llama":
        proto = gguf_sentencepiece(path, own)
        return sentencepiece_tokenizer(proto, legacy=True, inside=False), settings, proto
    if kind != "gpt2" or pre not in CUTS:
        raise InputError(f"{path}: tokenizer.ggml.model = {kind!r} with pre = {pre!r} does not say "
                         f"how text is cut (known: gpt2 with {', '.join(CUTS)}); {NAME_ONE}")
    with reading(path, AGAIN):
        merges = [tuple(line.split(" ")) for line in own["merges"]]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        core = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in LLAMA3))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if CUTS[pre]:
        steps = [pre_tokenizers.Split(Regex(CUTS[pre]), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[pre] is None))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    add_pieces(core, zip(pieces, kinds), inside=False)
    return core, settings, None


def add_pieces(core, pieces, inside):
    """Tell a Tokenizer which of its (piece, type) are special, and which are only never cut."""
    for piece, kind in pieces:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            user = kind == USER_DEFINED
            core.add_tokens([AddedToken(piece, special=not user, normalized=user and inside)])


# ---- sentencepiece

def gguf_sentencepiece(path, own):
    """The tokenizer.model that a GGUF file's pieces, scores and types come from."""
    with reading(path, AGAIN):
        kinds = own["token_type"]
        numbered = zip(own["tokens"], own["scores"], kinds, strict=True)
        pieces = [dict(piece=piece, score=score, type=kind) for piece, score, kind in numbered]
    space = own.get("add_space_prefix", True)
    return ModelProto(
        pieces=pieces, trainer_spec=dict(model_type=BPE, byte_fallback=BYTE in kinds),
        normalizer_spec=dict(remove_extra_whitespaces=False, add_dummy_prefix=space))


def sentencepiece_tokenizer(proto, legacy, inside):
    """
    A Tokenizer that cuts text as a sentencepiece model does.

    legacy: a space comes before every text between special tokens, else before the first one only.
    inside: user-defined pieces stand inside a text, as in sentencepiece; in llama.cpp they end it.
    """
    pieces = [(piece.piece, piece.type) for piece in proto.pieces]
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    # by score: transformers goes by ids, which gives "▁▁" and pieces of later another rank
    scores = {piece.piece: piece.score for piece in proto.pieces}
    merges = generate_merges(vocabulary, scores, [p for p, kind in pieces if kind == CONTROL])
    core = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, merges)
    if proto.normalizer_spec.add_dummy_prefix:
        core.decoder = decoders.Sequence([core.decoder, decoders.Strip(" ", 1, 0)])
    if proto.normalizer_spec.add_dummy_prefix and legacy:
        # not Prepend: tokenizers looks for a user-defined piece as the normaliser writes it alone
        alone = "|".join(re.escape(piece) for piece, kind in pieces if kind == USER_DEFINED)
        before = normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)"), "▁")
        core.normalizer = normalizers.Sequence([core.normalizer, before])
    elif proto.normalizer_spec.add_dummy_prefix:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    add_pieces(core, pieces, inside and legacy)
    return core


# ---- the tokenizer's files

def read_tokenizer(path):
    """
    (transformers' tokenizer of a folder or GGUF file, sentencepiece's own model or None).
    tokenizer.json counts as it lies; transformers adds the tokens that other files declare.
    """
    settings, proto = optional_json(path / "tokenizer_config.json"), None
    if path.is_file():
        core, settings, proto = gguf_tokenizer(path)
    elif (path / "tokenizer.json").is_file():
        with reading(path / "tokenizer.json", AGAIN):
            core = Tokenizer.from_file(str(path / "tokenizer.json"))
    elif (path / "tokenizer.model").is_file():
        with reading(path / "tokenizer.model", NAME_ONE):
            proto = ModelProto.FromString((path / "tokenizer.model").read_bytes())
        if settings.get("legacy") is None:      # which meant true before version 5 of transformers
            note(f"{path}: does not say `legacy`: text behind a special token begins with a space")
        core = sentencepiece_tokenizer(proto, settings.get("legacy") is not False, inside=True)
    else:
        with reading(path, NAME_ONE):
            return AutoTokenizer.from_pretrained(path, local_files_only=True), None
    if path.is_dir() and (proto or "Llama" in settings.get("tokenizer_class", "")):
        settings = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>") | settings
    by_id = settings.get("added_tokens_decoder")
    declared = {token["content"]: int(i) for i, token in (by_id or {}).items()}
    if by_id is None:
        declared = optional_json(path / "added_tokens.json")
    with tempfile.TemporaryDirectory() as place, reading(path, NAME_ONE):
        for name in BESIDE:
            if (path / name).is_file():
                shutil.copy(path / name, place)
        Path(place, "tokenizer.json").write_text(with_room(core, declared), encoding="utf-8")
        write_json(Path(place, "tokenizer_config.json"), settings)
        tok = PreTrainedTokenizerFast.from_pretrained(place)
    if core.normalizer and core.normalizer.normalize_str("x") != "x":
        # tokenizers would look for a new token behind what the normaliser puts in front of a text
        old = core.get_added_tokens_decoder()
        for token in [token for i, token in tok.added_tokens_decoder.items() if i not in old]:
            tok.backend_tokenizer.add_tokens([AddedToken(
                token.content, normalized=False, special=token.special, lstrip=token.lstrip,
                rstrip=token.rstrip)])
    wrong = {text: i for text, i in declared.items() if tok.get_vocab().get(text) != i}
    if wrong:
        raise InputError(f"{path}: declares {wrong}, ids that other tokens have; {NAME_ONE}")
    if proto or path.is_file():
        tok.add_bos_token = settings.get("add_bos_token", True)
        tok.add_eos_token = settings.get("add_eos_token", False)
    return tok, proto


def with_room(core, declared):
    """tokenizer.json as text, with the tokens that are declared as pieces, out of turn or not."""
    names, content = {i: text for text, i in core.get_vocab().items()}, json.loads(core.to_str())
    new = {text: i for text, i in declared.items() if text not in names.values()}
    for text, i in new.items():
        content["model"]["vocab"].pop(names.get(i), None)       # a placeholder's
        content["model"]["vocab"][text] = i
    old = content["added_tokens"]
    content["added_tokens"] = [token for token in old if token["id"] not in new.values()]
    return json.dumps(content)


def check_pieces(tok, path):
    """Raises InputError if a tokenizer has other pieces than a GGUF file has rows for."""
    pieces = dict(enumerate(gguf_file(path)[1].get("tokenizer.ggml.tokens", [])))
    for piece, i in tok.get_vocab().items():
        if pieces.get(i, piece) != piece:
            raise InputError(f"{path}: token {i} is {pieces[i]!r} there, and {piece!r} in the "
                             f"tokenizer that was named; {NAME_ONE}")


# ---- the comparison

def texts_for(tok):
    """Everyday texts, and mixtures of FRAGMENTS and added tokens."""
    lines = EVERYDAY.read_text(encoding="utf-8").splitlines()[:100]
    found = [json.loads(line)["prompt"] for line in lines]
    draw, added = random.Random(0), list(tok.get_added_vocab())
    for _ in range(TEXTS):
        parts = draw.choices(FRAGMENTS + added[:3] + added[-3:], k=draw.randint(1, 12))
        found.append("".join(parts))
    return found


def compare_tokenizer(folder, tok, proto):
    """[what the root reads otherwise in a folder than transformers and sentencepiece do]."""
    chat, texts, pairs = Chat(folder), texts_for(tok), []
    settings = read_json(folder / "generation_config.json") | {"eos_token_id": sorted(chat.stop)}
    write_json(folder / "generation_config.json", settings)     # for those that read no template
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    pairs.append(("what ends an answer", sorted(chat.stop), ends))
    pieces = proto and SentencePieceProcessor(model_proto=proto.SerializeToString())
    added = tuple(tok.get_added_vocab())
    for text in texts:
        pairs.append((f"ids of {text!r}", chat.plain(text), tok.encode(text)))
        # it knows no added tokens, and puts a space before a space, which only legacy does here
        if pieces and not any(token in text for token in added) and text[0] not in " ▁":
            ours = chat.tok.encode(text, add_special_tokens=False).ids
            pairs.append((f"sentencepiece's ids of {text!r}", ours, pieces.encode(text)))
    for text in texts[:20] if tok.chat_template else []:
        ours = chat.render(text)        # which closes a <think> that is open
        right = tok.apply_chat_template([dict(role="user", content=text)], tokenize=False,
                                        add_generation_prompt=True, enable_thinking=False)
        pairs.append((f"the template of {text!r}", ours[:len(right.rstrip())], right.rstrip()))
        ids = tok.encode(ours, add_special_tokens=False)
        pairs.append((f"the prompt's ids of {text!r}", chat.prompt(text), ids))
    print(f"tokenizer: {len(texts)} texts compared with transformers"
          f"{' and sentencepiece' if proto else ', no independent library'}; an answer ends with "
          f"{', '.join(map(repr, tok.convert_ids_to_tokens(ends)))}")
    return [f"{what}: {ours}, not {right}" for what, ours, right in pairs if ours != right]


@torch.no_grad()
def logits_of(net, prompts, layers):
    """fp32 logits (T, V) of each prompt, by the first layers of transformers' model or ours."""
    net.model.layers = net.model.layers[:layers]
    found = [net.float()(torch.tensor([ids])) for ids in prompts]
    return [getattr(logits, "logits", logits)[0] for logits in found]


# ---- all of it

def write(source, folder, tokenizer):
    """Fill a folder with what a source holds: [what does not agree with other libraries]."""
    has_own = any((source.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    place = source.path if has_own else source.base
    tok, proto = read_tokenizer(locate(tokenizer) if tokenizer else place)
    if tokenizer and source.kind == "gguf":
        check_pieces(tok, source.path)
    dtype, count = stored(source)
    fits = 4 * count <= SPARE * psutil.virtual_memory().available
    if dtype == torch.float32 and not fits:
        dtype = torch.bfloat16
        note(f"{source.path}: rounded to bfloat16; fp32 takes {4 * count / 1e9:.0f} GB of memory")
    model.check_memory(source.path, dtype.itemsize * count, "cpu")
    net = load(source, dtype)
    of, rows = net.config.num_hidden_layers, len(net.get_input_embeddings().weight)
    layers = of if fits else LAYERS
    prompts = [tok.encode(text)[:LONGEST] for text in texts_for(tok)[::16]]
    prompts = [ids for ids in prompts if ids and max(ids) < rows][:PROMPTS]
    right = None
    if source.kind == "adapter":
        if fits:                        # before merging, so that this is compared as well
            right = logits_of(net.base_model.model, prompts, layers)
        net = net.merge_and_unload()
    write_weights(net, source, folder)
    tok.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"     # takes tokenizer.json as it lies
    write_json(folder / "tokenizer_config.json", settings)
    right = right or logits_of(net, prompts, layers)
    del net                             # one model after the other
    gc.collect()
    ours = logits_of(model.load(folder, dtype=dtype), prompts, layers)
    ratios = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, right)]
    gaps = torch.stack(ratios).tolist()
    print(f"logits: {len(prompts)} prompts in fp32, {layers} of {of} layers"
          f"{'' if fits else ' for want of memory'}: off by {max(gaps):.1e} of the largest")
    wrong = [f"logits of the ids {ids}: off by {gap:.1e} of the largest"
             for ids, gap in zip(prompts, gaps) if not gap <= TOLERANCE]
    return wrong + compare_tokenizer(folder, tok, proto)


def convert(name, out, tokenizer=None):
    """
    Write the source `name` as the folder `out`, whole or not at all. Raises InputError, or Failed
    if it does not agree with what other libraries read.
    """
    gguf_file.cache_clear()
    source, out = identify(name), Path(out)
    if out.exists():
        raise InputError(f"{out}: is there, and is left as it is; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        folder = Path(place, out.name)
        folder.mkdir()
        try:
            wrong = write(source, folder, tokenizer)
        except SafetensorError as error:
            raise InputError(f"{out}: cannot be written ({error}); make room") from None
        except InputError as error:
            raise type(error)(str(error).replace(str(folder), str(out))) from None
        if wrong:
            print(*wrong[:5], sep="\n", file=sys.stderr)
            raise Failed(f"{out}: not written; {len(wrong)} comparisons disagree, some are above")
        for file in folder.iterdir():
            if file.is_file():
                file.chmod(0o644)       # safetensors' are their owner's alone
        folder.rename(out)
    print(f"{out}: ready")


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", help="folder, GGUF file or name on the hub")
    p.add_argument("dir", help="folder to write")
    p.add_argument("--tokenizer", help="folder or name on the hub with the tokenizer to take")
    o = p.parse_args()
    convert(o.source, o.dir, o.tokenizer)


transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

if __name__ == "__main__":
    run_command(main)
