"""What can be wrong with a file: one random damage to it, small or hostile, for lab/attack.py.

Each function takes the file's path and a random.Random, damages the file, and returns a few words
that say how.
"""
import copy
import json
import struct

import torch
from safetensors.torch import save_file

from files import checksum, digest, load_tensors
from packed import FORMAT

DEEP = object()         # stands for brackets nested thousands deep, which json.dumps does not write
BRACKETS = "[" * 5000 + "]" * 5000
# values that do not belong where they are put
VALUES = (
    None, True, False, 0, -1, 1, 2, 3.7, 1e308, -1e-300, 10**9, 2**31, 2**63, 10**18, 10**70,
    10**4400, float("nan"), float("inf"), -float("inf"), "", " ", "x", "0", "../../x",
    "/etc/passwd", "a/b", "\ud800", "\x00", "a\nb", "$\\frac$", "{}", "x" * 100_000, "<|end|>",
    "🦊", "(a+)+$", [], {}, [[]], [None], ["x"], [-1], [10**18], [1.5], [{}], {"x": 1},
    {"content": 1}, {"content": "x"}, {"type": "x"}, {"": None}, {"default": []}, DEEP)
# what a text may have in the wrong place
MARKS = (
    '"', "'", ",", "\n", "\r", "\t", "\0", "{", "[", "]", "}", ":", "\ufeff", "\u2028", "NaN", "1e999",
    "9" * 5000, BRACKETS, '{"a":' * 5000, "x" * 10**6)
# whole templates that are too much or too little; "" stands for the right one, many times
WHOLE = (
    "{% for a in [1] %}" * 40, "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{{ (" * 3000 + "1" + ") }}" * 3000, " ", "{# x #}", "x" * (5 << 20), "x " * (1 << 18), "")
# pieces of chat templates that take time or memory, raise, or reach for Python
PIECES = (
    "{{ 'x' * 10**10 }}", "{{ ('x' * 10**6) * 10**6 }}", "{{ [0] * 10**9 }}", "{{ 9**(9**9) }}",
    "{{ 2**(2**40) }}", "{{ (9**99999)|string|length }}", "{{ 1 / 0 }}", "{{ 1 // 0 }}",
    "{{ 1 % 0 }}", "{{ 10.0**400 }}", "{{ 'a'|center(10**10) }}", "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}", "{{ 'a'|indent(10**10, true) }}", "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format(1) }}", "{{ 'a'.replace('', 'b' * 10**9) }}",
    "{{ lipsum(n=10**6) }}", "{{ lipsum()|dictsort }}", "{{ messages|dictsort }}",
    "{{ messages|sum }}", "{{ messages|sort }}", "{{ messages|tojson(indent=10**9) }}",
    "{{ none|tojson(sort_keys=[]) }}", "{{ lipsum|tojson }}",
    "{{ messages|map(attribute='x')|sum }}", "{{ messages|batch(0)|list }}",
    "{{ messages|slice(0)|list }}", "{{ messages|slice(10**10)|list }}",
    "{{ messages|groupby('x')|list }}", "{{ messages[5].x.y }}", "{{ messages[0]['x']['y'] }}",
    "{{ x.y.z }}", "{{ raise_exception(messages) }}", "{{ raise_exception('no\\nmore') }}",
    "{{ raise_exception() }}", "{{ strftime_now('%Y' * 10**6) }}", "{{ strftime_now(1) }}",
    "{{ strftime_now('\\ud800') }}", "{{ bos_token.__class__.__mro__ }}", "{{ ''.__class__ }}",
    "{{ messages.append(1) }}", "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(10**12) %}{% endfor %}", "{% for a in messages %}{% break %}{% endfor %}",
    "{% break %}", "{% continue %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{{ m(n + 1) ~ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(x=9) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% set c = cycler() %}{{ c.next() }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{% import 'x' as y %}", "{% generation %}", "{% if %}", "{{",
    "{% generation %}x{% endgeneration %}", "{% filter upper %}", "{{ messages|nothing }}",
    "{{ nothing() }}", "{{ '\\ud800' }}", "{{ ''|random }}", "{{ []|first }}", "{{ []|max }}",
    "{{ 'x'|int(base=99) }}", "{{ 'x'|float|round(10**9) }}", "{{ 1|round(400) }}",
    "{{ 10**400|float }}", "{{ 'x'|wordwrap(0) }}", "{{ 'x x'|wordwrap(-1) }}",
    "{{ 'x'|truncate(-5) }}", "{{ 'a' ~ none ~ 1 + [] }}", "{{ -('x') }}",
    "{{ range(10**9)|list }}", "{{ range(0, 10, 0) }}", "{{ dict(messages) }}",
    "{{ joiner(1)() }}", "{{ '(a+)+$'|urlize }}", "{{ ('a@' * 99999)|urlize }}",
    "{{ ('<' * 999999)|striptags }}", "{{ 'x'|format(1, 2) }}", "{{ '%s%s'|format(1) }}",
    "{{ '%c' % 10**9 }}", "{{ messages|xmlattr }}", "{{ ('\\n' * 10**7)|indent(9999) }}",
    "{{ 'x'.encode().decode('nothing') }}", "{{ 'é'.encode('ascii') }}",
    "{{ '{0.__class__}'.format(1) }}", "{{ caller() }}", "{{ self.x() }}", "{{ super() }}",
    "{{ loop.index }}")
