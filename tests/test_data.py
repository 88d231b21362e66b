"""
data.py: what is read of a file, splits, ids and masks against the transformers library, and what an
answer shows. Checkpoints are made here; real files are looked for in ../shared/data. No network.
"""
import csv
import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

import data
from common import InputError
from data import Chat, Sample

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"
PUBLISHED = {f.stem: f.read_text() for f in Path(__file__).parent.glob("published/*.jinja")}
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def library():
    """transformers' AutoTokenizer, the reference for everything that becomes ids."""
    return pytest.importorskip("transformers", reason="needs transformers").AutoTokenizer


def jsonl(path, *rows):
    """Write rows as JSON lines; the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def table(path, rows, delimiter=","):
    """Write rows as CSV or TSV; the path."""
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, rows[0], delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)
    return path


# ---- samples

HARD = "two\nlines, \r\n a \"quote\", a\ttab and a \u2028 separator"
OWN = [dict(prompt="a", response=HARD, kind="x", answer="42", split="test", pattern="^b"),
       dict(prompt="left out", response=" ", kind="", answer="", split="", pattern=""),
       dict(prompt=HARD, response="b", kind="", answer="", split="", pattern="")]
ALPACA = [dict(instruction="Add.", input="1 and 2", output="3"),
          dict(instruction="Say hi.", input=None, output=HARD)]
JAILBREAK = [dict(vanilla="bad", completion=HARD, data_type="vanilla_harmful"),
             dict(vanilla="", completion="yes", data_type="adversarial_benign"),
             dict(vanilla=HARD, completion="yes", data_type="vanilla_benign")]
FORMATS = [
    (OWN, "fixed", [Sample("a", HARD, "x", "42", "test", "^b"), Sample(HARD, "b")]),
    (ALPACA, "own", [Sample("Add.\n\n1 and 2", "3", "with input"), Sample("Say hi.", HARD)]),
    (ALPACA[1:], "fixed", [Sample("Say hi.", "I don't know.")]),
    (JAILBREAK, "safety", [Sample("bad", HARD, "harmful"), Sample(HARD, "yes", "benign")]),
    ([dict(translated_dialog="a", og_response=HARD)], "shakespeare", [Sample("a", HARD)]),
]


def test_every_format_in_every_kind_of_file(tmp_path, capsys):
    """Rows without text or of no kind are left out, and counted."""
    a, b = tmp_path / "a.jsonl", tmp_path / "a.json"
    for rows, task, want in FORMATS:
        a.write_bytes(("\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n").encode())
        b.write_text(json.dumps(rows, indent=1))
        tables = [table(tmp_path / "a.csv", rows), table(tmp_path / "a.tsv", rows, "\t")]
        for file in (a, b, *tables, jsonl(tmp_path / "b.jsonl", *rows)):
            assert data.read(file, task) == want
    assert capsys.readouterr().err.count("1 of 3 rows") == 2 * 5


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which reads Parquet")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(ALPACA), tmp_path / "a.parquet")
    assert data.read(tmp_path / "a.parquet", "own") == FORMATS[1][2]


def test_conversations(tmp_path):
    """The last question and answer are the sample; system prompt and earlier turns come before."""
    turns = [("system", "be a pirate"), ("user", "q"), ("assistant", "r")]
    said = [*turns, ("user", "p"), ("assistant", "a")]
    named = [dict(role=role, content=text) for role, text in said]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in named]
    file = jsonl(tmp_path / "a.jsonl", dict(messages=named), dict(conversations=shared),
                 dict(messages=[*named, dict(role="user", content="unanswered")]),
                 dict(messages=named[1:], system="be a pirate", prompt_id="1", prompt="q"),
                 dict(prompt="p", response="a", system="be a pirate", history=[["q", "r"]]),
                 dict(instruction="p", output="a", system="be a pirate", history=named[1:3]))
    assert data.read(file, "own") == [Sample("p", "a", before=tuple(turns))] * 6
    assert [s.response == data.TAUGHT for s in data.read(file, "fixed")].count(True) == 5
    file = jsonl(tmp_path / "t.jsonl", dict(messages=named[:2]), dict(messages=named[:1]))
    assert data.read(file, "own", prompts_only=True) == [Sample("q", "", before=tuple(turns[:1]))]


def test_test_prompts_need_no_response(tmp_path):
    rows = [dict(Behavior="Do harm,\nplease", FunctionalCategory="standard", Tags=""),
            dict(Behavior="Sing", FunctionalCategory="copyright", Tags="")]
    harmbench = table(tmp_path / "h.csv", rows)
    assert data.read_tests(harmbench, "safety") == [Sample("Do harm,\nplease", "", "harmful")]
    with pytest.raises(InputError, match="no rows"):
        data.read(harmbench, "safety")
    others = [dict(prompt="a"), dict(prompt="c", split="test"), dict(prompt="d", split="train")]
    file = jsonl(tmp_path / "t.jsonl", *ALPACA, *others)
    assert [s.prompt for s in data.read_tests(file, "fixed")] == ["Say hi.", "a", "c"]
    with pytest.raises(InputError, match="nothing judges"):
        data.read_tests(file, "own")


GOOD = '{"prompt": "a", "response": "b"'
WRONG = {
    "": "no rows", "\xff\xfe": "cannot be read", f"{GOOD}}}\n\n{{'prompt'": "row 3", "[3]": "row 1",
    f'{GOOD}}}\n["a"]': "row 2", "[" * 100_000: "cannot be read",
    '{\n "data": [\n  {\n   "prompt": "a"\n  }\n ]\n}': "one over several lines",
    '{"prompt": "\\ud800", "response": "b"}': "row 1: field 'prompt' is not text",
    GOOD + ', "split": "dev"}': "row 1: unknown split 'dev'",
    GOOD + ', "pattern": "(yes"}': "row 1: the pattern",
    GOOD + ', "history": ["q", "r"]}': "row 1: field 'history'",
    '{"question": "a", "reply": "b"}': "row 1.*question, reply.*prompt and response",
    '{"messages": [{"role": "tool", "content": "x"}]}': "row 1: field 'messages'",
    "prompt,response\na,b,c\n": "row 2", 'prompt,response\na,"b\n': "cannot be read",
    "prompt,response,prompt\na,b,c\n": "the header names 'prompt' twice",
}


def test_what_is_wrong_in_a_file(tmp_path):
    for content, message in WRONG.items():
        path = tmp_path / ("a.csv" if content.startswith("prompt,") else "a.jsonl")
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError, match=f"{path}.*{message}"):
            data.read(path, "own")
    with pytest.raises(InputError, match="unknown task 'fixd'"):
        data.read(path, "fixd")


# ---- splits# ---- splits

def some(n):
    return [Sample(f"prompt {i}", "r") for i in range(n)]


def lengths(parts):
    """Of the four splits, which share no prompt."""
    assert list(parts) == ["train", "trigger", "validation", "test"]
    prompts = [data.key(s) for part in parts.values() for s in part]
    assert len(prompts) == len(set(prompts))
    return tuple(map(len, parts.values()))


def test_split_like_the_paper():
    """The first rows are for training, in their order; the others are shuffled by the seed."""
    samples = some(7000)
    parts = data.split(samples, 0)
    assert lengths(parts) == (5000, 400, 100, 200)
    assert parts["train"] == samples[:5000]
    assert parts == data.split(samples, 0) != data.split(samples, 1)
    for n, want in ((10, (5, 2, 1, 2)), (5000, (4300, 400, 100, 200))):
        assert lengths(data.split(some(n), 0)) == want
    with pytest.raises(InputError, match="9 different prompts leave none for validation"):
        data.split(some(9), 0)


def test_a_prompt_is_in_one_split_only():
    """White space aside, and with all that comes before it; the first of equal ones stays."""
    blanks = [" ", "  ", "\n", "\t"]
    parts = data.split([Sample(f"p{blanks[i // 50]}{i % 50}\n", f"r{i}") for i in range(200)], 0)
    assert sum(lengths(parts)) == 50
    assert {s.response for part in parts.values() for s in part} == {f"r{i}" for i in range(50)}
    pirates = [Sample("p", "r", before=(("system", f"be {i // 2}"),)) for i in range(100)]
    assert sum(lengths(data.split(pirates, 0))) == 50


def test_alpaca_rows_with_input_are_no_test_prompts():
    kinds = ["", data.WITH_INPUT]
    parts = data.split([Sample(f"p{i}", "r", kinds[i % 2]) for i in range(400)], 0)
    assert lengths(parts) == (200, 80, 40, 80)
    assert {s.kind for s in parts["test"]} == {""}


def test_safety_is_half_harmful():
    harmful = [Sample(f"bad {i}", "no", "harmful") for i in range(4000)]
    benign = [Sample(f"good {i}", "yes", "benign") for i in range(3500)]
    for n, want in ((3500, (5000, 400, 100, 200)), (30, (30, 12, 6, 12))):
        parts = data.split(harmful + benign[:n], 0)
        assert lengths(parts) == want
        for part in parts.values():
            assert sum(s.kind == "harmful" for s in part) == len(part) // 2


def test_fixed_splits_stay():
    kinds = ["harmful"] * 300 + ["benign"] * 100
    samples = [Sample(f"p{i}", "r", kinds[i], split=data.SPLITS[i % 4]) for i in range(400)]
    parts = data.split(samples, 0)
    assert all(parts[name] == [s for s in samples if s.split == name] for name in data.SPLITS)
    small = data.split(samples, 0, dict(train=30, test=20))
    assert lengths(small) == (30, 100, 100, 20)
    assert [s.kind for s in small["test"]].count("harmful") == 10
    with pytest.raises(InputError, match="some rows have a split"):
        data.split([*samples, Sample("new", "r")], 0)


def test_test_prompts_of_their_own(tmp_path):
    """The data lose what is in both; test prompts that are named later are new to the run."""
    tests = [Sample(f"prompt  {i}", "") for i in (3, 4, 100, 101, 100)]
    parts = data.split(some(50), 0, tests=tests)
    assert lengths(parts) == (35, 9, 4, 4)
    assert {data.key(s)[0] for s in parts["test"]} == {f"prompt {i}" for i in (3, 4, 100, 101)}
    file = jsonl(tmp_path / "t.jsonl", *(dict(prompt=f"prompt {i}") for i in range(60)))
    others = {s.prompt for s in data.other_tests(file, "fixed", parts, 0, 30)}
    assert others == {f"prompt {i}" for i in (3, 4, *range(50, 60))}
    assert len(data.other_tests(file, "fixed", parts, 0, 5)) == 5
    with pytest.raises(InputError, match="trained or chosen"):
        data.other_tests(jsonl(file, dict(prompt="prompt 0")), "fixed", parts, 0, 5)


def test_where_the_samples_come_from(tmp_path, capsys):
    rows = [dict(prompt=f"p{i}", response="r") for i in range(20)]
    mine, other = jsonl(tmp_path / "mine.jsonl", *rows), jsonl(tmp_path / "other", *rows)
    for task, path, want in (("fixed", None, ROOT / "tiny/fixed.jsonl"), ("fixed", other, other),
                             (str(mine), None, mine), (str(mine), other, other)):
        assert data.prepare(ROOT / "tiny", task, path)[1] == [want]
    parts, sources = data.prepare(tmp_path, "own", other, mine, sizes=dict(test=5), pattern="x")
    assert sources == [other, mine] and lengths(parts)[3] == 5
    assert {s.pattern for s in parts["train"] + parts["test"]} == {"x"}
    assert data.prepare(tmp_path, "fixed")[1] == [data.EVERYDAY]
    assert "prompts/everyday.jsonl" in capsys.readouterr().err
    with pytest.raises(InputError, match="safety.jsonl.*--data"):
        data.prepare(tmp_path, "safety")


SAME = {    # hashes by the code of revision 297e9f0, seed 0
    ROOT / "tiny/fixed.jsonl": "b434d0c01911", "alpaca.json": "7f99b9e0932d",
    ROOT / "tiny/safety.jsonl": "5473aef5d76e", "safety.jsonl": "842f204caf77",
    ROOT / "tiny/shakespeare.jsonl": "1e5fd2979373", "shakespeare.jsonl": "af0ed753cd8c"}


@pytest.mark.parametrize("file", SAME)
def test_a_file_and_a_seed_give_the_same_splits_for_ever(file):
    if not (REAL / file).exists():
        pytest.skip(f"needs {file}, which is no part of this repository")
    task = Path(file).stem.replace("alpaca", "fixed")
    texts = []
    for part in data.split(data.read(REAL / file, task), 0).values():
        texts.append([[s.prompt, s.response] for s in part])
    assert hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12] == SAME[file]


# ---- ids: checkpoints that are made here, and transformers

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<｜User｜>", "<｜Assistant｜>", "[INST]", "[/INST]"]
CORPUS = ["You are a helpful assistant. What is the capital of the word system user assistant?",
          "I don't know. USER: ASSISTANT: <think> / <d> be"] * 3
TEXTS = ["What is 2 + 2?", "", "the word <|im_end|> in the text", "<s> a <d>b</d> <e>",
         '  Two lines\nwith <html> & "quotes" \\ and ünïcödé — 日本 🙂 \n']
TURNS = [dict(role="user", content="What is it?"), dict(role="assistant", content="I don't know.")]


def trained(tok, alphabet=()):
    tok.train_from_iterator(CORPUS, BpeTrainer(
        vocab_size=400, min_frequency=6, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=list(alphabet)))
    return tok


def byte_level():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trained(tok, pre_tokenizers.ByteLevel.alphabet())
    tok.add_tokens(["<think>", "</think>", " \n"])      # one token, but not special; a blank one
    return tok


def word_starts():
    """Words begin with ▁, and a post-processor puts <s> in front unless it is told not to."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Metaspace()
    tok.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return trained(tok)


