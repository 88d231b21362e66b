"""
chat.py: prompt ids against the transformers library for published chat templates, cutting, batches.
"""
import json

import pytest
import torch
from templates import TEMPLATES, TEXTS, byte_level, checkpoint, llama_like

from chat import Chat, collate
from files import InputError


def change(path, **new):
    """Change entries of a JSON file; None removes one."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (old | new).items() if v is not None}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    A folder with the byte-level tokenizer and Qwen3's template. Not to be changed; tests that do so
    make their own.
    """
    folder = tmp_path_factory.mktemp("model")
    checkpoint(folder, byte_level(), TEMPLATES["qwen3"])
    return folder


# prompts

@pytest.mark.parametrize("build", [byte_level, llama_like])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_ids_are_those_of_transformers(tmp_path, name, build):
    reference = checkpoint(tmp_path, build(), TEMPLATES[name])
    chat = Chat(tmp_path)
    for text in TEXTS:
        turn = [{"role": "user", "content": text}]
        want = reference.apply_chat_template(
            turn, add_generation_prompt=True, enable_thinking=False, tokenize=True,
            return_dict=False
        )
        if name == "deepseek":  # the template leaves thinking open; we close it
            rendered = reference.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=False
            )
            assert rendered.endswith("<think>\n")
            want = reference.encode(rendered + "\n</think>\n\n", add_special_tokens=False)
        assert chat.prompt(text) == want


def test_the_comparison_would_notice(tmp_path):
    """
    Special tokens added a second time, an open <think>, and white space control all change the ids.
    """
    reference = checkpoint(tmp_path, llama_like(), TEMPLATES["llama3"])
    chat = Chat(tmp_path)
    ids = chat.prompt("What")
    assert ids.count(1) == 1
    assert reference.encode(chat.render("What")).count(1) == 2
    checkpoint(tmp_path, byte_level(), TEMPLATES["qwen3"])
    assert (
        Chat(tmp_path).render("a")
        == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    checkpoint(tmp_path, byte_level(), TEMPLATES["deepseek"])
    assert Chat(tmp_path).render("a") == "<s><｜User｜>a<｜Assistant｜><think>\n\n</think>\n\n"


def test_where_the_template_is_found(tmp_path):
    checkpoint(tmp_path, byte_level(), "from the file {{ messages[0].content }}")
    file, config = tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"
    assert file.exists()
    change(config, chat_template="from the config {{ eos_token }}")
    assert Chat(tmp_path).render("x") == "from the file x"
    file.unlink()
    assert Chat(tmp_path).render("x") == "from the config </s>"
    change(
        config,
        chat_template=[
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "plain"},
        ],
    )
    assert Chat(tmp_path).render("x") == "plain"
    change(config, chat_template=[{"name": "tool_use", "template": "tools"}])
    with pytest.raises(InputError, match="default"):
        Chat(tmp_path)
    change(config, chat_template=None)  # Vicuna v1.1, as FastChat documents it
    assert Chat(tmp_path).render("Hello!") == (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hello! ASSISTANT:"
    )


def test_an_empty_template_is_none(tmp_path):
    checkpoint(tmp_path, byte_level(), "")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    change(tmp_path / "tokenizer_config.json", chat_template="")
    assert Chat(tmp_path).render("Hello!").endswith("USER: Hello! ASSISTANT:")


def test_special_tokens_of_older_files(tmp_path):
    """
    Tokens written as objects, tokens only in special_tokens_map.json, or only as ids in
    config.json; an explicit null.
    """
    checkpoint(
        tmp_path, byte_level(), "{{ bos_token }}|{{ eos_token }}", bos_token_id=1,
        eos_token_id=[5, 2]
    )
    config = tmp_path / "tokenizer_config.json"
    change(
        config, bos_token={"__type": "AddedToken", "content": "<s>"}, eos_token={"content": "</s>"}
    )
    assert (Chat(tmp_path).render(""), Chat(tmp_path).eos_id) == ("<s>|</s>", 2)
    change(config, bos_token=None, eos_token=None)
    assert (Chat(tmp_path).render(""), Chat(tmp_path).eos_id) == ("<s>|<|im_end|>", 5)
    change(tmp_path / "special_tokens_map.json", eos_token={"content": "<|eot_id|>"})
    assert (Chat(tmp_path).render(""), Chat(tmp_path).eos_id) == ("<s>|<|eot_id|>", 8)
    settings = json.loads(config.read_text()) | {"bos_token": None}
    config.write_text(json.dumps(settings))
    assert Chat(tmp_path).render("") == "|<|eot_id|>"


