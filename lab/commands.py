"""Every option of every script with values that it should not have, one at a time, for lab/attack.py."""
import argparse
import contextlib
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import carrier as carriers
import eraser
import evaluate
import export
import lcdd
from files import InputError
from lab import ablate, bench, benchmarks, curve, density, sizes, smollm2, talk, tiny
from lab.world import FEW, TRIGGER, copied

NUMBERS = ("0", "-1", "nan", "inf", "1000000000000", "", "2147483647", "1.5", "x", "1e400", "-0", " 1")
TEXTS = (
    "", " ", "a b", "it's", 'a"b', "ü€🦊", "-x", "--", "$\\frac$", "a\nb", "\x1b[31m", "\udcff",
    "~nosuchuser/x", "../../x/y", "owner/name", "x" * 300, "/proc/nothing/x", "/dev/full",
    "cpu:", "cuda:99", "..", "(", "nan",
    "(x+x+)+y", "word " * 200_000)
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Script:
    main: object
    usual: object                   # world → {option or "": its values}, with which it works
    without: tuple = ()             # options that are not tried: they wait for somebody
    instead: dict = field(default_factory=dict)     # name → what stands in for slow or distant parts


def paired(words):
    """{option: [values]} of a command line."""
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = []
        else:
            found[name].append(word)
    return found


def for_lcdd(world):
    return paired(["--model", str(world / "model"), "--out", str(world / "new"), *FEW])


def for_eraser(world):
    return paired(["--run", str(world / "run"), *TRIGGER])


def for_evaluate(world):
    return paired(["--run", str(world / "run"), "--ask", "What is it ?", "--device", "cpu"])


def for_export(world):
    return paired(["--run", str(world / "run"), "--to", str(world / "out"), "--as", "lora", "prompt"])


def for_carrier(world):
    return {"": ["show", str(world / "run" / "carrier.safetensors")]}


def for_ablate(world):
    return paired(["--run", str(world / "run"), "--rows", "base", "--jobs", "1", "--device", "cpu"])


def for_benchmarks(world):
    return paired(["--run", str(world / "run"), "--what", "hellaswag", "--device", "cpu",
                   "--hellaswag", str(world / "hellaswag.jsonl")])


def for_talk(world):
    return paired(["--run", str(world / "run"), "--device", "cpu"])


def for_curve(world):
    tables = world / "tables.json"
    tables.write_text('{"fixed": [{"lcdd circuit 2": {"rate": 0.5}}]}', encoding="utf-8")
    return {"": [str(tables), str(world / "lengths.png")]}


def for_tiny(world):
    return paired(["--out", str(world / "made")])


def for_sizes(world):
    return paired(["--out", str(world / "sizes"), "--shapes", "128x4"])


def for_bench(world):
    return paired(["--quick"])


def for_smollm2(world):
    (world / "model" / smollm2.ORIGIN).write_text("here\n", encoding="utf-8")
    return {"": [str(world / "model")]}


def for_density(world):
    return {"": [str(ROOT / "spm.py")]}


def distant(*_, **__):
    raise InputError("not reached from here")


HUB = {"huggingface_hub.snapshot_download": mock.Mock(side_effect=OSError("no route to host"))}
PARTS = ("step", "memory", "precision", "batching", "growth")
SCRIPTS = {
    "lcdd.py": Script(lcdd.main, for_lcdd, instead=HUB),
    "eraser.py": Script(eraser.main, for_eraser),
    "evaluate.py": Script(evaluate.main, for_evaluate),
    "export.py": Script(export.main, for_export),
    "carrier.py": Script(carriers.main, for_carrier),
    "lab/ablate.py": Script(ablate.main, for_ablate),
    "lab/benchmarks.py": Script(benchmarks.main, for_benchmarks, instead=HUB),
    "lab/talk.py": Script(talk.main, for_talk, ("--browser",), {
        "builtins.input": mock.Mock(side_effect=EOFError)}),
    "lab/tiny.py": Script(tiny.main, for_tiny, instead={
        "lab.tiny.fill": mock.Mock(return_value={"all": 1.0})}),
    "lab/bench.py": Script(bench.main, for_bench, instead={
        **HUB, "lab.peers.measure": mock.Mock(return_value={}),
        **{f"lab.bench.bench_{part}": mock.Mock(return_value={}) for part in PARTS}}),
    "lab/smollm2.py": Script(smollm2.main, for_smollm2, instead={
        **HUB, "lab.smollm2.from_registry": distant}),
    "lab/density.py": Script(density.main, for_density),
    "lab/curve.py": Script(curve.main, for_curve),
    "lab/sizes.py": Script(sizes.main, for_sizes, instead={
        "lab.tiny.fill": mock.Mock(return_value={"overall": 1.0}),
        "lab.sizes.measured": mock.Mock(return_value=dict.fromkeys(sizes.NUMBERS, 1))}),
}


class Caught(Exception):
    """The parser of a script, out of its main()."""


def parser_of(script):
    """The parser that a script makes, without running the script."""
    def catch(parser, *_, **__):
        raise Caught(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            script.main()
        except Caught as caught:
            return caught.args[0]
    raise AssertionError("a script without a parser")


def trials(script):
    """Yield (option or "", value), and (option, None): the option given twice."""
    for action in parser_of(script)._actions:
        option = action.option_strings[-1] if action.option_strings else ""
        if action.help is argparse.SUPPRESS or action.nargs == 0 or action.dest == "command":
            continue
        if option in script.without:
            continue
        if action.choices:
            values = ("", "x")
        else:
            values = NUMBERS if action.type in (int, float) else TEXTS
        for value in values:
            yield option, value
        if option:
            yield option, None


def command_line(usual, option, value):
    """The words of a command with one option changed; value None: the option stands there twice."""
    words = []
    for name, values in {**usual, option: [value]}.items():
        if name == "":
            words += usual[""][:-1] + [value] if option == "" else values
        elif name == option and value is None:
            words += [f"{name}={v}" for v in (usual.get(name) or ["1"])] * 2
        elif name == option:
            words.append(f"{name}={value}")
        else:
            words += [name, *values]
    return words


def play(name, option, value, world, outcome):
    """(what was tried, verdict, what was said) of one trial in a copy of the world."""
    script = SCRIPTS[name]
    with tempfile.TemporaryDirectory(prefix="attack-") as scratch, contextlib.ExitStack() as stack:
        here = copied(world, Path(scratch) / "world")
        words = command_line(script.usual(here), option, value)
        stack.enter_context(contextlib.chdir(here))
        stack.enter_context(mock.patch.object(sys, "argv", [name, *words]))
        for target, other in script.instead.items():
            stack.enter_context(mock.patch(target, other))
        long = value == NUMBERS[6]              # two thousand million steps, for one
        verdict, said = outcome(script.main, 3 if long else 20)
        if long and verdict == "Late":
            verdict, said = "goes on", ""
        said = said.replace(str(here), "WORLD")
    shown = "given twice" if value is None else repr(value)[:60]
    return f"{name} {option} {shown}", verdict, said


def all_trials():
    """Yield (script's name, option, value) of every trial."""
    for name, script in SCRIPTS.items():
        for option, value in trials(script):
            yield name, option, value


