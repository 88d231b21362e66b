"""
The run directory that every command shares, and its pieces: configuration, chat, splits, model.
"""
import contextlib
import fcntl
import itertools
import json
import random
import re
import time
from pathlib import Path

import torch

import ggufs
import machine
import model
import parallel
from chat import Chat
from data import (SIZES, SUFFIXES, check_patterns, cut, judged_by, read, read_tests, split,
                  task_name, unique_prompts, without)
from files import (COUNT, NUMBER, PARTIAL, TEXT, InputError, check_fields,
                   fingerprint, read_header, read_json, write_json)

EMBEDDED = "tiny"  # the model that is included, beside this file
# what of a hub repository is fetched
PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json",
    "chat_template.jinja", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.model", "adapter_config.json", "adapter_model.safetensors",
)
OLDER = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # where there are no safetensors
# what config.json of a run directory has to hold: types and range, or the texts to choose from
POSITIVE = ((int,), 1, 2**31 - 1)
CONFIG = {
    "model": TEXT, "task": TEXT, "data": (None, TEXT), "test": (None, TEXT), "pattern": (None, TEXT),
    "data_fingerprint": TEXT, "chat_fingerprint": (None, TEXT),
    "seed": ((int,), 0, 2**31 - 1), "max_len": POSITIVE, "max_new_tokens": POSITIVE,
    "dtype": ("float32", "bfloat16"), "checkpoint": ((bool,), None, None),
    "loss": ("response", "all"), **{f"n_{name}": POSITIVE for name in SIZES},
}
# what results.json may hold; the metrics have a table of their own: metrics.evaluated()
RESULTS = {
    "seconds": (None, {"*": ((int, float), 0, 1e12)}), "task": (None, TEXT),
    "stopped": (None, {"reason": TEXT, "steps": COUNT, "budget": (None, NUMBER),
                       "loss": (None, NUMBER), "within": ((bool, None), None, None)}),
}
# settings that may change between training and use: where things lie, and how they are computed
FREE = ("model", "data", "sft", "out", "resume", "go_on", "dry_run", "device", "versions",
        "made")
HUB_ID = r"\w[\w.-]*/[\w.-]+"


# ---- the pieces of a run

def locate(name, weights=True):
    """
    The folder of a model: "tiny" is the embedded one, a local folder or GGUF file is itself, and
    `owner/name` is fetched from the Hugging Face hub, PATTERNS only; without its `weights` where
    they are not needed. Raises InputError where it is neither, or the download fails.
    """
    if name == EMBEDDED:
        return Path(__file__).parent / EMBEDDED
    path = expanded(name)
    if path.is_dir() or ggufs.is_gguf(path):
        return path
    if path.exists() or not re.fullmatch(HUB_ID, str(name)):
        raise InputError(f"{name} is neither a folder, nor a {ggufs.SUFFIX} file, nor a hub id of "
                         "the form owner/name")
    if not weights:
        return download(name, [p for p in PATTERNS if "safetensors" not in p])
    folder = download(name, PATTERNS)
    if not any(folder.glob("*.safetensors")):
        download(name, OLDER)
    return folder


