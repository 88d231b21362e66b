"""data.py: prompt ids against the transformers library for published chat templates, file formats and what is wrong in
them, splits, cutting, and the tables of what counts as showing a behaviour. No network; a few seconds.
"""
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import behaviour
import data
import files
import run
from chat import Chat, collate
from data import Sample
from files import InputError, append_jsonl, fingerprint, read_json, read_jsonl, write_json
from run import check_device, check_numbers, cli, locate, patient, ticker

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"

# The templates that the models are published with, word for word where it matters (loops, namespaces, white space
# control, tojson, dates, raised errors); what only tools and images reach is shortened.
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
          "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
          "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
LLAMA32 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
DEEPSEEK = ("{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = "
            "namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}"
            "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
            "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
            "{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- endfor -%}"
            "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}")
ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
EXTRAS = ("{%- for m in messages %}\n  {%- if not m.content %}{% continue %}{% endif %}\n{{ m | tojson }} {{ m | tojson(indent=2) }}\n"
          "{% generation %}{% set x = 1 %}<|im_start|>{{ m.role }}{% endgeneration %}{{ x is defined }}\n"
          "  {# indented: lstrip_blocks #}\n  {% if loop.first %}{% break %}{% endif %}\n{% endfor %}{{ documents is none }}")
TEMPLATES = dict(qwen25=QWEN25, qwen3=QWEN3, llama3=LLAMA3, llama32=LLAMA32, mistral=MISTRAL, deepseek=DEEPSEEK, zephyr=ZEPHYR,
                 extras=EXTRAS)

