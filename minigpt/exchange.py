"""`python -m minigpt export` and `import`: models to and from other programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from . import backends, checkpoint, hf, storage, tokenizer_choice, tokenizers
from .command_line import command_line, warn
from .config import TrainConfig
from .errors import Damaged, UserError
from .folder import new_folder, remove_if_empty
from .model import GPT
from .tokenizers import Tokenizer

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Export:
    """Write a trained model so that another program loads it."""

    to: Literal["hf"]
    """hf: a folder for transformers.GPT2LMHeadModel.from_pretrained."""
    run: Path | None = None
    """Folder of the run, or of one of its checkpoints. Without one: the newest run in runs/."""
    out: Path | None = None
    """Folder to write to, which must not be there yet. Without one: the run's name, ending in -hf."""


@dataclass(frozen=True)
class Import:
    """Make a run of a model of another program, which generate.py and the other commands take like any."""

    source: tyro.conf.Positional[Path]
    """The folder with the model: config.json and model.safetensors."""
    from_: Annotated[Literal["hf"], tyro.conf.arg(name="from")]
    """hf: a GPT-2 that transformers has saved, or that was exported here."""
    tokenizer: str | None = None
    """Folder or file with its tokenizer. Without one: what lies beside the model."""
    out: Path | None = None
    """Folder of the run. Without one: a new runs/NAME-N."""


def run_export(argv: Sequence[str], prog: str = "python -m minigpt export") -> None:
    """Write a model as a folder for another program. Raises UserError as hf.export."""
    options = command_line(Export, argv, prog=prog)
    run = options.run or checkpoint.newest_run()
    found = checkpoint.find(run, warn)
    out = options.out or run.with_name(f"{run.resolve().name}-hf")
    hf.export(found.model(backends.resolve("torch", _CPU), _CPU), found.tokenizer.to_json(), out)
    print(f"{found.folder} as {out}: transformers.GPT2LMHeadModel.from_pretrained({str(out)!r})")


def run_import(argv: Sequence[str], prog: str = "python -m minigpt import") -> None:
    """Make a run of a model from elsewhere. Raises UserError as hf.read, and where it has no tokenizer that fits."""
    options = command_line(Import, argv, prog=prog)
    try:
        config, weights = hf.read(options.source)
    except Damaged as error:
        raise UserError(f"{error.problem}: get the folder {options.source} anew") from None
    tokenizer = _tokenizer(options)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {config.vocab_size}: they do not "
            "belong together; name another --tokenizer"
        )
    if options.tokenizer is not None and tokenizer.vocab_size < config.vocab_size:
        warn(
            f"WARNING: the tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.vocab_size:,}: where "
            "that is no padding, they do not belong together, and the model will write nonsense"
        )
    model = GPT(config, backends.resolve("torch", _CPU))
    model.load_state_dict(weights, strict=not config.tied_head)  # a tied head is the embedding
    shape = {name: value for name, value in asdict(config).items() if name != "vocab_size"}
    # One window a step: nobody has said yet how it is to be trained.
    settings = TrainConfig(preset="gpt2", vocab_size=config.vocab_size, batch_size=1, **shape)
    folder = new_folder(options.out, options.source.resolve().name)
    try:
        checkpoint.save(folder / checkpoint.BEST, model, tokenizer, settings, {"source": str(options.source)})
    finally:
        remove_if_empty(folder)
    print(f"{model.parameter_count():,} parameters, written to {folder}: python generate.py --run {folder}")


def _tokenizer(options: Import) -> Tokenizer:
    """The tokenizer that is named, or that lies beside the model."""
    ours = options.source / hf.TOKENIZER
    if options.tokenizer is None and ours.is_file():
        return tokenizers.load(storage.read_json(ours))
    return tokenizer_choice.read(options.tokenizer or str(options.source), text=False)
