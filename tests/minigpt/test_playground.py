"""The playground's command, and its page in a real browser (slow; with gradio, playwright and a Chromium)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from playing_runs import BYTES, write_run

from minigpt import playground
from minigpt.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror='window.harmed=1'>${window.harmed=1}{{7*7}}<script>window.harmed=1</script>"

# ---------------------------------------------------------------- the command


def test_a_port_that_is_taken_gives_the_next_free_one():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        taken = one.getsockname()[1]
        found = playground.free_port(taken)
        assert taken < found <= taken + 99
        with socket.socket() as other:
            other.bind(("127.0.0.1", found))
    assert playground.free_port(0) > 0


def test_no_port(call, monkeypatch):
    for port in (-1, 65536):
        with pytest.raises(UserError, match="between 0 and 65535"):
            playground.free_port(port)
    with socket.socket() as last:
        last.bind(("127.0.0.1", 65535))
        last.listen()
        with pytest.raises(UserError, match="no port from 65535 to 65535 is free"):
            playground.free_port(65535)


def test_without_gradio_it_says_what_to_install(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "x")  # so that what it sets is taken back
    status, out, error = call(playground.run_playground, "--no-browser")
    assert (status, out) == (1, "") and error.count("\n") == 1 and "pip install gradio" in error
    status, _, error = call(playground.run_playground, "--prot", 1)
    assert status == 1 and "--port" in error


# ---------------------------------------------------------------- the page

# Every name that the server looks up and every address that it connects to is written down.
WATCHED = """
import sys
def note(event, arguments):
    if event == "socket.connect":
        print("CONNECT", repr(arguments[1]), file=sys.stderr, flush=True)
    elif event == "socket.getaddrinfo":
        print("LOOKUP", repr(arguments[0]), file=sys.stderr, flush=True)
