"""
Files, written whole or not at all: JSON, JSON lines, safetensors; and the one error that bad input raises.

The lowest floor but parallel.py, which runs what writes in one process.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path



def quiet_interrupt(kind, error, trace):
    """An uncaught Ctrl-C, while a script still imports, is one line; all else as Python has it."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt

# OpenMP reads these once, when torch is imported: every script imports this file first. Threads that
# spin while they wait make a busy machine many times slower; the few spins left are cheaper than
# waking a thread for each small operation.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parallel import once


PARTIAL = ".partial"  # ends the name of a file that is being written


class InputError(ValueError):
    """
    Bad input. The message is one sentence: which file, field or tensor, and what to do; on one line
    and of some length, whatever it quotes of a file.
    """
    status = 2

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text, longest=800):
    """A text without line breaks and control characters; of a very long one the middle is left out."""
    text = str(text)
    if len(text) > longest:
        text = f"{text[:longest // 2]} … {text[-longest // 2:]}"
    if text.isprintable():
        return text
    parts = []
    for sign in text:
        parts.append(sign if sign.isprintable() else " " if sign.isspace() else ascii(sign)[1:-1])
    return "".join(parts)


class Failed(InputError):
    """The outcome is not what was wanted. The message says what was measured and what to change."""
    status = 3


# ---- JSON

def read_text(path, largest=1 << 28):
    """
    The text in a file, at most so many bytes. Raises OSError or ValueError where there is none: what
    is no file, a pipe for one, would be waited for.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    if path.exists() and path.stat().st_size > largest:
        raise OSError(f"it has more than {largest >> 20} MB")
    return path.read_bytes().decode("utf-8-sig")


def read_json(path):
    """The object in a JSON file. Raises InputError where the file is missing or holds none."""
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"cannot read {path} as JSON ({e}); restore or remove it") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise InputError(f"{path} holds a JSON {kind} where an object belongs; restore or remove it")
    return found


def write_json(path, obj):
    """Write obj as JSON: after a crash the old file stands, never half of the new one."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


@once
def write_text(path, text):
    """Write text: after a crash the old file stands, never half of the new one."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def whole(path):
    """
    A partial file to write to, which takes the place of `path` when it is whole and on the disk.
    Raises InputError where it cannot be written: the old file stands, and what is no file, a device
    for one, which root could replace.
    """
    partial = Path(f"{path}{PARTIAL}")
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is no file")
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()  # a link there would lead elsewhere
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def unwritable(path, error):
    """The InputError of a file that cannot be written."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return InputError(f"{path}: cannot be written ({reason}); make room or correct that, and run "
                      "the command again")


@once
def append_jsonl(path, row):
    """Append one object as one line. Raises InputError where that fails, or `path` is a link."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(file, "a", encoding="utf-8") as f:
            f.write(line)
    except OSError as error:
        raise unwritable(path, error) from None


@once
def take_back(path, size, phases):
    """
    Take out of a log what `phases` wrote behind its first `size` bytes, and lines that a crash cut
    short: what is resumed there is logged once.
    """
    path = Path(path)
    if not path.is_file():
        return
    kept, place, lines = [], 0, path.read_bytes().splitlines(keepends=True)
    for line in lines:
        row = parse(line)
        later = place >= size and isinstance(row, dict) and row.get("phase") in phases
        place += len(line)
        if isinstance(row, dict) and line.endswith(b"\n") and not later:
            kept.append(line)
    if len(kept) < len(lines):
        with whole(path) as partial:
            partial.write_bytes(b"".join(kept))


def size(path):
    """Bytes of a file; 0 where there is none."""
    return Path(path).stat().st_size if Path(path).is_file() else 0


def parse(text):
    """The value of a JSON text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_jsonl(path):
    """The objects of a file that append_jsonl wrote, without lines that a crash cut short."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    return [row for row in map(parse, lines) if isinstance(row, dict)]


def fingerprint(*paths):
    """First 16 hex digits of the SHA-256 of a file, or of several one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while piece := f.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]


