"""`python -m minigpt playground`: a local page to write with a model and look at what it does.

It listens on 127.0.0.1 alone, answers only browsers that asked for that name, and tells them to load nothing from
anywhere else. `minigpt/playground_page.py` is the page, in Gradio, which is optional.
"""

import os
import socket
import sys
import time
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import marks, playground_page
from .command_line import command_line
from .config import pick_device
from .errors import Stopped, UserError, stop_requests
from .models import Models

_HOST = "127.0.0.1"
_PORTS = 100  # tried one after another
# Gradio makes functions of its own templates ('unsafe-eval'); handlers in attributes, which it does not use, never run.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Playground:
    """Open a local page to write with a model: surprisal, alternatives, attention, torch beside triton."""

    runs: Path = Path("runs")
    """Folder of the runs to choose from."""
    port: int = 7860
    """Port of 127.0.0.1 to listen on. Where it is taken, the next free one; 0: any free one."""
    browser: Annotated[bool, tyro.conf.arg(aliases=("--open",))] = True
    """Open a browser, where there is a screen."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: the GPU if there is one."""


def run_playground(argv: Sequence[str], prog: str = "python -m minigpt playground") -> None:
    """Serve the page until Ctrl-C. Raises UserError without Gradio, and where no port is free."""
    options = command_line(Playground, argv, prog=prog)
    models = Models(options.runs, pick_device(options.device))
    gradio = _gradio()
    port = free_port(options.port)
    page = playground_page.build(gradio, models)
    with stop_requests() as stop:
        try:
            _, address, _ = page.launch(**_how(gradio, port))
        except OSError:
            raise UserError(f"port {port} was taken in this moment: try again") from None
        if options.port not in (0, port):
            print(f"port {options.port} is taken: using {port}")
        print(f"playground: {address}  (Ctrl-C ends it)", flush=True)
        if options.browser and _screen():
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
        "css": playground_page.read("playground.css") + marks.style(),
        # Another name for this machine would be a page of somewhere else that has led a browser here.
        "app_kwargs": {
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"]), Middleware(Policy)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
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
