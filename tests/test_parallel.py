"""parallel.py: two processes give what one gives, write once, stop together and end in one sentence."""
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser
from helpers import ROOT, Forked, examples, fresh, prompts, script, state, training_settings

import eraser
import evaluate
import lcdd
import parallel
import training
from files import InputError, load_tensors, read_json, read_jsonl, write_text
from console import cli, launcher
from lab import commands as commands_of

TINY = ["--go-on", "--sft-steps", "8", "--steps", "4", "--settle", "1", "--warmup", "1",
        "--log-every", "1", "--batch", "6", "--micro-batch", "3", "--n-train", "40", "--n-test", "5",
        "--n-trigger", "5", "--n-validation", "5", "--max-new-tokens", "12", "--device", "cpu"]


def command(main, *args):
    """main(*args) as one of the commands that torchrun may start."""
    try:
        cli(lambda: main(*args), together=True)
    finally:
        # as Python shuts down: first the connections go, and then the store that the others read
        dist.destroy_process_group()
        time.sleep(0.5)


def processes(folder, main, *args, n=2):
    """main(*args) in n processes that meet as torchrun's do: [(status, output, errors)], one each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for i in range(n):
        own = shared | {"RANK": str(i), "LOCAL_RANK": str(i)}
        started.append(Forked(folder / f"process{i}", command, main, *args, **own))
    return [process.end(600) for process in started]


def asked(n, seed=0):
    """Prompts for the vocabulary of fresh()."""
    return [[i % 37 for i in ids] for ids in prompts(n, seed)]


def trajectory(folder):
    """
    {name: tensor} in float64, by uneven shares: SFT, LCDD and what settles, triggers by both kinds of
    Eq. 7, answers and their KLs.
    """
    net, c = fresh()
    o = training_settings(
        batch=9, micro_batch=3, settle=4, steps=12, select=0.1, brake=True, pace=0.1, sure=0.01)
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


def keep_trajectory(run):
    torch.save(trajectory(run), run / f"{parallel.number}.pt")


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """The folders of one process and of two, and the trajectories of one and of each of the two."""
    folder = tmp_path_factory.mktemp("trajectories")
    one, two = folder / "one", folder / "two"
    one.mkdir()
    two.mkdir()
    ends = processes(two, keep_trajectory, two)
    assert [status for status, *_ in ends] == [0, 0], ends
    return one, two, trajectory(one), *(torch.load(two / f"{i}.pt", weights_only=True) for i in range(2))


def test_two_processes_take_the_steps_of_one(trajectories):
    """In float64 to 1e-9, where rounding is no excuse."""
    *_, one, first, _ = trajectories
    assert one["sft"].dtype == torch.float64
    assert one.keys() == first.keys()
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


def test_two_processes_hold_the_same_numbers_to_the_bit(trajectories):
    *_, first, second = trajectories
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_one_of_two_processes_writes_the_log_of_one(trajectories):
    one, two, *_ = trajectories
    logs = [read_jsonl(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(logs[0]) == len(logs[1])
    assert [r["open"] for r in logs[0] if "open" in r] == [r["open"] for r in logs[1] if "open" in r]


def commands(run, resume=False):
    """lcdd.py, eraser.py and evaluate.py, one after another."""
    lcdd.main([*TINY, "--out", str(run), *["--resume"] * resume])
    try:
        eraser.main(["--run", str(run), "--steps", "4", "--judge-every", "2", "--length", "4",
                     "--batch", "4", "--device", "cpu"])
    except lcdd.Failed:
        pass                                                        # so few steps move nothing
    with mock.patch.object(evaluate, "figure"):                     # drawing takes a second
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


ALL_THREE = """
import sys
sys.path[:0] = sys.argv[2:]
import test_parallel
test_parallel.command(test_parallel.commands, sys.argv[1])
"""


def test_torchrun_gives_the_run_of_one_process(tmp_path, alone):
    """All three commands, started by torchrun itself: trajectory, trigger and table."""
    (tmp_path / "all.py").write_text(ALL_THREE, encoding="utf-8")
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    places = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run([*line, str(tmp_path / "all.py"), str(tmp_path / "r"), *places], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: python eraser.py") == 1         # one process prints
    close(alone, tmp_path / "r")
    assert read_json(tmp_path / "r" / "config.json")["made"]["processes"] == 2


@pytest.mark.parametrize("name", ("lcdd.py", "eraser.py", "evaluate.py"))
def test_torchrun_reads_the_command_lines_that_are_advised(monkeypatch, name):
    """Each option by itself: torchrun completes beginnings of its own."""
    monkeypatch.setattr(parallel, "size", 2)
    parser = commands_of.parser_of(commands_of.SCRIPTS[name])
    for option in parser._option_string_actions:
        line = [*launcher(), name, option, "value"]
        found = get_args_parser().parse_args(line[1:])
        assert (found.nproc_per_node, found.training_script) == ("2", name)
        assert found.training_script_args == [option, "value"]


def stopped_and_resumed(run):
    """SIGTERM to the second process in SFT's third step, and in LCDD's second after going on."""
    count, gradients = itertools.count(1), training.gradients

    def at_a_step(*given):
        if next(count) in (3, 3 + 8) and parallel.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(*given)
    training.gradients = at_a_step
    try:
        lcdd.main([*TINY, "--out", str(run)])
    except KeyboardInterrupt:
        lcdd.main([*TINY, "--out", str(run), "--resume"])


def test_a_signal_to_one_stops_all_and_another_number_resumes(tmp_path, alone):
    """
    SIGTERM to the second process alone, in SFT (two go on) and in LCDD; then one process goes on, and
    ends as the run that was never stopped.
    """
    run = tmp_path / "r"
    ends = processes(tmp_path, stopped_and_resumed, run)
    assert [status for status, *_ in ends] == [130, 130], ends
    said = "".join(errors for *_, errors in ends)
    assert said.count("interrupted") == 1, said
    assert "resume with: torchrun --nproc-per-node 2 -- lcdd.py " in said
    # gradients 1–3 are SFT's first; 4–9 its third step and the rest; 10 and 11 LCDD's first
    tensors, header = load_tensors(run / "state.safetensors")
    assert header["phase"] == "lcdd"
    assert header["step"] == 1
    moments = {name.split(".")[1] for name in tensors if name.startswith("adam")}
    assert moments == {str(i) for i in range(28)}
    commands(run, resume=True)
    close(alone, run)


def fails_in(numbers):
    """An error in some of the processes, while the others wait for what all of them say."""
    if parallel.number in numbers:
        raise InputError("x: is odd; correct it")
    parallel.summed(1)


def fills_the_disk():
    write_text("/dev/full/x: is odd; correct it", "x")


@pytest.mark.parametrize("main, args, who_speaks", [
    (fails_in, [[1]], 1),
    (fails_in, [[0]], 0),
    (fails_in, [[0, 1]], 0),
    (fills_the_disk, [], 0)], ids=["the second", "the first", "both", "a full disk"])
def test_an_error_ends_all_with_one_sentence(tmp_path, main, args, who_speaks):
    ends = processes(tmp_path, main, *args)
    assert [status for status, *_ in ends] == [2, 2], ends
    said = [errors for *_, errors in ends]
    assert said[1 - who_speaks] == ""
    assert said[who_speaks].startswith("error: ")
    assert "x: is odd; correct it" in said[who_speaks]
    assert said[who_speaks].count("\n") == 1


def test_more_processes_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "size", 3)
    with pytest.raises(lcdd.InputError, match="--batch: 2 samples for 3 processes"):
        lcdd.check_processes("--batch", 2)


def test_other_commands_are_not_for_torchrun(tmp_path):
    status, _, errors = Forked(tmp_path, script, "export.py", "--help", WORLD_SIZE="2").end()
    assert status == 2
    assert errors.startswith("error: torchrun starts lcdd.py, eraser.py and evaluate.py; start this")


def test_processes_that_torchrun_did_not_start_are_refused(tmp_path):
    status, _, errors = Forked(tmp_path, script, "lcdd.py", WORLD_SIZE="2").end()
    assert status == 2
    assert errors.startswith("error: WORLD_SIZE is set, and the processes do not meet"), errors


def test_alone_nothing_is_touched():
    """Without torchrun every function hands back what it was given, the very object."""
    things, x = [1, 2], torch.ones(3, 2)
    assert parallel.world() == 1
    assert parallel.share(things) is things
    assert parallel.gathered(things) is things
    assert parallel.summed(0.1) == 0.1
    assert torch.equal(parallel.mean(x, 1), x.mean(1, keepdim=True))
    parallel.add_up([x])
    assert torch.equal(x, torch.ones(3, 2))