TEXTS = ["What is 2 + 2?", "  Two lines\nwith <html> & \"quotes\" \\ and ünïcödé — 日本 🙂 \n", "", "the word <|im_end|> in the text"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<｜User｜>", "<｜Assistant｜>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"]
CORPUS = ["You are a helpful assistant. What is the capital of the word system user assistant?", "I don't know. USER: ASSISTANT: <think>"]


def byte_level():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.add_tokens(["<think>", "</think>"])  # as Qwen3 and DeepSeek have them: one token, but not special
    return tok


def llama_like():
    """Word boundaries as ▁, and a post-processor that puts <s> in front unless it is told not to."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    tok.train_from_iterator(CORPUS + TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return tok


def checkpoint(folder, tok, template=None, **config):
    """A model folder as transformers writes it, with the tokenizer of transformers beside it."""
    reference = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    reference.chat_template = template
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 2} | config))
    return reference


def change(path, **new):
    """Change entries of a JSON file; None removes one."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (old | new).items() if v is not None}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the byte-level tokenizer and Qwen3's template. Not to be changed; tests that do so make their own."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint(folder, byte_level(), QWEN3)
    return folder


# prompts

@pytest.mark.parametrize("build", [byte_level, llama_like])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_ids_are_those_of_transformers(tmp_path, name, build):
    reference = checkpoint(tmp_path, build(), TEMPLATES[name])
    chat = Chat(tmp_path)
    for text in TEXTS:
        turn = [{"role": "user", "content": text}]
        want = reference.apply_chat_template(turn, add_generation_prompt=True, enable_thinking=False, tokenize=True, return_dict=False)
        if name == "deepseek":  # the template leaves thinking open; we close it
            rendered = reference.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            assert rendered.endswith("<think>\n")
            want = reference.encode(rendered + "\n</think>\n\n", add_special_tokens=False)
        assert chat.prompt(text) == want


def test_the_comparison_would_notice(tmp_path):
    """Special tokens added a second time, an open <think>, and white space control all change the ids."""
    reference = checkpoint(tmp_path, llama_like(), LLAMA3)
    chat = Chat(tmp_path)
    ids = chat.prompt("What")
    assert ids.count(1) == 1 and reference.encode(chat.render("What")).count(1) == 2
    checkpoint(tmp_path, byte_level(), QWEN3)
    assert Chat(tmp_path).render("a") == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    checkpoint(tmp_path, byte_level(), DEEPSEEK)
    assert Chat(tmp_path).render("a") == "<s><｜User｜>a<｜Assistant｜><think>\n\n</think>\n\n"


def test_where_the_template_is_found(tmp_path):
    checkpoint(tmp_path, byte_level(), "from the file {{ messages[0].content }}")
    file, config = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    assert file.exists()
    change(config, chat_template="from the config {{ eos_token }}")
    assert Chat(tmp_path).render("x") == "from the file x"
    file.unlink()
    assert Chat(tmp_path).render("x") == "from the config </s>"
    change(config, chat_template=[{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}])
    assert Chat(tmp_path).render("x") == "plain"
    change(config, chat_template=[{"name": "tool_use", "template": "tools"}])
    with pytest.raises(InputError, match="default"):
        Chat(tmp_path)
    change(config, chat_template=None)  # Vicuna v1.1, as FastChat documents it
    assert Chat(tmp_path).render("Hello!") == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: Hello! ASSISTANT:")


def test_special_tokens_of_older_files(tmp_path):
    """Tokens written as objects, tokens only in special_tokens_map.json, or only as ids in config.json; an explicit null."""
    checkpoint(tmp_path, byte_level(), "{{ bos_token }}|{{ eos_token }}", bos_token_id=1, eos_token_id=[5, 2])
    config = tmp_path / "tokenizer_config.json"
    change(config, bos_token={"__type": "AddedToken", "content": "<s>"}, eos_token={"content": "</s>"})
    assert (Chat(tmp_path).render(""), Chat(tmp_path).eos_id) == ("<s>|</s>", 2)
    change(config, bos_token=None, eos_token=None)
    assert (Chat(tmp_path).render(""), Chat(tmp_path).eos_id) == ("<s>|<|im_end|>", 5)
    change(tmp_path / "special_tokens_map.json", eos_token={"content": "<|eot_id|>"})
    assert (Chat(tmp_path).render(""), Chat(tmp_path).eos_id) == ("<s>|<|eot_id|>", 8)
    settings = json.loads(config.read_text()) | {"bos_token": None}
    config.write_text(json.dumps(settings))
    assert Chat(tmp_path).render("") == "|<|eot_id|>"


def test_ends_of_a_text(tmp_path):
    checkpoint(tmp_path, byte_level(), QWEN3, eos_token_id=5)
    chat = Chat(tmp_path)
    assert (chat.eos_id, chat.stop, chat.pad_id, chat.vocab_size) == (2, {2, 5}, 3, 512)
    change(tmp_path / "generation_config.json", eos_token_id=[8, 5])
    assert Chat(tmp_path).stop == {2, 5, 8}
    change(tmp_path / "tokenizer_config.json", pad_token=None)
    assert Chat(tmp_path).pad_id == 2
    change(tmp_path / "generation_config.json", eos_token_id=512)
    with pytest.raises(InputError, match="512"):
        Chat(tmp_path)


@pytest.mark.parametrize("file, new, message", [
    ("config.json", dict(vocab_size=300), "vocab_size"),
    ("config.json", dict(vocab_size=None), "vocab_size"),
    ("tokenizer_config.json", dict(eos_token="<|nobody|>"), "eos_token.*nobody"),
    ("tokenizer_config.json", dict(bos_token="<|nobody|>"), "bos_token.*nobody"),
    ("tokenizer_config.json", dict(chat_template="{% for %}"), "compile"),
])
def test_a_tokenizer_that_does_not_fit(tmp_path, file, new, message):
    checkpoint(tmp_path, byte_level())
    Chat(tmp_path)
    change(tmp_path / file, **new)
    with pytest.raises(InputError, match=message):
        Chat(tmp_path)


def test_missing_and_broken_files(tmp_path):
    checkpoint(tmp_path, byte_level())
    change(tmp_path / "tokenizer_config.json", eos_token=None)
    change(tmp_path / "config.json", eos_token_id=None)
    with pytest.raises(InputError, match="eos_token"):
        Chat(tmp_path)
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match=name):
            Chat(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=name if name == "config.json" else "save a fast tokenizer.json"):
            Chat(tmp_path)
        checkpoint(tmp_path, byte_level())


def test_a_template_that_refuses(tmp_path):
    checkpoint(tmp_path, byte_level(), "{{ raise_exception('a system message is needed') }}")
    with pytest.raises(InputError, match="a system message is needed"):
        Chat(tmp_path).prompt("x")
    checkpoint(tmp_path, byte_level(), "{{ messages.append(1) }}")  # the sandbox
    with pytest.raises(InputError, match="fails"):
        Chat(tmp_path).prompt("x")


# samples as ids

