"""`python -m minigpt attention`: where each head of a trained model looks, as a picture and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import checkpoint, faults, generation
from .attention_maps import attention_maps, draw, shown, write_page
from .command_line import command_line, warn
from .commands import ops_of
from .errors import UserError, writing
from .prompting import read_prompt


@dataclass(frozen=True)
class Attention:
    """Show where each head of a trained model looks in a text: attention.png, and attention.html to point at."""

    prompt: str | None = None
    """The text that the model reads."""
    prompt_file: Path | None = None
    """A UTF-8 file with that text, all of it."""
    run: Path | None = None
    """Folder of the run, or of one of its checkpoints. Without one: the newest run in runs/."""
    out: Path | None = None
    """Folder to write the two files to. Without one: the folder of the run."""
    kernels: str | None = None
    """Backend of the ops, as for training. Without one: the environment's MINIGPT_KERNELS, else auto."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""


@faults.memory_told("take a shorter prompt")
def run_attention(argv: Sequence[str], prog: str = "python -m minigpt attention") -> None:
    """Write the maps of a model for a prompt. Raises UserError for an empty one, and for unknown characters."""
    options = command_line(Attention, argv, prog=prog)
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file do not go together: choose one")
    prompt = options.prompt if options.prompt_file is None else read_prompt(options.prompt_file)
    if not prompt:
        raise UserError("the prompt is empty: give --prompt some text for the heads to look at")
    run = options.run or checkpoint.newest_run()
    found = checkpoint.find(run, warn)
    ops, device = ops_of(options)
    model = found.model(ops, device)
    ids = generation.encode_prompt(found.tokenizer, prompt)
    if len(ids) > (block := model.config.block_size):
        warn(f"the prompt has {len(ids):,} tokens, and the model sees {block:,} at once: the last {block:,} are shown")
        ids = ids[-block:]
    maps = attention_maps(model, torch.tensor(ids))
    labels = [shown(found.tokenizer.token_text(token)) for token in ids]
    folder = options.out or run
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    title = f"{found.folder}, attention by {ops.names['attention']}"
    draw(maps, labels, folder / "attention.png", title=title)
    write_page(maps, labels, folder / "attention.html", title=title)
    print(f"{maps.shape[0]} layers x {maps.shape[1]} heads: {folder / 'attention.png'}, {folder / 'attention.html'}")
