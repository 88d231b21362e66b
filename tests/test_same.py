"""The same seed gives the same bits; a run says what it was made with, and can be carried elsewhere."""
import platform
import shlex
import shutil
import subprocess
from unittest import mock

import pytest
import torch

import eraser
import evaluate
import files
import lcdd
import machine
from files import fingerprint, load_tensors, read_json, read_jsonl
from helpers import ROOT

COMMON = ["--go-on", "--settle", "1", "--warmup", "1", "--log-every", "1", "--batch", "8", "--n-test", "4",
          "--n-trigger", "4", "--n-validation", "4", "--device", "cpu"]
WORDS = [*COMMON, "--sft-steps", "6", "--steps", "4", "--n-train", "60", "--max-new-tokens", "8"]
# two threads on a busy machine wait for each other at every small product: fewer of these
FEWER = [*COMMON, "--sft-steps", "2", "--steps", "2", "--n-train", "16", "--max-new-tokens", "2"]


def trigger(run, steps):
    try:
        eraser.main(["--run", str(run), "--steps", str(steps), "--judge-every", "2", "--length", "4",
                     "--batch", "4", "--device", "cpu"])
    except files.Failed:
        pass                                                    # so few steps move nothing


def without_seconds(row):
    return {k: v for k, v in row.items() if k != "seconds"}


def made(run, words=WORDS, steps=4):
    """The three commands, but for the figure."""
    lcdd.main([*words, "--out", str(run)])
    trigger(run, steps)
    with mock.patch.object(evaluate, "figure"):
        evaluate.main(["--run", str(run), "--device", "cpu"])
    return run


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of seed 0, in one thread."""
    return made(tmp_path_factory.mktemp("first") / "run")


@pytest.fixture
def threads(monkeypatch):
    """A function that sets how many threads compute, against what machine.py would choose."""
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "set_threads", lambda net: None)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", (1, 2))
def test_the_same_seed_gives_the_same_bits(tmp_path, first, threads, count):
    threads(count)
    if count == 1:
        runs = [first, made(tmp_path / "b")]
    else:
        runs = [made(tmp_path / name, FEWER, steps=2) for name in "ab"]
    for run in runs:
        assert read_json(run / "config.json")["made"]["threads"] == count
    for name in ("sft", "carrier", "trigger"):
        # not the files' bytes: safetensors writes the fields of a header in any order
        (first, header), (second, other) = (load_tensors(run / f"{name}.safetensors") for run in runs)
        assert first.keys() == second.keys(), name
        assert header == other, name
        assert all(torch.equal(first[key], second[key]) for key in first), name
    logs = [list(map(without_seconds, read_jsonl(run / "metrics.jsonl"))) for run in runs]
    assert len(logs[0]) >= 7
    assert logs[0] == logs[1]
    results = [without_seconds(read_json(run / "results.json")) for run in runs]
    assert "kl_own" in results[0]
    assert results[0] == results[1]


def test_another_seed_gives_others(tmp_path, first):
    """What the test above compares is not the same whatever is done."""
    lcdd.main([*WORDS, "--seed", "1", "--out", str(tmp_path / "r")])
    one, other = (load_tensors(run / "sft.safetensors")[0] for run in (first, tmp_path / "r"))
    assert not torch.equal(one["delta.0.q_proj"], other["delta.0.q_proj"])


def test_a_copied_run_gives_the_same_table_elsewhere(run, tmp_path, monkeypatch, capsys, undrawn):
    trigger(run, 4)
    evaluate.main(["--run", str(run), "--device", "cpu"])
    table = capsys.readouterr().out.split("seconds:")[0]
    assert "LCDD + trigger" in table
    (tmp_path / "else where").mkdir()
    copied = shutil.copytree(run, tmp_path / "else where" / "copied")
    for name in ("results.json", "results.md"):
        (copied / name).unlink()
    monkeypatch.chdir(tmp_path / "else where")
    evaluate.main(["--run", "copied", "--device", "cpu"])
    found = capsys.readouterr().out.split("seconds:")[0]
    assert found[found.index("| fixed |"):] == table[table.index("| fixed |"):]
    assert without_seconds(read_json(copied / "results.json"))["kl"] == read_json(run / "results.json")["kl"]


def test_a_run_says_what_it_was_made_with(run):
    config = read_json(run / "config.json")
    assert config["versions"] == {"torch": torch.__version__, "python": platform.python_version()}
    assert config["data_fingerprint"] == fingerprint(ROOT / "tiny" / "fixed.jsonl")
    assert len(config["base_fingerprint"]) == 16
    made = config["made"]
    assert shlex.split(made["command"])[:3] == ["python", "lcdd.py", "--go-on"]
    assert made["processes"] == 1
    assert made["threads"] == torch.get_num_threads()
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    assert (made["revision"] or "").removesuffix("-dirty") == head          # "" where this is no clone
    header = files.read_header(run / "carrier.safetensors")
    assert "made" not in header["settings"]           # it travels without this machine's paths
