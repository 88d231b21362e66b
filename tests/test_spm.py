"""
spm.py against sentencepiece's own rule, spelled out, on models written here; and against the
library where it is installed.
"""
import json
import shutil
import struct

import pytest
from helpers import TINY, by_the_rule, pieces

import spm
from chat import Chat
from files import InputError

TEXTS = [
    "", "a", " a", "a  b", "hello world", "hello  hello", "the low lower lowest", "  the   ",
    "hé llo", "日本 hello", "low\nlow\ttow", "▁low", "<0x41> low", "hellohellohello",
    "owl wol lowel" * 5, "x</s>y", "🙂"
]


def message(*parts):
    """
    A protocol buffer message of (number, value): str and bytes with a length, int as varint, float
    in four bytes.
    """
    def varint(n):
        out = b""
        while n > 127:
            out += bytes([n & 127 | 128])
            n >>= 7
        return out + bytes([n])

    out = b""
    for number, value in parts:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def write(path, all_pieces, trainer=((3, 2),), normaliser=((1, "identity"), (3, 1), (4, 0))):
    found = [
        (1, message((1, piece), (2, score), *([] if kind == spm.NORMAL else [(3, kind)])))
        for piece, score, kind in all_pieces
    ]
    path.write_bytes(message(*found, (2, message(*trainer)), (3, message(*normaliser))))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_the_rule(tmp_path, text):
    tok = spm.tokenizer(write(tmp_path / "tokenizer.model", pieces()))
    ids = tok.encode(text.replace("</s>", ""), add_special_tokens=False).ids
    assert ids == by_the_rule(text.replace("</s>", ""), pieces())
    if text and "▁" not in text and "<0x" not in text:
        assert tok.decode(ids) == text.replace("</s>", "")


def test_control_pieces_in_a_text(tmp_path):
    """What a template writes: <s> is one token, and a word after it begins as at the start."""
    tok = spm.tokenizer(write(tmp_path / "tokenizer.model", pieces()))
    assert tok.encode("<s>low</s>", add_special_tokens=False).ids == [
        1, *by_the_rule("low", pieces()), 2
    ]
    assert tok.decode([1, *by_the_rule("low", pieces()), 2], skip_special_tokens=True) == "low"


def test_chat_reads_tokenizer_model(tmp_path):
    """A folder without tokenizer.json, as Vicuna's; where both lie tokenizer.json is read."""
    write(tmp_path / "tokenizer.model", pieces())
    (tmp_path / "config.json").write_text(
        json.dumps({"vocab_size": 330, "bos_token_id": 1, "eos_token_id": 2})
    )
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"})
    )
    chat = Chat(tmp_path)
    assert (chat.eos_id, chat.pad_id, chat.stop) == (2, 0, {2})
    ids = chat.prompt("hello")
    assert ids[0] == 1
    assert chat.tok.id_to_token(ids[1]) == "▁"
    assert "USER: hello ASSISTANT:" in chat.decode(ids)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(TINY / name, tmp_path / name)
    assert Chat(tmp_path).tok.get_vocab() == Chat(TINY).tok.get_vocab()


@pytest.mark.parametrize(
    "how, named",
    [
        (dict(trainer=((3, 1),)), "is no byte-pair encoding"),
        (dict(trainer=()), "is no byte-pair encoding"),
        (dict(normaliser=((2, b"rules"), (4, 0))), "rewrites its text"),
        (dict(normaliser=((3, 0), (4, 0))), "puts no space before its text"),
        (dict(normaliser=()), "removes spaces"),
    ],
)
def test_refuses_other_models(tmp_path, how, named):
    with pytest.raises(InputError, match=f"tokenizer.model: this sentencepiece model {named}"):
        spm.tokenizer(write(tmp_path / "tokenizer.model", pieces(), **how))


def test_refuses_damage(tmp_path):
    whole = write(tmp_path / "tokenizer.model", pieces()).read_bytes()
    for damaged in (
        whole[:-3], whole[:1000], b"\xff" * 40, b"hello",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    ):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(InputError, match="tokenizer.model"):
            spm.tokenizer(tmp_path / "tokenizer.model")


def test_the_library_on_real_text(tmp_path):
    """A model that sentencepiece trains on Shakespeare, in Llama's settings, on modern English."""
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="sentencepiece is not installed: its own splits are not compared"
    )
    rows = [
        json.loads(line) for line in (TINY / "shakespeare.jsonl").read_text().splitlines()[:1500]
    ]
    (tmp_path / "text").write_text("\n".join(row["response"] for row in rows))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=1000,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2
    )
    right = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tok = spm.tokenizer(tmp_path / "tokenizer.model")
    texts = TEXTS + [row["prompt"] for row in rows[:500]]
    for text in (t.replace("</s>", "").replace("▁", "_") for t in texts):
        ids = tok.encode(text, add_special_tokens=False).ids
        assert ids == right.encode(text)
        assert tok.decode(ids) == right.decode(ids)