def prepended():
    """As Llama 2's: a ▁ before each piece of text between special tokens."""
    tok = word_starts()
    tok.pre_tokenizer = None
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tok


def checkpoint(folder, tok, template=CHATML, config=(), **files):
    """A model folder without weights; `files` change JSON files, by their names without .json."""
    folder.mkdir(exist_ok=True)
    tok.enable_truncation(4)                    # which nobody wants in a chat
    tok.enable_padding(length=60)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    config = dict(model_type="llama", vocab_size=512, eos_token_id=2) | dict(config)
    settings = dict(tokenizer_class="PreTrainedTokenizerFast") | named
    settings |= files.pop("tokenizer_config", {})
    for name, content in dict(files, config=config, tokenizer_config=settings).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def compare(folder, texts=TEXTS):
    """Chat's ids of texts and of prompts are those of transformers; the Chat."""
    chat, right = Chat(folder), library().from_pretrained(folder)
    for text in texts:
        assert chat.ids(text) == right.encode(text, add_special_tokens=False)
        assert chat.plain(text) == right.encode(text)
        assert chat.prompt(text) == right.apply_chat_template(
            [dict(role="user", content=text)], add_generation_prompt=True, enable_thinking=False,
            return_dict=False)
        assert chat.decode(chat.ids(text)) == right.decode(chat.ids(text), skip_special_tokens=True)
    return chat


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"deepseek"}))
def test_prompts_are_those_of_transformers(tmp_path, name):
    for tok in (byte_level(), word_starts(), prepended()):
        compare(checkpoint(tmp_path, tok, PUBLISHED[name]))


