"""Training: from settings to a folder with checkpoints, metrics, curves and a sample."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import (
    backends,
    checkpoint,
    dataset,
    faults,
    generators,
    graphs,
    parallel,
    plots,
    process,
    resume,
    summary,
    utilization,
    watching,
)  # fmt: skip
from .allocator import keep_freed_memory
from .batches import Batches
from .checkpoint import BEST, LAST, Checkpoint
from .config import TrainConfig, parse, pick_device, pick_dtype
from .errors import Stopped, StopRequest, UserError, stop_requests
from .evaluate import Evaluation, evaluate
from .folder import hold, new_folder, remove_if_empty
from .learning import Learner, learning_rate
from .model import GPT
from .parallel import ALONE, World
from .report import Clock, Display, Measures, Metrics
from .resume import Progress

_SECONDS_BETWEEN_PICTURES = 30.0  # one takes about half a second


def run_train(argv: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Train as a command line (None: this program's) says."""
    train(parse(argv, prog))


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says, and return what summary.json holds.

    Writes to config.out, or a new folder runs/PRESET-N; or goes on in config.resume. Raises UserError for what a person
    can put right, and Stopped when Ctrl-C or SIGTERM ended it, once the last checkpoint is written.

    With config.parallel it is one of the processes that torchrun has started; the first one writes and prints.
    """
    with (
        faults.memory_told("take a smaller model (--n-layer, --n-embd, --block-size)"),
        process.deterministic(config.deterministic),
        process.tf32(config.tf32),
        parallel.join(config) as world,
        Session(config, world) as session,
    ):
        done = session.progress.step
        if done == config.max_steps and (stored := resume.finished(session.folder, done)):
            session.display.line(
                f"nothing to do: all {done} steps of {session.folder} are done, and it is evaluated; "
                f"a larger --max-steps goes on{resume.without_effect(config, session.found)}"
            )
            return stored
        with process.threads(session.threads):
            with session.display.running(session.progress.step), stop_requests() as stop:
                session.run(stop)
            return session.finish()


class Session:
    """One run of the program on one run of training: from nothing, or from the last checkpoint.

    It holds the run's folder until `close`, or the end of a `with` block. Of several processes each has one; the first
    one's is the one that writes.
    """

    def __init__(self, config: TrainConfig, world: World = ALONE):
        self.began = time.monotonic()
        self.config, self.world = config, world
        self.display = Display(Console(quiet=not world.first), config.max_steps)
        with ExitStack() as held:
            found = world.in_turn(lambda: self._hold_run(held)) if config.resume else None
            batches = world.in_turn(lambda: self._prepare(found))
            self._make_learner(batches, found)
            self.measures = Measures(self.device)
            self.clock = Clock(self.device, self.progress.train_seconds, self.progress.train_tokens)
            self.reported = self.progress.step
            self.seconds_before = self.progress.seconds
            self.drawn = self.began
            if not found:
                self.folder = world.first_does(lambda: self._hold_new_folder(held))
                # It shows before any training whether the disk has room, and from it on a kill loses steps alone.
                self._save(LAST)
            self.metrics: Metrics | None = None
            """Of the first process; None in the others."""
            self.watchers: list[watching.Watcher] = []
            world.first_does(lambda: self._write_metrics(held))
            self.found = found
            summary.introduce(self, found)
            self._held = held.pop_all()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, and let others into the folder."""
        self._held.close()

    @property
    def untimed(self) -> int:
        """Steps at the beginning of a session that do not count in the speed, of which a run of one step has none.

        They compile kernels and warm the caches up; a CUDA graph is warmed up, and then captured.
        """
        if self.config.max_steps == 1:
            return 0
        return graphs.WARM_UP + 1 if self.config.cuda_graph else 1

    def run(self, stop: StopRequest) -> None:
        """Train up to the last step, evaluating and saving on the way."""
        config, progress = self.config, self.progress
        agreement = parallel.Agreement(self.world)  # several processes must stop after the same step
        since = progress.step + self.untimed
        self.clock.start()
        while progress.step < config.max_steps:
            self.measures.add(self._step(progress.step))
            progress.step += 1
            if progress.step == since:
                self.clock.start()
            timed = max(0, progress.step - since) * self.tokens_per_step
            stopping = agreement.some(stop.requested) and progress.step < config.max_steps
            if stopping or self._evaluation_is_due():
                self.clock.stop(timed)
                self._evaluate(stopping)
                self.clock.start()
                since = max(since, progress.step)
            elif progress.step % config.log_interval == 0:
                self._report(self._arrived(), self.clock.rate_now(timed))
        agreement.end()

    def finish(self) -> dict[str, Any]:
        """Evaluate the final weights, sample, draw the curves and write the summary, which is returned."""
        if self.metrics:
            self.metrics.close()
        final = self.evaluate(self.config.val_tokens)
        return self.world.first_does(lambda: summary.conclude(self, final))

    def _hold_run(self, held: ExitStack) -> Checkpoint:
        """The checkpoint to go on from, and the run's folder, until `held` lets go of it."""
        self.folder = self.config.resume
        checkpoint.stored_config(self.folder)  # where there is none, nothing is to be written either
        if self.world.first:
            held.callback(hold(self.folder).release)
        found = checkpoint.resumable(self.folder, self.warn)
        resume.check(self.config, found)
        return found

    def _hold_new_folder(self, held: ExitStack) -> Path:
        """A folder for a new run, until `held` lets go of it."""
        folder = new_folder(self.config.out, self.config.preset)
        held.callback(remove_if_empty, folder)
        held.callback(hold(folder).release)
        return folder

    def _write_metrics(self, held: ExitStack) -> None:
        self.metrics = Metrics(self.folder / "metrics.csv", self.progress.step)
        held.callback(self.metrics.close)
        self.watchers = watching.start(self.config, self.folder, self.progress.step, held)

    def _prepare(self, found: Checkpoint | None) -> Batches:
        """Settle what this process computes on, and read the text."""
        config = self.config
        watching.check(config)
        self.device = pick_device(parallel.device_of(config, self.world))
        graphs.check(config, self.device)
        if self.device.type == "cpu":
            if config.tf32:
                raise UserError("--tf32 is of GPUs, and this runs on a CPU: leave it out")
            keep_freed_memory()
        self.dtype = pick_dtype(config.dtype, self.device)
        self.ops = backends.resolve(config.kernels, self.device)
        # One beside Triton's interpreter: others would wait for it, and take the processor to do so.
        self.threads = 1 if self.ops.interpreted else torch.get_num_threads()
        self.surroundings = resume.surroundings(
            config, self.ops, self.device, self.dtype, self.threads, self.world.size
        )
        return self._read_text(found)

    def _read_text(self, found: Checkpoint | None) -> Batches:
        config = self.config
        # A run that goes on has its tokenizer: it need not be made again, and files may have changed.
        wanted = found.tokenizer if found else config.tokenizer
        self.corpus = dataset.load(config.data, wanted, config.vocab_size, announce=self.warn)
        if found:
            resume.check_text(config.data, found, self.corpus)
        self.tokenizer = self.corpus.tokenizer
        if unknown := self.tokenizer.unknown(config.prompt):
            raise UserError(
                f"--prompt has characters that the text does not have, leave them out: {' '.join(map(repr, unknown))}"
            )
        self.validation = self.corpus.validation.to(self.device)
        window = config.window or config.block_size
        windows = self.world.share(config)[0]
        faults.check_batch(windows, window, config.n_embd, self.device)
        batches = Batches(self.corpus.train, window, windows, config.seed, self.device)
        if len(self.validation) < 2:
            raise UserError(f"{self.corpus.source} has too little text to validate on: take a longer text")
        self.tokens_per_step = config.batch_size * batches.window * config.grad_accumulation
        return batches

    def _make_learner(self, batches: Batches, found: Checkpoint | None) -> None:
        generators.seed(self.config.seed)
        self.model = GPT(self.config.model_config(self.tokenizer.vocab_size), self.ops)
        if found:
            found.load_weights(self.model)
        parallel.spread(self.model, self.world, self.device, self.dtype)
        self.flops_per_token = utilization.flops_per_token(self.model, batches.window)
        self.learner = Learner(self.model, self.config, batches, self.dtype, self.world)
        self.progress = Progress()
        if found:
            if scaler := found.state["scaler"]:  # a run that had none begins with a fresh one
                self.learner.scaler.load_state_dict(scaler)
            self.progress = Progress(**found.state["progress"])
            if resume.another_speed(found, self.surroundings):
                self.progress.speed_from = self.progress.step
                self.progress.train_seconds, self.progress.train_tokens = 0.0, 0
        if self.world.rank:  # each process drops other activations
            generators.seed((self.config.seed + self.world.rank + (self.progress.step << 20)) % 2**63)
        if found:
            found.load_optimizer(self.model, self.learner.optimizer, self.world.rank)

    def _step(self, number: int) -> Tensor:
        try:
            return self.learner.step(number)
        except (RuntimeError, MemoryError) as error:
            if told := faults.of_the_compiler(error):
                raise told from error
            if not faults.is_out_of_memory(error):
                raise
        # Only here, where nothing holds the failed step's tensors any more, is their memory free again.
        raise UserError(f"{faults.what_fits(self.learner)}; --resume {self.folder} takes them too")

    def _evaluation_is_due(self) -> bool:
        return self.progress.step % self.config.eval_interval == 0 or self.progress.step == self.config.max_steps

    def _evaluate(self, stopping: bool) -> None:
        """Report, evaluate where that is due, save, and raise Stopped when `stopping`."""
        progress = self.progress
        rows = self._arrived(everything=True)
        if due := self._evaluation_is_due():
            result = self.evaluate(self.config.eval_tokens)
            rows[-1] |= {"val_loss": result.loss, "perplexity": result.perplexity}
        self._report(rows, self.clock.rate)
        if due:
            mark = ""
            if result.loss < (math.inf if progress.best_val_loss is None else progress.best_val_loss):
                progress.best_val_loss, progress.best_step, mark = result.loss, progress.step, ", the best so far"
                self._save(BEST)
            self.display.line(
                f"step {progress.step}: training loss {rows[-1]['train_loss']:.4f}, validation loss {result.loss:.4f} "
                f"({result.tokens:,} tokens{mark})"
            )
        if self.metrics:
            self.metrics.sync()  # a checkpoint must not know of more steps than they
        self._save(LAST)
        if self.world.first and time.monotonic() - self.drawn > _SECONDS_BETWEEN_PICTURES:
            self.draw()
        if stopping:
            told = Stopped(
                f"stopped after step {progress.step} of {self.config.max_steps}, and saved; "
                f"to go on: {self.world.command(self.folder)}"
            )
            told.silent = not self.world.first
            raise told

    def evaluate(self, max_tokens: int) -> Evaluation:
        """The loss on the validation split, or on so many tokens of it (0: all)."""
        lengths, world = self.tokenizer.characters_per_token, self.world
        return evaluate(self.model, self.validation, lengths, max_tokens=max_tokens, dtype=self.dtype, world=world)

    def _arrived(self, *, everything: bool = False) -> list[dict[str, float]]:
        """Rows of metrics.csv for the steps whose losses have come from the device."""
        rows = []
        for loss, norm in self.measures.take(everything=everything):
            rate = learning_rate(self.reported, self.config)
            self.reported += 1
            rows.append({"step": self.reported, "train_loss": loss, "grad_norm": norm, "learning_rate": rate})
        return rows

    def _report(self, rows: list[dict[str, float]], rate: float | None) -> None:
        """Write rows down, and show the last one; no rate where no step has been timed yet."""
        if not rows:
            return
        if rate is not None:
            rows[-1]["tokens_per_second"] = rate
        if self.metrics:
            self.metrics.write(rows)
        for watcher in self.watchers:
            watcher.write(rows)
        if warning := faults.count_skipped(rows, self.progress, fp16=self.dtype == torch.float16):
            self.warn(warning)
        if losses := [row["train_loss"] for row in rows if math.isfinite(row["train_loss"])]:
            self.progress.train_loss = losses[-1]
            if self.progress.initial_loss is None:
                self.progress.initial_loss = losses[0]
        self.display.update(
            self.progress.step, rows[-1]["train_loss"], rate, self.mfu(rate), utilization.peak_memory(self.device)
        )

    def draw(self) -> None:
        """Draw the curves of the run as far as it is."""
        plots.curves(self.metrics.path, self.folder / "curves.png", title=f"{self.config.preset} on {self.corpus.name}")
        self.drawn = time.monotonic()

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """The share of the devices' peak in percent; None where that peak, or the speed, is not known."""
        if tokens_per_second is None:
            return None
        name, one = resume.device_name(self.device), tokens_per_second / self.world.size
        return utilization.mfu_percent(one, self.flops_per_token, name, self.dtype)

    def _save(self, name: str) -> None:
        progress = self.progress
        progress.seconds = self.seconds_before + time.monotonic() - self.began
        progress.train_seconds, progress.train_tokens = self.clock.seconds, self.clock.tokens
        state = {
            "progress": asdict(progress),
            "scaler": self.learner.scaler.state_dict(),
            "corpus": self.corpus.sha256,
            "surroundings": self.surroundings,
        }
        stored = replace(self.config, resume=None, out=None)
        last = {"optimizer": self.learner.optimizer, "keep": self.config.keep} if name == LAST else {}
        checkpoint.save(self.folder / name, self.model, self.tokenizer, stored, state, **last, world=self.world)

    def warn(self, text: str) -> None:
        """Show a line that is not to be overlooked."""
        self.display.line(text, style="bold red" if "WARNING" in text or "INTERPRETER" in text else None)
