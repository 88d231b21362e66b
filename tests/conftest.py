import pytest
import torch

torch.set_num_threads(1)     # the matrices are tiny: a second thread gains nothing, and costs 8 × on a busy machine


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)
