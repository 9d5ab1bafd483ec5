"""Text made comparable: one normal form and its n-grams, for decontamination and deduplication.

Pure functions that scan a text a constant number of times.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

# Marks that differ between copies of a problem and never change what it asks: math delimiters, quotes, end marks.
_MARKS = str.maketrans(dict.fromkeys("$\"'`“”‘’«»?!;:", " "))
_DELIMITERS = re.compile(r"\\[()\[\]]")
# What must stand before comes after the first letter: a pattern that begins with a look-behind is tried everywhere.
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_DECIMALS = re.compile(r"\.(?<=\d\.)\d+")
_LOOSE_POINT = re.compile(r"[.,](?!\d)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def normalise(text: str) -> str:
    """Return the normal form in which two copies of a text are equal.

    NFKC, lower case, `1,000.50` as `1000.5`, without math delimiters, quotes, end marks and doubled white space.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _THOUSANDS.sub("", text)
    text = _DECIMALS.sub(lambda digits: digits[0].rstrip("0"), text)
    return " ".join(_LOOSE_POINT.sub(" ", _DELIMITERS.sub(" ", text).translate(_MARKS)).split())


def without_numbers(normal: str) -> str:
    """Return a normal form with every number written as 0."""
    return _NUMBER.sub("0", normal)


def word_ngrams(words: list[str], n: int) -> set[str]:
    """Return the distinct runs of n words; fewer than n words give none."""
    return {" ".join(words[start : start + n]) for start in range(len(words) - n + 1)}


def char_ngrams(text: str, n: int) -> set[str]:
    """Return the distinct runs of n characters; a shorter text gives none."""
    return {text[start : start + n] for start in range(len(text) - n + 1)}


def assistant_text(completion: Iterable[Mapping[str, Any]]) -> str:
    """Return all that the assistant wrote: content, reasoning fields, tool calls."""
    said = []
    for message in completion:
        if message["role"] == "assistant":
            said += [message[key] for key in sorted(message) if key != "role" and isinstance(message[key], str)]
            # a call's id is drawn at random: two equal calls differ in it
            said += [json.dumps(call.get("function", call), sort_keys=True) for call in message.get("tool_calls") or ()]
    return "\n".join(said)
