"""
What the three commands share: errors as sentences, files written whole, interruption and resume,
progress, and several processes. Nothing of the method is in here.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path

# Read once, when torch is imported: threads that spin while they wait make two busy processes slow
# each other many times over.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm


# options that are numbers of something: 0 makes no sense
COUNTS = ("batch", "micro_batch", "max_len", "max_new_tokens", "sizes", "steps", "length", "k")


# ---- errors

class InputError(Exception):
    """What a user can mend: one sentence that names the file, field or tensor, and what to do."""
    status = 2


class Failed(InputError):
    """The outcome is not what was wanted: what was measured, and what to change."""
    status = 3


@contextlib.contextmanager
def reading(path, advice="restore the file"):
    """
    Around the library call that reads a user's file, and nothing else: whatever it raises becomes an
    InputError that names the file. Outside of it an error is a bug and shows its traceback.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:      # tokenizers' panics are no Exception
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path}: cannot be read ({said}); {advice}") from error


def run_command(main, together=False):
    """
    Run main(): an InputError, a file that cannot be written and a lack of memory are one line on stderr
    and status 2, a measured failure is status 3, Ctrl-C or SIGTERM 130. together: torchrun may start it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")       # answers may hold what a terminal lacks
    try:
        start_processes(together)
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"{'failed' if error.status == 3 else 'error'}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt as error:
        print(f"interrupted{error}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:             # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except OSError as error:
        name = error.filename or "the output"
        print(f"error: {name}: {error.strerror or error}; correct that and run the command again",
              file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)):
            raise
        print("error: more memory was needed than there is; a smaller --micro-batch or --max-len, "
              "--checkpoint and --delta-dtype bfloat16 take less", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- the command line

def parse(description, options, settings, argv, preset=None):
    """
    The command line as a namespace. options: {name: (default, help)}, where a default says what is wanted:
    a number, a text, False for a switch, a list for so many numbers, a tuple of choices, the first the
    default, or a type for what may be left out. settings: {name: value} that are no options. preset(o):
    other defaults, {name: value}.
    """
    p = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in options.items():
        flag, shown = "--" + name.replace("_", "-"), f"{text} ({default})"
        if default is False:
            p.add_argument(flag, action="store_true", help=text)
        elif isinstance(default, tuple):
            choices = [choice for choice in default if choice]
            p.add_argument(flag, default=default[0], choices=choices, help=text, metavar=name.upper())
        elif isinstance(default, list):
            p.add_argument(flag, type=int, nargs=len(default), default=default, metavar="N", help=shown)
        elif isinstance(default, type):
            p.add_argument(flag, type=default, help=text, required=name == "run")
        else:
            p.add_argument(flag, type=type(default), default=default, help=shown)
    p.set_defaults(**settings)
    if preset:
        p.set_defaults(**preset(p.parse_args(argv)))
    o = p.parse_args(argv)
    check_options(o)
    return o


def check_options(o):
    """Raises InputError for a device that is not there and numbers that cannot be."""
    for name, value in vars(o).items():
        flag = "--" + name.replace("_", "-")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not 0 <= number < 2**31:
                raise InputError(f"{flag} {number}: has to be a number from 0 on")
            if number == 0 and name in COUNTS or number == "":
                raise InputError(f"{flag} {number}: has to be at least 1; leave it out or give it a value")
    kind, _, index = o.device.partition(":")
    if kind not in ("cpu", "cuda") or index and not index.isdigit():
        raise InputError(f"--device {o.device}: choose cpu, cuda, or cuda:0, cuda:1, …")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {o.device}: torch sees no such GPU here; use --device cpu")


def usual_device():
    """cuda where there is a GPU, else cpu; one GPU a process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def resume_command(words=None, **changed):
    """The command line that was given, with --resume and some options changed."""
    words = [Path(sys.argv[0]).name, *(sys.argv[1:] if words is None else words)]
    for name in ("--resume", *changed):
        while name in words:
            at = words.index(name)
            del words[at:at + (1 if name == "--resume" else 2)]
    for name, value in changed.items():
        words += [name, str(value)]
    return shlex.join(["python", *words, "--resume"])


def set_threads(net):
    """One thread for a model narrower than 512, where barriers cost more than they bring; else torch's."""
    if net.device.type == "cpu" and net.config.hidden_size < 512 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# ---- files, written whole or not at all

@contextlib.contextmanager
def whole(path):
    """A partial file to write, which takes the place of `path` once it is whole; the first process's."""
    partial = Path(f"{path}.partial{rank() or ''}")
    try:
        yield partial
        if rank() == 0:
            os.replace(partial, path)
        summed(0)                       # no process goes on before the file is there
    except (OSError, RuntimeError, SafetensorError) as error:       # the last two: a full disk, by torch's and its word
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({reason}); make room or choose another place, and run the "
                         "command again") from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file: after a crash the old file stands, never half of the new one."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path, obj):
    """Write an object as JSON."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """The object in a JSON file. Raises InputError if there is none."""
    with reading(path):
        found = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__} where an object belongs; restore the file")
    return found


def save_tensors(path, tensors, **header):
    """Write a safetensors file, with JSON values in its header."""
    texts = {key: json.dumps(value) for key, value in header.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with whole(path) as partial:
        save_file(tensors, partial, texts)


def load_tensors(path, device="cpu"):
    """(tensors, header) of a file that save_tensors() wrote. Raises InputError if it is damaged."""
    with reading(path, "restore it, or run the command that writes it"):
        with safe_open(path, framework="pt", device=str(device)) as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            header = {key: json.loads(text) for key, text in (f.metadata() or {}).items()}
    check_finite(path, tensors)
    return tensors, header


def check_finite(path, tensors):
    """Raises InputError naming a tensor that holds NaN or infinity."""
    for name, t in tensors.items():
        if t.is_floating_point() and t.numel() and not t.isfinite().all():
            raise InputError(f"{path}: tensor {name} holds NaN or infinity; restore the file")


def digest(tensors, dtype=None):
    """A short hash of named tensors: names, shapes and bytes, rounded to `dtype` if it is given."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach()
        t = t.to("cpu", dtype or t.dtype).contiguous()
        h.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy())
    return h.hexdigest()[:16]