sys.addaudithook(note)
from minigpt import __main__, errors
errors.door(__main__.main)
"""


class Served:
    """A playground in a process of its own."""

    def __init__(self, runs, folder, *options):
        self.log = folder / "log.txt"
        command = [sys.executable, "-c", WATCHED, "playground", "--runs", str(runs), "--no-browser", *options]
        with self.log.open("wb") as log:
            without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # kernels are interpreted, as the models are on the CPU
            self.process = subprocess.Popen(command, cwd=ROOT, env=without, stdout=log, stderr=log)
        until = time.monotonic() + 240
        while not (found := re.search(r"playground: (http://127\.0\.0\.1:(\d+))/", self.said())):
            assert time.monotonic() < until and self.process.poll() is None, self.said()
            time.sleep(0.2)
        self.address, self.port = found[1], int(found[2])

    def said(self):
        return self.log.read_text(errors="replace")

    def end(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("served")
    write_run(folder / "runs" / "bytes", BYTES)
    time.sleep(0.02)
    write_run(folder / "runs" / "letters")
    found = Served(folder / "runs", folder, "--port", "0")
    found.runs = folder / "runs"
    yield found
    if found.process.poll() is None:
        found.end()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page in a browser's tab; `requests` are all that it made."""

    def __init__(self, chromium, served, width=1280):
        self.page = chromium.new_page(viewport={"width": width, "height": 900})
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda other: self.requests.append(other.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(served.address)
        self.see("#facts", "parameters")

    def see(self, place, text, seconds=120):
        """Wait until an element says `text`."""
        found = "([place, text]) => document.querySelector(place)?.textContent.includes(text)"
        self.page.wait_for_function(found, arg=[place, text], timeout=1000 * seconds)

    def set(self, label, value):
        """Type a number beside a slider."""
        number = self.page.get_by_label(f"number input for {label}")
        number.fill(str(value))
        number.press("Tab")

    def write(self, prompt=None, wait="bits of surprise"):
        if prompt is not None:
            self.page.fill("#prompt textarea", prompt)
        # what is there from the text before must not count
        self.page.evaluate("document.querySelectorAll('#notes p').forEach(line => { line.textContent = 'old'; })")
        self.page.click("#write")
        if wait:
            self.see("#notes", wait)
            self.page.wait_for_selector("#write:not([disabled])")

    @property
    def tokens(self):
        return self.page.locator("#text [data-i]").all_inner_texts()

    def choose(self, run):
        self.page.click("#run input")
        self.page.get_by_role("option", name=run, exact=True).click()


@pytest.fixture
def tab(chromium, served):
    found = Tab(chromium, served)
    found.set("Length", 30)
    yield found
    assert not found.errors
    outside = [url for url in found.requests if not url.startswith((served.address + "/", "data:", "blob:", "about:"))]
    assert len(found.requests) > 5 and not outside
    assert not found.page.evaluate("window.harmed")
    found.page.close()


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize("run", ["letters", "bytes"])
def test_it_writes_and_shows_alternatives(tab, run):
    tab.choose(run)
    tab.see("#facts", "tokens (characters)" if run == "letters" else "tokens (bpe)")
    tab.write("The fox")
    first = tab.tokens
    assert len(first) == 30 and "30 tokens" in tab.page.inner_text("#notes")
    assert tab.page.inner_text("#text .prompt") == "The fox"
    tab.page.click("#text [data-i='4']")
    tab.see("#others", "Token 5,")
    assert tab.page.locator("#others li").count() in (8, 9) and tab.page.locator("#others .drawn").count() == 1
    tab.page.press("#text .page", "ArrowRight")
    tab.see("#others", "Token 6,")
    tab.write()  # the same seed
    assert tab.tokens == first
    tab.set("Seed", 7)
    tab.write()
    assert tab.tokens != first


@slow
@pytest.mark.interpreter
def test_attention_and_both_backends(tab):
    tab.page.click("#look")
    tab.see("#attention", "no text yet")
    tab.write("The fox")
    tab.page.click("#look")
    tab.page.wait_for_selector("#attention iframe")
    inside = tab.page.frame_locator("#attention iframe")
    inside.locator("#heads button").nth(3).click()
    assert inside.locator("#heads button").count() == 4 and "Layer 2, head 2" in inside.locator("#chosen").inner_text()
    tab.page.wait_for_function("document.querySelector('#attention iframe').offsetHeight > 700")
    tab.write("fox")  # another text, whose maps these are not
    assert tab.page.locator("#attention iframe").count() == 0
    tab.page.get_by_role("tab", name="torch beside triton").click()
    tab.page.click("#both")
    tab.see("#sides", "the same tokens")
    assert "not a speed" in tab.page.inner_text("#sides") or "INTERPRETER" not in tab.page.inner_text("#sides")


@slow
@pytest.mark.interpreter
def test_the_switch_writes_with_triton(tab):
    tab.set("Length", 10)
    tab.write("The fox")
    expected = tab.tokens
    tab.page.get_by_label("triton", exact=True).check()
    tab.write()
    assert tab.tokens == expected


@slow
def test_what_a_prompt_says_never_runs(tab):
    tab.choose("bytes")
    tab.see("#facts", "bpe")
    tab.write(HOSTILE)
    # the marks at line breaks, and U+FFFD, are the only other things in the page
    assert tab.page.inner_text("#text .prompt") == HOSTILE
    assert tab.page.locator("#text img, #text script").count() == 0
    tab.page.click("#look")
    tab.page.wait_for_selector("#attention iframe")
    tab.choose("letters")
    tab.see("#facts", "characters")
    tab.write(HOSTILE, wait="never seen")
    assert tab.page.locator("#notes img, #notes script").count() == 0
    tab.page.wait_for_timeout(500)
    assert not tab.page.evaluate("window.harmed")


@slow
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "The prompt is empty"),
        ("The fox. " * 20, "the model sees the last 16"),
        ("x" * 3_000_000, "this page takes 100,000"),
        ("\x00\x1b", "never seen"),
        ("\u2603\U0001f600", "never seen"),
        ("\u202eT", "never seen"),
        ("\ud800", "never seen"),
    ],
    ids=["empty", "longer than the block", "megabytes", "control", "unknown", "direction", "surrogate"],
)
def test_prompts_of_every_kind(tab, prompt, said):
    if prompt == "\ud800":
        tab.page.evaluate(
            """() => { const box = document.querySelector("#prompt textarea"); box.value = "\\ud800";
                       box.dispatchEvent(new Event("input", { bubbles: true })); }"""
        )
        prompt = None
    tab.write(prompt, wait=said)
    tab.write("The fox")  # it goes on
    assert len(tab.tokens) == 30


@slow
@pytest.mark.parametrize(
    ("label", "value", "said"),
    [
        ("Temperature", 0, None),
        ("Temperature", 2, None),
        ("Top-p", 0, "top_p is 0"),
        ("Top-k", 1000, None),
        ("Top-k", 1, None),
        ("Length", 1, None),
        ("Length", 1000, None),
        ("Seed", 0, None),
    ],
)
def test_sliders_at_their_ends(tab, label, value, said):
    tab.set(label, value)
    tab.write("The fox", wait=said or "bits of surprise")
    assert said or len(tab.tokens) == (value if label == "Length" else 30)


