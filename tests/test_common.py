"""common.py: errors as sentences, files written whole, phases that go on with the same bits."""
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import common
from common import InputError, Phase, Stateful

ROOT = Path(__file__).parents[1]


# ---- errors

def test_what_a_user_can_mend_is_a_sentence(capsys):
    """And a status of its own: 2 for what was given, 3 for an outcome, 130 for Ctrl-C."""
    for code, status, told in (
            ("raise common.InputError('f: no rows')", 2, "error: f: no rows\n"),
            ("raise common.Failed('not kept')", 3, "failed: not kept\n"),
            ("raise KeyboardInterrupt('; resume with: x')", 130, "interrupted; resume with: x\n"),
            ("open('/none/such')", 2, "error: /none/such: No such file or directory; correct"),
            ("torch.empty(1 << 50)", 2, "error: more memory was needed")):
        with pytest.raises(SystemExit) as ended:
            common.run_command(lambda code=code: exec(code))
        assert ended.value.code == status and capsys.readouterr().err.startswith(told)


def test_a_bug_shows_its_traceback():
    """A RuntimeError of torch too, if it is not for lack of memory."""
    for bug, kind in (("{}['x']", KeyError), ("None.x", AttributeError),
                      ("torch.ones(2) @ torch.ones(3)", RuntimeError)):
        with pytest.raises(kind):
            common.run_command(lambda bug=bug: exec(bug))
    words = [sys.executable, "-c", "import common; common.run_command(lambda: {}['x'])"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


def test_only_the_library_call_is_enclosed(tmp_path):
    """reading() turns what a library raises into a sentence with the file's name; no more."""
    file = tmp_path / "c.json"
    file.write_text("{")
    with pytest.raises(InputError, match="c.json: cannot be read.*restore the file"):
        common.read_json(file)
    file.write_text("[1]")
    with pytest.raises(InputError, match="holds a list"):
        common.read_json(file)
    with pytest.raises(KeyboardInterrupt), common.reading("x"):
        raise KeyboardInterrupt


# ---- files

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """An error half way leaves the old file, and nothing beside it."""
    file = tmp_path / "a.json"
    common.write_json(file, {"a": 1})
    with pytest.raises(ZeroDivisionError), common.whole(file) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert common.read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("write", [
    lambda file: common.write_text(file, "x"),
    lambda file: common.save_tensors(file, {"x": torch.ones(3)}),
])
def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path, write):
    """By whichever library meets it; nothing half written is left."""
    def full(*paths):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.os, "replace", full)
    with pytest.raises(InputError, match="f: cannot be written .No space left on device"):
        write(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_tensors_and_their_header(tmp_path):
    """What is saved is loaded, transposed views too; NaN and a missing file are refused."""
    file = tmp_path / "t"
    view = torch.arange(6.0).view(2, 3).t()
    tensors = {"a": view, "b": torch.tensor([1, 2])}
    common.save_tensors(file, tensors, step=3, names=["x"])
    other = tmp_path / "text"
    other.write_text("")
    assert file.stat().st_mode == other.stat().st_mode          # safetensors would lock it
    loaded, header = common.load_tensors(file)
    assert header == {"step": 3, "names": ["x"]}
    assert all(torch.equal(loaded[name], t) for name, t in tensors.items())
    common.save_tensors(file, {"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="tensor a holds NaN"):
        common.load_tensors(file)
    with pytest.raises(InputError, match="none: cannot be read"):
        common.load_tensors(tmp_path / "none")


def test_digest_sees_names_shapes_and_values():
    """And dtypes, unless all are rounded to one."""
    t = torch.arange(4.0)
    one, double = {"a": t}, {"a": t.double()}
    others = [{"b": t}, {"a": t.view(2, 2)}, {"a": t + 1}, double]
    assert len({*map(common.digest, [one, *others])}) == 5
    assert common.digest(one, torch.bfloat16) == common.digest(double, torch.bfloat16)


# ---- phases

class Count(Stateful):
    """A part with numbers, a tensor and options that are no state."""

    def __init__(self, o=None):
        self.o, self.total, self.sums = o, 0, torch.zeros(2)


def loop(run, steps=7, stop=None, every=3):
    """Add up step numbers in a Phase, interrupted before step `stop`; returns the part."""
    part = Count(o="options")
    with Phase(run, "add", steps, every, part=part) as phase:
        for t in range(phase.start, steps):
            if t == stop:
                os.kill(os.getpid(), signal.SIGINT)
            phase.pause(t)
            part.total += t
            part.sums = part.sums + t
            phase.row(t, loss=float(t))
    return part


def test_a_phase_is_logged_once_however_often_it_stops(tmp_path):
    """Ctrl-C waits for the next step, the same loop goes on, and no row of the log stands twice."""
    file, state = tmp_path / "metrics.jsonl", tmp_path / "add.state"
    whole = loop(tmp_path)
    rows = common.read_rows(file)
    assert [row["step"] for row in rows] == list(range(7))
    assert whole.total == 21
    state.unlink()
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            loop(tmp_path, stop=stop)
        with open(file, "a") as log:
            log.write('{"phase": "add", "step": 99, "los')       # a crash cut a line short
    again = loop(tmp_path)
    assert again.total == 21 and torch.equal(again.sums, whole.sums)
    assert again.o == "options"
    assert common.read_rows(file) == rows
    with Phase(tmp_path, "next", 7, 3) as phase:
        phase.row(0, loss=1.0)
    assert common.read_rows(file) == [*rows, {"phase": "next", "step": 0, "loss": 1.0}]


def test_a_killed_phase_goes_on_from_its_last_saved_step(tmp_path):
    """As it stood before that step; a state that is damaged is named."""
    loop(tmp_path)
    state = tmp_path / "add.state"
    saved = torch.load(state, weights_only=True)
    assert saved["part"]["total"] == 0 + 1 + 2 + 3 + 4 + 5
    assert loop(tmp_path).total == 21
    state.write_bytes(b"no state")
    with pytest.raises(InputError, match="add.state: cannot be read.*remove it"):
        loop(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_phase(tmp_path):
    """The sentence counts steps from 1."""
    with Phase(tmp_path, "sft", 3, 10) as phase:
        with pytest.raises(InputError, match="loss of step 2 is nan"):
            phase.done(1, float("nan"))


# ---- options

TABLE = {
    "steps": (10, "steps"),
    "lr": (float, "rate"),
    "kind": ((None, "a", "b"), "kind"),
    "sizes": ([1, 2], "sizes"),
    "fast": (False, "switch"),
    "device": ("cpu", "where"),
}
DEFAULTS = dict(
    steps=10, lr=None, kind=None, sizes=[1, 2], fast=False, device="cpu", hidden=5)


def options(line=""):
    """A command line, read by a table with a preset."""
    def preset(o):
        return {"steps": 99} if o.kind else {}
    return common.parse("doc", TABLE, {"hidden": 5}, line.split(), preset)


def test_options_are_a_table():
    """Defaults, a preset that moves them, and what is given by hand, which wins."""
    assert vars(options()) == DEFAULTS
    assert options("--kind a").steps == 99
    assert options("--kind a --steps 3").steps == 3
    o = options("--sizes 3 4 --fast --lr 0.5")
    assert (o.sizes, o.fast, o.lr) == ([3, 4], True, 0.5)


@pytest.mark.parametrize("line, told", [
    ("--steps 0", "--steps 0"), ("--lr -1", "--lr -1"), ("--lr nan", "--lr nan"),
    ("--device tpu", "--device tpu"), ("--sizes 0 4", "--sizes 0")])
def test_numbers_that_cannot_be(line, told):
    """The sentence names the option and what was given."""
    with pytest.raises(InputError, match=told):
        options(line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there():
    """Said before anything is loaded."""
    with pytest.raises(InputError, match="no such GPU"):
        options("--device cuda")


def test_an_option_that_is_none(capsys):
    """argparse's own sentence; a beginning of a name is no name."""
    with pytest.raises(SystemExit) as ended:
        options("--step 3")
    assert ended.value.code == 2 and "--step" in capsys.readouterr().err


def test_dtype_is_a_rule(monkeypatch, capsys):
    """fp32 on a CPU, bf16 on a GPU, or --dtype; advice if the CPU multiplies bf16 itself."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    for device, dtype, width, expected in (
            ("cpu", None, 576, "float32"), ("cpu", None, 128, "float32"),
            ("cuda", None, 576, "bfloat16"), ("cuda", "float32", 576, "float32")):
        o = Namespace(device=device, dtype=dtype)
        assert common.dtype_of(o, {"hidden_size": width}) == expected
        advised = "--dtype bfloat16" in capsys.readouterr().out
        assert advised == (device == "cpu" and width >= 512)


def test_the_command_that_resumes(monkeypatch):
    """Words with spaces are quoted, and a changed option stands once."""
    monkeypatch.setattr(sys, "argv", ["/some/where/lcdd.py"])
    words = ["--task", "my task.jsonl", "--out", "old", "--resume"]
    command = common.resume_command(words, **{"--out": "runs/x"})
    assert command == "python lcdd.py --task 'my task.jsonl' --out runs/x --resume"
    monkeypatch.setattr(sys, "argv", ["/some/where/lab/words.py"])
    assert common.resume_command([]) == "python -m lab.words --resume"
