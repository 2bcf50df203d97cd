"""What a run says at its beginning, and what it writes at its end."""

import json
import math
import shlex
import time
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, generation, resume, utilization
from .checkpoint import Checkpoint
from .errors import UserError
from .evaluate import Evaluation
from .model import GPT
from .report import write_text
from .tokenizers import Tokenizer

if TYPE_CHECKING:
    from .trainer import Session


def introduce(session: "Session", found: Checkpoint | None) -> None:
    """Say what is about to run, on what, and why."""
    line, model = session.display.line, session.model
    line(f"corpus   {session.corpus.source}: {session.corpus.tokens:,} {_kind_of_tokens(session.tokenizer)}")
    line(
        f"model    {session.config.preset}: {model.parameter_count():,} parameters, "
        f"{model.config.vocab_size} tokens in the vocabulary{_padding(session)}"
    )
    if session.config.warmup_steps >= session.config.max_steps:
        line(
            f"note     --warmup-steps {session.config.warmup_steps} is not below --max-steps "
            f"{session.config.max_steps}: the learning rate never gets to {session.config.learning_rate:g}"
        )
    together = f", one of {session.world.size} processes ({session.world.kind})" if session.world.size > 1 else ""
    line(f"device   {session.device}, {resume.dtype_name(session.dtype)}{together}")
    line(f"folder   {session.folder}" + (f", from step {session.progress.step}" if found else ""))
    session.display.table(session.ops.table())
    if session.ops.warning:
        session.warn(session.ops.warning)
    if found and (why := resume.why_not_exact(found.state["surroundings"], session.surroundings)):
        session.warn(f"WARNING: from here on not bit-exact with the run that was never stopped: {why}")
    if session.metrics and (missing := session.metrics.missing):
        aside = f"; what was there is {session.metrics.aside}" if session.metrics.aside else ""
        session.warn(
            f"WARNING: {session.metrics.path} lacks step{'' if missing.isdigit() else 's'} {missing} of the "
            f"{session.progress.step} so far{aside}. Going on without: the curves will not show what is missing, all "
            "else is as it was"
        )
    elif session.metrics and session.metrics.aside:
        session.warn(
            f"WARNING: {session.metrics.path} had lines that are no rows of it, which it no longer has; "
            f"{session.metrics.aside} is how it was"
        )


def conclude(session: "Session", final: Evaluation) -> dict[str, Any]:
    """Say how it went, sample, draw the curves and write summary.json, whose values are returned."""
    config, progress = session.config, session.progress
    rate = session.clock.rate
    session.display.line(f"trained: {_speed(session, rate)}")
    session.display.line(
        f"validation: {final.loss:.4f} nats per token, {final.loss_per_character:.4f} nats or "
        f"{final.bits_per_character:.4f} bits per character, perplexity {final.perplexity:.3f} per token, over "
        f"{final.tokens:,} tokens, {final.characters:,} characters"
    )
    diverged = not math.isfinite(final.loss)
    if config.sample_tokens and not diverged:
        text = generation.complete(
            _whole_model(session),
            session.tokenizer,
            config.prompt,
            max_new_tokens=config.sample_tokens,
            temperature=0.8,
            seed=config.seed,
        )
        write_text(session.folder / "samples.txt", text + "\n")
        session.display.line(f"sample:\n{text}")
    summary = {
        "preset": config.preset,
        "parameters": session.model.parameter_count(),
        "tokenizer": session.tokenizer.kind,
        "vocab_size": session.model.config.vocab_size,
        "corpus": session.corpus.name,
        "seed": config.seed,
        "kernels": session.ops.names,
        "interpreted": session.ops.interpreted,
        "device": str(session.device),
        "device_name": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "CPU",
        "dtype": resume.dtype_name(session.dtype),
        "parallel": session.world.kind,
        "processes": session.world.size,
        "torch": torch.__version__,
        "steps": progress.step,
        "seconds": round(session.seconds_before + time.monotonic() - session.began, 3),
        "tokens_per_second": None if rate is None else round(rate, 1),
        "mfu_percent": session.mfu(rate),
        "speed_from_step": progress.speed_from,
        "peak_memory_bytes": utilization.peak_memory(session.device),
        "initial_loss": progress.initial_loss,
        "final_train_loss": progress.train_loss,
        "skipped_steps": progress.skipped,
        "val_loss": final.loss,
        "val_loss_per_character": final.loss_per_character,
        "val_tokens": final.tokens,
        "val_characters": final.characters,
        "bits_per_character": final.bits_per_character,
        "perplexity": final.perplexity,
        "best_val_loss": progress.best_val_loss,
        "best_step": progress.best_step,
    }
    # JSON has no number for what is not finite
    summary = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    write_text(session.folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    session.draw()
    if diverged:
        raise UserError(
            f"the training has diverged, its validation loss is not finite ({session.folder} has what was measured): "
            "start again with a lower --learning-rate or a longer --warmup-steps"
        )
    more = f"python generate.py --run {shlex.quote(str(session.folder))}"
    session.display.line(f"written to {session.folder}; more text: {more}")
    return summary


def _speed(session: "Session", rate: float | None) -> str:
    """How fast the steps were that ran on what the run is on now, Session.untimed of each session left out."""
    done, since = session.progress.step, session.progress.speed_from
    if rate is None:
        return f"{done} steps, none of them timed on what this runs on"
    after = f" after step {since}" if since else ""
    steps = "first step" if session.untimed == 1 else f"first {session.untimed} steps"
    left_out = f"evaluation, saving and the {steps} of each session" if session.untimed else "evaluation and saving"
    return (
        f"{done} steps; {rate:,.0f} tokens/s{after}, {session.clock.tokens:,} tokens in {session.clock.seconds:.1f} s: "
        f"{left_out} left out"
    )


def _whole_model(session: "Session") -> GPT:
    """The model as this process alone can call it: what fsdp has cut up, from the last checkpoint."""
    if session.world.kind != "fsdp":
        return session.model
    return checkpoint.load(session.folder / checkpoint.LAST).model(session.ops, session.device)


def _padding(session: "Session") -> str:
    known = session.tokenizer.vocab_size
    return "" if known == session.model.config.vocab_size else f", padded: the tokenizer has {known}"


def _kind_of_tokens(tokenizer: Tokenizer) -> str:
    if tokenizer.kind == "characters":
        return tokenizer.kind
    return f"tokens ({tokenizer.kind}, {tokenizer.vocab_size:,} kinds)"
