import files  # noqa: F401, before torch: it sets how threads wait
import gc
import shutil

import pytest
import torch
from helpers import brief

import evaluate
import lcdd

# a second thread gains nothing on tiny matrices, and costs 8 × on a busy machine
torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: Python need not look for garbage in it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch):
    """evaluate.py without its figure, which takes longer than all the rest of a small run."""
    monkeypatch.setattr(evaluate.figure, "draw", lambda *_: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run directory of a few steps on the embedded model, made once and not written to."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    lcdd.main(brief(
        "--out", str(folder), "--n-train", "1000", "--sft-steps", "30", "--steps", "6",
        "--settle", "1", "--n-test", "12", "--n-validation", "10", "--batch", "16",
        "--micro-batch", "16"))
    return folder


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of it for the tests of one file, to do with as they like."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "r")
