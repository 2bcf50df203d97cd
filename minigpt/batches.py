"""The order in which a run sees its data: a pure function of the text, the seed and the step.

Nothing about the position in the data needs to be stored to go on with a run, and every backend and device sees the
same batches.
"""

import numpy as np
import torch
from torch import Tensor

from .errors import UserError


class Batches:
    """Batches of windows for training, each epoch all of the text in shuffled windows, cut at a random offset.

    tokens (N,): an int64 tensor, or an array of integers mapped from a file. The first goes to `device` whole (None: it
    stays where it is), of the second each batch does. `window` tokens per window. Raises UserError when the text is
    shorter than one window.
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
        self._epoch = -1
        self._starts = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (batch_size, window) int64 each, of the batch with this number, 0 or more."""
        wanted, end = index * self.batch_size, (index + 1) * self.batch_size
        parts = []
        while wanted < end:
            epoch, first = divmod(wanted, self._per_epoch)
            part = self._epoch_starts(epoch)[first : first + end - wanted]
            parts.append(part)
            wanted += len(part)
        rows = self._gather(parts[0] if len(parts) == 1 else torch.cat(parts))
        return rows[:, :-1], rows[:, 1:]

    def _gather(self, starts: Tensor) -> Tensor:
        """The rows (n, window + 1) int64 that start there, on the device."""
        if isinstance(self._rows, Tensor):
            return self._rows[starts]
        rows = torch.from_numpy(self._rows[starts.numpy()].astype(np.int64))
        if self._device.type == "cuda":
            rows = rows.pin_memory()  # so that the copy waits for nothing
        return rows.to(self._device, non_blocking=True)

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
