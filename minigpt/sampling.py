"""Text from a model: one token at a time, drawn from what the model expects next."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .errors import UserError
from .model import GPT
from .tokenizers import EOS, SPECIAL, CharTokenizer


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids (...) int64 drawn from logits (..., V), whose -inf are never drawn.

    The logits are divided by `temperature`; 0 takes the largest instead of drawing. Then only the `top_k` largest are
    kept (Fan et al. 2018; 0: all of them), and of those only the fewest whose probabilities sum to at least `top_p`
    (nucleus sampling, Holtzman et al. 2020). Raises UserError for values that make no sense.
    """
    _check(logits.shape[-1], temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    rows = logits.double().flatten(0, -2) if logits.dim() > 1 else logits.double()[None]
    # The largest becomes 0 first: a temperature close to 0 must not turn it into infinity.
    rows = (rows - rows.amax(-1, keepdim=True)) / max(temperature, 1e-300)
    order = None
    if 0 < top_k < rows.shape[-1] or top_p < 1:
        rows, order = rows.sort(dim=-1, descending=True, stable=True)
        rows = rows[:, : top_k or None]
    probabilities = rows.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    if order is not None:
        drawn = order.gather(-1, drawn)
    return drawn.reshape(logits.shape[:-1])


def generate(
    model: GPT,
    ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    tokenizer: CharTokenizer | None = None,
) -> Iterator[int]:
    """Token ids that continue `ids` (one or more), each as soon as it is known; at most `max_new_tokens`.

    The model sees the last block_size tokens. `temperature`, `top_k`, `top_p` as in `sample`. A `seed` gives the same
    ids every time; without one every call differs. PyTorch's own generator is neither read nor moved. With a
    `tokenizer`, what no text has is never drawn: the special tokens, and the ids with which a vocabulary is padded.
    Raises UserError, before the first token, for values that make no sense.
    """
    vocab_size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    _check(vocab_size, temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be 0 or more")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: it must be between 0 and 2**63 - 1")
    if vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens and the model only {model.config.vocab_size}: "
            "they do not belong together; take another checkpoint"
        )
    start = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    if start.shape[1] == 0:
        raise UserError("there is nothing to continue: give at least one token")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    return _generate(model, start, max_new_tokens, tokenizer, options)


def _generate(
    model: GPT, idx: Tensor, max_new_tokens: int, tokenizer: CharTokenizer | None, options: dict
) -> Iterator[int]:
    never = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    if tokenizer is not None:
        never[: len(SPECIAL)] = True
        never[tokenizer.vocab_size :] = True
    idx = idx[:, -model.config.block_size :].to(next(model.parameters()).device)
    for _ in range(max_new_tokens):
        # Drawn on the CPU: a seed means the same on every device, and the id has to come here anyway.
        logits = _next_logits(model, idx).masked_fill(never, -math.inf)
        if not logits.amax().isfinite():  # a NaN, or +inf
            raise UserError("the model's logits are not finite: its training has diverged; take another checkpoint")
        drawn = sample(logits, **options)
        yield int(drawn)
        idx = torch.cat([idx, drawn.to(idx.device).view(1, 1)], 1)[:, -model.config.block_size :]


@torch.no_grad()
def _next_logits(model: GPT, idx: Tensor) -> Tensor:
    """What the model expects after idx (1, T): logits (V,) fp32, on the CPU. Dropout is off meanwhile."""
    was_training = model.training
    model.eval()
    try:
        logits, _ = model(idx, last_only=True)
    finally:
        model.train(was_training)
    return logits[0, -1].float().cpu()


def encode_prompt(tokenizer: CharTokenizer, prompt: str) -> list[int]:
    """The ids of a prompt. "" begins at a new line, or at <eos> where the text that was trained on has no lines.

    Raises UserError for characters that the model has never seen: they are named.
    """
    if not prompt:
        return [EOS] if tokenizer.unknown("\n") else tokenizer.encode("\n").tolist()
    _require_known(tokenizer, prompt, "the prompt")
    return tokenizer.encode(prompt).tolist()


def stream(
    model: GPT,
    tokenizer: CharTokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | None = None,
) -> Iterator[str]:
    """The text that continues `prompt`, in pieces, as soon as it is certain.

    It ends before `stop`, which is not part of it. The rest as `generate` and `encode_prompt`.
    """
    if stop is not None:
        if not stop:
            raise UserError("the stop text is empty: give it at least one character, or leave it out")
        _require_known(tokenizer, stop, "the stop text")
    ids = generate(
        model,
        encode_prompt(tokenizer, prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        tokenizer=tokenizer,
    )
    pieces = (tokenizer.decode([token]) for token in ids)
    return pieces if stop is None else _until(pieces, stop)


def complete(model: GPT, tokenizer: CharTokenizer, prompt: str = "", **options) -> str:
    """`prompt` and the text that continues it, at once; options and errors as `stream`."""
    return prompt + "".join(stream(model, tokenizer, prompt, **options))


def _until(pieces: Iterator[str], stop: str) -> Iterator[str]:
    """The pieces up to `stop`; what may be its beginning is held back until that is decided."""
    held = ""
    for piece in pieces:
        held += piece
        before, found, _ = held.partition(stop)
        if found:
            if before:
                yield before
            return
        keep = next(n for n in range(min(len(stop) - 1, len(held)), -1, -1) if held.endswith(stop[:n]))
        sure, held = held[: len(held) - keep], held[len(held) - keep :]
        if sure:
            yield sure
    if held:
        yield held


def _check(vocab_size: int, temperature: float, top_k: int, top_p: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature:g}: it must be 0 (always the likeliest token) or more")
    if not 0 <= top_k <= vocab_size:
        raise UserError(
            f"top_k is {top_k}: it must be between 1 and the {vocab_size} tokens of the vocabulary, or 0 for all"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p:g}: it must be above 0 and at most 1")


def _require_known(tokenizer: CharTokenizer, text: str, what: str) -> None:
    if unknown := tokenizer.unknown(text):
        named = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
        raise UserError(f"{what} has characters that the model has never seen ({named}): leave them out")