# how a tensor is damaged, and the kinds of numbers that it is cast to
WAYS = ("drop", "cast", "nan", "longer", "shorter", "flat", "scalar", "rename", "new", "huge")
CASTS = (torch.float8_e4m3fn, torch.float16, torch.int64, torch.bool, torch.float64, torch.complex64)


# ---- bytes and text

def bytes_of(path, rng):
    """A few bytes are others, missing or new."""
    content = bytearray(path.read_bytes())
    way = rng.choice(("cut", "flip", "flip", "flip", "insert", "empty", "zeros", "repeat"))
    at = rng.randrange(len(content) + 1)
    if way == "cut":
        del content[at:]
    elif way == "flip":
        for _ in range(rng.choice((1, 1, 5, 100))):
            reach = rng.choice((64, 4096, len(content)))        # the beginning more often
            content[rng.randrange(min(len(content), reach))] = rng.randrange(256)
    elif way == "insert":
        content[at:at] = rng.randbytes(rng.choice((1, 9, 1000)))
    elif way == "zeros":
        content[at:at + 100] = bytes(100)
    elif way == "repeat":
        content *= 2
    else:
        content.clear()
    path.write_bytes(bytes(content))
    return f"bytes: {way}"


def text(path, rng):
    """Marks of the format in wrong places, other encodings, or bytes_of()."""
    if rng.random() < 0.4:
        return bytes_of(path, rng)
    content = path.read_text(encoding="utf-8", errors="replace")
    piece = rng.choice(MARKS)
    at = rng.randrange(len(content) + 1)
    content = content[:at] + piece + content[at:]
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    path.write_bytes(content.encode(encoding, errors="replace"))
    return f"text: {piece[:10]!r} as {encoding}"


# ---- JSON

