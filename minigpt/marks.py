"""Pieces of HTML for the playground: tokens coloured by surprisal, alternatives, comparisons, messages.

Whatever comes from a prompt, a model or a file goes through `html.escape`; nothing else is put into a page.
"""

import math
from html import escape
from typing import NamedTuple

from .attention_maps import shown
from .playing import Text, Token
from .side_by_side import Result

_PROMPT_SHOWN = 2000  # characters


class Shade(NamedTuple):
    """A colour for surprisals from `bits` up: background and ink, as #rrggbb."""

    bits: float
    background: str
    ink: str


# One hue from light to dark, after ColorBrewer's YlOrBr: lightness alone tells the shades apart, for every eye.
SHADES = (
    Shade(0.0, "#ffffff", "#24292f"),
    Shade(0.5, "#fff6d6", "#24292f"),
    Shade(1.0, "#fee4a3", "#24292f"),
    Shade(2.0, "#fdc566", "#24292f"),
    Shade(4.0, "#ee8f3c", "#24292f"),
    Shade(8.0, "#9c3a08", "#ffffff"),
)


def level(bits: float) -> int:
    """The index into SHADES for a surprisal."""
    return max(number for number, shade in enumerate(SHADES) if bits >= shade.bits)


def style() -> str:
    """The CSS of the shades."""
    return "".join(f".s{i} {{ background: {s.background}; color: {s.ink}; }}\n" for i, s in enumerate(SHADES))


def readable(text: str) -> str:
    """`text` with a mark before line breaks, and all else that cannot be seen written out; not yet escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _flowing(text: str) -> str:
    """Text as HTML, with marks at line breaks that are not copied with it."""
    return escape(readable(text)).replace("\n", '<i aria-hidden="true">\u23ce</i>\n')


def written(text: Text) -> str:
    """A text: its prompt and its tokens."""
    prompt = text.prompt
    before = f"... {len(prompt) - _PROMPT_SHOWN:,} characters before ...\n" if len(prompt) > _PROMPT_SHOWN else ""
    head = f'<i>{before}</i><span class="prompt">{_flowing(prompt[-_PROMPT_SHOWN:])}</span>'
    caret = "" if text.ended else '<span class="caret"></span>'
    return head + "".join(token(place, its) for place, its in enumerate(text.tokens)) + caret


def token(place: int, its: Token) -> str:
    """One token, the `place`th of its text. One that ends within a character shows its name, small."""
    inner = _flowing(its.text) if its.text else f"<i>{escape(readable(its.name))}</i>"
    return f'<span class="t s{level(its.bits)}" data-i="{place}" title="{its.bits:.2f} bits">{inner}</span>'


def legend() -> str:
    """What the colours mean."""
    ends = [*(shade.bits for shade in SHADES[1:]), math.inf]
    steps = (
        f'<span class="s{i}">{f"{s.bits:g} to {end:g}" if end < math.inf else f"{s.bits:g} and more"}</span>'
        for i, (s, end) in enumerate(zip(SHADES, ends, strict=True))
    )
    return f'<div class="legend"><b>Surprise, bits</b>{"".join(steps)}</div>'


def alternatives(text: Text | None, place: object) -> str:
    """What else could have stood at a place of the text; a hint where the place is none."""
    if text is None or isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(text.tokens):
        return '<p class="hint">Choose a token of the text to see what else the model thought likely there.</p>'
    its = text.tokens[place]
    rows = list(its.alternatives)
    if its.id not in [id for id, _, _ in rows]:
        rows.append((its.id, its.name, 2.0**-its.bits))
    return (
        f'<p class="head">Token {place + 1:,}, <code>{escape(shown(its.name))}</code>: probability '
        f"{_share(2.0**-its.bits)}, {its.bits:.2f} bits</p>"
        f'<ol class="bars">{"".join(_bar(name, share, id == its.id) for id, name, share in rows)}</ol>'
        f'<p class="hint">The {len(its.alternatives)} likeliest of the vocabulary, before temperature, top-k and '
        "top-p.</p>"
    )


def _bar(name: str, share: float, drawn: bool) -> str:
    mark = ' class="drawn" aria-label="this one was drawn"' if drawn else ""
    return (
        f"<li{mark}><code>{escape(shown(name))}</code>"
        f'<span class="bar"><span style="width:{100 * share:.2f}%"></span></span><span>{_share(share)}</span></li>'
    )


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.1e}"


def notes(text: Text) -> str:
    """What there is to know about a text: the notes on it, and how it ended."""
    its = f'<p class="loud"><b>{escape(text.warning)}.</b></p>' if text.warning else ""
    its += "".join(f'<p class="note">{escape(readable(line))}.</p>' for line in text.notes)
    return its + f'<p class="said">{escape(text.ended or "Writing ...")}</p>'


def problem(message: str) -> str:
    """Something that a person can put right."""
    return f'<p class="problem" role="alert">{escape(readable(message))}</p>'


def comparison(result: Result) -> str:
    """Two backends, side by side."""
    interpreted = [side.name for side in result.sides if side.interpreted]
    loud = (
        f'<p class="loud"><b>{escape(", ".join(interpreted))} ran in Triton\'s INTERPRETER, not on a GPU.</b> It '
        "checks that the kernels compute the right thing; its time says nothing of speed, so none is shown.</p>"
        if interpreted
        else ""
    )
    rows = "".join(
        f"<tr><th>{escape(side.name)}</th><td>{_rate(side.read)}</td><td>{_rate(side.written)}</td></tr>"
        for side in result.sides
    )
    text = "the same tokens" if result.same_text else "DIFFERENT tokens"
    return (
        f"{loud}<table><tr><th>largest difference of</th><th></th></tr>"
        f"<tr><td>logits</td><td>{result.logits:.2e} (the largest logit is {result.largest:.1f})</td></tr>"
        f"<tr><td>log-probabilities, nats</td><td>{result.logprobs:.2e}</td></tr></table>"
        f'<p class="said">Over {result.tokens} tokens of the text. The likeliest next token is the same at '
        f"{result.agreeing} of {result.tokens}; going on by itself each wrote {text} "
        f"({len(result.sides[0].ids)}).</p>"
        f"<table><tr><th>tokens a second</th><th>reading</th><th>writing</th></tr>{rows}</table>"
        '<p class="hint">Of the fastest of several calls, one text at a time.</p>'
    )


def _rate(rate: float | None) -> str:
    return "not a speed" if rate is None else f"{rate:,.0f}"


def frame(page: str) -> str:
    """A page within the page, which can neither reach the outer one nor anything else."""
    return f'<iframe sandbox="allow-scripts" title="attention maps" srcdoc="{escape(page)}"></iframe>'
