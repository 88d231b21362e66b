"""
A checkpoint as it lies: a folder of Hugging Face's form, its weights in safetensors or
pytorch_model*.bin, in one file or in shards; or a GGUF file, which holds all of it.
"""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import ggufs
from files import InputError, read_json

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NO_WEIGHT = "rotary_emb.inv_freq"   # a buffer of early Llama checkpoints; it follows from config.json


def described(path, name):
    """
    The object in the JSON file `name` of a checkpoint; {} where there is none. Raises InputError
    where there is no config.json.
    """
    if ggufs.is_gguf(path):
        return ggufs.described(path, name)
    file = Path(path) / name
    if file.is_file():
        return read_json(file)
    if name != "config.json":
        return {}
    inside = sorted(found.name for found in Path(path).glob(f"*{ggufs.SUFFIX}"))
    what = f"the file {inside[0]} itself" if inside else "the directory of a Hugging Face checkpoint"
    raise InputError(f"{path}: no config.json in there; give {what}")


def shards(folder):
    """
    (files of weights, index or None) of a checkpoint's folder; safetensors where both forms lie
    there. A GGUF file is its own.
    """
    if ggufs.is_gguf(folder):
        return [folder], None
    for whole, index in zip(WHOLE, INDEXES):
        if (folder / whole).is_file():
            return [folder / whole], None
        if (folder / index).is_file():
            names = read_json(folder / index).get("weight_map")
            names = list(names.values()) if isinstance(names, dict) else []
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise InputError(f"{folder / index}: {str(name)[:60]!r} is no name of a file beside it; "
                                     "download the checkpoint again")
            names = sorted(set(names))
            absent = [n for n in names if not (folder / n).is_file()]
            if absent or not names:
                raise InputError(f"{folder / index}: names {absent[0] if absent else 'no file'}, which "
                                 "is not there; download the checkpoint again")
            return [folder / n for n in names], folder / index
    raise InputError(f"{folder}: neither {WHOLE[0]} nor {INDEXES[0]}, and no {WHOLE[1]}; give the "
                     "directory of a checkpoint with its weights")


def tensors(file):
    """
    Yield (name, tensor) of one file of weights. Nothing in a .bin file is executed: it may hold
    tensors only.
    """
    if ggufs.is_gguf(file):
        yield from ggufs.tensors(file)
        return
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    if not name.endswith(NO_WEIGHT):
                        yield name, f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a readable safetensors file ({error})") from None
        return
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:                      # a damaged pickle may raise anything
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: not a readable file of tensors ({said})") from None
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise InputError(f"{file}: holds something else than named tensors; save the checkpoint as "
                         "safetensors")
    for name, t in found.items():
        if not name.endswith(NO_WEIGHT):
            yield name, t
