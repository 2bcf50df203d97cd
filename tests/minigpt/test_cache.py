"""The cache gives what the model without it gives: token for token, whatever the batch, also past the block."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.op import count_launches
from minigpt.backends import resolve
from minigpt.cache import Cache, prefill, step
from minigpt.config import ModelConfig
from minigpt.context import Contexts, reader
from minigpt.errors import UserError
from minigpt.generation import steps
from minigpt.model import GPT

CPU = torch.device("cpu")
SMALL = ModelConfig(vocab_size=23, block_size=11, n_layer=2, n_head=3, n_embd=24, bias=True)


def build(kernels="torch", device=CPU, **options) -> GPT:
    """A model whose every part matters for what it expects."""
    torch.manual_seed(3)
    model = GPT(replace(SMALL, **options), resolve(kernels, device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(device).eval()


def prompts(*lengths: int, vocab=23) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def written(model, texts, **options) -> list[list[int]]:
    found = [step.ids for step in steps(model, texts, **options)]
    return torch.stack(found, 1).tolist()


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("kernels", ["eager", "torch"])
def test_cached_tokens_are_the_uncached_ones(kernels, position):
    """Prompts of 1 token to more than the block in one batch, over several blocks, greedy and drawn."""
    model = build(kernels, position=position)
    texts = prompts(1, 4, 10, 11, 12, 40)
    for options in ({"temperature": 0}, {"seed": 5}, {"seed": 5, "top_k": 9, "top_p": 0.9, "num_samples": 2}):
        plain = written(model, texts, max_new_tokens=26, cache=False, **options)
        assert written(model, texts, max_new_tokens=26, **options) == plain
        assert len(set(map(tuple, plain))) > 1 and len(set(itertools.chain(*plain))) > 3


def test_cached_tokens_are_the_uncached_ones_with_our_kernels(device):
    """... which the interpreter runs on a CPU: few tokens, past the block all the same."""
    model = build("triton", device, n_layer=1, n_head=2, n_embd=8, block_size=4)
    texts, options = prompts(1, 3), {"max_new_tokens": 5, "temperature": 0}
    with count_launches() as launched:
        cached = written(model, texts, **options)
    assert any("decode" in name for name in launched)
    assert cached == written(model, texts, cache=False, **options)
    model.use(resolve("torch", device))
    assert cached == written(model, texts, **options)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_smallest_blocks(block_size):
    model = build(block_size=block_size)
    texts = prompts(1, 2, 5)
    assert written(model, texts, max_new_tokens=9, seed=1) == written(
        model, texts, max_new_tokens=9, seed=1, cache=False
    )


def test_logits_are_those_of_the_whole_text_in_float64():
    """The model itself, in float64, over each context on its own: at every step within fp32's rounding."""
    model, exact = build(), build().double()
    texts = prompts(2, 7)
    contexts = Contexts(texts, 1, SMALL.block_size)
    reading = reader(model, texts)
    logits = reading.first()
    for number in range(30):
        with torch.no_grad():
            truth = torch.stack([exact(torch.tensor([row]))[0][0, -1] for row in contexts.rows])
        torch.testing.assert_close(logits.double(), truth, rtol=0, atol=2e-5)
        ids = [number % 23, (3 * number + 1) % 23]
        contexts.append(ids)
        logits = reading.next(ids)


def test_a_row_does_not_depend_on_those_beside_it():
    model = build()
    texts = prompts(3, 8, 15)
    together = written(model, texts, max_new_tokens=20, seed=9, num_samples=2)
    for row in range(6):
        alone = written(model, [texts[row // 2]], max_new_tokens=20, seed=9 + row)
        assert alone == [together[row]]


def test_rows_can_be_reordered():
    """... as beam search does: each goes on from what another has read, before and after its context is cut."""
    model = build()
    for cache in (True, False):
        reading = reader(model, prompts(2, 6, 9), cache=cache)
        reading.first()
        for order, ids in (([2, 2, 0], [1, 2, 3]), ([0, 1, 1], [4, 5, 6]), ([2, 0, 1], [7, 8, 9])):
            reading.reorder(order)
            logits = reading.next(ids)
        if cache:
            found = logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_what_lies_beyond_the_filled_slots_does_not_matter():
    model = build()
    logits = []
    with torch.no_grad():
        for rubbish in (0.0, 1e4):
            cache = Cache(model, 2)
            cache.keys.fill_(rubbish)
            cache.values.fill_(rubbish)
            prefill(model, cache, prompts(2, 5), [0, 1])
            logits.append(step(model, cache, torch.tensor([1, 2])))
    assert torch.equal(*logits)


class Calls(TorchDispatchMode):
    """Every operation, with the shapes and the storage of its tensors."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.names.append(str(function))
        self.shapes.append([tuple(tensor.shape) for tensor in tensors])
        return out


@pytest.mark.parametrize("kernels", ["eager", "torch"])
def test_a_step_is_the_same_at_every_length(kernels):
    """What a CUDA graph needs: the same operations, shapes and addresses, and no number read from the device."""
    model = build(kernels)
    cache, tokens = Cache(model, 2), torch.tensor([1, 2])
    addresses = [t.data_ptr() for t in (cache.keys, cache.values, cache.lengths, cache.rows)]
    seen = []
    with torch.no_grad():
        prefill(model, cache, prompts(1, 6), [0, 1])
        for _ in range(4):
            with Calls() as calls:
                step(model, cache, tokens)
            seen.append((calls.names, calls.shapes))
    assert all(found == seen[0] for found in seen) and len(seen[0][0]) > 20
    assert not [name for name in seen[0][0] if "_local_scalar_dense" in name or "nonzero" in name]
    assert addresses == [t.data_ptr() for t in (cache.keys, cache.values, cache.lengths, cache.rows)]
    assert cache.lengths.tolist() == [5, 10]


def test_a_read_number_would_be_seen():
    with Calls() as calls:
        torch.ones(()).item()
    assert any("_local_scalar_dense" in name for name in calls.names)


def test_a_graph_needs_a_gpu():
    with pytest.raises(UserError, match=r"needs a GPU.*--no-cuda-graph"):
        steps(build(), [[1]], max_new_tokens=1, cuda_graph=True)


def test_more_rows_than_there_is_memory_for():
    with pytest.raises(UserError, match=r"no memory .* 1,000,000,000,000 rows, .* GB: take fewer --num-samples"):
        Cache(build(), 10**12)
    with pytest.raises(UserError, match="no memory"):  # whose bytes no 64 bits can count
        Cache(build(), 2**59)


def test_what_is_no_lack_of_memory_is_not_told_as_one(monkeypatch):
    model = build()
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError) as raised:
        Cache(model, 2)
    assert raised.value is error


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_graph_gives_the_same_tokens(kernels, device):
    model = build(kernels, device)
    texts = prompts(1, 4, 12)
    options = {"max_new_tokens": 40, "seed": 5}
    assert written(model, texts, cuda_graph=True, **options) == written(model, texts, **options)


def test_dropout_is_off_and_the_model_left_as_it_was():
    model = build(dropout=0.5)
    expected = written(model, prompts(3), max_new_tokens=9, seed=2)
    model.train()
    assert written(model, prompts(3), max_new_tokens=9, seed=2) == expected
    assert all(module.training for module in model.modules())