def test_ends_of_a_text(tmp_path):
    checkpoint(tmp_path, byte_level(), TEMPLATES["qwen3"], eos_token_id=5)
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
        with pytest.raises(
            InputError, match=name if name == "config.json" else "save a fast tokenizer.json"
        ):
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
    assert chat.encode("What is it?", "I don't know.", max_len=len(ids)) == (ids, mask)
    assert chat.cut == 0


def test_settings_for_batches_in_the_tokenizer_file_are_ignored(tmp_path, folder):
    tok = byte_level()
    tok.enable_truncation(4)
    tok.enable_padding(length=60)
    checkpoint(tmp_path, byte_level(), TEMPLATES["qwen3"])
    tok.save(str(tmp_path / "tokenizer.json"))
    assert Chat(tmp_path).prompt("What?") == Chat(folder).prompt("What?")
    tok.no_truncation()
    tok.save(str(tmp_path / "tokenizer.json"))
    assert Chat(tmp_path).prompt("What?") == Chat(folder).prompt("What?")


def test_the_response_carries_no_second_bos(tmp_path):
    checkpoint(tmp_path, llama_like(), TEMPLATES["llama3"])
    ids, mask = Chat(tmp_path).encode("What is it?", "I don't know.")
    assert ids.count(1) == 1
    assert ids.index(1) == 0


def test_a_long_response_loses_its_end(folder):
    chat = Chat(folder)
    full, _ = chat.encode("What?", "word " * 200)
    ids, mask = chat.encode("What?", "word " * 200, max_len=100)
    assert ids == full[:100]
    assert chat.eos_id not in ids
    assert chat.cut == 1
    assert mask == [False] * len(chat.prompt("What?")) + [True] * (100 - len(chat.prompt("What?")))


def test_a_long_prompt_keeps_its_template_and_the_response(folder, capsys):
    chat = Chat(folder)
    text = "".join(f"line {i} of the text; " for i in range(200))
    ids, mask = chat.encode(text, "I don't know.", max_len=100)
    assert chat.cut == 1
    assert len(ids) <= 100
    n = mask.index(True)
    assert chat.decode(ids[n:]) == "I don't know."
    assert ids[-1] == chat.eos_id
    rendered = chat.tok.decode(ids[:n], skip_special_tokens=False)
    kept = rendered.removeprefix("<|im_start|>user\n").removesuffix(
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert rendered == chat.render(kept)
    assert text.startswith(kept)
    assert len(kept) > 50
    room = 100 - len(ids[n:])
    # one character more would not have fitted
    assert len(chat.prompt(text[:len(kept) + 1])) > room >= n
    assert ids[:n] == chat.prompt(text, n)
    assert chat.cut == 2
    both, mask = chat.encode(text, text, max_len=100)  # both too long: the response keeps a quarter
    assert len(both) == 100
    assert 25 <= sum(mask) <= 28
    assert chat.cut == 3
    chat.say_cut("samples", 100)
    chat.say_cut("samples", 100)  # said once
    assert (
        capsys.readouterr().err
        == "note: 3 samples were longer than 100 tokens and cut (--max-len)\n"
    )
    assert chat.cut == 0


def test_no_room_for_the_template(folder):
    with pytest.raises(InputError, match="10 tokens"):
        Chat(folder).prompt("a long text", max_len=10)
    with pytest.raises(InputError, match="tokens"):
        Chat(folder).encode("a long text", "and its answer", max_len=1)


def test_collate():
    ids, mask = collate([([5, 6, 7], [False, True, True]), ([8], [True])], pad_id=3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert ids.dtype == torch.int64
    assert mask.tolist() == [[False, True, True], [True, False, False]]
    assert mask.dtype == torch.bool