def dumps(value):
    """JSON with numbers of any length, and DEEP."""
    if value is DEEP:
        return BRACKETS
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)}: {dumps(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**4000:
        return "1" + "0" * 4400                 # Python itself does not print so many digits
    return json.dumps(value)


def value_of(rng):
    """One of VALUES, a new one each time: what a round puts into it is in no other round."""
    found = rng.choice(VALUES)
    return found if found is DEEP else copy.deepcopy(found)


def places(value, rng):
    """(container, key) of a random place in a JSON value, nearer to the top more often."""
    found = None
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        found, value = (value, key), value[key]
        if rng.random() < 0.35:
            break
    return found


def tree(value, rng):
    """Damage a JSON value in place at a random spot; returns (value, words)."""
    place = places(value, rng)
    if place is None:
        return value_of(rng), "another value altogether"
    container, key = place
    way = rng.choice(("value", "value", "value", "value", "drop", "swap", "near"))
    if way == "drop":
        del container[key]
    elif way == "swap":
        other, k = places(value, rng)
        container[key], other[k] = other[k], container[key]
    elif way == "near" and type(container[key]) in (int, float):
        x = container[key]
        text = str(x) if isinstance(x, float) or abs(x) < 10**4000 else "9" * 4400   # str() has a limit
        container[key] = rng.choice((x + 1, x - 1, 2 * x, -x, x // 2, text, [x], x * 10**6))
    else:
        container[key] = value_of(rng)
        shown = "brackets" if container[key] is DEEP else dumps(container[key])[:30]
        return value, f"{key} = {shown}"
    return value, f"{way} {key}"


def json_text(content, rng):
    """(damaged JSON text, words)"""
    value, words = json.loads(content), ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not isinstance(value, (dict, list)):
            break
        value, said = tree(value, rng)
        words += f" {said};"
    return dumps(value), words


def json_file(path, rng):
    """A value in a JSON file is another one, or its text is no JSON."""
    if rng.random() < 0.12:
        return text(path, rng)
    content, words = json_text(path.read_text(encoding="utf-8"), rng)
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    return words


def json_lines(path, rng):
    """One line of a file of JSON lines, or all of them."""
    if rng.random() < 0.2:
        return text(path, rng)
    lines = path.read_text(encoding="utf-8").splitlines()
    words = ""
    chosen = [rng.randrange(len(lines))] if rng.random() < 0.7 else range(len(lines))
    seed = rng.random()
    for i in chosen:
        lines[i], words = json_text(lines[i], type(rng)(seed))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"line {chosen}:{words}"


# ---- chat templates

def template(path, rng):
    """A hostile piece somewhere in a template, or damaged text."""
    content = path.read_text(encoding="utf-8")
    chance = rng.random()
    if chance < 0.1:
        return text(path, rng)
    if chance < 0.2:
        other = rng.choice(WHOLE) or content * rng.choice((0, 1000, 20_000))
        path.write_text(other, encoding="utf-8")
        return f"template: {len(other)} characters, {other[:20]!r}"
    spots = [i for i in range(len(content)) if content[i:i + 2] in ("{{", "{%")]
    piece, at = rng.choice(PIECES), rng.choice([0, len(content), *spots])
    path.write_text(content[:at] + piece + content[at:], encoding="utf-8")
    return f"template: {piece[:70]} at {at}"


# ---- tensors

def tensors(path, rng):
    """
    A tensor or a field of the header of a file that save_tensors wrote, with a checksum that is
    right again; or its bytes.
    """
    if rng.random() < 0.25:
        return bytes_of(path, rng)
    found, header = load_tensors(path)
    if rng.random() < 0.5:
        found, words = damaged_tensors(found, rng)
    else:
        header, words = tree(header, rng)
    if not isinstance(header, dict):
        header = {}
    if header.get("format") == FORMAT and rng.random() < 0.9:
        header["content"] = digest(found)
    texts = {key: dumps(value) for key, value in header.items()}
    texts["checksum"] = json.dumps(checksum(found, texts))
    save_file(found, path, texts)
    return words


def damaged_tensors(found, rng):
    """({name: tensor} of which one is missing, another, or new; words)"""
    name = rng.choice(sorted(found))
    t, way = found[name], rng.choice(WAYS)
    if way in ("drop", "rename"):
        found.pop(name)
    if way == "rename":
        found[name + "x"] = t
    elif way == "new":
        found[rng.choice(("x", "delta.0.q_proj", "adam.99.step", "extra.kept", "logits"))] = t.clone()
    elif way != "drop":
        found[name] = damaged_tensor(t, way, rng)
    return found, f"tensor {name}: {way}"


def damaged_tensor(t, way, rng):
    """The tensor in another dtype, length or shape, or with all its numbers replaced by one."""
    if way == "cast":
        return t.to(rng.choice(CASTS))
    if way == "longer":
        return torch.cat((t.reshape(-1), t.reshape(-1)))
    if way == "shorter":
        return t.reshape(-1)[:-1].clone()
    if way == "flat":
        return t.reshape(-1).clone()
    if way == "scalar":
        return torch.zeros((), dtype=t.dtype)
    if not t.is_floating_point():
        return torch.full_like(t, 255 if t.dtype == torch.uint8 else 1)
    return torch.full_like(t, float("nan") if way == "nan" else 1e30)


def checkpoint(path, rng):
    """The header of a safetensors file as other programs write it, or its bytes."""
    if rng.random() < 0.3:
        return bytes_of(path, rng)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, words = json_text(content[8:8 + size].decode("utf-8"), rng)
    header = header.encode("utf-8", errors="surrogatepass")
    length = rng.choice((len(header),) * 9 + (len(header) + 1, 10**12, 2**63))
    path.write_bytes(struct.pack("<Q", length) + header + content[8 + size:])
    return words


# ---- SentencePiece

def sentencepiece(words):
    """A tokenizer.model of byte-pair encoding that knows `words`, their letters and all bytes."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = [(word, kind) for word, kind in kinds.items()]
    pieces += [(word, 4) for word in words[:-len(kinds)]]       # as many as there are words
    content = b""
    for i, (piece, kind) in enumerate(pieces):
        name = piece.encode("utf-8")
        message = b"\x0a" + varint(len(name)) + name
        message += b"\x15" + struct.pack("<f", -i) + b"\x18" + varint(kind)
        content += b"\x0a" + varint(len(message)) + message
    # byte-pair encoding; a space is put before the text, and none is taken away
    return content + b"\x12\x02\x18\x02" + b"\x1a\x04\x18\x01\x20\x00"


def varint(number):
    """A whole number as a protocol buffer has it."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)