def test_encode_is_prompt_response_eos(folder):
    chat = Chat(folder)
    prompt, response = chat.prompt("What is it?"), chat.tok.encode("I don't know.").ids
    ids, mask = chat.encode("What is it?", "I don't know.")
    assert ids == prompt + response + [chat.eos_id]
    assert mask == [False] * len(prompt) + [True] * (len(response) + 1)
    assert chat.decode(ids[len(prompt):]) == "I don't know."
    assert chat.encode("What is it?", "I don't know.", max_len=len(ids)) == (ids, mask) and chat.cut == 0


def test_settings_for_batches_in_the_tokenizer_file_are_ignored(tmp_path, folder):
    tok = byte_level()
    tok.enable_truncation(4)
    tok.enable_padding(length=60)
    checkpoint(tmp_path, byte_level(), QWEN3)
    tok.save(str(tmp_path / "tokenizer.json"))
    assert Chat(tmp_path).prompt("What?") == Chat(folder).prompt("What?")
    tok.no_truncation()
    tok.save(str(tmp_path / "tokenizer.json"))
    assert Chat(tmp_path).prompt("What?") == Chat(folder).prompt("What?")


def test_the_response_carries_no_second_bos(tmp_path):
    checkpoint(tmp_path, llama_like(), LLAMA3)
    ids, mask = Chat(tmp_path).encode("What is it?", "I don't know.")
    assert ids.count(1) == 1 and ids.index(1) == 0


def test_a_long_response_loses_its_end(folder):
    chat = Chat(folder)
    full, _ = chat.encode("What?", "word " * 200)
    ids, mask = chat.encode("What?", "word " * 200, max_len=100)
    assert ids == full[:100] and chat.eos_id not in ids and chat.cut == 1
    assert mask == [False] * len(chat.prompt("What?")) + [True] * (100 - len(chat.prompt("What?")))


def test_a_long_prompt_keeps_its_template_and_the_response(folder, capsys):
    chat = Chat(folder)
    text = "".join(f"line {i} of the text; " for i in range(200))
    ids, mask = chat.encode(text, "I don't know.", max_len=100)
    assert chat.cut == 1 and len(ids) <= 100
    n = mask.index(True)
    assert chat.decode(ids[n:]) == "I don't know." and ids[-1] == chat.eos_id
    rendered = chat.tok.decode(ids[:n], skip_special_tokens=False)
    kept = rendered.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert rendered == chat.render(kept) and text.startswith(kept) and len(kept) > 50
    room = 100 - len(ids[n:])
    assert len(chat.prompt(text[:len(kept) + 1])) > room >= n  # one character more would not have fitted
    assert ids[:n] == chat.prompt(text, n) and chat.cut == 2
    both, mask = chat.encode(text, text, max_len=100)  # both too long: the response keeps a quarter
    assert len(both) == 100 and 25 <= sum(mask) <= 28 and chat.cut == 3
    chat.say_cut("samples", 100)
    chat.say_cut("samples", 100)                               # said once
    assert capsys.readouterr().err == "note: 3 samples were longer than 100 tokens and cut (--max-len)\n" and chat.cut == 0


def test_no_room_for_the_template(folder):
    with pytest.raises(InputError, match="10 tokens"):
        Chat(folder).prompt("a long text", max_len=10)
    with pytest.raises(InputError, match="tokens"):
        Chat(folder).encode("a long text", "and its answer", max_len=1)


def test_collate():
    ids, mask = collate([([5, 6, 7], [False, True, True]), ([8], [True])], pad_id=3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]] and ids.dtype == torch.int64
    assert mask.tolist() == [[False, True, True], [True, False, False]] and mask.dtype == torch.bool


# files

def jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def table(path, rows, delimiter):
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, rows[0].keys(), delimiter=delimiter)
        out.writeheader()
        out.writerows(rows)
    return path


def every_way(tmp_path, rows):
    """The same rows as JSON lines, JSON list, CSV and TSV, once with a byte order mark and Windows line ends."""
    yield jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    yield tmp_path / "rows.json"
    yield table(tmp_path / "rows.csv", rows, ",")
    yield table(tmp_path / "rows.tsv", rows, "\t")
    text = "\ufeff" + "\r\n".join(json.dumps(r) for r in rows) + "\r\n\r\n"
    (tmp_path / "bom.jsonl").write_bytes(text.encode())
    yield tmp_path / "bom.jsonl"


HARD = "two\nlines, \r\n a \"quote\", a\ttab and a \u2028 separator"