# ---- fields

NO_TEXT = re.compile("[\0\ud800-\udfff]")   # what no file's name and no UTF-8 has
TEXT = ((str,), None, None)
NUMBER = ((int, float), -1e300, 1e300)
COUNT = ((int,), 0, 2**53)


def check_fields(where, found, table):
    """
    Raises InputError where a field of an object is not what `table` says.

    table: {name: what it has to be}; the name "*" is every field that there is. What has to be:

      (types, low, high)     a value of one of these types; a number lies between low and high, and
                             with None among the types the field may be absent
      ("a", "b", …)          one of these texts
      {…}                    an object, with a table of its own
      [what]                 a list, and what each of its values has to be
      [this, that]           a list of two values, and what they have to be
      (None, what)           nothing, or what
    """
    for name, allowed in table.items():
        for key in list(found) if name == "*" else [name]:
            check_value(where, key, found.get(key), allowed)


def check_value(where, name, value, allowed):
    """check_fields() of one value; `name` may lead to it: a.b[2]."""
    if isinstance(allowed, tuple):
        if allowed[0] is None:
            if value is not None:
                check_value(where, name, value, allowed[1])
        elif isinstance(allowed[0], str):
            check_text(where, name, value, allowed)
        else:
            check_plain(where, name, value, *allowed)
    elif isinstance(value, dict) and isinstance(allowed, dict):
        found = {f"{name}.{key}": of_field for key, of_field in value.items()}
        others = allowed.get("*")
        table = {key: others for key in found} if others else {}
        table |= {f"{name}.{key}": what for key, what in allowed.items() if key != "*"}
        check_fields(where, found, table)
    elif isinstance(value, list) and isinstance(allowed, list) and len(allowed) in (1, len(value)):
        for i, item in enumerate(value):
            check_value(where, f"{name}[{i}]", item, allowed[min(i, len(allowed) - 1)])
    else:
        refuse_value(where, name, value)


def check_text(where, name, value, texts):
    """Raises InputError where a value is none of these texts."""
    if not isinstance(value, str) or value not in texts:
        raise InputError(f"{where}: {name} = {shown(value)} is not one of {', '.join(texts)}; "
                         "restore the file")


def check_plain(where, name, value, types, low, high):
    """Raises InputError where a value has none of these types, or is a number out of bounds."""
    if value is None and None in types:
        return
    if type(value) not in types or isinstance(value, str) and NO_TEXT.search(value):
        refuse_value(where, name, value)
    if type(value) in (int, float) and not low <= value <= high:
        raise InputError(f"{where}: {name} = {shown(value)} is not between {low} and {high}; restore "
                         "the file")


def refuse_value(where, name, value):
    """Raises InputError for a field that is missing or of the wrong type."""
    if value is None:
        raise InputError(f"{where}: the field {name!r} is missing; restore the file")
    raise InputError(f"{where}: {name} = {shown(value)} is of the wrong type; restore the file")


def shown(value):
    """A value as a sentence quotes it; a number may have more digits than Python writes."""
    if type(value) is int and value.bit_length() > 200:
        return "a number of very many digits"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)[:60]


def check_tensors(where, tensors, like):
    """
    Raises InputError unless there are just the tensors of `like`, {name: one of that shape and dtype},
    without NaN.
    """
    odd = sorted(tensors.keys() ^ like.keys())
    if odd:
        what = "is missing" if odd[0] in like else "does not belong there"
        raise InputError(f"{where}: tensor {odd[0]} {what}; remove the file and start again")
    for name, t in tensors.items():
        for there, wanted in ((tuple(t.shape), tuple(like[name].shape)), (t.dtype, like[name].dtype)):
            if there != wanted:
                raise InputError(f"{where}: tensor {name} is {there} and has to be {wanted}; remove the "
                                 "file and start again")
    check_finite(where, tensors)


