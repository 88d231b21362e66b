"""files.py: JSON and JSON lines, whole or not at all. Of safetensors: test_carrier.py."""
import json

import pytest

import files
from files import InputError, append_jsonl, fingerprint, read_json, read_jsonl, write_json


def test_files_of_a_run(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "é"]})
    assert read_json(path) == {"a": [1, "é"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("the machine stopped here")))
    with pytest.raises(OSError):
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
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("the machine stopped here")))
    with pytest.raises(OSError):
        write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []
