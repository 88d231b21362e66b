import pytest
import torch

import lcdd

# a second thread gains nothing on tiny matrices, and costs 8 × on a busy machine
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run directory of a few steps on the embedded model."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    lcdd.main(
        [
            "--go-on", "--out", str(folder), "--sft-steps", "30", "--steps", "6", "--settle", "1",
            "--warmup", "1", "--n-test", "12", "--n-trigger", "20", "--n-validation", "10",
            "--device", "cpu"
        ]
    )
    return folder
