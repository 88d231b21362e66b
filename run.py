"""
What every command shares: its habits on the command line, interruption, progress, tables, and the
run directory with its pieces: configuration, chat, splits, model.
"""
import argparse
import contextlib
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import torch
from tqdm import tqdm

import ggufs
import machine
import model
import parallel
from chat import Chat
from data import (SIZES, SUFFIXES, check_patterns, judged_by, read, read_tests, split,
                  task_name)
from files import (COUNT, NO_TEXT, NUMBER, PARTIAL, TEXT, Failed, InputError, check_fields,
                   fingerprint, one_line, read_header, read_json, write_json)

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
# what results.json may hold; the metrics of evaluate.py have a table there
RESULTS = {
    "seconds": (None, {"*": ((int, float), 0, 1e12)}), "task": (None, TEXT),
    "stopped": (None, {"reason": TEXT, "steps": COUNT, "budget": (None, NUMBER),
                       "loss": (None, NUMBER), "within": ((bool, None), None, None)}),
}
# settings that may change between training and use: where things lie, and how they are computed
FREE = ("model", "data", "sft", "out", "resume", "go_on", "dry_run", "device", "versions",
        "made")
HUB_ID = r"\w[\w.-]*/[\w.-]+"


# ---- the command line

def cli(main, together=False):
    """
    Run main(). An InputError becomes one line on stderr and exit status 2, Ctrl-C or SIGTERM one
    line and status 130. together: torchrun may start it as several processes.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name or an answer beyond the terminal's letters
    try:
        try:
            join(together)
            main()
            sys.stdout.flush()
            parallel.end()
        except (Exception, KeyboardInterrupt) as e:
            parallel.speak_once(e)
            raise
        finally:
            for meter in list(METERS):
                meter.close()
    except InputError as e:
        print(f"{'failed' if isinstance(e, Failed) else 'error'}: {e}", file=sys.stderr)
        sys.exit(e.status)
    except KeyboardInterrupt as e:
        print(f"interrupted{e}", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as e:
        if not short_of_memory(e):
            raise
        print(f"error: more memory was needed than there is ({one_line(e, 200)}); ask for less at a "
              "time: --micro-batch, --batch, --max-len, --max-new-tokens", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except OSError as e:
        file, reason = one_line(e.filename or "the output", 200), one_line(e.strerror or e)
        print(f"error: {file}: {reason}; correct that and run the command again", file=sys.stderr)
        sys.exit(2)


def join(together):
    """Take up work as one of torchrun's processes. Raises InputError where that cannot be."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not together:
        raise InputError("torchrun starts lcdd.py, eraser.py and evaluate.py; start this with python")
    try:
        parallel.start()
    except (KeyError, ValueError, RuntimeError) as e:
        raise InputError(f"WORLD_SIZE is set, and the processes do not meet ({e}); start them with "
                         "torchrun, or unset it") from None


def launcher():
    """How this command was started, in words of a command line."""
    n = parallel.world()
    return ["python"] if n == 1 else ["torchrun", "--nproc-per-node", str(n)]


def made_by(script, words):
    """
    What a run was made with, beside its settings: command line, threads, processes, and the git
    revision of the code where it has one, `-dirty` where files differ from it.
    """
    revision, here = None, Path(__file__).parent
    if (here / ".git").exists():
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):
            told = subprocess.run(asked, capture_output=True, text=True, errors="replace")
            revision = told.stdout.strip() or None
    return {"command": shlex.join([*launcher(), script, *map(str, words)]), "revision": revision,
            "threads": torch.get_num_threads(), "processes": parallel.world()}


def check_processes(option, count):
    """Raises InputError where more processes work together than an option has samples for them."""
    if parallel.world() > count:
        raise InputError(f"{option}: {count} samples for {parallel.world()} processes; let torchrun start "
                         f"{count} at most")


def short_of_memory(error):
    """Did Python, torch on the CPU or torch on a GPU find no memory?"""
    said = ("can't allocate memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(s in str(error) for s in said)


class Interrupted(KeyboardInterrupt):
    """An interruption; its text is the command that resumes."""

    def __str__(self):
        return f"; resume with: {self.args[0]}"


def resume_command(script, argv, run):
    """The command line that resumes a run directory, however the interrupted one was written."""
    kept, skip = [], False
    for word in argv:
        ours = word in ("--resume", "--out") or word.startswith("--out=")
        if not skip and not ours:
            kept.append(str(word))
        skip = word == "--out"
    return shlex.join([*launcher(), script, *kept, "--out", str(run), "--resume"])


class Parser(argparse.ArgumentParser):
    """
    A script's command line, its docstring as it stands. What is wrong on it is an InputError; no
    option is given twice, where the last would silently win, or by the beginning of its name.
    """

    def __init__(self, description=None, **more):
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **more)
        self.given = set()
        self.register("action", None, Once)
        self.register("action", "store", Once)

    def parse_known_args(self, args=None, namespace=None):
        self.given = set()
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise InputError(f"{message}; --help shows all options")