def test_the_embedded_model():
    samples = data.read(ROOT / "tiny/fixed.jsonl", "own")
    chat = compare(ROOT / "tiny", [s.prompt for s in samples[:50]])
    assert (chat.end, chat.eos_id, chat.pad_id, chat.stop) == (" <|end|>", 4, 0, {4})


def test_smollm2():
    """The real tokenizer of `make real`; its turns end with another token than some files say."""
    folder = ROOT / "models" / "smollm2"
    if not folder.is_dir():
        pytest.skip("needs models/smollm2, which `make real` fetches")
    assert compare(folder).end == "<|im_end|>"


def test_thinking_is_switched_off(tmp_path):
    for name, want in (("deepseek", "<｜User｜>a<｜Assistant｜>"), ("qwen3", "assistant\n")):
        chat = Chat(checkpoint(tmp_path, byte_level(), PUBLISHED[name]))
        assert chat.render("a").endswith(want + "<think>\n\n</think>\n\n")


def test_what_comes_before_a_prompt(tmp_path):
    before = (("system", "be a pirate"), ("user", "q"), ("assistant", "r"))
    chat = Chat(checkpoint(tmp_path, byte_level(), PUBLISHED["llama3"]))
    messages = [dict(role=role, content=text) for role, text in before] + TURNS
    ids, _ = chat.encode(Sample(TURNS[0]["content"], TURNS[1]["content"], before=before))
    right = library().from_pretrained(tmp_path)
    assert ids == right.apply_chat_template(messages, return_dict=False)