# ---- folders

@contextlib.contextmanager
def replacing(folder, marker, **facts):
    """
    A new folder to write to that takes the place of `folder` once everything is in it; of nothing
    where writing fails.

    The file `marker` in it names all that was written, beside facts. Raises InputError where
    `folder` holds anything that its marker does not name: it is left as it is.
    """
    folder = Path(folder).absolute()
    refuse_others(folder, marker)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield fresh
        written = [path.relative_to(fresh).as_posix() for path in sorted(fresh.rglob("*"))]
        write_json(fresh / marker, facts | {"files": written})
        for path in (fresh, *fresh.rglob("*")):
            usual_mode(path)
        refuse_others(folder, marker)  # what came there meanwhile
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def refuse_others(folder, marker):
    """Raises InputError where a folder holds anything that the file `marker` in it does not name."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder} is no folder; choose another one")
    file = folder / marker
    named = read_json(file).get("files") if file.is_file() else []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != marker and (not isinstance(named, list) or name not in named):
            raise InputError(f"{folder} holds {name}, which was not written by this command, and is "
                             "left as it is; choose another folder")


def usual_mode(path):
    """What other programs would give a new file or folder: safetensors and tempfile lock theirs."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


# ---- safetensors

def digest(tensors, dtype=None):
    """
    A short hash of named tensors' names, shapes and bytes, after rounding to `dtype` if given.
    """
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach()
        t = t.to("cpu", dtype or t.dtype).contiguous()
        h.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()[:16]


def checksum(tensors, header):
    """A short hash of all that a file holds: tensors, and the header's texts."""
    text = digest(tensors) + json.dumps(header, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_finite(where, tensors):
    """Raises InputError naming a tensor that holds NaN or infinity, or numbers of an odd kind."""
    for name, t in tensors.items():
        if t.is_complex() or (t.is_floating_point() and t.element_size() < 2):
            raise InputError(f"{where}: tensor {name} is {t.dtype}, which is not used here; restore the "
                             "file or make it again")
        if t.numel() and not torch.stack(t.aminmax()).isfinite().all():
            raise InputError(f"{where}: tensor {name} holds NaN or infinity; restore the file or make it "
                             "again")


@once
def save_tensors(path, tensors, **metadata):
    """Write tensors, and metadata as JSON in the file's header; the old file stands until then."""
    header = {key: json.dumps(value) for key, value in metadata.items()}
    header["checksum"] = json.dumps(checksum(tensors, header))
    with whole(path) as partial:
        save_file(tensors, partial, header)
        usual_mode(partial)


def load_tensors(path, device="cpu"):
    """
    (tensors, metadata) of a file that save_tensors wrote. Raises InputError where it is missing
    or damaged.
    """
    with opened(path) as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        header, written = f.metadata() or {}, header_of(f)
    if "checksum" in header:
        claimed = parse(header.pop("checksum"))
        if claimed != checksum(tensors, header):
            raise InputError(f"{path}: damaged, it does not hold what was written; restore it, or remove "
                             "it and run the command that writes it, lcdd.py and eraser.py with --resume")
    return {name: t.to(device) for name, t in tensors.items()}, written


def read_header(path):
    """The metadata of a file that save_tensors wrote. Raises InputError as load_tensors does."""
    with opened(path) as f:
        return header_of(f)


@contextlib.contextmanager
def opened(path):
    """A safetensors file, open. Raises InputError where it is missing or damaged."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; run the command that writes it, lcdd.py and "
                         "eraser.py with --resume")
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a readable safetensors file of this project ({error}); restore it, "
            "or remove it and run the command that writes it, lcdd.py and eraser.py with --resume"
        ) from None


def header_of(f):
    """The metadata of an open file, out of JSON."""
    texts = f.metadata() or {}
    return {key: json.loads(text) for key, text in texts.items() if key != "checksum"}
