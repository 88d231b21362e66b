"""
lcdd.py, eraser.py and the ablations killed (SIGKILL) and resumed, for lab/attack.py: does the end
have the same weights, trigger, results and log as a run that nothing disturbed?

Half of the kills come at a random moment, half at a chosen instant: before or after a file takes its
place, is synced or removed, or in the middle of a line of the log. Every process is forked from one
that has imported everything and computed nothing, so that a kill hits the work and not the imports.
"""
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # noqa: F401, what the first optimizer would import, in every process anew

import eraser
import lcdd
import training
from files import InputError, load_tensors, read_json, read_jsonl
from lab import ablate
from lab.world import FEW, TRIGGER, ablate_options, make_world

LONGER = {"--sft-steps": "8", "--steps": "12", "--settle": "6", "--save-every": "3"}
ROWS = ["base", "lcdd", "sft-long", "mask-ce", "base trigger"]
LEFT = {".lock", "figure.png"}      # files that are not compared


# ---- the commands: each works in a folder of its own, and resumes there

def train(world, folder):
    """lcdd.py with the steps of LONGER, so that a kill finds states between them."""
    words = ["--model", str(world / "model"), "--out", str(folder / "run"), "--resume", *FEW]
    for option, value in LONGER.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    lcdd.main(words)


def learn(world, folder):
    """eraser.py on the run in the folder, twelve steps of the trigger."""
    words = ["--run", str(folder / "run"), *TRIGGER, "--resume"]
    words[words.index("--steps") + 1] = "12"
    with contextlib.suppress(InputError):       # so few steps move nothing, and it says so
        eraser.main(words)


def rows(world, folder):
    """The rows ROWS of the ablations, of the run in the folder."""
    o = ablate_options(folder / "run")
    ablate.work(str(folder / "run"), None, o, ROWS)


def nothing(world, folder):
    """An empty run directory: training begins there."""
    (folder / "run").mkdir(parents=True)


def finished(world, folder):
    """The world's finished run, without its trigger and its table."""
    shutil.copytree(world / "run", folder / "run")
    for name in ("trigger.safetensors", "trigger.state", "ablation.json"):
        (folder / "run" / name).unlink(missing_ok=True)


COMMANDS = {"lcdd.py": (nothing, train), "eraser.py": (finished, learn), "lab.ablate": (finished, rows)}
SHARES = ("lcdd.py",) * 3 + ("eraser.py", "lab.ablate")


# ---- processes

def forked(work):
    """Run work() in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 0
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), 2)
    try:
        torch.set_num_threads(1)
        work()
    except BaseException as error:
        status = 1
        Path(f"/tmp/attack-{os.getpid()}.txt").write_text("".join(traceback.format_exception(error)))
    os._exit(status)


def ended(pid):
    """(exit status, what it raised) of a process, once it has ended."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    file, said = Path(f"/tmp/attack-{pid}.txt"), ""
    if file.is_file():
        said = file.read_text()
        file.unlink()
    return status, said


