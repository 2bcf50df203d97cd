"""Four stations that show, in a minute and without the network, that everything works here.

Each does real work with the chosen backends, prints what it measured, and says what it had expected.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from . import backends, checkpoint, corpora, tokenizers
from .backends import Backends
from .config import preset
from .errors import UserError
from .generation import complete
from .learning import make_optimizer
from .model import GPT
from .tokenizers import UNK, CharTokenizer

TEXT = "to be or not to be that is the question"
"""What the training station learns by heart: 13 symbols, so that with the special ones the vocabulary is 16."""

PROMPT = "to be or"
STEPS = 100


class Check(NamedTuple):
    """One measurement: what, the value as text, and whether it is what it has to be."""

    what: str
    measured: str
    passed: bool


Station = Callable[[], list[Check]]


def run(ops: Backends, device: torch.device, out: Path, *, seed: int = 1337, console: Console | None = None) -> None:
    """Run the stations one after another, and print what they measured; the trained model is saved in `out`/model.

    Raises UserError when a station fails, once all have run.
    """
    console = console or Console()
    stations: dict[str, Station] = {
        "tokenizer": lambda: tokenizer(),
        "transformer": lambda: transformer(ops, device, seed),
        "training": lambda: training(ops, device, out, seed),
        "generation": lambda: generation(ops, device, out, seed),
    }
    console.print(
        f"kernels: {', '.join(f'{op}={name}' for op, name in ops.names.items())}, on {device}", highlight=False
    )
    failed = []
    for number, (name, station) in enumerate(stations.items(), start=1):
        console.rule(f"{number} {name}", align="left")
        began = time.perf_counter()
        try:
            checks = station()
        except UserError as error:
            checks = [Check("not finished", str(error), False)]
        for check in checks:
            mark = "[green]ok    [/]" if check.passed else "[red]FAILED[/]"
            console.print(mark, end=" ")
            console.print(f"{check.what}: {check.measured}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"       {time.perf_counter() - began:.1f} s", style="dim", highlight=False)
        if not all(check.passed for check in checks):
            failed.append(name)
    if failed:
        raise UserError(f"{len(failed)} of {len(stations)} stations failed: {', '.join(failed)}")
    console.print(f"all {len(stations)} stations passed", style="bold green")


def tokenizer() -> list[Check]:
    """Half a million characters to ids and back, and characters that are not known."""
    text = corpora.load("pydocs").text
    made = CharTokenizer.from_text(text)
    began = time.perf_counter()
    ids = made.encode(text)
    back = made.decode(ids)
    rate = 2 * len(text) / (time.perf_counter() - began)
    stranger = next(c for c in "\N{SNOWMAN}\N{CLOUD}\N{COMET}" if c not in text)
    unknown = made.encode(f"a{stranger}b")
    again = tokenizers.load(made.to_json())
    return [
        Check(
            "vocabulary", f"{made.vocab_size} = {len(set(text))} characters + 3", made.vocab_size == len(set(text)) + 3
        ),
        Check("round trip", f"{len(text):,} characters, {rate / 1e6:.0f} million a second", back == text),
        Check(
            f"{stranger!r} is <unk>",
            f"{unknown.tolist()} -> {made.decode(unknown)!r}",
            unknown[1] == UNK and made.unknown(f"a{stranger}b") == [stranger],
        ),
        Check("stored and read again", "the same" if again == made else "another one", again == made),
    ]


def transformer(ops: Backends, device: torch.device, seed: int) -> list[Check]:
    """The `tiny` model, untrained: its size, its output, and that no position sees a later one."""
    torch.manual_seed(seed)
    model = GPT(preset("tiny").model_config(0), ops).to(device).eval()
    count = model.parameter_count()
    idx = torch.randint(100, (2, 10), device=device)
    changed = torch.cat([idx[:, :6], (idx[:, 6:] + 1) % 100], 1)
    with torch.no_grad():
        logits, _ = model(idx)
        _, loss = model(idx, idx.roll(-1, 1))
        after, _ = model(changed)
        model.use(backends.resolve("eager", device))
        plain, _ = model(idx)
    leak = _largest(after[:, :6] - logits[:, :6])
    seen = _largest(after[:, 6:] - logits[:, 6:])
    error = _largest(logits - plain)
    return [
        Check("parameters", f"{count:,}", count == 145_764),
        Check("output", f"{tuple(logits.shape)}", tuple(logits.shape) == (2, 10, 100)),
        Check("loss before training", f"{loss:.3f} (ln 100 = 4.605)", abs(float(loss) - math.log(100)) < 0.3),
        Check("tokens 6 to 9 changed: before them", f"logits move by {leak:.1e} at most", leak <= 1e-5),
        Check("tokens 6 to 9 changed: from them on", f"logits move by {seen:.1e} at most", seen > 1e-3),
        Check("against plain arithmetic", f"logits differ by {error:.1e} at most", error <= 1e-4),
    ]


def training(ops: Backends, device: torch.device, out: Path, seed: int) -> list[Check]:
    """A model of 16 tokens learns one window by heart in 100 steps, and is saved."""
    made = CharTokenizer.from_text(TEXT)
    # One block of two heads: in Triton's interpreter every block and every head costs time.
    config = preset("tiny", vocab_size=0, n_layer=1, n_head=2, max_steps=STEPS, seed=seed)
    torch.manual_seed(seed)
    model = GPT(config.model_config(made.vocab_size), ops).to(device)
    optimizer = make_optimizer(model, config)
    ids = torch.from_numpy(made.encode(TEXT)).to(device)[None]
    losses = []
    for _ in range(STEPS):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    first, last = float(losses[0]), float(losses[-1])
    folder = _model_folder(out)
    checkpoint.save(folder, model, made, config, {"step": STEPS, "loss": last})
    stored = checkpoint.load(folder).state["step"]
    return [
        Check("vocabulary", f"{made.vocab_size}", made.vocab_size == 16),
        Check(
            "first loss", f"{first:.4f} (ln {made.vocab_size} = {math.log(made.vocab_size):.4f})", 2.6 <= first <= 3.1
        ),
        Check(f"loss after {STEPS} steps", f"{last:.4f} (0.03 or less)", last <= 0.03),
        Check("saved", f"{folder}", stored == STEPS),
    ]


def generation(ops: Backends, device: torch.device, out: Path, seed: int) -> list[Check]:
    """The saved model continues the text that it has learnt, by drawing."""
    stored = checkpoint.load(_model_folder(out))
    model, made = stored.model(ops, device), stored.tokenizer
    length = len(TEXT) - len(PROMPT)
    text = complete(model, made, PROMPT, max_new_tokens=length, temperature=0.8, top_k=5, seed=seed)
    same = sum(a == b for a, b in zip(text[len(PROMPT) :], TEXT[len(PROMPT) :], strict=False))
    return [
        Check("prompt", repr(PROMPT), text.startswith(PROMPT)),
        Check("drawn at temperature 0.8", repr(text[len(PROMPT) :]), len(text) > len(PROMPT)),
        Check("as in the text", f"{same} of {length} characters", same >= 0.9 * length),
    ]


def _model_folder(out: Path) -> Path:
    folder = out / "model"
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} exists and is no checkpoint: name another folder with --out")
    return folder


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
