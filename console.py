"""
What every command shares in a terminal: its options and how it ends, interruption, progress, tables.
"""
import argparse
import contextlib
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

import parallel
from files import NO_TEXT, TEXT, Failed, InputError, one_line

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
    """
    How this command was started, in words of a command line. Without the dashes torchrun takes our
    --run for the beginning of an option of its own.
    """
    n = parallel.world()
    return ["python"] if n == 1 else ["torchrun", "--nproc-per-node", str(n), "--"]


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