@contextlib.contextmanager
def instants(at, seen):
    """
    Within it the process kills itself at the instant number `at`, or counts instants into the list
    `seen` where `at` is None.
    """
    def met():
        seen.append(1)
        return len(seen) == at

    def around(function, *args, **kwargs):
        """Two instants, before and after a change to the disk."""
        if met():
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*args, **kwargs)
        if met():
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def append(path, row):
        """An instant in the middle of a line."""
        line = json.dumps(row) + "\n"
        with open(path, "a", encoding="utf-8") as f:
            f.write(line[:len(line) // 2])
            f.flush()
            if met():
                os.kill(os.getpid(), signal.SIGKILL)
            f.write(line[len(line) // 2:])

    with contextlib.ExitStack() as stack:
        for name in ("replace", "fsync", "unlink"):
            stack.enter_context(mock.patch.object(os, name, partial(around, getattr(os, name))))
        for module in (training, eraser):
            stack.enter_context(mock.patch.object(module, "append_jsonl", append))
        yield


def with_instants(at, work, count=None):
    """work() until the instant `at`; None: to its end, with the number of instants in the file `count`."""
    seen = []
    with instants(at, seen):
        work()
    if count:
        count.write_text(str(len(seen)))


# ---- what is compared

def untimed(value):
    """A JSON value without seconds."""
    if isinstance(value, dict):
        return {key: untimed(v) for key, v in value.items() if key != "seconds"}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def contents(run):
    """{file: what it holds} of a run directory; NaN equals NaN."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or path.name in LEFT:
            continue
        if path.suffix == ".safetensors":
            tensors, header = load_tensors(path)
            bits = {key: (str(t.dtype), t.shape, t.reshape(-1).view(torch.uint8).tolist())
                    for key, t in tensors.items()}
            found[name] = bits, json.dumps(untimed(header), sort_keys=True)
        elif path.suffix == ".jsonl":
            lines = len(path.read_text(encoding="utf-8").splitlines())
            found[name] = lines, json.dumps(untimed(read_jsonl(path)))
        elif path.suffix == ".json":
            found[name] = json.dumps(untimed(read_json(path)), sort_keys=True)
        elif path.suffix != ".md":              # tables have seconds in them
            found[name] = path.read_bytes()
    return found


def differences(found, wanted):
    """Names of the files that differ, are missing or are too many."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


# ---- the rounds

class Kills:
    """References in the folder `here`, and rounds that are compared with them."""

    def __init__(self, here):
        self.world, self.here = here / "world", here
        status, said = ended(forked(partial(make_world, self.world)))
        if status:
            raise InputError(f"the world could not be made: {said[-300:]}")
        self.wanted, self.seconds, self.count = {}, {}, {}
        for name, (prepare, command) in COMMANDS.items():
            for way in ("seconds", "count"):
                folder = here / f"{name} {way}"
                prepare(self.world, folder)
                work, start = partial(command, self.world, folder), time.monotonic()
                if way == "count":
                    work = partial(with_instants, None, work, folder / "count")
                status, said = ended(forked(work))
                if status:
                    raise InputError(f"{name} does not work undisturbed: {said[-300:]}")
                if way == "seconds":
                    self.seconds[name] = time.monotonic() - start
                    self.wanted[name] = self.found(folder)
                else:
                    self.count[name] = int((folder / "count").read_text())
                    assert self.found(folder) == self.wanted[name], f"{name}: no two runs are alike"

    def found(self, folder):
        """contents() of a run, with its own place written as one word."""
        return placeless(contents(folder / "run"), str(folder))

    def play(self, number, seed):
        """Round `number`: (what was done, verdict, what was said)."""
        rng = random.Random(f"{seed} {number}")
        name = SHARES[number % len(SHARES)]
        prepare, command = COMMANDS[name]
        folder = self.here / f"round {number}"
        prepare(self.world, folder)
        work, done = partial(command, self.world, folder), []
        for _ in range(rng.choice((1, 1, 1, 2))):
            if rng.random() < 0.5:
                at = rng.randint(1, self.count[name])
                done.append(f"instant {at} of {self.count[name]}")
                ended(forked(partial(with_instants, at, work)))
            else:
                after = rng.uniform(0, self.seconds[name])
                done.append(f"after {after:.2f} of {self.seconds[name]:.2f} s")
                pid = forked(work)
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)
                ended(pid)
        status, said = ended(forked(work))
        differ = differences(self.found(folder), self.wanted[name])
        shutil.rmtree(folder)
        verdict = "identical"
        if status or differ:
            verdict = f"status {status}, other {', '.join(differ)}"
        return f"{name} killed {', '.join(done)}", verdict, said


def placeless(found, place):
    """The same with the folder's own name as PLACE in texts."""
    return json.loads(json.dumps(found, default=repr).replace(json.dumps(place)[1:-1], "PLACE"))
