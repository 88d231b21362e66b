"""parallel.py: two processes give what one gives, write once, stop together and end in one sentence."""
import os
import socket
import subprocess
import sys

import pytest
import torch

import eraser
import evaluate
import lcdd
import parallel
import training
from files import load_tensors, read_json, read_jsonl
from helpers import ROOT, prompts
from test_lcdd import examples, fresh, settings, state

TINY = ["--go-on", "--sft-steps", "8", "--steps", "4", "--settle", "1", "--warmup", "1",
        "--log-every", "1", "--batch", "6", "--micro-batch", "3", "--n-train", "40", "--n-test", "5",
        "--n-trigger", "5", "--n-validation", "5", "--max-new-tokens", "12", "--device", "cpu"]
START = ("import sys, os, signal, files, lcdd, eraser, evaluate, parallel, training, test_parallel\n"
         "from run import cli\n")


def processes(code, *words, n=2):
    """Run code with a main() in n processes, as torchrun does: [(status, output, errors)], one each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "PYTHONPATH": str(ROOT / "tests")}
    line = [sys.executable, "-c", f"{START}{code}\ncli(main, together=True)", *map(str, words)]
    all_of_them = []
    for i in range(n):
        own = shared | {"RANK": str(i), "LOCAL_RANK": str(i)}
        all_of_them.append(subprocess.Popen(line, cwd=ROOT, env=own, text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    found = [p.communicate(timeout=600) for p in all_of_them]
    return [(p.returncode, *texts) for p, texts in zip(all_of_them, found)]


def asked(n, seed=0):
    """Prompts for the vocabulary of fresh()."""
    return [[i % 37 for i in ids] for ids in prompts(n, seed)]


def trajectory(folder):
    """
    {name: tensor} in float64, by uneven shares: SFT, LCDD and what settles, triggers by both kinds of
    Eq. 7, answers and their KLs.
    """
    net, c = fresh()
    o = settings(batch=9, micro_batch=3, settle=4, steps=12, select=0.1, brake=True, pace=0.1, sure=0.01)
    lcdd.train_sft(net, c, examples(), o, folder, 0)
    found = {"sft": state(c)}
    training.forget(folder / "state.safetensors", folder / "metrics.jsonl", ["sft"])
    info = lcdd.train_lcdd(net, c, examples(), o, folder, 0)
    found |= {"lcdd": state(c), "loss": torch.tensor(info["loss"])}
    weights, mask = c.merge(net), c.write_channels()
    train, judge = eraser.base_targets(net, asked(9), 3), eraser.base_targets(net, asked(5, seed=1), 3)
    for match in ("prompt", "mean"):
        words = ["--run", "r", "--length", "3", "--steps", "4", "--batch", "5", "--judge-every", "2",
                 "--k", "3", "--match", match]
        tau, loss = eraser.learn(net, weights, train, judge, mask, eraser.options(words))
        found |= {f"tau {match}": tau, f"loss {match}": torch.tensor(loss)}
    conditions = {"base": (None, None), "lcdd": (weights, None), "trig": (weights, tau)}
    for name, (w, t) in conditions.items():
        answers = net.generate(asked(7), 6, carrier=w, trigger=t)
        found[f"answers {name}"] = torch.tensor([a + [0] * (6 - len(a)) for a in answers])
    pairs = [("base", "lcdd"), ("base", "trig")]
    kl = evaluate.kl_divergences(net, asked(7), answers, conditions, pairs, batch_size=2)
    found |= {f"kl {q}": values for (_, q), values in kl.items()}
    for kind, rows in zip(("kl", "loss"), evaluate.own_answers(net, asked(7), answers, conditions)):
        found |= {f"own {kind} {name}": values for name, values in rows.items()}
    return found


def test_two_processes_take_the_steps_of_one(tmp_path):
    """In float64 to 1e-9, where rounding is no excuse; and both hold the same numbers to the bit."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    code = ("import torch\nfrom pathlib import Path\ndef main():\n    run = Path(sys.argv[1])\n"
            "    torch.save(test_parallel.trajectory(run), run / f'{parallel.number}.pt')")
    ends = processes(code, tmp_path / "two")
    assert [status for status, *_ in ends] == [0, 0], ends
    one = trajectory(tmp_path / "one")
    first, second = (torch.load(tmp_path / "two" / f"{i}.pt", weights_only=True) for i in range(2))
    assert one["sft"].dtype == torch.float64 and one.keys() == first.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)
    logs = [read_jsonl(tmp_path / x / "metrics.jsonl") for x in ("one", "two")]
    assert [r["open"] for r in logs[0] if "open" in r] == [r["open"] for r in logs[1] if "open" in r]
    assert len(logs[0]) == len(logs[1])                          # one process writes


