"""HTML of the playground: colours that every eye tells apart, and text that stays text."""

import html.parser
import itertools

import pytest

from minigpt import marks
from minigpt.marks import SHADES
from minigpt.playing import Text, Token
from minigpt.side_by_side import Result, Side

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "\"' onmouseover='alert(1)",
    "&lt;b&gt;",
    "<!--",
    "\x00\x1b[31m",
    "\u202etxt.exe",
    "\u2028",
]


class Parsed(html.parser.HTMLParser):
    """The tags, the attributes and the text that a browser would find."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words = set(), set(), ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_comment(self, data):
        raise AssertionError("a comment")

    def handle_data(self, data):
        self.words += data


def token(text, bits=1.0, alternatives=(), id=5, name=None):
    return Token(id, text, text if name is None else name, bits, list(alternatives))


def a_text(prompt="", tokens=(), notes=(), ended="done"):
    return Text("run", "torch", prompt, [], list(notes), list(tokens), ended)


def luminance(colour):
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_shades_are_readable_and_darken_with_every_step():
    for shade in SHADES:
        assert contrast(shade.background, shade.ink) >= 4.5, shade
        assert shade.background in marks.style() and shade.ink in marks.style()
    for one, next_ in itertools.pairwise(SHADES):
        assert one.bits < next_.bits
        assert luminance(one.background) - luminance(next_.background) > 0.04, next_


@pytest.mark.parametrize(
    ("bits", "number"), [(0, 0), (0.49, 0), (0.5, 1), (1, 2), (3.99, 3), (4, 4), (7.9, 4), (8, 5), (60, 5)]
)
def test_a_surprisal_has_its_shade(bits, number):
    assert marks.level(bits) == number
    assert f's{number}"' in marks.token(0, token("x", bits))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_stays_text_wherever_it_comes_from(hostile):
    its = token(hostile, alternatives=[(5, hostile, 0.75), (6, "b", 0.25)])
    text = a_text(hostile, [its, token("", name=hostile)], [hostile], hostile)
    result = Result(1, (Side(hostile, True, None, None, [1]), Side(hostile, False, 1.0, 1.0, [2])), 0.1, 0.1, 1, 1.0)
    for source in (
        marks.written(text),
        marks.alternatives(text, 0),
        marks.notes(text),
        marks.problem(hostile),
        marks.comparison(result),
    ):
        found = Parsed(source)
        assert found.tags <= {"span", "i", "p", "code", "ol", "li", "table", "tr", "th", "td", "b"}
        assert found.attributes <= {"class", "title", "data-i", "style", "role", "aria-hidden", "aria-label"}
    shown = Parsed(marks.written(text)).words
    assert shown.count(marks.readable(hostile)) == 3  # the prompt, the token, and the name of the one without a text
    assert not any(c in shown for c in "\x00\x1b\u202e\u2028")
    assert Parsed(marks.frame(hostile)).tags == {"iframe"}


def test_what_cannot_be_seen_is_marked_and_lines_stay_lines():
    assert marks.readable("a\tb\n\x7f\ud800") == "a\tb\n\\x7f\\xd800"
    shown = marks.written(a_text("a\n", [token("\n"), token(" \n\nb")]))
    assert Parsed(shown).words == "a\u23ce\n\u23ce\n \u23ce\n\u23ce\nb"
    shown.encode("utf-8")


def test_the_interpreter_is_told_loudly():
    text = a_text()
    assert "loud" not in marks.notes(text)
    text.warning = "slow < INTERPRETER"
    assert '<p class="loud"><b>slow &lt; INTERPRETER.</b></p>' in marks.notes(text)


def test_a_text_that_grows_has_a_caret_and_a_long_prompt_is_cut():
    assert "caret" in marks.written(a_text("x", ended="")) and "caret" not in marks.written(a_text("x"))
    words = Parsed(marks.written(a_text("a" * 500 + "b" * 2000))).words
    assert words.endswith("b" * 2000) and "500 characters before" in words and "a" * 20 not in words


def test_alternatives_have_bars_and_the_drawn_token_its_own():
    likely = [(5, "a", 0.5), (6, "<", 0.25)]
    shown = marks.alternatives(a_text("", [token("a", 1.0, likely), token("z", 12.0, likely, id=9)]), 0)
    assert shown.count("<li") == 2 and shown.count('class="drawn"') == 1
    assert "width:50.00%" in shown and "width:25.00%" in shown and "50.0%" in shown and "1.00 bits" in shown
    unlikely = marks.alternatives(a_text("", [token("a", 1.0, likely), token("z", 12.0, likely, id=9)]), 1)
    assert unlikely.count("<li") == 3 and "2.4e-04" in unlikely  # 2 ** -12


@pytest.mark.parametrize("place", [None, -1, 2, "0", "<b>", 1.5, True, {}])
def test_a_place_that_is_none_gets_a_hint(place):
    text = a_text("", [token("a"), token("b")])
    assert "Choose a token" in marks.alternatives(text, place) and "Choose a token" in marks.alternatives(None, 0)


def test_the_interpreters_time_is_not_shown_as_a_speed():
    sides = Side("torch", False, 1234.5, 99.4, [1, 2]), Side("triton", True, None, None, [1, 3])
    words = Parsed(marks.comparison(Result(24, sides, 1.5e-6, 2.5e-6, 23, 8.0))).words
    for said in ("INTERPRETER", "1,234", "99", "not a speed", "1.50e-06", "2.50e-06", "23 of 24", "DIFFERENT tokens"):
        assert said in words
    compiled = sides[0], Side("triton", False, 5000.0, 50.0, [1, 2])
    words = Parsed(marks.comparison(Result(24, compiled, 0, 0, 24, 8.0))).words
    assert "INTERPRETER" not in words and "not a speed" not in words and "the same tokens" in words
