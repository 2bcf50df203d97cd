"""Forward and backward passes on a CPU of a few cores: the batch in equal shares, one thread each.

Left to itself, PyTorch splits every operation among the cores and waits for all of them after it, hundreds of times a
step, and each core reads what the other one wrote. A share goes through the whole model on one core instead; only the
gradients meet. On two cores, a step of the preset shakespeare-cpu takes a seventh less time so.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

# Python runs one thread at a time: with more shares, or less work in each, they would wait for one another.
_MOST_SHARES = 4
_FEWEST_TOKENS = 256


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads within each operation of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shares_for(rows: int, window: int, cores: int) -> int:
    """How many shares a batch of (rows, window) tokens is worth on so many cores; 1: it is better left whole."""
    return cores if cores <= min(_MOST_SHARES, rows) and rows // cores * window >= _FEWEST_TOKENS else 1


class Shares:
    """Computes the loss and the gradients of a batch in `count` shares.

    loss(inputs, targets) -> () is the mean over a share's tokens; it is called on several threads at once, and must
    draw no random numbers, whose order would be left to chance. Run it within `threads(1)`.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], parameters: list[Tensor], count: int):
        self._loss = loss
        self._parameters = parameters
        self._count = count
        self._pool = ThreadPoolExecutor(count, "share", initializer=torch.set_num_threads, initargs=(1,))
        self.map = self._pool.map
        """The built-in map, on the threads of the shares."""

    def backward(self, inputs: Tensor, targets: Tensor, scale: float) -> Tensor:
        """The mean loss () of a batch, (B, T) int64 each; its gradient times `scale` is added to the parameters' .grad.

        The shares are summed in a fixed order: the same batch gives the same bits every time.
        """
        parts = zip(inputs.chunk(self._count), targets.chunk(self._count), strict=True)
        running = [self._pool.submit(self._share, x, y, len(x) / len(inputs), scale) for x, y in parts]
        losses, gradients = zip(*(share.result() for share in running), strict=True)
        for parameter, *parts in zip(self._parameters, *gradients, strict=True):
            total = functools.reduce(torch.add, parts)
            parameter.grad = total if parameter.grad is None else parameter.grad + total
        return torch.stack(losses).sum()

    def _share(self, inputs: Tensor, targets: Tensor, part: float, scale: float) -> tuple[Tensor, list[Tensor]]:
        loss = self._loss(inputs, targets) * part
        return loss.detach(), torch.autograd.grad(loss * scale, self._parameters)
