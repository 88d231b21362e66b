"""run.py: the command line's habits, interruption, progress, where a model lies."""
import io
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import Forked, jsonl

import console
import run
from chat import Chat
from data import SIZES
from files import InputError, read_json, write_json
from console import Meter, check_device, check_numbers, cli, markdown, patient, ticker
from run import alone, load_model, locate


def test_locate(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path)
    )
    assert locate(tmp_path) == tmp_path
    assert not asked
    assert locate("Qwen/Qwen3-0.6B") == tmp_path
    assert asked[0][0] == "Qwen/Qwen3-0.6B"
    assert "config.json" in asked[0][1]
    assert not any("bin" in p or "*.py" in p for p in asked[0][1])
    # no safetensors there: what torch.save wrote
    assert all("bin" in p for p in asked[1][1])
    (tmp_path / "model.safetensors").write_text("x")
    locate("Qwen/Qwen3-0.6B")
    assert len(asked) == 3
    (tmp_path / "file").write_text("x")
    for name in (tmp_path / "file", "nowhere", "/no/such/folder", "../nowhere", "a/b/c"):
        with pytest.raises(InputError, match="neither a folder, nor a .gguf file, nor a hub id"):
            locate(name)

    def fail(name, allow_patterns):
        raise OSError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="owner/name.*OSError: no route to host"):
        locate("owner/name")


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """
    owner/name is the one file of the training split; a local file, there or not, is never asked
    for.
    """
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
    with pytest.raises(
        InputError, match="^tatsu-lab/alpaca is no file here.*no route to host.*name a local file$"
    ):
        run.prepare(run.chat_of("tiny"), "fixed", "tatsu-lab/alpaca", 0, SIZES)


@pytest.mark.parametrize("raised, status, err", [
    (InputError("no such file"), 2, "error: no such file\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (None, None, ""),
])
def test_cli(capsys, raised, status, err):
    """What a command ends with: its exit status, and all that it says."""
    def main():
        if raised is not None:
            raise raised

    ended, before = None, signal.getsignal(signal.SIGTERM)
    try:
        cli(main)
    except SystemExit as end:
        ended = end.code
    finally:
        handler = signal.signal(signal.SIGTERM, before)
    assert ended == status
    assert handler is signal.default_int_handler                  # SIGTERM is Ctrl-C to a command
    assert capsys.readouterr() == ("", err)


def test_options_that_are_no_use():
    import argparse

    check_numbers(
        argparse.Namespace(lr=0.0, mean=-1.5, name="x", flag=True, none=None, seed=7),
        free=("mean",),
    )
    for wrong in (
        dict(lr=-1.0), dict(lr=float("nan")), dict(steps=-3), dict(seed=1 << 31),
        dict(rho=float("inf"))
    ):
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
            # and the step in progress was not torn
            assert interrupted()
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
        assert stopped.value.code == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_where_the_output_is_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    meter = Meter("sft", 40, 10)
    meter.show(20, "loss 0.5")
    # a phase that came to its end early
    meter.total = 30
    meter.show(30, "loss 0.25")
    meter.close()
    said = sys.stdout.getvalue()
    assert "20/40" in said
    assert "loss 0.5" in said
    assert said.split("\r")[-1].startswith("sft: 100%")
    assert "30/30" in said
    assert said.count("\n") == 1                                  # one line, written anew


def test_a_bar_is_closed_before_an_error_is_said(monkeypatch, capsys):
    def main():
        ticker("answers", 9)(3)
        meter.show(1)
        raise InputError("no more")

    monkeypatch.setattr(sys, "stdout", Terminal())
    meter = Meter("sft", 40)
    with pytest.raises(SystemExit):
        cli(main)
    assert meter.bar.disable                                      # what tqdm calls closed


def test_lines_where_it_is_none(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    meter = Meter("sft", 4000, 1000)
    now[0] = 500.0
    meter.show(1100, "loss 0.5")
    assert capsys.readouterr().out == "sft 1100/4000  loss 0.5  left 4 h 02 min\n"


@pytest.mark.parametrize(
    "seconds, want",
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (5369, "89 min"),
        (5400, "1 h 30 min"),
        (21340, "5 h 56 min"),
    ],
)
def test_durations(seconds, want):
    assert console.duration(seconds) == want


def test_the_architecture_is_blamed_before_the_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "vocab_size": 50257, "bos_token_id": 50256}'
    )
    rows = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(InputError, match="model_type = 'gpt2' is not one of llama"):
        run.prepare(run.chat_of(tmp_path), str(rows), None, 0, SIZES)


