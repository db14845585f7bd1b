"""How a generated answer is compared with accepted ones: exact match and token F1 of SQuAD.

Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1: both sides are put in lower case, and punctuation and the
words a, an and the are left out, before they are compared.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Iterable[str]) -> float:
    """1 if the answer equals one of the accepted ones after `normalise`, else 0."""
    answer = normalise(answer)
    return float(any(answer == normalise(other) for other in accepted))


def token_f1(answer: str, accepted: Iterable[str]) -> float:
    """Best harmonic mean of word precision and recall over the accepted answers, in [0, 1]."""
    return max(_f1(normalise(answer).split(), normalise(other).split()) for other in accepted)


def _f1(answer: list[str], accepted: list[str]) -> float:
    if not answer or not accepted:
        return float(answer == accepted)
    common = sum((collections.Counter(answer) & collections.Counter(accepted)).values())
    return 2 * common / (len(answer) + len(accepted))
