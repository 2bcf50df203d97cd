"""Where a text ends that is to stop before one of several others."""

from collections.abc import Sequence

from .errors import UserError


class Stops:
    """Takes a text piece by piece, and gives back what is certain to come before every one of `stops`.

    The text ends as soon as one of them is complete; where two end at the same character, before the longer one. What
    may be the beginning of one is held back until that is decided, wherever the pieces are cut.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise UserError("the stop text is empty: give it at least one character, or leave it out")
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """What a further piece makes certain; `found` says whether the text has ended."""
        if not self._stops:
            return piece
        sure = ""
        for character in piece:
            if self.found:
                break
            self._held += character
            stop = next((stop for stop in self._stops if self._held.endswith(stop)), None)
            if stop is not None:
                sure, self._held, self.found = sure + self._held[: -len(stop)], "", True
            else:
                keep = max(map(self._begun, self._stops))
                sure, self._held = sure + self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def flush(self) -> str:
        """What was held back, once nothing follows any more."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """How many characters at the end of what is held are a beginning of `stop`."""
        most = min(len(stop) - 1, len(self._held))
        return next(n for n in range(most, -1, -1) if self._held.endswith(stop[:n]))


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first of `stops` to be complete in it, True), or (the whole text, False)."""
    search = Stops(stops)
    before = search.feed(text)
    return (before, True) if search.found else (text, False)