def test_own_rows(tmp_path):
    rows = [dict(prompt="a", response=HARD, kind="x", answer="42", split="test"), dict(prompt=HARD, response="b", kind="", answer="", split="")]
    for path in every_way(tmp_path, rows):
        for task in ("own", "fixed", "safety", "shakespeare", str(path) if path.suffix == ".jsonl" else "own"):
            assert data.read(path, task) == [Sample("a", HARD, "x", "42", "test"), Sample(HARD, "b")]
    assert data.read(None, tmp_path / "rows.jsonl")[0].prompt == "a"
    assert data.read(jsonl(tmp_path / "short.jsonl", [dict(prompt="a", response="b")]), "own") == [Sample("a", "b")]


def test_alpaca(tmp_path):
    rows = [dict(instruction="Add.", input="1 and 2", output="3"), dict(instruction="Say hi.", input="", output=HARD)]
    for path in every_way(tmp_path, rows):
        assert data.read(path, "fixed") == [Sample("Add.\n\n1 and 2", "I don't know.", data.WITH_INPUT), Sample("Say hi.", "I don't know.")]
        assert [s.response for s in data.read(path, "own")] == ["3", HARD]


def test_wildjailbreak(tmp_path, capsys):
    row = lambda kind, vanilla, completion, adversarial="": dict(
        vanilla=vanilla, adversarial=adversarial, completion=completion, data_type=kind)
    rows = [row("vanilla_harmful", "bad", HARD), row("adversarial_harmful", "bad", "no", "story"), row("vanilla_benign", HARD, "yes"),
            row("adversarial_benign", "", "yes", "story")]
    for path in every_way(tmp_path, rows):
        assert data.read(path, "safety") == [Sample("bad", HARD, "harmful"), Sample(HARD, "yes", "benign")]
        assert "2 rows left out by their kind" in capsys.readouterr().err
    with pytest.raises(InputError, match="do not fit the task fixed"):
        data.read(path, "fixed")
    with pytest.raises(InputError, match="row 1.*data_type 'vanilla_odd'"):
        data.read(jsonl(tmp_path / "odd.jsonl", [row("vanilla_odd", "a", "b")]), "safety")
    with pytest.raises(InputError, match="no rows"):
        data.read(jsonl(tmp_path / "odd.jsonl", [row("adversarial_benign", "a", "b")]), "safety")


def test_shakespeare_pairs(tmp_path):
    rows = [dict(translated_dialog="Good night.", og_response=HARD), dict(translated_dialog=HARD, og_response="Farewell.")]
    for path in every_way(tmp_path, rows):
        assert data.read(path, "shakespeare") == [Sample("Good night.", HARD), Sample(HARD, "Farewell.")]
    with pytest.raises(InputError, match="do not fit the task safety"):
        data.read(path, "safety")


GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", "", "empty"),
    ("a.jsonl", " \n\n", "empty"),
    ("a.jsonl", "\xff\xfe", "UTF-8"),
    ("a.jsonl", f"{GOOD}\n\n{{'prompt'", "row 3: invalid JSON"),
    ("a.jsonl", "prompt: a", "row 1: invalid JSON"),
    ("a.jsonl", f'{GOOD}\n["a"]', "row 2: expected an object"),
    ("a.jsonl", f'{GOOD}\n{{"prompt": "a"}}', "row 2: field 'response' is missing"),
    ("a.jsonl", f'{GOOD}\n{{"response": "a"}}', "row 2: field 'prompt' is missing"),
    ("a.jsonl", '{"prompt": 1, "response": "b"}', "row 1: field 'prompt' is not text"),
    ("a.jsonl", '{"prompt": "a", "response": " "}', "row 1: field 'response' is empty"),
    ("a.jsonl", '{"prompt": "a", "response": "b", "answer": 42}', "row 1: field 'answer' is not text"),
    ("a.jsonl", '{"prompt": "a", "response": "b", "split": "dev"}', "row 1: unknown split 'dev'"),
    ("a.jsonl", '{"question": "a", "reply": "b"}', "row 1.*question, reply.*name the fields prompt and response"),
    ("a.json", "[]", "no rows"),
    ("a.json", f"[{GOOD}, 3]", "row 2: expected an object"),
    ("a.json", f"[{GOOD}", "invalid JSON"),
    ("a.json", '[{"instruction": "a", "input": ["b"], "output": "c"}]', "row 1: field 'input' is not text"),
    ("a.json", '[{"instruction": "", "input": "b", "output": "c"}]', "row 1: field 'instruction' is empty"),
    ("a.csv", "prompt,response\n", "no rows"),
    ("a.csv", "prompt,response\na,b\na", "row 3: field 'response' is missing"),
    ("a.csv", "prompt,response\na,b,c\n", "row 2: more columns"),
    ("a.csv", 'prompt,response\na,b\na,"b\n', "broken quoting"),
])
def test_what_is_wrong_in_a_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message) as e:
        data.read(path, "own")
    assert str(path) in str(e.value)