def fingerprint(*paths):
    """A short hash of files."""
    h = hashlib.sha256()
    for path in paths:
        h.update(Path(path).read_bytes())
    return h.hexdigest()[:16]


# ---- a phase of a run: logged, interrupted, resumed with the same bits

class Stateful:
    """A part of a Phase whose attributes, all but the options `o`, are its state."""

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "o"}

    def load_state_dict(self, state):
        vars(self).update(state)


class Phase:
    """
    A loop of `total` steps in the run directory `run`: logged in metrics.jsonl, shown as a progress bar, and
    saved in one file NAME.state, out of which the same loop goes on. Within it Ctrl-C and SIGTERM wait for
    pause(). parts: objects with state_dict() and load_state_dict(). start: the step to go on with.
    """

    def __init__(self, run, name, total, every, **parts):
        self.run, self.name, self.every, self.parts = Path(run), name, every, parts
        self.file, self.log, self.start, self.signals = self.run / f"{name}.state", self.run / "metrics.jsonl", 0, 0
        if self.file.is_file():
            with reading(self.file, "remove it to start this phase again"):
                saved = torch.load(self.file, map_location="cpu", weights_only=True)
                for key, part in parts.items():
                    part.load_state_dict(saved[key])
                self.start = saved["step"]
        rows = read_rows(self.log)
        kept = [row for row in rows if row["phase"] != name or row["step"] < self.start]
        write_text(self.log, "".join(json.dumps(row) + "\n" for row in kept))
        self.bar = bar(name, total, self.start)

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.signals += 1

    def __exit__(self, kind, error, trace):
        self.bar.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def pause(self, t):
        """Save the state as it stands before step t, now and then and when interrupted, which ends the loop."""
        stop = summed(self.signals) > 0
        if stop or t % self.every == 0 and t > self.start:
            parts = {key: part.state_dict() for key, part in self.parts.items()}
            with whole(self.file) as partial:
                torch.save({"step": t, **parts}, partial)
        if stop:
            raise KeyboardInterrupt

    def done(self, step, loss):
        """Count a step. Raises InputError if its loss is not finite; the state before it stays."""
        if not math.isfinite(loss):
            raise InputError(f"{self.name}: the loss of step {step + 1} is {loss}; start again with a lower rate")
        self.bar.update()

    def row(self, step, **values):
        """Log the numbers of one step."""
        self.bar.set_postfix_str("  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None))
        if rank() == 0:
            with open(self.log, "a") as f:
                f.write(json.dumps({"phase": self.name, "step": step, **values}) + "\n")


def bar(label, total, start=0):
    """A tqdm bar with the time left, on stderr; few lines where that is no terminal."""
    every = 0.2 if sys.stderr.isatty() else 20
    return tqdm(desc=label, total=total, initial=start, mininterval=every, maxinterval=every,
                disable=rank() > 0, dynamic_ncols=True)


def read_rows(path):
    """The objects of a file of JSON lines, without one that a crash cut short; [] without a file."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@contextlib.contextmanager
def resumable(again):
    """Within it an interruption names the command that goes on: `again`."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; resume with: {again}") from None


# ---- several processes: torchrun --nproc-per-node N -- lcdd.py …
# Each runs the whole script and holds all weights. The samples of a batch and the prompts are split
# between them, gradients and sums are added up; the first one alone writes and prints.

ALONE = False       # is this process within once()?


def start_processes(together):
    """Join the processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not together:
        raise InputError("torchrun starts lcdd.py, eraser.py and evaluate.py; start this with python")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    """How many processes work together; one within once()."""
    return dist.get_world_size() if dist.is_initialized() and not ALONE else 1


def own_part(things):
    """This process's part of a list."""
    return things[rank()::processes()]


def add_up(tensors):
    """Sum tensors over all processes, in place."""
    if processes() > 1:
        for t in tensors:
            dist.all_reduce(t)


def summed(value):
    """The sum of a number over all processes."""
    total = torch.tensor(float(value), dtype=torch.float64)
    add_up([total])
    return total.item()


def once(function, *words):
    """What function(*words) returns in the first process, which alone calls it."""
    global ALONE
    returned = [None]
    if rank() == 0:
        ALONE = True                    # what it writes waits for no other process
        returned = [function(*words)]
        ALONE = False
    if processes() > 1:
        dist.broadcast_object_list(returned)
    return returned[0]


def collected(things):
    """The lists of all processes, one after another."""
    lists = [things]
    if processes() > 1:
        lists = [None] * processes()
        dist.all_gather_object(lists, things)
    return sum(lists, [])
