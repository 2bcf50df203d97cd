"""Training: from settings to a folder with a checkpoint, metrics, curves and a sample."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import backends, checkpoint, corpora, plots, sampling
from .allocator import keep_freed_memory
from .batches import Batches
from .config import DTYPES, TrainConfig, pick_device, pick_dtype
from .errors import Stopped, StopRequest, UserError, stop_requests
from .evaluate import Evaluation, evaluate
from .model import GPT
from .report import Clock, Display, Losses, Metrics, new_folder, write_text
from .tokenizers import CharTokenizer

# What --resume may change: where and how the run computes and reports, and how far it goes, but not what it computes.
_CHANGEABLE = {
    "resume", "out", "data", "kernels", "device", "max_steps", "log_interval", "eval_interval", "eval_tokens",
    "val_tokens", "sample_tokens", "prompt",
}  # fmt: skip


@dataclass
class Progress:
    """How far a run is; what its state.json holds, beside the corpus."""

    step: int = 0
    """Optimizer steps done."""
    initial_loss: float = math.nan
    """Training loss of the first step."""
    train_loss: float = math.nan
    """Training loss of the last step."""
    best_val_loss: float = math.inf
    best_step: int = 0
    seconds: float = 0.0
    """Wall time since the run began, of every session of it."""
    train_seconds: float = 0.0
    """Time in training steps alone, the first of each session left out."""
    train_tokens: int = 0
    """Tokens trained on in that time."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then a cosine down (Loshchilov & Hutter 2017)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    part = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, part)))


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused, in which matrices decay and vectors do not."""
    groups = model.decay_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says, and return what summary.json holds.

    Writes to config.out, or a new folder runs/PRESET-N; or goes on in config.resume. Raises UserError for what a person
    can put right, and Stopped when Ctrl-C or SIGTERM ended it, once the last checkpoint is written.
    """
    session = Session(config)
    with _threads(1 if session.ops.interpreted else torch.get_num_threads()):
        with session.display.running(session.progress.step), stop_requests() as stop:
            session.run(stop)
        return session.finish()


