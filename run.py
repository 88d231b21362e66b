"""
What every command shares: its habits on the command line, interruption, progress, and the run directory with its pieces.
"""
import contextlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from chat import Chat
from data import SIZES, read, split, task_name
from files import Failed, InputError, fingerprint, read_json, write_json

EMBEDDED = "tiny"  # the model that lies beside this file


def cli(main):
    """Run main(); an InputError becomes one line on stderr and exit status 2, Ctrl-C or SIGTERM one line and status 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except InputError as e:
        print(f"{'failed' if isinstance(e, Failed) else 'error'}: {e}", file=sys.stderr)
        sys.exit(e.status)
    except KeyboardInterrupt as e:
        print(f"interrupted{e}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                      # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except OSError as e:
        print(f"error: {e.filename or 'a file'}: {e.strerror or e}; mend that and run the command again", file=sys.stderr)
        sys.exit(2)


class Interrupted(KeyboardInterrupt):
    """An interruption whose words are the command that resumes."""

    def __str__(self):
        return f"; resume with: {self.args[0]}"


def resume_command(script, argv, run):
    """The command line that goes on with a run directory, however the interrupted one was written."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--resume" and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return shlex.join(["python", script, *map(str, kept), "--out", str(run), "--resume"])


def duration(seconds):
    """Seconds as people say them: 45 s, 12 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def check_numbers(o, free=()):
    """InputError for an option that is no finite number below 2³¹, or under 0 and not named in `free`."""
    for name, v in vars(o).items():
        if isinstance(v, (int, float)) and (not math.isfinite(v) or v < 0 and name not in free or abs(v) >= 1 << 31):
            raise InputError(f"--{name.replace('_', '-')} {v}: has to be a finite number, not below 0 and below 2³¹")


def check_device(name):
    """InputError where torch cannot compute on --device `name`."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or index and not (index.isascii() and index.isdigit()):
        raise InputError(f"--device {name}: choose cpu, cuda or cuda:0, cuda:1, …")
    if kind == "cuda" and int(index or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise InputError(f"--device {name}: torch sees no GPU here; use --device cpu" if not index else f"--device {name}: torch sees no such GPU; use --device cpu")


@contextlib.contextmanager
def patient():
    """Within it, Ctrl-C and SIGTERM only make the function it yields say True, so that work can stop between two steps."""
    flag, before = [], {}
    try:
        for s in (signal.SIGINT, signal.SIGTERM):
            before[s] = signal.signal(s, lambda *_: flag.append(1))
        yield lambda: bool(flag)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    if flag:
        raise KeyboardInterrupt


def ticker(label, total):
    """A function of how many of `total` are done that prints it with the time left, every five seconds at most."""
    began = shown = time.monotonic()

    def tell(done):
        nonlocal shown
        if done and (now := time.monotonic()) - shown > 5:
            shown = now
            print(f"{label} {done}/{total}  left {duration((now - began) / done * (total - done))}", flush=True)
    return tell


def locate(name):
    """
    The folder of a model: "tiny" is the embedded one, wherever this file lies; a local one as it is, or `owner/name` fetched from the Hugging Face hub (configuration,
    tokenizer, template and safetensors, or pytorch_model*.bin where there are none). Raises InputError where it is neither, or the download fails.
    """
    path = Path(__file__).parent / EMBEDDED if name == EMBEDDED else Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise InputError(f"{name} is neither a folder nor a hub id of the form owner/name")
    import huggingface_hub  # slow to import, and only needed here
    files = ["config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json",
             "chat_template.jinja", "tokenizer.model", "model*.safetensors", "model.safetensors.index.json",
             "adapter_config.json", "adapter_model.safetensors"]
    try:
        folder = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=files))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(str(name), allow_patterns=["pytorch_model*.bin", "pytorch_model.bin.index.json"])
        return folder
    except Exception as e:  # the client raises its own errors, OSErrors and those of its HTTP library
        raise InputError(f"{name} is no folder here, and fetching it from the hub failed "
                         f"({type(e).__name__}: {' '.join(str(e).split())[:200]})") from e


def prepare(name, task, path, seed, sizes):
    """
    (chat, splits, source): the Chat of a model folder or hub id, split() of a task's samples, and the file they came
    from: `path`, the task itself where that is a file, else TASK.jsonl beside the checkpoint.
    """
    folder = locate(name)
    source = Path(path or (task if task_name(task) == "own" else folder / f"{task}.jsonl"))
    if path is None and not source.is_file() and task_name(task) != "own":
        raise InputError(f"{folder} holds no {source.name}; name the data of the task {task} with --data")
    chat = Chat(folder)
    return chat, split(read(source, task), seed, sizes), source


def reopen(run):
    """
    (config, chat, splits) of a run directory that lcdd.py wrote. Raises InputError where it is none, or where its data
    have changed since, so that held-out prompts may not be held out.
    """
    file = Path(run) / "config.json"
    config = read_json(file) if file.is_file() else None
    if not isinstance(config, dict) or "data_fingerprint" not in config:
        raise InputError(f"{run} is not a run directory; give one that lcdd.py has written")
    try:
        chat, splits, source = prepare(config["model"], config["task"], config["data"], config["seed"], {k: config[f"n_{k}"] for k in SIZES})
    except KeyError as e:
        raise InputError(f"{file}: the field {e} is missing; restore the file") from None
    except InputError as e:
        raise InputError(f"{e} (named in {file})") from None
    if fingerprint(source) != config["data_fingerprint"]:
        raise InputError(f"{source}: changed since the run was trained, so held-out prompts may not be; restore it or train again")
    return config, chat, splits


def open_run(out, name, resume, config):
    """
    The run directory `out` (default: the first free runs/NAME, runs/NAME-2, …), with config.json in it. With resume an
    existing one is gone on with, if it was started with the same options. Raises InputError where that is not so.
    """
    numbered = (Path("runs") / (name if k == 1 else f"{name}-{k}") for k in itertools.count(1))
    if resume and not out:
        raise InputError("--resume needs --out, the run directory to go on with")
    run = Path(out) if out else next(p for p in numbered if not p.exists())
    file = run / "config.json"
    if file.is_file():
        if not resume:
            raise InputError(f"{run} holds a run already; go on with --resume or choose another --out")
        old = read_json(file)
        changed = [k for k in config if k != "versions" and old.get(k) != json.loads(json.dumps(config[k]))]
        if changed:
            k = changed[0]
            raise InputError(f"{file}: {k} was {old.get(k)!r} and is now {config[k]!r}; resume with the same options, or choose another --out")
    else:
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_json(file, config)
        except OSError as e:
            raise InputError(f"cannot make the run directory {run} ({e}); choose another --out") from None
    return run


def read_results(run):
    """results.json of a run directory, with what is always there; an empty one where there is none yet."""
    file = Path(run) / "results.json"
    found = read_json(file) if file.is_file() else {}
    found.setdefault("seconds", {})
    return found
