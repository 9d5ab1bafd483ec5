"""What RSR is compared with in its paper (arXiv 2601.14249, appendix B) and costs at most further forward passes."""

import re
from collections.abc import Sequence

import numpy as np

LOCAL_SENTENCES = 4
"""Preceding sentences that a local surprisal sees. The paper says "several"; the number is our choice."""

# The words count for quality here; `perhaps` and `might` count against it in the branch filter.
_LIMO_WORDS = (
    (0.20, re.compile(r"\b(?:check|verify)\b", re.IGNORECASE)),
    (0.25, re.compile(r"\b(?:perhaps|might)\b", re.IGNORECASE)),
    (0.25, re.compile(r"\b(?:therefore|since)\b", re.IGNORECASE)),
)
_LENGTH_WEIGHT = 0.30
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def limo_scores(texts: Sequence[str]) -> list[float]:
    """Return LIMO's rule-based quality of each text, relative to the others; higher is better.

    30% number of words, 20% frequency of check / verify, 25% of perhaps / might, 25% of therefore / since; counts are
    divided by the number of words and every criterion is standardised over the texts (one that never varies counts 0).
    """
    words = np.array([len(text.split()) for text in texts], dtype=float)
    total = _LENGTH_WEIGHT * _standardised(words)
    for weight, pattern in _LIMO_WORDS:
        found = np.array([len(pattern.findall(text)) for text in texts], dtype=float)
        total = total + weight * _standardised(found / np.maximum(words, 1))
    return total.tolist()


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = values.std() if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def sentence_starts(text: str) -> list[int]:
    """Return the characters at which the sentences of a text begin: after . ! ? and blanks, or after a line's end."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [0, *(end for end in ends if end < len(text))] if text else []


def local_windows(tokens: int, starts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return, for every sentence, the (first, own, last) tokens of a pass that sees the sentences before it only.

    Args:
        tokens: Number of tokens.
        starts: The tokens at which sentences begin, ascending; the first is 0.

    Returns:
        Sentence i is the tokens own .. last - 1, its context the tokens first .. own - 1: LOCAL_SENTENCES sentences.
    """
    bounds = [*dict.fromkeys(starts), tokens]
    return [(bounds[max(0, i - LOCAL_SENTENCES)], bounds[i], bounds[i + 1]) for i in range(len(bounds) - 1)]