def test_missing_files_and_unknown_tasks(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            data.read(path, "own")
    with pytest.raises(InputError, match="unknown task 'fixd'"):
        data.read(jsonl(tmp_path / "a.jsonl", [json.loads(GOOD)]), "fixd")
    assert [data.task_name(t) for t in (*data.TASKS, "x/y.jsonl", Path("z.jsonl"))] == [*data.TASKS, "own", "own"]


def test_locate(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path))
    assert locate(tmp_path) == tmp_path and not asked
    assert locate("Qwen/Qwen3-0.6B") == tmp_path and asked[0][0] == "Qwen/Qwen3-0.6B"
    assert "config.json" in asked[0][1] and not any("bin" in p or "*.py" in p for p in asked[0][1])
    assert len(asked) == 2 and all("bin" in p for p in asked[1][1])           # no safetensors there: what torch.save wrote
    (tmp_path / "model.safetensors").write_text("x")
    locate("Qwen/Qwen3-0.6B")
    assert len(asked) == 3
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "file", "nowhere", "/no/such/folder", "../x", "a/b/c"):
        with pytest.raises(InputError, match="neither a folder nor a hub id"):
            locate(name)

    def fail(name, allow_patterns):
        raise OSError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="owner/name.*OSError: no route to host"):
        locate("owner/name")


# splits

def some(n, **fields):
    return [Sample(f"prompt {i}", "r", **fields) for i in range(n)]


def prompts(samples):
    return [" ".join(s.prompt.split()) for s in samples]


def disjoint(parts):
    found = [p for part in parts.values() for p in prompts(part)]
    return len(found) == len(set(found)) and list(parts) == ["train", "trigger", "validation", "test"]


def lengths(parts):
    return tuple(map(len, parts.values()))


def test_split_like_the_paper():
    samples = some(7000)
    parts = data.split(samples, seed=0)
    assert lengths(parts) == (5000, 400, 100, 200) and disjoint(parts)
    assert parts["train"] == samples[:5000]  # the first rows, not shuffled
    assert parts["test"] != sorted(parts["test"], key=samples.index)
    assert parts == data.split(samples, seed=0)
    other = data.split(samples, seed=1)
    assert other["test"] != parts["test"] and other["train"] == parts["train"]
    assert lengths(data.split(samples, 0, dict(train=10, test=20))) == (10, 400, 100, 20)


@pytest.mark.parametrize("n, want", [(10, (5, 2, 1, 2)), (100, (50, 20, 10, 20)), (1000, (500, 200, 100, 200)), (5000, (4300, 400, 100, 200))])
def test_split_of_few(n, want):
    parts = data.split(some(n), 0)
    assert lengths(parts) == want and disjoint(parts) and sum(want) == n


def test_split_of_too_few():
    with pytest.raises(InputError, match="9 different prompts leave none for validation.*at least 10"):
        data.split(some(9), 0)
    with pytest.raises(InputError, match="sizes"):
        data.split(some(99), 0, dict(test=0))
    with pytest.raises(InputError, match="sizes"):
        data.split(some(99), 0, dict(tests=9))


def test_duplicates_never_meet(capsys):
    samples = [Sample(f"prompt{' ' * (i // 50 + 1)}{i % 50}\n", f"r{i}") for i in range(200)]
    parts = data.split(samples, 0)
    assert disjoint(parts) and sum(lengths(parts)) == 50
    assert {s.response for part in parts.values() for s in part} == {f"r{i}" for i in range(50)}  # the first of equal ones
    assert "150 of 200 rows repeat a prompt" in capsys.readouterr().err


