"""What a block changes in PyTorch's settings is as before after it."""

import os

import pytest
import torch

from minigpt import process


def test_threads_are_set_and_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), process.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wanted", [False, True])
def test_algorithms_are_set_and_given_back(wanted, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(KeyError), process.deterministic(wanted):
        assert torch.are_deterministic_algorithms_enabled() is wanted
        assert torch.utils.deterministic.fill_uninitialized_memory is not wanted
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("before", ["highest", "high"])
def test_tf32_is_what_was_asked_for_whatever_was_set(allowed, before):
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(KeyError), process.tf32(allowed):
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
