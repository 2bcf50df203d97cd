"""Byte-level BPE in plain Python, slow and by the definition: what the fast one is held to."""

import itertools
import unicodedata
from collections import Counter

ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def kind(character):
    if unicodedata.category(character)[0] in "LN":
        return unicodedata.category(character)[0]
    return " " if character in "\t\n\v\f\r\x85" or unicodedata.category(character)[0] == "Z" else "."


def words(text):
    """GPT-2's pre-tokens: an ending, or letters, numbers or other signs with one space before, or white space."""
    found, here = [], 0
    while here < len(text):
        ending = next((e for e in ENDINGS if text.startswith(e, here)), None)
        end = here + len(ending or "")
        if ending is None:
            first = here + 1 if text[here] == " " and here + 1 < len(text) and kind(text[here + 1]) != " " else here
            end = first + 1
            while end < len(text) and kind(text[end]) == kind(text[first]):
                end += 1
            # of several white spaces before a word, the last one stays with the word
            if kind(text[first]) == " " and end < len(text) and end - first > 1:
                end -= 1
        found.append(text[here:end])
        here = end
    return found


def merge(pieces, left, right):
    """`pieces` with every left, right in it put together, from the left."""
    made, here = [], 0
    while here < len(pieces):
        both = here + 1 < len(pieces) and (pieces[here], pieces[here + 1]) == (left, right)
        made.append(left + right if both else pieces[here])
        here += 2 if both else 1
    return made


def learn(text, alphabet, count):
    """The first `count` merges (left, right) of bytes, fewer where no pair is left that is there twice.

    `alphabet` are the bytes in the order of their ids; of equally frequent pairs the one of smaller ids is first.
    """
    number = {byte: place for place, byte in enumerate(alphabet)}
    pieces = {word: [bytes([b]) for b in word.encode()] for word in words(text)}
    counts = Counter(words(text))
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda p: (-pairs[p], number[p[0]], number[p[1]]), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        number.setdefault(best[0] + best[1], len(number))
        pieces = {word: merge(parts, *best) for word, parts in pieces.items()}
    return merges


def encode(text, merges):
    """The tokens of a text, as bytes."""
    made = []
    for word in words(text):
        parts = [bytes([byte]) for byte in word.encode()]
        for pair in merges:
            parts = merge(parts, *pair)
        made += parts
    return made