def expanded(name):
    """A path with ~ and ~user as the shell has them."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"{name}: there is no such user here; write the path out") from None


def locate_data(name):
    """
    The file of samples: a local file is itself, and of a data set `owner/name` of the Hugging Face
    hub it is the one file of its training split. Raises InputError where there is none, or several.
    """
    path = expanded(name)
    if path.exists() or path.suffix in SUFFIXES or not re.fullmatch(HUB_ID, str(name)):
        return path
    for suffix in (".parquet", *SUFFIXES):
        folder = download(name, [f"*train*{suffix}"], repo_type="dataset")
        found = sorted(folder.rglob(f"*train*{suffix}"))
        found = [file for file in found if file.is_file()]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"the data set {name} has {len(found)} training files, in {folder}; "
                             f"name one of them, {found[0].name} for instance, with --data")
    raise InputError(f"the data set {name} has no training file of a kind that is read here "
                     f"({', '.join(SUFFIXES)}); save its rows as JSON lines and name that file")


def download(name, patterns, **kind):
    """The folder with those files of a hub repository. Raises InputError where that fails."""
    import huggingface_hub  # slow to import, and only needed here
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(patterns),
                                                      **kind))
    except Exception as e:  # the client's own errors, OSErrors and those of its HTTP library
        reason = " ".join(str(e).split())[:100]
        what = "file" if kind else "folder"
        raise InputError(f"{name} is no {what} here, and fetching it from the hub failed "
                         f"({type(e).__name__}: {reason}); name a local {what}") from e


def chat_of(name, weights=True):
    """
    The Chat of a model folder or hub id. weights: fetch them, too, where the model is on the hub.
    Raises InputError where something is missing or the architecture is none that runs here.
    """
    folder = locate(name, weights)
    model.configuration(folder)  # before the tokenizer, which would blame itself
    return Chat(folder)


def prepare(chat, task, path, seed, sizes, tests=None, pattern=None):
    """
    (splits, sources): split() of a task's samples, and the files that they came from: `path`, the
    task itself where that is a file, else TASK.jsonl beside the checkpoint; and `tests`, a file of
    test prompts of their own. pattern: what judges the answers of samples that have no pattern.
    Raises InputError where something is missing.
    """
    sources = [source_of(chat.folder, task, path)]
    samples, own_tests = read(sources[0], task), []
    if tests:
        sources.append(locate_data(tests))
        own_tests = tests_of(sources[1], task, pattern)
    if pattern:
        samples = judged_by(samples, pattern)
    check_patterns(task, samples)
    parts = split(samples, seed, sizes, own_tests)
    for part in parts.values():
        chat.expect(s.prompt for s in part)
    return parts, sources


def tests_of(path, task, pattern=None):
    """The samples of a file of test prompts. Raises InputError where nothing judges an answer."""
    samples = read_tests(path, task)
    if pattern:
        samples = judged_by(samples, pattern)
    for s in samples:
        if task_name(task) == "own" and not (s.response or s.pattern):
            raise InputError(f"{path}: nothing judges the answer to {s.prompt[:60]!r}; give the "
                             "test rows a response or a pattern, or all of them a --pattern")
    return samples


def other_tests(path, config, chat, splits):
    """
    Test prompts out of another file than the run's: at most as many, and none that the run has
    trained or been chosen on. Raises InputError where none is left.
    """
    samples = unique_prompts(tests_of(locate_data(path), config["task"], config.get("pattern")))
    seen = splits["train"] + splits["trigger"] + splits["validation"]
    left = without(samples, seen, "known to the run: left out")
    if not left:
        raise InputError(f"{path}: the run was trained or chosen on every prompt of it; "
                         "name another file with --test")
    left = cut(left, config["n_test"], random.Random(config["seed"]))
    chat.expect(s.prompt for s in left)
    return left


def source_of(folder, task, path):
    """The file of a task's samples."""
    if path is not None:
        return locate_data(path)
    if str(task).endswith(".jsonl"):
        return Path(task)
    source = folder / f"{task_name(task)}.jsonl"
    if not source.is_file():
        raise InputError(f"{folder} holds no {source.name}; "
                         f"name the data of the task {task} with --data")
    return source


def load_model(chat, device, dtype):
    """The base model beside a chat, on `device`, in the dtype of that name, ready to generate."""
    net = model.load(chat.folder, device, getattr(torch, dtype))
    net.stop = chat.stop
    machine.set_threads(net)
    return net


def read_config(run):
    """config.json of a run directory that lcdd.py wrote. Raises InputError where it is none."""
    file = Path(run) / "config.json"
    config = read_json(file) if file.is_file() else {}
    if "data_fingerprint" not in config:
        raise InputError(f"{run} is not a run directory; give one that lcdd.py has written")
    check_fields(file, config, CONFIG)
    return config


def look_into(run):
    """
    (config, chat) of a run directory that lcdd.py wrote, for whoever needs none of its data. Raises
    InputError where it is none, or its model is not the one that it was trained with.
    """
    config = read_config(run)
    try:
        chat = chat_of(config["model"])
    except InputError as e:
        raise InputError(f"{e} (named in {Path(run) / 'config.json'})") from None
    if chat.fingerprint() != config.get("chat_fingerprint", chat.fingerprint()):
        raise InputError(f"{chat.folder}: tokenizer or chat template changed since the run was "
                         "trained; restore them or train again")
    check_carriers(run, config)
    return config, chat


def reopen(run):
    """
    (config, chat, splits) of a run directory that lcdd.py wrote. Raises InputError where it is
    none, or where its data have changed since, so that held-out prompts may not be held out.
    """
    config, chat = look_into(run)
    try:
        sizes = {name: config[f"n_{name}"] for name in SIZES}
        splits, sources = prepare(chat, config["task"], config.get("data"), config["seed"], sizes,
                                  config.get("test"), config.get("pattern"))
    except InputError as e:
        raise InputError(f"{e} (named in {Path(run) / 'config.json'})") from None
    if fingerprint(*sources) != config["data_fingerprint"]:
        raise InputError(f"{' or '.join(map(str, sources))}: changed since the run was "
                         "trained, so held-out prompts may not be; restore it or train again")
    return config, chat, splits


