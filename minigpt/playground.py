"""`python -m minigpt playground`: a local page to write with a model and look at what it does.

It listens on 127.0.0.1 alone, answers only browsers that asked for that name, and tells them to load nothing from
anywhere else. `minigpt/playing.py` is what it calls, `minigpt/marks.py` what it shows; Gradio (optional) is the rest.
"""

import functools
import os
import socket
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import marks, playing
from .command_line import command_line
from .config import pick_device
from .errors import Stopped, UserError, stop_requests
from .playing import BACKENDS, MOST_TOKENS, Models, Session, Settings
from .side_by_side import side_by_side

_HOST = "127.0.0.1"
_PORTS = 100  # tried one after another
_INTERVAL = 0.06  # seconds between two pictures of a text that grows
# Gradio makes functions of its own templates ('unsafe-eval'); handlers in attributes, which it does not use, never run.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_NOTHING_YET = (
    '<div class="page"><span class="empty">Type a prompt and press Write. Each token is coloured by how much it '
    "surprised the model; choose one to see what else could have stood there.</span></div>"
)
_MAPS_HINT = '<p class="hint">The attention maps of the text so far, a row for each layer.</p>'
_SIDES_HINT = '<p class="hint">The same tokens through PyTorch\'s functions and through the Triton kernels.</p>'


@dataclass(frozen=True)
class Playground:
    """Open a local page to write with a model: surprisal, alternatives, attention, torch beside triton."""

    runs: Path = Path("runs")
    """Folder of the runs to choose from."""
    port: int = 7860
    """Port of 127.0.0.1 to listen on. Where it is taken, the next free one; 0: any free one."""
    open: bool = True
    """Open a browser, where there is a screen."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""


def run_playground(argv: Sequence[str], prog: str = "python -m minigpt playground") -> None:
    """Serve the page until Ctrl-C. Raises UserError without Gradio, and where no port is free."""
    argv = ["--no-open" if word == "--no-browser" else word for word in argv]
    options = command_line(Playground, argv, prog=prog)
    models = Models(options.runs, pick_device(options.device))
    gradio = _gradio()
    port = free_port(options.port)
    page = build(gradio, models)
    with stop_requests() as stop:
        try:
            _, address, _ = page.launch(**_how(gradio, port))
        except OSError:
            raise UserError(f"port {port} was taken in this moment: try again") from None
        if options.port not in (0, port):
            print(f"port {options.port} is taken: using {port}")
        print(f"playground: {address}  (Ctrl-C ends it)", flush=True)
        if options.open and _screen():
            webbrowser.open(address)
        while not stop.requested:
            time.sleep(0.1)
    models.closing = True
    page.close(verbose=False)
    raise Stopped("the playground has ended")


def free_port(wanted: int) -> int:
    """The first free port of 127.0.0.1 from `wanted` on; 0: any. Raises UserError where there is none."""
    if not 0 <= wanted < 65536:
        raise UserError(f"port is {wanted}: it must be between 0 and 65535")
    for port in range(wanted, min(wanted + _PORTS, 65536)):
        with closing(socket.socket()) as probe:
            if sys.platform != "win32":  # as the server will: a port that was just left is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
                return probe.getsockname()[1]
            except PermissionError:
                raise UserError(f"port {port} needs an administrator: choose one from 1024 on with --port") from None
            except OSError:
                continue
    raise UserError(f"no port from {wanted} to {min(wanted + _PORTS, 65536) - 1} is free: choose another --port")


def _screen() -> bool:
    """Whether a browser would have a place to appear; in a terminal it would take that over."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _gradio() -> Any:
    """Gradio, told to keep to this machine before it is imported. Raises UserError where it is not installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("NO_PROXY", "no_proxy"):  # it asks its own server whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), _HOST)))
    try:
        import gradio
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise UserError("the playground needs Gradio: `pip install gradio`, or `pip install -e .[web]`") from None
    return gradio


def _how(gradio: Any, port: int) -> dict[str, Any]:
    """How the page is served: to this machine, without any of Gradio's own extras."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    neutral, system = gradio.themes.colors.slate, ["system-ui", "sans-serif"]
    theme = gradio.themes.Default(
        primary_hue="blue", neutral_hue=neutral, font=system, font_mono=["ui-monospace", "monospace"]
    ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    return {
        "server_name": _HOST,
        "server_port": port,
        "share": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "inbrowser": False,
        "show_error": True,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "run_history": False,
        "enable_monitoring": False,
        "max_file_size": 1,
        "footer_links": [],
        "theme": theme,
        "css": _read("playground.css") + marks.style(),
        # Another name for this machine would be a page of somewhere else that has led a browser here.
        "app_kwargs": {
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"]), Middleware(Policy)],
            "docs_url": None,
            "redoc_url": None,
        },
    }


class Policy:
    """ASGI middleware: tells browsers to load nothing from elsewhere, and to run nothing that text says."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """See ASGI."""

        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                more = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in more.items())]
            await send(message)

        await self.app(scope, receive, sending)


# ---------------------------------------------------------------- the page


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
                text = html(_NOTHING_YET, elem_id="text", js_on_load=_read("playground_text.js"), autoscroll=True)
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
                maps = html(_MAPS_HINT, elem_id="attention", js_on_load=_read("playground_attention.js"))
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


def _read(name: str) -> str:
    return (Path(__file__).parent / "pages" / name).read_text(encoding="utf-8")
