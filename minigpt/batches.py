"""The order in which a run sees its data: a pure function of the text, the seed and the step.

Nothing about the position in the data needs to be stored to go on with a run, and every backend and device sees the
same batches.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .errors import UserError


class Batches:
    """Batches of windows for training, each epoch all of the text in shuffled windows, cut at a random offset.

    tokens (N,): an int64 tensor, or an array of integers mapped from a file. The first goes to `device` whole (None: it
    stays where it is), of the second each batch does, from pinned memory. `window` tokens per window. Raises UserError
    when the text is shorter than one window.
    """

    def __init__(
        self,
        tokens: Tensor | np.ndarray,
        window: int,
        batch_size: int,
        seed: int,
        device: torch.device | str | None = None,
    ):
        if len(tokens) <= window:
            raise UserError(
                f"the text to train on has {len(tokens):,} tokens, and one window needs {window + 1:,}: "
                "take a longer text, or a smaller --window or --block-size"
            )
        self.window = window
        self.batch_size = batch_size
        self.seed = seed
        # Row i is tokens[i : i + window + 1], a view: gathering rows of it is one indexing operation.
        if isinstance(tokens, np.ndarray):
            self._device = torch.device(device or "cpu")
            self._rows = np.lib.stride_tricks.sliding_window_view(tokens, window + 1)
        else:
            tokens = tokens if device is None else tokens.to(device)
            self._device = tokens.device
            self._rows = tokens.unfold(0, window + 1, 1)
        # One window fewer than fit, where the text allows, so that the first can start anywhere in a window.
        self._per_epoch = max(1, len(tokens) // window - 1)
        self._reader: ThreadPoolExecutor | None = None
        self._read_ahead: dict[tuple[int, int], Future[Tensor]] = {}
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (batch_size, window) int64 each, of the batch with this number, 0 or more."""
        if isinstance(self._rows, Tensor):
            rows = self._rows[self._batch_starts(index)]
        else:
            self.expect([index])
            rows = self._read_ahead.pop((index, self.batch_size)).result().to(self._device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]

    def expect(self, indices: Iterable[int]) -> None:
        """Begin to read the batches with these numbers, which are wanted next, if they come from a file.

        On a thread beside this one, so that the disk is waited for while the device computes.
        """
        if isinstance(self._rows, Tensor):
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "batches")
        for key in ((index, self.batch_size) for index in indices):
            if key not in self._read_ahead:
                self._read_ahead[key] = self._reader.submit(self._read, key[0])

    def _read(self, index: int) -> Tensor:
        """The rows (batch_size, window + 1) int64 of a batch; for a GPU pinned, so that the copy waits for nothing."""
        rows = torch.from_numpy(self._rows[self._batch_starts(index).numpy()].astype(np.int64))
        return rows.pin_memory() if self._device.type == "cuda" else rows

    def _batch_starts(self, index: int) -> Tensor:
        """Where each window of a batch starts, (batch_size,) int64."""
        wanted, end = index * self.batch_size, (index + 1) * self.batch_size
        parts = []
        while wanted < end:
            epoch, first = divmod(wanted, self._per_epoch)
            part = self._epoch_starts(epoch)[first : first + end - wanted]
            parts.append(part)
            wanted += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch_starts(self, epoch: int) -> Tensor:
        """Where each window of an epoch starts, in the order of training."""
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            last_offset = len(self._rows) - 1 - (self._per_epoch - 1) * self.window
            offset = random.integers(last_offset + 1)
            starts = offset + self.window * random.permutation(self._per_epoch)
            self._starts = torch.from_numpy(starts)
            if isinstance(self._rows, Tensor):
                self._starts = self._starts.to(self._device)
            self._epoch = epoch
        return self._starts
