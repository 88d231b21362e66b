"""
Files, written whole or not at all: JSON, JSON lines, safetensors; and the one error that bad input raises.

The lowest floor: nothing of ours is imported here.
"""
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

# OpenMP reads these once, when torch is imported: every script imports this file first. Threads that
# spin while they wait make a busy machine many times slower; the few spins left are cheaper than
# waking a thread for each small operation.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class InputError(ValueError):
    """Bad input. The message is one sentence: which file, field or tensor, and what to do."""
    status = 2


class Failed(InputError):
    """The outcome is not what was wanted. The message says what was measured and what to change."""
    status = 3


# ---- JSON

def read_json(path):
    """The object in a JSON file. Raises InputError where the file is missing or holds none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path} as JSON ({e}); restore or remove it") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise InputError(f"{path} holds a JSON {kind} where an object belongs; restore or remove it")
    return found


def write_json(path, obj):
    """Write obj as JSON: after a crash the old file stands, never half of the new one."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Write text: after a crash the old file stands, never half of the new one."""
    partial = Path(f"{path}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def append_jsonl(path, row):
    """Append one object as one line."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path):
    """The objects of a file that append_jsonl wrote, without lines that a crash cut short."""
    found = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def fingerprint(*paths):
    """First 16 hex digits of the SHA-256 of a file, or of several one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while piece := f.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]


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

def save_tensors(path, tensors, **metadata):
    """Write tensors, and metadata as JSON in the file's header; the old file stands until then."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    header = {key: json.dumps(value) for key, value in metadata.items()}
    try:
        save_file(tensors, partial, header)
        usual_mode(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path, device="cpu"):
    """
    (tensors, metadata) of a file that save_tensors wrote. Raises InputError where it is missing
    or damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; the command that writes it has to finish first")
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            metadata = {key: json.loads(text) for key, text in (f.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file of this project ({error}); restore it, "
            "or remove it and run the command that writes it"
        ) from None
    return tensors, metadata