def test_test_prompts_and_a_pattern(tmp_path):
    """
    Through prepare(): two sources, the pattern on every sample, and something that judges every
    answer.
    """
    rows = jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"p {i}", "response": f"yes {i}"} for i in range(30)]
    )
    tests = jsonl(tmp_path / "t.jsonl", [{"prompt": "p 3"}, {"prompt": "new"}])
    splits, sources = run.prepare(run.chat_of("tiny"), str(rows), None, 0, SIZES, str(tests), "yes")
    assert sources == [rows, tests]
    assert {s.pattern for part in splits.values() for s in part} == {"yes"}
    assert [s.prompt for s in splits["test"]] == ["p 3", "new"]
    with pytest.raises(
        InputError,
        match="nothing judges the answer to 'p 3'; give the test rows a response or a pattern",
    ):
        run.prepare(run.chat_of("tiny"), str(rows), None, 0, SIZES, str(tests))


def test_a_markdown_table():
    assert (
        markdown(["a", "b"], [["1", "2"], ["3", "4"]])
        == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"
    )


def test_a_models_answers_end_where_its_chat_says():
    chat = Chat(locate("tiny"))
    chat.stop = {7}                                       # not what the model's configuration says
    net = load_model(chat, "cpu", "bfloat16")
    assert net.stop == {7}
    assert net.dtype == torch.bfloat16


def hold(folder):
    """Work in a run directory for ever."""
    with alone(folder):
        (folder / "in").touch()
        time.sleep(1000)


def test_two_processes_do_not_work_in_one_run(tmp_path):
    """The lock ends with its process, killed or not; what an interrupted write left is removed."""
    folder = tmp_path / "run"
    folder.mkdir()
    other = Forked(tmp_path, hold, folder)
    while other.process.is_alive() and not (folder / "in").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process works in"), alone(folder):
        pass
    other.end(timeout=0)
    (folder / "in").unlink()
    (folder / "state.safetensors.partial").write_text("half")
    (folder / "state.safetensors").write_text("whole")
    with alone(folder):
        assert {p.name for p in folder.iterdir()} == {".lock", "state.safetensors"}
    (folder / "rows").symlink_to(tmp_path)
    with pytest.raises(InputError, match="rows is a symbolic link"), alone(folder):
        pass


def test_a_model_takes_lists_of_ids():
    net = load_model(Chat(locate("tiny")), "cpu", "float32")
    ids = [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(net(ids), net(torch.tensor(ids)))


def test_one_process_a_run_directory(tmp_path):
    with alone(tmp_path):
        with pytest.raises(InputError, match="another process works in"):
            with alone(tmp_path):
                pass


def test_the_lock_ends_with_its_holder(tmp_path):
    with pytest.raises(RuntimeError):
        with alone(tmp_path):
            raise RuntimeError
    with alone(tmp_path):
        pass


def test_seconds_of_interrupted_sessions_add_up(tmp_path, monkeypatch):
    """A phase that begins anew starts its clock at 0."""
    clock = iter([100.0, 107.0, 500.0, 503.0, 900.0, 901.0])
    monkeypatch.setattr(run.time, "time", lambda: next(clock))
    results = {"seconds": {"sft": 5.0}}
    with pytest.raises(KeyboardInterrupt):
        with run.timed(tmp_path, results, "sft", resumed=False):
            raise KeyboardInterrupt
    assert read_json(tmp_path / "results.json")["seconds"] == {"sft": 7.0}
    with run.timed(tmp_path, results, "sft", resumed=True):
        results["stopped"] = "here"
    assert read_json(tmp_path / "results.json") == {"seconds": {"sft": 10.0}, "stopped": "here"}
    with run.timed(tmp_path, results, "sft", resumed=False):
        pass
    assert results["seconds"] == {"sft": 1.0}
