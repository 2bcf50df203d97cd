"""The experiments: what each asks, what is usually said about it, and the runs that answer it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import kernels.device

from .runs import Place, Run


@dataclass(frozen=True)
class Scale:
    """How large the runs are. The shapes of the models are those of the questions, whatever the scale."""

    steps: int
    seeds: int
    more_seeds: int
    """Those of the experiments whose differences are small."""
    batch_size: int
    block_size: int
    eval_tokens: int
    sample_tokens: int
    cost_steps: int
    lengths: tuple[int, ...]
    """Windows of which the kept memory is counted."""
    bpe_vocab: int = 1024

    def run(self, **options) -> Run:
        """The run that is the middle of every comparison, with `options` in which one differs."""
        shape = {"batch_size": self.batch_size, "block_size": self.block_size, "eval_tokens": self.eval_tokens}
        return Run(**(shape | {"steps": self.steps} | options))


CPU = Scale(700, 3, 5, 12, 64, 20480, 1200, 25, (64, 128, 256, 512))
GPU = Scale(4000, 3, 5, 64, 256, 1 << 18, 1200, 100, (256, 512, 1024, 2048))
QUICK = Scale(10, 2, 2, 2, 16, 256, 60, 3, (16, 32), 300)


@dataclass(frozen=True)
class Experiment:
    """One question. `said` is what is usually said about it; `runs` gives the settings to compare, by label."""

    name: str
    title: str
    question: str
    said: str
    runs: Callable[[Scale, Place], dict[str, Run]]
    small_differences: bool = False

    def seeds(self, scale: Scale, asked: int) -> int:
        """How many seeds each setting gets: what was asked for, or what the scale has."""
        return asked or (scale.more_seeds if self.small_differences else scale.seeds)


def _rates(scale: Scale, place: Place) -> dict[str, Run]:
    return {f"{rate:.0e}".replace("e-0", "e-"): scale.run(learning_rate=rate) for rate in (1e-3, 1e-4, 1e-5)}


def _size(scale: Scale, place: Place) -> dict[str, Run]:
    return {"100K": scale.run(n_layer=2, n_embd=64), "1M": scale.run(n_layer=5)}


def _shape(scale: Scale, place: Place) -> dict[str, Run]:
    """The third has the parameters of the first in the layers of the second."""
    return {
        "4 x 128": scale.run(),
        "2 x 256": scale.run(n_layer=2, n_embd=256, n_head=8),
        "2 x 180": scale.run(n_layer=2, n_embd=180, n_head=6),
    }


def _positions(scale: Scale, place: Place) -> dict[str, Run]:
    return {"learned": scale.run(), "sinusoidal": scale.run(position="sinusoidal")}


def _tokens(scale: Scale, place: Place) -> dict[str, Run]:
    """BPE twice: with the steps of the characters, and with as many characters of text seen."""
    bpe = scale.run(tokenizer="bpe", vocab_size=scale.bpe_vocab)
    fewer = len(place.dataset("bpe", scale.bpe_vocab).train) / len(place.dataset().train)
    return {
        "characters": scale.run(),
        "BPE, as many steps": bpe,
        "BPE, as many characters": replace(bpe, steps=max(1, round(scale.steps * fewer))),
    }


def _temperature(scale: Scale, place: Place) -> dict[str, Run]:
    options = {"temperatures": (0.5, 1.0, 1.5), "sample_tokens": scale.sample_tokens}
    return {"samples": scale.run(kind="sample", steps=2 * scale.steps, **options)}


def _scaling(scale: Scale, place: Place) -> dict[str, Run]:
    found = {}
    for heads in (4, 1):
        found[f"with, d = {128 // heads}"] = scale.run(n_head=heads)
        found[f"without, d = {128 // heads}"] = scale.run(n_head=heads, variant="no scaling")
    return found


def _residuals(scale: Scale, place: Place) -> dict[str, Run]:
    deep = scale.run(n_layer=8, steps=max(2, scale.steps // 2))
    return {"with": deep, "without": replace(deep, variant="no residuals")}


def _kernels(scale: Scale, place: Place) -> dict[str, Run]:
    """Whole steps where a time means something, and one window of each length for what is kept for backward."""
    found = {}
    for name in backends_here(place):
        timed = place.device.type == "cuda" or name != "triton"
        if timed:
            found[f"{name}, a step"] = scale.run(kind="cost", kernels=name, steps=scale.cost_steps)
        for length in scale.lengths:
            found[f"{name}, {length} tokens"] = scale.run(
                kind="cost", kernels=name, steps=0, block_size=length, batch_size=1
            )
    return found


def backends_here(place: Place) -> list[str]:
    """The backends that can run on this device at all."""
    return ["eager", "torch", *(["triton"] if kernels.device.why_not(place.device) is None else [])]


def _initial(scale: Scale, place: Place) -> dict[str, Run]:
    found = {}
    for width in (32, 64, 128):
        for name in ("by width", "0.02"):
            found[f"{name}, width {width}"] = scale.run(n_embd=width, initial=name)
    return found


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "rates",
            "Learning rates",
            "What do learning rates of 1e-3, 1e-4 and 1e-5 do?",
            "a smaller learning rate learns more slowly, and more smoothly",
            _rates,
        ),
        Experiment(
            "size",
            "100 thousand parameters or a million",
            "How much does a model of ten times the parameters gain, from the same text and from the same arithmetic?",
            "the larger model predicts better after the same text",
            _size,
        ),
        Experiment(
            "shape",
            "Deep or wide",
            "Are 4 layers of 128 channels better than 2 of 256?",
            "the number of parameters matters, their shape hardly (Kaplan et al. 2020)",
            _shape,
        ),
        Experiment(
            "positions",
            "Learned or sinusoidal positions",
            "Does it matter whether positions are learned or fixed?",
            "the two give nearly the same results (Vaswani et al. 2017)",
            _positions,
            small_differences=True,
        ),
        Experiment(
            "tokens",
            "Characters or BPE",
            "Which predicts text better, a model of characters or one of BPE tokens?",
            "BPE predicts text better",
            _tokens,
        ),
        Experiment(
            "temperature",
            "Temperatures",
            "What does the temperature do to the text that a model writes?",
            "a higher temperature writes more diverse text, and more mistakes",
            _temperature,
        ),
        Experiment(
            "scaling",
            "The scores of attention with and without 1/sqrt(d)",
            "What happens without the division by sqrt(d)?",
            "without it the softmax saturates, and the model learns worse (Vaswani et al. 2017)",
            _scaling,
        ),
        Experiment(
            "residuals",
            "With and without residual connections",
            "What do residual connections do for 8 layers?",
            "without them the gradient vanishes on its way to the first layers, and a deep model learns worse",
            _residuals,
        ),
        Experiment(
            "kernels",
            "What a step costs with each backend",
            "What do fused functions and kernels save, in time and in memory?",
            "fused functions are faster, and keep less for backward",
            _kernels,
        ),
        Experiment(
            "initial",
            "The standard deviation of the initial weights, early and late",
            "Is GPT-2's 0.02 right for narrower models, or should it grow as 1/sqrt(width)?",
            "weights begin with a standard deviation of 0.02, which is GPT-2's, at every width",
            _initial,
            small_differences=True,
        ),
    )
}