def commands(run, resume=False):
    """lcdd.py, eraser.py and evaluate.py, one after another."""
    lcdd.main([*TINY, "--out", str(run), *["--resume"] * resume])
    try:
        eraser.main(["--run", str(run), "--steps", "4", "--judge-every", "2", "--length", "4",
                     "--batch", "4", "--device", "cpu"])
    except lcdd.Failed:
        pass                                                        # so few steps move nothing
    evaluate.main(["--run", str(run), "--device", "cpu"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run directory that one process has made."""
    run = tmp_path_factory.mktemp("alone") / "r"
    commands(run)
    return run


def close(run, other, of_weights=5e-5, of_numbers=5e-6):
    """
    Do two run directories hold the same, up to fp32's rounding? AdamW makes a step of nearly its rate of
    a gradient that is nothing but rounding.
    """
    for name in ("sft", "carrier", "trigger"):
        a, b = (load_tensors(folder / f"{name}.safetensors")[0] for folder in (run, other))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=of_weights, msg=f"{name} {key}")
    for a, b in zip(*(numbers(folder) for folder in (run, other)), strict=True):
        assert a == (pytest.approx(b, rel=of_numbers, abs=of_numbers) if isinstance(b, float) else b)


def numbers(run):
    """All that is measured in a run directory, but the seconds."""
    found = []

    def collect(value):
        if isinstance(value, dict):
            value = [v for k, v in value.items() if k != "seconds"]
        if isinstance(value, list):
            for v in value:
                collect(v)
        else:
            found.append(value)
    for row in [*read_jsonl(run / "metrics.jsonl"), read_json(run / "results.json")]:
        collect(row)
    return found


def test_torchrun_gives_the_run_of_one_process(tmp_path, alone):
    """All three commands, started by torchrun itself: trajectory, trigger and table."""
    code = f"{START}def main():\n    test_parallel.commands(sys.argv[1])\ncli(main, together=True)"
    (tmp_path / "all.py").write_text(code, encoding="utf-8")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([*line, str(tmp_path / "all.py"), str(tmp_path / "r")], cwd=ROOT, env=shared,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: python eraser.py") == 1         # one process prints
    close(alone, tmp_path / "r")
    assert read_json(tmp_path / "r" / "config.json")["made"]["processes"] == 2


KILLED = """
import itertools
count, gradients = itertools.count(1), training.gradients
def at_a_step(*given):
    if next(count) in (3, 3 + 8) and parallel.number == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return gradients(*given)
training.gradients = at_a_step
def main():
    try:
        lcdd.main([*test_parallel.TINY, "--out", sys.argv[1]])
    except KeyboardInterrupt:
        lcdd.main([*test_parallel.TINY, "--out", sys.argv[1], "--resume"])
"""


def test_a_signal_to_one_stops_all_and_another_number_resumes(tmp_path, alone):
    """
    SIGTERM to the second process alone, in SFT (two go on) and in LCDD; then one process goes on, and
    ends as the run that was never stopped.
    """
    run = tmp_path / "r"
    ends = processes(KILLED, run)
    assert [status for status, *_ in ends] == [130, 130], ends
    said = "".join(errors for *_, errors in ends)
    assert said.count("interrupted") == 1, said
    assert "resume with: torchrun --nproc-per-node 2 lcdd.py " in said
    # gradients 1–3 are SFT's first; 4–9 its third step and the rest; 10 and 11 LCDD's first
    tensors, header = load_tensors(run / "state.safetensors")
    assert (header["phase"], header["step"]) == ("lcdd", 1)
    moments = {name.split(".")[1] for name in tensors if name.startswith("adam")}
    assert moments == {str(i) for i in range(28)}
    commands(run, resume=True)
    close(alone, run)


ODD = "raise files.InputError('x: is odd; correct it')"
WRONG = {
    "one of them": f"def main():\n    if parallel.number == 1:\n        {ODD}\n    parallel.summed(1)",
    "the first": f"def main():\n    if parallel.number == 0:\n        {ODD}\n    parallel.summed(1)",
    "all": f"def main():\n    {ODD}",
    "a full disk": "def main():\n    files.write_text('/dev/full/x: is odd; correct it', 'x')",
}


@pytest.mark.parametrize("who", WRONG)
def test_an_error_ends_all_with_one_sentence(who):
    ends = processes(WRONG[who])
    said = [errors for *_, errors in ends if errors]
    assert [status for status, *_ in ends] == [2, 2] and len(said) == 1, ends
    assert said[0].startswith("error: ") and "x: is odd; correct it" in said[0]
    assert said[0].count("\n") == 1
    assert bool(ends[0][2]) == (who != "one of them")      # the first one, where it fails too


def test_more_processes_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "size", 3)
    with pytest.raises(lcdd.InputError, match="--batch: 2 samples for 3 processes"):
        lcdd.check_processes("--batch", 2)


def test_other_commands_are_not_for_torchrun():
    done = subprocess.run([sys.executable, "export.py", "--help"], cwd=ROOT,
                          env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: torchrun starts lcdd.py, eraser.py and evaluate.py; start this")


def test_processes_that_torchrun_did_not_start_are_refused():
    theirs = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in theirs}
    done = subprocess.run([sys.executable, "lcdd.py"], cwd=ROOT, env=clean | {"WORLD_SIZE": "2"},
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: WORLD_SIZE is set, and the processes do not meet"), done.stderr


def test_alone_nothing_is_touched():
    """Without torchrun every function hands back what it was given, the very object."""
    things, x = [1, 2], torch.ones(3, 2)
    assert parallel.share(things) is things and parallel.gathered(things) is things and parallel.world() == 1
    assert parallel.summed(0.1) == 0.1 and torch.equal(parallel.mean(x, 1), x.mean(1, keepdim=True))
    parallel.add_up([x])
    assert torch.equal(x, torch.ones(3, 2))
