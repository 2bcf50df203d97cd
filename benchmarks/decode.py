"""`python -m benchmarks decode`: tokens a second of generation, with a cache of keys and values and without.

A configuration gets a number only if the same process first found its tokens, drawn past the block from prompts of
different lengths, to be those of PyTorch's functions without a cache, and their log-probabilities too. A sequence may
become another one only where a drawn number lies between two tokens but for rounding. What is timed then is
`minigpt.generation` as generate.py runs it, greedy, from one token until the block is full, in turns. Weights are
random, and twice as large as training starts with: else attention would look everywhere alike, and a slot of the cache
that is lost would hardly show.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ladder, machine, noise, report, results, suite, timing
from minigpt import backends, config, context, generation, sampling
from minigpt.errors import UserError
from minigpt.model import GPT

CHARACTERS = 68
"""The vocabulary where a preset has none: Shakespeare's."""
SPREAD = 2.0
"""Times the weights that training starts with. Attention's scores then have a standard deviation above 1."""
FEWEST = 48
"""Tokens of each row that are compared, at least."""
LENGTHS = 8
"""Different ones of the prompts, at most: without a cache each has a forward pass of its own for every token."""
SEED = 0
"""Of what is drawn."""
TOLERANCE = 3e-4
"""How far, in nats, a token's log-probability may be from that of the same token without a cache. Probabilities within
it move no boundary between two tokens, in the running sum that a number is drawn in, by more than it."""
LEAST = 0.5
"""The share of all tokens that must have been drawn before their row left the other's way."""
PLAIN = "torch without cache"
"""The configuration that every other must write the same tokens as."""


@dataclass(frozen=True)
class Configuration:
    """A way to generate."""

    kernels: str
    cache: bool = True
    cuda_graph: bool = False

    @property
    def name(self) -> str:
        return self.kernels + "+graph" * self.cuda_graph + " without cache" * (not self.cache)

    def why_not(self, device: torch.device) -> str | None:
        """Why it is not timed on this device, if it is not."""
        if device.type == "cuda":
            return None
        if self.cuda_graph:
            return "a CUDA graph needs a GPU"
        return ladder.INTERPRETED if "triton" in backends.parse_request(self.kernels).values() else None


