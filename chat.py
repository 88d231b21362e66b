"""
Text ↔ ids: the tokenizer and chat template of a checkpoint, and batches of what they give.

Shapes: B sequences in a batch, T tokens in a sequence.
"""
import bisect
import json
import sys
from datetime import datetime
from pathlib import Path

import torch
from jinja2 import TemplateError, ext, nodes, sandbox
from tokenizers import Tokenizer

import spm
from files import InputError, read_json

VICUNA = ("{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. The assistant gives "
          "helpful, detailed, and polite answers to the user's questions. {% for m in messages %}{% if m.role == 'user' %}"
          "USER: {{ m.content }} ASSISTANT:{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")


class Generation(ext.Extension):
    tags = {"generation"}  # {% generation %} marks the assistant's text in some templates: passed through

    def parse(self, parser):
        next(parser.stream)
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True))


def compile_template(text):
    """A chat template, given the extensions, filters and globals that the transformers library gives it."""
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return env.from_string(text)


class Chat:
    """
    Tokenizer and chat template of a model folder; the only place where text becomes ids.

    eos_id   ends a response              pad_id       fills a batch (eos_id where the tokenizer has none)
    stop     set of ids that end a text   vocab_size   rows of the model's embedding (config.json)
    cut      how many texts encode() and prompt() have shortened so far

    Raises InputError where tokenizer.json (or tokenizer.model) is missing, the template is broken or the tokenizer does not fit the model.
    """

    def __init__(self, folder):
        self.folder, self.cut = Path(folder), 0
        config, generation, special, settings = (
            read_json(self.folder / name) if name == "config.json" or (self.folder / name).exists() else {}
            for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"))
        path, self.vocab_size = self.folder / "tokenizer.json", config.get("vocab_size")
        if not path.exists() and (self.folder / "tokenizer.model").exists():
            path = self.folder / "tokenizer.model"
        try:
            self.tok = spm.tokenizer(path) if path.suffix == ".model" else Tokenizer.from_file(str(path))
        except InputError:
            raise
        except Exception as e:  # the library raises nothing finer
            raise InputError(f"{path} is missing or unreadable ({e}); save a fast tokenizer.json there, in transformers "
                             "by AutoTokenizer.from_pretrained(...).save_pretrained(...)") from None
        self.tok.no_truncation()
        self.tok.no_padding()
        token, largest = max(self.tok.get_vocab().items(), key=lambda item: item[1])
        if not isinstance(self.vocab_size, int) or largest >= self.vocab_size:
            raise InputError(f"{path}: token {token!r} has id {largest}, but vocab_size in config.json is "
                             f"{self.vocab_size}; use the model's own tokenizer")

        # special tokens by name; what tokenizer_config.json leaves out is looked up by the id in config.json
        self.special = {k: v["content"] if isinstance(v, dict) else v for k, v in {**special, **settings}.items()
                        if k.endswith("_token") and isinstance(v, (str, dict))}
        listed = lambda x: x if isinstance(x, list) else [] if x is None else [x]
        for name in ("bos_token", "eos_token"):
            for i in listed(config.get(f"{name}_id"))[:1]:
                if name not in settings or name == "eos_token":  # "bos_token": null says that there is none
                    self.special.setdefault(name, self.tok.id_to_token(i) or f"of id {i}")
            known = self.tok.token_to_id(self.special.get(name, "")) is not None
            if not known and (name in self.special or name == "eos_token"):
                raise InputError(f"{path} does not know the {name} {self.special.get(name, '(none named)')}; use the "
                                 "model's own tokenizer.json, tokenizer_config.json and config.json")
        self.eos_id = self.tok.token_to_id(self.special["eos_token"])
        pad = self.tok.token_to_id(self.special.get("pad_token", ""))
        self.pad_id = self.eos_id if pad is None else pad
        self.stop = {self.eos_id, *listed(config.get("eos_token_id")), *listed(generation.get("eos_token_id"))}
        if wrong := [i for i in self.stop if i not in range(self.vocab_size)]:
            raise InputError(f"{self.folder}: eos_token_id {wrong[0]} is outside the vocabulary of {self.vocab_size}")

        jinja = self.folder / "chat_template.jinja"
        try:
            text = jinja.read_text(encoding="utf-8") if jinja.exists() else settings.get("chat_template") or VICUNA
            if isinstance(text, list):  # several, by name
                text = {t["name"]: t["template"] for t in text}["default"]
            self.template = compile_template(text)
        except (TemplateError, KeyError, UnicodeDecodeError) as e:
            raise InputError(f"{self.folder}: the chat template does not compile ({e}); repair it") from None

    def ids(self, text):
        return self.tok.encode(text, add_special_tokens=False).ids

    def render(self, text, before=()):
        """
        The user's turn as the template writes it, up to where the answer begins, with thinking switched off (an open
        <think> is closed). before: messages of earlier turns, {"role", "content"}. Without a template: Vicuna v1.1.
        Raises InputError where the template fails.
        """
        messages = [*before, {"role": "user", "content": text}]
        try:
            out = self.template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                       enable_thinking=False, **self.special)
        except (TemplateError, TypeError, ValueError) as e:
            what = "several turns" if before else "a single user turn"
            raise InputError(f"{self.folder}: the chat template fails on {what} ({e}); repair it") from None
        return out.rstrip() + "\n\n</think>\n\n" if out.rstrip().endswith("<think>") else out

    def prompt(self, text, max_len=None):
        """
        Ids of the chat prompt. The template writes its special tokens itself: none are added. Beyond max_len tokens the
        end of the user's text is cut, and the template around it stays whole.
        """
        ids = self.ids(self.render(text))
        if max_len is None or len(ids) <= max_len:
            return ids
        self.cut += 1
        size = lambda k: len(self.ids(self.render(text[:k])))
        k = bisect.bisect_right(range(len(text)), max_len, key=size) - 1  # the longest beginning that fits
        if k < 0:
            raise InputError(f"{self.folder}: the chat template alone is longer than {max_len} tokens; allow more")
        return self.ids(self.render(text[:k]))

    def encode(self, prompt, response, max_len=None):
        """
        (ids, mask): prompt, response, eos; mask True on response and eos. Beyond max_len tokens the response loses its
        end (and the eos: it does not end there), down to a quarter of max_len; then the prompt does, see prompt().
        """
        p, r = self.prompt(prompt), self.ids(response) + [self.eos_id]
        if max_len is not None and len(p) + len(r) > max_len:
            room = max_len - min(len(r), max(1, max_len // 4))
            self.cut += len(p) <= room  # prompt() counts the others
            r = r[:max_len - len(p := self.prompt(prompt, room))]
        return p + r, [False] * len(p) + [True] * len(r)

    def say_cut(self, what, max_len):
        """A note where anything had to be shortened since the last one: never in silence."""
        if self.cut:
            print(f"note: {self.cut} {what} were longer than {max_len} tokens and cut (--max-len)", file=sys.stderr)
        self.cut = 0

    def decode(self, ids):
        """Text of ids, special tokens left out."""
        return self.tok.decode(list(ids), skip_special_tokens=True)


def collate(examples, pad_id):
    """[(ids, mask), …] → ids (B, T) int64 and mask (B, T) bool, padded on the right with pad_id and False."""
    T = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([[*i, *[pad_id] * (T - len(i))] for i, _ in examples], dtype=torch.int64)    # (B, T)
    mask = torch.tensor([[*m, *[False] * (T - len(m))] for _, m in examples], dtype=torch.bool)     # (B, T)
    return ids, mask