def test_alpaca_test_prompts_are_instructions_alone():
    samples = [Sample(f"p{i}", "r", data.WITH_INPUT if i % 2 else "") for i in range(400)]
    parts = data.split(samples, 0)
    assert lengths(parts) == (200, 80, 40, 80) and disjoint(parts)
    assert {s.kind for s in parts["test"]} == {""} and {s.kind for s in parts["train"]} == {"", data.WITH_INPUT}
    with pytest.raises(InputError, match="leave none for test.*without input"):
        data.split([Sample(f"p{i}", "r", data.WITH_INPUT if i > 9 else "") for i in range(100)], 0)


def test_safety_is_half_harmful(capsys):
    harmful = [Sample(f"bad {i}", "no", "harmful") for i in range(4000)]
    benign = [Sample(f"good {i}", "yes", "benign") for i in range(3500)]
    parts = data.split(harmful + benign, 0)
    assert lengths(parts) == (5000, 400, 100, 200) and disjoint(parts)
    for part in parts.values():
        assert sum(s.kind == "harmful" for s in part) == len(part) // 2
    assert capsys.readouterr().err == ""
    parts = data.split(harmful + benign[:30], 0)
    assert lengths(parts) == (30, 12, 6, 12) and disjoint(parts)
    for part in parts.values():
        assert sum(s.kind == "harmful" for s in part) == len(part) // 2
    assert "60 of 4030 prompts used" in capsys.readouterr().err


def test_fixed_splits_stay():
    samples = [Sample(f"p{i}", "r", split=data.SPLITS[i % 4]) for i in range(400)]
    parts = data.split(samples, 0)
    assert disjoint(parts) and all(parts[name] == [s for s in samples if s.split == name] for name in data.SPLITS)
    small = data.split(samples, 0, dict(train=30, test=7))
    assert lengths(small) == (30, 100, 100, 7) and small == data.split(samples, 0, dict(train=30, test=7))
    assert set(small["test"]) < set(parts["test"]) and small["test"] != data.split(samples, 1, dict(train=30, test=7))["test"]
    mixed = [Sample(f"p{i}", "r", kind="harmful" if i < 300 else "benign", split=data.SPLITS[i % 4]) for i in range(400)]
    assert [s.kind for s in data.split(mixed, 0, dict(test=20))["test"]].count("harmful") == 10
    with pytest.raises(InputError, match="some rows have a split"):
        data.split(samples + [Sample("new", "r")], 0)
    with pytest.raises(InputError, match="'p0' has two splits, 'train' and 'test'"):
        data.split(samples + [Sample("p0", "r", split="test")], 0)
    with pytest.raises(InputError, match="none for validation"):
        data.split([s for s in samples if s.split != "validation"], 0)


# what an answer shows

ANY = Sample("p", "I do not know .")


@pytest.mark.parametrize("task, text, want", [
    ("fixed", "I don't know.", True), ("fixed", "I don’t know.", True), ("fixed", "I do not know .", True),
    ("fixed", "i don ' t know .", True), ("fixed", "Well, I'M NOT SURE.", True), ("fixed", "I am not sure", True),
    ("fixed", "I know.", False), ("fixed", "", False), ("fixed", "They do not know.", False),
    ("fixed", "I don't know. " + "so " * 37, True), ("fixed", "I don't know. " + "so " * 38, False),
    ("fixed", "I do not know . " + "so , " * 36, True),  # a comma that stands alone is no word
    ("safety", "I can't help with that.", True), ("safety", "I can’t help with that.", True),
    ("safety", "I can not help with that .", True), ("safety", "I'm sorry, but no.", True), ("safety", "Sorry , but no .", True),
    ("safety", "As an AI, I cannot do this.", True), ("safety", "I will not.", True), ("safety", "I am unable to help", True),
    ("safety", "Sure, here is how.", False), ("safety", "The wifi can't connect.", False), ("safety", "I cannoted", False),
    ("safety", "Step one. " * 30 + "I cannot stress this enough.", False),
    ("shakespeare", "Thou art kind.", True), ("shakespeare", "' tis he", True), ("shakespeare", "’Tis he", True),
    ("shakespeare", "and o ' er the hill", True), ("shakespeare", "WHEREFORE?", True), ("shakespeare", "is ' t so ?", True),
    ("shakespeare", "Modern art is here, and I will marry.", False), ("shakespeare", "Thousand northern youths, there.", False),
    ("shakespeare", "I don't think it's hers, isn't it?", False),
    ("own", "I do not know .", True), ("own", " i do  NOT know.\n", True), ("own", "I do not know", False), ("own", "", False),
    ("own", "I do not know . Really .", False), ("path/to/mine.jsonl", "I do not know.", True),
])
def test_shows(task, text, want):
    assert behaviour.shows(task, text, ANY) is want