def add_to(commands: Any) -> None:
    """Add `decode` to a command line."""
    parser = commands.add_parser("decode", help="generation, with a cache and without", description=__doc__)
    parser.add_argument("--preset", help="of minigpt (default: shakespeare; on a CPU shakespeare-cpu)")
    parser.add_argument("--block", nargs="+", type=int, default=[64, 256], help="block sizes (default: 64 256)")
    parser.add_argument("--batch", nargs="+", type=int, help="rows (default: 1 64; on a CPU 1)")
    parser.add_argument("--kernels", nargs="+", default=["torch", "triton"], help="backends (default: torch triton)")
    parser.add_argument("--rounds", type=int, help="samples of each row (default: 20, --quick 6)")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 1 if some configuration wrote other tokens, or threw."""
    here = machine.here()
    batches = arguments.batch or ([1, 64] if here.type == "cuda" else [1])
    for option, values in (("rounds", [arguments.rounds]), ("block", arguments.block), ("batch", batches)):
        for value in values:
            if value is not None and value < 1:
                raise UserError(f"--{option} must be at least 1, not {value}")
    preset = arguments.preset or ("shakespeare" if here.type == "cuda" else "shakespeare-cpu")
    settings = config.preset(preset)
    kinds = configurations(arguments.kernels)
    rounds = arguments.rounds or (6 if arguments.quick else 20)
    document = results.new("decode", {"name": "decode", "preset": preset, "quick": arguments.quick})
    path = results.path_of(document, arguments.out)
    results.prepare(path)
    print(f"{here.name}: {preset}, {len(kinds)} configurations; results go to {path}", flush=True)
    document["ceilings"] = timing.ceilings(here.torch_device, [], arguments.quick)
    for block, batch in cases(arguments.block, batches):
        shape = replace(settings.model_config(CHARACTERS), block_size=block)
        made = functools.partial(GPT, shape, backends.resolve("torch", here.torch_device))
        before = document["rows"]

        def keep(rows: list[dict[str, Any]], before: list = before) -> None:
            document["rows"] = before + rows
            results.save(document, path)

        copy_gbps = document["ceilings"].get("copy_gbps")
        rows = measure(made, preset, batch, kinds, here.torch_device, rounds, copy_gbps, keep)
        for row in rows:
            said = f"{row['tokens_per_second']:,.0f} tokens/s" if row["status"] == "ok" else row["reason"]
            print(f"{row['case']}, {row['configuration']}: {said}", flush=True)
        suite.free()
    report.publish(document, path)
    return int(any(row["status"] in ("wrong", "error") for row in document["rows"]))


def cases(blocks: list[int], batches: list[int]) -> list[tuple[int, int]]:
    """Blocks with batches, the longest block first and of that the smallest batch, which everybody looks for: a run may
    be cut short."""
    return sorted(itertools.product(blocks, batches), key=lambda case: (-case[0], case[1]))


def configurations(kernels: list[str]) -> list[Configuration]:
    """Those of the backends, each with a cache, with a graph too, and what they are held to first."""
    found = [Configuration("torch", cache=False)]
    for name in dict.fromkeys(kernels):
        backends.parse_request(name)
        found += [Configuration(name), Configuration(name, cuda_graph=True)]
    return found


# ---------------------------------------------------------------- one model


def measure(
    made: Callable[[], GPT], preset: str, batch: int, kinds: list[Configuration], device: torch.device, rounds: int,
    copy_gbps: float | None, keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one model and batch: the tokens of every configuration first, then the times of those that agree.

    The first of `kinds` is the one that the others are held to. `keep` is given the rows as they stand whenever there
    is news.
    """
    torch.manual_seed(0)
    model = made().to(device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SPREAD)
    block = model.config.block_size
    key = {"case": f"{preset}, block {block}, batch {batch}", "preset": preset, "dtype": "fp32"}
    rows, timers = [], {}
    truth = functools.cache(lambda: drawn(model, kinds[0], batch, device))
    for kind in kinds:
        row: dict[str, Any] = key | {"configuration": kind.name, "block_size": block, "batch": batch}
        rows.append(row)
        if reason := kind.why_not(device):
            row |= {"status": "skipped", "reason": reason}
            continue
        try:
            row |= judge(drawn(model, kind, batch, device), truth())
            if row["status"] == "untimed":
                timers[kind.name] = Timer(model, kind, batch, device)
        except Exception as error:  # one configuration's failure must not end the others
            row |= ladder.failure(error)
        keep(rows)

    def enter(samples: dict[str, list[float]]) -> None:
        for row in rows:
            name = row["configuration"]
            if name in samples:
                row.pop("reason", None)
                row |= ladder.speed(samples[name], batch) | noise.waited(timers[name])
                if timers[name].kind.cache:
                    row |= bandwidth(model, batch, row["median_ms"], copy_gbps)
        plain = next((row for row in rows if row["configuration"] == PLAIN and row["status"] == "ok"), None)
        for row in rows:
            if plain and row["status"] == "ok":
                row["over_plain"] = float(f"{row['tokens_per_second'] / plain['tokens_per_second']:.4g}")
        keep(rows)

    samples, failed = timing.interleaved(timers, rounds, seconds=120.0, news=enter)
    for row in rows:
        if row["configuration"] in failed:
            row |= ladder.failure(failed[row["configuration"]])
    enter(samples)
    return rows


