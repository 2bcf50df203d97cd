"""The runs that train: a model, its losses, and what is seen inside it; and the text that it writes."""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .. import generation, generators, process
from ..batches import Batches
from ..errors import Stopped, UserError
from ..evaluate import evaluate
from ..learning import Learner
from ..model import GPT
from . import variants
from .diversity import diversity, words
from .runs import Place, Result, Run

_POINTS = 100
"""Points that a curve of training losses is stored with, each the mean of the steps up to it."""


def train(run: Run, place: Place) -> Result:
    """Carry out a run of kind train or sample.

    Losses are in nats per token, `bits` per character. `attention` and `gradients` hold what `variants` measures, at
    the start and the end, and of the gradients in the middle too. Raises Stopped where place.stopping says so.
    """
    began = time.perf_counter()
    ops = place.ops(run.kernels)
    threads = process.threads(1 if ops.interpreted else torch.get_num_threads())
    with process.deterministic(place.device.type == "cuda"), threads:
        learner = _learner(run, place)
        data = place.dataset(run.tokenizer, run.vocab_size)
        validation = data.validation.to(place.device)
        if len(validation) < run.block_size:
            raise UserError(
                f"the text to validate on has {len(validation):,} tokens and a window {run.block_size}: "
                "take a longer text"
            )
        watched = learner.data(0)
        seen = validation.unfold(0, run.block_size, run.block_size)[:8]
        variant = variants.VARIANTS[run.variant]
        found: Result = {name: [] for name in ("attention", "gradients", "validation")}

        def look(step: int) -> None:
            if step in (0, run.steps):
                inside = variants.attention_statistics(learner.model, ops, variant, seen)
                found["attention"].append({"step": step} | inside)
            if step in (0, run.steps // 2, run.steps):
                found["gradients"].append({"step": step, "norm": variants.gradient_norms(learner, watched)})
            found["validation"].append({"step": step} | losses(run.eval_tokens))

        def losses(tokens: int) -> dict[str, float]:
            lengths = data.tokenizer.characters_per_token
            here = evaluate(learner.model, validation, lengths, max_tokens=tokens, dtype=place.dtype)
            return {"loss": here.loss, "bits": here.bits_per_character}

        steps = []
        moments = _moments(run)
        for step in range(run.steps):
            if place.stopping():
                raise Stopped("stopped")
            if step in moments:
                look(step)
            steps.append(learner.step(step)[0])
        look(run.steps)
        found["final"] = losses(4 * run.eval_tokens)
        each = torch.stack(steps).double().cpu()
        found["train"] = [
            {"step": step + len(part), "loss": part.mean().item()} for step, part in _parts(each, run.steps)
        ]
        found |= {
            "parameters": learner.model.parameter_count(),
            "tokens": run.steps * run.batch_size * run.block_size,
            "characters_per_token": _characters_per_token(run, place),
        }
        if run.kind == "sample":
            found |= _samples(learner.model, run, place)
    found["seconds"] = time.perf_counter() - began
    return finite(found)


def finite(values: Result | list | float | str | None):
    """The same values, None for the numbers that JSON does not have."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _learner(run: Run, place: Place) -> Learner:
    """A fresh model with the weights and the data of the run's seed."""
    generators.seed(run.seed)
    config, data = run.config(), place.dataset(run.tokenizer, run.vocab_size)
    model = GPT(config.model_config(data.tokenizer.vocab_size), variants.VARIANTS[run.variant](place.ops(run.kernels)))
    if run.initial == "0.02":
        variants.same_deviation_at_every_width(model)
    model.to(place.device)
    batches = Batches(data.train, run.block_size, run.batch_size, run.seed, place.device)
    return Learner(model, config, batches, place.dtype)


def _moments(run: Run) -> set[int]:
    """The steps before which something is looked at: evenly spread, and the middle."""
    return {round(run.steps * part / run.evaluations) for part in range(run.evaluations)} | {run.steps // 2}


def _parts(losses: torch.Tensor, steps: int) -> Iterator[tuple[int, torch.Tensor]]:
    size = max(1, steps // _POINTS)
    for first in range(0, steps, size):
        yield first, losses[first : first + size]


def _characters_per_token(run: Run, place: Place) -> float:
    """The characters that a token of the training text stands for, in the mean."""
    data = place.dataset(run.tokenizer, run.vocab_size)
    lengths = torch.from_numpy(data.tokenizer.characters_per_token)
    train = torch.as_tensor(data.train, dtype=torch.int64)
    return (lengths.double() * torch.bincount(train, minlength=len(lengths))).sum().item() / len(train)


def _samples(model: GPT, run: Run, place: Place) -> dict[str, Any]:
    """A text for each temperature, and what `diversity` says of it and of as much of the validation text.

    All text of the experiments comes from here.
    """
    data = place.dataset(run.tokenizer, run.vocab_size)
    vocabulary = set(words(data.tokenizer.decode(data.train)))
    samples = []
    for temperature in run.temperatures:
        if place.stopping():
            raise Stopped("stopped")
        text = generation.complete(
            model, data.tokenizer, max_new_tokens=run.sample_tokens, temperature=temperature, seed=run.seed
        )
        samples.append({"temperature": temperature, "text": text} | diversity(text, vocabulary))
    first = int(np.random.default_rng(run.seed).integers(max(1, len(data.validation) - run.sample_tokens)))
    real = data.tokenizer.decode(data.validation[first : first + run.sample_tokens])
    return {"samples": samples, "reference": diversity(real, vocabulary)}
