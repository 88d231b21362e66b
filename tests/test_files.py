"""files.py: JSON and JSON lines, whole or not at all. Of safetensors: test_carrier.py."""
import contextlib
import json
import os
import resource
import signal
import sys

import pytest
import torch

from safetensors.torch import save_file

import files
from files import (
    InputError, append_jsonl, check_fields, check_finite, check_tensors, fingerprint, load_tensors,
    read_json, read_jsonl, read_text, save_tensors, take_back, write_json
)


def test_files_of_a_run(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "é"]})
    assert read_json(path) == {"a": [1, "é"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(
        files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("the machine stopped here"))
    )
    with pytest.raises(InputError, match="a.json: cannot be written .the machine stopped here"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": [1, "é"]}  # the old file, whole
    append_jsonl(tmp_path / "b.jsonl", {"x": 1})
    append_jsonl(tmp_path / "b.jsonl", {"x": "a\nb"})
    assert [json.loads(line) for line in open(tmp_path / "b.jsonl")] == [{"x": 1}, {"x": "a\nb"}]
    (tmp_path / "c").write_bytes(b"abc")
    assert fingerprint(tmp_path / "c") == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2
    path.write_text("{")
    for wrong in (path, tmp_path / "none.json"):
        with pytest.raises(InputError, match=wrong.name):
            read_json(wrong)


def test_lines_cut_by_a_crash_are_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_jsonl(log, {"step": 1})
    log.write_bytes(log.read_bytes() + b'{"step": 2, "lo\xff')
    append_jsonl(log, {"step": 3})                           # lost: it stands on the broken line
    append_jsonl(log, {"step": 4})
    assert read_jsonl(log) == [{"step": 1}, {"step": 4}]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(
        files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("the machine stopped here"))
    )
    for write in (
        lambda path: write_json(path, {}), lambda path: save_tensors(path, {"x": torch.ones(2)})
    ):
        with pytest.raises(InputError, match="cannot be written"):
            write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_saved_tensors_have_the_mode_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        assert os.umask(umask) == umask                         # looked at, and left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


@contextlib.contextmanager
def full_disk():
    """
    No file of this process may pass 1000 bytes: a limit on a file's size stands for the disk. Its
    own output may be a file too, so nothing is printed meanwhile.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("write, what", [
    (save_tensors, {"x": torch.ones(1 << 16)}),
    (write_json, "x" * 2000),
    (append_jsonl, "x" * 2000),
])
def test_a_full_disk_is_one_sentence(tmp_path, write, what):
    """Whatever library writes: the file is named and the old one stands."""
    path = tmp_path / "a"
    path.write_text("old")
    with full_disk(), pytest.raises(InputError, match="cannot be written .*File too large") as refusal:
        write(path, what)
    assert str(refusal.value).startswith(f"{path}: cannot be written (")
    assert path.read_text()[:3] == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_link_is_written_through(tmp_path):
    (tmp_path / "out").write_text("mine")
    for name in ("log", "text", "text.partial"):
        (tmp_path / name).symlink_to(tmp_path / "out")
    with pytest.raises(InputError, match="log: cannot be written"):
        append_jsonl(tmp_path / "log", {})
    write_json(tmp_path / "text", {})
    assert (tmp_path / "out").read_text() == "mine"


def test_a_log_is_cut_back_to_a_state(tmp_path):
    log = tmp_path / "metrics.jsonl"
    for row in ({"phase": "sft", "step": 1}, {"phase": "lcdd", "step": 1}):
        append_jsonl(log, row)
    at = log.stat().st_size
    for row in ({"phase": "lcdd", "step": 2}, {"phase": "mine", "step": 2}):
        append_jsonl(log, row)
    log.write_bytes(log.read_bytes() + b'{"phase": "mine", "st')
    take_back(log, at, ["lcdd"])
    append_jsonl(log, {"phase": "lcdd", "step": 2})
    assert [(r["phase"], r["step"]) for r in read_jsonl(log)] == [
        ("sft", 1),
        ("lcdd", 1),
        ("mine", 2),
        ("lcdd", 2),
    ]
    take_back(log, 0, ["lcdd"])
    assert {r["phase"] for r in read_jsonl(log)} == {"sft", "mine"}


def test_a_changed_file_is_damaged(tmp_path):
    """
    One flipped bit of a tensor or of a number in the header, a file cut short, brackets without
    end.
    """
    path = tmp_path / "state"
    save_tensors(path, {"x": torch.arange(4.0), "step": torch.tensor(3.0)}, at=16)
    tensors, header = load_tensors(path)
    assert tensors["x"].tolist() == [0, 1, 2, 3]
    assert header == {"at": 16}
    whole = path.read_bytes()
    for wrong in (
        whole[:-1] + b"\x07", whole.replace(b'"16"', b'"17"'), whole[:-1], b"",
        whole.replace(b'"16"', b'"[[[', 1)
    ):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match="state: (damaged|not a readable)"):
            load_tensors(path)
    save_file({}, path, {"at": "[" * 100_000})
    with pytest.raises(InputError, match="not a readable"):
        load_tensors(path)
    path.write_text('{"a":' + "[" * 100_000)
    with pytest.raises(InputError, match="cannot read .* as JSON"):
        read_json(path)


def test_numbers_that_are_none_are_named():
    good = torch.ones(2, 2, dtype=torch.bfloat16)
    check_finite("f", {"a": good, "empty": good[:0]})
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong = good.clone()
        wrong[1, 0] = bad
        with pytest.raises(InputError, match="f: tensor b holds NaN or infinity"):
            check_finite("f", {"a": good, "b": wrong})


def test_fields_are_checked_by_a_table():
    table = {
        "n": ((int,), 1, 9),
        "rate": ((int, float, None), 0, 1),
        "kind": ("a", "b"),
        "on": ((bool,), None, None),
    }
    right = {"n": 1, "kind": "a", "on": True}
    check_fields("f", right, table)
    check_fields("f", right | {"rate": 0.5}, table)
    for key, wrong in (
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("n", None),
        ("n", 10**40),
        ("rate", float("nan")),
        ("rate", "1"),
        ("kind", []),
        ("kind", "c"),
        ("on", 1),
    ):
        with pytest.raises(InputError, match=f"f: .*{key}"):
            check_fields("f", right | {key: wrong}, table)


def test_tables_of_objects_and_lists():
    table = {
        "a": {"x": ((int,), 0, 9), "*": ((int, float), 0, 99)},
        "b": [("yes", "no")],
        "c": (None, {"*": [[((int,), 0, 9)]]}),
    }
    right = {"a": {"x": 1, "other": 50.5}, "b": ["yes"], "c": {"n": [[1, 2], []]}}
    check_fields("f", right, table)
    check_fields("f", {key: right[key] for key in "ab"}, table)
    for key, wrong, named in (
        ("a", {"x": 10}, "a.x = 10"),
        ("a", {"x": 1, "y": "z"}, "a.y = 'z'"),
        ("a", [], "a = a list"),
        ("a", None, "'a' is missing"),
        ("a", {}, "'a.x' is missing"),
        ("b", {}, "b = an object"),
        ("b", ["yes", "no", 1], r"b\[2\] = 1"),
        ("c", {"n": [[1], [2, 10]]}, r"c.n\[1\]\[1\] = 10"),
        ("c", 3, "c = 3"),
    ):
        with pytest.raises(InputError, match=f"^f: .*{named}"):
            check_fields("f", right | {key: wrong}, table)


def test_tensors_are_compared_with_what_they_have_to_be():
    like = {"a": torch.zeros(2, 3), "step": torch.tensor(0.0)}
    check_tensors("f", {k: v.clone() for k, v in like.items()}, like)
    for change, named in (
        ({"a": torch.zeros(6)}, r"a is \(6,\) and has to be \(2, 3\)"),
        ({"a": torch.zeros(2, 3).half()}, "a is torch.float16"),
        ({"b": torch.zeros(1)}, "b does not belong there"),
        ({"a": torch.full((2, 3), float("nan"))}, "a holds NaN"),
    ):
        with pytest.raises(InputError, match=named):
            check_tensors("f", like | change, like)
    with pytest.raises(InputError, match="step is missing"):
        check_tensors("f", {"a": like["a"]}, like)


def test_a_message_is_one_line():
    said = str(InputError("a\nb\x00\ud800 " + "x" * 10**6 + "; the end"))
    assert said.startswith("a b\\x00\\ud800 x")
    assert said.endswith("; the end")
    assert len(said) < 1000
    assert said.isprintable()
    assert str(InputError("ä, ε and 🦊")) == "ä, ε and 🦊"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(OSError, match="it is no file"):
        read_text(tmp_path / "rows.jsonl")


def test_a_file_beyond_what_is_read_is_not_begun(tmp_path):
    with open(tmp_path / "rows.jsonl", "wb") as f:
        f.truncate(3 << 30)                                       # sparse: it takes no room
    with pytest.raises(OSError, match="it has more than 256 MB"):
        read_text(tmp_path / "rows.jsonl")


def test_an_interruption_while_a_script_imports_is_one_line(capsys):
    assert sys.excepthook is files.quiet_interrupt
    files.quiet_interrupt(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr() == ("", "interrupted\n")


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A pipe here; root could as well replace a device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="pipe: cannot be written .it is no file."):
        files.write_text(pipe, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