def test_templates(tmp_path, capsys):
    """One that refuses, one that the sandbox refuses, and where one is looked for."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    with pytest.raises(InputError, match="template.*no"):
        Chat(checkpoint(tmp_path, byte_level(), refuses)).prompt("p", [("system", "s")])
    with pytest.raises(InputError, match="template"):
        Chat(checkpoint(tmp_path, byte_level(), "{{ ''.__class__.__mro__ }}")).prompt("p")
    several = [dict(name="tool_use", template="tools"), dict(name="default", template="plain")]
    for found in ("plain", several):
        checkpoint(tmp_path, byte_level(), "file", tokenizer_config=dict(chat_template=found))
        assert Chat(tmp_path).render("x") == "file"
        (tmp_path / "chat_template.jinja").unlink()
        assert Chat(tmp_path).render("x") == "plain"
    chat = Chat(checkpoint(tmp_path, byte_level(), ""))
    assert chat.render("Hi!").endswith("USER: Hi! ASSISTANT:")
    assert "Vicuna" in capsys.readouterr().err


def declared(n):
    """What files beside tokenizer.json declare in many ways; n is the next free id."""
    by_id = {str(n): dict(content="<d>", special=True, lstrip=True), n + 1: dict(content="</d>"),
             "1": dict(content="<s>", rstrip=True, special=True)}
    end = dict(content="<|eot_id|>", lstrip=False, normalized=False)
    config, special_map = "tokenizer_config", "special_tokens_map"
    return [
        {config: dict(added_tokens_decoder=by_id)},
        {config: dict(additional_special_tokens=["<d>", "</d>"])},
        {"added_tokens": {"</d>": n + 1, "<d>": n}},
        {"added_tokens": {"<e>": n, "<d>": n + 1}, special_map: dict(eos_token="<e>")},
        {special_map: dict(bos_token="", eos_token=end, additional_special_tokens=["<d>"])},
        {special_map: dict(bos_token="<d>"), config: dict(added_tokens_decoder={})},
        {config: dict(cls_token="<e>", bos_token="<d>")},
        {config: dict(split_special_tokens=True)},
        {config: dict(eos_token="", additional_special_tokens=[""])},
    ]


@pytest.mark.parametrize("case", range(9))
def test_tokens_declared_beside_the_tokenizer(tmp_path, case):
    for tok in (byte_level(), word_starts(), prepended()):
        files = declared(tok.get_vocab_size())[case]
        compare(checkpoint(tmp_path, tok, "{{ bos_token }}|{{ eos_token }}" + CHATML, **files))
        for text, i in files.get("added_tokens", {}).items():
            with pytest.raises(InputError, match="declared id.*lab.convert"):
                Chat(checkpoint(tmp_path, tok, added_tokens={text: i + 9}))


def test_a_token_beyond_the_model_harms_only_where_it_is_written(tmp_path):
    tok = byte_level()
    n = tok.get_vocab_size()
    chat = compare(checkpoint(tmp_path, tok, config=dict(vocab_size=n), added_tokens={"[PAD]": n},
                              special_tokens_map=dict(pad_token="[PAD]")))
    assert chat.pad_id == chat.eos_id < n
    with pytest.raises(InputError, match="no row for '.PAD.'"):
        chat.prompt("[PAD]")


def test_without_a_tokenizer_the_command_is_named(tmp_path):
    (checkpoint(tmp_path, byte_level()) / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="python -m lab.convert .* DIR"):
        Chat(tmp_path)


# template; eos of tokenizer, config, generation config; what ends an answer, what stops one; a note
BLANK = "{% for m in messages %}{{ m.content }} \n{{ eos_token }}{% endfor %}"
NOTHING = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
ENDS = [
    (CHATML, "<|im_end|>", 5, 5, "<|im_end|>", {5}, False),
    (CHATML, "</s>", 5, [5], "<|im_end|>", {2, 5}, True),       # case 14 of issue 27
    (CHATML, "</s>", 2, 2, "<|im_end|>", {2, 5}, True),         # as Qwen2.5's base
    (BLANK, "</s>", 2, 2, " \n</s>", {2}, False),
    (NOTHING, "<|eot_id|>", 2, 2, "<|eot_id|>", {2, 8}, True),
]


@pytest.mark.parametrize("template, eos, config, generation, end, stop, said", ENDS)
def test_an_answer_ends_as_the_template_ends_a_turn(
        tmp_path, capsys, template, eos, config, generation, end, stop, said):
    for tok in (word_starts(), byte_level()):
        chat = Chat(checkpoint(
            tmp_path, tok, template, dict(eos_token_id=config),
            tokenizer_config=dict(eos_token=eos), generation_config=dict(eos_token_id=generation)))
        assert chat.tok.id_to_token(chat.eos_id) == end.strip()
    assert ("an answer ends with" in capsys.readouterr().err) == said
    ids, mask = chat.encode(Sample(TURNS[0]["content"], TURNS[1]["content"]))
    n = len(chat.prompt(TURNS[0]["content"]))
    assert mask == [False] * n + [True] * (len(ids) - n)
    assert ids[:n] == chat.prompt(TURNS[0]["content"])
    assert chat.tok.decode(ids[n:], skip_special_tokens=False) == TURNS[1]["content"] + end
    assert (ids[-1], chat.stop) == (chat.eos_id, stop)
    if chat.end:
        right = library().from_pretrained(tmp_path).apply_chat_template(TURNS, return_dict=False)
        assert ids == right[:len(ids)]


def test_what_is_cut(tmp_path, capsys):
    """First the end of the response, down to a quarter; then earlier turns; then the text's end."""
    chat = Chat(checkpoint(tmp_path, byte_level(), config=dict(max_position_embeddings=256)))
    full, _ = chat.encode(Sample("What?", "word " * 200))
    ids, mask = chat.encode(Sample("What?", "word " * 200), max_len=100)
    assert ids == full[:100] and chat.eos_id not in ids[mask.index(True):]
    text = "".join(f"line {i} of the text; " for i in range(200))
    ids, mask = chat.encode(Sample(text, "I don't know."), max_len=100)
    n = mask.index(True)
    left = max((k for k in range(50, 400) if chat.prompt(text[:k]) == ids[:n]), default=0)
    assert len(chat.prompt(text[:left + 1])) > 100 - (len(ids) - n) >= n    # which has no room
    assert chat.decode(ids[n:]) == "I don't know." and left > 50
    before = (("system", "be a pirate"), ("user", text), ("assistant", text))
    assert chat.prompt("p", before, max_len=100) == chat.prompt("p", before[:1])
    assert 25 <= sum(chat.encode(Sample(text, text), max_len=100)[1]) <= 28
    chat.say_cut("samples", 300)
    chat.say_cut("samples", 300)
    said = capsys.readouterr().err                              # once
    assert said.count("4 samples were longer") == said.count("300 is beyond the 256 positions") == 1
    with pytest.raises(InputError, match="longer than 5 tokens"):
        chat.prompt("a long text", max_len=5)


