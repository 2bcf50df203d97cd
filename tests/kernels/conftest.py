"""Settings of the kernels' tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The tensors here are too small for more, and more wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
