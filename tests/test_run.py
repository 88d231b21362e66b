"""run.py: the command line's habits, interruption, progress, where a model lies."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import run
from chat import Chat
from data import SIZES
from files import InputError, read_json, write_json
from run import check_device, check_numbers, cli, load_model, locate, markdown, patient, ticker


def test_locate(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path))
    assert locate(tmp_path) == tmp_path and not asked
    assert locate("Qwen/Qwen3-0.6B") == tmp_path and asked[0][0] == "Qwen/Qwen3-0.6B"
    assert "config.json" in asked[0][1] and not any("bin" in p or "*.py" in p for p in asked[0][1])
    assert all("bin" in p for p in asked[1][1])                   # no safetensors there: what torch.save wrote
    (tmp_path / "model.safetensors").write_text("x")
    locate("Qwen/Qwen3-0.6B")
    assert len(asked) == 3
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "file", "nowhere", "/no/such/folder", "../x", "a/b/c"):
        with pytest.raises(InputError, match="neither a folder nor a hub id"):
            locate(name)

    def fail(name, allow_patterns):
        raise OSError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="owner/name.*OSError: no route to host"):
        locate("owner/name")


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """owner/name is the one file of the training split; a local file, there or not, is never asked for."""
    asked = []

    def download(name, patterns, repo_type):
        asked.append((name, *patterns, repo_type))
        return tmp_path

    monkeypatch.setattr(run, "download", download)
    for local in ("data/alpaca.json", "data/rows.parquet", str(tmp_path)):
        assert run.locate_data(local) == Path(local)
    assert asked == []
    with pytest.raises(InputError, match="owner/name has no training file"):
        run.locate_data("owner/name")
    assert asked[0] == ("owner/name", "*train*.parquet", "dataset")
    (tmp_path / "data").mkdir()
    for name in ("train-0.parquet", "test-0.parquet"):
        (tmp_path / "data" / name).write_text("x")
    assert run.locate_data("owner/name") == tmp_path / "data" / "train-0.parquet"
    (tmp_path / "data" / "train-1.parquet").write_text("x")
    with pytest.raises(InputError, match="2 training files.*name one of them"):
        run.locate_data("owner/name")


def test_a_data_set_that_the_hub_does_not_give(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="^tatsu-lab/alpaca is no file here.*no route to host.*name a local file$"):
        run.prepare("tiny", "fixed", "tatsu-lab/alpaca", 0, SIZES)


@pytest.mark.parametrize("line, status, err", [
    ("raise InputError('no such file')", 2, "error: no such file\n"), ("raise KeyboardInterrupt", 130, "interrupted\n"), ("pass", 0, "")])
def test_cli(line, status, err):
    code = f"from files import InputError\nfrom run import cli\ndef main():\n    {line}\ncli(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (status, err, "")


def test_options_that_are_no_use():
    import argparse
    check_numbers(argparse.Namespace(lr=0.0, mean=-1.5, name="x", flag=True, none=None, seed=7), free=("mean",))
    for wrong in (dict(lr=-1.0), dict(lr=float("nan")), dict(steps=-3), dict(seed=1 << 31), dict(rho=float("inf"))):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))} "):
            check_numbers(argparse.Namespace(**wrong))
    check_device("cpu")
    for name in ("tpu", "cuda:x", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name}"):
            check_device(name)


def test_patience_ends_with_the_work():
    import os
    import signal
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        with patient() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupted()                                # and the step in progress was not torn
    assert signal.getsignal(signal.SIGTERM) is before
    with patient() as interrupted:
        pass


def test_errors_of_the_file_system_are_one_sentence(tmp_path, capsys):
    def full():
        raise OSError(28, "No space left on device", "runs/x")
    for main in (full, lambda: write_json(tmp_path / "no" / "x", {})):
        with pytest.raises(SystemExit) as stopped:
            cli(main)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    with pytest.raises(InputError, match="holds a JSON list where an object belongs"):
        (tmp_path / "x.json").write_text("[]")
        read_json(tmp_path / "x.json")


def test_a_ticker_speaks_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    tell = ticker("answers", 200)
    for now[0], done in ((1, 10), (6, 0), (10, 50), (12, 60), (16, 100)):
        tell(done)
    assert capsys.readouterr().out == "answers 50/200  left 30 s\nanswers 100/200  left 16 s\n"


def test_a_markdown_table():
    assert markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"


def test_a_models_answers_end_where_its_chat_says():
    chat = Chat(locate("tiny"))
    chat.stop = {7}                                       # not what the model's configuration says
    net = load_model(chat, "cpu", "bfloat16")
    assert net.stop == {7}
    assert net.dtype == torch.bfloat16
