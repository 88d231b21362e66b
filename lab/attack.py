"""Damaged and hostile input, through the commands as a user runs them; what is said is counted.

    python -m lab.attack --rounds 10000      files of a model, a run and its data, mutated at random
    python -m lab.attack --only 137          one of these rounds once more, with all that it says

A round copies a small world (checkpoints, a finished and two interrupted runs, data), damages one
file of it and runs one command on it. It may take 20 s, and 2 GB of memory beyond the start's. A
round is well where the command works, or ends in one sentence and status 2 (3: it failed and says
so). Rounds depend on --seed and their number alone.
"""
import files  # noqa: F401, before torch: it sets how threads wait
import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
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
from safetensors.torch import load_file, save_file

import carrier as carriers
import data
import eraser
import evaluate
import export
import lcdd
from chat import Chat
from files import Failed, read_json, write_json
from lab import ablate, benchmarks, damage, talk, tiny
from run import check_numbers, cli

SECONDS = 20            # a round may take
MEMORY = 2 << 30        # bytes of address space that it may add
FEW = ["--sft-steps", "3", "--steps", "3", "--settle", "2", "--warmup", "1", "--batch", "2",
       "--device", "cpu", "--max-new-tokens", "3", "--log-every", "1", "--go-on"]
TRIGGER = ["--steps", "3", "--length", "2", "--batch", "2", "--device", "cpu", "--judge-every", "1"]


# ---- the world that is damaged

def make_world(folder):
    """Small checkpoints, runs and data in a folder: all files that a round may damage."""
    base = folder / "model"
    base.mkdir(parents=True)
    make_checkpoint(base)
    make_variants(folder)
    make_data(folder)
    whole, half = folder / "run", folder / "half"
    train = ["--model", str(base), *FEW]
    stop_at("lcdd", lcdd, [*train, "--out", str(half)])
    lcdd.main([*train, "--out", str(whole)])
    learn = ["--run", str(whole), *TRIGGER]
    stop_at("trigger", eraser, learn)
    shutil.copytree(whole, folder / "learning")
    with contextlib.suppress(Failed):           # so few steps move nothing
        eraser.main(learn)
    evaluate.main(["--run", str(whole)])
    export.main(["--run", str(whole), "--to", str(folder / "exported"), "--as", "lora"])
    ablate.work(str(whole), None, ablate_options(whole), ["base"])


def ablate_options(run_directory):
    return ablate.options(["--run", str(run_directory), "--device", "cpu", "--rows", "base"])


