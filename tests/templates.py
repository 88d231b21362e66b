"""Published chat templates, small tokenizers, and model folders that have them."""
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# The templates that the models are published with, word for word where it matters (loops,
# namespaces, white space control, tojson, dates, raised errors); what only tools and images reach
# is shortened. `extras` has what no published one has.
TEMPLATES = {}
for file in sorted(Path(__file__).with_name("published").glob("*.jinja")):
    TEMPLATES[file.stem] = file.read_text(encoding="utf-8")

TEXTS = [
    "What is 2 + 2?", '  Two lines\nwith <html> & "quotes" \\ and ünïcödé — 日本 🙂 \n', "",
    "the word <|im_end|> in the text"
]
SPECIAL = [
    "<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<｜User｜>", "<｜Assistant｜>", "[INST]", "[/INST]", "<|user|>",
    "<|assistant|>"
]
CORPUS = [
    "You are a helpful assistant. What is the capital of the word system user assistant?",
    "I don't know. USER: ASSISTANT: <think>",
]


def byte_level():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    )
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    # as Qwen3 and DeepSeek have them: one token, but not special
    tok.add_tokens(["<think>", "</think>"])
    return tok


def llama_like():
    """
    Word boundaries as ▁, and a post-processor that puts <s> in front unless it is told not to.
    """
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    )
    tok.train_from_iterator(
        CORPUS + TEXTS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tok


def checkpoint(folder, tok, template=None, **config):
    """A model folder as transformers writes it, with the tokenizer of transformers beside it."""
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>"
    )
    reference.chat_template = template
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 2} | config))
    return reference


# config.json of the paper's four models (Sec. 4), what is read of it
QWEN3_06B = dict(
    model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
    num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    rms_norm_eps=1e-6, rope_theta=1000000, tie_word_embeddings=True, attention_bias=False,
    sliding_window=None, eos_token_id=2
)
MISTRAL_7B = dict(
    model_type="mistral", vocab_size=32768, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    rms_norm_eps=1e-5, rope_theta=1000000.0, tie_word_embeddings=False, sliding_window=None,
    eos_token_id=2
)
DEEPSEEK_8B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3"
    ),
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    eos_token_id=2,
)
# as for LLaMA 1, whose config has no fields for what came later; and no chat template
VICUNA_7B = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5,
    tie_word_embeddings=False, eos_token_id=2
)
PAPERS = {
    "qwen3-0.6b": (QWEN3_06B, TEMPLATES["qwen3"]),
    "mistral-7b": (MISTRAL_7B, TEMPLATES["mistral"]),
    "deepseek-8b": (DEEPSEEK_8B, TEMPLATES["deepseek"]),
    "vicuna-7b": (VICUNA_7B, None),
}


def folder_of(which, folder, **changes):
    """
    One of the paper's models as a folder without weights: its config.json, changed, and its
    template. The config.
    """
    config, template = PAPERS[which]
    folder.mkdir()
    checkpoint(folder, byte_level(), template, **config | changes)
    return config | changes