class Once(argparse.Action):
    """An option with a value, given once; a text is one."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value == [] and self.nargs is None:          # what argparse makes of a lone --
            value = ""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(self.dest, text)
        if self.dest in parser.given:
            raise InputError(f"{option_string} {value}: {option_string} "
                             f"{getattr(namespace, self.dest)} is given already; give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, value)


def flag(name):
    """An option's name in a namespace, as it is written on the command line."""
    return "--" + name.replace("_", "-")


def check_numbers(o, free=()):
    """
    Raises InputError for an option that is an empty text or no text at all, no finite number below
    2³¹, or below 0 and not named in `free`.
    """
    for name, given in vars(o).items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, (str, Path)):
                check_text(name, str(value))
            elif isinstance(value, (int, float)):
                check_number(name, value, name in free)


def check_number(name, value, free):
    """Raises InputError for the number of an option; `free`: it may be below 0."""
    if value < 0 and not free or not abs(value) < 2**31:
        raise InputError(f"{flag(name)} {value}: has to be a finite number, not below 0 and below 2³¹")


def check_text(name, text):
    """Raises InputError for the text of an option that is empty, or cannot be written to a file."""
    if not text.strip():
        raise InputError(f"{flag(name)} is empty; leave it out or give it a value")
    if NO_TEXT.search(text):
        raise InputError(f"{flag(name)} {text} is not UTF-8 text; write it in UTF-8")


def fields_of(parser, complete=False):
    """
    What the options of a parser may be in a file that keeps them: a table for check_fields().
    complete: those with a default have to be there.
    """
    table = {}
    for action in parser._actions:
        if action.choices:
            table[action.dest] = tuple(action.choices)
        elif action.nargs == 0:
            table[action.dest] = ((bool,), None, None)
        elif action.type in (int, float):
            types = (int,) if action.type is int else (int, float)
            table[action.dest] = (types, -2**31, 2**31)
        else:
            table[action.dest] = TEXT
        if not complete or action.default in (None, argparse.SUPPRESS):
            table[action.dest] = (None, table[action.dest])
    return table


def check_device(name):
    """Raises InputError where torch cannot compute on --device `name`."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"--device {name}: choose cpu, cuda or cuda:0, cuda:1, …")
    if name == "cpu":
        return
    index = name.removeprefix("cuda").removeprefix(":")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if parallel.world() > 1 and (index or int(os.environ["LOCAL_WORLD_SIZE"]) > present):
        raise InputError(f"--device {name}: each of torchrun's processes wants a GPU of its own, and torch "
                         f"sees {present}; let it start as many, with --device cuda, or use --device cpu")
    if int(index or 0) >= present:
        which = "such GPU" if index else "GPU here"
        raise InputError(f"--device {name}: torch sees no {which}; use --device cpu")


# ---- while it runs

@contextlib.contextmanager
def patient():
    """
    Within it, Ctrl-C and SIGTERM only make the function that it yields return True, in all processes
    where one has it, so that work can stop between two steps; KeyboardInterrupt follows at the end.
    """
    arrived, before = [], {}

    def note(number, frame):
        arrived.append(number)

    def interrupted():
        return parallel.summed(len(arrived)) > 0

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted():
        raise KeyboardInterrupt


def duration(seconds):
    """Seconds as people say them: 45 s, 12 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Meter:
    """How far a piece of work is: a bar where the output is a terminal, and lines where it is not."""

    def __init__(self, label, total, start=0):
        self.label, self.total, self.start, self.began = label, total, start, time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            self.bar = tqdm(desc=label, total=total, initial=start, file=sys.stdout,
                            dynamic_ncols=True)
            METERS.add(self)

    def show(self, done, text=""):
        """Show that `done` of the total are done, a text about them, and the time left."""
        if self.bar is not None:
            self.bar.n, self.bar.total = done, self.total
            self.bar.set_postfix_str(text)
            return
        spent = time.monotonic() - self.began
        left = spent / max(1, done - self.start) * (self.total - done)
        parts = [f"{self.label} {done}/{self.total}", text, f"left {duration(left)}"]
        print("  ".join(part for part in parts if part), flush=True)

    def close(self):
        """End the bar's line, so that others can be printed."""
        if self.bar is not None:
            self.bar.close()


METERS = weakref.WeakSet()  # those with a bar, which cli() closes before it prints an error


def ticker(label, total):
    """A function that shows how many of `total` are done; lines come every five seconds at most."""
    meter, shown = Meter(label, total), time.monotonic()

    def tell(done):
        nonlocal shown
        now = time.monotonic()
        if done and (meter.bar is not None or now - shown > 5):
            shown = now
            meter.show(done)
    return tell


def markdown(header, rows):
    """A Markdown table of cells that are text already."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


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
        own_tests = read_tests(sources[1], task)
    if pattern:
        samples, own_tests = judged_by(samples, pattern), judged_by(own_tests, pattern)
    check_patterns(task, samples)
    for s in own_tests:
        if task_name(task) == "own" and not (s.response or s.pattern):
            raise InputError(f"{tests}: nothing judges the answer to {s.prompt[:60]!r}; give the "
                             "test rows a response or a pattern, or all of them a --pattern")
    parts = split(samples, seed, sizes, own_tests)
    for part in parts.values():
        chat.expect(s.prompt for s in part)
    return parts, sources


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
