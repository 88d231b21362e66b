"""common.py: errors as sentences, files written whole, phases that go on with the same bits."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from common import InputError, Phase, Stateful

ROOT = Path(__file__).parents[1]


def outcome(code):
    """(exit status, stdout, stderr) of run_command() around a line of code."""
    script = f"import common, torch\ndef main():\n    {code}\ncommon.run_command(main)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_what_a_user_can_mend_is_a_sentence_and_a_bug_its_traceback():
    for code, status, told in (
            ("raise common.InputError('f: no rows')", 2, "error: f: no rows\n"),
            ("raise common.Failed('not kept')", 3, "failed: not kept\n"),
            ("raise KeyboardInterrupt('; resume with: x')", 130, "interrupted; resume with: x\n"),
            ("open('/none/such')", 2, "error: /none/such: No such file or directory; correct that and run the command again\n"),
            ("torch.empty(1 << 50)", 2, "error: more memory was needed")):
        found = outcome(code)
        assert found[0] == status and found[2].startswith(told), found
    for bug in ("{}['x']", "torch.ones(2) @ torch.ones(3)", "None.x"):
        status, _, told = outcome(bug)
        assert status == 1 and told.startswith("Traceback")


def test_only_the_library_call_is_enclosed(tmp_path):
    """reading() turns what a library raises into a sentence with the file's name, and nothing else does."""
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(InputError, match="c.json: cannot be read.*restore the file"):
        common.read_json(tmp_path / "c.json")
    (tmp_path / "l.json").write_text("[1]")
    with pytest.raises(InputError, match="holds a list"):
        common.read_json(tmp_path / "l.json")
    with pytest.raises(KeyboardInterrupt), common.reading("x"):
        raise KeyboardInterrupt


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    common.write_json(file, {"a": 1})
    with pytest.raises(ZeroDivisionError), common.whole(file) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert json.loads(file.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path):
    """By whichever library meets it: Python, safetensors, torch."""
    def full(path, *rest):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.os, "replace", full)
    for write in (lambda f: common.write_text(f, "x"), lambda f: common.save_tensors(f, {"x": torch.ones(3)})):
        with pytest.raises(InputError, match="f: cannot be written .No space left on device"):
            write(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_tensors_and_their_header(tmp_path):
    file, tensors = tmp_path / "t", {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor([1, 2])}
    common.save_tensors(file, tensors, step=3, names=["x"])
    found, header = common.load_tensors(file)
    assert header == {"step": 3, "names": ["x"]} and all(torch.equal(found[k], tensors[k]) for k in tensors)
    common.save_tensors(file, {"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="tensor a holds NaN"):
        common.load_tensors(file)
    with pytest.raises(InputError, match="none: cannot be read"):
        common.load_tensors(tmp_path / "none")


def test_digest_sees_names_shapes_and_values():
    t = {"a": torch.arange(4.0)}
    others = {"b": t["a"]}, {"a": t["a"].view(2, 2)}, {"a": t["a"] + 1}, {"a": t["a"].double()}
    assert len({common.digest(t), *map(common.digest, others)}) == 5
    assert common.digest(t, torch.bfloat16) == common.digest({"a": t["a"].double()}, torch.bfloat16)


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
    whole = loop(tmp_path)
    rows = common.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7)) and whole.total == 21
    (tmp_path / "add.state").unlink()
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            loop(tmp_path, stop=stop)
        with open(tmp_path / "metrics.jsonl", "a") as log:
            log.write('{"phase": "add", "step": 99, "los')       # a crash cut a line short
    again = loop(tmp_path)
    assert again.total == 21 and torch.equal(again.sums, whole.sums) and again.o == "options"
    assert common.read_rows(tmp_path / "metrics.jsonl") == rows


def test_a_killed_phase_goes_on_from_its_last_saved_step(tmp_path):
    """As it stood before that step; a state that is damaged is named."""
    loop(tmp_path)
    assert torch.load(tmp_path / "add.state", weights_only=True)["part"]["total"] == 0 + 1 + 2 + 3 + 4 + 5
    assert loop(tmp_path).total == 21
    (tmp_path / "add.state").write_bytes(b"no state")
    with pytest.raises(InputError, match="add.state: cannot be read.*remove it"):
        loop(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_phase(tmp_path):
    with Phase(tmp_path, "sft", 3, 10) as phase, pytest.raises(InputError, match="loss of step 2 is nan"):
        phase.done(1, float("nan"))


def options(*words):
    table = {"steps": (10, "steps"), "lr": (float, "rate"), "kind": ((None, "a", "b"), "kind"),
             "sizes": ([1, 2], "sizes"), "fast": (False, "switch"), "device": ("cpu", "where")}
    return common.parse("doc", table, {"hidden": 5}, list(words), lambda o: {"steps": 99} if o.kind else {})


def test_options_are_a_table():
    assert vars(options()) == dict(steps=10, lr=None, kind=None, sizes=[1, 2], fast=False, device="cpu", hidden=5)
    assert options("--kind", "a").steps == 99                   # a preset moves defaults
    assert options("--kind", "a", "--steps", "3").steps == 3    # and what is given by hand wins
    assert options("--sizes", "3", "4", "--fast", "--lr", "0.5").sizes == [3, 4]


def test_numbers_that_cannot_be(capsys):
    for words, told in ((("--steps", "0"), "--steps 0"), (("--lr", "-1"), "--lr -1"), (("--lr", "nan"), "--lr nan"),
                        (("--device", "tpu"), "--device tpu"), (("--sizes", "0", "4"), "--sizes 0")):
        with pytest.raises(InputError, match=told):
            options(*words)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no such GPU"):
            options("--device", "cuda")
    with pytest.raises(SystemExit) as ended:                    # argparse's own sentence
        options("--step", "3")
    assert ended.value.code == 2 and "--step" in capsys.readouterr().err


def test_the_command_that_resumes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/lcdd.py"])
    words = ["--task", "my task.jsonl", "--out", "old", "--resume"]
    assert common.resume_command(words, **{"--out": "runs/x"}) == \
        "python lcdd.py --task 'my task.jsonl' --out runs/x --resume"
