"""Settings of the kernels' tests."""

import pytest
import torch

from kernels import op


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The tensors here are too small for more, and more wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def loops(monkeypatch):
    """Attention's kernels that loop, however short the problem."""
    monkeypatch.setattr("kernels.attention_plan._short_tile", lambda *_: None)
    op._launches.cache_clear()
    yield
    op._launches.cache_clear()
