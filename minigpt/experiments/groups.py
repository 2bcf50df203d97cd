"""The results of one setting over its seeds, as arrays."""

import math
from dataclasses import dataclass

import numpy as np

from .runs import Result, Run


@dataclass(frozen=True)
class Group:
    """What one setting of an experiment gave: its label, its run with the first seed, a result for each seed."""

    label: str
    run: Run
    results: list[Result]

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.results)

    @property
    def parameters(self) -> int:
        """Those of the model."""
        return self.results[0]["parameters"]

    def curve(self, table: str, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps (points,) and the values (seeds, points) of a table of the results; NaN for None."""
        steps = np.array([row["step"] for row in self.results[0][table]])
        return steps, np.array([[_number(row[column]) for row in result[table]] for result in self.results])

    def layers(self, table: str, column: str, at: int) -> np.ndarray:
        """The values (seeds, layers) of row `at` of a table whose values are lists, one number for each layer."""
        return np.array([[_number(value) for value in result[table][at][column]] for result in self.results])

    def end(self) -> np.ndarray:
        """The last point of the validation loss (seeds,), on the tokens of the points before it."""
        return self.curve("validation", "loss")[1][:, -1]

    def final(self, column: str = "loss") -> np.ndarray:
        """The validation loss after training (seeds,), in nats per token, or `bits` per character, on more tokens."""
        return np.array([_number(result["final"][column]) for result in self.results])


Groups = dict[str, Group]
"""By label, in the order in which they are shown."""


def training_roughness(group: Group) -> np.ndarray:
    """How much a training loss goes up and down in its second half (seeds,): the spread from point to point."""
    _, losses = group.curve("train", "loss")
    half = losses[:, losses.shape[1] // 2 :]
    return np.diff(half, axis=1).std(axis=1) / math.sqrt(2)


def gradient_ratio(group: Group, at: int) -> np.ndarray:
    """The gradient norm of the first block over that of the last (seeds,), at the start, the middle, the end."""
    norms = group.layers("gradients", "norm", at)
    return norms[:, 0] / norms[:, -1]


def sampled(group: Group) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The temperatures, each measure of the samples (seeds, temperatures), and of the validation text (seeds,)."""
    temperatures = [sample["temperature"] for sample in group.results[0]["samples"]]
    measured, reference = {}, {}
    for name in group.results[0]["reference"]:
        rows = [[sample[name] for sample in result["samples"]] for result in group.results]
        measured[name] = np.array(rows, dtype=np.float64)
        reference[name] = np.array([result["reference"][name] for result in group.results], dtype=np.float64)
    return temperatures, measured, reference


def costs(groups: Groups) -> tuple[dict[str, np.ndarray], dict[str, dict[int, int]]]:
    """Backend -> times in seconds (repeats, steps), for those that were timed; backend -> length -> bytes kept."""
    timed, kept = {}, {}
    for group in groups.values():
        name = group.run.kernels
        if group.run.steps:
            timed[name] = np.array([result["times"] for result in group.results])
        else:
            kept.setdefault(name, {})[group.run.block_size] = group.results[0]["kept_bytes"]
    return timed, kept


def early_point(steps: np.ndarray) -> int:
    """The first evaluation after the warm-up has ended."""
    return min(len(steps) - 1, int(np.searchsorted(steps, steps[-1] // 10, side="left")))


def reached_at(group: Group, losses: np.ndarray) -> np.ndarray:
    """The step (seeds,), in a straight line between evaluations, at which a loss was first reached; NaN for never."""
    steps, curves = group.curve("validation", "loss")
    found = []
    for row, loss in zip(curves, losses, strict=True):
        below = np.flatnonzero(row <= loss)
        if not len(below):
            found.append(math.nan)
        elif (after := below[0]) == 0:
            found.append(float(steps[0]))
        else:
            found.append(float(np.interp(loss, row[[after, after - 1]], steps[[after, after - 1]])))
    return np.array(found)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
