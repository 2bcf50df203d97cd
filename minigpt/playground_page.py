"""The playground's page, in Gradio: what there is to see, and what happens when.

`minigpt/playing.py` is what it calls, `minigpt/marks.py` makes the HTML that it shows.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import marks, playing
from .errors import UserError
from .models import BACKENDS, Models
from .playing import MOST_TOKENS, Session, Settings
from .side_by_side import side_by_side

_INTERVAL = 0.06  # seconds between two pictures of a text that grows
_NOTHING_YET = (
    '<div class="page"><span class="empty">Type a prompt and press Write. Each token is coloured by how much it '
    "surprised the model; choose one to see what else could have stood there.</span></div>"
)
_MAPS_HINT = '<p class="hint">The attention maps of the text so far, a row for each layer.</p>'
_SIDES_HINT = '<p class="hint">The same tokens through PyTorch\'s functions and through the Triton kernels.</p>'


def build(gradio: Any, models: Models) -> Any:
    """The page, as Gradio's Blocks."""
    html, button, slider = gradio.HTML, gradio.Button, gradio.Slider
    still = functools.partial(html, js_on_load=None)
    names = models.runs()
    with gradio.Blocks(title="minigpt playground", analytics_enabled=False) as page:
        session = gradio.State(Session())
        still("<h1>Playground</h1><p>Write with a model, and look at what it does.</p>", elem_id="title")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=3, min_width=320):
                with gradio.Row(elem_id="picker"):
                    run = gradio.Dropdown(
                        names,
                        value=names[0] if names else None,
                        label="Run, newest first",
                        allow_custom_value=True,
                        elem_id="run",
                    )
                    refresh = button("Refresh", elem_id="refresh", scale=0, size="sm")
                facts = still(elem_id="facts")
                prompt = gradio.Textbox("ROMEO:", label="Prompt", lines=2, max_lines=8, elem_id="prompt")
                with gradio.Row(elem_id="go"):
                    write = button("Write", variant="primary", elem_id="write")
                    stop = button("Stop", elem_id="stop", interactive=False)
                notes = still(elem_id="notes")
                still(marks.legend())
                text = html(_NOTHING_YET, elem_id="text", js_on_load=read("playground_text.js"), autoscroll=True)
                others = still(marks.alternatives(None, None), elem_id="others")
            with gradio.Column(scale=1, min_width=260, elem_id="settings"):
                defaults = Settings()
                settings = [
                    slider(0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: always the likeliest"),
                    slider(0, 1000, defaults.top_k, step=1, label="Top-k", info="0: all tokens"),
                    slider(0, 1, defaults.top_p, step=0.01, label="Top-p", info="1: all tokens"),
                    slider(1, MOST_TOKENS, defaults.length, step=1, label="Length", info="tokens"),
                    slider(0, 9999, defaults.seed, step=1, label="Seed", info="the same seed, the same text"),
                ]
                kernels = gradio.Radio(list(BACKENDS), value=BACKENDS[0], label="Write with", elem_id="kernels")
        with gradio.Tabs():
            with gradio.Tab("Attention"):
                look = button("Show where each head looks", elem_id="look", size="md")
                maps = html(_MAPS_HINT, elem_id="attention", js_on_load=read("playground_attention.js"))
            with gradio.Tab("torch beside triton"):
                both = button("Run the text on both", elem_id="both", size="md")
                sides = still(_SIDES_HINT, elem_id="sides")

        def told(run: str | None) -> str:
            return _or_problem(lambda: f"<p>{marks.escape(models.get(run, BACKENDS[0]).facts)}</p>")

        def refreshed(chosen: str | None) -> tuple[Any, str]:
            names = models.runs()
            chosen = chosen if chosen in names else names[0] if names else None
            return gradio.update(choices=names, value=chosen), told(chosen)

        def writing(session: Session, run: str, prompt: str, kernels: str, *numbers: float) -> Iterator[tuple]:
            yield from _pictures(gradio, models, session, run, prompt, kernels, Settings(*numbers))

        def clicked(session: Session, event: gradio.EventData) -> str:
            return marks.alternatives(session.text, getattr(event, "place", None))

        private = {"api_visibility": "private"}
        page.load(refreshed, run, [run, facts], **private)
        refresh.click(refreshed, run, [run, facts], **private)
        run.input(told, run, facts, **private)
        gradio.on(
            [write.click, prompt.submit],
            writing,
            [session, run, prompt, kernels, *settings],
            [write, stop, notes, text, others, maps, sides],
            concurrency_limit=8,
            show_progress="hidden",
            **private,
        )
        stop.click(Session.stop, session, None, concurrency_limit=8, **private)
        text.click(clicked, session, others, concurrency_limit=8, show_progress="hidden", **private)
        look.click(
            lambda session: _or_problem(lambda: marks.frame(playing.attention(models, session))),
            session,
            maps,
            **private,
        )
        both.click(
            lambda session: _or_problem(lambda: marks.comparison(side_by_side(models, session))),
            session,
            sides,
            **private,
        )
    return page


def _pictures(
    gradio: Any, models: Models, session: Session, run: str, prompt: str, kernels: str, settings: Settings
) -> Iterator[tuple]:
    """What the page shows while a text grows: buttons, notes, text, alternatives; maps and backends, emptied."""

    def picture(text: playing.Text, first: bool) -> tuple:
        going = not text.ended
        buttons = gradio.update(interactive=not going), gradio.update(interactive=going)
        shown = f'<div class="page" tabindex="0" aria-label="the text">{marks.written(text)}</div>'
        # What belongs to the text before must not stand beside the new one.
        rest = (marks.alternatives(None, None), _MAPS_HINT, _SIDES_HINT) if first else (gradio.skip(),) * 3
        return (*buttons, marks.notes(text), shown, *rest)

    last = 0.0
    try:
        for _ in playing.write(models, session, run, kernels, prompt, settings):
            if session.text.ended or time.monotonic() - last > _INTERVAL:
                yield picture(session.text, first=not last)
                last = time.monotonic()
    except UserError as error:
        buttons = gradio.update(interactive=True), gradio.update(interactive=False)
        yield (*buttons, marks.problem(str(error)), *(gradio.skip(),) * 4)


def _or_problem(work: Callable[[], str]) -> str:
    """What `work` gives, or what a person can put right, as HTML."""
    try:
        return work()
    except UserError as error:
        return marks.problem(str(error))


def read(name: str) -> str:
    """A file of the folder `pages`."""
    return (Path(__file__).parent / "pages" / name).read_text(encoding="utf-8")
