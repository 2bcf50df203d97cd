"""What tests look at in the folder of a run."""

import csv

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def rows(folder):
    """metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [float(row["train_loss"]) for row in rows(folder)]


def assert_same_run(a, b):
    """The same weights, optimizer and generators to the last bit, and the same metrics but for the speed."""
    for name in ("model.safetensors", "optimizer.safetensors", "generators.json", "tokenizer.json"):
        assert (a / "last" / name).read_bytes() == (b / "last" / name).read_bytes(), name
    assert (a / "best" / "model.safetensors").read_bytes() == (b / "best" / "model.safetensors").read_bytes()
    ours, theirs = ([row | {"tokens_per_second": ""} for row in rows(folder)] for folder in (a, b))
    assert ours == theirs and ours


class StopAfter:
    """A StopRequest that comes up once a session has done so many steps."""

    def __init__(self, session, step):
        self.session, self.step = session, step

    @property
    def requested(self):
        return self.session.progress.step >= self.step


class Waits(TorchDispatchMode):
    """Notes, during a `with` block, what makes the host wait for the device."""

    _METHODS = ("tolist", "numpy", "cpu")

    def __enter__(self):
        self.found = []
        self._before = {name: getattr(torch.Tensor, name) for name in self._METHODS}
        for name, method in self._before.items():
            setattr(torch.Tensor, name, self._noting(name, method))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self._before.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def _noting(self, name, method):
        def noted(*arguments, **options):
            self.found.append(name)
            return method(*arguments, **options)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
