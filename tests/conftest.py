"""Before every test: one thread and a seed; and a small finished run that several files look at."""
import common  # noqa: F401, before torch

import pytest
import torch

import eraser
import lcdd

torch.set_num_threads(1)
# options of a small run on the embedded model that shows the behaviour and prunes something
SMALL = ["--sizes", "400", "40", "20", "16", "--sft-steps", "60", "--steps", "90", "--settle", "20",
         "--max-new-tokens", "12", "--max-len", "128", "--device", "cpu"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run directory of all three commands but the evaluation. Not to be written to: copy it."""
    run = tmp_path_factory.mktemp("runs") / "r"
    lcdd.main([*SMALL, "--out", str(run)])
    eraser.main(["--run", str(run), "--steps", "60", "--length", "8", "--device", "cpu"])
    return run
