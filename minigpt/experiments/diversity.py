"""How diverse a text is, and how much of it the text that was trained on has: numbers for samples of one length."""

import itertools
import math
import re
from collections import Counter

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
NEARBY = 16
"""Words back in which a word counts as repeated."""


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def diversity(text: str, vocabulary: set[str]) -> dict[str, float]:
    """What the measures below say of a text, each between 0 and 1 but for the entropy; NaN where it has too few words.

    distinct_1, distinct_2: distinct words, and pairs of neighbouring words, per word and pair (Li et al. 2016).
    entropy: of its character trigrams, in bits. known: the share of its words that are in `vocabulary`.
    repetition: the share of its words that one of the NEARBY words before was, too (after Welleck et al. 2020).
    """
    found = words(text)
    pairs = list(itertools.pairwise(found))
    trigrams = Counter(text[i : i + 3] for i in range(len(text) - 2))
    total = trigrams.total()
    again = [word in found[max(0, i - NEARBY) : i] for i, word in enumerate(found)]
    return {
        "distinct_1": _share(len(set(found)), len(found)),
        "distinct_2": _share(len(set(pairs)), len(pairs)),
        "entropy": -sum(n / total * math.log2(n / total) for n in trigrams.values()) if total else math.nan,
        "known": _share(sum(word in vocabulary for word in found), len(found)),
        "repetition": _share(sum(again), len(again)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
