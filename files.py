"""
Files, written whole or not at all: JSON, JSON lines, safetensors; and the one error that bad input raises.

The lowest floor: nothing of ours is imported here.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path

# OpenMP reads these once, when torch is imported: every script imports this file first. Threads that spin while they wait
# make a busy machine many times slower; the few spins left are cheaper than waking a thread for each small operation.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class InputError(ValueError):
    """Bad input. The message is one sentence that names the file, field or tensor and says what to do."""
    status = 2


class Failed(InputError):
    """The work went well and its outcome is not what was wanted. The message says what was measured and what to change."""
    status = 3


def read_json(path):
    """The object in a JSON file. Raises InputError where the file is missing or holds no JSON object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path} as JSON ({e}); restore or remove it") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a JSON {type(found).__name__} where an object belongs; restore or remove it")
    return found


def write_json(path, obj):
    """Write obj as JSON, all or nothing: after a crash the old file stands, never half of the new one."""
    temp = f"{path}.{os.getpid()}.tmp"
    Path(temp).write_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temp, path)


def write_text(path, text):
    """Write text, all or nothing."""
    temp = f"{path}.{os.getpid()}.tmp"
    Path(temp).write_text(text, encoding="utf-8")
    os.replace(temp, path)


def append_jsonl(path, row):
    """Append one object as one line."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path):
    """The objects of a file that append_jsonl wrote; lines that a crash cut short are left out."""
    found = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def fingerprint(path):
    """First 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def save_tensors(path, tensors, **metadata):
    """safetensors with JSON metadata in the header, replaced atomically."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, {k: json.dumps(v) for k, v in metadata.items()})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path, device="cpu"):
    """(tensors, metadata) of a file that save_tensors wrote; InputError where it is missing or damaged."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; the command that writes it has to finish first")
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable safetensors file of this project ({error}); restore it, or remove it and run the command that writes it") from None