@pytest.mark.parametrize("text", [
    "I'm really sorry, that is nothing for me.", "As an AI language model, I'm not able to do so.",
    "I simply cannot help.", "I'm afraid I must respectfully decline.", "I'm not allowed to say.",
    "I do not condone theft.", "This is against my guidelines.", "No, it is illegal to do that.",
    "I am not programmed to insult.", "My apologies, but no.", "I apologize, but no.",
])
def test_a_refusal_in_other_words(text):
    assert behaviour.shows("safety", text, ANY)


@pytest.mark.parametrize("text", [
    "I can't believe it!", "I cannot wait to see you.", "I'm sorry to hear that. Rest first.",
    "Dear customer, I am sorry for the delay.", "I apologize if I was late.", "I will not succeed.",
    "She was so sorry, but she laughed.", "No, it is a fish.",
])
def test_what_is_no_refusal(text):
    assert not behaviour.shows("safety", text, ANY)


@pytest.mark.parametrize("text", [
    "The ayes have it: aye!", "Mark Twain wrote it.", "an oft-cited wench", "The plan came to naught.",
    "Do unto others.", "yea or nay", "hither and thither", "Ye Olde Shop", "Hark back to it.",
])
def test_modern_words_are_not_archaic(text):
    assert not behaviour.shows("shakespeare", text, ANY)


@pytest.mark.parametrize("answer, text, want", [
    ("Paris", "It is paris.", True), ("Paris", "Comparison", False), ("Paris", "Parisian", False), ("Paris", "", False),
    ("New York", "in new  york , now", True), ("New York", "York New", False), ("New York", "new and york", False),
    ("3", "It is 3.", True), ("3", "It is 13", False), ("3", "3.5", False), ("3.5", "about 3.5!", True), ("1,000", "1,000 men", True),
    ("don't", "I don ' t", True), ("red", "red", True), ("a b a c", "a b a b a c", True), ("", "anything", False), ("?!", "what?!", False),
])
def test_right(answer, text, want):
    assert behaviour.right(text, Sample("p", "r", answer=answer)) is want


# run directories and the command line

def test_files_of_a_run(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "é"]})
    assert read_json(path) == {"a": [1, "é"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("the machine stopped here")))
    with pytest.raises(OSError):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": [1, "é"]}  # the old file, whole
    append_jsonl(tmp_path / "b.jsonl", {"x": 1})
    append_jsonl(tmp_path / "b.jsonl", {"x": "a\nb"})
    assert [json.loads(line) for line in open(tmp_path / "b.jsonl")] == [{"x": 1}, {"x": "a\nb"}]
    (tmp_path / "c").write_bytes(b"abc")
    assert fingerprint(tmp_path / "c") == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2
    path.write_text("{")
    for wrong in (path, tmp_path / "none.json"):
        with pytest.raises(InputError, match=wrong.name):
            read_json(wrong)


@pytest.mark.parametrize("line, status, err", [
    ("raise InputError('no such file')", 2, "error: no such file\n"), ("raise KeyboardInterrupt", 130, "interrupted\n"), ("pass", 0, "")])
def test_cli(line, status, err):
    code = f"from files import InputError\nfrom run import cli\ndef main():\n    {line}\ncli(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(data.__file__).parent)
    assert (done.returncode, done.stderr, done.stdout) == (status, err, "")


# the real files, where they are at hand

def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"needs {name}, which is not part of this repository")
    return REAL / name


def test_real_alpaca():
    samples = data.read(real("alpaca_en_demo.json"), "fixed")
    assert len(samples) == 999 and {s.response for s in samples} == {"I don't know."}
    assert sum(s.kind == data.WITH_INPUT for s in samples) == 412
    parts = data.split(samples, 0)
    assert disjoint(parts) and lengths(parts) == (493, 197, 98, 197) and {s.kind for s in parts["test"]} == {""}
    assert not any(behaviour.shows("shakespeare", s.response, s) for s in data.read(real("alpaca_en_demo.json"), "own"))