def portable(settings):
    """The settings of a run as they may travel: without paths of this machine."""
    found = {k: v for k, v in settings.items() if k not in ("out", "resume", "device", "made")}
    for key, value in found.items():
        if isinstance(value, str) and Path(value).is_absolute():
            found[key] = Path(value).name
    return found


def check_carriers(run, config):
    """
    Raises InputError where a carrier in a run directory was trained with other settings than
    config.json has: what was held out from it may not be what is held out now.
    """
    said = portable(config)
    for name in ("sft", "carrier"):
        file = Path(run) / f"{name}.safetensors"
        trained = read_header(file).get("settings") if file.is_file() else {}
        if not isinstance(trained, dict):
            raise InputError(f"{file}: its header has no settings; remove it and train again")
        for key in sorted(trained.keys() & said.keys() - set(FREE)):
            if trained[key] != said[key]:
                raise InputError(f"{file}: was trained with {key} {trained[key]!r}, and it is now "
                                 f"{said[key]!r}; use the same settings or another run directory")


@contextlib.contextmanager
def alone(run):
    """
    Within it no other process works in a run directory: a lock that ends with the process that
    holds it, however that ends. What an interrupted write left there is removed. Raises InputError
    where another process holds it, and where a link leads out of the directory.
    """
    run = Path(run)
    for path in run.rglob("*"):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link; put the file itself into the run directory")
    with open(run / ".lock", "w") as lock:
        hold(lock, run)
        yield


@parallel.once
def hold(lock, run):
    """Take the lock of a run directory, and remove what an interrupted write left there."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process works in {run}; wait for its end, or choose another "
                         "run directory") from None
    for path in run.rglob(f"*{PARTIAL}"):
        path.unlink()


@parallel.once
def open_run(out, name, resume, config):
    """
    The run directory `out` (default: the first free runs/NAME, runs/NAME-2, …), with config.json in
    it. With `resume` an existing one is taken up again. Raises InputError where a run is there
    already, or was started with other options.
    """
    if resume and not out:
        raise InputError("--resume needs --out, the run directory to resume")
    run = Path(out) if out else free_directory(name)
    file = run / "config.json"
    if not file.is_file():
        check_carriers(run, config)
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_json(file, config)
        except OSError as e:
            raise InputError(f"cannot make the run directory {run} ({e}); "
                             "choose another --out") from None
        return run
    if not resume:
        raise InputError(f"{run} holds a run already; go on with --resume or choose another --out")
    old = read_json(file)
    new = json.loads(json.dumps(config))  # tuples are lists in the file
    for key in new:
        unknown = key == "chat_fingerprint" and key not in old  # a run of an older version
        if key not in ("versions", "made") and not unknown and old.get(key) != new[key]:
            raise InputError(f"{file}: {key} was {old.get(key)!r} and is now {config[key]!r}; "
                             "resume with the same options, or choose another --out")
    check_carriers(run, config)
    return run


def free_directory(name):
    """The first of runs/NAME, runs/NAME-2, … that is not there yet."""
    for k in itertools.count(1):
        run = Path("runs") / (name if k == 1 else f"{name}-{k}")
        if not run.exists():
            return run


@contextlib.contextmanager
def timed(run, results, phase, resumed):
    """
    Adds the seconds spent within it to results["seconds"][phase], in results.json too; to those of
    earlier sessions where the phase is `resumed`. A kill that nobody hears of leaves its session out.
    """
    start, before = time.time(), results["seconds"].get(phase, 0) if resumed else 0

    def note():
        results["seconds"][phase] = round(before + time.time() - start, 2)
        write_json(Path(run) / "results.json", results)

    try:
        yield
    except KeyboardInterrupt:
        note()
        raise
    note()


def read_results(run):
    """
    results.json of a run directory, as far as it goes; "seconds" is always in it. What stopped LCDD
    stands in the carrier, too.
    """
    file, carrier = Path(run) / "results.json", Path(run) / "carrier.safetensors"
    found = read_json(file) if file.is_file() else {}
    if carrier.is_file() and "stopped" not in found:
        header = read_header(carrier)
        check_fields(carrier, header, {"metrics": (None, RESULTS)})
        found["stopped"] = (header.get("metrics") or {}).get("stopped")
    check_fields(file, found, RESULTS)
    found["seconds"] = found.get("seconds") or {}
    return {name: value for name, value in found.items() if value is not None}
