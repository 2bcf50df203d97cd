"""Stop texts against the plain search through the whole text, however it is cut into pieces."""

import itertools
import random

import pytest

from minigpt.errors import UserError
from minigpt.stops import Stops, cut


def expected(text: str, stops: list[str]) -> str:
    """The text before the stop text that is complete first; of two that end at one character, the longer."""
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text
    end, length = min(ends)
    return text[: end + length]


def test_every_way_to_cut_a_text_gives_the_same():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab", k=draw.randint(0, 12)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        places = sorted(draw.sample(range(len(text) + 1), draw.randint(0, len(text))))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
        search, found = Stops(stops), ""
        for piece in pieces:
            found += search.feed(piece)
        wanted = expected(text, stops)
        assert search.found == any(stop in text for stop in stops)
        assert wanted.startswith(found), "what was given out is certain"
        assert found + search.flush() == wanted == cut(text, stops)[0], (text, stops)


def test_nothing_is_held_back_without_need():
    search = Stops(["abcd", "x"])
    assert [search.feed(piece) for piece in ("za", "b", "ca", "q")] == ["z", "", "abc", "aq"]
    assert Stops([]).feed("anything") == "anything"


def test_an_empty_stop_text_is_refused():
    with pytest.raises(UserError, match="stop text is empty"):
        Stops(["a", ""])
