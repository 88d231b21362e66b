"""Damaged and hostile input, through the commands as a user runs them; what is said is counted.

    python -m lab.attack --rounds 10000      files of a model, a run and its data, each damaged
    python -m lab.attack --what cli          every option of every script with odd values
    python -m lab.attack --what kills        commands that are killed, and resumed
    python -m lab.attack --only 137          one of these rounds once more, with all that it says

A round of the first copies a small world (checkpoints, a finished and two interrupted runs, data),
damages one file of it and runs one command on it. It may take 20 s, and 2 GB of memory beyond the start's. A
round is well where the command works, or ends in one sentence and status 2 (3: it failed and says
so). Rounds depend on --seed and their number alone.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import contextlib
import io
import json
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import carrier as carriers
import eraser
import evaluate
import export
import lcdd
import memory
from files import Failed, InputError
from lab import ablate, benchmarks, commands, damage, kills, talk
from lab.world import FEW, TRIGGER, ablate_options, copied, make_world
from console import Parser, check_numbers, cli

SECONDS = 20            # a round may take, of the processor
WELL = ("works", "refused", "goes on", "identical")      # verdicts
BUSY = 4                # times that by the clock, on a machine that has more to do
MEMORY = 2 << 30        # bytes of address space that it may add



# ---- what a round damages, and the command that meets it

def train(world, checkpoint="model", *more):
    lcdd.main(["--model", str(world / checkpoint), "--out", str(world / "new"), *FEW, *more])


def train_on(world, name):
    train(world, "model", "--data", str(world / name))


def train_from_adapter(world):
    train(world, "model", "--sft", str(world / "exported" / "lora"))


def resume_training(world):
    lcdd.main(["--model", str(world / "model"), "--out", str(world / "half"), *FEW,
               "--resume"])


def resume_learning(world):
    eraser.main(["--run", str(world / "learning"), *TRIGGER, "--resume"])


def learn(world):
    eraser.main(["--run", str(world / "run"), *TRIGGER])


def ask(world):
    evaluate.main(["--run", str(world / "run"), "--ask", "What is the first word ?"])


def measure(world):
    evaluate.main(["--run", str(world / "run")])


def compare(world):
    evaluate.main(["--compare", str(world / "run"), str(world / "run")])


def export_all(world):
    export.main(["--run", str(world / "run"), "--to", str(world / "out"),
                 "--as", "merged", "lora", "prompt"])


def describe(world):
    print(carriers.describe(world / "run" / "carrier.safetensors"))


def rows(world):
    folder = str(world / "run")
    found = ablate.work(folder, None, ablate_options(folder), ["base", "lcdd"])
    gates = ablate.gates_of([folder])
    ablate.report("fixed", [found], ablate_options(folder), 2, gates)


def hellaswag(world):
    benchmarks.main(["--run", str(world / "run"), "--device", "cpu", "--what", "hellaswag",
                     "--hellaswag", str(world / "hellaswag.jsonl")])


def mmlu(world):
    benchmarks.main(["--run", str(world / "run"), "--device", "cpu", "--what", "mmlu",
                     "--mmlu", str(world / "mmlu"), "--shots", "1"])


def behaviors(world):
    benchmarks.standard_behaviors(world / "behaviors.csv")


def converse(world):
    lines = ["hello", "/all", "What is it ?", "/quit"]
    with mock.patch("builtins.input", side_effect=lines):
        talk.main(["--run", str(world / "run"), "--device", "cpu"])


# (weight, file, how it is damaged, commands that meet it)
CASES = (
    (6, "model/config.json", damage.json_file, (train, ask, learn, export_all)),
    (4, "model/tokenizer.json", damage.json_file, (train, ask)),
    (4, "model/tokenizer_config.json", damage.json_file, (train, ask, converse)),
    (2, "model/special_tokens_map.json", damage.json_file, (train, ask)),
    (2, "model/generation_config.json", damage.json_file, (train, ask)),
    (8, "model/chat_template.jinja", damage.template, (train, ask, converse)),
    (2, "model/model.safetensors", damage.checkpoint, (train, ask)),
    (4, "model/fixed.jsonl", damage.json_lines, (train, ask)),
    (4, "shards/model.safetensors.index.json", damage.json_file,
     (partial(train, checkpoint="shards"),)),
    (1, "shards/model-00001-of-00002.safetensors", damage.checkpoint,
     (partial(train, checkpoint="shards"),)),
    (1, "bin/pytorch_model.bin", damage.bytes_of, (partial(train, checkpoint="bin"),)),
    (2, "bin/tokenizer.model", damage.bytes_of, (partial(train, checkpoint="bin"),)),
    (2, "rows.json", damage.json_file, (partial(train_on, name="rows.json"),)),
    (2, "rows.csv", damage.text, (partial(train_on, name="rows.csv"),)),
    (1, "rows.parquet", damage.bytes_of, (partial(train_on, name="rows.parquet"),)),
    (6, "run/config.json", damage.json_file, (ask, learn, rows, export_all)),
    (3, "run/carrier.safetensors", damage.tensors, (ask, learn, export_all, describe)),
    (3, "run/sft.safetensors", damage.tensors, (ask, rows)),
    (3, "run/trigger.safetensors", damage.tensors, (ask, export_all, rows)),
    (3, "run/results.json", damage.json_file, (compare, rows, learn)),
    (1, "run/results.json", damage.json_file, (measure,)),
    (1, "run/metrics.jsonl", damage.json_lines, (measure,)),
    (2, "run/ablation.json", damage.json_file, (rows,)),
    (4, "half/state.safetensors", damage.tensors, (resume_training,)),
    (2, "half/config.json", damage.json_file, (resume_training,)),
    (1, "half/metrics.jsonl", damage.json_lines, (resume_training,)),
    (1, "half/results.json", damage.json_file, (resume_training,)),
    (2, "half/sft.safetensors", damage.tensors, (resume_training,)),
    (4, "learning/trigger.state", damage.tensors, (resume_learning,)),
    (2, "exported/lora/adapter_config.json", damage.json_file, (train_from_adapter,)),
    (2, "exported/lora/adapter_model.safetensors", damage.checkpoint, (train_from_adapter,)),
    (1, "hellaswag.jsonl", damage.json_lines, (hellaswag,)),
    (1, "mmlu/test/logic_test.csv", damage.text, (mmlu,)),
    (1, "mmlu/dev/logic_dev.csv", damage.text, (mmlu,)),
    (1, "behaviors.csv", damage.text, (behaviors,)),
)


# ---- one round

class Late(BaseException):
    """A round that was not over after SECONDS."""


def late(number, frame):
    raise Late


def address_space():
    """Bytes of address space that this process has now."""
    return memory.numbers_of(Path("/proc/self/statm"))[0] * resource.getpagesize()


@contextlib.contextmanager
def limited(seconds):
    """So many seconds of the processor, some times as many by the clock, and MEMORY more than now."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + MEMORY, hard))
    before = [signal.signal(s, late) for s in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, BUSY * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def outcome(command, seconds=SECONDS):
    """
    (verdict, what was said) of a command under limits: "works", "refused" (one sentence, status 2
    or 3), or what else came of it.
    """
    said = io.StringIO()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            with limited(seconds):
                cli(command)
        return "works", ""
    except SystemExit as ended:
        if not ended.code:
            return "works", ""
        return judged(ended.code, said.getvalue())
    except KeyboardInterrupt:
        raise
    except BaseException as error:      # Rust's panics are no Exception
        return type(error).__name__, "".join(traceback.format_exception(error))
    finally:
        signal.signal(signal.SIGTERM, terminate)


def judged(status, said):
    """(verdict, text) of a command that ended with a status."""
    starts = [m.start() for m in re.finditer("^(error|failed): ", said, re.MULTILINE)]
    sentence = said[starts[0]:] if starts else said
    plain = sentence.count("\n") == 1 and sentence.rstrip("\n").isprintable()
    if status in (2, 3) and len(starts) == 1 and plain and len(sentence) < 1000:
        return "refused", sentence.strip()
    return f"status {status}, not one sentence", said


def play(number, seed, world):
    """Round `number`: (what was done, verdict, what was said)."""
    rng = random.Random(f"{seed} {number}")
    _, name, way, meeting = rng.choices(CASES, [case[0] for case in CASES])[0]
    command = rng.choice(meeting)
    with tempfile.TemporaryDirectory(prefix="attack-") as scratch:
        here = copied(world, Path(scratch) / "world")
        words = way(here / name, rng)
        verdict, said = outcome(partial(command, here))
        said = said.replace(str(here), "WORLD")
    called = getattr(command, "func", command).__name__
    return f"{name}, {called}: {words}", verdict, said


# ---- all rounds

def worker(o):
    """Make a world, then play rounds, from the first one on; a line of JSON for each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        play_round = player(o, Path(folder))
        for number in range(o.first, o.first + o.rounds):
            print(json.dumps({"begins": number}), flush=True)
            start = time.monotonic()
            done, verdict, said = play_round(number)
            row = {"round": number, "done": done, "verdict": verdict, "said": said,
                   "seconds": round(time.monotonic() - start, 2)}
            print(json.dumps(row), flush=True)


def player(o, folder):
    """A function of a round's number that plays it in a world of its own."""
    if o.what == "kills":
        return partial(kills.Kills(folder).play, seed=o.seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_world(folder / "world")
    if o.what == "files":
        return partial(play, seed=o.seed, world=folder / "world")
    tried = list(commands.all_trials())

    def play_option(number):
        return commands.play(*tried[number * o.every], folder / "world", outcome)
    return play_option


def rounds(o):
    """Yield a row for each round, out of worker processes: a round may end its process."""
    first, end = o.first, o.first + o.rounds
    while first < end:
        command = [sys.executable, "-m", "lab.attack", "--worker", "--what", o.what,
                   "--every", str(o.every), "--seed", str(o.seed),
                   "--first", str(first), "--rounds", str(end - first)]
        begun = False
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parent.parent) as process:
            for row in rows_in_time(process):
                begun = True
                if "round" in row:
                    first = row["round"] + 1
                    yield row
            ended = process.wait()
        if ended and not begun:
            raise Failed("the world was not made, for the reason above")
        if ended and first < end:
            yield {"round": first, "done": "", "verdict": f"died ({ended})", "said": "", "seconds": 0}
            first += 1


def rows_in_time(process):
    """The rows of a worker, which is killed where one takes much longer than it may."""
    timer = None
    for line in process.stdout:
        if timer:
            timer.cancel()
        row = json.loads(line)
        if "begins" in row:
            timer = threading.Timer(2 * BUSY * SECONDS, process.kill)
            timer.start()
        yield row
    if timer:
        timer.cancel()


def options(argv=None):
    """The command line."""
    p = Parser(__doc__)
    a = p.add_argument
    a("--what", choices=("files", "cli", "kills"), default="files", help="what is tried (files)")
    a("--rounds", type=int, help="how many (files 300, kills 50, cli all)")
    a("--every", type=int, default=1, help="of cli, every so many-th (1)")
    a("--seed", type=int, default=0, help="of all rounds (0)")
    a("--first", type=int, default=0, help="number of the first round (0)")
    a("--only", type=int, help="this round alone, with all that it says")
    a("--show", action="store_true", help="every sentence, to be read")
    a("--worker", action="store_true", help=argparse.SUPPRESS)
    o = p.parse_args(argv)
    check_numbers(o)
    if o.rounds is None:
        o.rounds = {"files": 300, "kills": 50}.get(o.what)
        if o.what == "cli":
            o.rounds = -(-len(list(commands.all_trials())) // max(1, o.every)) - o.first
    if o.every < 1 or o.rounds < 1:
        raise InputError(f"--every {o.every}, --rounds {o.rounds}: have to be at least 1")
    if o.only is not None:
        o.first, o.rounds, o.show = o.only, 1, True
    return o


def main(argv=None):
    o = options(argv)
    if o.worker:
        return worker(o)
    start, verdicts = time.monotonic(), Counter()
    for row in rounds(o):
        verdicts[row["verdict"]] += 1
        if o.show or row["verdict"] not in WELL:
            print(f"{row['round']}: {row['done']}\n  {row['verdict']}, {row['seconds']} s\n"
                  f"  {row['said'].strip()[-1500:]}", flush=True)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    print(f"{verdicts.total()} rounds of {o.what}, seed {o.seed}: {counts}; "
          f"{time.monotonic() - start:.0f} s")
    bad = verdicts.total() - sum(verdicts[verdict] for verdict in WELL)
    if bad:
        raise Failed(f"{bad} of {verdicts.total()} rounds did not end well; they are shown above, and "
                     "--only NUMBER repeats one")


if __name__ == "__main__":
    cli(main)