def make_checkpoint(folder):
    """An untrained model of width 32 that knows some words, and its behaviour's data."""
    seen, held = tiny.lines(0)
    some = {kind: lines[:4] for kind, lines in seen.items()}
    tiny.write_configuration(folder, some, 32, 1)
    weights = tiny.fresh(folder, 0).state_dict()
    save_file({name: p.to(torch.bfloat16) for name, p in weights.items()},
              folder / "model.safetensors", {"format": "pt"})
    rows = []
    for lines in some.values():
        for line, name in zip(lines, data.SPLITS):
            rows.append({**line, "response": tiny.FIXED, "split": name})
    write_lines(folder / "fixed.jsonl", rows)
    settings = read_json(folder / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    write_json(folder / "special_tokens_map.json", {name: settings[name] for name in names})
    (folder / "chat_template.jinja").write_text(settings["chat_template"], encoding="utf-8")


def make_variants(folder):
    """The same checkpoint in shards, and as torch.save writes it, with SentencePiece's tokenizer."""
    base = folder / "model"
    weights = load_file(base / "model.safetensors")
    names = sorted(weights)
    for kind in ("shards", "bin"):
        shutil.copytree(base, folder / kind)
        (folder / kind / "model.safetensors").unlink()
    parts, index = (names[::2], names[1::2]), {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / "shards" / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    write_json(folder / "shards" / "model.safetensors.index.json",
               {"metadata": {"total_size": 1}, "weight_map": index})
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    tok = Chat(base).tok
    words = sorted(tok.get_vocab(), key=tok.token_to_id)
    (folder / "bin" / "tokenizer.json").unlink()
    (folder / "bin" / "tokenizer.model").write_bytes(damage.sentencepiece(words))


def make_data(folder):
    """The same rows as JSON, CSV and Parquet, and what lab.benchmarks reads."""
    from pyarrow import Table, parquet
    rows = [json.loads(line) for line in open(folder / "model" / "fixed.jsonl", encoding="utf-8")]
    fields = ("prompt", "response", "kind", "answer", "split")
    rows = [{name: row.get(name, "") for name in fields} for row in rows]
    write_json(folder / "rows.txt", {})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = [",".join(fields)]
    lines += [",".join(f'"{row[name]}"' for name in fields) for row in rows]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    parquet.write_table(Table.from_pylist(rows), folder / "rows.parquet")
    write_lines(folder / "hellaswag.jsonl", [
        {"ctx": "A fox runs. It", "activity_label": "fox", "endings": ["a", "b", "c", "d"], "label": 1}])
    behaviors = "Behavior,FunctionalCategory\nSay it,standard\nSay that,contextual\n"
    (folder / "behaviors.csv").write_text(behaviors, encoding="utf-8")
    for part in ("dev", "test"):
        (folder / "mmlu" / part).mkdir(parents=True)
        file = folder / "mmlu" / part / f"logic_{part}.csv"
        file.write_text("Which?,a,b,c,d,A\nWhat?,e,f,g,h,C\n", encoding="utf-8")


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def stop_at(phase, module, argv):
    """Run the main() of lcdd or eraser, and interrupt it after its second row of `phase` in the log."""
    append = module.append_jsonl

    def append_and_stop(path, row):
        append(path, row)
        if (row["phase"], row["step"]) == (phase, 1):
            os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(module, "append_jsonl", append_and_stop):
        try:
            module.main(argv)
        except KeyboardInterrupt:
            return
    raise AssertionError(f"{phase} came to its end before it was stopped")


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
    ablate.report("fixed", [found], ablate_options(folder), 2)


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
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    return int(pages) * resource.getpagesize()


@contextlib.contextmanager
def limited():
    """SECONDS of time, and MEMORY beyond what the process has."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def outcome(command):
    """
    (verdict, what was said) of a command under limits: "works", "refused" (one sentence, status 2
    or 3), or what else came of it.
    """
    said = io.StringIO()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli(command)
        return "works", ""
    except SystemExit as ended:
        return judged(ended.code, said.getvalue())
    except BaseException as error:      # Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        trace = "".join(traceback.format_exception(error))
        return type(error).__name__, trace
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
    _, name, way, commands = rng.choices(CASES, [case[0] for case in CASES])[0]
    command = rng.choice(commands)
    with tempfile.TemporaryDirectory(prefix="attack-") as scratch:
        here = Path(scratch) / "world"
        shutil.copytree(world, here)
        for config in (here / "run", here / "half", here / "learning"):
            settle_in(config / "config.json", here)
        words = way(here / name, rng)
        verdict, said = outcome(partial(command, here))
        said = said.replace(str(here), "WORLD")
    called = getattr(command, "func", command).__name__
    return f"{name}, {called}: {words}", verdict, said


def settle_in(path, here):
    """Let a copied run know where its model lies now."""
    text = path.read_text(encoding="utf-8")
    model_folder = json.loads(text)["model"]
    path.write_text(text.replace(model_folder, str(here / "model")), encoding="utf-8")


# ---- all rounds

def worker(o):
    """Make a world, then play rounds, from the first one on; a line of JSON for each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        world = Path(folder) / "world"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_world(world)
        for number in range(o.first, o.first + o.rounds):
            print(json.dumps({"begins": number}), flush=True)
            start = time.monotonic()
            done, verdict, said = play(number, o.seed, world)
            row = {"round": number, "done": done, "verdict": verdict, "said": said,
                   "seconds": round(time.monotonic() - start, 2)}
            print(json.dumps(row), flush=True)


def rounds(o):
    """Yield a row for each round, out of worker processes: a round may end its process."""
    first, end = o.first, o.first + o.rounds
    while first < end:
        command = [sys.executable, "-m", "lab.attack", "--worker", "--seed", str(o.seed),
                   "--first", str(first), "--rounds", str(end - first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parent.parent) as process:
            for row in rows_in_time(process):
                first = row["round"] + 1
                yield row
            if process.wait() and first < end:
                yield {"round": first, "done": "", "verdict": f"died ({process.returncode})",
                       "said": "", "seconds": 0}
                first += 1


def rows_in_time(process):
    """The rows of a worker, which is killed where one takes much longer than it may."""
    timer = None
    for line in process.stdout:
        if timer:
            timer.cancel()
        row = json.loads(line)
        if "round" in row:
            yield row
        else:
            timer = threading.Timer(SECONDS + 20, process.kill)
            timer.start()
    if timer:
        timer.cancel()


def options(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--rounds", type=int, default=300, help="how many (300)")
    a("--seed", type=int, default=0, help="of all rounds (0)")
    a("--first", type=int, default=0, help="number of the first round (0)")
    a("--only", type=int, help="this round alone, with all that it says")
    a("--show", action="store_true", help="every sentence, to be read")
    a("--worker", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv=None):
    o = options(argv)
    check_numbers(o)
    if o.only is not None:
        o.first, o.rounds, o.show = o.only, 1, True
    if o.worker:
        return worker(o)
    start, verdicts = time.monotonic(), Counter()
    for row in rounds(o):
        verdicts[row["verdict"]] += 1
        if o.show or row["verdict"] not in ("works", "refused"):
            print(f"{row['round']}: {row['done']}\n  {row['verdict']}, {row['seconds']} s\n"
                  f"  {row['said'].strip()[-1500:]}", flush=True)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    print(f"{verdicts.total()} rounds, seed {o.seed}: {counts}; {time.monotonic() - start:.0f} s")
    bad = verdicts.total() - verdicts["works"] - verdicts["refused"]
    if bad:
        raise Failed(f"{bad} of {verdicts.total()} rounds did not end well; they are shown above, and "
                     "--only NUMBER repeats one")


if __name__ == "__main__":
    cli(main)