@slow
def test_stop(tab, served):
    write_run(served.runs / "deep", n_layer=32)  # slow enough to be stopped
    tab.page.click("#refresh")
    tab.page.wait_for_function("document.querySelector('#run input').value === 'letters'")
    tab.choose("deep")
    tab.see("#facts", "32 layers")
    tab.set("Length", 1000)
    tab.write("The fox", wait=None)
    tab.page.wait_for_selector("#text [data-i='5']")
    tab.page.click("#stop")
    tab.see("#notes", "Stopped after")
    assert 5 < len(tab.tokens) < 1000
    shutil.rmtree(served.runs / "deep")


@slow
def test_two_tabs_have_texts_of_their_own(tab, chromium, served):
    other = Tab(chromium, served)
    other.set("Length", 200)
    tab.set("Length", 200)
    other.write("fox", wait=None)
    tab.write("The ", wait=None)
    for each, prompt in ((tab, "The "), (other, "fox")):
        each.see("#notes", "200 tokens")
        assert each.page.text_content("#text .prompt") == prompt and len(each.tokens) == 200
    tab.page.click("#text [data-i='9']")
    tab.see("#others", "Token 10,")
    assert "Choose a token" in other.page.inner_text("#others")
    assert tab.tokens != other.tokens and not other.errors
    other.page.close()


@slow
def test_a_run_that_goes_and_one_that_is_half_there(tab, served):
    write_run(served.runs / "short")
    tab.page.click("#refresh")
    tab.page.wait_for_function("document.querySelector('#run input').value === 'letters'")
    tab.choose("short")
    tab.write("The fox")
    (served.runs / "short" / "best" / "model.safetensors").write_bytes(b"half")
    tab.write(wait="damaged")
    shutil.rmtree(served.runs / "short")
    tab.write(wait="is gone: refresh")
    tab.page.click("#look")
    tab.see("#attention", "is gone")
    assert len(tab.tokens) == 30
    tab.page.click("#refresh")
    tab.page.wait_for_function("document.querySelector('#run input').value !== 'short'")
    tab.write()


@slow
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page(chromium, served, width):
    tab = Tab(chromium, served, width)
    tab.write("The fox " * 3)
    tab.page.click("#text [data-i='3']")
    tab.see("#others", "Token 4,")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    box = tab.page.evaluate(
        "(() => { const b = document.querySelector('#text'), r = b.getBoundingClientRect();"
        " return [...b.querySelectorAll('[data-i]')].every(t => t.getBoundingClientRect().right <= r.right + 1); })()"
    )
    assert box
    tab.page.close()


@slow
def test_pages_of_elsewhere_are_refused(served):
    def status(headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(served.address + "/", headers=headers)) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    code, headers = status({})
    policy = headers["Content-Security-Policy"]
    assert code == 200 and "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    assert status({"Host": "evil.example"})[0] == 400
    assert status({"Host": f"localhost:{served.port}"})[0] == 200


@slow
def test_it_listens_here_alone_takes_another_port_and_ends_with_one_line(served, chromium, tmp_path):
    second = Served(served.runs, tmp_path, "--port", str(served.port))
    assert second.port != served.port and f"port {served.port} is taken" in second.said()
    writing = Tab(chromium, second)
    writing.set("Length", 1000)
    writing.write("The fox", wait=None)
    writing.page.wait_for_selector("#text [data-i='5']")
    began = len(second.said())
    assert second.end() == 130
    ended = [line for line in second.said()[began:].splitlines() if not line.startswith(("CONNECT", "LOOKUP"))]
    assert ended == ["the playground has ended"]
    writing.page.close()
    for found in (second, served):
        asked = re.findall(r"^(?:CONNECT|LOOKUP) (.*)$", found.said(), re.MULTILINE)
        assert asked and all(re.match(r"\(?'?b?'?(127\.0\.0\.1|localhost)\b", line) for line in asked), set(asked)
        assert "Traceback" not in found.said()
    if (tables := Path(f"/proc/{served.process.pid}/net/tcp")).exists():
        rows = [line.split() for line in tables.read_text().splitlines()[1:]]
        listening = {row[1] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == served.port}
        assert listening == {f"0100007F:{served.port:04X}"}


@slow
def test_without_any_run_it_says_how_to_get_one(chromium, served, tmp_path):
    alone = Served(tmp_path / "none", tmp_path, "--port", "0")
    page = chromium.new_page()
    page.goto(alone.address)
    page.wait_for_function("document.querySelector('#facts')?.textContent.includes('python train.py')", timeout=60_000)
    page.close()
    assert alone.end() == 130
    assert json.dumps(alone.said()).count("Traceback") == 0