class Drawn(NamedTuple):
    """Ids, their log-probabilities, and how far the drawn numbers are from the next token's share; (batch, T) each."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    edges: torch.Tensor


def drawn(model: GPT, kind: Configuration, batch: int, device: torch.device) -> Drawn:
    """What a configuration draws after prompts of one token to a whole block.

    A few rows are drawn on past their block; many have LENGTHS among them, and some are past it soon.
    """
    block, vocab_size = model.config.block_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(SEED)
    kinds = max(1, min(batch, LENGTHS) - 1)
    lengths = [1 + row * kinds // max(1, batch - 1) * (block - 1) // kinds for row in range(batch)]
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    tokens = max(FEWEST, (block + context.kept(block)) // batch)
    uniforms, columns = sampling.Uniforms(SEED, batch), []
    for step in _steps(model, kind, prompts, device, max_new_tokens=tokens, seed=SEED, table=True):
        ends = step.table.exp().cumsum(1).gather(1, step.ids[:, None])[:, 0]
        number = uniforms.next()
        edges = torch.minimum(ends - number, number - (ends - step.logprobs.exp()))
        columns.append(Drawn(step.ids, step.logprobs, edges))
    return Drawn(*(torch.stack(parts, 1) for parts in zip(*columns, strict=True)))


def judge(found: Drawn, truth: Drawn) -> dict[str, str]:
    """The fields of a row, whose tokens and log-probabilities are the true ones or are not.

    Every sequence is judged up to its first other token, where both must have drawn within TOLERANCE of the next one.
    """
    differs = found.ids != truth.ids
    before = differs.cumsum(1) == 0
    first = differs & (differs.cumsum(1) == 1)
    wrong = first & ~(torch.maximum(found.edges, truth.edges) <= TOLERANCE)
    if wrong.any():
        number = int(wrong.any(0).nonzero()[0]) + 1
        return {"status": "wrong", "reason": f"wrong: other tokens than {PLAIN}, from number {number} on"}
    if before.double().mean() < LEAST:
        reason = f"wrong: most tokens are others than those of {PLAIN}, after numbers drawn between two tokens"
        return {"status": "wrong", "reason": reason}
    apart = float(torch.where(before, found.logprobs - truth.logprobs, 0.0).abs().max())
    if not apart <= TOLERANCE:
        reason = f"wrong: its log-probabilities are up to {apart:.2g} from those of {PLAIN}; {TOLERANCE:g} is allowed"
        return {"status": "wrong", "reason": reason}
    return {"status": "untimed", "reason": "the run ended before this was timed"}


@dataclass
class Timer:
    """Milliseconds a step of a whole generation, from one token until the block is full, its prefill included.

    A CUDA graph is captured before the clock starts.
    """

    model: GPT
    kind: Configuration
    batch: int
    device: torch.device
    method: str = "perf_counter"
    waiting: timing.Waiting = field(default_factory=timing.Waiting)

    def sample(self) -> float:
        block = self.model.config.block_size
        prompts = [[0]] * self.batch
        steps = _steps(self.model, self.kind, prompts, self.device, max_new_tokens=block, temperature=0)
        ladder.wait(self.device)
        with self.waiting:
            began = time.perf_counter()
            for _ in steps:
                pass
            ladder.wait(self.device)
            return (time.perf_counter() - began) * 1e3 / block


def _steps(model: GPT, kind: Configuration, prompts: list, device: torch.device, **options) -> Iterator:
    model.use(backends.resolve(kind.kernels, device))
    return generation.steps(model, prompts, cache=kind.cache, cuda_graph=kind.cuda_graph, **options)


def bandwidth(model: GPT, batch: int, milliseconds: float, copy_gbps: float | None) -> dict[str, float]:
    """What a step has to read, on the average of a block that fills, as GB/s and, if known, as a share of a copy's.

    Every weight of a product or a norm once for the whole batch, and of each row the keys and values that are filled;
    of the embeddings only a row is read, which does not count.
    """
    shape, weight = model.config, model.head.weight
    embeddings = {"positions"} | ({"tokens.weight"} if not shape.tied_head else set())
    weights = sum(p.nbytes for name, p in model.named_parameters() if name not in embeddings)
    cache = 2 * shape.n_layer * shape.n_embd * weight.itemsize * batch * (1 + shape.block_size) / 2
    gbps = (weights + cache) / milliseconds / 1e6
    found = {"weight_bytes": weights, "cache_bytes": cache, "gbps": gbps}
    found |= {"copy_percent": 100 * gbps / copy_gbps} if copy_gbps else {}
    return {name: float(f"{value:.5g}") for name, value in found.items()}
