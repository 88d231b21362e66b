"""
Text ↔ ids: the tokenizer and chat template of a checkpoint, and batches of what they give.

Shapes: B sequences in a batch, T tokens in a sequence.
"""
import bisect
import contextlib
import hashlib
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import ggufs
import spm
import template
import weights
from files import InputError, fingerprint, read_text, shown

VICUNA = (  # v1.1, for checkpoints that have no template
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SAVE_ONE = ("save a fast tokenizer.json there, in transformers by "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
OWN = "use the model's own"


# ---- the chat

@contextlib.contextmanager
def blaming(file, advice):
    """
    Within it, whatever the tokenizers library raises is an InputError about the tokenizer's file: it
    raises nothing finer, and its panics are no Exception.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:
        raise InputError(f"{file}: the tokenizer fails ({e}); {advice}") from None


class Chat:
    """
    Tokenizer and chat template of a model folder or GGUF file; the only place where text becomes ids.

    eos_id       ends a response
    pad_id       fills a batch (eos_id where the tokenizer has none)
    stop         set of ids that end a text
    begin        ids that come before a text that is no chat: the BOS, or none
    vocab_size   rows of the model's embedding (config.json)
    cut          how many texts encode() and prompt() have shortened so far

    Raises InputError where tokenizer.json (or tokenizer.model) is missing, the template is broken or
    the tokenizer does not fit the model.
    """

    def __init__(self, folder):
        self.folder, self.cut, self.rendered = Path(folder), 0, {}
        template.CHILD.start()                          # while the tokenizer is read
        self.path = self.folder / "tokenizer.json"
        if not self.path.exists() and (self.folder / "tokenizer.model").exists():
            self.path = self.folder / "tokenizer.model"
        if ggufs.is_gguf(self.folder):
            self.path = self.folder
        config = weights.described(folder, "config.json")
        settings = weights.described(folder, "tokenizer_config.json")
        generation = weights.described(folder, "generation_config.json")
        special = weights.described(folder, "special_tokens_map.json")
        self.vocab_size = config.get("vocab_size")
        self.tok = self.load_tokenizer()
        with blaming(self.path, OWN):
            self.special = self.special_tokens({**special, **settings}, config, settings)
            self.eos_id = self.tok.token_to_id(self.special["eos_token"])
            pad = self.tok.token_to_id(self.special.get("pad_token", ""))
        self.pad_id = self.eos_id if pad is None else pad
        self.stop = {self.eos_id}
        for source in (config, generation):
            self.stop.update(self.token_ids(source, "eos_token_id"))
        self.template = self.load_template(settings)
        self.begin = self.beginning(settings)

    def load_tokenizer(self):
        """The tokenizer, checked against the size of the embedding."""
        if not self.path.is_file():
            raise InputError(f"{self.path} is missing; {SAVE_ONE}")
        with blaming(self.path, SAVE_ONE):
            if self.path.suffix == ".model":
                tok = spm.tokenizer(self.path)
            elif self.path.suffix == ggufs.SUFFIX:
                tok = ggufs.tokenizer(self.path)
            else:
                tok = Tokenizer.from_file(str(self.path))
            tok.no_truncation()
            tok.no_padding()
            vocabulary = tok.get_vocab()
            token = max(vocabulary, key=vocabulary.get)
        if type(self.vocab_size) is not int or vocabulary[token] >= self.vocab_size:
            raise InputError(
                f"{self.path}: token {token!r} has id {vocabulary[token]}, but vocab_size in "
                f"config.json is {self.vocab_size}; use the model's own tokenizer")
        return tok

    def token_ids(self, source, name):
        """Token ids of a configuration: one, several or none, as a list."""
        ids = source.get(name)
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise InputError(f"{self.folder}: {name} {shown(i)} is outside the vocabulary of "
                                 f"{self.vocab_size}; use the model's own config.json and "
                                 "generation_config.json")
        return ids

    def special_tokens(self, named, config, settings):
        """
        Special tokens by name, as templates know them. What tokenizer_config.json leaves out is
        looked up by the id in config.json.
        """
        found = {}
        for name, value in named.items():
            if name.endswith("_token") and type(value) is not bool and value is not None:
                found[name] = value.get("content") if isinstance(value, dict) else value
                if not isinstance(found[name], str):
                    raise InputError(f"{self.folder}: {name} = {shown(value)} in tokenizer_config.json or "
                                     "special_tokens_map.json is no token; use the model's own")
        for name in ("bos_token", "eos_token"):
            # "bos_token": null says that there is none
            if name not in settings or name == "eos_token":
                for i in self.token_ids(config, f"{name}_id")[:1]:
                    found.setdefault(name, self.tok.id_to_token(i) or f"of id {i}")
            token = found.get(name, "")
            known = self.tok.token_to_id(token) is not None
            if not known and (name in found or name == "eos_token"):
                raise InputError(
                    f"{self.path} does not know the {name} {found.get(name, '(none named)')}; use "
                    "the model's own tokenizer.json, tokenizer_config.json and config.json")
        return found

    def load_template(self, settings):
        """The text from chat_template.jinja, from tokenizer_config.json, or Vicuna's."""
        file, text = self.folder / "chat_template.jinja", settings.get("chat_template")
        try:
            if file.exists():
                text = read_text(file).replace("\r\n", "\n")
            if isinstance(text, list):  # several, by name
                text = {t["name"]: t["template"] for t in text}["default"]
            text = text or VICUNA
            template.render_all(text, [])
        except (template.TemplateFails, LookupError, TypeError, OSError, UnicodeDecodeError) as e:
            raise InputError(f"{self.folder}: the chat template does not compile ({e}); "
                             "repair it") from None
        return text

    def fingerprint(self):
        """A short hash of what makes ids out of text: tokenizer, template, special tokens."""
        rest = json.dumps([self.template, self.special], sort_keys=True)
        if self.path == self.folder:  # a GGUF file has the weights in it
            tokenizer = hashlib.sha256(self.tok.to_str().encode()).hexdigest()[:16]
        else:
            tokenizer = fingerprint(self.path)
        return tokenizer + hashlib.sha256(rest.encode()).hexdigest()[:16]

    def ids(self, text):
        """Ids of a text, without special tokens of the tokenizer's own."""
        return self.encoded(text).ids

    def encoded(self, text, special=False):
        """What the tokenizer makes of a text: ids and their places in it."""
        with blaming(self.path, OWN):
            return self.tok.encode(text, add_special_tokens=special)

    def beginning(self, settings):
        """[BOS id] where the transformers library puts one before every plain text, else []."""
        bos = self.tok.token_to_id(self.special.get("bos_token", ""))
        own = self.encoded("", special=True).ids[:1] == [bos] or self.path.suffix == ".model"
        wanted = settings.get("add_bos_token")
        return [bos] if bos is not None and (own if wanted is None else wanted) else []

    def plain(self, text):
        """Ids of a text that is no chat, behind a BOS where the tokenizer asks for one."""
        return self.begin + self.ids(text)

    def unknown(self, texts):
        """(unknown tokens, all tokens, the first text that became an unknown token) of texts."""
        settings = json.loads(self.tok.to_str())["model"]
        unknown_id = self.tok.token_to_id(str(settings.get("unk_token") or ""))
        count, total, example = 0, 0, ""
        for text in texts:
            encoded = self.encoded(text)
            total += len(encoded.ids)
            for i, (begin, end) in zip(encoded.ids, encoded.offsets):
                if i == unknown_id:
                    count += 1
                    example = example or text[begin:end]
        return count, total, example

    def expect(self, texts):
        """Render user's turns together, which is much faster than one by one, for later prompts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rendered]
        written = self.write([self.variables(text) for text in new])
        self.rendered.update(zip(new, written))

    def variables(self, text, before=()):
        """What the template gets for a user's turn after earlier messages."""
        messages = [*before, {"role": "user", "content": text}]
        return dict(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                    enable_thinking=False, **self.special)

    def write(self, many):
        """What the template writes for each of `many` variables."""
        try:
            return template.render_all(self.template, many)
        except template.TemplateFails as e:
            several = any(len(values["messages"]) > 1 for values in many)
            what = "several turns" if several else "a single user turn"
            raise InputError(f"{self.folder}: the chat template fails on {what} ({e}); "
                             "repair it") from None

    def render(self, text, before=()):
        """
        The user's turn as the template writes it, up to where the answer begins, with thinking
        switched off (an open <think> is closed). before: messages of earlier turns, {"role",
        "content"}. Raises InputError where the template fails.
        """
        out = self.rendered.get(text)
        if before or out is None:
            out = self.write([self.variables(text, before)])[0]
        if out.rstrip().endswith("<think>"):
            return out.rstrip() + "\n\n</think>\n\n"
        return out

    def prompt(self, text, max_len=None):
        """
        Ids of the chat prompt. The template writes its special tokens itself: none are added.
        Beyond max_len tokens the end of the user's text is cut, and the template around it stays
        whole. Raises InputError where the template alone is longer.
        """
        ids = self.ids(self.render(text))
        if not ids:
            raise InputError(f"{self.folder}: the chat template writes nothing for a user's turn; "
                             "repair it")
        if max_len is None or len(ids) <= max_len:
            return ids
        self.cut += 1

        def size(k):
            return len(self.ids(self.render(text[:k])))

        # the longest beginning that fits
        k = bisect.bisect_right(range(len(text)), max_len, key=size) - 1
        if k < 0:
            raise InputError(f"{self.folder}: the chat template alone is longer than {max_len} "
                             "tokens; allow more")
        return self.ids(self.render(text[:k]))

    def encode(self, prompt, response, max_len=None):
        """
        (ids, mask): prompt, response, eos; mask True on response and eos. Beyond max_len tokens the
        response loses its end (and the eos: it does not end there), down to a quarter of max_len;
        then the prompt does, see prompt().
        """
        p, r = self.prompt(prompt), self.ids(response) + [self.eos_id]
        if max_len is not None and len(p) + len(r) > max_len:
            least = min(len(r), max(1, max_len // 4))
            if len(p) <= max_len - least:
                self.cut += 1  # prompt() counts the others
            p = self.prompt(prompt, max_len - least)
            r = r[:max_len - len(p)]
        return p + r, [False] * len(p) + [True] * len(r)

    def say_cut(self, what, max_len):
        """A note where anything had to be shortened since the last one: never in silence."""
        if self.cut:
            print(f"note: {self.cut} {what} were longer than {max_len} tokens and cut (--max-len)",
                  file=sys.stderr)
        self.cut = 0

    def decode(self, ids):
        """Text of ids, special tokens left out."""
        with blaming(self.path, OWN):
            return self.tok.decode(list(ids), skip_special_tokens=True)


# ---- batches

def collate(examples, pad_id):
    """[(ids, mask), …] → ids (B, T) int64 and mask (B, T) bool, padded on the right."""
    T = max(len(ids) for ids, _ in examples)
    ids = [i + [pad_id] * (T - len(i)) for i, _ in examples]
    mask = [m + [False] * (T - len(m)) for _, m in examples]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)