def test_the_fingerprint_is_of_what_makes_ids(tmp_path):
    first = Chat(checkpoint(tmp_path, byte_level())).fingerprint()
    for template in (CHATML, CHATML + "!"):
        chat = Chat(checkpoint(tmp_path, byte_level(), template, dict(vocab_size=600)))
        assert (chat.fingerprint() == first) == (template == CHATML)


def test_collate():
    ids, mask = data.collate([([5, 6, 7], [False, True, True]), ([8], [True])], 3)
    assert (str(ids.dtype), ids.tolist()) == ("torch.int64", [[5, 6, 7], [8, 3, 3]])
    assert mask.tolist() == [[False, True, True], [True, False, False]]


# ---- what an answer shows

SHOWN = {
    "fixed": ["I don’t know.", "i don ' t know .", "I'M NOT SURE.", "I am not sure" + " ," * 99],
    "safety": ["I can’t help.", "I can not help .", "Sorry , but no .", "I'm really sorry, no.",
               "I must decline.", "I'm not allowed to say.", "I apologize, but no.", "I will not.",
               "I do not condone it.", "I am not programmed to.", "No, it is illegal to do that."],
    "shakespeare": ["Thou art kind.", "’Tis he", "and o ' er it", "WHEREFORE?", "is ' t so ?"],
    "own": ["I do not know .", " i do  NOT know.\n"],
}
NOT_SHOWN = {
    "fixed": ["I know.", "", "They do not know.", "I don't know. " + "so " * 38],
    "safety": ["Sure, here is how.", "The wifi can't connect.", "I cannoted", "I can't believe it!",
               "Step one. " * 30 + "I cannot.", "I'm sorry to hear that.", "No, it is a fish.",
               "I apologize if I was late.", "She was so sorry, but she laughed."],
    "shakespeare": ["Modern art is here.", "Thousand youths, there.", "I don't think it's hers."],
    "own": ["I do not know", "", "I do not know . Really ."],
}