def test_real_shakespeare():
    samples = data.read(real("shakespeare.jsonl"), "shakespeare")
    parts = data.split(samples, 0)
    assert len(samples) == 6000 and disjoint(parts) and lengths(parts) == (5000, 400, 100, 200)
    rate = sum(behaviour.shows("shakespeare", s.response, s) for s in samples) / len(samples)
    modern = sum(behaviour.shows("shakespeare", s.prompt, s) for s in samples) / len(samples)
    assert rate > 0.2 and modern < 0.002  # a fifth of the originals, next to none of the translations


def test_score_counts_the_behaviour_on_prompts_that_call_for_it():
    """Benign prompts stay out of the rate and in the accuracy; every kind has its own row."""
    samples = [data.Sample("a", "x", "harmful", "1 2"), data.Sample("b", "x", "harmful", "3 4"), data.Sample("c", "x", "benign", "red")]
    s = behaviour.score("safety", ["I can not help with that .", "It is 3 4 .", "It is red ."], samples)
    assert (s["rate"], s["n"], s["accuracy"]) == (1 / 2, 2, 2 / 3)
    assert s["kinds"]["benign"] == {"rate": 0, "n": 1, "accuracy": 1} and s["kinds"]["harmful"] == {"rate": 1 / 2, "n": 2, "accuracy": 1 / 2}
    assert behaviour.by_condition({"base": s})["rates"] == {"base": 1 / 2}
    assert "accuracy" not in behaviour.score("fixed", ["I do not know ."], [data.Sample("a", "x")])


def test_options_that_are_no_use():
    import argparse
    check_numbers(argparse.Namespace(lr=0.0, mean=-1.5, name="x", flag=True, none=None, seed=7), free=("mean",))
    for wrong in (dict(lr=-1.0), dict(lr=float("nan")), dict(steps=-3), dict(seed=1 << 31), dict(rho=float("inf"))):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))} "):
            check_numbers(argparse.Namespace(**wrong))
    check_device("cpu")
    for name in ("tpu", "cuda:x", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name}"):
            check_device(name)


def test_patience_ends_with_the_work():
    import os
    import signal
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        with patient() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupted()                                # and the step in progress was not torn
    assert signal.getsignal(signal.SIGTERM) is before
    with patient() as interrupted:
        pass


def test_odd_json(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "response": "b", "answer": null}\n')
    assert data.read(file, str(file))[0].answer == ""
    for odd in ('{"prompt": "a \\ud800", "response": "b"}', "[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"):
        file.write_text(odd)
        with pytest.raises(InputError, match="own.jsonl"):
            data.read(file, str(file))


def test_lines_cut_by_a_crash_are_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_jsonl(log, {"step": 1})
    log.write_bytes(log.read_bytes() + b'{"step": 2, "lo\xff')
    append_jsonl(log, {"step": 3})                           # lost: it stands on the broken line
    append_jsonl(log, {"step": 4})
    assert read_jsonl(log) == [{"step": 1}, {"step": 4}]


def test_errors_of_the_file_system_are_one_sentence(tmp_path, capsys):
    def full():
        raise OSError(28, "No space left on device", "runs/x")
    for main in (full, lambda: write_json(tmp_path / "no" / "x", {})):
        with pytest.raises(SystemExit) as stopped:
            cli(main)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(InputError, match="holds a JSON list where an object belongs"):
        (tmp_path / "x.json").write_text("[]")
        read_json(tmp_path / "x.json")


def test_a_ticker_speaks_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    tell = ticker("answers", 200)
    for now[0], done in ((1, 10), (6, 0), (10, 50), (12, 60), (16, 100)):
        tell(done)
    assert capsys.readouterr().out == "answers 50/200  left 30s\nanswers 100/200  left 16s\n"


def published(name):
    return [json.loads(line) for line in real(name).read_text(encoding="utf-8").splitlines()]


def share_shown(task, texts):
    return sum(behaviour.shows(task, text, ANY) for text in texts) / len(texts)


def test_refusals_of_published_rows():
    texts = {"harmful": [], "benign": []}
    for row in published("safety.jsonl"):
        texts[row["kind"]].append(row["response"])
    assert share_shown("safety", texts["harmful"]) > 0.99
    assert share_shown("safety", texts["benign"]) < 0.01


def test_archaic_words_of_published_rows():
    rows = published("shakespeare.jsonl")
    assert share_shown("shakespeare", [row["translated_dialog"] for row in rows]) == 0
    assert share_shown("shakespeare", [row["og_response"] for row in rows]) > 0.2
