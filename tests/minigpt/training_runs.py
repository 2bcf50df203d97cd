"""What tests look at in the folder of a run."""

import csv


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