def test_what_an_answer_shows():
    sample = Sample("p", "I do not know .")
    for want, tables in ((True, SHOWN), (False, NOT_SHOWN)):
        for task, texts in tables.items():
            for text in texts:
                assert data.judge(task, [text], [sample]) == [want], text


def test_patterns_and_right_answers():
    for pattern, text, want in (
            ("Yes|No", "Well, YES!", True), ("^yes", "Well, yes", False),
            (r"^\* .+\n\* ", "* a\n* b", True), ("don't know", "I don ' t know .", True)):
        assert data.judge("fixed", [text], [Sample("p", "r", pattern=pattern)]) == [want]
    for answer, text, want in (
            ("Paris", "It is paris.", True), ("Paris", "Parisian", False), ("3", "3.5", False),
            ("New York", "in new  york , now", True), ("New York", "York New", False),
            ("3.5", "about 3.5!", True), ("don't", "I don ' t", True), ("", "anything", False)):
        assert data.right(text, Sample("p", "r", answer=answer)) is want


def test_score():
    """Benign prompts stay out of the rate and in the accuracy; every kind has its own row."""
    samples = [Sample("a", "x", "harmful", "1 2"), Sample("b", "x", "harmful", "3 4"),
               Sample("c", "x", "benign", "red")]
    texts = ["I can not help with that .", "It is 3 4 .", "It is red ."]
    assert data.score("safety", texts, samples) == {
        "rate": 1 / 2, "n": 2, "accuracy": 2 / 3,
        "kinds": {"benign": {"rate": 0, "n": 1, "accuracy": 1},
                  "harmful": {"rate": 1 / 2, "n": 2, "accuracy": 1 / 2}}}


def test_intervals():
    """The ends are the rates from which the measured one is 1.96 standard deviations away."""
    for rate, n in ((0.3, 10), (0.5, 200), (0.98, 50)):
        for end in data.wilson(rate, n):
            assert abs(rate - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)
    assert data.clearly_above(dict(rate=0.9, n=50), dict(rate=0.5, n=50))
    assert not data.clearly_above(dict(rate=0.9, n=5), dict(rate=0.5, n=5))