class Session:
    """One run of the program on one run of training: from nothing, or from the last checkpoint."""

    def __init__(self, config: TrainConfig):
        self.began = time.monotonic()
        found = checkpoint.load(config.resume / "last") if config.resume else None
        if found:
            _check_resumable(config, found)
        self.config = config
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = pick_dtype(config.dtype, self.device)
        self.ops = backends.resolve(config.kernels, self.device)
        self.display = Display(Console(), config.max_steps)

        self.corpus = corpora.load(config.data, announce=self._warn)
        if found and found.state["corpus"] != self.corpus.sha256:
            raise UserError(
                f"{config.resume} was trained on another text than {self.corpus.source}: name it with --data"
            )
        self.tokenizer = found.tokenizer if found else CharTokenizer.from_text(self.corpus.text)
        if unknown := self.tokenizer.unknown(config.prompt):
            raise UserError(
                f"--prompt has characters that the text does not have, leave them out: {' '.join(map(repr, unknown))}"
            )
        tokens = torch.from_numpy(self.tokenizer.encode(self.corpus.text))
        cut = len(self.corpus.split()[0])
        train_tokens, self.validation = tokens[:cut].to(self.device), tokens[cut:].to(self.device)
        self.batches = Batches(train_tokens, config.window or config.block_size, config.batch_size, config.seed)
        if len(self.validation) < 2:
            raise UserError(f"{self.corpus.source} has too little text to validate on: take a longer text")
        self.tokens_per_step = config.batch_size * self.batches.window * config.grad_accumulation

        torch.manual_seed(config.seed)
        self.model = GPT(config.model_config(self.tokenizer.vocab_size), self.ops)
        if found:
            found.load_weights(self.model)
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.parameters = list(self.model.parameters())
        self.progress = Progress()
        if found:
            found.load_optimizer(self.model, self.optimizer)
            self.scaler.load_state_dict(found.state["scaler"])
            self.progress = Progress(**found.state["progress"])
        self.losses = Losses(self.device)
        self.clock = Clock(self.device, self.progress.train_seconds, self.progress.train_tokens)
        self.reported = self.progress.step
        self.seconds_before = self.progress.seconds

        self.folder = config.resume or new_folder(config.out, config.preset)
        self.metrics = Metrics(self.folder / "metrics.csv", self.progress.step)
        self._introduce()

    def run(self, stop: StopRequest) -> None:
        """Train up to the last step, evaluating and saving on the way."""
        config, progress = self.config, self.progress
        first = progress.step
        self.clock.start()
        since = first
        while progress.step < config.max_steps:
            self.losses.add(self._step(progress.step))
            progress.step += 1
            if progress.step == first + 1 < config.max_steps:
                # The first step compiles kernels and warms the caches up: it does not count in the speed.
                self.clock.start()
                since = progress.step
            if stop.requested or progress.step % config.eval_interval == 0 or progress.step == config.max_steps:
                self.clock.stop((progress.step - since) * self.tokens_per_step)
                self._evaluate(stop)
                self.clock.start()
                since = progress.step
            elif progress.step % config.log_interval == 0:
                self._report(self._arrived(), self.clock.rate_now((progress.step - since) * self.tokens_per_step))

    def finish(self) -> dict[str, Any]:
        """Evaluate the final weights, sample, draw the curves and write the summary, which is returned."""
        self.metrics.close()
        config, progress = self.config, self.progress
        final = self._evaluation(config.val_tokens)
        self.display.line(
            f"trained: {progress.step} steps in {self.clock.seconds:.1f} s, {self.clock.rate:,.0f} tokens/s, "
            "evaluation and saving left out"
        )
        self.display.line(
            f"validation: {final.loss:.4f} nats per character, {final.bits_per_character:.4f} bits, "
            f"perplexity {final.perplexity:.3f}, over {final.tokens:,} tokens"
        )
        if config.sample_tokens:
            text = sampling.complete(
                self.model,
                self.tokenizer,
                config.prompt,
                max_new_tokens=config.sample_tokens,
                temperature=0.8,
                seed=config.seed,
            )
            write_text(self.folder / "samples.txt", text + "\n")
            self.display.line(f"sample:\n{text}")
        plots.curves(self.metrics.path, self.folder / "curves.png", title=f"{config.preset} on {self.corpus.name}")
        summary = {
            "preset": config.preset,
            "parameters": self.model.parameter_count(),
            "vocab_size": self.model.config.vocab_size,
            "corpus": self.corpus.name,
            "seed": config.seed,
            "kernels": self.ops.names,
            "interpreted": self.ops.interpreted,
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "dtype": _name(self.dtype),
            "torch": torch.__version__,
            "steps": progress.step,
            "seconds": round(self.seconds_before + time.monotonic() - self.began, 3),
            "tokens_per_second": round(self.clock.rate, 1),
            "initial_loss": progress.initial_loss,
            "final_train_loss": progress.train_loss,
            "val_loss": final.loss,
            "val_tokens": final.tokens,
            "bits_per_character": final.bits_per_character,
            "perplexity": final.perplexity,
            "best_val_loss": progress.best_val_loss,
            "best_step": progress.best_step,
        }
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.display.line(f"written to {self.folder}; more text: python generate.py --run {self.folder}")
        return summary

    def _step(self, step: int) -> Tensor:
        """One optimizer step; the mean loss () of its batches, still on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        total: Tensor | None = None
        for index in range(step * config.grad_accumulation, (step + 1) * config.grad_accumulation):
            inputs, targets = self.batches[index]
            loss = self._loss(inputs, targets)
            self.scaler.scale(loss / config.grad_accumulation).backward()
            total = loss.detach() if total is None else total + loss.detach()
        if config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total / config.grad_accumulation

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(inputs, targets)[1]

    def _evaluate(self, stop: StopRequest) -> None:
        """Report, evaluate and save; where a stop was asked for, report and save only, and raise Stopped."""
        progress = self.progress
        rows = self._arrived(everything=True)
        stopped = stop.requested and progress.step < self.config.max_steps
        if not stopped:
            result = self._evaluation(self.config.eval_tokens)
            rows[-1] |= {"val_loss": result.loss, "perplexity": result.perplexity}
        self._report(rows, self.clock.rate)
        if not stopped:
            mark = ""
            if result.loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step, mark = result.loss, progress.step, ", the best so far"
                self._save("best", None)
            self.display.line(
                f"step {progress.step}: training loss {progress.train_loss:.4f}, validation loss {result.loss:.4f} "
                f"({result.tokens:,} tokens{mark})"
            )
        self._save("last", self.optimizer)
        if stopped:
            raise Stopped(
                f"stopped after step {progress.step} of {self.config.max_steps}, and saved; "
                f"to go on: python train.py --resume {self.folder}"
            )

    def _evaluation(self, max_tokens: int) -> Evaluation:
        return evaluate(self.model, self.validation, max_tokens=max_tokens, dtype=self.dtype)

    def _arrived(self, *, everything: bool = False) -> list[dict[str, float]]:
        """Rows of metrics.csv for the steps whose losses have come from the device."""
        rows = []
        for loss in self.losses.take(everything=everything):
            self.reported += 1
            rows.append(
                {
                    "step": self.reported,
                    "train_loss": loss,
                    "learning_rate": learning_rate(self.reported - 1, self.config),
                }
            )
        return rows

    def _report(self, rows: list[dict[str, float]], rate: float) -> None:
        """Write rows down, and show the last one."""
        if not rows:
            return
        if rows[0]["step"] == 1:
            self.progress.initial_loss = rows[0]["train_loss"]
        rows[-1]["tokens_per_second"] = rate
        self.metrics.write(rows)
        bad = next((row for row in rows if not math.isfinite(row["train_loss"])), None)
        if bad:
            raise UserError(
                f"the training loss is {bad['train_loss']} at step {bad['step']}: take a lower --learning-rate, "
                "a longer --warmup-steps or --dtype fp32"
            )
        self.progress.train_loss = rows[-1]["train_loss"]
        self.display.update(self.progress.step, self.progress.train_loss, rate)

    def _save(self, name: str, optimizer: torch.optim.Optimizer | None) -> None:
        progress = self.progress
        progress.seconds = self.seconds_before + time.monotonic() - self.began
        progress.train_seconds, progress.train_tokens = self.clock.seconds, self.clock.tokens
        state = {"progress": asdict(progress), "scaler": self.scaler.state_dict(), "corpus": self.corpus.sha256}
        stored = replace(self.config, resume=None, out=None)
        checkpoint.save(self.folder / name, self.model, self.tokenizer, stored, state, optimizer)

    def _introduce(self) -> None:
        """Say what is about to run, on what, and why."""
        line, model = self.display.line, self.model
        line(f"corpus   {self.corpus.source}: {self.corpus.characters:,} characters")
        line(
            f"model    {self.config.preset}: {model.parameter_count():,} parameters, "
            f"{model.config.vocab_size} tokens in the vocabulary"
        )
        line(f"device   {self.device}, {_name(self.dtype)}")
        line(f"folder   {self.folder}" + (f", from step {self.progress.step}" if self.progress.step else ""))
        self.display.table(self.ops.table())
        if self.ops.warning:
            self._warn(self.ops.warning)

    def _warn(self, text: str) -> None:
        self.display.line(text, style="bold red" if "WARNING" in text or text == self.ops.warning else None)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads. One beside Triton's interpreter: others would wait for it, and take the
    processor to do so.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_resumable(config: TrainConfig, found: checkpoint.Checkpoint) -> None:
    if config.out is not None:
        raise UserError("--resume goes on in the folder that it names: leave out --out")
    changed = [f.name for f in fields(config) if f.name not in _CHANGEABLE]
    changed = [name for name in changed if getattr(config, name) != getattr(found.config, name)]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise UserError(f"--resume goes on with the same run: leave out {flags}, or start a new run")
    done = found.state["progress"]["step"]
    if config.max_steps < done:
        raise UserError(f"{config.resume} has done {done} steps already, more than --max-steps {config.max_steps}")


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
